"""A component alone, in a pipeline of the user's own: the README's lines, compiled, and run on this machine."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from kfp import compiler, components, local
from transformers import AutoModelForCausalLM

from minitron.config import PruneSettings
from tests.flows.commands import read_blocks


def shown_pipeline(page: str, name: str) -> Any:
    """Return the pipeline that a page shows."""
    (source,) = read_blocks(page, "python")
    names: dict[str, Any] = {}
    exec(compile(source, page, "exec"), names)
    return names[name]


def test_the_pipeline_of_the_readme_prunes_a_model_of_the_users_own(
    teacher: Path, dataset: Path, tmp_path: Path
) -> None:
    """A process per task, since KFP runs a component as one: what a user's artifacts and plain settings become."""
    compiler.Compiler().compile(shown_pipeline("README.md", "prune_mine"), str(tmp_path / "mine.yaml"))
    local.init(local.SubprocessRunner(use_venv=False), str(tmp_path / "results"), workspace_root=str(tmp_path / "kfp"))
    components.load_component_from_file(str(tmp_path / "mine.yaml"))(teacher_uri=str(teacher), dataset_uri=str(dataset))
    (pruned,) = tmp_path.glob("results/*/prune/pruned")
    config = AutoModelForCausalLM.from_pretrained(pruned).config
    assert (config.intermediate_size, config.num_hidden_layers) == (96, 4)


def test_the_pipeline_of_the_guide_compiles(tmp_path: Path) -> None:
    page = "docs/how-to/use-the-components.md"
    compiler.Compiler().compile(shown_pipeline(page, "prune_and_distill"), str(tmp_path / "mine.yaml"))
    tasks = yaml.safe_load((tmp_path / "mine.yaml").read_text())["root"]["dag"]["tasks"]
    settings = tasks["distill"]["inputs"]["parameters"]["settings"]["runtimeValue"]["constant"]
    assert settings == {"max_steps": 20, "global_batch_size": 8, "sequence_length": 64}
    assert tasks["distill"]["dependentTasks"] == ["importer", "importer-2", "prune"]


def test_settings_are_checked_while_the_pipeline_is_written() -> None:
    assert PruneSettings(intermediate_size=96).as_settings() == {"intermediate_size": 96}
    for wrong in ({"intermediate_size": "wide"}, {"intermediate_sizes": 96}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            PruneSettings(**wrong)
