"""prepare on small real corpora: what counts as a document, the splits, the tokens, and input that is refused."""

import bz2
import gzip
import http.server
import json
import lzma
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow
import pytest
import zstandard
from pyarrow import parquet
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from minitron.config.parse import parse
from minitron.config.stages import PrepareConfig
from minitron.data.corpus import Corpus
from minitron.data.indexed import SPLITS, IndexedDataset, IndexedWriter
from minitron.data.manifest import check_tokenizer
from minitron.data.selection import Selection, assign_split
from minitron.data.text import DocumentTokenizer, normalize_text
from minitron.data.tokenizer import load_tokenizer
from minitron.errors import ConfigError, MinitronError, RunError
from minitron.stages import prepare
from minitron.storage.bucket import pin_objects
from minitron.storage.hashing import content_hash
from minitron.storage.hub import resolve_hub_dataset
from minitron.storage.layout import CHECKPOINTS, MANIFEST
from minitron.tracking.stage_run import Tracker
from tests.servers import forks

if TYPE_CHECKING:  # engine nemo's environment has no emulator
    from tests.servers.gcs import World

WIKITEXT = """
 = Robert Boulter = 

 Robert Boulter is an English film , television and theatre actor .

 = = Career = = 

 In 2006 , Boulter starred in the play Citizenship . Here = is an equals sign .
 = 1 / s and a formula = 

 = = = 2000 – 2005 = = = 

 In 2000 Boulter had a guest role .

 = 2 + 2 = 5 = 

 A slogan .
"""
ARTICLES = [
    """ = Robert Boulter =

 Robert Boulter is an English film , television and theatre actor .

 = = Career = =

 In 2006 , Boulter starred in the play Citizenship . Here = is an equals sign .
 = 1 / s and a formula =

 = = = 2000 – 2005 = = =

 In 2000 Boulter had a guest role .""",
    """ = 2 + 2 = 5 =

 A slogan .""",
]


def read_documents(address: Path, field: str = "text", separator: str | None = None) -> list[str]:
    return [text for raw in Corpus(str(address), field, separator) if (text := normalize_text(raw))]


def json_lines(texts: list[str]) -> str:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


def make_conversation(text: str) -> str:
    messages = [{"role": "user", "content": "why?"}, {"role": "assistant", "content": text}]
    return json.dumps({"messages": messages, "source": "x"}) + "\n"


def make_words(count: int, seed: int = 0) -> list[str]:
    """Distinct short documents that a 512-token vocabulary has to spell."""
    rng = random.Random(seed)
    return [f"{number} " + " ".join(rng.choices(["alpha", "beta", "γάμμα", "δ"], k=9)) for number in range(count)]


def write_corpus(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.fixture
def prepared(teacher: Path, tmp_path: Path) -> Callable[..., tuple[Path, dict[str, Any], dict[str, Any]]]:
    """Run prepare; return the directory, the manifest and the metrics."""

    def run(corpus: Path | str, name: str = "dataset", **settings: Any) -> tuple[Path, dict[str, Any], dict[str, Any]]:
        output = tmp_path / name
        shares = {"validation_fraction": 0.1, "test_fraction": 0.1}
        values = {"corpus": str(corpus), "teacher": str(teacher), "output": output} | shares | settings
        record = prepare.run(PrepareConfig(**values))
        return output, json.loads((output / MANIFEST).read_text()), record["metrics"]

    return run


def decode_documents(directory: Path, teacher: Path) -> dict[str, list[str]]:
    """The documents of every split, decoded; each must end with the one EOS it has."""
    tokenizer = Tokenizer.from_file(str(teacher / "tokenizer.json"))
    eos = tokenizer.token_to_id("</s>")
    texts: dict[str, list[str]] = {}
    for split in SPLITS:
        read = IndexedDataset(directory / split)
        documents = [read[index].tolist() for index in range(len(read))]
        assert all(ids.index(eos) == len(ids) - 1 for ids in documents)
        texts[split] = [tokenizer.decode(ids[:-1]) for ids in documents]
    return texts


# --- documents ---------------------------------------------------------------------------------------------------


def test_every_format_gives_the_same_documents(tmp_path: Path) -> None:
    texts = make_words(300)
    records = json_lines(texts)
    array = json.dumps([{"text": text, "id": number} for number, text in enumerate(texts)], ensure_ascii=False)
    contents = {
        "a.jsonl": records.encode(),
        "a.jsonl.gz": gzip.compress(records.encode()),
        "a.jsonl.zst": zstandard.compress(records.encode()),
        "a.jsonl.bz2": bz2.compress(records.encode()),
        "a.ndjson": records.encode(),
        "a.ndjson.xz": lzma.compress(records.encode()),
        "two members.jsonl.xz": b"".join(map(lzma.compress, records.encode().splitlines(keepends=True))),
        "two members.jsonl.bz2": b"".join(map(bz2.compress, records.encode().splitlines(keepends=True))),
        "a.json": array.encode(),
        "a.JSON.gz": gzip.compress(json.dumps([{"text": text} for text in texts], indent=2).encode()),
        "a.txt": "\n\n".join(texts).encode(),
        "a.txt.gz": gzip.compress("\n\n".join(texts).encode()),
        "windows.txt": b"\xef\xbb\xbf" + "\r\n\r\n\r\n".join(texts).encode(),
    }
    for name, content in contents.items():
        assert read_documents(write_corpus(tmp_path / name, content), separator="\n\n") == texts, name
    table = pyarrow.table({"id": list(range(300)), "text": texts})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=70)
    assert read_documents(tmp_path / "a.parquet") == texts


