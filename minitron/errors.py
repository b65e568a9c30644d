"""The two ways a stage can fail. Every message names the thing, the value found and the remedy, and no password."""

import re


class MinitronError(Exception):
    """A failure that is explained in one line; its class decides the exit status."""

    exit_status = 1


class ConfigError(MinitronError):
    """The configuration is invalid; nothing ran. Exit status 2."""

    exit_status = 2


class RunError(MinitronError):
    """The configuration is valid, but the run failed. Exit status 1."""

    exit_status = 1


def without_password(text: str) -> str:
    """Remove users and passwords from the URIs in a text. A password may contain any character except spaces.

    An address hf://org/name@revision stays as it is.
    """
    return re.sub(r"(?<!hf:)//(?:[^/:@\s]*:\S*|[^/@\s]*)@", "//", text)
