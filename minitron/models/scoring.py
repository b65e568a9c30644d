"""Scores of models on packed sequences: loss, perplexity, and closeness to a reference model."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from tqdm import tqdm
from transformers import PreTrainedModel

from minitron.config.metrics import compute_perplexity
from minitron.config.stages import TrainingConfig
from minitron.data.packed import IGNORED, PackedDataset
from minitron.errors import ConfigError
from minitron.models.losses import LossWeights, linear_loss


def compute_hidden_states(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """Return the last hidden states of [B, S] token ids as [B · S, H], without computing logits."""
    decoder: Any = model if isinstance(model, FSDPModule) else model.model  # see engines/hf/sharding.py
    states = decoder(input_ids=input_ids, use_cache=False).last_hidden_state
    return states.flatten(0, 1)


def get_output_head(model: PreTrainedModel) -> Tensor:
    """Return the output embedding [V, H]."""
    return model.get_output_embeddings().weight


def score_models(
    models: dict[str, PreTrainedModel],
    dataset: PackedDataset,
    sequences: int,
    micro_batch_size: int,
    reference: PreTrainedModel | None = None,
    description: str = "validation",
) -> dict[str, dict[str, Any]]:
    """Score models on the first sequences of a split; the arguments are those of `sum_scores`.

    Returns:
        Per model `loss` (mean cross-entropy of the next token, nats), `perplexity` (None if it is not finite), and the
        terms against the reference.

    Raises:
        ConfigError: no token of the sequences counts.
    """
    sums, counts = sum_scores(models, dataset, sequences, micro_batch_size, reference, description)
    scores = list_scores(sums, counts, reference is not None)
    return {name: average_scores(terms) for name, terms in scores.items()}


def average_scores(terms: dict[str, list[float]]) -> dict[str, Any]:
    """Return the means of a model's scores over the tokens that count, and the perplexity."""
    means: dict[str, Any] = {name: sum(values) / len(values) for name, values in terms.items()}
    return means | {"perplexity": compute_perplexity(means["loss"])}


def list_scores(sums: dict[str, Tensor], counts: Tensor, has_reference: bool) -> dict[str, dict[str, list[float]]]:
    """Return per model the values of every sequence, from what `sum_scores` returns.

    They are `loss` (cross-entropy of the next token, nats per token) and, with a reference, `kl` (forward KL to the
    model, nats per token) and `top1_agreement`. `share_among_sequences` says what they are if not all tokens count.

    Raises:
        ConfigError: no token of the sequences counts.
    """
    names = ("loss", "kl", "top1_agreement")[: 3 if has_reference else 1]
    return {
        model: dict(zip(names, share_among_sequences(values, counts).T.tolist(), strict=False))
        for model, values in sums.items()
    }


def share_among_sequences(sums: Tensor, counts: Tensor) -> Tensor:
    """Return values of the sequences, [N, K], whose mean is that over all tokens that count.

    A sequence's value is its own mean if the same number of tokens counts in all of them. Else the mean over the tokens
    is a ratio R of two sums, and the value is R plus the sequence's part in its deviation: R + (s - R · c) / mean(c).
    Values of a resample have the mean that its ratio has, to the first order (Cochran, Sampling Techniques, section
    6.4), so intervals over sequences stay right. A sequence in which no token counts has R.

    Args:
        sums: sums over the tokens that count, float64 [N, K].
        counts: numbers of these tokens, float64 [N].

    Raises:
        ConfigError: no token counts.
    """
    if not counts.any():
        raise ConfigError(
            f"no token of the {len(counts)} sequences scored is an assistant's; raise validation_sequences or "
            "evaluation_sequences, or give more conversations"
        )
    mean_count = counts.mean()
    ratio = sums.sum(0) / counts.sum()
    shortfall = (mean_count - counts)[:, None]
    return (sums + torch.where(shortfall == 0, 0, ratio * shortfall)) / mean_count  # a ratio of inf stays in its model


@torch.no_grad()
def sum_scores(
    models: dict[str, PreTrainedModel],
    dataset: PackedDataset,
    sequences: int,
    micro_batch_size: int,
    reference: PreTrainedModel | None = None,
    description: str = "validation",
) -> tuple[dict[str, Tensor], Tensor]:
    """Sum the terms of each of the first sequences of a split, in one pass: each model runs once per batch.

    Args:
        models: models by name, on one device; they are scored in eval mode, and their mode is restored.
        dataset: packed sequences.
        sequences: number of sequences to score; all of them if the split has fewer.
        micro_batch_size: sequences per forward pass.
        reference: the teacher, for the terms against it.
        description: label of the progress bar.

    Returns:
        Per model cross-entropy, KL and agreements of every sequence, float64 [N, 3] on the CPU, summed over the tokens
        that count; and the numbers of these tokens, float64 [N].
    """
    weights = LossWeights(cross_entropy=1.0)
    modes = {name: model.training for name, model in models.items()}
    sums: dict[str, list[Tensor]] = {name: [] for name in models}
    counts: list[Tensor] = []
    for model in models.values():
        model.eval()
    device = next(iter(models.values())).device
    for input_ids, labels in _iterate_batches(dataset, sequences, micro_batch_size, device, description):
        states = {id(model): compute_hidden_states(model, input_ids) for model in models.values()}
        reference_states = None if reference is None else states.get(id(reference))
        if reference is not None and reference_states is None:
            reference_states = compute_hidden_states(reference, input_ids)
        reference_head = None if reference is None else get_output_head(reference)
        for start in range(0, len(labels), dataset.sequence_length):
            sequence = slice(start, start + dataset.sequence_length)
            guide = None if reference_states is None else reference_states[sequence]
            counts.append((labels[sequence] != IGNORED).sum())
            for name, model in models.items():
                terms = linear_loss(
                    states[id(model)][sequence],
                    get_output_head(model),
                    labels[sequence],
                    weights,
                    guide,
                    reference_head,
                )
                sums[name].append(torch.stack([terms.cross_entropy, terms.kl, terms.agreements]))
    for name, model in models.items():
        model.train(modes[name])
    return {name: torch.stack(rows).double().cpu() for name, rows in sums.items()}, torch.stack(counts).double().cpu()


def validate_teacher(config: TrainingConfig, teacher: PreTrainedModel) -> dict[str, float]:
    """Return the teacher's loss on the student's validation sequences: the goal of distillation."""
    validation = PackedDataset(config.dataset / "validation", config.sequence_length, config.seed)
    scores = score_models(
        {"teacher": teacher}, validation, config.validation_sequences, config.micro_batch_size, None,
        "teacher validation",
    )  # fmt: skip
    return {"teacher_validation_loss": scores["teacher"]["loss"]}


def _iterate_batches(
    dataset: PackedDataset, sequences: int, micro_batch_size: int, device: torch.device, description: str
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield input ids [B, S] and labels [B · S]; the progress bar counts tokens."""
    count = min(sequences, len(dataset))
    with tqdm(total=count * dataset.sequence_length, desc=description, unit="tok", unit_scale=True) as bar:
        for start in range(0, count, micro_batch_size):
            items = [dataset[index] for index in range(start, min(start + micro_batch_size, count))]
            input_ids = torch.stack([item["input_ids"] for item in items]).to(device)
            labels = torch.cat([item["labels"] for item in items]).to(device)
            yield input_ids, labels
            bar.update(labels.numel())
