"""Turn a corpus into a dataset: clean, deduplicate, split and tokenize its documents.

Run it: `python -m minitron.prepare --config prepare.yaml`.

A document is tokenized as plain text and ends with one EOS; special tokens in it are text. It begins with a BOS if the
tokenizer puts one before a text (see minitron/data/text.py). Sequences are cut from a stream of documents.

A conversation is rendered by the tokenizer's chat template, and a mask says which tokens are the assistant's (see
minitron/data/chat.py).

Memory does not grow with the text, because only a few batches are held at a time. About 100 bytes per document are
kept: the digest that identifies duplicates; and for near-duplicates 2.5 kB.

After a kill the next attempt goes on with the files: at most 30 seconds of tokenizing are lost.
"""

import json
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from itertools import islice, product
from pathlib import Path
from typing import Any

from tqdm import tqdm

from minitron.config.settings import CorpusPart, compute_shares, identify_parts, list_parts
from minitron.config.stages import PrepareConfig
from minitron.data.chat import ChatReader
from minitron.data.corpus import Corpus
from minitron.data.corpus_files import sort_names
from minitron.data.indexed import SPLITS, IndexedDataset, IndexedWriter
from minitron.data.mixture import mix_corpora
from minitron.data.selection import Selection
from minitron.data.text import DocumentTokenizer, Tokens, find_document_start
from minitron.data.tokenizer import tokenizer_hash
from minitron.errors import ConfigError
from minitron.fast_imports import many_imports
from minitron.models.checks import check_model
from minitron.runtime import stage
from minitron.runtime.entry import main
from minitron.runtime.model_sources import fetch_corpus
from minitron.storage import bucket
from minitron.storage.files import delete_path, write_atomically
from minitron.storage.hashing import content_hash
from minitron.storage.hub import resolve_hub_dataset, resolve_local_path
from minitron.storage.layout import MANIFEST, MASK, MIXTURE
from minitron.storage.staging import checkpoints_path
from minitron.tracking.stage_run import Tracker

Batch = list[tuple[str, str]]
"""Pairs of split and document."""

_BATCH_CHARACTERS = 1 << 19
_BATCHES_AHEAD = 2
_LOG_SECONDS = 10
_SAVE_SECONDS = 30
_SAVED = "saved.json"
_COUNTED = "counted_tokens"
_READING = ("messages_field", "document_separator")
_METRICS = ("share", "passes")


def run(config: PrepareConfig) -> dict[str, Any]:
    """Write a dataset to `config.output`: `.bin` and `.idx` of every split, and manifest.json; with masks also `.mask`.

    Returns:
        The stage's record; its metrics have the counts of the manifest.

    Raises:
        ConfigError: there is no text, no text field or no tokenizer, a split gets no document, or the teacher does not
            match its config; of conversations, there is no chat template, or it does not fit them.
        RunError: a file is damaged.
    """
    return stage.run(config, work)


def work(config: PrepareConfig, directory: Path, tracker: Tracker) -> dict[str, Any]:
    """Write the dataset."""
    teacher = Path(config.teacher)
    with many_imports():  # transformers
        tokenizer, tokenizer_sha256 = check_model(teacher), tokenizer_hash(teacher)
    parts = list_parts(config.corpus)
    chats = _open_chats(config, tokenizer, teacher)
    selection = Selection(_open_corpora(config, chats), config)
    for part, corpus in zip(parts, selection.corpus.parts, strict=True):
        print(f"prepare: {part.address}: {corpus.describe()}", flush=True)
    with _resumable_files(directory) as files:
        tokens, speed = write_dataset(selection, tokenizer, files, tracker)
        selection.check_splits()
    counts = selection.summarize_counts() | {"tokens": tokens}
    if any(chats):
        _check_conversations(parts, chats)
        counts[_COUNTED] = {split: IndexedDataset(files / split).count_tokens_of_loss() for split in SPLITS}
    print(f"prepare: {_describe_counts(counts)}", flush=True)
    hashes = {"sha256": ".bin", **({"mask_sha256": MASK} if any(chats) else {})}
    # The manifest of a plain corpus must not change, because its hash is in the key of every model made from it.
    manifest = counts | {
        **{name: {split: content_hash(files / f"{split}{file}") for split in SPLITS} for name, file in hashes.items()},
        **(_identify_corpus(parts[0].address) if len(parts) == 1 else _mix_corpora(config, selection, files)),
        "tokenizer_sha256": tokenizer_sha256,
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        **({"bos_token_id": tokenizer.bos_token_id} if find_document_start(tokenizer) else {}),
        "licence": config.licence,
        "seed": config.seed,
        **{name: value for name in _READING if (value := getattr(config, name))},
        **(_describe_reading(selection.corpus.parts[0]) if len(parts) == 1 else {}),
    }
    for split, suffix in product(SPLITS, (".idx", *hashes.values())):
        (files / f"{split}{suffix}").rename(directory / f"{split}{suffix}")
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    number = {} if selection.corpus.files is None else {"files": selection.corpus.files}
    metrics = _flatten_counts(counts) | number | {"tokens_per_second": round(speed)}
    if MIXTURE not in manifest:
        return {"metrics": metrics}
    return {"metrics": metrics | _flatten_mixture(manifest[MIXTURE]), MIXTURE: manifest[MIXTURE]}


