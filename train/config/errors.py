"""The errors of a start: what a configuration raises, and ranks that do not come together."""


class ConfigError(ValueError):
    """A configuration that cannot run. The message is one line: the keys, their values and the rule they break."""


class StartError(RuntimeError):
    """The ranks did not come together, or one was lost while they started. The configuration may well be valid."""
