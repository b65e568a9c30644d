"""Compensated cuts: what remains is refitted, layer by layer, so that the student's states come close to the teacher's.

No gradient is computed. Each fit is a least-squares problem on the student's own stream, so that a layer also makes
good what the layers before it lost. `o_proj` is fitted to the teacher's state after the attention, `down_proj` to its
state after the layer. Before dropped layers that is the state after the last of them: the seam is folded into the
matrix, and the student has no new parameters (as in ReplaceMe, arXiv 2505.02819). Channels and heads are chosen by
Optimal Brain Surgeon. If the stream has fewer channels, they are principal components of the teacher's states, and the
matrices that read it are fitted, too.

B = batch, S = sequence, H = hidden size of the teacher, K = of the student, C = input channels, O = output channels,
V = vocabulary.
"""

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Linear
from tqdm import tqdm

from minitron.errors import RunError
from minitron.models.checks import EMBEDDING, HEAD
from minitron.models.processes import add_shares, ask_first, get_rank, split_share
from minitron.models.pruning.calibration import split_calibration
from minitron.models.pruning.layers import (
    NORM,
    Call,
    LayerReader,
    ShardWriter,
    get_head_dim,
    name_weight,
    read_channels,
    read_heads,
)
from minitron.models.pruning.least_squares import Moments, SplitTokens, expand_groups
from minitron.models.pruning.refit import Dtypes, fit_map, fit_output, read_matrix, store_weight
from minitron.models.pruning.stream import StateEnergy, Stream, keep_channels, map_rows
from minitron.models.pruning.surgeon import Surgeon
from minitron.models.pruning.surgery import Plan, Shape, cut_layer, finish_student

CHOSEN = {"hidden", "intermediate", "heads", "key_value"}
"""The axes that are chosen by the cut, not by scores, unless they are given."""

DRIFT = 0.5
"""How far the target of a fit is from what the whole matrix gives on the student's stream to the teacher's state.

All the way is best for a layer by itself, but half of it gives a better student. Seams go all the way.
"""

READERS = {
    "self_attn": ("input_layernorm", ("q_proj", "k_proj", "v_proj")),
    "mlp": ("post_attention_layernorm", ("gate_proj", "up_proj")),
}
"""The parts of a layer: their norm, and the matrices that read the stream through it."""


class Compensated(NamedTuple):
    """What of the teacher a student keeps, and how well each of its layers was fitted.

    If the student's stream has principal components, `explained` is the share of the states' energy in them, and the
    plan's hidden channels say no more than how many there are.
    """

    plan: Plan
    fits: list[dict[str, Any]]
    explained: float | None


@dataclass
class _Batch:
    """A batch of calibration on its way through both models.

    Attributes:
        held_out: not used for the fits.
        teacher: the teacher's state [B, S, H] after the layers so far.
        student: the student's, [B, S, K].
    """

    held_out: bool
    teacher: Tensor
    student: Tensor


@torch.no_grad()
def cut_with_compensation(
    teacher: LayerReader,
    plan: Plan,
    shape: Shape,
    input_ids: Tensor,
    micro_batch_size: int,
    device: torch.device,
    directory: Path,
    choose: Collection[str] = CHOSEN,
) -> Compensated:
    """Write the student of a plan, with its matrices refitted; the computation is in float32, the solving in float64.

    One layer of each model is in memory at a time, beside the states of all calibration tokens. Several processes share
    the calibration; process 0 chooses, solves and writes, for all of them.

    Args:
        teacher: the model to cut; it is read from its files.
        plan: what to keep: layers, hidden channels, and every other axis that `choose` leaves out.
        shape: the student's sizes.
        input_ids: calibration sequences, int64 [sequences, S]; the last ones are held out.
        micro_batch_size: sequences that are computed at once.
        device: where to compute.
        directory: receives the student, in the teacher's dtypes; it is empty.
        choose: axes to choose; with heads that are not chosen, groups are not, either.

    Returns:
        The plan with what was chosen; per refitted layer the ridges and the errors.

    Raises:
        RunError: activations are not finite, or a fit is too badly conditioned.
    """
    cut = _CompensatedCut(teacher, plan, shape, device, directory, choose)
    cut.choose_stream(input_ids, micro_batch_size)
    batches = list(cut.embed(input_ids, micro_batch_size))
    ends = [*(layer - 1 for layer in plan.layers[1:]), teacher.config.num_hidden_layers - 1]
    for dropped in range(plan.layers[0]):  # no layer before them could make up for them
        cut.run_teacher(dropped, batches)
    for place, (layer, end) in enumerate(tqdm(list(zip(plan.layers, ends, strict=True)), desc="compensated cut")):
        with _naming_layer("compensated cut", layer):
            if cut.is_whole_up_to(place) and layer == end:
                cut.keep_layer(place, layer, batches)
            else:
                cut.fit_layer(place, layer, end, batches)
    return cut.finish(batches)


