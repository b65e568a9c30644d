"""The contract of every stage: reuse, resume, a record that is written last, and one line per failure."""

import hashlib
import importlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from minitron import __version__
from minitron.config.parse import parse, read_yaml
from minitron.config.stages import PrepareConfig
from minitron.errors import ConfigError, RunError
from minitron.runtime import entry as runtime_entry
from minitron.runtime import stage
from minitron.storage.hashing import content_hash
from minitron.storage.staging import checkpoints_path


class Counting:
    """A small stage: counts the words of the corpus."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, config: PrepareConfig, directory: Path, tracker: Any) -> dict[str, Any]:
        self.calls += 1
        words = len(Path(config.corpus).read_text().split())
        (directory / "words.txt").write_text(str(words))
        checkpoints_path(directory).mkdir(exist_ok=True)
        (checkpoints_path(directory) / "step-1").write_text("half done")
        return {"metrics": {"words": words}, "history": [{"step": 1, "loss": torch.tensor(0.5)}]}


@pytest.fixture
def work() -> Counting:
    return Counting()


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., PrepareConfig]:
    """Return a function that makes a configuration over two real inputs: a file and a directory."""
    (tmp_path / "corpus.txt").write_text("one two three")
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "config.json").write_text("{}")
    values = {"output": tmp_path / "out", "corpus": str(tmp_path / "corpus.txt"), "teacher": str(tmp_path / "teacher")}

    def configuration(**changes: Any) -> PrepareConfig:
        return parse("prepare", values | changes)  # type: ignore[return-value]

    return configuration


def test_the_record_says_where_a_result_comes_from(
    make: Callable[..., PrepareConfig], work: Counting, tmp_path: Path
) -> None:
    config = make(licence="CC0", tracking_uri=None)
    record = stage.run(config, work)
    assert {path.name for path in config.output.iterdir()} == {"words.txt", "stage.json"}
    assert json.loads((config.output / "stage.json").read_text()) == record
    words = hashlib.sha256(b"3").hexdigest()
    assert record["output_sha256"] == hashlib.sha256(f"words.txt\0{words}\n".encode()).hexdigest()
    assert record["inputs"]["corpus"] == {
        "address": str(tmp_path / "corpus.txt"),
        "sha256": hashlib.sha256(b"one two three").hexdigest(),
    }
    assert record["stage"] == "prepare" and record["metrics"] == {"words": 3}
    assert record["history"] == [{"step": 1, "loss": 0.5}]
    assert record["config"]["licence"] == "CC0" and record["seed"] == record["config"]["seed"] == 1234
    assert record["versions"]["minitron"] == __version__ and record["versions"]["torch"] == torch.__version__
    assert 0 <= record["seconds"] < 10 and record["peak_rss_mb"] > 10
    assert [record[name] for name in ("image", "pipeline_run_id", "mlflow_run_id", "gpus")] == [None, None, None, 0]
    assert not list(tmp_path.glob("*.partial"))


def test_an_input_that_may_not_be_read_is_one_line(
    make: Callable[..., PrepareConfig], work: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """These tests run as root, who may read everything: the refusal is made here."""

    def refuse(path: Path) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("minitron.storage.hashing.hash_file", refuse)
    with pytest.raises(
        RunError, match=r"corpus.txt: Permission denied; give this user permission, or give another directory"
    ):
        stage.run(make(), work)


def test_the_record_is_written_last(make: Callable[..., PrepareConfig], tmp_path: Path) -> None:
    def work(config: PrepareConfig, directory: Path, tracker: Any) -> dict[str, Any]:
        assert directory != config.output and not config.output.exists()
        assert not (directory / "stage.json").exists()
        return {"metrics": {}}

    stage.run(make(), work)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"stage.json"}


def test_run_again_it_returns_at_once(make: Callable[..., PrepareConfig], work: Counting) -> None:
    first = stage.run(make(), work)
    assert stage.run(make(), work) == first
    assert work.calls == 1


@pytest.mark.parametrize("change", ["experiment", "workspace", "pipeline_run_id"])
def test_where_and_how_it_runs_does_not_matter(
    make: Callable[..., PrepareConfig], work: Counting, tmp_path: Path, change: str
) -> None:
    first = stage.run(make(), work)
    second = stage.run(make(**{change: str(tmp_path / "new"), "output": tmp_path / "other"}), work)
    assert first["key"] == second["key"]


def test_changed_content_is_run_again(make: Callable[..., PrepareConfig], work: Counting, tmp_path: Path) -> None:
    first = stage.run(make(), work)
    (tmp_path / "corpus.txt").write_text("one two three four")
    second = stage.run(make(), work)
    assert work.calls == 2 and first["key"] != second["key"] and second["metrics"] == {"words": 4}
    assert (tmp_path / "out" / "words.txt").read_text() == "4"


def test_the_same_content_elsewhere_is_not_run_again(
    make: Callable[..., PrepareConfig], work: Counting, tmp_path: Path
) -> None:
    stage.run(make(), work)
    (tmp_path / "corpus.txt").rename(tmp_path / "moved.txt")
    stage.run(make(corpus=str(tmp_path / "moved.txt")), work)
    assert work.calls == 1


def test_a_changed_setting_is_run_again(make: Callable[..., PrepareConfig], work: Counting) -> None:
    keys = {stage.run(make(seed=seed), work)["key"] for seed in (1, 2)}
    assert work.calls == 2 and len(keys) == 2


def test_a_damaged_result_is_made_again(
    make: Callable[..., PrepareConfig], work: Counting, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage.run(make(), work)
    (tmp_path / "out" / "words.txt").write_text("4")
    stage.run(make(), work)
    assert work.calls == 2 and (tmp_path / "out" / "words.txt").read_text() == "3"
    assert "out: damaged or changed since it was written" in capsys.readouterr().err


def test_a_damaged_input_is_refused(make: Callable[..., PrepareConfig], work: Counting, tmp_path: Path) -> None:
    stage.run(make(), work)
    (tmp_path / "out" / "words.txt").write_text("4")
    with pytest.raises(RunError, match=r"out: content hash \w{12} is not the \w{12} its stage.json records: .*again"):
        stage.run(make(teacher=str(tmp_path / "out"), output=tmp_path / "next"), work)
    assert work.calls == 1 and not (tmp_path / "next").exists()


def test_an_input_that_is_not_the_expected_one_is_refused(
    make: Callable[..., PrepareConfig], work: Counting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a run expects is in no key; a relative address is recorded so that it works from everywhere."""
    monkeypatch.chdir(tmp_path)
    first = stage.run(make(corpus="corpus.txt"), work)
    assert first["inputs"]["corpus"]["address"] == str(tmp_path / "corpus.txt")
    expected = {name: entry["sha256"] for name, entry in first["inputs"].items()}
    assert stage.run(make(expected_sha256=expected), work)["key"] == first["key"] and work.calls == 1
    (tmp_path / "corpus.txt").write_text("one two four")
    found = hashlib.sha256(b"one two four").hexdigest()
    with pytest.raises(ConfigError) as refused:
        stage.run(make(expected_sha256=expected), work)
    assert str(refused.value) == (
        f"corpus: {tmp_path}/corpus.txt: its SHA-256 is {found}, but expected_sha256 is {expected['corpus']}; give "
        "the original input, or remove corpus from expected_sha256"
    )
    assert work.calls == 1


