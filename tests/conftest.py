"""Small real inputs, made once per session and never changed."""

import importlib.util
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from minitron.cli import demo_inputs
from minitron.data.indexed import IndexedWriter
from minitron.storage import bucket
from minitron.storage.hashing import content_hash
from minitron.storage.layout import MANIFEST
from minitron.tracking.client import connect
from tests.constants import SEQUENCE, STEPS
from tests.servers.http_server import free_port
from tests.servers.mlflow_server import mlflow_serving

if TYPE_CHECKING:  # engine nemo's environment has no emulator
    from minitron.config.stages import EvaluateConfig
    from tests.servers.gcs import World

# Read when torch is imported, here and in the processes that tests start: a busy machine is not waited for by spinning.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.pop("MINITRON_REGISTRY", None)  # else the images have other names

collect_ignore = ["images"] if importlib.util.find_spec("nemo") else ["nemo", "images"]
"""`make test-nemo` runs those of engine nemo, in an environment of its own; `make test-images` builds the images."""


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The inputs of the preset `tiny`: paths of teacher, corpus and evaluate.task_directory."""
    return demo_inputs.build_inputs("tiny", tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="session")
def teacher(inputs: dict[str, Path]) -> Path:
    """A random four-layer Llama: hidden 64, intermediate 128, 4 heads, 2 groups, vocabulary 512."""
    return inputs["teacher"]


@pytest.fixture(scope="session")
def dataset(inputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset as prepare writes it, made by hand so that the other stages are tested apart from prepare."""
    from minitron.data.tokenizer import load_tokenizer, tokenizer_hash

    directory = tmp_path_factory.mktemp("dataset") / "dataset"
    directory.mkdir()
    tokenizer = load_tokenizer(inputs["teacher"])
    documents = [
        tokenizer(json.loads(line)["text"])["input_ids"] + [tokenizer.eos_token_id]
        for line in (inputs["corpus"] / "tiny.jsonl").read_text().splitlines()
    ]
    for split, part in (("train", documents[:340]), ("validation", documents[340:370]), ("test", documents[370:])):
        writer = IndexedWriter(directory / split, len(tokenizer))
        writer.add_documents(part)
        writer.close()
    manifest = {"tokenizer_sha256": tokenizer_hash(inputs["teacher"]), "licence": "none"}
    (directory / MANIFEST).write_text(json.dumps(manifest))
    assert content_hash(directory)
    return directory


@pytest.fixture(scope="session")
def compressed(inputs: dict[str, Path], dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> "EvaluateConfig":
    """The directories of a real finetune, prune and distill of the tiny model, as evaluate gets them."""
    from minitron.config.stages import DistillConfig, EvaluateConfig, FinetuneConfig, PruneConfig
    from minitron.stages import distill, finetune, prune

    root, base = tmp_path_factory.mktemp("compressed"), inputs["teacher"]
    teacher, pruned, student = root / "teacher", root / "pruned", root / "student"
    sequences = {"dataset": dataset, "sequence_length": SEQUENCE, "micro_batch_size": 4}
    training = sequences | {"max_steps": STEPS, "global_batch_size": 4, "validation_interval": 2, "learning_rate": 1e-3}
    training["validation_sequences"] = 8
    finetune.run(FinetuneConfig(output=teacher, teacher=str(base), **training))
    cut = {"hidden_size": 48, "intermediate_size": 96, "num_key_value_heads": 1, "num_hidden_layers": 3}
    prune.run(PruneConfig(output=pruned, teacher=teacher, calibration_sequences=8, **sequences, **cut))
    distill.run(DistillConfig(output=student, teacher=teacher, student=pruned, **training))
    places = {"teacher_before": str(base), "teacher": teacher, "pruned": pruned, "student": student}
    return EvaluateConfig(output=root / "out", dataset=dataset, tracking_uri="http://user:secret@host", **places)


@pytest.fixture(scope="session")
def mlflow_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, int]]:
    """A real MLflow server on a database of its own: its URI and process."""
    port = free_port()
    # else a webhook may call no address of this machine, nor one without TLS
    webhooks = {"MLFLOW_WEBHOOK_ALLOWED_SCHEMES": "http", "MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS": "true"}
    webhooks["MLFLOW_WEBHOOK_CACHE_TTL"] = "0"
    with mlflow_serving(tmp_path_factory.mktemp("mlflow"), port, **webhooks) as process:
        yield f"http://127.0.0.1:{port}", process


@pytest.fixture(scope="session")
def mlflow_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """URI of MLflow without a server, on a SQLite file, whose tables take some seconds to make."""
    uri = f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"
    connect(uri, create=True)
    return uri


@pytest.fixture(scope="session")
def mlflow_server(mlflow_process: tuple[str, int]) -> str:
    """URI of a real MLflow server."""
    return mlflow_process[0]


@pytest.fixture(params=["mlflow_server", "mlflow_file"])
def uri(request: pytest.FixtureRequest) -> str:
    """URI of either."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator["World"]:
    """A storage server with an empty bucket named `bucket`, and a cache of this test's own."""
    from tests.servers.gcs import serving_bucket

    bucket.pin_objects.cache_clear()
    with serving_bucket() as world:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", world.address)
        monkeypatch.setenv("GOOGLE_CLOUD_PROJECT", "test")
        monkeypatch.setenv("DISABLE_GCS_PYTHON_CLIENT_OTEL_BUCKET_METADATA", "true")
        monkeypatch.setenv("MINITRON_CACHE", str(tmp_path / "cache"))
        yield world
