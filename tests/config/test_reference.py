"""The reference: the names that users import, the help of a stage, the generated pages of docs/reference."""

import re
import subprocess
import sys

import pytest

from docs.generate import make_pages
from minitron import config
from minitron.config.stages import SETTINGS, STAGES
from minitron.runtime import entry
from tests.constants import REPOSITORY


def test_the_settings_are_exported_in_the_order_of_the_flow() -> None:
    assert config.__all__ == [model.__name__ for model in SETTINGS.values()]
    assert [getattr(config, name) for name in config.__all__] == [*SETTINGS.values()]


def test_importing_them_is_light() -> None:
    program = "import sys, minitron.config; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert not {"torch", "transformers", "nemo", "mlflow", "kfp", "kubernetes", "google"} & {*done.stdout.split()}


@pytest.mark.parametrize("stage", STAGES)
def test_the_help_of_a_stage_lists_its_configuration(
    stage: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [stage, "--help"])
    with pytest.raises(SystemExit) as done:
        entry.main(stage)
    lines = capsys.readouterr().out.splitlines()
    assert done.value.code == 0 and lines[0].startswith(f"usage: python -m minitron.{stage} ")
    assert f"  python -m minitron.{stage} --config {stage}.yaml" in lines[lines.index("example:") :]
    for name, field in STAGES[stage].model_fields.items():
        default = "required" if field.is_required() else field.default
        (line,) = [line for line in lines if line.startswith(f"  {name}=")]
        assert line.startswith(f"  {name}={default}  ") and str(field.description) in line


@pytest.mark.parametrize("name", make_pages())
def test_a_generated_page_is_what_the_sources_say(name: str) -> None:
    assert (REPOSITORY / "docs" / "reference" / name).read_text() == make_pages()[name], "run 'make docs'"


def test_every_environment_variable_is_on_the_page() -> None:
    """Those that the sources name in capitals beside `environ`, and those of the commands' options."""
    page = (REPOSITORY / "docs" / "reference" / "environment.md").read_text()
    text = "\n".join(path.read_text() for path in (REPOSITORY / "minitron").rglob("*.py"))
    read = {*re.findall(r"environ(?:\.get\(|\.setdefault\(|\[)\"(\w+)\"", text), *re.findall(r"envvar=\"(\w+)\"", text)}
    assert {"MINITRON_CACHE", "MLFLOW_TRACKING_URI"} <= read
    assert [name for name in sorted(read) if f"`{name}`" not in page] == []
