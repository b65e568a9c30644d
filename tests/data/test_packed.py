"""The .bin/.idx files against megatron-core's own reader and writer, and the packing against plain concatenation."""

import json
import re
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets import indexed_dataset as megatron

from minitron.data.indexed import IndexedDataset, IndexedWriter
from minitron.data.manifest import check_tokenizer, read_manifest
from minitron.data.packed import PackedDataset
from minitron.data.tokenizer import tokenizer_hash
from minitron.errors import ConfigError, RunError
from minitron.storage.layout import MANIFEST

# What Megatron chooses for a vocabulary, either side of its limit: (vocabulary, dtype, its code in the index).
SIZES = [(49152, np.uint16, 8), (65499, np.uint16, 8), (65500, np.int32, 4), (128256, np.int32, 4)]


def random_documents(vocab_size: int, count: int = 200, seed: int = 0) -> list[list[int]]:
    """Documents of 1 to 40 tokens; the first holds both ends of the vocabulary."""
    rng = np.random.default_rng(seed)
    return [[0, vocab_size - 1]] + [
        rng.integers(vocab_size, size=length).tolist() for length in rng.integers(1, 40, size=count - 1)
    ]


def write(prefix: Path, documents: list[list[int]], vocab_size: int) -> Path:
    writer = IndexedWriter(prefix, vocab_size)
    for start in range(0, len(documents), 70):
        writer.add_documents(documents[start : start + 70])
    writer.close()
    return prefix


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    return write(tmp_path / "train", random_documents(512), 512)


@pytest.mark.parametrize(("vocab_size", "dtype", "code"), SIZES)
def test_what_is_written_is_read(vocab_size: int, dtype: type, code: int, tmp_path: Path) -> None:
    documents = random_documents(vocab_size)
    read = IndexedDataset(write(tmp_path / "train", documents, vocab_size))
    assert len(read) == 200
    assert [read[index].tolist() for index in range(200)] == documents
    assert read.tokens.dtype == dtype
    assert (tmp_path / "train.bin").stat().st_size == sum(map(len, documents)) * np.dtype(dtype).itemsize


def test_the_bytes_are_those_of_the_format(tmp_path: Path) -> None:
    write(tmp_path / "train", [[7, 8, 1], [9], [300, 1]], 512)
    assert (tmp_path / "train.bin").read_bytes() == struct.pack("<6H", 7, 8, 1, 9, 300, 1)
    header = b"MMIDIDX\x00\x00" + struct.pack("<Q", 1) + struct.pack("<B", 8) + struct.pack("<QQ", 3, 4)
    lengths, offsets, documents = (
        struct.pack("<3i", 3, 1, 2),
        struct.pack("<3q", 0, 6, 8),
        struct.pack("<4q", 0, 1, 2, 3),
    )
    assert (tmp_path / "train.idx").read_bytes() == header + lengths + offsets + documents


@pytest.mark.parametrize(("vocab_size", "dtype", "code"), SIZES)
def test_megatron_reads_our_files(vocab_size: int, dtype: type, code: int, tmp_path: Path) -> None:
    assert megatron.DType.optimal_dtype(vocab_size) is dtype
    assert megatron.DType.code_from_dtype(dtype) == code
    documents = random_documents(vocab_size)
    theirs = megatron.IndexedDataset(str(write(tmp_path / "train", documents, vocab_size)))
    assert theirs.index.dtype is dtype
    assert [theirs[index].tolist() for index in range(len(theirs))] == documents
    assert theirs.document_indices.tolist() == list(range(201))
    assert theirs.sequence_lengths.tolist() == list(map(len, documents))


@pytest.mark.parametrize(("vocab_size", "dtype", "code"), SIZES)
def test_we_read_megatrons_files_and_write_the_same_bytes(
    vocab_size: int, dtype: type, code: int, tmp_path: Path
) -> None:
    documents = random_documents(vocab_size)
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    for document in documents:
        builder.add_item(torch.tensor(document))
        builder.end_document()
    builder.finalize(str(tmp_path / "theirs.idx"))
    read = IndexedDataset(tmp_path / "theirs")
    assert [read[index].tolist() for index in range(len(read))] == documents
    write(tmp_path / "ours", documents, vocab_size)
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()


def test_a_split_without_documents(tmp_path: Path) -> None:
    assert len(IndexedDataset(write(tmp_path / "test", [], 512))) == 0
    with pytest.raises(ConfigError, match="0 tokens are fewer than one sequence of 8"):
        PackedDataset(tmp_path / "test", 8, seed=0)


def test_a_missing_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train: no \.bin and \.idx; give a directory that prepare wrote"):
        IndexedDataset(tmp_path / "train")


