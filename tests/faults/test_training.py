"""A training that is killed at every write of its checkpoints, or whose checkpoints get damaged, ends as if it was not.

The model is small, but real: its losses rise and fall, so that a lost best state would show in the result.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from minitron.engines.checkpoints import MARKER
from minitron.storage.hashing import content_hash
from tests.faults import injector
from tests.servers import forks

SETTINGS = {
    "sequence_length": 32,
    "micro_batch_size": 2,
    "global_batch_size": 4,
    "max_steps": 4,
    "learning_rate": 0.07,
    "min_learning_rate": 0.07,
    "warmup_steps": 0,
    "validation_interval": 1,
    "validation_sequences": 8,
    "checkpoint_interval": 1,
    "seed": 4,
}
"""With these the validation loss is lowest after steps 1 and 3, and higher after the others."""

CODE = """
import json, sys
from minitron.runtime.entry import main
from tests.faults import injector
injector.arm(sys.argv.pop(1), json.loads(sys.argv.pop(1)), "cut", sys.argv.pop(1))
main("finetune")
"""

TERMINATED_CODE = """
import os, signal, sys
from pathlib import Path
from minitron.engines.hf import loop
from minitron.models import scoring
from minitron.runtime.entry import main

log, number, passes = Path(sys.argv.pop(1)), int(sys.argv.pop(1)), []

def count_passes(compute):
    def compute_and_count(*arguments):
        passes.append(compute)
        log.write_text(str(len(passes)))
        if len(passes) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return compute(*arguments)
    return compute_and_count

for module in (loop, scoring):
    module.compute_hidden_states = count_passes(module.compute_hidden_states)
