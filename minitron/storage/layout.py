"""The names of the files that stages leave for each other and of a model's files, and the record of a result."""

import json
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, TypeGuard

RECORD = "stage.json"
"""A stage's record. A directory with a record is complete: the record is written last. The hash leaves it out."""

REFERENCE = "reference.json"
"""The address, hash and key of a result that lies elsewhere."""

MANIFEST = "manifest.json"
"""From prepare: the corpus, the tokenizer and the counts of a dataset."""

MASK = ".mask"
"""From prepare, the end of a name: which tokens of a split of conversations count in losses, a byte each."""

MIXTURE = "corpora"
"""Entry of a manifest and of prepare's record, if there are several corpora: identity, documents and use of each."""

PRUNING = "pruning.json"
"""From prune: sizes before and after, the method, the calibration, the indices that were kept, the fits."""

IMPORTANCE = "scores/importance.safetensors"
"""From prune: the scores of the teacher's layers, channels and heads, and the key of what they were measured on. They
lie in a folder, because some tools load every .safetensors file beside a config.json as weights."""

SCORES = "scores"
"""Directory of the workspace: prune's scores, by a hash of all that affects them (the student's sizes do not)."""

TEACHER_CACHE = "teacher-cache"
"""Directory of the workspace: what teachers say about the tokens of trainings, by a hash of all that affects it."""

EVALUATION = "evaluation.json"
"""From evaluate: the measurements of all models, and the judged gates."""

CONTAMINATION = "contamination"
"""Entry of evaluation.json: by task, how many of its questions are in the training text."""

ITEMS = "items.json"
"""From evaluate: every model's answer to each question, loss of each sequence and speed in each round, compressed."""

MEASUREMENTS = "measurements"
"""Directory of the workspace: evaluate's measurements, by a hash of all that affects them (gates do not)."""

REPORT = "report.html"
"""From evaluate: the report. `minitron run` copies it into the run's directory."""

EVENTS = "tensorboard"
"""From evaluate: the folder of the training curves."""

LINEAGE = "lineage.json"
"""From evaluate and register: the records of the earlier stages, and the licenses."""

REGISTERED = "registered.json"
"""From register: the model version's name, number, alias, URI and run."""

PLAN, PLAN_PAGE = "plan.json", "plan.html"
"""From plan: each stage's settings, and the page that shows them."""

RESOLUTION = "decision.json"
"""From resolve: whether to train, and why. The file's name is older than the name here."""

PROMOTED = "promoted.json"
"""From promote: the outcome, and the reason for it."""

CONCLUSION, CONCLUSION_PAGE = "conclusion.json", "conclusion.html"
"""From conclude: the outcome and the reason for it, and the page that shows them."""

SEARCH, SEARCH_PAGE = "search.json", "search.html"
"""From select: the budget, every candidate with its losses, the winner, and the page that shows them."""

WINNER = "winner.yaml"
"""From select, after the last round: the winner's sizes, as a preset for compress."""

TRIAL = "trial.json"
"""From trial: the candidate with its losses, or its error."""

FAILURE = "failure.json"
"""From a stage that failed: its error. It lies in the workspace, where conclude reads it."""

SUMMARY = "summary.json"
"""From `minitron run`: the numbers of the whole run."""

CHECKPOINTS, RESULT = "checkpoints", "result"
"""Work in progress, in `OUTPUT.partial`: the checkpoints of a killed stage, and the growing result."""


def partial_path(output: Path) -> Path:
    """Return the directory of the work in progress for a directory."""
    return output.with_name(output.name + ".partial")


MODEL_FILES = (
    "*.safetensors", "*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja", "*.py", "*.md", "*.pdf",
    "LICEN[CS]E*", "NOTICE*", "COPYING*", "USE_POLICY*",
)  # fmt: skip
"""The files of a Hugging Face model: weights, configs, tokenizer, card, license. Only these are fetched and passed on
by a stage: no pickle, which runs code when it is loaded, and no weights in another format."""

OTHER_MODEL_FILES = ("original/*", "consolidated*")
"""The same weights a second time, in the format of the author's own tools (Llama, Mistral)."""


def is_model_file(name: str) -> bool:
    """Say whether a file, by its path in a model directory, belongs to the Hugging Face model."""
    left_out = (*OTHER_MODEL_FILES, IMPORTANCE)  # scores are of the model that it was cut from
    return any(fnmatch(name, pattern) for pattern in MODEL_FILES) and not any(
        fnmatch(name, pattern) for pattern in left_out
    )


def select_model_files(names: Iterable[str]) -> set[str]:
    """Return the names of the files to fetch: a Hugging Face model's files; of a NeMo checkpoint or a result, all."""
    found = set(names)
    is_model = "config.json" in found and RECORD not in found
    return {name for name in found if is_model_file(name)} if is_model else found


def result_path(stage: str, key: str) -> str:
    """Return the path of a result within a workspace."""
    return f"{stage}/{key[:16]}"


def read_record(directory: Path) -> dict[str, Any] | None:
    """Return the record of a stage's result; None if there is no record or the file holds something else."""
    try:
        record = json.loads((directory / RECORD).read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return record if is_record(record) else None


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; empty if there is no such file or it holds something else."""
    try:
        content = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def result_address(location: str, record: dict[str, Any]) -> str:
    """Return the address of a result's files: in a bucket, the directory that the record beside it names.

    Version 0.1.0 wrote the files beside the record, even in buckets.
    """
    return f"{location}/{record['directory']}" if "directory" in record else location


def is_record(content: Any) -> TypeGuard[dict[str, Any]]:
    """Say whether the content of a JSON file is the record of a stage's result."""
    return isinstance(content, dict) and {"stage", "key", "output_sha256"} <= content.keys()
