"""The parameter table of the README: `python -m minitron.parameters` prints it."""

from pydantic import BaseModel

from minitron.config import STAGES, StageConfig
from minitron.settings import ClusterConfig


def parameter_table() -> str:
    """Return every stage's parameters as Markdown tables: the README's, kept equal by a test."""
    shared = set(StageConfig.model_fields)
    sections = [_table("every stage", StageConfig, set())]
    sections += [_table(stage, model, shared) for stage, model in STAGES.items()]
    sections += [_table("cluster (submit and schedule)", ClusterConfig, set())]
    return "\n\n".join(sections)


def _table(title: str, model: type[BaseModel], left_out: set[str]) -> str:
    rows = [
        f"| `{name}` | {'required' if field.is_required() else f'`{field.default}`'} | {field.description} |"
        for name, field in model.model_fields.items()
        if name not in left_out
    ]
    return "\n".join([f"**{title}**", "", "| parameter | default | meaning |", "|---|---|---|", *rows])


if __name__ == "__main__":
    print(parameter_table())
