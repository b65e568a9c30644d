"""Count what a process does to the files below a directory; at an event end its process group, or let the call fail.

In a process of your own session (a kill ends all processes of the group):

    injector.arm(directory, event=3, action="kill")

In the processes that it starts, before their first import:

    environment = injector.child_environment(directory, event=3, action=errno.ENOSPC)

In this process, for calls that fail:

    with injector.armed(directory, event=3, action=errno.EIO) as sites:
        ...

Without an event nothing happens, and `sites` is the list of all events. Events are Python's audit events (open for
writing, rename, remove, rmdir, mkdir, link, symlink, truncate), and the writers that are no Python: safetensors' and
torch.save's. A directory's removal is an event per entry. What changes nothing is none: making a directory that is
there or removing what is not, opening a file again to append to it.
"""

import functools
import json
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["Site", "arm", "arm_from_environment", "armed", "child_environment", "count_event", "disarm"]

VARIABLE = "MINITRON_TEST_FAULTS"
"""Environment variable that arms a child process: JSON, the arguments of `arm`."""

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_PATHS = {
    "os.rename": 2,
    "os.link": 2,
    "os.symlink": 2,
    "os.remove": 1,
    "os.rmdir": 1,
    "os.mkdir": 1,
    "os.truncate": 1,
}
"""Audit events, and how many of their arguments are paths."""


class Site(NamedTuple):
    """An event: its name and the path that it changes, the new one of a rename."""

    event: str
    path: str

    def make_label(self, directory: Path) -> str:
        """Return what identifies the site in every run: no name of this run, no random one; one for a folder."""
        is_one_of_many = self.event in ("os.remove", "os.link")
        path = (
            (f"{Path(self.path).parent}/*" if is_one_of_many else self.path)
            .removeprefix(f"{directory}/")
            .partition("?")[0]
        )
        names = r"[0-9a-f]{16,}|\d{8,}|\btmp\w{8}\b|tfevents.*|(?<=hashes/).*"
        changing = rf"{names}|(?<=\.)[0-9a-f]{{8}}(?=\.tmp)|(?<=artifacts/)\d+"
        return re.sub(changing, "*", f"{self.event} {path}")


class _Fault(NamedTuple):
    directory: Path
    event: int | list[str] | None
    action: str | int
    log: str | None
    sites: list[Site]


_fault: _Fault | None = None
_lock = threading.RLock()
_hooked = False


def arm(
    directory: Path | str,
    event: int | list[str] | None = None,
    action: str | int = "kill",
    log: Path | str | None = None,
) -> list[Site]:
    """Count events below a directory from now on, in this process and in its forks.

    Args:
        directory: events elsewhere do not count.
        event: the number of the event at which something happens, from 1, or labels of sites, the first of which that
            comes counts; None: nothing happens.
        action: "kill": SIGKILL to the process group before the event. "cut": SIGKILL when a file that is opened for
            writing is empty, or half of it is written by safetensors or torch.save; other events as "kill".
            A number of `errno`: the call fails with this error, once.
        log: a file that gets a line per event, which a kill does not lose.

    Returns:
        The sites, which grow with every event.
    """
    global _fault, _hooked
    _fault = _Fault(Path(directory).absolute(), event, action, str(log) if log else None, [])
    if not _hooked:
        sys.addaudithook(_hear)  # no hook is ever removed
        _hooked = True
    return _fault.sites


def disarm() -> None:
    """Count no more."""
    global _fault
    _fault = None


@contextmanager
def armed(directory: Path | str, event: int | None = None, action: str | int = "kill") -> Iterator[list[Site]]:
    """Arm this process until the block ends."""
    try:
        yield arm(directory, event, action)
    finally:
        disarm()


def child_environment(
    directory: Path | str, event: int | None = None, action: str | int = "kill", log: Path | str | None = None
) -> dict[str, str]:
    """Return the environment variables that arm every Python process which is started with them."""
    here = str(Path(__file__).parent)
    values = [str(Path(directory).absolute()), event, action, str(log) if log else None]
    return {VARIABLE: json.dumps(values), "PYTHONPATH": os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])}


