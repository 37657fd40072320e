"""What ends a run with one line: bad configurations, ranks that do not come together, failures while it trains."""


class ConfigError(ValueError):
    """A configuration that cannot run. The message is one line: the keys, their values and the rule they break."""


class StartError(RuntimeError):
    """The ranks did not come together, or one was lost while they started. The configuration may well be valid."""


class RunError(RuntimeError):
    """A run that has trained cannot go on with its data, its storage or its next stage. Started again, it may."""