def test_a_directory_is_read_recursively_in_the_order_of_names(tmp_path: Path) -> None:
    write_corpus(tmp_path / "b" / "2.jsonl", json_lines(["four"]))
    write_corpus(tmp_path / "b" / "1.txt", "two\nlines of it\n\n\nand a paragraph")
    write_corpus(tmp_path / "a.jsonl", json_lines(["one"]))
    write_corpus(tmp_path / "c.jsonl.gz", gzip.compress(json_lines(["five"]).encode()))
    assert read_documents(tmp_path) == ["one", "two\nlines of it\n\n\nand a paragraph", "four", "five"]


def test_the_separator_of_a_text_file_is_what_it_says(tmp_path: Path) -> None:
    text = "one\n\nof two paragraphs\n<|end|>\n = Title = \n\nlong" + " long" * 300_000 + "<|end|>three"
    documents = read_documents(write_corpus(tmp_path / "a.txt", text), separator="<|end|>")
    assert [document[:25] for document in documents] == [
        "one\n\nof two paragraphs",
        " = Title =\n\nlong long lon",
        "three",
    ]
    assert len(documents[1]) > 1_500_000, "longer than what is read at once"


def test_a_separator_that_is_nowhere_is_refused(prepared: Callable, tmp_path: Path) -> None:
    for number, text in enumerate(make_words(100)):
        write_corpus(tmp_path / "corpus" / f"{number}.txt", f"{text}\n\nand more")
    with pytest.raises(ConfigError, match=r"no \.txt file contains document_separator '\\\\n\\\\n'; correct it, or"):
        prepared(tmp_path / "corpus", document_separator=r"\n\n")
    write_corpus(tmp_path / "corpus" / "one.txt", r"has\n\nit")
    _, manifest, _ = prepared(tmp_path / "corpus", document_separator=r"\n\n")
    assert sum(manifest["documents"].values()) == 102 and manifest["document_separator"] == r"\n\n"


def test_a_text_file_that_is_no_one_document_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minitron.data.corpus._LONGEST", 1000)
    path = write_corpus(tmp_path / "a.txt", "a line\n" * 300)
    with pytest.raises(
        ConfigError, match=r"a\.txt: one document of more than 0 million characters; if it has several, s"
    ):
        read_documents(path)
    assert len(read_documents(path, separator="\n")) == 300


def test_articles_of_wikitext_in_a_text_file(tmp_path: Path) -> None:
    path = write_corpus(tmp_path / "wiki.train.txt", WIKITEXT)
    assert read_documents(path) == ARTICLES
    assert all(map(normalize_text, Corpus(str(path), "text"))), "the blank line before the first title is no document"


def test_articles_of_wikitext_whose_lines_are_records(tmp_path: Path) -> None:
    lines = WIKITEXT.splitlines(keepends=True)
    parquet.write_table(pyarrow.table({"text": lines}), tmp_path / "train.parquet", row_group_size=3)
    assert read_documents(tmp_path / "train.parquet") == ARTICLES
    assert read_documents(write_corpus(tmp_path / "train.jsonl", json_lines([line.strip() for line in lines]))) == [
        "\n".join(line.strip() for line in article.splitlines()) for article in ARTICLES
    ]


@pytest.mark.parametrize("end", [6, 7, 12])
def test_an_article_may_reach_over_the_end_of_a_file(end: int, tmp_path: Path) -> None:
    # The second shard begins in the middle of the first article: with a blank line, after one, in the last section.
    lines = WIKITEXT.replace(" = 1 / s and a formula = \n", "").splitlines(keepends=True)
    for name, part in (("train-0.parquet", lines[:end]), ("train-1.parquet", lines[end:])):
        parquet.write_table(pyarrow.table({"text": part}), tmp_path / name)
    assert read_documents(tmp_path) == [ARTICLES[0].replace("\n = 1 / s and a formula =", ""), ARTICLES[1]]


def test_wikitext_without_blank_lines(tmp_path: Path) -> None:
    lines = [line for line in WIKITEXT.splitlines() if line.strip() and "formula" not in line]
    texts = [article.replace("\n = 1 / s and a formula =", "").replace("\n\n", "\n") for article in ARTICLES]
    assert read_documents(write_corpus(tmp_path / "a.txt", "\n".join(lines))) == texts


def test_records_of_other_texts_stay_documents(tmp_path: Path) -> None:
    texts = ["x = 1", "a\n\n = Title =\n\nb", "= = Section = =", "one line"]
    assert read_documents(write_corpus(tmp_path / "a.jsonl", json_lines(texts))) == texts


def test_a_json_array_is_read_in_pieces(tmp_path: Path) -> None:
    # Longer than what is read at once, with braces, quotes and escapes where a piece may end.
    texts = [f'{number} {{"a": [1, "\\", ü€𝄞\\u00e9]}}' * 40 for number in range(2000)]
    for ascii_only in (True, False):
        content = json.dumps([{"text": text, "n": 1.5e3} for text in texts], ensure_ascii=ascii_only)
        assert len(content) > 2 << 20
        assert read_documents(write_corpus(tmp_path / "a.json", content)) == texts


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("Cafe\u0301", "Café"),
        ("a\r\nb\rc", "a\nb\nc"),
        ("a  \nb\t \n\n", "a\nb"),
        ("\n\n  indented", "  indented"),
        ("a\x00b\x1b[0m\x7f\x85c\td", "ab[0mc\td"),
        ("half \ud83d of a pair", "half  of a pair"),
        (" \n\t\r\n", ""),
    ],
)
def test_normalize(raw: str, expected: str) -> None:
    assert normalize_text(raw) == expected
    assert normalize_text(expected) == expected
    assert unicodedata.is_normalized("NFC", expected)


