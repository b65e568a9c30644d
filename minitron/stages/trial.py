"""Try a candidate of a search in its next round: measure its cut, or distill it shortly.

The candidate goes through the stages prune and distill, whose results the workspace keeps: a race that was killed
repeats nothing. A candidate that fails is a result, too, so that the race goes on without it. Kubeflow cannot collect
from a loop of which an iteration failed: such a task must succeed. So a process of its own does the work, because it
may be killed for want of memory. Where the whole pod is killed (Kubernetes lets the kernel kill all processes of a
container that exceeds its limit), the last attempt notes it.
"""

import gc
import hashlib
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

from minitron.config.parse import parse
from minitron.config.settings import RETRIES
from minitron.config.shapes import SearchSettings
from minitron.config.stages import DistillConfig, TrialConfig
from minitron.engines.launcher import end_with_parent
from minitron.errors import MinitronError
from minitron.fast_imports import many_imports
from minitron.models.measurements import Measurements
from minitron.runtime.entry import run_stage
from minitron.runtime.model_sources import local_model
from minitron.storage.cache import persistent_directory
from minitron.storage.files import write_atomically
from minitron.storage.layout import MEASUREMENTS, PLAN, TRIAL, read_json_object
from minitron.storage.staging import replace_directory


def run(config: TrialConfig) -> dict[str, Any]:
    """Write `trial.json` to `config.output`; return the candidate with its result as JSON in `result`."""
    candidate, started = json.loads(config.candidate), time.monotonic()
    attempts = _open_attempts(config)
    if error := _count_attempt(attempts):
        candidate["error"] = error
    else:
        with tempfile.TemporaryDirectory(dir=_make_parent(config.output)) as scratch:
            candidate = _work_apart(config, candidate, Path(scratch))
    if candidate["error"]:
        print(f"warning: trial: {candidate['name']} failed: {candidate['error']}", file=sys.stderr, flush=True)
    candidate["seconds"] += round(time.monotonic() - started, 1)
    with replace_directory(config.output) as directory:
        write_atomically(directory / TRIAL, candidate)
    attempts.delete()
    return {
        "metrics": {"loss": candidate["losses"][-1]} if candidate["losses"] else {},
        "result": json.dumps(candidate),
    }


def _open_attempts(config: TrialConfig) -> Measurements:
    """Return the notes of the attempts at this trial, which the pipeline run's next attempt finds."""
    name = hashlib.sha256(json.dumps([config.pipeline_run_id, config.candidate]).encode()).hexdigest()[:16]
    return Measurements(persistent_directory(config.workspace) / MEASUREMENTS / name, "trial")


def _count_attempt(attempts: Measurements) -> str | None:
    """Count an attempt; return an error if it is the last one, and the attempts before it never ended."""
    retries, ended = int(os.environ.get(RETRIES, 0)), (attempts.read("attempts") or {"count": 0})["count"]
    if not retries:
        return None
    if ended >= retries:
        return (
            f"its pod was ended before the work was done (attempts: {ended}), probably for want of memory or because "
            "it was evicted; see its pods, and give prune.memory and distill.memory more"
        )
    attempts.write("attempts", {"count": ended + 1})
    return None


def _work_apart(config: TrialConfig, candidate: dict[str, Any], scratch: Path) -> dict[str, Any]:
    """Let a child process do the work; return the candidate with its loss, its error, or what ended the child.

    The child is a fork, which is safe because this process has not imported torch. It gets this process's SIGTERM.
    """
    child = multiprocessing.get_context("fork").Process(target=_work, args=(config, candidate, scratch))
    child.start()
    try:
        child.join()
    finally:
        child.terminate()  # this process was ended; a child that is done does not mind
        child.join()
    return read_json_object(scratch / TRIAL) or candidate | {"error": _explain_end(child.exitcode or 0)}


