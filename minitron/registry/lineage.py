"""The lineage of a student: the records of its stages, kept with its version in MLflow.

    minitron lineage models:/NAME/7

evaluate sees the directories of all earlier stages. It writes `lineage.json`: their records, and the licenses of
teacher and corpus. register adds the records of evaluate and of itself, and the version's tag links to the file.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from minitron.config.stages import STAGES, EvaluateConfig
from minitron.data.manifest import read_manifest
from minitron.errors import ConfigError, RunError
from minitron.registry import versions
from minitron.storage.layout import MANIFEST, MIXTURE, read_record
from minitron.tracking.client import connect, fail_fast, find_active_run, one_line_errors, read_artifact

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

TAG = "minitron.lineage"
"""Tag of a model version: the address of its lineage, runs:/RUN/lineage.json."""

STUDENT_TAG = "minitron.student_sha256"
"""Tag of a model version: the hash of its student's content."""

TEACHER_TAG = "base_model"
"""Tag of a model version: the commit, version or snapshot of its teacher."""

TEACHER_HASH_TAG = "minitron.base_model_sha256"
"""Tag of a model version: the hash of its teacher's content."""

UNKNOWN = "unknown"


def collect_lineage(config: EvaluateConfig) -> dict[str, Any]:
    """Return the lineage of the models that evaluate measures.

    Returns:
        `stages`: the records of the stages that wrote the inputs, in the order of the flow; `licences`: the corpus's
        license as text, and the teacher's as the lines of its model card that begin with `license`.
    """
    directories = (config.dataset, config.teacher, config.pruned, config.student)
    records = [record for directory in directories if (record := read_record(directory))]
    licenses = {"data": read_data_license(config.dataset), "teacher": read_model_license(Path(config.teacher_before))}
    return {"stages": sort_records(records), "licences": licenses}