KILLED = """
import os, signal, sys
from pathlib import Path
from minitron.runtime import stage
from minitron.config.parse import parse
from minitron.storage.staging import checkpoints_path

def work(config, directory, tracker):
    (directory / "half-written.txt").write_text("junk")
    checkpoints_path(directory).mkdir()
    (checkpoints_path(directory) / "step-7").write_text("seven")
    {end}

stage.run(parse("prepare", {values}), work)
"""


def _start(config: PrepareConfig, end: str) -> subprocess.Popen:
    code = KILLED.format(end=end, values=config.model_dump(mode="json", exclude_defaults=True))
    return subprocess.Popen([sys.executable, "-c", code])


@pytest.mark.parametrize("workspace", [None, "workspace"])
def test_a_killed_stage_leaves_nothing_and_resumes(
    make: Callable[..., PrepareConfig], tmp_path: Path, workspace: str | None
) -> None:
    config = make(workspace=tmp_path / workspace if workspace else None)
    assert _start(config, "os.kill(os.getpid(), signal.SIGKILL)").wait() == -signal.SIGKILL
    assert not config.output.exists()
    seen = []

    def work(config: PrepareConfig, directory: Path, tracker: Any) -> dict[str, Any]:
        seen.append({path.name for path in directory.iterdir()})
        seen.append({path.name: path.read_text() for path in checkpoints_path(directory).iterdir()})
        return {"metrics": {}}

    stage.run(config, work)
    assert seen == [set(), {"step-7": "seven"}]
    assert {path.name for path in config.output.iterdir()} == {"stage.json"}
    assert not list(tmp_path.rglob("*.partial"))