# --- the dataset -------------------------------------------------------------------------------------------------


def test_the_dataset_is_what_its_manifest_says(prepared: Callable, teacher: Path, tmp_path: Path) -> None:
    texts = make_words(400)
    noisy = [texts[0] + "  \r\n", texts[1], "", *texts, " \n", "\x00", texts[5]]
    directory, manifest, metrics = prepared(write_corpus(tmp_path / "a.jsonl", json_lines(noisy)), licence="CC0-1.0")

    tokenizer = AutoTokenizer.from_pretrained(teacher)
    by_split = decode_documents(directory, teacher)
    assert sorted(text for split in SPLITS for text in by_split[split]) == sorted(texts)  # complete, and disjoint
    for split, documents in by_split.items():
        expected = sum(len(tokenizer(text)["input_ids"]) + 1 for text in documents)
        assert manifest["tokens"][split] == metrics[f"{split}_tokens"] == expected
        assert manifest["documents"][split] == metrics[f"{split}_documents"] == len(documents)
        assert manifest["characters"][split] == sum(map(len, documents))
        assert manifest["sha256"][split] == sha256((directory / f"{split}.bin").read_bytes()).hexdigest()
    assert 20 <= len(by_split["validation"]) <= 60  # 40 expected, standard deviation 6
    assert 20 <= len(by_split["test"]) <= 60
    assert (manifest["duplicates"], manifest["empty"]) == (metrics["duplicates"], metrics["empty"]) == (3, 3)
    assert metrics["documents"] == 400
    assert metrics["tokens_per_second"] > 0
    assert manifest["tokenizer_sha256"] == sha256((teacher / "tokenizer.json").read_bytes()).hexdigest()
    assert {key: manifest[key] for key in ("vocab_size", "eos_token_id", "licence", "seed")} == {
        "vocab_size": 512,
        "eos_token_id": 1,
        "licence": "CC0-1.0",
        "seed": 1234,
    }
    check_tokenizer(directory, teacher)


def test_the_split_of_a_document_depends_on_its_text_and_the_seed_alone(
    prepared: Callable, teacher: Path, tmp_path: Path
) -> None:
    texts = make_words(300)
    plain = write_corpus(tmp_path / "a.jsonl", json_lines(texts))
    shuffled = write_corpus(
        tmp_path / "b" / "b.txt", "\n\n".join(random.Random(1).sample(texts, 300)) + "\n\nanother one"
    )
    one, two, three = (
        decode_documents(prepared(corpus, name, seed=seed, document_separator="\n\n")[0], teacher)
        for corpus, name, seed in ((plain, "one", 1), (shuffled, "two", 1), (plain, "three", 2))
    )
    for split in SPLITS:
        assert set(two[split]) - {"another one"} == set(one[split])
        assert set(three[split]) != set(one[split])


def test_the_same_run_gives_the_same_bytes(prepared: Callable, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "a.jsonl", json_lines(make_words(300)))
    (one, first, _), (two, second, _) = prepared(corpus, "one"), prepared(corpus, "two")
    assert first == second
    for split in SPLITS:
        assert (one / f"{split}.idx").read_bytes() == (two / f"{split}.idx").read_bytes()


