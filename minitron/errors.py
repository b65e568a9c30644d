"""The two ways a stage can fail. Every message names the thing, the value found and the remedy."""


class MinitronError(Exception):
    """A failure that is explained in one line; its class decides the exit status."""

    exit_status = 1


class ConfigError(MinitronError):
    """What was asked for cannot work: nothing was run. Exit status 2."""

    exit_status = 2


class RunError(MinitronError):
    """What was asked for is valid, but the run could not be finished. Exit status 1."""

    exit_status = 1
