"""Register the student as a version in the MLflow registry that generates text, with an alias.

python -m minitron.register --config register.yaml

mlflow.pyfunc.load_model("models:/minitron@challenger").predict(["The history of the city"])
"""

import importlib.util
import json
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

from minitron.config.metrics import find_not_finite
from minitron.config.stages import RegisterConfig
from minitron.data.manifest import check_tokenizer
from minitron.errors import ConfigError
from minitron.models.checkpoint import count_stored_parameters
from minitron.models.checks import check_architecture
from minitron.registry import fingerprint, lineage
from minitron.registry import versions as registry_versions
from minitron.report.card import describe_student, write_card
from minitron.report.tables import list_student_metrics
from minitron.runtime import stage
from minitron.runtime.entry import main
from minitron.runtime.record import run_facts
from minitron.storage.files import write_atomically
from minitron.storage.layout import EVALUATION, EVENTS, ITEMS, LINEAGE, MANIFEST, REGISTERED, REPORT, read_record
from minitron.tracking.client import annotate_run, connect, default_retries, fail_fast, one_line_errors
from minitron.tracking.pipeline_run import MODEL_TAG, NOTE_TAG, VERDICT_TAG, join_pipeline_run
from minitron.tracking.stage_run import MlflowTracker, Tracker, make_dataset_inputs, make_metric_name

_VERDICTS = {True: "gates met", False: "gates not met", None: "no gates"}


class _Student(NamedTuple):
    """What is known of the student: evaluation.json, its lineage, and the tags and description of its version."""

    evaluation: dict[str, Any]
    origin: dict[str, Any]
    tags: dict[str, str]
    description: str


def run(config: RegisterConfig) -> dict[str, Any]:
    """Register `config.student`, and write `registered.json` to `config.output`: name, version, alias, URI and run.

    Returns:
        The stage's record; its metrics have the version's number.

    Raises:
        ConfigError: there is no tracking URI, or an input was not written by its stage.
        RunError: the student does not load, or MLflow fails; a partial registration is deleted.
    """
    if config.tracking_uri is None:
        raise ConfigError("register.tracking_uri: missing; give MLflow's address, http(s)://HOST or sqlite:///FILE")
    record = stage.run(config, _work, _check_inputs)
    version, student = record["registered"]["version"], record["inputs"]["student"]["sha256"]
    # A reused record may name a version that has been deleted.
    if not registry_versions.has_version(config.tracking_uri, config.name, version, student):
        record = stage.run(config.model_copy(update={"caching": False}), _work, _check_inputs)
    if config.pipeline_run_id not in (None, record["pipeline_run_id"]):
        _report_unchanged(config, record)
    return record


def _report_unchanged(config: RegisterConfig, record: dict[str, Any]) -> None:
    """Say in the pipeline's run that an earlier one made this version; no stage has opened the run."""
    reason = f"Nothing new: version {record['registered']['version']} of {config.name} is made from the same."
    with one_line_errors(config.tracking_uri), fail_fast():
        client = connect(str(config.tracking_uri))
        run = join_pipeline_run(client, config, config.name)
        assert run is not None  # there is a pipeline_run_id
        annotate_run(client, run.info.run_id, {VERDICT_TAG: "unchanged", NOTE_TAG: reason})
        if "MLFLOW_RUN_ID" not in os.environ:  # else Kubeflow opened the run, and ends it
            client.set_terminated(run.info.run_id)