def test_a_second_run_returns_at_once(prepared: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = write_corpus(tmp_path / "a.jsonl", json_lines(make_words(300)))
    directory, _, _ = prepared(corpus)
    before = (directory / "train.bin").stat().st_mtime_ns
    prepared(corpus)
    assert "is already in" in capsys.readouterr().out
    assert (directory / "train.bin").stat().st_mtime_ns == before


def test_a_split_that_is_not_asked_for_is_empty(prepared: Callable, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "a.jsonl", json_lines(make_words(100)))
    directory, manifest, _ = prepared(corpus, validation_fraction=0.3, test_fraction=0.0)
    assert manifest["documents"]["test"] == 0
    assert len(IndexedDataset(directory / "test")) == 0


def test_own_splits_are_used_and_what_they_hold_is_no_training_text(
    prepared: Callable, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = make_words(100)
    root = tmp_path / "corpus" / "data"
    parts = {
        "train-00000-of-00002": [*texts[:40], texts[90]],
        "train-00001-of-00002": [*texts[40:80], texts[81], texts[0]],
        "validation-00000-of-00001": [*texts[80:90], texts[91]],
        "test-00000-of-00001": [*texts[90:], texts[99]],
    }
    for name, part in parts.items():
        write_corpus(root / f"{name}.jsonl", json_lines(part))
    write_corpus(tmp_path / "corpus" / "README.md", "# A dataset")
    directory, manifest, metrics = prepared(tmp_path / "corpus")
    by_split = decode_documents(directory, teacher)
    assert by_split == {"train": texts[:80], "validation": texts[80:90], "test": texts[90:]}
    assert manifest["documents"] == {"train": 80, "validation": 10, "test": 10}
    assert manifest["overlaps"] == {"train": 2, "validation": 1, "test": 0}
    assert (manifest["duplicates"], metrics["train_overlaps"], metrics["files"]) == (2, 2, 4)
    assert manifest["own_splits"] == ["train", "validation", "test"]
    assert manifest["left_out"] == {"README.md": "companion"}
    output = capsys.readouterr().out
    assert "corpus: 4 files, own splits train, validation, test; left out: README.md (companion)\n" in output
    assert (
        "documents: 80 train, 10 validation, 10 test; 2 duplicates and 0 empty documents dropped; 2 of train and "
        "1 of validation dropped, because held-out text has them" in output
    )

    _, pooled, _ = prepared(tmp_path / "corpus", "pooled", own_splits=False)
    assert "own_splits" not in pooled and "overlaps" not in pooled
    assert sum(pooled["documents"].values()) == 100 and pooled["documents"]["test"] != 10


def test_a_split_of_its_own_that_holds_nothing_new_is_refused(prepared: Callable, tmp_path: Path) -> None:
    for name in ("train", "validation", "test"):
        write_corpus(tmp_path / "corpus" / f"{name}.jsonl", json_lines(make_words(10 if name == "train" else 3)))
    with pytest.raises(ConfigError, match=r"validation gets none of its 10 distinct documents; all of its own \(3\) "):
        prepared(tmp_path / "corpus")


def test_the_manifest_of_a_plain_corpus_is_what_it_was(prepared: Callable, tmp_path: Path) -> None:
    _, manifest, _ = prepared(write_corpus(tmp_path / "a.jsonl", json_lines(make_words(100))))
    assert list(manifest) == [
        *("documents", "characters", "bytes", "duplicates", "empty", "tokens", "sha256", "corpus_sha256"),
        *("tokenizer_sha256", "vocab_size", "eos_token_id", "licence", "seed"),
    ]


def test_words_that_look_like_special_tokens_are_text(prepared: Callable, teacher: Path, tmp_path: Path) -> None:
    texts = [f"{text} </s> <s>" for text in make_words(100)]
    directory, _, _ = prepared(write_corpus(tmp_path / "a.jsonl", json_lines(texts)))
    by_split = decode_documents(directory, teacher)  # would find an EOS in mid-document
    assert {text for documents in by_split.values() for text in documents} == set(texts)


def test_long_documents_are_not_cut_and_batches_lose_nothing(prepared: Callable, teacher: Path, tmp_path: Path) -> None:
    texts = ["long " * 150_000 + "end", *make_words(20_000)]  # several batches; the first document alone fills one
    directory, manifest, _ = prepared(
        write_corpus(tmp_path / "a.jsonl.zst", zstandard.compress(json_lines(texts).encode()))
    )
    lengths = [length for split in SPLITS for length in IndexedDataset(directory / split).lengths.tolist()]
    assert len(lengths) == 20_001
    assert sum(lengths) == sum(manifest["tokens"].values())
    assert max(lengths) >= 150_000
    last = {split: IndexedDataset(directory / split) for split in SPLITS}
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    assert texts[-1] in {tokenizer.decode(read[len(read) - 1][:-1]) for read in last.values()}


def test_memory_does_not_grow_with_the_corpus(teacher: Path, tmp_path: Path) -> None:
    """In processes of their own, whose peaks are their own."""

    def peak(megabytes: int) -> int:
        """Peak resident kilobytes of a run on its own."""
        corpus = tmp_path / f"{megabytes}.jsonl"
        with corpus.open("w") as stream:
            for number in range(megabytes * 250):
                stream.write(json.dumps({"text": f"{number} " + "abcdefg " * 500}) + "\n")
        settings = {"corpus": str(corpus), "teacher": str(teacher), "output": str(tmp_path / f"out{megabytes}")}
        config = write_corpus(tmp_path / f"{megabytes}.yaml", json.dumps(settings))
        subprocess.run([sys.executable, "-m", "minitron.prepare", "--config", config], check=True, capture_output=True)
        record = json.loads((tmp_path / f"out{megabytes}" / "stage.json").read_text())
        return int(record["peak_rss_mb"])

    assert peak(20) - peak(4) < 12  # MB: between runs it differs by 6; the text alone has 16 more, its tokens far more


def test_progress_is_logged_while_it_runs(teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Recorder(Tracker):
        rows: list[tuple[int, float]] = []  # noqa: RUF012

        def log(self, metrics: dict[str, float], step: int = 0) -> None:
            self.rows.append((step, metrics["tokens"]))

    monkeypatch.setattr(prepare, "_LOG_SECONDS", 0)
    corpus = Corpus(str(write_corpus(tmp_path / "a.jsonl", json_lines(make_words(30_000)))), "text")
    selection = Selection([corpus], PrepareConfig(output=tmp_path, corpus="a", teacher=str(teacher)))
    tokens, _ = prepare.write_dataset(selection, load_tokenizer(teacher), tmp_path, Recorder({}))
    logged = [count for _, count in Recorder.rows]
    assert len(logged) >= 2 and logged == sorted(logged)
    assert logged[-1] == sum(tokens.values())
    assert corpus.position == corpus.size == (tmp_path / "a.jsonl").stat().st_size


def test_a_killed_run_goes_on_with_what_it_has_tokenized(
    prepared: Callable, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between two saves, and within one: before and after the files are on the disk."""
    monkeypatch.setattr(prepare, "_BATCH_CHARACTERS", 1 << 14)
    for name, count in (("a", 4000), ("b", 500)):
        write_corpus(tmp_path / f"{name}.jsonl", json_lines(make_words(count, seed=len(name) + count)))
    mixture = json.dumps([{"address": str(tmp_path / f"{name}.jsonl"), "weight": 1} for name in "ab"])
    expected = content_hash(prepared(mixture, "undisturbed")[0])
    save, write = IndexedWriter.save, prepare.write_atomically
    tokenize, texts = DocumentTokenizer.tokenize, Counter[str]()
    saves: Counter[str] = Counter()

    def kill_in(moment: str, number: int, name: str) -> None:
        """Be the child that is killed, in the save or write of this number."""

        def save_or_die(writer: IndexedWriter) -> int:
            saves["save"] += 1
            if moment == "save" and saves["save"] == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return save(writer)

        def write_or_die(path: Path, content: dict[str, Any]) -> None:
            write(path, content)
            saves["write"] += 1
            if moment == "write" and saves["write"] == number:
                os.kill(os.getpid(), signal.SIGKILL)

        monkeypatch.setattr(prepare, "_SAVE_SECONDS", 0)
        monkeypatch.setattr(IndexedWriter, "save", save_or_die)
        monkeypatch.setattr(prepare, "write_atomically", write_or_die)
        prepared(mixture, name)

    def start_and_kill(*arguments: Any) -> None:
        child = multiprocessing.get_context("fork").Process(target=kill_in, args=arguments)
        child.start()
        child.join(120)
        assert child.exitcode == -signal.SIGKILL

    def count_texts(tokenizer: DocumentTokenizer, batch: list[str]) -> Any:
        texts["tokenized"] += len(batch)
        return tokenize(tokenizer, batch)

    for moment, number in (("save", 8), ("write", 4)):
        start_and_kill(moment, number, moment)
        texts.clear()
        with monkeypatch.context() as patched:
            patched.setattr(DocumentTokenizer, "tokenize", count_texts)
            directory, manifest, _ = prepared(mixture, moment)
        assert content_hash(directory) == expected, moment
        assert 0 < texts["tokenized"] < sum(manifest["documents"].values()) - 500, "what was saved is kept"
        assert not (tmp_path / f"{moment}.partial").exists()

    start_and_kill("write", 4, "moved")
    (tmp_path / "moved.partial" / CHECKPOINTS / "train.bin").unlink()  # as after a kill between two renames
    start_and_kill("save", 1, "moved")
    assert content_hash(prepared(mixture, "moved")[0]) == expected, "files of two attempts are not mixed"


def test_files_that_are_read_at_once_have_a_position(prepared: Callable, tmp_path: Path) -> None:
    """A file of less than a megabyte is read before its first document is taken."""
    for number in range(4):
        texts = [f"{number} {index} " + "alpha beta " * 500 for index in range(120)]
        write_corpus(tmp_path / "corpus" / f"{number}.jsonl", json_lines(texts))
    _, manifest, _ = prepared(tmp_path / "corpus")
    assert sum(manifest["documents"].values()) == 480


def test_a_document_in_two_splits_is_caught(tmp_path: Path) -> None:
    config = PrepareConfig(output=tmp_path, corpus="a", teacher="b", test_fraction=0)
    corpus = Corpus(str(write_corpus(tmp_path / "a.txt", "one\n\ntwo")), "text")
    selection = Selection([corpus], config)
    selection.digests["train"] |= {b"1" * 16, b"2" * 16}
    selection.digests["validation"] |= {b"2" * 16}
    with pytest.raises(RunError, match="1 documents are both in train and in validation; nothing"):
        selection.check_splits()


def test_the_shares_of_the_splits() -> None:
    config = PrepareConfig(output=Path("x"), corpus="a", teacher="b", validation_fraction=0.2, test_fraction=0.1)
    splits = [assign_split(number.to_bytes(16, "big"), config) for number in range(20_000)]
    assert splits.count("validation") == pytest.approx(4000, abs=200)  # standard deviation 57
    assert splits.count("test") == pytest.approx(2000, abs=200)


# --- a dataset on a hub ------------------------------------------------------------------------------------------

COMMIT = "c" * 40


class _Hub(http.server.BaseHTTPRequestHandler):
    """The part of a hub's protocol that `datasets` reads a dataset of several configurations by."""

    card = """---
configs:
- config_name: plain
  data_files:
  - {split: train, path: plain/a.jsonl}
  - {split: test, path: other/a.jsonl}
  - {split: extra, path: other/a.jsonl}
- {config_name: wiki, data_files: [{split: train, path: wiki/a.jsonl}]}
- {config_name: chat, data_files: [{split: train, path: chat/a.jsonl}]}
- {config_name: heldout, data_files: [{split: test, path: other/a.jsonl}]}
---
"""
    files = {  # noqa: RUF012
        "README.md": card.encode(),
        "plain/a.jsonl": json_lines(make_words(200)).encode(),
        "other/a.jsonl": json_lines(["of another split"]).encode(),
        "chat/a.jsonl": "".join(map(make_conversation, make_words(30))).encode(),
        "wiki/a.jsonl": json_lines(WIKITEXT.splitlines(keepends=True)).encode(),
    }

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        entries = [
            {"type": "file", "path": name, "size": len(content), "oid": sha256(content).hexdigest()[:40]}
            for name, content in self.files.items()
        ]
        api, files = "/api/datasets/org/name", f"/datasets/org/name/resolve/{COMMIT}/"
        if path in (api, f"{api}/revision/main", f"{api}/revision/{COMMIT}"):
            self.reply(json.dumps({"id": "org/name", "sha": COMMIT, "siblings": []}).encode())
        elif path.startswith(f"{api}/tree/{COMMIT}"):
            under = path.removeprefix(f"{api}/tree/{COMMIT}").strip("/")
            self.reply(json.dumps([entry for entry in entries if str(entry["path"]).startswith(under)]).encode())
        elif path.startswith(f"{api}/paths-info/{COMMIT}"):
            self.reply(json.dumps(entries).encode())
        elif (name := path.removeprefix(files)) in self.files:
            self.reply(self.files[name])
        else:
            self.reply(b"", 404)

    do_HEAD = do_POST = do_GET

    def reply(self, content: bytes, status: int = 200) -> None:
        self.send_response(status)
        for name, value in {
            "X-Repo-Commit": COMMIT,
            "ETag": f'"{sha256(content).hexdigest()}"',
            "Content-Length": str(len(content)),
            "Content-Type": "application/json",
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def run_apart(settings: dict[str, Any], directory: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run prepare in a process of its own: the hub libraries read the environment when they are imported."""
    config = write_corpus(directory / "prepare.yaml", json.dumps(settings, default=str))
    command = [sys.executable, "-m", "minitron.prepare", "--config", str(config)]
    environment = os.environ | {"HF_HOME": str(directory / "hf")} | environment
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


def test_a_dataset_on_a_hub(hub: str, teacher: Path, tmp_path: Path) -> None:
    corpora = {"plain": "hf://org/name/plain", "wiki": "hf://org/name@main/wiki"}
    corpora |= {"heldout": "hf://org/name/heldout", "wrong": "hf://org/name/plian"}
    shared = {"teacher": str(teacher), "validation_fraction": 0.1, "test_fraction": 0, "seed": 3}
    jobs = [shared | {"corpus": address, "output": str(tmp_path / name)} for name, address in corpora.items()]
    jobs[1]["validation_fraction"] = 0
    template = "{% for message in messages %}{{ message.role + ': ' + message.content + eos_token }}{% endfor %}"
    write_corpus(shutil.copytree(teacher, tmp_path / "instructed") / "chat_template.jinja", template)
    chat = {"corpus": "hf://org/name/chat", "output": str(tmp_path / "chat"), "messages_field": "messages"}
    jobs.append(shared | chat | {"teacher": str(tmp_path / "instructed")})
    script = write_corpus(
        tmp_path / "script.py",
        f"""
from minitron.errors import MinitronError
from minitron.stages import prepare
from minitron.storage.bucket import pin_objects
from minitron.config.stages import PrepareConfig
for job in {jobs!r}:
    try:
        prepare.run(PrepareConfig(**job))
    except MinitronError as error:
        print(error.exit_status, error)
""",
    )
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": hub}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment, timeout=120)
    by_split = decode_documents(tmp_path / "plain", teacher)
    assert by_split["test"] == ["of another split"]
    counts = json.loads((tmp_path / "chat" / MANIFEST).read_text())
    assert sum(counts["documents"].values()) == 30
    assert 0 < counts["counted_tokens"]["train"] < counts["tokens"]["train"]
    assert set(by_split["train"] + by_split["validation"]) == set(make_words(200))
    assert 5 <= len(by_split["validation"]) <= 40, "the dataset has none of its own: by the fraction"
    manifest = json.loads((tmp_path / "plain" / MANIFEST).read_text())
    assert (manifest["own_splits"], manifest["left_out"]) == (["train", "test"], {"split extra": "unknown name"})
    assert "own splits train, test; left out: split extra (unknown name)" in done.stdout
    record = json.loads((tmp_path / "plain" / "stage.json").read_text())
    assert record["inputs"]["corpus"] == {
        "address": "hf://org/name/plain",
        "sha256": f"{COMMIT}/plain",
        "pinned": f"hf://org/name@{COMMIT}/plain",
    }
    assert manifest["corpus_sha256"] == f"{COMMIT}/plain"
    assert decode_documents(tmp_path / "wiki", teacher)["train"] == ARTICLES
    no_train, wrong = [line for line in done.stdout.splitlines() if line[0] in "12"]
    assert no_train.startswith(
        "2 hf://org/name/heldout: no split train (found: test); give hf://org/name/CONFIG of a configuration"
    )
    assert wrong.startswith("1 hf://org/name/plian: cannot be read (BuilderConfig 'plian'")
    assert "'plain', 'wiki'" in wrong and "check the dataset's configuration" in wrong
    assert not (tmp_path / "wrong").exists() and not (tmp_path / "wrong.partial").exists()


def test_a_hub_that_cannot_be_reached(teacher: Path, tmp_path: Path) -> None:
    settings = {"teacher": teacher, "output": tmp_path / "out", "corpus": "hf://org/name"}
    done = run_apart(settings, tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: hf://org/name: not fetched (")
    assert "check the name, HF_TOKEN and the network, or give a local path" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("address", ["hf://", "hf://a/b/c/d", "hf://a/b@"])
def test_an_address_that_is_no_datasets(address: str) -> None:
    with pytest.raises(ConfigError, match=r"not a dataset's address; give hf://org/name\[@revision\]\[/config\]"):
        resolve_hub_dataset(address)


# --- bad input ---------------------------------------------------------------------------------------------------

GOOD = json_lines(make_words(50))
BAD_CORPORA: dict[str, tuple[str, str | bytes, type[MinitronError], list[str]]] = {
    "empty file": ("a.jsonl", "", ConfigError, ["/corpus: no text (0 empty documents)"]),
    "nothing but blanks": (
        "a.jsonl",
        json_lines(["", "\n"]),
        ConfigError,
        ["no text (2 empty documents)", "give a corpus with text"],
    ),
    "no supported file": ("a.pdf", "%PDF", ConfigError, ["no file in a supported format (found: a.pdf)", "give .txt"]),
    "no text field": (
        "a.jsonl",
        GOOD + '{"body": "x", "id": 1}\n',
        ConfigError,
        ["a.jsonl: record 51: no field 'text' (found: body, id)", "set text_field to the field that holds the text"],
    ),
    "text that is none": ("a.jsonl", '{"text": 5}', ConfigError, ["record 1: field 'text' is int, not text"]),
    "record that is none": ("a.json", '["x"]', ConfigError, ["a.json: record 1: str, not an object"]),
    "broken line": (
        "a.jsonl",
        GOOD + '{"text": "x\n',
        RunError,
        ["a.jsonl: cannot be read after record 50", "line 51"],
    ),
    "broken array": (
        "a.json",
        '[{"text": "x"}, {"te',
        RunError,
        ["after record 1", "repair the file or download it again"],
    ),
    "array without end": ("a.json", '[{"text": "x"}', RunError, ["the array has no end"]),
    "truncated gzip": ("a.jsonl.gz", gzip.compress(GOOD.encode())[:-20], RunError, ["a.jsonl.gz: cannot be read"]),
    "no gzip": ("a.jsonl.gz", GOOD, RunError, ["a.jsonl.gz: cannot be read after record 0", "download it again"]),
    "truncated zst": ("a.jsonl.zst", zstandard.compress(GOOD.encode())[:-9], RunError, ["a.jsonl.zst: cannot be read"]),
    "no parquet": ("a.parquet", GOOD, RunError, ["a.parquet: cannot be read after record 0", "download it again"]),
    "not UTF-8": ("a.txt", "Ärger".encode("latin-1"), RunError, ["a.txt: cannot be read", "save it as UTF-8"]),
    "truncated bz2": (
        "a.txt.bz2",
        bz2.compress(GOOD.encode())[:-9],
        RunError,
        ["a.txt.bz2: cannot be read", "download it"],
    ),
    "truncated xz": (
        "a.jsonl.xz",
        lzma.compress(GOOD.encode())[:-9],
        RunError,
        ["a.jsonl.xz: cannot be read", "download it"],
    ),
    "no xz": ("a.jsonl.xz", GOOD, RunError, ["a.jsonl.xz: cannot be read after record 0", "download it again"]),
    "one document": (
        "a.txt",
        "one\n\ntext",
        ConfigError,
        ["gets none of its 1 distinct documents", "a .txt file is one document unless you set document_separator"],
    ),
}


@pytest.mark.parametrize("case", BAD_CORPORA)
def test_a_bad_corpus_is_refused(case: str, prepared: Callable, tmp_path: Path) -> None:
    name, content, kind, messages = BAD_CORPORA[case]
    write_corpus(tmp_path / "corpus" / name, content)
    with pytest.raises(kind) as caught:
        prepared(tmp_path / "corpus")
    for message in messages:
        assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"], "something half-written was left"


def test_damaged_gzip_content_is_refused(prepared: Callable, tmp_path: Path) -> None:
    content = bytearray(gzip.compress(json_lines(make_words(3000)).encode()))
    content[len(content) // 2] ^= 0xFF
    write_corpus(tmp_path / "corpus" / "a.jsonl.gz", bytes(content))
    with pytest.raises(RunError, match=r"a\.jsonl\.gz: cannot be read after record \d+"):
        prepared(tmp_path / "corpus")


def test_a_corpus_in_a_bucket_keeps_the_same_rules(prepared: Callable, world: "World", tmp_path: Path) -> None:
    for name in ("train.jsonl", "validation.jsonl", "README.md", ".cache/x", "table.csv"):
        texts = make_words(30, seed=len(name))
        world.put(f"corpus/{name}", json_lines(texts if name.endswith("jsonl") else texts[:1]).encode())
    world.log.clear()
    with pytest.raises(
        ConfigError, match=r"gs://bucket/corpus: 1 of 3 files have an unsupported format \(table\.csv\); g"
    ):
        prepared("gs://bucket/corpus")
    assert world.fetched() == [], "refused before any of it is fetched"

    pin_objects.cache_clear()
    del world.storage.objects["bucket"]["corpus/table.csv"]
    _, manifest, _ = prepared("gs://bucket/corpus", test_fraction=0.2)
    assert manifest["left_out"] == {".cache": "hidden", "README.md": "companion"}
    assert manifest["own_splits"] == ["train", "validation"] and manifest["documents"]["validation"] == 30


def test_a_parquet_file_without_the_field(prepared: Callable, tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({"content": ["x"], "id": [1]}), tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match=r"a\.parquet: record 1: no field 'text' \(found: content, id\)"):
        prepared(tmp_path / "a.parquet")
    assert read_documents(tmp_path / "a.parquet", "content") == ["x"]


@pytest.mark.parametrize(
    ("fractions", "split", "remedy"),
    [((1e-9, 0.4), "validation", "raise validation_fraction"), ((0.4, 1e-9), "test", "raise test_fraction")],
)
def test_a_split_without_documents_is_refused(
    fractions: tuple[float, float], split: str, remedy: str, prepared: Callable, tmp_path: Path
) -> None:
    corpus = write_corpus(tmp_path / "a.jsonl", json_lines(make_words(100)))
    with pytest.raises(ConfigError, match=f"{split} gets none of its 100 distinct documents; {remedy}"):
        prepared(corpus, validation_fraction=fractions[0], test_fraction=fractions[1])


def test_a_corpus_that_is_not_there(prepared: Callable, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing: no such file or directory; give an existing path"):
        prepared(tmp_path / "nothing")


def test_a_teacher_without_a_tokenizer(prepared: Callable, teacher: Path, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "a.jsonl", GOOD)
    other = tmp_path / "teacher"
    other.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(teacher / name, other)
    with pytest.raises(ConfigError, match=r"teacher: no tokenizer; put its tokenizer\.json beside the weights"):
        prepared(corpus, teacher=str(other))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "teacher"]


def _edit_json(name: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        content = json.loads((directory / name).read_text())
        change(content)
        (directory / name).write_text(json.dumps(content))

    return edit


def _replace_tokenizer(name: str, content: str) -> Callable[[Path], None]:
    def replace(directory: Path) -> None:
        (directory / "tokenizer.json").unlink()
        (directory / name).write_text(content)

    return replace


CODE = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
BAD_TOKENIZERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "newer model": (
        _edit_json("tokenizer.json", lambda content: content["model"].update(type="SomethingNewer")),
        r"tokenizers [\d.]+ does not know the format of tokenizer\.json \(data did not match .*; install "
        r"the tokenizers of transformers 99\.1, which saved the model, or save the tokenizer again with transformers",
    ),
    "newer pre-tokenizer": (
        _edit_json("tokenizer.json", lambda content: content["pre_tokenizer"].update(type="SomethingNewer")),
        r"does not know the format of tokenizer\.json .*; install the tokenizers of transformers 99\.1, which saved",
    ),
    "newer version": (
        _edit_json("tokenizer.json", lambda content: content.update(version="2.0")),
        r"does not know the format of tokenizer\.json \(Unknown tokenizer version '2\.0'",
    ),
    "damaged": (
        _edit_json("tokenizer.json", lambda content: content["model"]["merges"].append(["zzzz", "qq"])),
        r"the tokenizer cannot be loaded \(Token `zzzz` out of vocabulary.*\); download its files again",
    ),
    "no EOS": (
        _edit_json("tokenizer_config.json", lambda content: content.pop("eos_token")),
        r"the tokenizer has no EOS token, which must end every document; set eos_token in tokenizer_config",
    ),
    "no vocabulary": (
        _edit_json("tokenizer.json", lambda content: content["model"].update(vocab={}, merges=[])),
        r"the tokenizer finds no tokens in text \(vocabulary of \d+\); download its tokenizer\.json again",
    ),
    "code of its own": (
        _edit_json("tokenizer_config.json", lambda content: content.update(CODE)),
        r"the tokenizer cannot be loaded \(The repository .* contains custom code.*save it as a fast tokenizer",
    ),
    "SentencePiece only": (
        _replace_tokenizer("tokenizer.model", "\n\x0e"),
        r"no tokenizer\.json, only tokenizer\.model; convert it with sentencepiece and tiktoken installed: Auto",
    ),
    "chat template only": (_replace_tokenizer("chat_template.jinja", "{{ messages }}"), r"no tokenizer; put its tok"),
    "LFS pointer": (
        _replace_tokenizer("tokenizer.json", "version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 1\n"),
        r"tokenizer\.json: a Git LFS pointer, not the tokenizer; run `git lfs pull`",
    ),
    "half of it": (
        _replace_tokenizer("tokenizer.json", '{"version": '),
        r"tokenizer\.json: not JSON; download it again",
    ),
    "a list": (
        _replace_tokenizer("tokenizer.json", "[]"),
        r"tokenizer\.json: holds list, not a tokenizer; download it again",
    ),
}


@pytest.mark.parametrize("case", BAD_TOKENIZERS)
def test_a_tokenizer_that_cannot_be_used_is_refused(
    case: str, prepared: Callable, teacher: Path, tmp_path: Path
) -> None:
    change, message = BAD_TOKENIZERS[case]
    other = tmp_path / "teacher"
    other.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (other / name).write_bytes((teacher / name).read_bytes())
    _edit_json("config.json", lambda content: content.update(transformers_version="99.1"))(other)
    change(other)
    with pytest.raises(ConfigError, match=message) as caught:
        prepared(write_corpus(tmp_path / "a.jsonl", GOOD), teacher=str(other))
    assert "\n" not in str(caught.value) and caught.value.exit_status == 2


def test_a_fraction_out_of_range() -> None:
    values = {"corpus": "a", "teacher": "b", "output": "c", "validation_fraction": 0.5}
    with pytest.raises(ConfigError, match=r"prepare\.validation_fraction: .*less than 0\.5 \(found 0\.5\)"):
        parse("prepare", values)


def test_the_command_line_refuses_with_one_line_and_status_2(teacher: Path, tmp_path: Path) -> None:
    settings = {"teacher": teacher, "output": tmp_path / "out", "corpus": write_corpus(tmp_path / "a.jsonl", "")}
    config = write_corpus(tmp_path / "prepare.yaml", json.dumps(settings, default=str))
    done = forks.run_python("-m", "minitron.prepare", "--config", str(config))
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"error: corpus {tmp_path}/a.jsonl: no text")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
