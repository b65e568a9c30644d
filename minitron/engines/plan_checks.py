"""Check a plan against the teacher's config.json, without weights and without torch.

plan and `minitron submit` do this before you pay for a GPU. prune does it again, for the corrected teacher.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from minitron.config.addresses import find_scheme_faults, list_addresses
from minitron.config.document import Plan
from minitron.config.fields import Fault
from minitron.config.parse import SectionError, apply_kept, read_kept
from minitron.config.settings import (
    DistillSettings,
    EvaluateSettings,
    FinetuneSettings,
    PrepareSettings,
    TrainingSettings,
    list_parts,
)
from minitron.config.shapes import PRUNED_AXES, PRUNED_SIZES, Kept, PruneSettings
from minitron.engines.nemo.checks import find_conversion_faults, find_cut_faults, find_parallel_faults
from minitron.errors import ConfigError
from minitron.models.checks import check_config, check_sequence_length
from minitron.models.pruning.scores import find_importance_faults
from minitron.models.tasks.names import find_task_faults

HIDDEN_MULTIPLE = 8
"""16 bytes in bfloat16. With sizes between these steps, a GPU's tensor cores idle in every matrix product."""


def find_plan_faults(plan: Plan, architecture: Mapping[str, Any] | None) -> Iterator[Fault]:
    """Find faults by the addresses, the list of lm-eval's tasks and, if known, the teacher's config.json."""
    for key, address in list_addresses(plan).items():
        yield from find_scheme_faults(key, address)
    evaluate = plan.stages["evaluate"]
    assert isinstance(evaluate, EvaluateSettings)
    yield from find_task_faults(evaluate)
    prune = plan.stages["prune"]
    assert isinstance(prune, PruneSettings)
    yield from find_importance_faults(prune)
    yield from find_mask_faults(plan)
    teacher = plan.pipeline.teacher
    if architecture:
        yield from find_teacher_faults(plan, architecture, teacher)
    else:
        for stage in ("finetune", "distill"):
            yield from find_engine_faults(stage, plan.stages[stage], None, teacher)


def find_mask_faults(plan: Plan) -> Iterator[Fault]:
    """Find conversations for engine nemo, which would train on the prompts, too."""
    prepare, distill = plan.stages["prepare"], plan.stages["distill"]
    assert isinstance(prepare, PrepareSettings) and isinstance(distill, DistillSettings)
    fields = [prepare.messages_field, *(part.messages_field for part in list_parts(plan.pipeline.corpus))]
    if any(fields) and distill.engine == "nemo":  # all stages share it
        yield Fault("engine", "nemo does not support the masks of conversations (prepare.messages_field); use hf")


def find_teacher_faults(plan: Plan, architecture: Mapping[str, Any], address: str) -> Iterator[Fault]:
    """Find a teacher that is not supported, and sizes to which it cannot be cut or into which it cannot be split.

    Args:
        plan: the checked settings.
        architecture: the teacher's config.json.
        address: the teacher's address, for the messages.
    """
    try:
        check_config(dict(architecture), address)
    except ConfigError as error:
        yield Fault("teacher", str(error))
        return
    try:
        check_sequence_length("sequence_length", plan.pipeline.sequence_length, dict(architecture), address)
    except ConfigError as error:
        yield Fault("sequence_length", str(error).removeprefix("sequence_length: "))
    needed = [*PRUNED_SIZES, "vocab_size"]
    if missing := [name for name in needed if name != "num_key_value_heads" and name not in architecture]:
        yield Fault("teacher", f"{address}: config.json has no {', '.join(missing)}; correct it")
        return
    prune, distill = plan.stages["prune"], plan.stages["distill"]
    assert isinstance(prune, PruneSettings) and isinstance(distill, DistillSettings)
    faults = list(find_size_faults(prune, architecture))
    yield from faults
    if faults:
        return
    teacher = read_sizes(architecture)
    student = apply_kept(prune).compute_student_sizes(teacher)
    yield from find_pair_faults(distill, student, teacher)
    for stage, sizes in (("finetune", teacher), ("distill", student)):
        yield from find_engine_faults(stage, plan.stages[stage], dict(architecture) | sizes, address)
    if prune.engine == "nemo":
        yield from find_conversion_faults("prune.engine", architecture, address)
        yield from find_cut_faults(prune, {name: size for name, size in student.items() if size != teacher[name]})


