"""Addresses become verified local paths."""

import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import ClassVar

import pytest

from minitron.errors import ConfigError, RunError
from minitron.storage.hashing import content_hash, list_files, verified_hash
from minitron.storage.hub import resolve_hub_dataset, resolve_local_path
from minitron.storage.layout import read_record


def test_paths_and_file_addresses_are_local(tmp_path: Path) -> None:
    for address in (tmp_path, str(tmp_path), f"file://{tmp_path}"):
        assert resolve_local_path(address) == tmp_path


def test_an_address_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"nowhere: no such file or directory; give an existing path or hf://org/name"
    ):
        resolve_local_path(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"ftp://host/x: unknown scheme 'ftp://'; give a path, file:// or hf://org/n"):
        resolve_local_path("ftp://host/x")


@pytest.mark.parametrize("fetch", [resolve_local_path, resolve_hub_dataset])
def test_a_hub_that_is_not_there_is_one_line(fetch: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(RunError) as caught:
        fetch("hf://nobody/nothing")  # type: ignore[operator]
    message = str(caught.value)
    assert message.startswith("hf://nobody/nothing: not fetched (") and "\n" not in message
    assert message.endswith("check the name, HF_TOKEN and the network, or give a local path")


COMMIT = "c" * 40
NEEDED = {"config.json", "model-00001-of-00001.safetensors", "model.safetensors.index.json", "tokenizer.json"}
NEEDED |= {"tokenizer.model", "merges.txt", "chat_template.jinja", "LICENSE", "USE_POLICY.md", "README.md"}
OTHERS = {
    "original/consolidated.00.pth",
    "original/params.json",
    "original/tokenizer.model",
    "consolidated.safetensors",
}
OTHERS |= {"pytorch_model.bin", "optimizer.pt", "training_args.bin", "model.gguf", "tf_model.h5", "flax_model.msgpack"}
OTHERS |= {"onnx/model.onnx", "onnx/model.onnx_data", "coreml/weight.mlmodel", "openvino/openvino_model.xml", "a.nemo"}


class _Hub(http.server.BaseHTTPRequestHandler):
    """The part of a hub's protocol that `snapshot_download` uses, for org/name and org/pickles."""

    asked: ClassVar[list[str]] = []
    files: ClassVar = {"org/name": NEEDED | OTHERS, "org/pickles": {"config.json", "pytorch_model.bin"}}

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        for repository, names in self.files.items():
            if path.startswith(f"/api/models/{repository}/tree/"):
                entries = [{"type": "file", "path": name, "size": len(name), "oid": "0" * 40} for name in names]
                return self.reply(json.dumps(entries).encode())
            if path.startswith(f"/api/models/{repository}"):
                siblings = [{"rfilename": name} for name in names]
                return self.reply(json.dumps({"id": repository, "sha": COMMIT, "siblings": siblings}).encode())
            if (name := path.removeprefix(f"/{repository}/resolve/{COMMIT}/")) in names:
                self.asked.append(name)
                return self.reply(name.encode())
        return self.reply(b"", 404)

    do_HEAD = do_GET

    def reply(self, content: bytes, status: int = 200) -> None:
        self.send_response(status)
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def test_of_a_hubs_model_only_what_it_needs_is_fetched(tmp_path: Path) -> None:
    """Llama's original/ would double the download. In a process of its own: the library reads the environment once."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}"}
    code = "import sys; from minitron.storage import hub; print(hub.resolve_local_path(sys.argv[1]))"
    try:
        done, pickles = (
            subprocess.run([sys.executable, "-c", code, address], capture_output=True, text=True, env=environment)
            for address in ("hf://org/name", "hf://org/pickles")
        )
    finally:
        server.shutdown()
        server.server_close()
    assert done.returncode == 0, done.stderr
    found = Path(done.stdout.splitlines()[-1])
    assert {str(path.relative_to(found)) for path in list_files(found)} == NEEDED
    assert not {*_Hub.asked} & (OTHERS | {"pytorch_model.bin"})
    assert pickles.stderr.splitlines()[-1].endswith(
        "hf://org/pickles: no .safetensors file, and weights in other formats are not fetched; load the model "
        "with transformers' from_pretrained, save it with save_pretrained, and give that directory"
    )


def test_a_datasets_address_has_a_form() -> None:
    assert resolve_hub_dataset("corpus.txt") is None
    with pytest.raises(ConfigError, match=r"hf://a/b/c/d: not a dataset's address; give hf://org/name\[@revision\]"):
        resolve_hub_dataset("hf://a/b/c/d")


def test_the_hash_is_of_names_and_contents(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b").write_text("bee")
    (tmp_path / "a").write_text("ay")
    a, b = (hashlib.sha256(text).hexdigest() for text in (b"ay", b"bee"))
    expected = hashlib.sha256(f"a\0{a}\nsub/b\0{b}\n".encode()).hexdigest()
    assert content_hash(tmp_path) == expected and content_hash(tmp_path / "a") == a
    (tmp_path / "stage.json").write_text("{}")
    assert content_hash(tmp_path) == expected
    (tmp_path / "sub" / "stage.json").write_text("{}")
    assert content_hash(tmp_path) != expected


def test_the_hash_is_of_the_content_of_linked_directories_too(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a").write_text("ay")
    (tmp_path / "input").mkdir()
    (tmp_path / "input" / "linked").symlink_to("../elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to("../input")
    before = content_hash(tmp_path / "input")
    assert before == hashlib.sha256(f"linked/a\0{hashlib.sha256(b'ay').hexdigest()}\n".encode()).hexdigest()
    (tmp_path / "elsewhere" / "a").write_text("other")
    assert content_hash(tmp_path / "input") != before


def test_an_input_is_checked_against_its_record(tmp_path: Path) -> None:
    (tmp_path / "weights").write_text("1")
    found = verified_hash(tmp_path)
    assert found == content_hash(tmp_path)
    record = {"stage": "prune", "key": "k", "output_sha256": found}
    (tmp_path / "stage.json").write_text(json.dumps(record))
    assert verified_hash(tmp_path) == found and read_record(tmp_path) == record
    (tmp_path / "weights").write_text("2")
    with pytest.raises(RunError, match=rf"content hash \w{{12}} is not the {found[:12]} its stage.json records"):
        verified_hash(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"stage": "prune"}'])
def test_what_is_no_record_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "stage.json").write_text(text)
    assert read_record(tmp_path) is None and read_record(tmp_path / "stage.json") is None
    assert verified_hash(tmp_path) == hashlib.sha256(b"").hexdigest()


def test_a_link_counts_as_what_it_leads_to(tmp_path: Path) -> None:
    plain, linked, blobs = tmp_path / "plain", tmp_path / "linked", tmp_path / "blobs"
    (plain / "sub").mkdir(parents=True)
    (plain / "sub" / "b").write_text("bee")
    (plain / "a").write_text("ay")
    shutil.copytree(plain, blobs)
    linked.mkdir()
    (linked / "a").symlink_to("../blobs/a")
    (linked / "sub").symlink_to(blobs / "sub", target_is_directory=True)
    assert content_hash(linked) == content_hash(plain)
    (blobs / "sub" / "b").write_text("other")
    assert content_hash(linked) != content_hash(plain)


def test_a_link_to_nothing_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("ay")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "lost").symlink_to("../blobs/gone")
    with pytest.raises(ConfigError, match=r"sub/lost: broken link to \.\./blobs/gone; restore its target, or"):
        content_hash(tmp_path)