def sort_records(records: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return records by the names of their stages, in the order of the flow."""
    by_stage = {record["stage"]: record for record in records}
    return {stage: by_stage[stage] for stage in STAGES if stage in by_stage}


def read_data_license(dataset: Path) -> str:
    """Return the licenses in a dataset's manifest as text; "unknown" if prepare did not write the dataset."""
    manifest = read_manifest(dataset) if (dataset / MANIFEST).is_file() else {}
    shared = str(manifest.get("licence", UNKNOWN))
    return "; ".join(dict.fromkeys(entry.get("licence", shared) for entry in manifest.get(MIXTURE, [{}])))


def is_license_unknown(license: str) -> bool:
    """Say whether a license, or one of several in a text, is unknown."""
    return UNKNOWN in license.split("; ")


def read_model_license(model: Path) -> dict[str, str]:
    """Return the `license`, `license_name` and `license_link` of a model card; "unknown" if there is none."""
    path = model / "README.md"
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    try:
        front = yaml.safe_load(text.split("---\n")[1]) if text.startswith("---\n") else {}
    except (yaml.YAMLError, ValueError):  # a ValueError: an invalid date
        front = {}
    items = front.items() if isinstance(front, dict) else ()
    entries = {name: value for name, value in items if name in ("license", "license_name", "license_link") and value}
    return {"license": UNKNOWN} | {
        name: ", ".join(map(str, value)) if isinstance(value, list) else str(value) for name, value in entries.items()
    }


def read_given(origin: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the corpus and the teacher of a lineage, as prepare's record has them; empty without that record."""
    return origin.get("stages", {}).get("prepare", {}).get("inputs", {})


def read_corpora(origin: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the entry of each corpus of a lineage in prepare's record.

    Of several it has also the use in an epoch, and the license.
    """
    if not (corpus := read_given(origin).get("corpus")):
        return []
    parts = corpus.get("parts", [corpus])
    record = origin["stages"]["prepare"]
    shared = {"licence": record.get("config", {}).get("licence", UNKNOWN)}
    uses = [shared | use for use in record.get(MIXTURE, [])] or [{}]
    return [part | use for part, use in zip(parts, uses, strict=True)]


def format_license(license: dict[str, str]) -> str:
    """Return the name of a model's license; Hugging Face calls every license that it does not list `other`."""
    return license["license"] if license["license"] != "other" else license.get("license_name", "other")


def compute_gpu_hours(record: dict[str, Any]) -> float:
    """Return the GPU-hours of a stage: its hours times its GPUs."""
    return record["seconds"] * record.get("gpus", 0) / 3600


def count_tokens(record: dict[str, Any]) -> int | None:
    """Return the tokens that a stage trained on or that prepare wrote; None for other stages."""
    metrics = record.get("metrics", {})
    written = sum(metrics.get(f"{split}_tokens", 0) for split in ("train", "validation", "test"))
    return metrics.get("tokens", written or None)


def identify_teacher(record: dict[str, Any]) -> str:
    """Return the commit, version or snapshot that identifies a teacher, from its entry in a stage's record."""
    return record.get("snapshot") or record.get("pinned") or record["address"]


def find_teacher_hash(client: "MlflowClient", name: str, pinned: str) -> str | None:
    """Return the content hash of a teacher from a version that was made from it, without fetching the teacher.

    Args:
        client: MLflow's.
        name: registered model.
        pinned: the teacher's fixed address, as `model_sources.pin_address` returns it.
    """
    address, _, number = pinned.removeprefix("models:/").rpartition("/")
    if pinned.startswith("models:/"):
        tags = client.get_model_version(address, number).tags
        if sha256 := versions.get_tag(tags, STUDENT_TAG):
            return sha256
    for version in versions.search_versions(client, name, TEACHER_TAG, pinned):
        if version.tags[TEACHER_TAG] == pinned and (sha256 := versions.get_tag(version.tags, TEACHER_HASH_TAG)):
            return sha256
    # Before 0.4 only the lineage had the address; of those versions, only the ones with an alias are searched.
    for number in {*versions.read_aliases(client, name).values()}:
        teacher = _read_teacher(client, client.get_model_version(name, number))
        if teacher and identify_teacher(teacher) == pinned:
            return teacher["sha256"]
    return None


def _read_teacher(client: "MlflowClient", version: "ModelVersion") -> dict[str, Any] | None:
    """Return the entry of the teacher in a version's lineage; None if there is none."""
    run_id, _, path = (versions.get_tag(version.tags, TAG) or "").removeprefix("runs:/").partition("/")
    if not run_id or (run := find_active_run(client, run_id)) is None:
        return None
    if path not in [file.path for file in client.list_artifacts(run.info.run_id)]:
        return None
    record = read_artifact(client, run_id, path).get("stages", {}).get("prepare", {})
    return record.get("inputs", {}).get("teacher")


def read_lineage(uri: str, address: str) -> dict[str, Any]:
    """Return the lineage of a model version, from MLflow alone.

    Args:
        uri: the tracking server.
        address: models:/NAME/VERSION or models:/NAME@alias.

    Returns:
        The content of lineage.json, `version`: models:/NAME/VERSION, and `promotion`: the tags of its last promotion.

    Raises:
        ConfigError: the address has another form, or the version was not registered by this package.
        RunError: MLflow cannot be reached, or has no such version, or the lineage there is another version's.
    """
    with one_line_errors(uri), fail_fast():
        version = versions.pin_version(uri, address)
        name, _, number = version.removeprefix("models:/").rpartition("/")
        client = connect(uri)
        return _read_version(client, version, client.get_model_version(name, number).tags)


def read_all_lineages(uri: str) -> Iterator[tuple[str, str, list[dict[str, Any]]]]:
    """Yield the address, the student's hash and the stages' records of every version that register made.

    Raises:
        RunError: MLflow cannot be reached, or the lineage of a version cannot be read.
    """
    with one_line_errors(uri), fail_fast():
        client = connect(uri)
        for version in versions.list_all_versions(client):
            address = f"models:/{version.name}/{version.version}"
            if student := versions.get_tag(version.tags, STUDENT_TAG):
                has_lineage = versions.get_tag(version.tags, TAG) is not None
                records = _read_version(client, address, version.tags)["stages"].values() if has_lineage else ()
                yield address, student, list(records)


def _read_version(client: "MlflowClient", version: str, tags: Mapping[str, str]) -> dict[str, Any]:
    if (file := versions.get_tag(tags, TAG)) is None:
        raise ConfigError(f"{version}: no tag {TAG}; give a version that minitron's stage register made")
    run_id, _, path = file.removeprefix("runs:/").partition("/")
    lineage = read_artifact(client, run_id, path)
    registered = lineage.get("stages", {}).get("register", {}).get("inputs", {}).get("student", {})
    if registered.get("sha256", UNKNOWN) != versions.get_tag(tags, STUDENT_TAG):
        raise RunError(
            f"{version}: {file} belongs to another student, because it was overwritten; register this one again"
        )
    promotion = {tag: value for tag, value in tags.items() if tag.startswith("promoted_")}
    return lineage | {"version": version, "promotion": promotion}
