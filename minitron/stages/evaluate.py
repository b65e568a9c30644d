"""Measure teacher, corrected teacher, pruned model, student and champion; judge the student; write the report.

    python -m minitron.evaluate --config FILE

Writes `evaluation.json`, `items.json`, `lineage.json`, `report.html` and `tensorboard/`. Models with equal weights are
measured once. The measurements are kept in the workspace, part by part: after a kill, or with other gates, only the
missing parts are measured. Without a workspace they are in OUTPUT.measurements until the evaluation ends.
"""

import hashlib
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from minitron import METHOD_VERSION
from minitron.config.metrics import CHAMPION, ITEMS_OF, MODELS, NUMBERS
from minitron.config.parse import list_decisive_settings
from minitron.config.stages import EvaluateConfig, PrepareConfig
from minitron.data.corpus import Corpus
from minitron.data.indexed import IndexedDataset
from minitron.data.manifest import check_tokenizer
from minitron.data.text import write_first_documents
from minitron.data.tokenizer import load_tokenizer
from minitron.engines.hf.measuring import make_job, measure
from minitron.engines.hf.training import WORKER
from minitron.engines.launcher import launch
from minitron.errors import ConfigError
from minitron.models.checks import check_architecture
from minitron.models.measurements import Measurements
from minitron.registry import gates, intervals, lineage
from minitron.report.page import explain_idle_distillation, write_report
from minitron.report.tensorboard import write_events
from minitron.runtime import stage
from minitron.runtime.entry import main
from minitron.runtime.model_sources import fetch_corpus
from minitron.storage.bucket import is_bucket
from minitron.storage.cache import persistent_directory
from minitron.storage.files import write_atomically
from minitron.storage.layout import CONTAMINATION, EVALUATION, ITEMS, LINEAGE, MEASUREMENTS
from minitron.storage.staging import checkpoints_path
from minitron.tracking.stage_run import Tracker


def run(config: EvaluateConfig) -> dict[str, Any]:
    """Measure the models; `config.output` gets evaluation.json and report.html.

    Returns:
        The stage's record; its metrics are those of evaluation.json, with the names model_metric or model_task_metric.

    Raises:
        ConfigError: a tokenizer is not the dataset's, a sequence is longer than a model allows, or a task is unknown.
        RunError: weights, the dataset or a task's data cannot be read.
    """
    return stage.run(config, work)


def work(config: EvaluateConfig, directory: Path, tracker: Tracker) -> dict[str, Any]:
    """Measure, judge, report."""
    names = [*MODELS, *([CHAMPION] if config.champion else [])]
    paths = {name: Path(getattr(config, name)) for name in names}
    _check_models(config, {name: path for name, path in paths.items() if name != CHAMPION})
    if CHAMPION in paths and not _is_comparable(config, paths[CHAMPION]):
        del paths[CHAMPION]
    is_lasting = bool(config.workspace) or is_bucket(config.output)
    parent = persistent_directory(config.workspace) if is_lasting else config.output.parent
    name = MEASUREMENTS if is_lasting else f"{config.output.name}.{MEASUREMENTS}"
    measured = Measurements(parent / name / _hash_measured(config, tracker.identity["inputs"]))
    if not config.caching:
        measured.delete()
    evaluation = _measure_models(config, paths, directory, measured, tracker)
    evaluation |= _judge_student(config, evaluation, tracker.identity["inputs"])
    items = {name: evaluation[name].pop("items") for name in paths if "items" in evaluation[name]}
    write_atomically(directory / ITEMS, intervals.pack_items(items))
    write_atomically(directory / EVALUATION, evaluation)
    origin = lineage.collect_lineage(config)
    write_atomically(directory / LINEAGE, origin)
    if warning := explain_idle_distillation(origin["stages"]):
        print(f"warning: evaluate: {warning}", file=sys.stderr, flush=True)
    write_events(directory, origin["stages"])
    write_report(directory, config, evaluation)
    if not is_lasting:
        measured.delete()
    return {"metrics": flatten_metrics(evaluation)}


