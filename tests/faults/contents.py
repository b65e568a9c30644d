"""What a pipeline run left, on disk and in MLflow, without what differs from run to run."""

import hashlib
import json
import re
import tempfile
from pathlib import Path
from typing import Any

from minitron.storage.hashing import content_hash
from minitron.storage.layout import EVALUATION, ITEMS, LINEAGE, RECORD, REFERENCE
from minitron.tracking.client import connect
from tests.faults.pipeline import STAGES, Pipeline

_DIFFERENT = re.compile(
    r"seconds|per_second|speed_ratio|^peak_|^started$|^mlflow_run_id$|^minitron\.a|^mlflow\.(?!parent|runName)"
)
"""Keys of what differs: times, speeds, memory, ids."""

_OF_EVALUATION = re.compile(r"\.tfevents\..*")

_MOMENT = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d")
"""What differs within a name."""

_DIGEST_LENGTH = 36
"""Of a dataset in MLflow."""


def check_results(root: Path) -> int:
    """Check that every directory with a record is complete; return how many there are."""
    records = [path for path in root.rglob(RECORD) if not (path.parent / REFERENCE).exists()]
    for path in records:
        record = json.loads(path.read_text())
        assert content_hash(path.parent) == record["output_sha256"], f"{path.parent} is incomplete"
    return len(records)


def read_contents(pipeline: Pipeline) -> dict[str, Any]:
    """Return all that a finished run left, by a name for each part."""
    experiment = connect(pipeline.uri).get_experiment_by_name(pipeline.name).experiment_id
    runs = connect(pipeline.uri).search_runs([experiment])
    names = {run.info.run_id: f"run {run.info.run_name}" for run in runs}
    evaluated, registered = (json.loads((pipeline.output(stage) / RECORD).read_text()) for stage in STAGES[-2:])
    names |= {str(pipeline.root): "ROOT", pipeline.name: "NAME", evaluated["output_sha256"]: "EVALUATION"}
    names |= {registered["output_sha256"]: "REGISTERED", registered["key"]: "KEY"}
    names |= {evaluated["output_sha256"][:_DIGEST_LENGTH]: "EVALUATION"}
    return _scrub(_read_files(pipeline) | _read_runs(pipeline, runs) | _read_registry(pipeline, experiment), names)


def _read_files(pipeline: Pipeline) -> dict[str, Any]:
    contents: dict[str, Any] = {}
    for stage in STAGES:
        output = pipeline.output(stage)
        for path in sorted(path for path in output.rglob("*") if path.is_file()):
            name = _OF_EVALUATION.sub("", f"{stage}/{path.relative_to(output)}")
            has_times = path.suffix in (".html", ".md") or _OF_EVALUATION.search(path.name)
            if path.name in (RECORD, EVALUATION, ITEMS, LINEAGE, "registered.json"):
                contents[name] = json.loads(path.read_text())
            else:
                contents[name] = None if has_times else hashlib.sha256(path.read_bytes()).hexdigest()
    contents["left"] = sorted(str(path.relative_to(pipeline.root)) for path in pipeline.root.rglob("*.partial"))
    contents["unsent"] = sorted(
        str(path.relative_to(pipeline.root)) for path in pipeline.root.rglob("unsent/*/*.jsonl")
    )
    return contents


def _read_runs(pipeline: Pipeline, runs: list[Any]) -> dict[str, Any]:
    client = connect(pipeline.uri)
    contents: dict[str, Any] = {"runs": sorted(run.info.run_name.replace(pipeline.name, "NAME") for run in runs)}
    for run in runs:
        run_id, part = run.info.run_id, f"run {run.info.run_name}"
        contents[f"{part}: status"] = run.info.status
        contents[f"{part}: params"] = run.data.params
        contents[f"{part}: tags"] = run.data.tags
        contents[f"{part}: datasets"] = sorted(
            (entry.tags[0].value, entry.dataset.name, entry.dataset.digest) for entry in run.inputs.dataset_inputs
        )
        for name in run.data.metrics:
            if name.startswith("step_"):  # of speeds, which a killed training has for other steps
                continue
            points = sorted((point.step, point.value) for point in client.get_metric_history(run_id, name))
            contents[f"{part}: {name}"] = [step for step, _ in points] if _DIFFERENT.search(name) else points
        contents[f"{part}: artifacts"] = artifacts = sorted(_list_artifacts(client, run_id))
        for path in artifacts:
            if path in (RECORD, EVALUATION, LINEAGE, ITEMS):
                contents[f"{part}: {path}"] = _read_artifact(client, run_id, path)
    return contents


def _list_artifacts(client: Any, run_id: str, folder: str | None = None) -> list[str]:
    paths = []
    for entry in client.list_artifacts(run_id, folder):
        paths += _list_artifacts(client, run_id, entry.path) if entry.is_dir else [_OF_EVALUATION.sub("", entry.path)]
    return paths


def _read_artifact(client: Any, run_id: str, path: str) -> Any:
    with tempfile.TemporaryDirectory() as name:
        return json.loads(Path(client.download_artifacts(run_id, path, name)).read_text())


def _read_registry(pipeline: Pipeline, experiment: str) -> dict[str, Any]:
    client = connect(pipeline.uri)
    versions = client.search_model_versions(f"name = '{pipeline.name}'")
    models = client.search_logged_models([experiment])
    contents: dict[str, Any] = {
        "versions": [version.version for version in versions],
        "aliases": client.get_registered_model(pipeline.name).aliases,
        "models": [str(model.status) for model in models],
    }
    for model in models:
        contents["files of the model"] = sorted(_list_model(client, model.model_id))
    for version in versions:
        contents["version: tags"] = version.tags
    return contents


def _list_model(client: Any, model_id: str, folder: str | None = None) -> list[str]:
    paths = []
    for entry in client.list_logged_model_artifacts(model_id, folder):
        paths += _list_model(client, model_id, entry.path) if entry.is_dir else [entry.path]
    return paths


def _scrub(value: Any, names: dict[str, str]) -> Any:
    """Return a value without what differs: times, and the names and hashes that follow from them or from the run."""
    if isinstance(value, dict):
        return {
            _scrub(name, names): _scrub(entry, names) for name, entry in value.items() if not _DIFFERENT.search(name)
        }
    if isinstance(value, list | tuple):
        return [_scrub(entry, names) for entry in value]
    if isinstance(value, str):
        for found, name in names.items():
            value = value.replace(found, name)
        return _MOMENT.sub("MOMENT", value)
    return value
