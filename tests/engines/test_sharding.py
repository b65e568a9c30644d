"""Engine hf in several processes: the curve and the weights of one process, whatever the micro-batches."""

import os
import shutil
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from minitron.config.parse import parse
from minitron.config.stages import DistillConfig, FinetuneConfig, TrainingConfig
from minitron.data.indexed import IndexedDataset
from minitron.engines.checkpoints import MARKER
from minitron.engines.hf import loop
from minitron.engines.hf.training import make_job
from minitron.engines.launcher import launch
from minitron.engines.progress import Cost, find_end, find_start, read_result
from minitron.errors import ConfigError
from minitron.models.checkpoint import save_model
from minitron.stages import distill
from tests.constants import REPOSITORY
from tests.servers import forks
from tests.servers.kubernetes_server import KubernetesServer, cluster_of_a_task

TOLERANCE = 1e-4

SETTINGS: dict[str, Any] = {
    "sequence_length": 32,
    "micro_batch_size": 4,
    "global_batch_size": 8,
    "max_steps": 6,
    "learning_rate": 3e-3,
    "min_learning_rate": 3e-4,
    "validation_interval": 3,
    "validation_sequences": 15,
    "checkpoint_interval": 4,
}
"""The validation does not divide by two or four; the best state is the last one."""

DISTILLATION: dict[str, Any] = {"cross_entropy_weight": [1.0, 0.0], "temperature": 2.0, "intermediate_layers": [[2, 3]]}
"""Also the terms that only a step's number and the layers' outputs give."""


class Cases:
    """The trainings of one and of several processes; a training is a directory of work."""

    def __init__(self, root: Path, dataset: Path, teacher: Path) -> None:
        self.root, self._dataset, self._teacher = root, dataset, teacher
        self._masked = self._mask(dataset)
        self.untied, self.tied = (self._save_student(name, name == "tied") for name in ("untied", "tied"))

    def _mask(self, dataset: Path) -> Path:
        """Return a copy of the dataset in which runs of 40 tokens count or not, so that some sequences have none."""
        directory = shutil.copytree(dataset, self.root / "masked")
        for split in ("train", "validation"):
            runs = torch.randint(2, (10_000,), generator=torch.Generator().manual_seed(0)).repeat_interleave(40)
            tokens = len(IndexedDataset(directory / split).tokens)
            (directory / f"{split}.mask").write_bytes(runs[:tokens].to(torch.uint8).numpy().tobytes())
        return directory

    def _save_student(self, name: str, is_tied: bool) -> Path:
        torch.manual_seed(0)
        config = LlamaConfig.from_pretrained(self._teacher, num_hidden_layers=2, tie_word_embeddings=is_tied)
        save_model(LlamaForCausalLM(config), self.root / name, tokenizer_from=self._teacher)
        return self.root / name

    def make(self, name: str, start_from: str = "", **settings: Any) -> dict[str, Any]:
        """Return a worker's job: finetune for the tied student, distill for the untied one."""
        work, config = self.root / "work" / name, SETTINGS | settings
        work.mkdir(parents=True)
        if start_from:
            shutil.copytree(self.root / "work" / start_from, work, dirs_exist_ok=True)
        dataset = self._masked if "masked" in name else self._dataset
        places = {"dataset": dataset, "output": self.root / "unused", "teacher": self._teacher}
        if "untied" in name:
            distillation = DistillConfig(**places, student=self.untied, **DISTILLATION, **config)
            return make_job(distillation, self.untied, loop.Teacher(self._teacher), work)
        finetuning = FinetuneConfig(**places | {"teacher": str(self.tied)}, **config)
        return make_job(finetuning, self.tied, None, work)

    def train_here(self, job: dict[str, Any]) -> None:
        """Train in this process, as the stage does if it has one GPU."""
        work, teacher = Path(job["work"]), job["teacher"] and loop.Teacher(Path(job["teacher"][0]))
        config: Any = parse(job["stage"], job["config"])
        loop.train(config, Path(job["initial"]), teacher, work, find_start(work))

    def assert_same(self, name: str, expected: str, tolerance: float = TOLERANCE) -> None:
        """Compare histories and best states."""
        rows, weights = zip(*(self._read(self.root / "work" / case) for case in (expected, name)), strict=True)
        assert len(rows[0]) == 6 + 3 and len(rows[1]) == 6 + 3
        for left, right in zip(*rows, strict=True):
            assert right == pytest.approx(left, rel=tolerance, abs=tolerance), (name, left, right)
        assert weights[0].keys() == weights[1].keys()
        for key, values in weights[0].items():
            torch.testing.assert_close(weights[1][key], values, rtol=0, atol=tolerance)

    def _read(self, work: Path) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
        found = find_end(work)
        assert found and found[1].step == 6
        rows = read_result(TrainingConfig.model_construct(**SETTINGS), *found, Cost(0.0, None))["history"]
        return rows, load_file(found[1].path / "model.safetensors")