def find_pair_faults(
    distill: DistillSettings, student: Mapping[str, int], teacher: Mapping[str, int]
) -> Iterator[Fault]:
    """Find pairs of layers that cannot be matched, by the sizes of both models."""
    key = "distill.intermediate_layers"
    for numbers in distill.intermediate_layers:
        for layer, model, sizes in zip(numbers, ("student", "teacher"), (student, teacher), strict=True):
            if layer > (most := sizes["num_hidden_layers"]):
                yield Fault(key, f"{layer} is not a layer of the {model}; choose from 1 to {most}")
    if distill.engine == "hf" and distill.intermediate_layers and student["hidden_size"] != teacher["hidden_size"]:
        yield Fault(
            key,
            f"the student's hidden_size {student['hidden_size']} is not the teacher's {teacher['hidden_size']}, so "
            "their outputs cannot be compared; leave the pairs out, or keep the hidden_size",
        )


def find_engine_faults(
    stage: str, settings: Any, architecture: Mapping[str, Any] | None, address: str
) -> Iterator[Fault]:
    """Find sizes that engine nemo cannot split among a training's GPUs; without a config.json it finds fewer."""
    assert isinstance(settings, TrainingSettings)
    if settings.engine != "nemo" or (isinstance(settings, FinetuneSettings) and not settings.enabled):
        return
    gpus = settings.num_nodes * settings.gpus_per_node if settings.num_nodes > 1 else settings.gpus
    faults = find_parallel_faults(settings, architecture, address, gpus or settings.model_parallel_size)
    yield from (Fault(f"{stage}.{key}", text) for key, text in faults)


def read_sizes(architecture: Mapping[str, Any]) -> dict[str, int]:
    """Return the sizes that prune can change, from a config.json."""
    heads = {"num_key_value_heads": architecture.get("num_key_value_heads") or architecture["num_attention_heads"]}
    return {name: architecture[name] for name in PRUNED_SIZES if name not in heads} | heads