def _work(config: RegisterConfig, directory: Path, tracker: Tracker) -> dict[str, Any]:
    assert isinstance(tracker, MlflowTracker)  # run() saw a tracking URI
    origin = _complete_lineage(config, tracker, time.time())
    evaluation = json.loads((config.evaluation / EVALUATION).read_text())
    tags = {VERDICT_TAG: _VERDICTS[evaluation.get("passed")]} | _build_tags(config, tracker, origin)
    write_atomically(directory / LINEAGE, origin)
    write_card(directory / registry_versions.CARD, config, evaluation, origin)
    student = _Student(evaluation, origin, tags, describe_student(tags[VERDICT_TAG], evaluation, origin))
    with one_line_errors(config.tracking_uri), default_retries():
        version, run_id = _find_or_make_version(config, directory, tracker, student)
    registered = {
        "name": config.name,
        "version": version,
        "alias": config.alias,
        "model_uri": f"models:/{config.name}@{config.alias}",
        "run_id": run_id,
    }
    write_atomically(directory / REGISTERED, registered)
    return {"metrics": {"version": version}, "registered": registered}


def _find_or_make_version(
    config: RegisterConfig, directory: Path, tracker: MlflowTracker, student: _Student
) -> tuple[int, str]:
    """Return number and run of the version, which a killed attempt may have made."""
    if made := registry_versions.find_version(tracker, config.name):
        registry_versions.complete_version(tracker, made, config.alias)
        if made.run_id != tracker.pipeline_run_id:  # another pipeline run made it
            _describe_pipeline_run(config, tracker, student, None)
        return int(made.version), str(made.run_id)
    card = directory / registry_versions.CARD
    code, requirements = _find_generator(), _list_requirements(config.student)
    with (
        registry_versions.upload_model(tracker, config.student, card, code, requirements) as model_id,
        registry_versions.ensure_registered_model(tracker, config.name),
    ):
        _log_results(config, directory, tracker)
        _describe_pipeline_run(config, tracker, student, model_id)
        version = registry_versions.create_version(
            tracker, config.name, config.alias, model_id, student.tags, student.description
        )
    return version, tracker.pipeline_run_id


def _check_inputs(config: RegisterConfig) -> None:
    for path in (config.evaluation / REPORT, config.evaluation / EVALUATION):
        if not path.is_file():
            raise ConfigError(f"{path}: no such file; give a directory that evaluate wrote")
    measured = {
        config.evaluation / EVALUATION: json.loads((config.evaluation / EVALUATION).read_text()),
        config.student: (read_record(config.student) or {}).get("metrics"),
    }
    for path, numbers in measured.items():
        if reason := find_not_finite(numbers):
            raise ConfigError(f"{path}: {reason}; such a model is not registered; train it again at a lower rate")
    check_architecture(config.student)
    check_tokenizer(config.dataset, config.student)
    if linked := [path for path in config.student.rglob("*") if path.is_symlink() and path.is_dir()]:
        raise ConfigError(f"{linked[0]}: a linked directory, which MLflow does not upload; copy its files there")


def _complete_lineage(config: RegisterConfig, tracker: MlflowTracker, started: float) -> dict[str, Any]:
    """Return the lineage that evaluate wrote, with the records of evaluate and of this unfinished stage."""
    path = config.evaluation / LINEAGE
    licenses = {"data": lineage.read_data_license(config.dataset), "teacher": {"license": lineage.UNKNOWN}}
    origin = json.loads(path.read_text()) if path.is_file() else {"stages": {}, "licences": licenses}
    evaluated = read_record(config.evaluation)
    own = tracker.identity | run_facts(config, tracker, started)
    records = [*origin["stages"].values(), *([evaluated] if evaluated else []), own]
    return origin | {"stages": lineage.sort_records(records)}


