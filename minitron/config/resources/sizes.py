"""The sizes of a run's models, and sums of bytes: what every estimate starts from."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from minitron.config.parse import apply_kept
from minitron.config.shapes import PruneSettings
from minitron.errors import ConfigError

GIB = 2**30

BF16, FP32 = 2, 4

ADAM = 3 * FP32
"""An optimizer's state: the master weight and both moments."""

ASSUMED = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
    "num_key_value_heads": 8, "num_hidden_layers": 32, "vocab_size": 128256,
}  # fmt: skip
"""Sizes of Llama-3.1-8B, assumed for a teacher whose config.json cannot be read."""

UNKNOWN = 8_030_261_248
"""Parameters of that model."""

_WITH_BIAS = ("qwen2",)
_WITH_NORMS = ("qwen3",)
_FAMILIES = ("llama", "mistral", *_WITH_BIAS, *_WITH_NORMS)
_NEEDED = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size")


class Sizes(NamedTuple):
    """The sizes of a model; without others, those of Llama-3.1-8B."""

    hidden: int = 4096
    intermediate: int = 14336
    heads: int = 32
    groups: int = 8
    head: int = 128
    layers: int = 32
    vocabulary: int = 128256

    @property
    def layer_weights(self) -> int:
        """Weights of the matrices of one layer: query, key, value, output, and the three of the MLP."""
        return 2 * (self.heads + self.groups) * self.head * self.hidden + 3 * self.hidden * self.intermediate

    @property
    def head_weights(self) -> int:
        """Weights of the output embedding."""
        return self.vocabulary * self.hidden


class Models(NamedTuple):
    """Parameters and sizes of a run's models, the bytes that a stored weight takes, and the number of teachers.

    There are two teachers, the given and the corrected one; without finetune they are one model.
    """

    teacher: int = UNKNOWN
    student: int = UNKNOWN
    weight: int = BF16
    teacher_sizes: Sizes = Sizes()
    student_sizes: Sizes = Sizes()
    teachers: int = 2


class Term(NamedTuple):
    """An entry of a sum: its meaning, and its bytes."""

    meaning: str
    size: int


def total(terms: list[Term]) -> int:
    """Return the bytes of a sum."""
    return sum(term.size for term in terms)


def read_model_sizes(architecture: Mapping[str, Any]) -> Sizes:
    """Return the sizes in a config.json.

    Raises:
        ConfigError: the model is of another family, or sizes are missing.
    """
    if (family := architecture.get("model_type")) not in _FAMILIES:
        raise ConfigError(f"model_type {family} is not one of {', '.join(_FAMILIES)}")
    if missing := [name for name in _NEEDED if name not in architecture]:
        raise ConfigError(f"config.json has no {', '.join(missing)}")
    hidden, intermediate, heads, layers, vocabulary = (architecture[name] for name in _NEEDED)
    groups = architecture.get("num_key_value_heads") or heads
    head = architecture.get("head_dim") or hidden // heads
    return Sizes(hidden, intermediate, heads, groups, head, layers, vocabulary)


def count_parameters(architecture: Mapping[str, Any]) -> int:
    """Count the parameters of the model that a config.json describes; tied embeddings count once.

    Raises:
        ConfigError: as for `read_model_sizes`.
    """
    sizes, family = read_model_sizes(architecture), architecture["model_type"]
    layer = sizes.layer_weights + 2 * sizes.hidden
    if family in _WITH_BIAS or architecture.get("attention_bias"):
        layer += (sizes.heads + 2 * sizes.groups) * sizes.head + (0 if family in _WITH_BIAS else sizes.hidden)
    if architecture.get("mlp_bias"):
        layer += 2 * sizes.intermediate + sizes.hidden
    if family in _WITH_NORMS:
        layer += 2 * sizes.head
    embeddings = sizes.head_weights * (1 if architecture.get("tie_word_embeddings") else 2)
    return embeddings + sizes.layers * layer + sizes.hidden


def count_models(architecture: Mapping[str, Any], prune: PruneSettings, teachers: int = 2) -> Models:
    """Count the parameters of a teacher and of the student that prune makes from it.

    Raises:
        ConfigError: as for `read_model_sizes`.
    """
    teacher = count_parameters(architecture)
    cut = {"num_key_value_heads": architecture["num_attention_heads"]} | dict(architecture)
    cut |= {"head_dim": architecture.get("head_dim") or cut["hidden_size"] // cut["num_attention_heads"]}
    cut |= apply_kept(prune).compute_student_sizes(cut)
    dtype = architecture.get("dtype") or architecture.get("torch_dtype")
    weight = FP32 if dtype == "float32" else BF16
    sizes = read_model_sizes(architecture), read_model_sizes(cut)
    return Models(teacher, count_parameters(cut), weight, *sizes, teachers)
