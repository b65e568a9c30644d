"""Models from a bucket, MLflow's registry and NVIDIA's catalog: real servers, broken connections, damage."""

import base64
import functools
import hashlib
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from minitron.config.parse import parse
from minitron.config.stages import FinetuneConfig
from minitron.errors import ConfigError, RunError
from minitron.models.checkpoint import count_stored_parameters
from minitron.runtime import inputs, model_sources
from minitron.stages import finetune, register
from minitron.storage.hashing import content_hash
from minitron.tracking.client import connect
from tests.servers.http_server import free_port

ADDRESS = "ngc://org/team/llama:1.0"
KEY = "nvapi-secret"


class Catalog(BaseHTTPRequestHandler):
    """The answers of NVIDIA's catalog: signed URLs, paths and checksums, one file per page; files by ranges."""

    def __init__(self, root: Path, log: list[tuple[str, str | None]], faults: dict[str, Any], *arguments: Any) -> None:
        self._root, self._log, self._faults = root, log, faults
        super().__init__(*arguments)

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        self._log.append((path, self.headers.get("Range")))
        if path.startswith("/signed/"):
            self._send_file(self._root / path.removeprefix("/signed/"))
        elif self.headers.get("Authorization") != f"Bearer {KEY}":
            self.send_error(401)
        elif path != "/v2/org/org/team/team/models/llama/1.0/files":
            self.send_error(404)
        else:
            self._send_page(int(query.partition("=")[2]))

    def _send_page(self, page: int) -> None:
        files = sorted(path for path in self._root.rglob("*") if path.is_file())
        name = str(files[page].relative_to(self._root))
        checksum = base64.b64encode(hashlib.sha256(files[page].read_bytes()).digest()).decode()
        body = {
            "filepath": [self._faults.get("path", name)],
            "urls": [f"http://{self.headers['Host']}/signed/{name}"],
            "sha256_base64": [self._faults.get("checksum", checksum)],
            "paginationInfo": {"index": page, "totalPages": len(files)},
        }
        self._send(200, json.dumps(body).encode())

    def _send_file(self, path: Path) -> None:
        content = path.read_bytes()
        start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        if start >= len(content):
            self.send_error(416)
        elif path.name == self._faults.get("cut"):
            del self._faults["cut"]
            self._send(206, content[start:], len(content) // 2)
            self.wfile.flush()
            self.connection.close()
        else:
            self._send(206, content[start:])

    def _send(self, status: int, body: bytes, count: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:count])

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def catalog(teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """A server that has the teacher; what it was asked, and the faults to make."""
    root = tmp_path / "catalog"
    shutil.copytree(teacher, root)
    (root / "pytorch_model.bin").write_text("the weights as a pickle, which is not fetched")
    log: list[tuple[str, str | None]] = []
    faults: dict[str, Any] = {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Catalog, root, log, faults))
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setenv("NGC_API_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("NGC_API_KEY", KEY)
    yield {"log": log, "faults": faults}
    server.shutdown()
    server.server_close()


@pytest.fixture
def config(tmp_path: Path, dataset: Path) -> FinetuneConfig:
    return FinetuneConfig(
        teacher="unused", dataset=dataset, output=tmp_path / "out", workspace=tmp_path / "workspace", enabled=False
    )


def changed(config: FinetuneConfig, **values: Any) -> FinetuneConfig:
    return config.model_copy(update=values)


def test_a_model_of_the_catalog_is_fetched_once(catalog: dict[str, Any], config: FinetuneConfig, teacher: Path) -> None:
    path = model_sources.local_model(ADDRESS, config)
    assert content_hash(path) == content_hash(teacher)
    asked = len(catalog["log"])
    assert model_sources.local_model(ADDRESS, config) == path and len(catalog["log"]) == asked


def test_a_broken_download_goes_on_where_it_broke_off(
    catalog: dict[str, Any], config: FinetuneConfig, teacher: Path
) -> None:
    catalog["faults"]["cut"] = "model.safetensors"
    with pytest.raises(RunError, match=r"ngc://org/team/llama:1.0: not fetched \(.*check the network and run it again"):
        model_sources.local_model(ADDRESS, config)
    (partial,) = (config.workspace or Path()).rglob("model.safetensors.part")
    there = partial.stat().st_size
    assert there > 0
    catalog["log"].clear()
    assert content_hash(model_sources.local_model(ADDRESS, config)) == content_hash(teacher)
    asked = dict(catalog["log"])
    assert asked["/signed/model.safetensors"] == f"bytes={there}-"
    assert "/signed/config.json" not in asked, "what was complete was fetched again"


def test_a_file_that_is_not_its_checksum_is_refused(catalog: dict[str, Any], config: FinetuneConfig) -> None:
    catalog["faults"]["checksum"] = base64.b64encode(bytes(32)).decode()
    with pytest.raises(RunError, match=r"damaged: SHA-256 .* is not the catalog's A+=; run it again"):
        model_sources.local_model(ADDRESS, config)
    del catalog["faults"]["checksum"]
    model_sources.local_model(ADDRESS, config)


def test_a_file_outside_the_model_is_refused(catalog: dict[str, Any], config: FinetuneConfig) -> None:
    catalog["faults"]["path"] = "../../escape"
    with pytest.raises(RunError, match=r"\.\./\.\./escape: the catalog names a file outside the model"):
        model_sources.local_model(ADDRESS, config)


@pytest.mark.parametrize(
    ("address", "key", "message"),
    [
        (ADDRESS, None, r"NGC_API_KEY is not set \(status 401\); give a key that may read the model"),
        (ADDRESS, "wrong", r"the catalog refuses the key in NGC_API_KEY \(status 401\)"),
        ("ngc://org/team/llama:2.0", KEY, "the catalog has no such version"),
        ("ngc://org/team/llama", KEY, "not a model in NVIDIA's catalog; give ngc://org/team/model:version"),
        ("s3://bucket/x", KEY, "unknown scheme 's3:'; give a directory, hf://org/name, gs://bucket/path"),
        ("models:/name@alias", KEY, "a model in MLflow's registry needs tracking_uri"),
    ],
)
def test_a_bad_address_or_key_says_what_to_do(
    catalog: dict[str, Any],
    config: FinetuneConfig,
    monkeypatch: pytest.MonkeyPatch,
    address: str,
    key: str | None,
    message: str,
) -> None:
    if key is None:
        monkeypatch.delenv("NGC_API_KEY")
    else:
        monkeypatch.setenv("NGC_API_KEY", key)
    with pytest.raises(ConfigError, match=message):
        model_sources.local_model(address, config)
    assert not list((config.workspace or Path()).rglob("*.safetensors"))


def test_a_stage_takes_a_model_of_the_catalog_and_finds_damage(
    catalog: dict[str, Any], config: FinetuneConfig, teacher: Path
) -> None:
    record = finetune.run(changed(config, teacher=ADDRESS))
    assert record["inputs"]["teacher"] == {"address": ADDRESS, "sha256": content_hash(teacher)}
    fetched = model_sources.local_model(ADDRESS, config)
    (fetched / "config.json").write_text((fetched / "config.json").read_text() + " ")
    with pytest.raises(RunError, match=r"that was fetched: a file is damaged or was changed; delete the directory"):
        finetune.run(changed(config, teacher=ADDRESS))


@pytest.fixture
def registry(mlflow_file: str, teacher: Path, dataset: Path, tmp_path: Path) -> dict[str, Any]:
    """A registered model of two versions, of which the first has the alias; the second differs in one weight."""
    evaluation = tmp_path / "evaluation"
    evaluation.mkdir()
    (evaluation / "report.html").write_text("report")
    (evaluation / "evaluation.json").write_text(
        json.dumps({"student": {"parameters": count_stored_parameters(teacher)}})
    )
    other = tmp_path / "other"
    shutil.copytree(teacher, other)
    weights = load_file(other / "model.safetensors")
    save_file({name: weight * 2 for name, weight in weights.items()}, other / "model.safetensors", {"format": "pt"})
    common = {"dataset": dataset, "evaluation": evaluation, "name": tmp_path.name, "tracking_uri": mlflow_file}
    for number, student in enumerate((teacher, other)):
        output = tmp_path / f"registered{number}"
        register.run(parse("register", common | {"student": student, "output": output, "alias": f"alias{number}"}))  # type: ignore[arg-type]
    client = connect(mlflow_file)
    client.set_registered_model_alias(tmp_path.name, "champion", "1")
    return {"uri": mlflow_file, "name": tmp_path.name, "client": client, "other": other}


def test_a_registered_model_is_what_was_registered(
    registry: dict[str, Any], config: FinetuneConfig, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    config = changed(config, tracking_uri=registry["uri"])
    for version in ("@champion", "/1"):
        path = model_sources.local_model(f"models:/{registry['name']}{version}", config)
        assert content_hash(path) == content_hash(teacher)
    with pytest.raises(RunError, match="has no alias nobody"):
        model_sources.local_model(f"models:/{registry['name']}@nobody", config)
    with pytest.raises(ConfigError, match=r"give models:/NAME@alias or models:/NAME/VERSION"):
        model_sources.local_model("models:/name", config)
    assert not list(Path().iterdir()), "MLflow made a database of its own"


def test_an_alias_that_moves_means_one_version_within_a_pipeline_run(
    registry: dict[str, Any], config: FinetuneConfig, teacher: Path
) -> None:
    address = f"models:/{registry['name']}@champion"
    first = changed(config, tracking_uri=registry["uri"], pipeline_run_id="run-1")
    assert content_hash(model_sources.local_model(address, first)) == content_hash(teacher)
    registry["client"].set_registered_model_alias(registry["name"], "champion", "2")
    assert content_hash(model_sources.local_model(address, first)) == content_hash(teacher)
    second = changed(first, pipeline_run_id="run-2")
    assert content_hash(model_sources.local_model(address, second)) == content_hash(registry["other"])
    records = [inputs.find_inputs(changed(config, teacher=address))["teacher"].record() for config in (first, second)]
    assert [entry["pinned"] for entry in records] == [f"models:/{registry['name']}/1", f"models:/{registry['name']}/2"]


@pytest.fixture
def bucket(teacher: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A bucket that has the teacher below models/llama, and something else beside it."""
    from gcp_storage_emulator.server import create_server
    from google.auth.credentials import AnonymousCredentials
    from google.cloud import storage

    port = free_port()
    server = create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket")
    server.start()
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("GOOGLE_CLOUD_PROJECT", "test")
    client = storage.Client(project="test", credentials=AnonymousCredentials())
    bucket = client.bucket("bucket")
    for path in teacher.iterdir():
        bucket.blob(f"models/llama/{path.name}").upload_from_filename(path)
    bucket.blob("models/llama/original/consolidated.00.pth").upload_from_string("the weights again: not fetched")
    bucket.blob("models/llama-other/config.json").upload_from_string("{}")
    yield bucket
    server.stop()


def test_a_config_is_read_without_the_weights(
    teacher: Path, bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a directory, from one that refers to another, from a bucket, and from the cache of the hub."""
    expected = json.loads((teacher / "config.json").read_text())
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "reference.json").write_text(json.dumps({"address": str(teacher), "sha256": "0", "key": "k"}))
    commit = "0" * 40
    model = tmp_path / "hub" / "models--org--name"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text(commit)
    shutil.copytree(teacher, model / "snapshots" / commit, ignore=shutil.ignore_patterns("*.safetensors"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for address in (
        str(teacher),
        f"file://{teacher}",
        str(tmp_path / "other"),
        "gs://bucket/models/llama/",
        "hf://org/name",
    ):
        assert model_sources.read_architecture(address) == expected
    for address in (
        str(tmp_path),
        "hf://org/other",
        "gs://bucket/nothing",
        "ngc://org/llama:1",
        "models:/llama/1",
        "/nowhere",
    ):
        with pytest.raises((ConfigError, RunError), match=address):
            model_sources.read_architecture(address)


def test_a_model_in_a_bucket_is_its_snapshot(bucket: Any, config: FinetuneConfig, teacher: Path) -> None:
    first = model_sources.local_model("gs://bucket/models/llama", changed(config, pipeline_run_id="run-1"))
    assert content_hash(first) == content_hash(teacher)
    bucket.blob("models/llama/extra.json").upload_from_string("{}")
    assert model_sources.local_model("gs://bucket/models/llama/", config) != first
    assert model_sources.local_model("gs://bucket/models/llama", changed(config, pipeline_run_id="run-1")) == first
    with pytest.raises(ConfigError, match="gs://bucket/nothing: no objects there"):
        model_sources.local_model("gs://bucket/nothing", config)
    with pytest.raises(RunError, match=r"gs://nobucket/x: not fetched \(.*check the bucket's name"):
        model_sources.local_model("gs://nobucket/x", config)


def test_an_object_outside_the_model_is_refused(config: FinetuneConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The emulator refuses such a name, which a bucket takes: the listing is made here."""
    listing = [SimpleNamespace(name="models/bad/../../../escape", generation=1, size=1)]
    client = SimpleNamespace(list_blobs=lambda *_, **__: listing)
    monkeypatch.setattr("minitron.storage.bucket._make_client", lambda: client)
    with pytest.raises(
        RunError, match=r"the object models/bad/\.\./\.\./\.\./escape lies outside the directory; delete it"
    ):
        model_sources.local_model("gs://bucket/models/bad", config)


def test_without_an_engine_a_checkpoint_that_was_never_exported_is_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_sources, "find_spec", lambda name: None)
    for part in ("context", "weights"):
        (tmp_path / "nemo" / part).mkdir(parents=True)
    config = FinetuneConfig(output=tmp_path / "out", dataset=tmp_path, teacher="x", workspace=tmp_path / "workspace")
    assert model_sources.local_model(tmp_path / "nemo", config) == tmp_path / "nemo"
    identity = f"nemo {content_hash(tmp_path / 'nemo')}"
    directory = model_sources._fetch_once(
        identity, lambda _, target: (target / "config.json").write_text("{}") and None, config
    )
    assert model_sources.local_model(tmp_path / "nemo", config) == directory
