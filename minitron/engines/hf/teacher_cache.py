"""What the teacher says about every token of a training, computed once: distillation then needs no teacher in memory.

A cache belongs to a teacher, a dataset and an order of its sequences. It lies in the workspace, so that other students,
longer trainings and killed ones find it. Of each token it has a few possible next tokens with weights, in two forms:

- `sampled`: tokens drawn from the teacher's distribution. A token's mean weight over the draws is its probability, so
  the gradient of the loss has the mean of the exact one (random sampling knowledge distillation, arXiv 2503.16870). The
  draws are systematic: with one random number per position, evenly spaced points in the cumulative distribution. That
  leaves the means as they are and the variance far below that of independent draws.
- `top_k`: the most probable tokens. The student learns that all others are impossible, which biases it towards them.

A shard is a file of `SHARD` sequences in the order of the first epoch, with a checksum.

B = batch, S = sequence, V = vocabulary, C = tokens of a chunk, K = draws per token or tokens kept.
"""

import hashlib
import json
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from minitron.config.stages import DistillConfig
from minitron.data.packed import TrainingSequences
from minitron.engines.hf.device import autocast_on_gpu, compile_layers, get_compute_dtype, get_device
from minitron.errors import RunError
from minitron.models.checkpoint import load_model
from minitron.models.losses import TeacherTargets
from minitron.models.measurements import Measurements
from minitron.models.scoring import compute_hidden_states, get_output_head, validate_teacher
from minitron.storage.cache import persistent_directory
from minitron.storage.files import check_free_space, mark_used, write_beside
from minitron.storage.hashing import identify_content
from minitron.storage.layout import TEACHER_CACHE
from minitron.storage.staging import lock_output

SHARD = 64
"""Sequences of a shard: some 10 to 100 MB."""

CHUNK = 128
"""Tokens whose distribution is in memory at once."""

_FORMAT = 1
_CHECKSUM = "crc32"

Arrays = dict[str, np.ndarray]