@contextmanager
def _resumable_files(directory: Path) -> Iterator[Path]:
    """Yield the directory of the files that a later attempt goes on with; if nothing was saved, an error deletes it."""
    files = checkpoints_path(directory)
    files.mkdir(parents=True, exist_ok=True)
    try:
        yield files
    except BaseException:
        if not (files / _SAVED).is_file():
            delete_path(files)
        raise


def _open_chats(config: PrepareConfig, tokenizer: Any, teacher: Path) -> list[ChatReader | None]:
    """Return the reader of each corpus's conversations; corpora without a field of their own share prepare's."""
    shared = ChatReader(tokenizer, config.messages_field, teacher) if config.messages_field else None
    fields = [part.messages_field for part in list_parts(config.corpus)]
    return [ChatReader(tokenizer, field, teacher) if field else shared for field in fields]


def _check_conversations(parts: list[CorpusPart], chats: list[ChatReader | None]) -> None:
    for chat in filter(None, chats):
        if not chat.count:
            readers = [part for part, other in zip(parts, chats, strict=True) if other is chat]
            setting = "its messages_field" if readers[0].messages_field else "prepare.messages_field"
            raise ConfigError(
                f"corpus {', '.join(part.address for part in readers)}: no record has the field {chat.field!r}; set "
                f"{setting} to the field of the messages, or leave it out"
            )


def _open_corpora(config: PrepareConfig, chats: list[ChatReader | None]) -> list[Corpus]:
    parts = list_parts(config.corpus)
    for address in filter(bucket.is_bucket, (part.address for part in parts)):  # before any of it is fetched
        sort_names(address, bucket.pin_objects(address)[1])
    reading = (config.document_separator, config.own_splits)
    return [
        Corpus(fetch_corpus(part.address, config), part.text_field or config.text_field, *reading, chat)
        for part, chat in zip(parts, chats, strict=True)
    ]


def _mix_corpora(config: PrepareConfig, selection: Selection, directory: Path) -> dict[str, Any]:
    """Mix several corpora by their weights; return the manifest's entries about them, each with its own identity."""
    parts = list_parts(config.corpus)
    shares = compute_shares(parts)
    uses = mix_corpora(directory / "train", [counts["train"] for counts in selection.documents], shares, config.seed)
    mixture = []
    for number, (part, use) in enumerate(zip(parts, uses, strict=True)):
        print(f"prepare: {part.address}: {use.describe()}", flush=True)
        entry = _identify_corpus(part.address) | _describe_reading(selection.corpus.parts[number])
        entry |= {"documents": selection.documents[number], "share_asked": round(shares[number], 4)}
        mixture.append(entry | use._asdict() | part.list_own())
    return {"corpus_sha256": identify_parts(parts, [entry["corpus_sha256"] for entry in mixture]), MIXTURE: mixture}


def _describe_counts(counts: dict[str, Any]) -> str:
    documents = ", ".join(f"{count} {split}" for split, count in counts["documents"].items())
    near = f", {counts['near_duplicates']} near-duplicates" if "near_duplicates" in counts else ""
    dropped = f"{counts['duplicates']} duplicates{near} and {counts['empty']} empty documents dropped"
    overlaps = [f"{count} of {split}" for split, count in counts.get("overlaps", {}).items() if count]
    held_out = f"; {' and '.join(overlaps)} dropped, because held-out text has them" if overlaps else ""
    counted = [f"{count} of {counts['tokens'][name]} in {name}" for name, count in counts.get(_COUNTED, {}).items()]
    masks = f"; tokens that count: {', '.join(counted)}" if counted else ""
    return f"documents: {documents}; {dropped}{held_out}{masks}"


def _describe_reading(corpus: Corpus) -> dict[str, Any]:
    """Return the manifest's entries about a corpus that is not a plain one."""
    entries = {"own_splits": list(corpus.own_splits), "left_out": corpus.left_out}
    return {name: value for name, value in entries.items() if value}