def find_size_faults(prune: PruneSettings, architecture: Mapping[str, Any]) -> Iterator[Fault]:
    """Find sizes of the student that do not fit the teacher or each other."""
    teacher = read_sizes(architecture)
    try:
        kept = read_kept(prune.keep)
    except ConfigError as error:
        yield from error.faults if isinstance(error, SectionError) else [Fault("prune.keep", str(error))]
        return
    if kept:
        faults = list(_find_list_faults(prune, kept, teacher))
        yield from faults
        if faults:
            return
        prune = prune.with_sizes_of(kept)
    faults = [
        Fault(f"prune.{name}", f"{size} is larger than the teacher's {most}; choose at most {most}")
        for name, most in teacher.items()
        if (size := getattr(prune, name)) is not None and size > most
    ]
    faults += _find_layer_faults(prune, teacher["num_hidden_layers"])
    if not faults:
        student = prune.compute_student_sizes(teacher)
        faults += _find_head_faults(student, teacher["num_attention_heads"] // teacher["num_key_value_heads"])
        faults += _find_width_faults(student, teacher, architecture["model_type"])
    yield from faults


def _find_list_faults(prune: PruneSettings, kept: Kept, teacher: Mapping[str, int]) -> Iterator[Fault]:
    """Find lists of what to keep that do not fit the teacher, the sizes that are set, or each other."""
    if kept.layers and prune.drop_layers:
        yield Fault("prune.drop_layers", "prune.keep lists layers, too; choose one of them")
    faults = [*_find_size_contradictions(prune, kept), *_find_unknown_indices(kept, teacher)]
    faults += _find_list_count_faults(prune, kept, teacher)
    yield from faults or _find_group_faults(kept, teacher)


def _find_size_contradictions(prune: PruneSettings, kept: Kept) -> Iterator[Fault]:
    for name, size in kept.compute_sizes().items():
        if (given := getattr(prune, name)) not in (None, size):
            yield Fault(f"prune.{name}", f"{given}, but prune.keep lists {size}; leave {name} out, or correct the list")


def _find_unknown_indices(kept: Kept, teacher: Mapping[str, int]) -> Iterator[Fault]:
    for axis, lists in kept:
        total = teacher[PRUNED_AXES[axis]]
        for indices in [] if lists is None else lists if isinstance(lists[0], list) else [lists]:
            if indices[-1] >= total:
                yield Fault(
                    f"prune.keep.{axis}",
                    f"{indices[-1]} is none of the teacher's {total}; count from 0 to {total - 1}",
                )
                break


def _find_list_count_faults(prune: PruneSettings, kept: Kept, teacher: Mapping[str, int]) -> Iterator[Fault]:
    layers = prune.with_sizes_of(kept).compute_student_sizes(teacher)["num_hidden_layers"]
    for axis in ("intermediate", "heads", "key_value"):
        if (lists := getattr(kept, axis)) is None or kept.layers:
            continue
        if prune.num_hidden_layers not in (None, teacher["num_hidden_layers"]):
            yield Fault(f"prune.keep.{axis}", "its layers are not chosen yet; list layers, too")
        elif len(lists) != layers:
            yield Fault(f"prune.keep.{axis}", f"{len(lists)} lists for {layers} layers; give one per kept layer")


def _find_group_faults(kept: Kept, teacher: Mapping[str, int]) -> Iterator[Fault]:
    """Find query heads that are not equally many in each kept key-value group; without a list, all groups are kept."""
    groups = teacher["num_key_value_heads"]
    per_group = teacher["num_attention_heads"] // groups
    for number, heads in enumerate(kept.heads or [], start=1):
        kept_groups = kept.key_value[number - 1] if kept.key_value else [*range(groups)]
        found = Counter(head // per_group for head in heads)
        if found.keys() != set(kept_groups) or len(set(found.values())) > 1:
            counts = ", ".join(f"{found[group]} in group {group}" for group in sorted({*kept_groups, *found}))
            yield Fault(
                "prune.keep.heads",
                f"list {number} has {counts}, of the kept groups {kept_groups}; keep equally many in each of them, and "
                "none elsewhere",
            )
            return


def _find_layer_faults(prune: PruneSettings, total: int) -> Iterator[Fault]:
    dropped = set(prune.drop_layers or [])
    if outside := sorted(dropped - set(range(1, total + 1))):
        yield Fault("prune.drop_layers", f"the teacher has no layers {outside}; choose from 1 to {total}")
    elif len(dropped) == total:
        yield Fault("prune.drop_layers", f"drops all {total} layers of the teacher; keep at least one")


def _find_head_faults(student: Mapping[str, int], teacher_heads_per_group: int) -> Iterator[Fault]:
    heads, groups = student["num_attention_heads"], student["num_key_value_heads"]
    if heads % groups:
        yield Fault(
            "prune.num_attention_heads",
            f"{heads} is not a multiple of num_key_value_heads {groups}; choose a multiple",
        )
    elif heads // groups > teacher_heads_per_group:
        yield Fault(
            "prune.num_attention_heads",
            f"{heads} heads in {groups} groups are {heads // groups} per group, but the teacher has "
            f"{teacher_heads_per_group}; choose at most {groups * teacher_heads_per_group}",
        )


def _find_width_faults(student: Mapping[str, int], teacher: Mapping[str, int], model_type: str) -> Iterator[Fault]:
    hidden, heads = student["hidden_size"], student["num_attention_heads"]
    step = math.lcm(HIDDEN_MULTIPLE, heads) if model_type == "llama" else HIDDEN_MULTIPLE
    remedy = f"choose {hidden // step * step or step} or another multiple of {step}"
    if hidden != teacher["hidden_size"] and hidden % HIDDEN_MULTIPLE:
        yield Fault(
            "prune.hidden_size",
            f"{hidden} is not a multiple of {HIDDEN_MULTIPLE}, the step of a GPU's tensor cores; {remedy}",
        )
    elif model_type == "llama" and hidden % heads:
        # head_dim is explicit, so nothing computes the quotient; but transformers would refuse to load the student
        yield Fault(
            "prune.hidden_size",
            f"{hidden} is not a multiple of num_attention_heads {heads}, as transformers needs for a Llama; {remedy}",
        )
