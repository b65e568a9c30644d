"""Write the generated pages of docs/reference from the settings, the commands, the presets and the record types.

`make docs` runs it: python docs/generate.py
"""

import ast
import inspect
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import click
import typer
import yaml

import minitron
from minitron.cli.app import app
from minitron.config import metrics
from minitron.config.document import pipelines_directory
from minitron.config.reference import reference_page
from minitron.storage import layout

REFERENCE = Path(__file__).parent / "reference"
_PIPELINE_METRICS = (
    ("`parameters_ratio`", "the student's parameters, as a share of the teacher's", "less is better"),
    ("`speed_ratio`", "the student's generation speed over the teacher's", "more is better"),
    ("`gap_closed`", "share of the loss added by pruning that distillation removed", "more is better"),
    ("`validation_loss_above_teacher`", "the student's validation loss minus the teacher's", "less is better"),
    ("`TASK_acc_below_teacher`", "the teacher's accuracy minus the student's", "less is better"),
)
_UNITS = {"megabytes": "MB", "share": "share of 1"}


def make_pages() -> dict[str, str]:
    """Return the generated pages by their file names in docs/reference."""
    return {
        "parameters.md": reference_page(),
        "cli.md": make_command_page(),
        "presets.md": make_preset_page(),
        "files.md": make_file_page(),
        "metrics.md": make_metric_page(),
        "modules.md": make_module_page(),
    }


def make_command_page() -> str:
    """Return the page of the commands: what each does, its arguments and options, and an example."""
    group = typer.main.get_command(app)
    parts = [_open_page("Commands", "the `minitron` command"), inspect.cleandoc(group.help or "")]
    for name in group.list_commands(typer.Context(group)):  # type: ignore[attr-defined]
        command = group.commands[name]  # type: ignore[attr-defined]
        parts += [f"## `minitron {name}`", inspect.cleandoc(command.help or "").split("\f")[0]]
        rows = [_describe_parameter(parameter) for parameter in command.params if parameter.name != "help"]
        parts.append(_make_table(("argument or option", "meaning"), rows))
        parts.append(f"```sh\n{_find_example(command)}\n```")
    parts.append("The settings that `--set` and presets take: [parameters](parameters.md).")
    return "\n\n".join(parts) + "\n"


def _describe_parameter(parameter: click.Parameter) -> tuple[str, str]:
    names = ", ".join(f"`{name}`" for name in parameter.opts if name.startswith("-")) or f"`{parameter.name}`"
    variable = f" Environment: `{parameter.envvar}`." if parameter.envvar else ""
    return names, f"{getattr(parameter, 'help', None) or ''}{variable}"


def _find_example(command: click.Command) -> str:
    """Return the command lines that a help text shows as its example."""
    lines = (command.epilog or "").partition("Example:\n")[2].partition("\n\n")[0].splitlines()
    return "\n".join(line.removeprefix("  ") for line in lines)


def make_preset_page() -> str:
    """Return the page of the presets that ship: what each is for, in its own words, and its settings."""
    parts = [_open_page("Presets", "pipelines/presets")]
    parts.append(
        "Give one by `--preset NAME`. A file of your own has the same form. Several are merged, later ones win."
    )
    for path in sorted((pipelines_directory() / "presets").glob("*.yaml")):
        text = path.read_text()
        comment = [line.removeprefix("# ") for line in text.splitlines() if line.startswith("#")]
        settings = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
        assert yaml.safe_load(settings)
        parts += [f"## `{path.stem}`", "\n".join(comment), f"```yaml\n{settings}\n```"]
    return "\n\n".join(parts) + "\n"


def make_file_page() -> str:
    """Return the page of the files that stages leave for each other."""
    rows = [(", ".join(f"`{name}`" for name in names), text) for names, text in _read_file_names()]
    return _open_page("Files", "minitron/storage/layout.py") + "\n\n" + _make_table(("file", "content"), rows) + "\n"


def _read_file_names() -> Iterator[tuple[list[str], str]]:
    """Yield the names that each constant of storage/layout.py has, and the text below it."""
    body = ast.parse(inspect.getsource(layout)).body
    for entry, text in pairwise(body):
        if isinstance(entry, ast.Assign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            value = ast.literal_eval(entry.value)
            yield [value] if isinstance(value, str) else list(value), str(text.value.value)


def make_metric_page() -> str:
    """Return the page of what is measured of every model."""
    rows = [
        (
            f"`{key}`",
            label,
            note or _UNITS.get(form, "–"),
            "less is better" if better < 0 else "more is better" if better else "",
        )
        for key, label, note, form, _, better in metrics.MEASURES
    ]
    tasks = [(f"`TASK_{key}`", text, "share of 1", "more is better") for key, text in metrics.TASK_METRICS.items()]
    models = [(f"`{key}`", label) for key, label in metrics.MODELS.items()]
    return (
        "\n\n".join(
            [
                _open_page("Metrics", "minitron/config/metrics.py"),
                "evaluate measures these of every model. A gate may name any of them. evaluate's run in MLflow has "
                "them as `MODEL_METRIC`, such as `student_validation_loss`.",
                _make_table(("metric", "name", "unit", "direction"), rows + tasks),
                "## Models",
                _make_table(("key in evaluation.json and gates", "name in the report"), models),
                "## The pipeline's run in MLflow",
                "It has `student_METRIC` of every metric above, and these. The teacher is the corrected one.",
                _make_table(("metric", "meaning", "direction"), _PIPELINE_METRICS),
            ]
        )
        + "\n"
    )


def make_module_page() -> str:
    """Return the page of all modules: the first line of each room's and each module's docstring."""
    parts = [_open_page("Modules", "the modules' first lines")]
    root = Path(minitron.__file__).parent
    for room in sorted(path.parent for path in root.rglob("__init__.py") if path.parent != root):
        rows = [(f"`{path.name}`", _read_first_line(path)) for path in sorted(room.glob("[!_]*.py"))]
        if rows:
            name = room.relative_to(root.parent)
            parts += [f"## `{name}`", _read_first_line(room / "__init__.py"), _make_table(("module", "purpose"), rows)]
    return "\n\n".join(parts) + "\n"


def _read_first_line(path: Path) -> str:
    return (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n\n")[0]


def _open_page(title: str, source: str) -> str:
    return f"# {title}\n\nGenerated from {source} by `make docs`."


def _make_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return "\n".join(lines + [f"| {' | '.join(' '.join(cell.split()) for cell in row)} |" for row in rows])


if __name__ == "__main__":
    for file, page in make_pages().items():
        (REFERENCE / file).write_text(page)