@pytest.fixture(scope="module")
def cases(teacher: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Cases:
    """Each number of processes is started once: starting them takes longer than all they train."""
    cases = Cases(tmp_path_factory.mktemp("sharding"), dataset, teacher)
    for name in ("untied", "tied", "untied, masked"):
        cases.train_here(cases.make(name))
    two = [
        cases.make("untied, masked, on two", micro_batch_size=1),
        cases.make("untied on two", micro_batch_size=1),
        cases.make("tied on two, recomputed", gradient_checkpointing=True),
        cases.make("untied from one on two", start_from="untied"),
    ]
    four = [cases.make("untied on four", micro_batch_size=2), cases.make("tied on four", micro_batch_size=1)]
    four.append(cases.make("tied from one on four", start_from="tied", micro_batch_size=2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(REPOSITORY))
        for processes, jobs in ((2, two), (4, four)):
            directory = cases.root / f"{processes} processes"
            directory.mkdir()
            launch("tests.servers.hf_worker", {"job": "train", "jobs": jobs}, directory, processes)
    cases.train_here(cases.make("tied from two on one", start_from="tied on two, recomputed"))
    return cases


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("untied on two", "untied"),
        ("untied, masked, on two", "untied, masked"),
        ("tied on two, recomputed", "tied"),
        ("untied on four", "untied"),
        ("tied on four", "tied"),
    ],
)
def test_several_processes_give_the_curve_and_the_weights_of_one(cases: Cases, name: str, expected: str) -> None:
    cases.assert_same(name, expected)


@pytest.mark.parametrize("name", ["untied from one on two", "tied from one on four", "tied from two on one"])
def test_a_checkpoint_resumes_on_another_number_of_processes(cases: Cases, name: str) -> None:
    cases.assert_same(name, name.partition(" ")[0])


def test_every_process_holds_its_share_of_weights_and_moments(cases: Cases) -> None:
    """A checkpoint has a file per process, with its parameters and their two moments."""
    names = {1: "untied", 2: "untied on two", 4: "untied on four"}
    sizes = {
        count: [path.stat().st_size for path in (cases.root / "work" / name / "checkpoint-4").glob("*.distcp")]
        for count, name in names.items()
    }
    assert [len(sizes[count]) for count in names] == [*names]
    (whole,) = sizes[1]
    for count in (2, 4):
        assert max(sizes[count]) < 1.3 * whole / count, sizes  # a tensor's header takes a kilobyte


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KubernetesServer]:
    with cluster_of_a_task(tmp_path, monkeypatch) as state:
        state.run_jobs = True
        yield state


