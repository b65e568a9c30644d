"""Which files of a corpus are read, left out and named, or refused by name; which split a name gives."""

import bz2
import json
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from minitron.data.corpus import Corpus
from minitron.data.corpus_files import list_corpus_files, name_split, sort_names
from minitron.errors import ConfigError

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 12345\n"


def write(path: Path, content: str | bytes = '{"text": "a"}\n') -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def make_lines(first: int, end: int) -> str:
    return "".join(json.dumps({"text": f"document {number}"}) + "\n" for number in range(first, end))


def read_names(directory: Path) -> list[str]:
    return [path.relative_to(directory).as_posix() for path in list_corpus_files(str(directory)).files]


def test_no_document_is_left_out_without_a_word(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    write(corpus / "a.jsonl", make_lines(0, 20))
    write(corpus / "b.jsonl.bz2", bz2.compress(make_lines(20, 30).encode()))
    write(corpus / "c.ndjson", make_lines(30, 40))
    write(tmp_path / "elsewhere" / "d.jsonl", make_lines(40, 60))
    (corpus / "wiki").symlink_to("../elsewhere")
    found = Corpus(str(corpus), "text")
    assert list(found) == [f"document {number}" for number in range(60)]
    assert (found.files, found.left_out) == (4, {})


def test_links_are_followed_and_a_link_back_is_named(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    write(tmp_path / "blobs" / "1a2b")
    write(tmp_path / "elsewhere" / "deep" / "b.jsonl")
    corpus.mkdir()
    (corpus / "a.jsonl").symlink_to("../blobs/1a2b")  # as in a snapshot of a hub
    (corpus / "linked").symlink_to("../elsewhere")
    (tmp_path / "elsewhere" / "loop.jsonl").symlink_to("../corpus")
    (tmp_path / "elsewhere" / "self").symlink_to(".")
    assert read_names(corpus) == ["a.jsonl", "linked/deep/b.jsonl"]
    assert list_corpus_files(str(corpus)).left_out == {"linked/loop.jsonl": "link back", "linked/self": "link back"}


def test_what_is_hidden_empty_or_a_companion_is_left_out_and_named(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl")
    write(tmp_path / "empty.jsonl", "")
    companions = [
        "README.md",
        "README.txt",
        "LICENSE",
        "LICENSE-APACHE",
        "LICENCE.txt",
        "dataset_info.json",
        "_SUCCESS",
    ]
    companions += ["CITATION.cff", "SHA256SUMS", "a.jsonl.md5", "part_$folder$", "sub/dataset_infos.json"]
    for name in companions:
        write(tmp_path / name)
    for name in (".git/HEAD", ".git/objects/00/ff.txt", "sub/.cache/x.txt", ".hidden.txt"):
        write(tmp_path / name)
    (tmp_path / ".git" / "annex.txt").symlink_to("nowhere")
    listed = list_corpus_files(str(tmp_path))
    assert read_names(tmp_path) == ["a.jsonl", "empty.jsonl"]
    hidden = dict.fromkeys((".git", "sub/.cache", ".hidden.txt"), "hidden")
    assert listed.left_out == dict.fromkeys(companions, "companion") | hidden | {"empty.jsonl": "empty"}


def test_names_that_only_look_like_companions_are_data() -> None:
    names = ["license.jsonl", "notices.txt", "readme.parquet", "copying machines.txt", "success.txt", "stage.jsonl"]
    assert sort_names("/corpus", names) == (names, {})


def test_a_file_that_is_given_itself_is_read_whatever_its_name(tmp_path: Path) -> None:
    for name in ("README.txt", ".hidden.jsonl", "test.jsonl"):
        path = write(tmp_path / name)
        assert list(list_corpus_files(str(path)).files) == [path]
    (tmp_path / "linked.txt").symlink_to("README.txt")
    assert list(list_corpus_files(str(tmp_path / "linked.txt")).files) == [tmp_path / "linked.txt"]


def _link_to_nothing(path: Path) -> None:
    path.symlink_to("../../blobs/1a2b")


def _make_socket(path: Path) -> None:
    directory = Path.cwd()
    os.chdir(path.parent)  # the path of a socket is short
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(directory)


REFUSED: dict[str, tuple[str, str | bytes | Callable[[Path], None], str]] = {
    "unknown kind": ("b.csv", "a,b", "1 of 2 files have an unsupported format (b.csv); give .txt, .jsonl, .ndjson or"),
    "no suffix": ("notes", "a", "1 of 2 files have an unsupported format (notes); give"),
    "other compression": ("b.jsonl.lz4", "a", "unsupported format (b.jsonl.lz4)"),
    "archive": (
        "b.tar.gz",
        b"\x1f\x8b",
        "unsupported format (b.tar.gz); give .txt, .jsonl, .ndjson or .json (each also",
    ),
    "compressed Parquet": ("b.parquet.gz", b"\x1f\x8b", "unsupported format (b.parquet.gz)"),
    "unfinished download": ("b.jsonl.part", "a", "(b.jsonl.part); give .txt"),
    "dangling link": (
        "b.jsonl",
        _link_to_nothing,
        "b.jsonl: broken link to ../../blobs/1a2b; repair",
    ),
    "dangling link to a directory": (
        "wiki",
        _link_to_nothing,
        "wiki: broken link to ../../blobs/1a2b; repair it, or move",
    ),
    "socket": ("b.jsonl", _make_socket, "b.jsonl: neither a file nor a directory; move it out of the corpus"),
    "LFS pointer": ("b.jsonl", POINTER, "b.jsonl: a Git LFS pointer, not the data; run `git lfs pull` in its dir"),
    "LFS pointer of Parquet": (
        "b.parquet",
        POINTER,
        "b.parquet: a Git LFS pointer, not the data; run `git lfs pull`",
    ),
    "LFS pointer named gz": ("b.txt.gz", POINTER, "b.txt.gz: a Git LFS pointer, not the data; run `git lfs pull`"),
    "annex pointer": (
        "b.txt",
        "/annex/objects/MD5-s1--1",
        "b.txt: a git-annex pointer, not the data; run `git annex",
    ),
    "binary text": ("b.txt", b"ELF\x00\x01", "b.txt: not text (NUL at byte 3); save it as UTF-8, or move it out"),
    "UTF-16 text": ("b.txt", "text".encode("utf-16-le"), "b.txt: not text (NUL at byte 1); save it as UTF-8"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_everything_else_is_refused_by_name(case: str, tmp_path: Path) -> None:
    name, content, message = REFUSED[case]
    write(tmp_path / "corpus" / "a.jsonl")
    if callable(content):
        content(tmp_path / "corpus" / name)
    else:
        write(tmp_path / "corpus" / name, content)
    with pytest.raises(ConfigError) as caught:
        Corpus(str(tmp_path / "corpus"), "text")
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert caught.value.exit_status == 2


def test_a_long_list_is_cut_and_counted(tmp_path: Path) -> None:
    for number in range(9):
        write(tmp_path / f"{number}.csv")
    write(tmp_path / "a.jsonl")
    with pytest.raises(ConfigError, match=r"9 of 10 files .* \(0\.csv, 1\.csv, 2\.csv, 3\.csv, 4\.csv and 4 more\)"):
        list_corpus_files(str(tmp_path))


def test_a_directory_of_companions_has_nothing_to_read(tmp_path: Path) -> None:
    write(tmp_path / "README.txt")
    with pytest.raises(ConfigError, match=r"no file in a supported format \(found: README\.txt\); give \.txt"):
        list_corpus_files(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train-00000-of-00001.parquet", "train"),
        ("data/validation-00000-of-00001.parquet", "validation"),
        ("test/0000.parquet", "test"),
        ("wikitext-103/wiki.valid.txt", "validation"),
        ("my_dev_set.jsonl", "validation"),
        ("eval2.jsonl", "test"),
        ("test/train.jsonl", "test"),
        ("latest.jsonl", None),
        ("trains.jsonl", None),
        ("train_test.jsonl", None),
        ("a.jsonl", None),
    ],
)
def test_the_split_of_a_name(name: str, split: str | None) -> None:
    assert name_split(name) == split


@pytest.mark.parametrize(
    "names",
    [
        ["train-00000-of-00002.parquet", "validation-00000-of-00001.parquet", "test-00000-of-00001.parquet"],
        ["train/0.jsonl", "valid/0.jsonl", "eval/1.jsonl"],
        ["wiki.train.txt", "wiki.valid.txt", "wiki.test.txt"],
        ["split-train/x.txt", "my_dev_set/a.txt", "test-set/a.txt"],
    ],
)
def test_the_library_finds_the_same_splits(names: list[str], tmp_path: Path) -> None:
    from datasets.data_files import get_data_patterns, resolve_pattern

    for name in names:
        write(tmp_path / name)
    found: dict[str, str] = {}
    for split, patterns in get_data_patterns(str(tmp_path)).items():
        for pattern in patterns:
            with suppress(FileNotFoundError):  # a pattern that fits nothing
                for path in resolve_pattern(pattern, str(tmp_path)):
                    found[os.path.relpath(path, tmp_path)] = str(split)
    assert found == {name: name_split(name) for name in names}


def test_own_splits_are_read_with_the_held_out_ones_first(tmp_path: Path) -> None:
    for name in ("train-1", "train-0", "validation", "test"):
        write(tmp_path / f"{name}.jsonl", json.dumps({"text": name}))
    corpus = Corpus(str(tmp_path), "text")
    assert corpus.own_splits == ("train", "validation", "test")
    documents = [(corpus_split, text) for corpus_split, text in corpus.read_documents()]
    assert documents == [("test", "test"), ("validation", "validation"), ("train", "train-0"), ("train", "train-1")]
    assert corpus.position == corpus.size
    pooled = Corpus(str(tmp_path), "text", own_splits=False)
    assert pooled.own_splits == ()
    assert list(pooled.read_documents()) == [(None, text) for text in ("test", "train-0", "train-1", "validation")]


def test_an_article_ends_where_its_split_does(tmp_path: Path) -> None:
    write(tmp_path / "wiki.test.txt", "\n = One = \n\n of test\n")
    write(tmp_path / "wiki.train.txt", " rest of an article\n\n = Two = \n\n of train\n")
    documents = [(split, text.split()) for split, text in Corpus(str(tmp_path), "text").read_documents()]
    assert documents[0] == ("test", ["=", "One", "=", "of", "test"])
    assert documents[-1] == ("train", ["=", "Two", "=", "of", "train"])


def test_names_without_train_or_without_another_split_say_nothing(tmp_path: Path) -> None:
    for names in (["train.jsonl", "other.jsonl"], ["test.jsonl", "other.jsonl"], ["dev.jsonl", "test.jsonl"]):
        directory = tmp_path / "-".join(names)
        for name in names:
            write(directory / name)
        assert Corpus(str(directory), "text").own_splits == ()


def test_files_without_a_split_beside_others_are_refused(tmp_path: Path) -> None:
    for name in ("train.jsonl", "test.jsonl", "more.jsonl"):
        write(tmp_path / name)
    with pytest.raises(
        ConfigError, match=r"has files for train and test, but the names of more\.jsonl give no split; re"
    ):
        Corpus(str(tmp_path), "text")
    assert Corpus(str(tmp_path), "text", own_splits=False).files == 3