def write_dataset(
    selection: Selection, tokenizer: Any, directory: Path, tracker: Tracker
) -> tuple[dict[str, int], float]:
    """Write every document, with its EOS, to the files of its split.

    Every _SAVE_SECONDS the documents so far are saved. After a kill the same call reads all text again, to find the
    duplicates, and tokenizes only the documents that were not saved.

    Returns:
        The tokens of each split, and the tokens per second of this call.
    """
    corpus, saved = selection.corpus, _read_saved(directory)
    if saved:
        print(f"prepare: {sum(saved.values())} documents are tokenized already", flush=True)
    started = logged = kept = time.monotonic()
    with ExitStack() as stack:
        writers = {
            split: IndexedWriter(directory / split, len(tokenizer), corpus.has_conversations, saved.get(split, 0))
            for split in SPLITS
        }
        for writer in writers.values():
            stack.enter_context(closing(writer))
        tokens = Counter({split: writer.tokens for split, writer in writers.items()})
        before = tokens.total()
        bar = stack.enter_context(tqdm(total=corpus.size, desc="prepare", unit="B", unit_scale=True))
        for documents in _tokenize_batches(tokenizer, _batch_documents(islice(selection, sum(saved.values()), None))):
            for split, written in documents.items():
                ids = [document.ids for document in written]
                writers[split].add_documents(ids, [document.mask for document in written])
                tokens[split] += sum(map(len, ids))
            speed = (tokens.total() - before) / (time.monotonic() - started)
            bar.set_postfix_str(f"{tqdm.format_sizeof(speed)}tok/s", refresh=False)
            bar.update(corpus.position - bar.n)
            if time.monotonic() - logged > _LOG_SECONDS:
                logged = time.monotonic()
                tracker.log({"tokens": tokens.total(), "tokens_per_second": speed}, step=int(logged - started))
            if time.monotonic() - kept > _SAVE_SECONDS:
                write_atomically(directory / _SAVED, {split: writer.save() for split, writer in writers.items()})
                kept = time.monotonic()
        bar.update(corpus.position - bar.n)
    return dict(tokens), (tokens.total() - before) / (time.monotonic() - started)


def _read_saved(directory: Path) -> dict[str, int]:
    """Return the number of saved documents of each split; none if a killed attempt had begun to publish the files."""
    path = directory / _SAVED
    if not all((directory / f"{split}.bin").is_file() for split in SPLITS):
        path.unlink(missing_ok=True)  # the files of this attempt are others
    return json.loads(path.read_text()) if path.is_file() else {}


def _tokenize_batches(tokenizer: Any, batches: Iterable[Batch]) -> Iterator[dict[str, list[Tokens]]]:
    """Yield the tokens of every document by batch and split, while the next batches are read and tokenized.

    The tokenizer works without Python's lock and on all cores (TOKENIZERS_PARALLELISM), so reading, cleaning and
    writing cost time only if they are slower.
    """
    documents = DocumentTokenizer(tokenizer)
    pending: deque[tuple[Batch, Future[list[Tokens]]]] = deque()
    with ThreadPoolExecutor(1) as pool:
        for batch in batches:
            pending.append((batch, pool.submit(documents.tokenize, [text for _, text in batch])))
            if len(pending) > _BATCHES_AHEAD:
                yield _group_by_split(*pending.popleft())
        while pending:
            yield _group_by_split(*pending.popleft())


def _group_by_split(batch: Batch, tokenized: "Future[list[Tokens]]") -> dict[str, list[Tokens]]:
    documents: dict[str, list[Tokens]] = {split: [] for split in SPLITS}
    for (split, _), tokens in zip(batch, tokenized.result(), strict=True):
        documents[split].append(tokens)
    return documents


def _batch_documents(documents: Iterable[tuple[str, str]]) -> Iterator[Batch]:
    batch: Batch = []
    size = 0
    for split, text in documents:
        batch.append((split, text))
        size += len(text)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _identify_corpus(address: str) -> dict[str, Any]:
    """Return the identity of the corpus's content: the sha256 of its files, a hub's commit or a bucket's snapshot."""
    if bucket.is_bucket(address):
        snapshot, objects = bucket.pin_objects(address)
        return {"corpus_sha256": snapshot.rpartition("#")[2], "corpus_objects": bucket.list_generations(objects)}
    dataset = resolve_hub_dataset(address)
    return {"corpus_sha256": dataset.identity if dataset else content_hash(resolve_local_path(address))}


def _flatten_counts(counts: dict[str, Any]) -> dict[str, int]:
    """Return counts per split as flat entries."""
    flat: dict[str, int] = {}
    for name, value in counts.items():
        flat |= {f"{split}_{name}": n for split, n in value.items()} if isinstance(value, dict) else {name: value}
    return flat | {"documents": sum(counts["documents"].values())}


def _flatten_mixture(mixture: list[dict[str, Any]]) -> dict[str, float]:
    """Return the tokens of an epoch, and each corpus's share of them and passes, as flat entries."""
    entries = [(f"corpus_{number}_{name}", entry[name]) for number, entry in enumerate(mixture, 1) for name in _METRICS]
    return {"epoch_tokens": sum(entry["tokens"] for entry in mixture), **dict(entries)}


if __name__ == "__main__":
    main("prepare")