@contextmanager
def _naming_layer(work: str, layer: int) -> Iterator[None]:
    """Say in an error what was done, and in which layer."""
    try:
        yield
    except RunError as error:
        raise RunError(f"{work} of layer {layer + 1}: {error}") from error


class _CompensatedCut:
    """The student while it is made: in the present layer, what is dropped has columns of zeros."""

    def __init__(
        self,
        teacher: LayerReader,
        plan: Plan,
        shape: Shape,
        device: torch.device,
        directory: Path,
        choose: Collection[str],
    ) -> None:
        self._teacher, self._plan, self._shape, self._device, self._choose = teacher, plan, shape, device, choose
        self._kept: dict[str, Any] = {"intermediate": [], "heads": [], "key_value": []}
        self._stream: Stream | None = None
        self._calls: list[Call] = []
        self._fits: list[dict[str, Any]] = []
        self._directory, self._writer = directory, ShardWriter(directory)

    def choose_stream(self, input_ids: Tensor, micro_batch_size: int) -> None:
        """Choose the channels of the student's stream, for which the teacher runs, and write the embedding."""
        config = self._teacher.config
        self._calls = self._teacher.record_calls(input_ids.shape[1], torch.float32, self._device)
        embedding = self._teacher.read_tensor(EMBEDDING)
        if self._shape.hidden_size < config.hidden_size:
            if "hidden" in self._choose:
                self._stream = self._find_components(list(self.embed(input_ids, micro_batch_size)))
            else:
                self._stream = keep_channels(self._plan.hidden, config.hidden_size, self._device)
            embedding = map_rows(embedding, self._stream.encode_HK)
        self._write([(EMBEDDING, embedding)])

    def embed(self, input_ids: Tensor, micro_batch_size: int) -> Iterator[_Batch]:
        """Yield this process's calibration batch by batch, as both models see it before their first layer."""
        fitted, held_out_ids = split_calibration(input_ids)
        for held_out, part, first in ((False, fitted, 0), (True, held_out_ids, len(fitted))):
            for ids in split_share(part, micro_batch_size, first):
                state = self._teacher.read_embeddings(ids, torch.float32, self._device)
                yield _Batch(held_out, state, self._encode(state))

    def run_teacher(self, layer: int, batches: list[_Batch]) -> None:
        """Run a layer of the teacher that the student has not."""
        module, call = self._teacher.load_layer(layer, torch.float32, self._device), self._calls[layer]
        for batch in batches:
            middle = batch.teacher + module.self_attn.o_proj(read_heads(module, batch.teacher, call))
            batch.teacher = _run_mlp(module, middle)

    def is_whole_up_to(self, place: int) -> bool:
        """Return whether the student is the teacher as far as this layer's width and the layers before it go."""
        whole = replace(Shape.from_config(self._teacher.config), num_hidden_layers=self._shape.num_hidden_layers)
        return self._shape == whole and self._plan.layers[: place + 1] == list(range(place + 1))

    def keep_layer(self, place: int, layer: int, batches: list[_Batch]) -> None:
        """Go on with a layer that is the teacher's, on the teacher's states."""
        self.run_teacher(layer, batches)
        for batch in batches:
            batch.student = batch.teacher
        config = self._teacher.config
        self._kept["intermediate"].append(list(range(config.intermediate_size)))
        self._kept["heads"].append(list(range(config.num_attention_heads)))
        self._kept["key_value"].append(list(range(config.num_key_value_heads)))
        self._write_layer(place, self._teacher.read_layer(layer))

    def fit_layer(self, place: int, layer: int, end: int, batches: list[_Batch]) -> None:
        """Fit the student's layer at a place, the teacher's `layer`, to the teacher's states up to that after `end`."""
        old, call = self._teacher.load_layer(layer, torch.float32, self._device), self._calls[layer]
        new = self._teacher.make_layer(layer, self._encode_layer(old.state_dict()))
        dtypes = {name: self._teacher.get_dtype(name_weight(layer, name)) for name in new.state_dict()}
        self._fit_readers("self_attn", new, dtypes, old, batches, (batch.teacher for batch in batches))
        middles = [batch.teacher + old.self_attn.o_proj(read_heads(old, batch.teacher, call)) for batch in batches]
        fit = {"layer": layer, "o_proj": self._fit_attention(place, new, dtypes, call, batches, middles)}
        self._fit_readers("mlp", new, dtypes, old, batches, middles)
        _go_behind_mlp(old, batches, middles)
        del old, middles  # the fit of the MLP has the largest matrices
        for dropped in range(layer + 1, end + 1):
            self.run_teacher(dropped, batches)
        fit["down_proj"] = self._fit_mlp(place, new, dtypes, batches, is_seam=layer < end)
        for batch in batches:
            batch.student = _run_mlp(new, batch.student)
        self._fits.append(fit)
        self._write_layer(place, {name: weight.to(dtypes[name]) for name, weight in new.state_dict().items()})

    def finish(self, batches: list[_Batch]) -> Compensated:
        """Write what comes after the layers."""
        norm, is_tied = self._teacher.read_tensor(NORM), self._teacher.config.tie_word_embeddings
        if self._stream:
            fitted = self._fit_last_norm(self._stream, batches) if is_tied else self._stream.make_ones(norm)
            norm = fitted.to(norm.dtype)
        self._write([(NORM, norm)])
        if not is_tied:
            head = self._teacher.read_tensor(HEAD)
            self._write([(HEAD, self._fit_head(self._stream, head, batches) if self._stream else head)])
        kept = replace(self._plan, **self._kept)
        if get_rank() == 0:
            self._writer.finish()
            finish_student(self._directory, self._teacher, kept)
        return Compensated(kept, self._fits, self._stream.explained if self._stream else None)

    def _find_components(self, batches: list[_Batch]) -> Stream:
        """Find the principal components of the teacher's states before and behind all layers."""
        energy = StateEnergy(self._teacher, self._device)
        energy.add(batch.teacher for batch in batches)
        for layer in tqdm(range(self._teacher.config.num_hidden_layers), desc="principal components"):
            self.run_teacher(layer, batches)
            with _naming_layer("principal components", layer):
                energy.add(batch.teacher for batch in batches)
        return energy.find_components(self._shape.hidden_size)

    def _load_last_norms(self, stream: Stream) -> tuple[Any, Any]:
        """Return the teacher's norm before the output head, and the student's, with weights of one."""
        old, new = self._teacher.load_norm(self._device), self._teacher.load_norm(self._device)
        new.weight.data = stream.make_ones(old.weight)
        return old, new

    def _fit_head(self, stream: Stream, head: Tensor, batches: list[_Batch]) -> Tensor:
        """Return the output head [V, K], fitted to the teacher's [V, H]."""
        old, new = self._load_last_norms(stream)
        pairs = ((batch.held_out, new(batch.student), old(batch.teacher)) for batch in batches)
        return map_rows(head, fit_map(stream.decode_weighted(old.weight), pairs))

    def _fit_last_norm(self, stream: Stream, batches: list[_Batch]) -> Tensor:
        """Return the weights [K] of the last norm, fitted to what a tied head has to see of the teacher's state."""
        old, new = self._load_last_norms(stream)
        sums_2K = old.weight.new_zeros(2, self._shape.hidden_size, dtype=torch.float64)
        for batch in batches:
            student, teacher = new(batch.student), old(batch.teacher) @ stream.decode_HK
            sums_2K += torch.stack([student * teacher, student.square()]).double().sum(dim=(1, 2))
        add_shares([sums_2K])
        return sums_2K[0] / sums_2K[1].clamp(min=torch.finfo(sums_2K.dtype).tiny)

    def _encode(self, state: Tensor) -> Tensor:
        """Return what the student's stream holds of the teacher's state [B, S, H]."""
        return self._stream.encode(state) if self._stream else state

    def _encode_layer(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the weights that a layer of the student begins with, of the teacher's."""
        return self._stream.encode_layer(weights) if self._stream else weights

    def _write_layer(self, place: int, weights: dict[str, Tensor]) -> None:
        """Cut the columns of zeros out of a finished layer, and write it."""
        plan = replace(self._plan, **self._kept)
        self._write(cut_layer(weights, plan, place, get_head_dim(self._teacher.config)))

    def _write(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Write weights in process 0."""
        if get_rank() == 0:
            self._writer.add(weights)

    def _fit_attention(
        self, place: int, new: Any, dtypes: Dtypes, call: Call, batches: list[_Batch], middles: list[Tensor]
    ) -> dict[str, Any]:
        """Choose the heads, fit o_proj to the teacher's states after the attention, and take the student there."""
        o_proj, size = new.self_attn.o_proj, get_head_dim(self._teacher.config)
        tokens, inputs = self._begin_fit(o_proj), [read_heads(new, batch.student, call) for batch in batches]
        for batch, heads, middle in zip(batches, inputs, middles, strict=True):
            tokens.add_change(batch.held_out, heads, batch.student, self._encode(middle), middle)
        tokens.collect()

        def choose() -> tuple[list[int], list[int]]:
            tokens.blend(read_matrix(o_proj), DRIFT)
            heads, groups = self._choose_heads(place, o_proj, size, tokens.fitted)
            return heads.tolist(), groups.tolist()

        kept, groups = ask_first(choose)
        self._kept["heads"].append(kept)
        self._kept["key_value"].append(groups)
        columns = expand_groups(torch.tensor(kept, device=self._device), size)
        fit = fit_output("self_attn.o_proj", new, dtypes, columns, tokens)
        for batch, heads in zip(batches, inputs, strict=True):
            batch.student = batch.student + o_proj(heads)
        return fit

    def _fit_mlp(self, place: int, new: Any, dtypes: Dtypes, batches: list[_Batch], is_seam: bool) -> dict[str, Any]:
        """Choose the channels, and fit down_proj to the teacher's state after the layer."""
        down_proj = new.mlp.down_proj
        tokens = self._begin_fit(down_proj)
        for batch in batches:  # no batch's channels have a name: they would stay in memory during the fit
            tokens.add_change(
                batch.held_out,
                read_channels(new, batch.student),
                batch.student,
                self._encode(batch.teacher),
                batch.teacher,
            )
        tokens.collect()

        def choose() -> list[int]:
            if not is_seam:
                tokens.blend(read_matrix(down_proj), DRIFT)
            return self._choose_channels(place, down_proj, tokens.fitted).tolist()

        kept = ask_first(choose)
        self._kept["intermediate"].append(kept)
        return fit_output("mlp.down_proj", new, dtypes, torch.tensor(kept, device=self._device), tokens)

    def _begin_fit(self, module: Linear) -> SplitTokens:
        return SplitTokens(module.in_features, self._shape.hidden_size, module.bias is not None, self._device)

    def _choose_heads(self, place: int, o_proj: Linear, size: int, fitted: Moments) -> tuple[Tensor, Tensor]:
        """Return the query heads and the key-value groups to keep; every kept group keeps equally many heads."""
        config, shape = self._teacher.config, self._shape
        groups = torch.tensor(self._plan.key_value[place], device=self._device)
        if "heads" not in self._choose or shape.num_attention_heads == config.num_attention_heads:
            return torch.tensor(self._plan.heads[place], device=self._device), groups
        surgeon = Surgeon(read_matrix(o_proj), fitted, o_proj.in_features)
        per_group = config.num_attention_heads // config.num_key_value_heads
        if "key_value" in self._choose:
            groups = surgeon.drop_groups(per_group * size, shape.num_key_value_heads)
        else:
            surgeon.keep(expand_groups(groups, per_group * size))
        owners = torch.arange(config.num_attention_heads, device=self._device) // per_group
        return surgeon.drop_groups(size, shape.num_attention_heads // shape.num_key_value_heads, owners), groups

    def _choose_channels(self, place: int, down_proj: Linear, fitted: Moments) -> Tensor:
        """Return the MLP channels to keep."""
        total, left = down_proj.in_features, self._shape.intermediate_size
        if "intermediate" not in self._choose or left == total:
            return torch.tensor(self._plan.intermediate[place], device=self._device)
        return Surgeon(read_matrix(down_proj), fitted, total).drop_channels(left)

    def _fit_readers(
        self, part: str, new: Any, dtypes: Dtypes, old: Any, batches: list[_Batch], states: Iterable[Tensor]
    ) -> None:
        """Fit the matrices of a part that read the stream through its norm if the stream has fewer channels.

        Each is the teacher's matrix behind one linear map from the student's normed state to the teacher's, `states`
        before the norm.
        """
        if not self._stream:
            return
        norm, readers = READERS[part]
        theirs, ours = getattr(old, norm), getattr(new, norm)
        pairs = (
            (batch.held_out, ours(batch.student), theirs(state)) for batch, state in zip(batches, states, strict=True)
        )
        fitted = fit_map(self._stream.decode_weighted(theirs.weight), pairs).double()
        for name in (f"{part}.{reader}.weight" for reader in readers):
            store_weight(old.get_parameter(name).double() @ fitted, name, new, dtypes)


def _go_behind_mlp(layer: Any, batches: list[_Batch], middles: list[Tensor]) -> None:
    """Take the teacher from its states after the attention to those after the layer; a process may have no batch."""
    for batch, middle in zip(batches, middles, strict=True):
        batch.teacher = _run_mlp(layer, middle)


def _run_mlp(layer: Any, middle: Tensor) -> Tensor:
    """Return the state after a layer, of the state after its attention."""
    return middle + layer.mlp.down_proj(read_channels(layer, middle))