def test_checkpoints_of_other_work_are_not_resumed(make: Callable[..., PrepareConfig]) -> None:
    _start(make(seed=1), "os.kill(os.getpid(), signal.SIGKILL)").wait()
    seen = []

    def work(config: PrepareConfig, directory: Path, tracker: Any) -> dict[str, Any]:
        seen.append(checkpoints_path(directory).exists())
        return {"metrics": {}}

    stage.run(make(seed=2), work)
    assert seen == [False]


def test_killed_after_the_record_it_loses_nothing(
    make: Callable[..., PrepareConfig], work: Counting, tmp_path: Path
) -> None:
    """The state between the record and the rename: record, key and checkpoints are there, the output is not."""
    record = stage.run(make(), work)
    partial = tmp_path / "out.partial"
    (partial / "checkpoints").mkdir(parents=True)
    (partial / "key").write_text(record["key"])
    (tmp_path / "out").rename(partial / "result")
    assert stage.run(make(), work) == record and work.calls == 1
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"words.txt", "stage.json"}


def test_two_processes_do_not_share_one_place(make: Callable[..., PrepareConfig], work: Counting) -> None:
    process = _start(make(), "import time; time.sleep(60)")
    try:
        checkpoint = make().output.with_name("out.partial") / "checkpoints" / "step-7"
        deadline = time.monotonic() + 60
        while not checkpoint.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        with pytest.raises(RunError, match=r"out\.partial: another process is working there; wait for it"):
            stage.run(make(), work)
        assert checkpoint.read_text() == "seven"
    finally:
        process.kill()
        process.wait()
    stage.run(make(), work)
    assert work.calls == 1


@pytest.mark.parametrize("checkpoints", [False, True])
def test_failures_leave_nothing_but_what_can_be_resumed(
    make: Callable[..., PrepareConfig], tmp_path: Path, checkpoints: bool
) -> None:
    left = {}
    for error in (ConfigError("bad"), RunError("broken"), KeyboardInterrupt()):

        def work(config: PrepareConfig, directory: Path, tracker: Any, error: BaseException = error) -> dict[str, Any]:
            (directory / "half-written.txt").write_text("junk")
            if checkpoints:
                checkpoints_path(directory).mkdir(exist_ok=True)
            raise error

        with pytest.raises(type(error)):
            stage.run(make(), work)
        left[type(error)] = (tmp_path / "out.partial").exists()
        assert not (tmp_path / "out").exists()
    assert left == {ConfigError: False, RunError: checkpoints, KeyboardInterrupt: checkpoints}


def test_a_missing_input_is_refused_before_anything_is_made(
    make: Callable[..., PrepareConfig], work: Counting, tmp_path: Path
) -> None:
    before = set(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match="nowhere: no such file or directory; give an existing path or hf://org/name"):
        stage.run(make(teacher="nowhere"), work)
    assert set(tmp_path.rglob("*")) == before and work.calls == 0


