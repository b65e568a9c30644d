"""Scores of models on packed sequences: loss, perplexity, and closeness to a reference model."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from minitron.config.metrics import compute_perplexity
from minitron.config.stages import TrainingConfig
from minitron.data.packed import PackedDataset
from minitron.models.losses import LossWeights, linear_loss


def compute_hidden_states(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """Return the last hidden states of [B, S] token ids as [B · S, H], without computing logits."""
    states = model.model(input_ids=input_ids, use_cache=False).last_hidden_state
    return states.flatten(0, 1)


def get_output_head(model: PreTrainedModel) -> Tensor:
    """Return the output embedding [V, H]."""
    return model.get_output_embeddings().weight


@torch.no_grad()
def score_models(
    models: dict[str, PreTrainedModel],
    dataset: PackedDataset,
    sequences: int,
    micro_batch_size: int,
    reference: PreTrainedModel | None = None,
    description: str = "validation",
) -> dict[str, dict[str, Any]]:
    """Score models on the first sequences of a split, in one pass: each model runs once per batch.

    Args:
        models: models by name, on one device; they are scored in eval mode and left in the mode they had.
        dataset: packed sequences.
        sequences: number of sequences to score; all of them if the split has fewer.
        micro_batch_size: sequences per forward pass.
        reference: the teacher. With it the scores have `kl` (forward KL to the model, nats per token) and
            `top1_agreement`.
        description: label of the progress bar.

    Returns:
        Per model `loss` (mean cross-entropy of the next token, nats), `perplexity` (None if it is no finite number),
        and the terms of the reference.
    """
    weights = LossWeights(cross_entropy=1.0)
    modes = {name: model.training for name, model in models.items()}
    sums = {name: torch.zeros(3, dtype=torch.float64) for name in models}
    tokens = 0
    for model in models.values():
        model.eval()
    device = next(iter(models.values())).device
    for input_ids, labels in _iterate_batches(dataset, sequences, micro_batch_size, device, description):
        states = {id(model): compute_hidden_states(model, input_ids) for model in models.values()}
        reference_states = None if reference is None else states.get(id(reference))
        if reference is not None and reference_states is None:
            reference_states = compute_hidden_states(reference, input_ids)
        reference_head = None if reference is None else get_output_head(reference)
        for name, model in models.items():
            terms = linear_loss(
                states[id(model)], get_output_head(model), labels, weights, reference_states, reference_head
            )
            sums[name] += torch.stack([terms.cross_entropy, terms.kl, terms.agreements]).double().cpu()
        tokens += labels.numel()
    for name, model in models.items():
        model.train(modes[name])
    return {name: _make_scores(total / tokens, reference is not None) for name, total in sums.items()}


def validate_teacher(config: TrainingConfig, teacher: PreTrainedModel) -> dict[str, float]:
    """Return the teacher's loss on the sequences that validate a student: the goal of distillation."""
    validation = PackedDataset(config.dataset / "validation", config.sequence_length, config.seed)
    scores = score_models(
        {"teacher": teacher}, validation, config.validation_sequences, config.micro_batch_size, None,
        "teacher validation",
    )  # fmt: skip
    return {"teacher_validation_loss": scores["teacher"]["loss"]}


def _make_scores(means: Tensor, with_reference: bool) -> dict[str, Any]:
    loss, kl, agreement = means.tolist()
    scores: dict[str, Any] = {"loss": loss, "perplexity": compute_perplexity(loss)}
    return scores | {"kl": kl, "top1_agreement": agreement} if with_reference else scores


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