def _build_tags(config: RegisterConfig, tracker: MlflowTracker, origin: dict[str, Any]) -> dict[str, str]:
    """Return the tags of the version; this opens the weights, so that a damaged file is not registered."""
    tags = {
        "parameters": str(_count_parameters(config)),
        "license": str(origin["licences"]["data"]),
        "teacher_license": lineage.format_license(origin["licences"]["teacher"]),
        lineage.STUDENT_TAG: tracker.identity["inputs"]["student"]["sha256"],
        "minitron.dataset_sha256": tracker.identity["inputs"]["dataset"]["sha256"],
        lineage.TAG: f"runs:/{tracker.pipeline_run_id}/{LINEAGE}",
    }
    if made_from := fingerprint.fingerprint_records(origin["stages"]):
        tags[fingerprint.TAG] = json.dumps(made_from, sort_keys=True)
    given = lineage.read_given(origin)
    if "corpus" in given:
        tags["minitron.corpus_sha256"] = given["corpus"]["sha256"]
    if "teacher" in given:
        tags[lineage.TEACHER_TAG] = lineage.identify_teacher(given["teacher"])
        tags[lineage.TEACHER_HASH_TAG] = given["teacher"]["sha256"]
    if config.pipeline_run_id:
        tags["minitron.pipeline_run_id"] = config.pipeline_run_id
    if record := read_record(config.student):  # of distill
        loss = record["metrics"].get("validation_loss")
        tags["validation_loss"] = "unknown" if loss is None else f"{loss:.4f}"
        tags["minitron.teacher_sha256"] = record["inputs"]["teacher"]["sha256"]
    return dict(sorted(tags.items(), key=lambda tag: tag[0].startswith("minitron.")))  # MLflow shows them in this order


def _log_results(config: RegisterConfig, directory: Path, tracker: MlflowTracker) -> None:
    """Log report, evaluation, lineage, curves and dataset manifest to the pipeline's run."""
    for path, folder in (
        (config.evaluation / REPORT, None),
        (config.evaluation / EVALUATION, None),
        *([(config.evaluation / ITEMS, None)] if (config.evaluation / ITEMS).is_file() else []),
        (directory / LINEAGE, None),
        (config.dataset / MANIFEST, "dataset"),
    ):
        tracker.client.log_artifact(tracker.pipeline_run_id, str(path), folder)
    if (config.evaluation / EVENTS).is_dir():
        tracker.client.log_artifacts(tracker.pipeline_run_id, str(config.evaluation / EVENTS), EVENTS)


def _describe_pipeline_run(
    config: RegisterConfig, tracker: MlflowTracker, student: _Student, model_id: str | None
) -> None:
    """Give the pipeline's run the student's numbers, by which MLflow sorts runs, and what it was made from."""
    evaluated = student.origin["stages"].get("evaluate", {"started": 0})  # a time that a second attempt has, too
    metrics = {make_metric_name(name): value for name, value in list_student_metrics(student.evaluation).items()}
    tags = {MODEL_TAG: config.name, VERDICT_TAG: student.tags[VERDICT_TAG], NOTE_TAG: student.description}
    annotate_run(tracker.client, tracker.pipeline_run_id, tags, metrics, evaluated["started"], model_id)
    tracker.client.log_inputs(tracker.pipeline_run_id, make_dataset_inputs(lineage.read_given(student.origin)))


def _count_parameters(config: RegisterConfig) -> int:
    """Return the number of the student's parameters; evaluation.json must have the same."""
    stored = count_stored_parameters(config.student)
    counted = json.loads((config.evaluation / EVALUATION).read_text()).get("student", {}).get("parameters")
    if stored != counted:
        raise ConfigError(
            f"{config.student}: {stored} parameters, but {config.evaluation} evaluates a student with "
            f"{counted}; give the evaluation of this student"
        )
    return stored


def _find_generator() -> Path:
    """Return the source file of models/generator.py without importing it, because it needs torch."""
    spec = importlib.util.find_spec("minitron.models.generator")
    assert spec is not None and spec.origin
    return Path(spec.origin)


def _list_requirements(student: Path) -> list[str]:
    """Return the packages that load the student, in the versions that wrote it."""
    record = read_record(student)
    versions = {name: version.partition("+")[0] for name, version in record["versions"].items()} if record else {}
    return [f"{name}=={versions[name]}" if name in versions else name for name in ("torch", "transformers")]


if __name__ == "__main__":
    main("register")
