"""The injector itself: it counts every way to change files, and strikes where it was told to."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults import injector

WORK = """
import os, shutil, sys
from pathlib import Path
import torch
from safetensors.torch import save_file

root = Path(sys.argv[1])
(root / "a").mkdir()
(root / "a" / "one.json").write_text("1234")
(root / "a" / "one.json").replace(root / "a" / "two.json")
torch.save({"x": torch.ones(100)}, root / "a" / "x.pt")
save_file({"x": torch.ones(100)}, root / "a" / "x.safetensors")
os.link(root / "a" / "two.json", root / "a" / "three.json")
shutil.rmtree(root / "a")
"""
WRITES = ["os.mkdir a", "open one.json", "os.rename two.json", "torch.save x.pt"]
WRITES += ["safetensors.torch.serialize_file x.safetensors", "os.link three.json"]


def work(root: Path, event: int | None, action: str | int = "kill") -> tuple[int, str, list[str]]:
    """Run WORK in an armed process; return its exit status, its errors, and the sites."""
    root.mkdir()
    log = root.with_name(f"{root.name}.log")
    environment = os.environ | injector.child_environment(root, event, action, log)
    done = subprocess.run(
        [sys.executable, "-c", WORK, str(root)], env=environment, start_new_session=True, capture_output=True, text=True
    )
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return done.returncode, done.stderr, [f"{event} {Path(path).name}" for _, _, event, path in lines]


def test_every_change_below_the_directory_is_an_event(tmp_path: Path) -> None:
    status, errors, sites = work(tmp_path / "root", None)
    assert (status, errors) == (0, "")
    assert sites[:6] == WRITES
    assert sorted(sites[6:]) == sorted(
        [*(f"os.remove {name}" for name in ("two.json", "three.json", "x.pt", "x.safetensors")), "os.rmdir a"]
    )


def test_a_kill_comes_before_the_event_and_a_cut_within_it(tmp_path: Path) -> None:
    for event, (name, action, left) in {
        3: ("one.json", "kill", 4),
        2: ("one.json", "cut", 0),
        4: ("x.pt", "kill", None),
    }.items():
        root = tmp_path / f"{event}"
        assert work(root, event, action)[0] == -signal.SIGKILL
        path = root / "a" / name
        assert (path.stat().st_size if path.exists() else None) == left
    assert work(tmp_path / "half", 5, "cut")[0] == -signal.SIGKILL
    assert 0 < (tmp_path / "half" / "a" / "x.safetensors").stat().st_size < 400


def test_a_call_fails_once_with_the_error(tmp_path: Path) -> None:
    with injector.armed(tmp_path, 2, errno.ENOSPC) as sites:
        (tmp_path / "folder").mkdir()
        with pytest.raises(OSError, match="No space left"):
            (tmp_path / "folder" / "file").write_text("")
        (tmp_path / "folder" / "file").write_text("")
        shutil.rmtree(tmp_path / "folder")
    assert [site.event for site in sites] == ["os.mkdir", "open", "open", "os.remove", "os.rmdir"]
    assert sites[-1].path == str(tmp_path / "folder")