class CachedTeacher(Dataset):
    """The sequences of a training, each with what the teacher says about its tokens.

    Item i is that of TrainingSequences with the fields of `TeacherTargets`, each [S] or [S, K].
    """

    def __init__(self, sequences: TrainingSequences, directory: Path, size: int) -> None:
        """Read a complete cache.

        Args:
            sequences: the training; the cache is in the order of its first epoch.
            directory: the cache.
            size: K.
        """
        self._sequences, self.directory, self._size = sequences, directory, size
        self._places = {sequences.find_item(place): place for place in range(sequences.distinct)}

    def __len__(self) -> int:
        """Return the number of sequences in the training."""
        return len(self._sequences)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return the sequence at a position of the training, with the teacher's targets."""
        place = self._places[self._sequences.find_item(index)]
        targets = read_targets(_shard_path(self.directory, place // SHARD), place % SHARD, self._size)
        return self._sequences[index] | targets._asdict()

    def measure_bytes_per_token(self) -> float:
        """Return the bytes of the files per token of training text."""
        paths = list(self.directory.glob("*.safetensors"))
        tokens = sum(_read_header(path)["tokens"] for path in paths)
        return sum(path.stat().st_size for path in paths) / tokens


def cache_teacher(
    config: DistillConfig, sequences: TrainingSequences, load: Callable[[], Any] | None = None
) -> tuple[CachedTeacher, dict[str, float]]:
    """Return a training with the teacher's targets, and the teacher's metrics; compute only what the workspace lacks.

    A shard that is damaged is computed again. Another task that computes the same is waited for.

    Args:
        config: of the stage; `teacher_cache` and `teacher_cache_size` say what is kept of each token.
        sequences: the sequences of the training.
        load: loads the teacher, on the device and without gradients; it is called if anything is missing.
    """
    load = cache(load or (lambda: load_teacher(config.teacher)))
    directory = persistent_directory(config.workspace) / TEACHER_CACHE / _make_name(config)
    with lock_output(directory, wait=True):
        if not config.caching:
            shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True, exist_ok=True)
        part = f"validation-{config.validation_sequences}"
        metrics = Measurements(directory, "distill").get(part, lambda: validate_teacher(config, load()))
        missing = _find_missing_shards(directory, sequences)
        for number, shard in enumerate(tqdm(missing, desc="teacher cache", unit="shard")):
            if written := next(directory.glob("*.safetensors"), None):
                check_free_space(directory, (len(missing) - number) * written.stat().st_size)
            _write_shard(config, load(), sequences, directory, shard)
        mark_used(directory)
    cached = CachedTeacher(sequences, directory, config.teacher_cache_size)
    return cached, metrics | {"teacher_cache_bytes_per_token": round(cached.measure_bytes_per_token(), 1)}


def read_targets(path: Path, row: int, size: int) -> TeacherTargets:
    """Read the targets of a sequence from a shard.

    Raises:
        RunError: the file cannot be read.
    """
    try:
        with safe_open(path, "numpy") as file:
            start, end = file.get_slice("starts")[row : row + 2]
            found = {name: file.get_slice(name)[start:end] for name in ("ids", "weights")}
            rows = {name: file.get_slice(name)[row] for name in ("lengths", "entropy", "log_probability", "top1")}
    except (SafetensorError, OSError) as error:
        raise RunError(f"{path}: cannot be read ({str(error).splitlines()[0]}); run distill again") from error
    lengths = torch.from_numpy(rows["lengths"].astype(np.int64))
    is_used = torch.arange(size) < lengths[:, None]
    ids, weights = torch.zeros(len(lengths), size, dtype=torch.int64), torch.zeros(len(lengths), size)
    ids[is_used] = torch.from_numpy(found["ids"].astype(np.int64))
    weights[is_used] = torch.from_numpy(found["weights"].astype(np.float32))
    return TeacherTargets(
        ids,
        weights / weights.sum(-1, keepdim=True),
        torch.from_numpy(rows["entropy"]),
        torch.from_numpy(rows["log_probability"]),
        torch.from_numpy(rows["top1"].astype(np.int64)),
    )


def load_teacher(path: Path) -> Any:
    """Return a teacher on the device, in the dtype of the computation and without gradients."""
    teacher: Any = load_model(path, get_compute_dtype()).requires_grad_(False)
    compile_layers(teacher)
    return teacher.to(get_device()).eval()


def _make_name(config: DistillConfig) -> str:
    """Return the name of a cache: a hash of everything that affects its content."""
    of_settings = (config.sequence_length, config.seed, config.teacher_cache, config.teacher_cache_size)
    of_content = (identify_content(config.teacher), identify_content(config.dataset), str(get_compute_dtype()))
    parts = [_FORMAT, *of_settings, *of_content]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _shard_path(directory: Path, shard: int) -> Path:
    return directory / f"{shard:06d}.safetensors"


def _find_missing_shards(directory: Path, sequences: TrainingSequences) -> list[int]:
    """Return the shards that are not there, have too few sequences, or are damaged."""
    missing = []
    for shard in range(-(-sequences.distinct // SHARD)):
        path, rows = _shard_path(directory, shard), min(SHARD, sequences.distinct - shard * SHARD)
        try:
            is_there = path.is_file() and _count_intact_rows(path) >= rows
        except (SafetensorError, OSError, ValueError) as error:
            print(f"warning: distill: {path}: damaged ({error}); computing it again", file=sys.stderr, flush=True)
            is_there = False
        if not is_there:
            missing.append(shard)
    return missing


def _count_intact_rows(path: Path) -> int:
    """Return the sequences of a shard.

    Raises:
        SafetensorError, OSError, ValueError: it is damaged.
    """
    header = _read_header(path)
    with safe_open(path, "numpy") as file:
        checksum = _sum_up({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    if checksum != header[_CHECKSUM]:
        raise ValueError("its checksum is another one")
    return header["rows"]


def _read_header(path: Path) -> dict[str, Any]:
    with safe_open(path, "numpy") as file:
        return json.loads(file.metadata()["header"])


def _sum_up(arrays: Arrays) -> int:
    checksum = 0
    for name in sorted(arrays):
        checksum = zlib.crc32(np.ascontiguousarray(arrays[name]).data, zlib.crc32(name.encode(), checksum))
    return checksum


def _write_shard(
    config: DistillConfig, teacher: Any, sequences: TrainingSequences, directory: Path, shard: int
) -> None:
    """Compute a shard, and write it so that no reader sees a partial file."""
    places = range(shard * SHARD, min((shard + 1) * SHARD, sequences.distinct))
    parts: list[Arrays] = []
    for start in range(0, len(places), config.micro_batch_size):
        parts += _describe_batch(config, teacher, sequences, places[start : start + config.micro_batch_size])
    arrays = {name: np.concatenate([part[name] for part in parts]) for name in ("ids", "weights")}
    arrays |= {name: np.stack([part[name] for part in parts]) for name in parts[0] if name not in arrays}
    arrays["starts"] = np.cumsum([0, *(len(part["ids"]) for part in parts)]).astype(np.int64)
    header = {"rows": len(parts), "tokens": arrays["lengths"].size, _CHECKSUM: _sum_up(arrays)}
    with write_beside(_shard_path(directory, shard)) as temporary:
        save_file(arrays, temporary, {"header": json.dumps(header)})


@torch.no_grad()
def _describe_batch(
    config: DistillConfig, teacher: Any, sequences: TrainingSequences, places: range
) -> Iterator[Arrays]:
    """Yield the arrays of each sequence of a micro-batch; those with `lengths` entries per token lie end to end."""
    items = [sequences[place] for place in places]
    input_ids = torch.stack([item["input_ids"] for item in items]).to(teacher.device)
    with autocast_on_gpu():
        states = compute_hidden_states(teacher, input_ids).split(config.sequence_length)
    head = get_output_head(teacher)
    for place, item, hidden in zip(places, items, states, strict=True):
        # one stream of random numbers per sequence: shards and micro-batches do not matter
        shifts = torch.rand(len(hidden), generator=torch.Generator().manual_seed(config.seed + place)).to(hidden.device)
        labels = item["labels"].clamp(min=0).to(hidden.device)  # of a token that counts in no loss any will do
        chunks = [
            _describe_chunk(hidden[chunk] @ head.T, labels[chunk], shifts[chunk], config)
            for chunk in (slice(start, start + CHUNK) for start in range(0, len(hidden), CHUNK))
        ]
        yield {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}


def _describe_chunk(logits_CV: Tensor, labels_C: Tensor, shifts_C: Tensor, config: DistillConfig) -> Arrays:
    log_p_CV = torch.log_softmax(logits_CV.float(), -1)
    is_sampled = config.teacher_cache == "sampled"
    describe = sample_tokens if is_sampled else keep_most_probable
    ids, weights, lengths, entropy = describe(log_p_CV, shifts_C, config.teacher_cache_size)
    id_type = np.uint16 if log_p_CV.shape[1] <= 1 << 16 else np.int32
    return {
        "ids": ids.cpu().numpy().astype(id_type),
        "weights": weights.cpu().numpy().astype(np.uint8 if is_sampled else np.float16),
        "lengths": lengths.cpu().numpy().astype(np.uint8),
        "entropy": entropy.cpu().numpy(),
        "log_probability": log_p_CV.gather(1, labels_C[:, None])[:, 0].cpu().numpy(),
        "top1": log_p_CV.argmax(-1).cpu().numpy().astype(id_type),
    }


def sample_tokens(log_p_CV: Tensor, shifts_C: Tensor, draws: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw tokens systematically; return the different ones, their numbers, how many they are, and the entropies."""
    p_CV = log_p_CV.double().exp_()
    entropy = -(p_CV * log_p_CV).sum(-1).float()
    cumulative = p_CV.cumsum_(-1)
    points = torch.arange(draws, device=shifts_C.device) + shifts_C[:, None].double()
    drawn = torch.searchsorted(cumulative, points / draws * cumulative[:, -1:], right=True)
    drawn.clamp_(max=log_p_CV.shape[1] - 1)  # ascending
    is_first = torch.ones_like(drawn, dtype=torch.bool)
    is_first[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
    places = is_first.flatten().nonzero()[:, 0]
    numbers = torch.diff(places, append=places.new_tensor([drawn.numel()]))
    return drawn[is_first], numbers, is_first.sum(-1), entropy


def keep_most_probable(log_p_CV: Tensor, _: Tensor, kept: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the most probable tokens, their probabilities, how many they are, and the entropies among them."""
    log_p_CK, ids_CK = log_p_CV.topk(min(kept, log_p_CV.shape[1]))
    log_w_CK = torch.log_softmax(log_p_CK, -1)
    entropy = -(log_w_CK.exp() * log_w_CK).sum(-1)
    lengths = torch.full((len(ids_CK),), ids_CK.shape[1])
    return ids_CK.flatten(), log_p_CK.exp().flatten(), lengths, entropy