def _judge_student(config: EvaluateConfig, evaluation: dict[str, Any], inputs: dict[str, Any]) -> dict[str, Any]:
    """Return the entries of evaluation.json about the test set, the champion and the gates."""
    champion = None
    if config.champion:
        entry = inputs[CHAMPION]  # an alias may move; `pinned` is its version at that time
        numbers = evaluation.get(CHAMPION, {"tasks": {}})
        champion = numbers | {"address": entry.get("pinned", entry["address"]), "sha256": entry["sha256"]}
    rows = gates.judge_student(gates.read_gates(config), evaluation, champion)
    for row in rows:
        print(f"gate: {gates.describe_gate(row)}", flush=True)
        if row["student"] is None and row["metric"] not in NUMBERS:
            metrics = ", ".join(
                f"{task}_{name}" for task, scores in evaluation["student"]["tasks"].items() for name in scores
            )
            raise ConfigError(f"evaluate.gates: {row['metric']} is not measured; give one of {metrics}")
    return {
        "test_set": _hash_test_set(config, inputs),
        "champion": champion,
        "gates": rows,
        "passed": gates.are_gates_met(rows),
    }


def _hash_measured(config: EvaluateConfig, inputs: dict[str, Any]) -> str:
    """Return a hash of everything that affects the measurements: like the stage's key, but without the gates."""
    values = config.model_dump(mode="json")
    names = {*list_decisive_settings(type(config), values)} - {"gates"}
    settings = {name: values[name] for name in names}
    hashes = {name: entry["sha256"] for name, entry in inputs.items()}
    return hashlib.sha256(json.dumps([METHOD_VERSION, settings, hashes], sort_keys=True).encode()).hexdigest()[:16]


def _hash_test_set(config: EvaluateConfig, inputs: dict[str, Any]) -> str:
    """Return a hash of all inputs and settings that make the metrics of two evaluations comparable."""
    names = ("dataset", "teacher", "task_directory", "out_of_domain")
    data = {name: inputs[name]["sha256"] for name in names if name in inputs}
    compared = {
        "sequence_length",
        "evaluation_sequences",
        "seed",
        "tasks",
        "task_limit",
        "num_fewshot",
        "prompts",
        "generation_tokens",
    }
    settings = config.model_dump(mode="json", include=compared)  # num_fewshot is there if it is set
    return hashlib.sha256(json.dumps([data, settings], sort_keys=True).encode()).hexdigest()


def flatten_metrics(evaluation: dict[str, Any]) -> dict[str, float]:
    """Return the metrics of evaluation.json by the names in the log, such as student_arc_easy_acc."""
    outcomes = [row["outcome"] in gates.MET for row in evaluation["gates"]]
    metrics = {"gap_closed": evaluation["gap_closed"]}
    metrics["parameters_ratio"] = evaluation["student"]["parameters"] / evaluation["teacher"]["parameters"]
    metrics |= {f"contamination_{task}": entry["share"] for task, entry in evaluation.get(CONTAMINATION, {}).items()}
    metrics |= {"gates_met": sum(outcomes), "gates_missed": len(outcomes) - sum(outcomes)} if outcomes else {}
    for model in [*MODELS, CHAMPION]:
        measurements = evaluation[model] or {"tasks": {}}
        metrics |= {f"{model}_{name}": value for name, value in measurements.items()}
        for task, numbers in measurements["tasks"].items():
            metrics |= {f"{model}_{task}_{name}": value for name, value in numbers.items()}
    return {name: value for name, value in metrics.items() if isinstance(value, int | float)}


def compute_gap_closed(pruned: float, student: float, teacher: float) -> float | None:
    """Return the share of the loss added by pruning that distillation removed; None if pruning added none.

    The losses are in nats per token: (pruned - student) / (pruned - teacher).
    """
    return (pruned - student) / (pruned - teacher) if pruned > teacher else None


def _check_models(config: EvaluateConfig, paths: dict[str, Path]) -> None:
    for name, path in paths.items():
        longest = check_architecture(path).get("max_position_embeddings")
        if longest is not None and config.sequence_length > longest:
            raise ConfigError(
                f"evaluate.sequence_length: {config.sequence_length} is above max_position_embeddings {longest} of "
                f"{name} {path}; choose at most {longest}"
            )
        check_tokenizer(config.dataset, path)


