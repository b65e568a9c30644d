"""Memory of a stage where it computes: on one of its GPUs, or on the CPU.

What a layer keeps for its backward pass is counted as in Korthikanti et al. (arXiv 2205.05198, section 4), for other
layers: grouped queries, rotary embedding, flash attention (which keeps no S x S matrix), RMSNorm, SwiGLU, no dropout.
Logits are those of a chunk, since the loss is fused with the head (models/losses.py).

tests/config/test_memory.py compares the sums with a real training on a CPU, and with the peaks that were measured on an
H100 and an H200. The sums of engine nemo and of several GPUs have not been compared with a measurement yet.
"""

from typing import NamedTuple

from minitron.config.resources.sizes import ADAM, BF16, FP32, GIB, Models, Sizes, Term, total
from minitron.config.settings import (
    DistillSettings,
    EvaluateSettings,
    FinetuneSettings,
    StageSettings,
    TrainingSettings,
)
from minitron.config.shapes import PruneSettings

CUDA = 2 * GIB
"""On every GPU: CUDA's context and libraries, and gaps between the allocator's blocks."""

CHUNK = {False: 512, True: 2048}
"""Tokens of a chunk of the fused loss, without and with a GPU: models/losses.py."""

_CHUNK_BYTES = {False: 2 * FP32, True: 3 * FP32}
"""Of a logit in a chunk. On a CPU: both models' logits, of which the student's become their gradient."""

_QUESTION = 2048
"""Tokens of a question with its solved examples."""


HELD_OUT = 8192
"""Tokens on which the fits of a compensated cut are measured, at most."""


class Phase(NamedTuple):
    """A part of a stage, and what is in memory meanwhile."""

    name: str
    terms: list[Term]

    @property
    def total(self) -> int:
        """The bytes of all terms."""
        return total(self.terms)


def find_peak(phases: list[Phase]) -> Phase:
    """Return the phase that needs the most memory."""
    return max(phases, key=lambda phase: phase.total)


def count_gpus(settings: StageSettings) -> int:
    """Count the GPUs that a stage computes on, on all its nodes."""
    if isinstance(settings, FinetuneSettings) and not settings.enabled:
        return 0
    if isinstance(settings, TrainingSettings) and settings.num_nodes > 1:
        return settings.num_nodes * settings.gpus_per_node
    return settings.gpus


def count_trained(settings: TrainingSettings, models: Models) -> tuple[int, Sizes]:
    """Return parameters and sizes of the model that a training changes."""
    is_teacher = isinstance(settings, FinetuneSettings)
    return (models.teacher, models.teacher_sizes) if is_teacher else (models.student, models.student_sizes)


def list_gpu_phases(settings: StageSettings, models: Models) -> list[Phase]:
    """Return what one of a stage's GPUs holds in each phase; nothing if the stage has none."""
    if not count_gpus(settings):
        return []
    match settings:
        case TrainingSettings(engine="nemo"):
            phases = _list_nemo_phases(settings, models)
        case TrainingSettings():
            phases = list_training_phases(settings, models)
        case PruneSettings():
            phases = _list_prune_phases(settings, models)
        case EvaluateSettings():
            phases = _list_evaluate_phases(settings, models)
        case _:
            phases = []
    return [Phase(phase.name, [*phase.terms, Term("CUDA, its libraries, and gaps", CUDA)]) for phase in phases]


