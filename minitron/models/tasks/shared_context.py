"""lm-eval's transformers model, in which answers to one question share one forward pass over the question.

T = tokens of one forward pass, R = predicted tokens among them, H = hidden size, V = vocabulary.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm

FORWARD_TOKENS = {"cpu": 256, "cuda": 2048}
"""Tokens per forward pass: enough for efficient matrix products, few enough for attention over all of them."""

_Request = tuple[Any, list[int], list[int]]


class SharedContextLM(HFLM):
    """lm-eval's transformers model, in which answers to one question share one forward pass over the question.

    Tokens are laid out as question, answer, answer, …, question, answer, …. An answer sees its question and itself, at
    the positions that it would have alone, and logits are computed only for answers. One progress bar counts answers.
    """

    def __init__(self, bar: tqdm, **settings: Any) -> None:
        """Wrap a model in memory: `settings` are lm-eval's own."""
        super().__init__(**settings)
        self._bar = bar

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Score texts after contexts."""
        self._bar.reset(len(requests))
        return super().loglikelihood(requests, disable_tqdm)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Continue contexts."""
        self._bar.reset(len(requests))
        generate = super().generate_until
        return _divide(requests, lambda own: generate(own, disable_tqdm))

    def _model_generate(self, context: Any, *arguments: Any, **named: Any) -> Any:
        generated = super()._model_generate(context, *arguments, **named)
        self._bar.update(len(context))
        return generated

    def _loglikelihood_tokens(
        self, requests: list[_Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Return the log-likelihood of every continuation, and whether it is the greedy one."""
        window = min(self.max_length, getattr(self.config, "sliding_window", None) or self.max_length)
        by_context: dict[tuple[int, ...], list[int]] = {}
        long = []
        for index, (_, context, continuation) in enumerate(requests):
            if len(context) + len(continuation) - 1 > window:
                long.append(index)  # truncation and sliding windows are left to the library
            else:
                by_context.setdefault(tuple(context), []).append(index)
        answers: dict[int, tuple[float, bool]] = {}
        if long:
            score = super()._loglikelihood_tokens
            beyond = _divide(long, lambda own: score([requests[index] for index in own], disable_tqdm, override_bs))
            answers = dict(zip(long, beyond, strict=True))
            self._bar.update(len(long))

        def score_batches(batches: list[list[list[int]]]) -> list[dict[int, tuple[float, bool]]]:
            scored = []
            for groups in batches:
                scored.append(self._score_groups(requests, groups))
                self._bar.update(sum(map(len, groups)))
            return scored

        batches = list(_iterate_batches(requests, by_context, FORWARD_TOKENS.get(self.device.type, 256)))
        for scored in _divide(batches, score_batches):
            answers |= scored
        return [answers[index] for index in range(len(requests))]

    def _score_groups(self, requests: list[_Request], groups: list[list[int]]) -> dict[int, tuple[float, bool]]:
        """Score the answers to a few questions in one pass; a group is the requests with one context."""
        layout = _Layout(requests, groups)
        tokens_T, mask_TT, positions_T = (part.to(self.device) for part in layout.build_inputs(self.model.dtype))
        states = self.model.model(
            input_ids=tokens_T[None],
            attention_mask=mask_TT[None, None],
            position_ids=positions_T[None],
            use_cache=False,
        )
        states_RH = states.last_hidden_state[0, layout.rows]
        log_p_RV = self.model.get_output_embeddings()(states_RH).float().log_softmax(-1)
        targets_R = torch.tensor(layout.targets, device=self.device)
        log_likelihoods = log_p_RV.gather(1, targets_R[:, None])[:, 0].tolist()
        greedy = (log_p_RV.argmax(-1) == targets_R).tolist()
        answers = {index: (0.0, True) for group in groups for index in group}
        for index, log_likelihood, agrees in zip(layout.owners, log_likelihoods, greedy, strict=True):
            total, all_agree = answers[index]
            answers[index] = total + log_likelihood, all_agree and agrees
        return answers


def _divide(items: list[Any], compute: Callable[[list[Any]], list[Any]]) -> list[Any]:
    """Return a value per item, in their order; of several processes each computes every n-th."""
    if not dist.is_initialized():
        return compute(items)
    rank, count = dist.get_rank(), dist.get_world_size()
    shares: list[Any] = [None] * count
    own = items[rank::count]
    dist.all_gather_object(shares, compute(own) if own else [])
    values: list[Any] = [None] * len(items)
    for number, share in enumerate(shares):
        values[number::count] = share
    return values


class _Layout:
    """The positions of questions' and answers' tokens in one sequence.

    Attributes:
        rows: positions whose logits predict a token of an answer.
        targets: the predicted tokens.
        owners: indices of their requests.
    """

    def __init__(self, requests: list[_Request], groups: list[list[int]]) -> None:
        self.rows: list[int] = []
        self.targets: list[int] = []
        self.owners: list[int] = []
        self._tokens: list[int] = []
        self._slots: list[tuple[int, int, int]] = []  # question, answer (0: the question itself), position
        for question, group in enumerate(groups):
            context = requests[group[0]][1]
            self._append_tokens(context, question, 0, 0)
            last = len(self._tokens) - 1
            for answer, index in enumerate(group, 1):
                continuation = requests[index][2]
                start = len(self._tokens)
                self._append_tokens(continuation[:-1], question, answer, len(context))
                self.rows += [last, *range(start, len(self._tokens))]
                self.targets += continuation
                self.owners += [index] * len(continuation)

    def _append_tokens(self, tokens: list[int], question: int, answer: int, start: int) -> None:
        self._tokens += tokens
        self._slots += [(question, answer, start + offset) for offset in range(len(tokens))]

    def build_inputs(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return token ids [T], the additive attention mask [T, T], and position ids [T]."""
        question, answer, position = torch.tensor(self._slots).unbind(1)
        sees = (question[:, None] == question) & (position[:, None] >= position)
        sees &= (answer == 0) | (answer[:, None] == answer)
        mask = torch.zeros(sees.shape, dtype=dtype).masked_fill_(~sees, torch.finfo(dtype).min)
        return torch.tensor(self._tokens), mask, position


def _iterate_batches(
    requests: list[_Request], by_context: dict[tuple[int, ...], list[int]], most: int
) -> Iterator[list[list[int]]]:
    """Yield groups of requests with at most `most` tokens together, or one request that has more.

    A group that does not fit is divided, and its context is repeated. A context that is longer than `most` by itself,
    as with many examples before the question, does not count.
    """
    batch: list[list[int]] = []
    total = 0
    for context, group in by_context.items():
        start = True  # of a group: lay out its context
        for index in group:
            size = len(requests[index][2]) - 1
            alone = len(batch) == 1 and not start
            if batch and total + size + start * len(context) - alone * len(context) > most:
                yield batch
                batch, total, start = [], 0, True
            if start:
                batch.append([])
            batch[-1].append(index)
            total, start = total + size + start * len(context), False
    if batch:
        yield batch
