"""The error of a launch."""


class LaunchError(ValueError):
    """A launch that cannot start. Its message is one line: what is wrong, and what to write instead. Exit code 2."""
