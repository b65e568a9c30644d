"""The two ways a stage can fail. Every message names the thing, the value found and the remedy, and no password."""

import re


class MinitronError(Exception):
    """A failure that is explained in one line; its class decides the exit status."""

    exit_status = 1


class ConfigError(MinitronError):
    """What was asked for cannot work: nothing was run. Exit status 2."""

    exit_status = 2


class RunError(MinitronError):
    """What was asked for is valid, but the run could not be finished. Exit status 1."""

    exit_status = 1


def without_password(text: str) -> str:
    """Return a URI, or a text that has some, without users and passwords; a password may have any character but spaces.

    An address hf://org/name@revision stays as it is.
    """
    return re.sub(r"(?<!hf:)//(?:[^/:@\s]*:\S*|[^/@\s]*)@", "//", text)