@pytest.mark.parametrize("change", [-2, 2])
def test_a_bin_of_another_size_than_its_index_is_refused(prefix: Path, change: int) -> None:
    path = prefix.with_suffix(".bin")
    size = path.stat().st_size
    path.write_bytes((path.read_bytes() + b"\0\0")[: size + change])
    message = f"train.bin: damaged: {size + change} bytes, but its index lists {size}; run prepare again"
    with pytest.raises(RunError, match=re.escape(message)):
        IndexedDataset(prefix)


@pytest.mark.parametrize("size", [0, 20, 33, 2000])
def test_a_truncated_index_is_refused(size: int, prefix: Path) -> None:
    path = prefix.with_suffix(".idx")
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(RunError, match=r"train\.idx: .*; run prepare again"):
        IndexedDataset(prefix)


def test_another_magic_number_is_refused(prefix: Path) -> None:
    path = prefix.with_suffix(".idx")
    path.write_bytes(b"TNTIDX\x00\x00\x00" + path.read_bytes()[9:])
    with pytest.raises(RunError, match=r"train\.idx: not a Megatron index; run prepare again"):
        IndexedDataset(prefix)


@pytest.mark.parametrize("sequence_length", [1, 7, 64])
def test_the_stream_is_the_permuted_documents_end_to_end(sequence_length: int, prefix: Path) -> None:
    documents = random_documents(512)
    order = np.random.default_rng(5).permutation(len(documents))
    stream = [token for index in order for token in documents[index]]
    packed = PackedDataset(prefix, sequence_length, seed=5)
    count = (len(stream) - 1) // sequence_length
    assert len(packed) == count
    for index in range(count):
        start = index * sequence_length
        assert packed[index]["input_ids"].tolist() == stream[start : start + sequence_length]
        assert packed[index]["labels"].tolist() == stream[start + 1 : start + 1 + sequence_length]
    assert packed[0]["input_ids"].dtype == packed[0]["labels"].dtype == torch.int64


def test_the_last_partial_sequence_is_dropped(tmp_path: Path) -> None:
    write(tmp_path / "even", [[1] * 16, [2] * 17], 512)  # 33 tokens: 4 sequences of 8, each label included
    write(tmp_path / "short", [[1] * 16, [2] * 16], 512)  # 32 tokens: the fourth would lack its last label
    assert len(PackedDataset(tmp_path / "even", 8, seed=0)) == 4
    assert len(PackedDataset(tmp_path / "short", 8, seed=0)) == 3
    last = PackedDataset(tmp_path / "even", 8, seed=0)[3]
    assert last["input_ids"].shape == last["labels"].shape == (8,)


def test_a_long_document_spans_many_sequences(tmp_path: Path) -> None:
    write(tmp_path / "train", [list(range(100))], 512)
    packed = PackedDataset(tmp_path / "train", 9, seed=0)
    assert [packed[index]["input_ids"].tolist()[0] for index in range(len(packed))] == list(range(0, 99, 9))


def test_the_seed_decides_the_order(prefix: Path) -> None:
    def stream(seed: int) -> list[int]:
        packed = PackedDataset(prefix, 32, seed)
        return [token for index in range(len(packed)) for token in packed[index]["input_ids"].tolist()]

    assert stream(1) == stream(1)
    assert stream(1) != stream(2)


def test_a_split_shorter_than_one_sequence_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "validation", [[1] * 5, [2] * 3], 512)
    assert len(PackedDataset(tmp_path / "validation", 7, seed=0)) == 1
    message = "validation: 8 tokens are fewer than one sequence of 8 + 1; give a larger corpus"
    with pytest.raises(ConfigError, match=re.escape(message)):
        PackedDataset(tmp_path / "validation", 8, seed=0)


def test_the_manifest_is_read_and_its_absence_refused(dataset: Path, teacher: Path, tmp_path: Path) -> None:
    assert read_manifest(dataset)["tokenizer_sha256"] == tokenizer_hash(teacher)
    with pytest.raises(ConfigError, match=r"no manifest\.json; give a directory that prepare wrote"):
        read_manifest(tmp_path)


def test_another_tokenizer_is_refused(dataset: Path, teacher: Path, tmp_path: Path) -> None:
    check_tokenizer(dataset, teacher)
    other = tmp_path / "other"
    shutil.copytree(teacher, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["merges"].pop()
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    made_with = json.loads((dataset / MANIFEST).read_text())["tokenizer_sha256"][:12]
    message = f"{other}: tokenizer {tokenizer_hash(other)[:12]}, but {dataset} was tokenized with {made_with};"
    with pytest.raises(ConfigError, match=re.escape(message) + ".*prepare the corpus again"):
        check_tokenizer(dataset, other)


def test_a_model_without_a_tokenizer_is_refused(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no tokenizer\.json; save the model's fast tokenizer there"):
        check_tokenizer(dataset, tmp_path)