def arm_from_environment() -> None:
    """Arm this process if its environment says so; sitecustomize.py calls it."""
    if values := os.environ.get(VARIABLE):
        arm(*json.loads(values))


def count_event(event: str, path: Any, cut: Callable[[], Any] = lambda: None, within: bool = True) -> None:
    """Count an event; if its number has come, kill, or raise the error.

    Args:
        event: its name.
        path: what it changes.
        cut: does half of it, for the action "cut".
        within: whether `path` is a path, which counts below the directory only.
    """
    with _lock:
        if not (fault := _fault) or (within and not _is_below(fault.directory, path)):
            return
        site = Site(event, os.fsdecode(path))
        if _changes_nothing(site, fault.sites):
            return
        fault.sites.append(site)
        number, label = len(fault.sites), site.make_label(fault.directory)
        has_come = label in fault.event if isinstance(fault.event, list) else number == fault.event
        if has_come or fault.log:
            disarm()  # what follows is no event
            _write_line(fault, has_come)
        if not has_come:
            _restore(fault)
            return
        if isinstance(fault.action, int):
            _restore(fault)
            raise OSError(fault.action, os.strerror(fault.action), os.fsdecode(path))
        if fault.action == "cut":
            cut()
        os.killpg(os.getpgrp(), signal.SIGKILL)


def _changes_nothing(site: Site, earlier: list[Site]) -> bool:
    match site.event:
        case "os.mkdir":
            return Path(site.path).is_dir()
        case "os.remove" | "os.rmdir":
            return not os.path.lexists(site.path)
        case _:
            return site.event == "append" and site in earlier


def _restore(fault: _Fault) -> None:
    global _fault
    _fault = fault


def _write_line(fault: _Fault, has_come: bool) -> None:
    if fault.log:
        site = fault.sites[-1]
        line = json.dumps([len(fault.sites), fault.action if has_come else None, *site]) + "\n"
        stream = os.open(fault.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(stream, line.encode())
        os.close(stream)


def _is_below(directory: Path, path: Any) -> bool:
    return directory in Path(os.fsdecode(path)).absolute().parents


def _hear(event: str, arguments: tuple[Any, ...]) -> None:
    """Hear an audit event, of which a process has thousands."""
    if _fault is None:
        return
    if event == "open":
        _wrap_writers()
        path, _, flags = arguments
        if flags & _WRITING and not isinstance(path, int):
            count_event("append" if flags & os.O_APPEND else "open", path, lambda: os.open(path, flags, 0o666))
    elif event in _PATHS:
        paths = arguments[: _PATHS[event]]
        folders = arguments[-len(paths) :] if event not in ("os.symlink", "os.truncate") else ()
        if not isinstance(paths[-1], int):
            # rmtree gives names within an open folder
            named = [_join_folder(path, folder) for path, folder in zip(paths, folders, strict=True)] or [
                Path(os.fsdecode(paths[-1]))
            ]
            inside = [path for path in named if _fault and _is_below(_fault.directory, path)]
            if inside:
                count_event(event, inside[-1])


def _join_folder(path: Any, folder: int) -> Path:
    name = os.fsdecode(path)
    return Path(f"/proc/self/fd/{folder}").readlink() / name if folder >= 0 else Path(name)


def _wrap_writers() -> None:
    """Wrap the writers whose files Python does not open, once their modules are imported."""
    for module, name, argument in (("safetensors.torch", "serialize_file", 1), ("torch", "save", 1)):
        writer = getattr(sys.modules.get(module), name, None)
        if writer is not None and not hasattr(writer, "counted"):
            setattr(sys.modules[module], name, _count_writer(f"{module}.{name}", writer, argument))


def _count_writer(event: str, writer: Callable[..., Any], argument: int) -> Callable[..., Any]:
    @functools.wraps(writer)
    def counted(*arguments: Any, **keywords: Any) -> Any:
        def write_half() -> None:
            writer(*arguments, **keywords)
            os.truncate(path, Path(path).stat().st_size // 2)

        path = arguments[argument] if len(arguments) > argument else keywords.get("filename", keywords.get("f"))
        if isinstance(path, str | os.PathLike):
            count_event(event, path, write_half)
        return writer(*arguments, **keywords)

    counted.counted = True  # type: ignore[attr-defined]
    return counted
