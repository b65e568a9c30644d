"""Prune: teacher → smaller student, by what a few sequences show to matter; its method says how.

    python -m minitron.prune --config FILE

Writes a model directory and, in it, `pruning.json`: sizes before and after, calibration, kept indices, fits; and
`scores/importance.safetensors`, the scores by which they were chosen.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from minitron.config.parse import SectionError, apply_kept, read_kept
from minitron.config.stages import PruneConfig
from minitron.data.manifest import check_tokenizer
from minitron.engines import get_engine
from minitron.engines.plan_checks import find_size_faults
from minitron.models.checkpoint import count_config_parameters
from minitron.models.checks import check_finite, check_model, check_sequence_length, read_config
from minitron.models.pruning.scores import check_given_importance, make_key, save_importance
from minitron.models.pruning.surgery import Cut, Shape
from minitron.runtime import stage
from minitron.runtime.entry import main
from minitron.storage.layout import IMPORTANCE, PRUNING
from minitron.tracking.stage_run import Tracker


def run(config: PruneConfig) -> dict[str, Any]:
    """Prune the teacher, or return the record of an existing student.

    Raises:
        ConfigError: a target does not fit the teacher, the dataset was made with another tokenizer, or given scores
            are of another teacher or calibration.
        RunError: the teacher's weights or given scores cannot be read, or they or its activations are not finite.
    """
    return stage.run(config, work, check_given_importance)


def work(config: PruneConfig, directory: Path, tracker: Tracker) -> dict[str, Any]:
    """Cut the student out of the teacher."""
    check_model(config.teacher)
    check_finite(config.teacher)
    check_tokenizer(config.dataset, config.teacher)
    teacher_config = read_config(config.teacher)
    shape = compute_target_shape(config, teacher_config)
    given = list_given(config, shape, Shape.from_config(teacher_config))
    cut = get_engine(config.engine).prune(config, shape, given, directory)
    pruning = _describe_pruning(config, teacher_config, read_config(directory), cut)
    _write_lines(directory / PRUNING, pruning)
    if cut.importance:
        save_importance(cut.importance, make_key(config), directory / IMPORTANCE)
    return {"metrics": _summarize_pruning(pruning)}


def compute_target_shape(config: PruneConfig, teacher_config: Any) -> Shape:
    """Return the student's sizes; a size that is not set is the teacher's.

    Raises:
        ConfigError: a size does not fit the teacher or another size.
    """
    if faults := list(find_size_faults(config, teacher_config.to_dict())):
        raise SectionError(faults)
    check_sequence_length("prune.sequence_length", config.sequence_length, teacher_config.to_dict(), config.teacher)
    return Shape(**apply_kept(config).compute_student_sizes(asdict(Shape.from_config(teacher_config))))


def list_given(config: PruneConfig, shape: Shape, teacher: Shape) -> dict[str, Any]:
    """Return what the settings say to keep, by axis; where lists of heads or of groups decide both, both are there."""
    kept = read_kept(config.keep)
    given = kept.model_dump(exclude_none=True) if kept else {}
    if config.drop_layers:
        layers = range(teacher.num_hidden_layers)
        given["layers"] = [layer for layer in layers if layer + 1 not in config.drop_layers]
    if "heads" in given:
        given.setdefault("key_value", [list(range(teacher.num_key_value_heads))] * shape.num_hidden_layers)
    elif "key_value" in given:
        per_group = teacher.num_attention_heads // teacher.num_key_value_heads
        if shape.num_attention_heads == shape.num_key_value_heads * per_group:  # nothing is left to choose
            given["heads"] = [
                [group * per_group + head for group in groups for head in range(per_group)]
                for groups in given["key_value"]
            ]
    return given


def _describe_pruning(config: PruneConfig, teacher: Any, student: Any, cut: Cut) -> dict[str, Any]:
    """Return the content of pruning.json.

    Layers are counted from 0, but from 1 in dropped_layers, as in NeMo. Engine nemo keeps the same channels and heads,
    the most important first. `kept` has no hidden channels if the student's are principal components.
    """
    kept, unlisted = set(cut.plan.layers), {} if cut.explained is None else {"hidden": None}
    return {
        "teacher": asdict(Shape.from_config(teacher)) | {"parameters": count_config_parameters(teacher)},
        "student": asdict(Shape.from_config(student)) | {"parameters": count_config_parameters(student)},
        "method": config.method,
        "calibration": {"sequences": cut.sequences, "tokens": cut.sequences * config.sequence_length},
        "dropped_layers": [layer + 1 for layer in range(teacher.num_hidden_layers) if layer not in kept],
        "kept": asdict(cut.plan) | unlisted,
        "fits": cut.fits,
        "drops": [drop._asdict() for drop in cut.drops],
        "explained_energy": cut.explained,
    }


def _summarize_pruning(pruning: dict[str, Any]) -> dict[str, float]:
    before, after = pruning["teacher"]["parameters"], pruning["student"]["parameters"]
    explained = pruning["explained_energy"]
    return ({} if explained is None else {"explained_energy": round(explained, 4)}) | {
        "parameters_before": before,
        "parameters": after,
        "parameters_ratio": round(after / before, 4),
        "calibration_tokens": pruning["calibration"]["tokens"],
    }


def _write_lines(path: Path, content: dict[str, Any]) -> None:
    """Write JSON with one line per entry; with an indent every index would take a line."""
    entries = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in content.items()]
    path.unlink(missing_ok=True)  # it may be a link to a file of the teacher, which was pruned before
    path.write_text("{\n" + ",\n".join(entries) + "\n}\n")


if __name__ == "__main__":
    main("prune")