def test_what_is_no_result_is_refused_and_untouched(
    make: Callable[..., PrepareConfig], work: Counting, tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    for name, text in (("thesis.txt", "years of work"), ("stage.json", '{"theatre": "Globe"}')):
        (tmp_path / "mine" / name).write_text(text)
        with pytest.raises(ConfigError, match=r"output .*mine: exists, and is not a stage's result; give a new"):
            stage.run(make(output=tmp_path / "mine"), work)
    with pytest.raises(ConfigError, match="is not a stage's result"):
        stage.run(make(output=tmp_path / "mine" / "thesis.txt"), work)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work" and work.calls == 0


def test_another_stages_result_is_not_overwritten(
    make: Callable[..., PrepareConfig], work: Counting, tmp_path: Path
) -> None:
    stage.run(make(), work)
    config = parse("finetune", {"output": tmp_path / "out", "teacher": "teacher", "dataset": tmp_path / "teacher"})
    with pytest.raises(ConfigError, match=r"out: holds a result of prepare, not of finetune; give another directory"):
        stage.run(config, work)
    assert (tmp_path / "out" / "words.txt").read_text() == "3"


@pytest.mark.parametrize("place", ["teacher", "link"])
def test_an_output_within_an_input_is_refused(
    make: Callable[..., PrepareConfig], work: Counting, tmp_path: Path, place: str
) -> None:
    (tmp_path / "link").symlink_to("teacher")
    with pytest.raises(ConfigError, match=rf"{place}/out: lies inside teacher .*teacher and would change it"):
        stage.run(make(output=tmp_path / place / "out"), work)
    assert [path.name for path in (tmp_path / "teacher").iterdir()] == ["config.json"]


def test_a_workspace_keeps_the_result_for_every_output(
    make: Callable[..., PrepareConfig], work: Counting, tmp_path: Path
) -> None:
    workspace = tmp_path / "workspace"
    records = [stage.run(make(workspace=workspace, output=tmp_path / name), work) for name in ("one", "two")]
    result = workspace / "prepare" / records[0]["key"][:16]
    assert work.calls == 1 and records[0] == records[1]
    inodes = {(path / "words.txt").stat().st_ino for path in (result, tmp_path / "one", tmp_path / "two")}
    assert len(inodes) == 1
    assert json.loads((tmp_path / "two" / "stage.json").read_text()) == records[0]


def test_a_damaged_result_in_the_workspace_is_made_again(
    make: Callable[..., PrepareConfig], work: Counting, tmp_path: Path
) -> None:
    config = make(workspace=tmp_path / "workspace")
    record = stage.run(config, work)
    result = tmp_path / "workspace" / "prepare" / record["key"][:16]
    (result / "words.txt").write_text("4")
    stage.run(config, work)
    assert work.calls == 2
    assert content_hash(config.output) == content_hash(result) == record["output_sha256"]


def test_without_caching_it_is_run_again(make: Callable[..., PrepareConfig], work: Counting, tmp_path: Path) -> None:
    config = make(caching=False, workspace=tmp_path / "workspace")
    stage.run(config, work)
    second = stage.run(config, work)
    assert work.calls == 2 and json.loads((config.output / "stage.json").read_text()) == second


def _write_text(path: Path) -> None:
    path.write_text("x" * 100_000)


def _save_torch(path: Path) -> None:
    torch.save(torch.zeros(1_000_000), path)


def _save_safetensors(path: Path) -> None:
    # save_file replaces the link to /dev/full; this is what it raises on a full 1 MB tmpfs.
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("write", [_write_text, _save_torch, _save_safetensors])
def test_a_full_disk_is_one_line(
    make: Callable[..., PrepareConfig], tmp_path: Path, write: Callable[[Path], None]
) -> None:
    def work(config: PrepareConfig, directory: Path, tracker: Any) -> dict[str, Any]:
        (directory / "weights").symlink_to("/dev/full")  # every write to it finds the disk full
        write(directory / "weights")
        return {"metrics": {}}

    with pytest.raises(RunError, match=r"out: disk full \(\d+ MB free\); free some space, then run it again"):
        stage.run(make(), work)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_a_place_that_may_not_be_written_is_one_line(make: Callable[..., PrepareConfig], work: Counting) -> None:
    with pytest.raises(RunError) as caught:
        stage.run(make(output=Path("/sys/kernel/out")), work)  # read-only or not permitted, for root too
    assert str(caught.value).startswith("/sys/kernel/out.partial: ")
    assert str(caught.value).endswith("; give this user permission, or give another directory") and work.calls == 0


def test_the_command_fails_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.yaml").write_text("output: out\nteacher: t\ndataset: d\nhiden_size: 3\nseed: x\n")
    arguments = ["-m", "minitron.prune", "--config", str(tmp_path / "bad.yaml")]
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == (
        "error: prune.seed: Input should be a valid integer, unable to parse string as an integer (found 'x'); "
        "prune.hiden_size: unknown key; did you mean 'hidden_size'?\n"
    )
    monkeypatch.setattr(sys, "argv", [*arguments[1:], "--debug"])
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as caught:
            runtime_entry.main("prune")
    finally:
        signal.signal(signal.SIGTERM, before)
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.startswith("Traceback") and error.endswith(done.stderr)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file or directory; give an existing YAML file"),
        (b"a: [1\n", r"not YAML \(.*\); correct it"),
        (b"- a\n- b\n", "found list, not 'key: value' lines; correct it"),
        (b"", "found NoneType, not 'key: value' lines; correct it"),
        (b"\xff\xfe\x00", r"not text \(.*\); give a YAML file"),
    ],
)
def test_a_bad_file_is_one_line(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "config.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"config\.yaml: {message}$") as caught:
        read_yaml(path)
    assert "\n" not in str(caught.value)


def test_a_task_fails_with_a_status_and_a_note(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINITRON_WORKSPACE", str(tmp_path))
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as caught:
            runtime_entry.launch(
                "prepare", output=str(tmp_path / "out"), corpus="nowhere.txt", teacher="", pipeline_run_id="run-1"
            )
    finally:
        signal.signal(signal.SIGTERM, before)
    message = "prepare.teacher: String should have at least 1 character (found '')"
    assert caught.value.code == 2 and capsys.readouterr().err == f"error: {message}\n"
    assert json.loads((tmp_path / "failure.json").read_text()) == {
        "stage": "prepare",
        "exit_status": 2,
        "message": message,
        "pipeline_run_id": "run-1",
    }


def test_the_note_of_an_earlier_attempt_is_taken_away(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINITRON_WORKSPACE", str(tmp_path))
    before, note = signal.getsignal(signal.SIGTERM), tmp_path / "failure.json"
    try:
        for failed in ("prepare", "finetune"):
            note.write_text(json.dumps({"stage": failed, "message": "disk full"}))
            runtime_entry.launch(
                "prepare", output=tmp_path / "out", corpus=str(inputs["corpus"]), teacher=str(inputs["teacher"])
            )
            assert note.exists() == (failed == "finetune")
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("name", stage.LATE)
def test_a_stage_that_is_imported_late_runs_as_its_module_does(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module(f"minitron.stages.{name}")
    monkeypatch.setattr(stage, "run", lambda *arguments: arguments[:2])  # a stage may check its inputs, too
    assert module.run("config") == ("config", module.work)


def test_a_task_whose_result_is_there_imports_no_torch(inputs: dict[str, Path], tmp_path: Path) -> None:
    """In processes of their own, as tasks are: this one has torch."""
    values = {name: str(inputs[name]) for name in ("corpus", "teacher")} | {"workspace": str(tmp_path / "workspace")}
    values |= {"validation_fraction": 0.1, "test_fraction": 0.1}
    code = f"import sys; from minitron.runtime.entry import launch; launch('prepare', output=sys.argv[1], **{values})"
    code += "; print(*sorted({'torch', 'transformers', 'mlflow'} & {*sys.modules}))"
    for output, loaded in (("first", "torch transformers"), ("again", "")):
        command = [sys.executable, "-c", code, str(tmp_path / output)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == loaded
        assert (tmp_path / output / "stage.json").is_file()


@pytest.mark.parametrize("number", [float("nan"), float("inf"), torch.tensor(float("nan"))])
def test_a_number_that_is_not_finite_is_no_result(make: Callable[..., PrepareConfig], number: Any) -> None:
    config = make()
    results = {"metrics": {"words": 3}, "history": [{"step": 1, "loss": number}]}
    with pytest.raises(RunError, match=r"history\[0\]\.loss is (nan|inf)|not JSON compliant: nan") as caught:
        stage.run(config, lambda *_: results)
    assert caught.value.exit_status == 1 and "\n" not in str(caught.value)
    assert not config.output.exists()


def test_an_earlier_result_with_such_a_number_is_not_reused(make: Callable[..., PrepareConfig], work: Counting) -> None:
    """Version 0.2 wrote them."""
    config = make()
    record = stage.run(config, work)
    (config.output / "stage.json").write_text(json.dumps(record | {"metrics": {"words": float("nan")}}))
    with pytest.raises(
        RunError, match=r"out: no result of prepare, because metrics\.words is nan; change its settings"
    ):
        stage.run(config, work)