def _is_comparable(config: EvaluateConfig, champion: Path) -> bool:
    """Say whether the champion can be evaluated on this data; if not, only warn, so that the training is not lost."""
    try:
        _check_models(config, {CHAMPION: champion})
    except ConfigError as error:
        print(f"warning: evaluate: not compared with the champion: {error}", file=sys.stderr, flush=True)
        return False
    return True


@contextmanager
def _open_splits(
    config: EvaluateConfig, directory: Path, teacher: Path, measured: Measurements
) -> Iterator[dict[str, Path]]:
    """Yield the splits validation, test and out_of_domain, but no empty one, and none if they were scored before."""
    if measured.read("scores"):
        yield {}
        return
    names = ["validation", *(["test"] if len(IndexedDataset(config.dataset / "test")) else [])]
    prefixes = {name: config.dataset / name for name in names}
    with TemporaryDirectory(dir=directory) as other:
        if config.out_of_domain:
            prefixes["out_of_domain"] = Path(other) / "out_of_domain"
            documents = Corpus(
                fetch_corpus(config.out_of_domain, config), PrepareConfig.model_fields["text_field"].default
            )
            print(f"evaluate: {config.out_of_domain}: {documents.describe()}", flush=True)
            tokens = config.evaluation_sequences * config.sequence_length + 1
            write_first_documents(documents, load_tokenizer(teacher), prefixes["out_of_domain"], tokens)
        yield prefixes


def _measure_models(
    config: EvaluateConfig, paths: dict[str, Path], directory: Path, measured: Measurements, tracker: Tracker
) -> dict[str, Any]:
    """Return the measurements in evaluation.json; several GPUs measure in as many processes."""
    with _open_splits(config, directory, paths["teacher"], measured) as splits:
        if (processes := _count_processes(config)) > 1:
            work = checkpoints_path(directory)
            work.mkdir(exist_ok=True)
            print(f"evaluate: {processes} processes, which divide sequences and questions", flush=True)
            launch(WORKER, make_job(config, paths, splits, work, measured), work, processes)
        # in this process, whatever the workers have not kept
        measurements, sources, contamination = measure(config, paths, splits, directory, measured)
    teacher_items = measurements[sources["teacher"]]["items"]
    sequences = {
        split: len(teacher_items.get(f"{split}_loss", [])) for split in ("validation", "test", "out_of_domain")
    }
    losses = {name: measurements[source]["validation_loss"] for name, source in sources.items()}
    tracker.log({f"{name}_validation_loss": loss for name, loss in losses.items()})
    _estimate_intervals(measurements, teacher_items)
    items = {name: measurements[source]["items"]["validation_loss"] for name, source in sources.items()}
    return {name: dict(measurements[source]) for name, source in sources.items()} | {
        "gap_closed": compute_gap_closed(losses["pruned"], losses["student"], losses["teacher"]),
        "gap_closed_interval": intervals.estimate_gap(items["pruned"], items["student"], items["teacher"]),
        "sequences": {split: count for split, count in sequences.items() if count or split != "out_of_domain"},
        "prompts": config.prompts,
        CONTAMINATION: contamination,
    }


def _count_processes(config: EvaluateConfig) -> int:
    return max(1, config.gpus)


def _estimate_intervals(measurements: dict[str, dict[str, Any]], teacher: dict[str, list[float]]) -> None:
    """Add to every model the 95 % `intervals` of its metrics, and of its `differences` from the corrected teacher's."""
    for numbers in measurements.values():
        items = numbers["items"] | {metric: numbers["items"][other] for metric, other in ITEMS_OF.items()}
        others = teacher | {metric: teacher[other] for metric, other in ITEMS_OF.items()}
        numbers["intervals"] = {metric: intervals.estimate_interval(metric, own) for metric, own in items.items()}
        numbers["differences"] = {
            metric: intervals.compare_items(metric, own, others[metric], "difference")
            for metric, own in items.items()
            if metric in others
        }


if __name__ == "__main__":
    main("evaluate")