def _explain_end(status: int) -> str:
    if status == -signal.SIGKILL:
        return (
            "its process was killed (signal 9), probably for want of memory; give prune.memory and distill.memory "
            "more, or lower distill.micro_batch_size"
        )
    cause = f"signal {-status}, {signal.Signals(-status).name}" if status < 0 else f"status {status}"
    return f"its process ended without a result ({cause}); see its log"


def _work(config: TrialConfig, candidate: dict[str, Any], scratch: Path) -> None:
    """Write the candidate with its loss or its error to `scratch`: what the child process does."""
    end_with_parent()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        loss = _measure_round(config, candidate, scratch)
        candidate["losses"].append(loss)
    except Exception as error:  # whatever it is, it must not end the race
        if not isinstance(error, MinitronError):
            traceback.print_exc()
        candidate["error"] = next(iter(str(error).splitlines()), type(error).__name__)
    write_atomically(scratch / TRIAL, candidate)


def _make_parent(output: Path) -> Path:
    output.parent.mkdir(parents=True, exist_ok=True)
    return output.parent


def _measure_round(config: TrialConfig, candidate: dict[str, Any], scratch: Path) -> float:
    """Return the validation loss of the cut in the first round, later that after a distillation of the cut."""
    planned = read_json_object(config.planned / PLAN)
    search = SearchSettings.model_validate(planned["search"])
    place = {
        "dataset": str(config.dataset), "teacher": str(config.teacher), "workspace": config.workspace,
        "pipeline_run_id": config.pipeline_run_id,
    }  # fmt: skip
    own = planned["prune"]
    sequences = min(search.calibration_sequences, own.get("calibration_sequences", search.calibration_sequences))
    sizes = candidate["sizes"] | {"calibration_sequences": sequences}
    pruned = run_stage("prune", parse("prune", own | sizes | place | {"output": scratch / "pruned"}))
    number = len(candidate["losses"])
    steps = (1, search.short_steps, search.long_steps)[number]
    short = {"max_steps": steps, "validation_interval": steps, "intermediate_layers": []}
    short["warmup_steps"] = min(planned["distill"].get("warmup_steps", steps), steps)
    values = planned["distill"] | short | place | {"student": str(scratch / "pruned"), "output": scratch / "distilled"}
    distill = parse("distill", values)
    assert isinstance(distill, DistillConfig)
    if number:
        loss = run_stage("distill", distill)["metrics"]["validation_loss"]
    else:
        hashes = {name: entry["sha256"] for name, entry in pruned["inputs"].items()}
        candidate["teacher_loss"] = _measure_loss(distill, config.teacher, hashes["dataset"], hashes["teacher"])
        loss = _measure_loss(distill, distill.student, hashes["dataset"], pruned["output_sha256"])
    print(f"trial: {candidate['name']}: validation loss {loss:.4f} after {steps if number else 0} steps", flush=True)
    return loss


def _measure_loss(config: DistillConfig, model: Path, dataset_sha256: str, model_sha256: str) -> float:
    """Return a model's loss on the sequences that distill validates on; it is kept in the workspace."""
    parts = [dataset_sha256, model_sha256, config.sequence_length, config.validation_sequences, config.seed]
    name = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
    measured = Measurements(persistent_directory(config.workspace) / MEASUREMENTS / name, "trial")
    if not config.caching:
        measured.delete()

    return measured.get("loss", lambda: {"loss": _score_model(config, local_model(model, config))})["loss"]


def _score_model(config: DistillConfig, model: Path) -> float:
    """Return a model's loss; a trial whose results are all reused does not import torch."""
    with many_imports():
        import torch

        from minitron.data.packed import PackedDataset
        from minitron.engines import hf
        from minitron.models.checkpoint import load_model
        from minitron.models.scoring import score_models

    dataset = PackedDataset(local_model(config.dataset, config) / "validation", config.sequence_length, config.seed)
    loaded: Any = load_model(model, hf.get_compute_dtype())
    models = {"model": loaded.to(hf.get_device())}
    scores = score_models(models, dataset, config.validation_sequences, config.micro_batch_size)
    del loaded, models
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return scores["model"]["loss"]