def list_training_phases(settings: TrainingSettings, models: Models) -> list[Phase]:
    """Return what a process of engine hf holds when it computes a micro-batch's loss, and when it has all gradients.

    Activations go while gradients come, so nothing in between needs more. Without a GPU, gradients count from the
    start: the C library keeps what is freed; and so does the copy of the state that a thread writes.
    """
    on_gpu, processes = settings.gpus > 0 or settings.num_nodes > 1, max(1, count_gpus(settings))
    parameters, sizes = count_trained(settings, models)
    tokens = settings.micro_batch_size * settings.sequence_length
    accumulates = settings.global_batch_size > settings.micro_batch_size * processes
    state = [
        Term("weights, fp32", FP32 * parameters // processes),
        Term("Adam's moments, fp32", 2 * FP32 * parameters // processes),
        *_list_teacher(settings, models, on_gpu, processes),
        *_list_gathered(settings, models, processes),
    ]
    if not on_gpu:
        state.append(Term("a checkpoint on its way to the disk, fp32", ADAM * parameters))
    gradients = Term("gradients, fp32", FP32 * parameters // processes)
    layer = tokens * (_count_layer_activations(sizes, on_gpu) + _count_layer_gradients(sizes, on_gpu))
    loss = [
        *_list_activations(settings, sizes, on_gpu, processes),
        Term("the loss: a chunk of logits, and the head's gradient", _count_loss(settings, models, sizes, on_gpu)),
    ]
    backward = [Term("a layer's activations and gradients", layer + BF16 * sizes.layer_weights * on_gpu)]
    if processes > 1:  # FSDP reduces bf16 gradients in fp32, a unit at a time
        backward.append(Term("a unit's whole gradients", (BF16 + FP32) * _count_largest_unit(parameters, sizes)))
    phases = _list_cache_phases(settings, models, on_gpu)
    return [
        *phases,
        Phase("loss", state + [gradients] * (accumulates or not on_gpu) + loss),
        Phase("backward pass", [*state, gradients, *backward]),
    ]


def _list_teacher(settings: TrainingSettings, models: Models, on_gpu: bool, processes: int) -> list[Term]:
    if not isinstance(settings, DistillSettings) or settings.teacher_cache:
        return []
    kind, size = ("bf16", BF16) if on_gpu else ("fp32", FP32)
    return [Term(f"teacher, {kind}", size * models.teacher // processes)]


def _list_cache_phases(settings: TrainingSettings, models: Models, on_gpu: bool) -> list[Phase]:
    """Return what is held while the teacher's distributions are drawn, before the student is loaded."""
    if not isinstance(settings, DistillSettings) or not settings.teacher_cache:
        return []
    teacher = Term("teacher", (BF16 if on_gpu else FP32) * models.teacher)
    return [
        Phase(
            "teacher",
            [teacher, Term("a layer, or logits", _count_loss(settings, models, models.teacher_sizes, on_gpu))],
        )
    ]


def _list_gathered(settings: TrainingSettings, models: Models, processes: int) -> list[Term]:
    """Return what is whole on every GPU of several: two layers of each model, and the unit of embedding and head."""
    if processes == 1:
        return []
    trained = [count_trained(settings, models)]
    if isinstance(settings, DistillSettings) and not settings.teacher_cache:
        trained.append((models.teacher, models.teacher_sizes))
    size = sum(2 * sizes.layer_weights + _count_embeddings(parameters, sizes) for parameters, sizes in trained)
    return [Term("gathered layers, embeddings and heads, bf16", BF16 * size)]


def _count_embeddings(parameters: int, sizes: Sizes) -> int:
    return parameters - sizes.layers * sizes.layer_weights


def _count_largest_unit(parameters: int, sizes: Sizes) -> int:
    return max(sizes.layer_weights, _count_embeddings(parameters, sizes))


def _list_activations(settings: TrainingSettings, sizes: Sizes, on_gpu: bool, processes: int) -> list[Term]:
    """Return what the forward pass leaves for the backward pass."""
    tokens, element = settings.micro_batch_size * settings.sequence_length, BF16 if on_gpu else FP32
    last = tokens * sizes.hidden * (2 * FP32 + 2 * element)  # of the last norm, and its gradient
    if settings.gradient_checkpointing:
        return [Term("activations between layers", sizes.layers * tokens * FP32 * sizes.hidden + last)]
    terms = [Term("activations", sizes.layers * tokens * _count_layer_activations(sizes, on_gpu) + last)]
    if on_gpu and processes == 1:  # FSDP gathers them again instead
        terms.append(Term("weights of the layers, bf16", BF16 * sizes.layers * sizes.layer_weights))
    return terms


def _count_layer_activations(sizes: Sizes, on_gpu: bool) -> int:
    """Return the bytes that a layer keeps per token.

    With h and i for hidden and intermediate size; a, g and d for heads, groups and head size. Without a GPU, in fp32:
    input, normalized input and output of both norms (6h); query, key, value and output of the attention (2ad + 2gd);
    gate, its activation, up, and their product (4i). On a GPU, with fused kernels: the inputs of both norms in fp32
    (2h); and in bf16 their outputs (2h), those of the attention, and gate, up and product (3i).
    """
    attention = 2 * (sizes.heads + sizes.groups) * sizes.head
    if on_gpu:
        return FP32 * 2 * sizes.hidden + BF16 * (2 * sizes.hidden + attention + 3 * sizes.intermediate)
    return FP32 * (6 * sizes.hidden + attention + 4 * sizes.intermediate)


def _count_layer_gradients(sizes: Sizes, on_gpu: bool) -> int:
    """Return the bytes of the gradients of a layer's activations, per token, at their largest: in the MLP."""
    return (BF16 if on_gpu else FP32) * (4 * sizes.intermediate + 3 * sizes.hidden)


def _count_loss(settings: TrainingSettings, models: Models, sizes: Sizes, on_gpu: bool) -> int:
    """Return the bytes of the loss, or of a layer of the teacher before it, if these are more."""
    tokens = settings.micro_batch_size * settings.sequence_length
    chunk = min(tokens, CHUNK[on_gpu]) * sizes.vocabulary * _CHUNK_BYTES[on_gpu]
    head = (FP32 + BF16 * on_gpu) * sizes.head_weights  # a GPU multiplies by a copy in bf16
    if not isinstance(settings, DistillSettings):
        return chunk + head
    element, teacher = BF16 if on_gpu else FP32, models.teacher_sizes
    layer = tokens * element * (3 * teacher.intermediate + 4 * teacher.hidden)
    return max(chunk + head + tokens * element * teacher.hidden, layer)


def _list_nemo_phases(settings: TrainingSettings, models: Models) -> list[Phase]:
    """Return what a worker of engine nemo holds: Megatron's parallelism, with its distributed optimizer.

    Every worker has a part of a copy of the model, and of the optimizer's state only its share among all workers. NeMo
    keeps the logits of the whole micro-batch, of both models.
    """
    parameters, sizes = count_trained(settings, models)
    tensor, context = settings.tensor_parallel_size, settings.context_parallel_size
    parts = tensor * settings.pipeline_parallel_size
    tokens = settings.micro_batch_size * settings.sequence_length // context
    sequence = tensor if settings.sequence_parallel else 1
    products = BF16 * (2 * (sizes.heads + sizes.groups) * sizes.head + 3 * sizes.intermediate)
    layer = tokens * (products // tensor + BF16 * 4 * sizes.hidden // sequence)
    between = tokens * BF16 * sizes.hidden // sequence
    kept = sizes.layers * between + layer if settings.gradient_checkpointing else sizes.layers * layer
    logits = tokens * sizes.vocabulary // tensor * (BF16 + 2 * FP32)
    teacher = []
    if isinstance(settings, DistillSettings):
        teacher = [Term("teacher, bf16", BF16 * models.teacher // parts)]
        logits += tokens * sizes.vocabulary // tensor * (BF16 + FP32)
    terms = [
        Term("weights, bf16", BF16 * parameters // parts),
        Term("gradients, fp32", FP32 * parameters // parts),
        Term("master weights and Adam's moments, fp32", ADAM * parameters // count_gpus(settings)),
        *teacher,
        Term("activations", kept),
        Term("logits of the micro-batch", logits),
    ]
    return [Phase("loss", terms)]


def _list_prune_phases(settings: PruneSettings, models: Models) -> list[Phase]:
    sizes, tokens = models.teacher_sizes, settings.micro_batch_size * settings.sequence_length
    whole = Term("teacher, bf16", BF16 * models.teacher)
    layer = Term("a layer's activations", tokens * _count_layer_activations(sizes, on_gpu=True))
    if settings.engine == "nemo":
        return [Phase("scores", [whole, layer])]
    two = Term("two layers; states take half of what is free", 2 * BF16 * sizes.layer_weights)
    phases = [Phase("scores", [two, layer])]
    if settings.method == "compensated":
        phases += list_fit_phases(settings, sizes)
    if settings.layers_by == "loss":
        phases.append(Phase("layers by loss", [whole, layer]))
    return phases


def list_fit_phases(settings: PruneSettings, sizes: Sizes) -> list[Phase]:
    """Return the memory of a compensated cut, which computes in fp32: on a GPU, or on the CPU if there is none."""
    sequences = -(-settings.calibration_sequences // max(1, settings.gpus))  # a GPU's share
    tokens = settings.micro_batch_size * settings.sequence_length
    state = FP32 * sequences * settings.sequence_length * sizes.hidden
    layer = Term("a layer's activations", tokens * _count_layer_activations(sizes, on_gpu=settings.gpus > 0))
    attention = [
        Term("states of the calibration, before and after the attention", 4 * state),
        Term("a layer of both models, fp32", 2 * FP32 * sizes.layer_weights),
        layer,
    ]
    mlp = [
        Term("states of the calibration", 2 * state),
        Term("a layer, fp32", FP32 * sizes.layer_weights),
        Term("sums and held-out tokens of the widest fit", _count_sums(sizes)),
        Term("its factor, and its solution", _count_solving(sizes)),
    ]
    return [Phase("fits of attentions", attention), Phase("fits of MLPs", mlp)]


def _count_sums(sizes: Sizes) -> int:
    """Return the bytes of a fit's sums over tokens: see models/pruning/least_squares.py.

    In float64, half of the Gram matrix of C channels, and a matrix of C x H; in fp32, the held-out tokens.
    """
    channels = _count_widest(sizes)
    held_out = FP32 * HELD_OUT * (channels + sizes.hidden)
    return 2 * FP32 * channels * (channels // 2 + sizes.hidden) + held_out


def _count_solving(sizes: Sizes) -> int:
    """Return the bytes of a factor or an inverse (C²), and of the fitted matrix, in float64."""
    channels = _count_widest(sizes)
    return 2 * FP32 * channels * (channels + sizes.hidden)


def _count_widest(sizes: Sizes) -> int:
    return max(sizes.intermediate, sizes.heads * sizes.head)


def _list_evaluate_phases(settings: EvaluateSettings, models: Models) -> list[Phase]:
    sizes, tokens = models.teacher_sizes, settings.micro_batch_size * settings.sequence_length
    compared = models.teachers * models.teacher + (3 if settings.champion else 2) * models.student
    element = BF16 * (3 * sizes.intermediate + 4 * sizes.hidden)
    scores = max(min(tokens, CHUNK[True]) * sizes.vocabulary * 2 * (BF16 + FP32), tokens * element)
    phases = [
        Phase("losses", [Term("all models, bf16", BF16 * compared), Term("a layer, or a chunk of logits", scores)])
    ]
    if settings.tasks:
        logits = settings.micro_batch_size * min(_QUESTION, settings.sequence_length) * sizes.vocabulary
        terms = [Term("a model, bf16", BF16 * models.teacher), Term("logits of questions", (BF16 + FP32) * logits)]
        phases.append(Phase("tasks", terms))
    return phases
