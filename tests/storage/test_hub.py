"""Addresses become verified local paths."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from minitron.errors import ConfigError, RunError
from minitron.storage.hashing import content_hash, verified_hash
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
    with pytest.raises(
        ConfigError, match=r"sub/lost: a link to \.\./blobs/gone, and nothing is there; get the file, or"
    ):
        content_hash(tmp_path)