main("finetune")
"""

WRITTEN = {
    "best": {"config.json", "model.safetensors", "complete.tmp", MARKER},
    "checkpoint": {"__0_0.distcp", ".metadata.tmp", ".metadata", "history.jsonl", "complete.tmp", MARKER},
    "finished": {"history.jsonl", "complete.tmp", MARKER},
}
"""The files of a best state and of a checkpoint."""


class Training:
    """One training, in processes that can be killed at the n-th change of a file of its checkpoints."""

    def __init__(self, teacher: Path, dataset: Path, output: Path, **settings: Any) -> None:
        self.output, self.partial = output, output.with_name(f"{output.name}.partial")
        self.log, self.events = output.with_name(f"{output.name}.log"), output.with_name(f"{output.name}.events")
        self._config = output.with_name(f"{output.name}.yaml")
        places = {"teacher": str(teacher), "dataset": str(dataset), "output": str(output)}
        self._config.write_text(yaml.safe_dump(SETTINGS | settings | places))

    def attempt(self, event: int | list[str] = 0) -> int | None:
        """Start it, or start it again; cut off a write by a kill, as `injector.arm` does. Return the exit status."""
        checkpoints = str(self.partial / "checkpoints")
        arguments = [checkpoints, json.dumps(event), str(self.events), "--config", str(self._config)]
        process = forks.start_python(["-c", CODE, *arguments], self.log, self.log)
        process.join()
        return process.exitcode

    def terminate(self, forward_pass: int) -> int:
        """Start it; send SIGTERM in a forward pass of a micro-batch. Return the exit status; no pass may follow."""
        arguments = ["-c", TERMINATED_CODE, str(self.events), str(forward_pass), "--config", str(self._config)]
        process = forks.start_python(arguments, self.log, self.log)
        process.join()
        assert int(self.events.read_text()) == forward_pass, self.log.read_text()
        assert process.exitcode is not None
        return process.exitcode

    def list_events(self) -> list[tuple[bool, Path]]:
        """Return all changes of the checkpoints so far: whether it was killed there, and the path."""
        return [(at_kill, Path(site.path)) for at_kill, site in self._list_sites()]

    def list_labels(self, at_kill: bool = False) -> list[str]:
        """Return the labels of the sites so far, or of those at which it was killed."""
        checkpoints = self.partial / "checkpoints"
        return [site.make_label(checkpoints) for killed, site in self._list_sites() if killed or not at_kill]

    def _list_sites(self) -> list[tuple[bool, injector.Site]]:
        lines = [json.loads(line) for line in self.events.read_text().splitlines()]
        return [(action is not None, injector.Site(event, path)) for _, action, event, path in lines]

    def read_result(self) -> dict[str, Any]:
        """Return what must not depend on kills."""
        record = json.loads((self.output / "stage.json").read_text())
        for name in ("tokens_per_second", "tflops_per_second"):
            record["metrics"].pop(name)
        weights = content_hash(self.output / "model.safetensors")
        return {"weights": weights, "history": record["history"], "metrics": record["metrics"]}


@pytest.fixture(scope="module")
def whole(teacher: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Training:
    """The training that nothing disturbed."""
    training = Training(teacher, dataset, tmp_path_factory.mktemp("whole") / "model")
    assert training.attempt() == 0, training.log.read_text()
    assert training.read_result()["metrics"]["best_step"] == 3
    return training


@pytest.fixture
def killed(whole: Training, teacher: Path, dataset: Path, tmp_path: Path) -> Training:
    """The same training, killed when its second checkpoint had become complete, and the first was still there."""
    training = Training(teacher, dataset, tmp_path / "model")
    assert training.attempt(["os.remove checkpoint-1/*"])
    assert {path.parent.name for path in training.partial.rglob(MARKER)} == {"best-1", "checkpoint-1", "checkpoint-2"}
    return training


def test_killed_at_every_write_of_a_checkpoint_it_ends_as_the_undisturbed_one(
    whole: Training, killed: Training
) -> None:
    """Every attempt is killed at the first write at which none before was killed, until one comes to the end."""
    left = set(whole.list_labels())
    while status := killed.attempt(sorted(left)):
        assert status < 0, killed.log.read_text()
        left -= set(killed.list_labels(at_kill=True))
    assert killed.read_result() == whole.read_result()
    places = {
        (path.parent.name.partition("-")[0], re.sub(r"\.json\.\w+\.", ".", path.name))
        for at_kill, path in killed.list_events()
        if at_kill
    }
    assert places >= {(kind, name) for kind, names in WRITTEN.items() for name in names}


@pytest.mark.parametrize(
    ("names", "begins_anew"),
    [
        (["checkpoint-2/__0_0.distcp"], False),
        (["checkpoint-2/history.jsonl", f"checkpoint-1/{MARKER}"], True),
        (["best-1/model.safetensors"], True),
    ],
)
@pytest.mark.parametrize("damage", ["a bit", "cut off"])
def test_a_damaged_checkpoint_is_not_used(
    whole: Training, killed: Training, names: list[str], begins_anew: bool, damage: str
) -> None:
    """The one before is, if it is there, else the training begins anew; the best state belongs to both."""
    for path in (killed.partial / "checkpoints" / name for name in names):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 4
        path.write_bytes(content if damage == "a bit" else b"")
    killed.events.unlink()
    assert killed.attempt() == 0, killed.log.read_text()
    assert killed.read_result() == whole.read_result()
    assert (("best-0", MARKER) in [path.parts[-2:] for _, path in killed.list_events()]) == begins_anew
    for name in names:
        assert f"warning: {killed.partial}/checkpoints/{name.partition('/')[0]}: " in killed.log.read_text()


def test_sigterm_breaks_off_a_validation_and_a_step_and_saves_the_state(
    whole: Training, teacher: Path, dataset: Path, tmp_path: Path
) -> None:
    """A validation has four micro-batches, a step two; what was broken off is done again after the resume."""
    training = Training(teacher, dataset, tmp_path / "model", checkpoint_interval=100)
    attempts = [
        (3, []),  # in the first validation: there is nothing to save
        (4 + 2 + 2, ["checkpoint-1"]),  # in the validation after step 1
        (4 + 1, ["checkpoint-1"]),  # which comes first now; in step 2
        (4 + 2 + 4 + 1, ["checkpoint-2"]),  # in step 3
        (2 + 4 + 2 + 2, ["checkpoint-4"]),  # in the last validation
    ]
    for forward_pass, checkpoints in attempts:
        assert training.terminate(forward_pass) == 143
        assert [path.parent.name for path in training.partial.glob(f"checkpoints/checkpoint-*/{MARKER}")] == checkpoints
    training.events.unlink()
    assert training.attempt() == 0, training.log.read_text()
    assert training.read_result() == whole.read_result()
