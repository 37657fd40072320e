"""What a configuration raises, ranks that do not come together, and what a run loses while it trains."""


class ConfigError(ValueError):
    """A configuration that cannot run. The message is one line: the keys, their values and the rule they break."""


class RunError(RuntimeError):
    """A run that trained has lost something outside of its configuration, such as its data. Another start may help."""


class StartError(RuntimeError):
    """The ranks did not come together, or one was lost while they started. The configuration may well be valid."""