def test_two_nodes_that_are_preempted_save_their_state_and_give_the_same_model(
    server: KubernetesServer, cases: Cases, teacher: Path, dataset: Path, tmp_path: Path
) -> None:
    """Kueue takes the nodes away, which get SIGTERM, and gives them back: no step is lost or repeated."""
    workspace = tmp_path / "workspace"
    paths = {"dataset": dataset, "teacher": teacher, "student": cases.untied}
    paths = {name: Path(shutil.copytree(path, workspace / name)) for name, path in paths.items()}
    server.objects["pods"]["distill-task"]["metadata"]["labels"]["minitron.io/train-job-queue"] = "gpus"
    ended, saved = Event(), list[str]()

    def admit_and_preempt_once() -> None:
        while not ended.wait(0.05):
            if any(job["spec"].get("suspend") for job in list(server.objects["trainjobs"].values())):
                server.admit()
            elif not saved and any(workspace.rglob(f"best-3/{MARKER}")):
                server.preempt()
                saved.extend(path.parent.name for path in workspace.rglob(f"checkpoint-*/{MARKER}"))

    thread = Thread(target=admit_and_preempt_once, daemon=True)
    thread.start()
    settings = SETTINGS | {"num_nodes": 2, "gpus_per_node": 1, "micro_batch_size": 1, "checkpoint_interval": 100}
    config = DistillConfig(output=tmp_path / "student", workspace=workspace, **paths, **settings, **DISTILLATION)
    record = distill.run(config)
    ended.set()
    thread.join()
    assert len(saved) == 1, "SIGTERM saves, between the intervals"
    assert record["gpus"] == 2 and record["metrics"]["best_step"] == 6
    assert_same_weights(tmp_path / "student", cases)


CODE = """
from minitron.engines.hf import training
from minitron.runtime.entry import main
training.count_workers = lambda config: 2
main("distill")
"""
"""A stage on a machine with two GPUs: without them, its workers compute on the CPU."""


def test_a_stage_that_is_killed_resumes_to_the_same_model(
    cases: Cases, teacher: Path, dataset: Path, tmp_path: Path
) -> None:
    """Its workers end at once: they save nothing that the next attempt does not expect."""
    settings = SETTINGS | DISTILLATION | {"micro_batch_size": 1, "checkpoint_interval": 1}
    places = {"dataset": dataset, "teacher": teacher, "student": cases.untied, "output": tmp_path / "student"}
    config = settings | {name: str(path) for name, path in places.items()}
    (tmp_path / "distill.yaml").write_text(yaml.safe_dump(config))

    def start() -> BaseProcess:
        arguments = ["-c", CODE, "--config", str(tmp_path / "distill.yaml")]
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
        return forks.start_python(arguments, tmp_path / "log", tmp_path / "log", environment)

    process = start()
    work = tmp_path / "student.partial" / "checkpoints"
    while not (work / "checkpoint-2" / MARKER).exists():
        assert process.exitcode is None, (tmp_path / "log").read_text()
        time.sleep(0.005)
    process.kill()
    process.join()
    process = start()
    process.join()
    assert process.exitcode == 0, (tmp_path / "log").read_text()
    assert_same_weights(tmp_path / "student", cases)


def assert_same_weights(student: Path, cases: Cases) -> None:
    """Compare a model with that of two undisturbed processes, to the bit."""
    expected = load_file(cases.root / "work" / "untied on two" / "best-6" / "model.safetensors")
    found = load_file(student / "model.safetensors")
    assert all(torch.equal(found[name], values) for name, values in expected.items())


def test_micro_batches_that_the_processes_cannot_share_are_refused(dataset: Path, tmp_path: Path) -> None:
    values = {"teacher": "t", "dataset": dataset, "output": tmp_path, "gpus": 3} | {"global_batch_size": 128}
    match = r"finetune.global_batch_size: 128 is not a multiple of micro_batch_size 4 x 3 GPUs = 12; choose 120 or "
    with pytest.raises(ConfigError, match=match):
        parse("finetune", values)
    assert parse("finetune", values | {"gpus": 4}).gpus == 4
    with pytest.raises(ConfigError, match="micro_batch_size 4 x 24 GPUs = 96; choose 96 or another multiple"):
        nodes = {"gpus": 0, "num_nodes": 3, "gpus_per_node": 8, "workspace": tmp_path}
        parse("finetune", values | nodes)
