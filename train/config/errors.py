"""The error that a configuration raises."""


class ConfigError(ValueError):
    """A configuration that cannot run. The message is one line: the keys, their values and the rule they break."""
