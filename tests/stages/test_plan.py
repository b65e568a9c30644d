"""The first task of a pipeline checks the whole settings document; a setting is written once and appears everywhere."""

import html
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from minitron.config.metrics import format_moment
from minitron.config.stages import PlanConfig
from minitron.errors import ConfigError
from minitron.stages import plan
from minitron.tracking.client import connect
from tests.constants import LLAMA_3_1_8B, REPOSITORY
from tests.servers.http_server import free_port

FORM = {"teacher": "/teacher", "corpus": "/corpus"}
TASKS = str(REPOSITORY / "tests")
"""A directory that names no task."""


def run_plan(output: Path, **form: Any) -> dict[str, Any]:
    return plan.run(PlanConfig(output=output, **FORM | form))["outputs"]


def test_the_form_wins_over_the_settings_and_these_over_the_preset(tmp_path: Path) -> None:
    settings = {
        "distill": {"max_steps": 7.0},
        "finetune.gpus": 16.0,
        "register": {"name": "mine"},
    }  # as Kubeflow has it
    outputs = run_plan(
        tmp_path / "out", preset="nemo-tutorial-width", document=settings, champion="models:/mine@champion"
    )
    assert outputs["teacher"] == "/teacher"
    assert outputs["prune"]["hidden_size"] == 3072
    assert outputs["distill"]["max_steps"] == 7 and outputs["distill"]["global_batch_size"] == 128
    assert (outputs["finetune_gpus"], outputs["distill_gpus"], outputs["register_memory"]) == ("16", "8", "8Gi")
    assert outputs["evaluate"]["champion"] == "models:/mine@champion"
    assert outputs["register"]["name"] == "mine"
    assert json.loads((tmp_path / "out" / "plan.json").read_text()) == outputs


def test_the_page_shows_every_setting_and_marks_what_is_not_the_default(tmp_path: Path) -> None:
    run_plan(tmp_path / "out", document={"distill": {"max_steps": 7}}, model_name="<b>")
    page = (tmp_path / "out" / "plan.html").read_text()
    assert '<tr class="changed"><th scope="row">max_steps</th><td>7</td>' in page
    assert '<tr><th scope="row">warmup_steps</th><td>2</td>' in page
    assert "&lt;b&gt;" in page and "<b>" not in page


def test_the_run_in_mlflow_has_the_model_s_name_before_a_stage_starts(mlflow_file: str, tmp_path: Path) -> None:
    run_plan(
        tmp_path / "out", tracking_uri=mlflow_file, pipeline_run_id="run-1", experiment=tmp_path.name, model_name="m"
    )
    experiment = connect(mlflow_file).get_experiment_by_name(tmp_path.name)
    (run,) = connect(mlflow_file).search_runs([experiment.experiment_id])
    started = format_moment(run.info.start_time / 1000).removesuffix(" UTC")
    assert (run.info.run_name, run.info.status) == (f"{started} m", "RUNNING")
    assert (run.data.tags["model"], run.data.tags["kfp.run_id"]) == ("m", "run-1")


def test_an_mlflow_that_does_not_answer_stops_the_next_task_which_is_retried(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = f"http://127.0.0.1:{free_port()}"
    assert run_plan(tmp_path / "out", tracking_uri=uri, pipeline_run_id="run-1")["teacher"] == "/teacher"
    assert f"warning: plan: MLflow at {uri}: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (
            {"document": {"distill": {"max_step": 3}}},
            "distill.max_step: unknown key; did you mean 'distill.max_steps'?",
        ),
        ({"document": {"prune": {"gpus": "two"}}}, "prune.gpus: Input should be a valid integer"),
        ({"document": {"prune": {"gpus": -1}}}, "prune.gpus: Input should be greater than or equal to 0"),
        (
            {"document": {"engine": "hf", "distill": {"gpus": 8, "global_batch_size": 120}}},
            "distill.global_batch_size: 120 is not a multiple of micro_batch_size 4 x 8 GPUs = 32; choose 96 or",
        ),
        ({"model_name": "a/b"}, "register.name: String should match pattern"),
        ({"teacher": ""}, "teacher: missing; give it a value"),
        ({"preset": "tinny"}, "preset tinny: no such file or preset; did you mean 'tiny'?"),
        ({"corpus": "s3://bucket/x"}, "corpus: s3://bucket/x: unknown scheme 's3:'; give a path, hf://dataset[@revis"),
        ({"champion": "gcs://b/x"}, "evaluate.champion: gcs://b/x: unknown scheme 'gcs:'; give a path, hf://org/nam"),
        ({"corpus": "data/x"}, "corpus: data/x: no such file or directory in "),
        ({"corpus": "/workspace/x", "workspace": "/workspace"}, "corpus: /workspace/x: no such file or directory; "),
        ({"tracking_uri": ""}, "tracking_uri: empty, but this pipeline registers its model; give an MLflow server"),
        (
            {"document": {"evaluate": {"tasks": ["helaswag"]}}},
            "evaluate.tasks: helaswag is not a task of lm-eval 0.4.13; give hellaswag",
        ),
        (
            {"document": {"evaluate": {"tasks": ["humaneval"]}}},
            "evaluate.tasks: humaneval runs code that the models write; remove it, or add it to ",
        ),
        (
            {"document": {"evaluate": {"tasks": ["arc_easy_loca"], "task_directory": TASKS}}},
            f"evaluate.tasks: arc_easy_loca is not in any .yaml file of {TASKS}; correct or remove it",
        ),
        (
            {"document": {"engine": "nemo", "finetune": {"tensor_parallel_size": 8, "gpus": 12}}},
            "finetune.tensor_parallel_size: tensor x pipeline x context parallel size 8 does not divide the number of",
        ),
        ({"preset": "demo"}, "preset demo: only minitron run can make its inputs (demo); use minitron run"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_written(tmp_path: Path, form: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        run_plan(tmp_path / "out", **form)
    assert str(refused.value).startswith(message)
    assert not (tmp_path / "out").exists()


def test_a_cluster_section_has_no_effect_in_a_run_and_the_log_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outputs = run_plan(tmp_path / "out", preset="gke-spot")
    assert outputs["gpu_node_selector"] == {"cloud.google.com/gke-spot": "true"}
    assert "cluster.retries has no effect here" in capsys.readouterr().out


@pytest.fixture
def llama(tmp_path: Path) -> str:
    """A directory with the config.json of Llama-3.1-8B, without weights."""
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text(json.dumps(LLAMA_3_1_8B))
    return str(tmp_path / "llama")


def test_memory_is_the_sum_on_the_page(llama: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outputs = run_plan(tmp_path / "out", preset="llama-3.1-minitron-4b-width", teacher=llama)
    assert (outputs["finetune_memory"], outputs["distill_memory"], outputs["prepare_memory"]) == (
        "358Gi",
        "240Gi",
        "16Gi",
    )
    page = " ".join(re.sub("<[^>]+>", " ", (tmp_path / "out" / "plan.html").read_text()).split())
    assert "The teacher has 8,030,261,248 parameters, the student 4,512,746,496." in page
    assert (
        "distill 240Gi 72.0 Gi 9 processes of 8 Gi 16.0 Gi /dev/shm 50.4 Gi a checkpoint&#39;s optimizer state" in page
    )
    assert "distill 433.2 GB 63.2 GB each of 4 checkpoints 9.0 GB each of 20 best states, at most" in page
    assert "Warning" not in page and "warning" not in capsys.readouterr().out


def test_lists_of_what_to_keep_are_checked_and_counted(llama: str, tmp_path: Path) -> None:
    lists = {"layers": [*range(16)], "hidden": [*range(3072)]}
    document = {"prune": {"keep": str(tmp_path / "keep.json"), "intermediate_size": 9216}}
    (tmp_path / "keep.json").write_text(json.dumps(lists))
    outputs = run_plan(tmp_path / "listed", teacher=llama, document=document)
    assert outputs["prune"]["keep"] == str(tmp_path / "keep.json") and "hidden_size" not in outputs["prune"]
    sizes = {"num_hidden_layers": 16, "hidden_size": 3072, "intermediate_size": 9216}
    run_plan(tmp_path / "sized", teacher=llama, document={"prune": sizes})
    (listed, sized) = (
        re.findall("the student ([0-9,]+)", (tmp_path / name / "plan.html").read_text()) for name in ("listed", "sized")
    )
    assert listed == sized != []
    (tmp_path / "keep.json").write_text(json.dumps({"layers": [16, 32], "hidden": [0, 4096]}))
    with pytest.raises(ConfigError) as refused:
        run_plan(tmp_path / "refused", teacher=llama, document=document)
    assert str(refused.value) == (
        "prune.keep.layers: 32 is none of the teacher's 32; count from 0 to 31; "
        "prune.keep.hidden: 4096 is none of the teacher's 4096; count from 0 to 4095"
    )


def test_your_own_memory_wins_and_one_below_the_sum_is_warned_of(
    llama: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = {"distill": {"memory": "64Gi"}, "finetune": {"memory": "400Gi"}}
    outputs = run_plan(tmp_path / "out", preset="llama-3.1-minitron-4b-width", teacher=llama, document=document)
    assert (outputs["finetune_memory"], outputs["distill_memory"]) == ("400Gi", "64Gi")
    warning = "distill.memory: 64Gi is below the sum, 240Gi; the task may be killed if it needs more"
    assert capsys.readouterr().out == f"warning: plan: {warning}\n"
    assert (tmp_path / "out" / "plan.html").read_text().count(f"Warning: {warning}.") == 1


def test_what_the_gpus_of_the_node_selector_cannot_hold_is_refused(
    llama: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compensated = {"prune": {"method": "compensated"}, "gpu_node_selector": {"gpu": "unknown"}}
    run_plan(tmp_path / "warned", preset="llama-3.1-minitron-4b-width", teacher=llama, document=compensated)
    warning = "prune.gpus: 1 x h100-80gb, but each would hold 555 GB"
    assert f"warning: plan: {warning}" in capsys.readouterr().out
    page = (tmp_path / "warned" / "plan.html").read_text()
    assert f"Warning: {warning}" in page and "Assumed, since no node selector names the GPU: h100-80gb" in page
    compensated["gpu_node_selector"] = {"cloud.google.com/gke-accelerator": "nvidia-h200-141gb"}
    with pytest.raises(ConfigError, match=r"prune.gpus: 1 x h200-141gb, .*; it fits with prune.gpus=8"):
        run_plan(tmp_path / "refused", preset="llama-3.1-minitron-4b-width", teacher=llama, document=compensated)
    assert not (tmp_path / "refused").exists()


def test_the_page_shows_what_the_stages_need_and_the_task_gets_it(llama: str, tmp_path: Path) -> None:
    outputs = run_plan(tmp_path / "out", preset="llama-3.1-minitron-4b-width", teacher=llama)
    assert (outputs["distill_cpu"], outputs["evaluate_cpu"], outputs["register_cpu"]) == ("64", "8", "2")
    page = (tmp_path / "out" / "plan.html").read_text()
    assert '<th scope="row">distill</th><td>nemo</td><td>8</td>' in page and "GPU-hours" in page
    assert "master weights and Adam&#39;s moments, fp32" in page and "<pre>engine: " in page


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        (
            {"max_position_embeddings": 4096},
            {},
            "sequence_length: 8192 is above max_position_embeddings 4096 of LLAMA; ",
        ),
        ({}, {"sequence_length": 131073}, "sequence_length: 131073 is above max_position_embeddings 131072 of LLAMA; "),
        (
            {"quantization_config": {"quant_method": "fp8"}},
            {},
            "teacher: LLAMA: quantized (quantization_config of config.json: fp8)",
        ),
        (
            {"eos_token_id": 128256},
            {},
            "teacher: LLAMA: eos_token_id of config.json is 128256, but the embedding has 128256 rows",
        ),
        (
            {"architectures": ["GPT2LMHeadModel"]},
            {},
            "teacher: LLAMA: architecture GPT2LMHeadModel is not supported; use one of ",
        ),
        ({}, {"prune": {"hidden_size": 8192}}, "prune.hidden_size: 8192 is larger than the teacher's 4096; choose at "),
        (
            {},
            {"prune": {"intermediate_size": 20000, "drop_layers": [33]}},
            "prune.intermediate_size: 20000 is larger than the teacher's 14336; choose at most 14336; "
            "prune.drop_layers: the teacher has no layers [33]; choose from 1 to 32",
        ),
        (
            {},
            {"prune": {"drop_layers": [*range(1, 33)]}},
            "prune.drop_layers: drops all 32 layers of the teacher; keep at",
        ),
        ({}, {"prune": {"num_attention_heads": 12}}, "prune.num_attention_heads: 12 is not a multiple of num_key_v"),
        ({}, {"prune": {"hidden_size": 3090}}, "prune.hidden_size: 3090 is not a multiple of 8, the step of a GPU's"),
        ({}, {"prune": {"hidden_size": 4064}}, "prune.hidden_size: 4064 is not a multiple of 64, the step of Model-"),
        (
            {},
            {"distill": {"intermediate_layers": [[9, 32]]}, "prune": {"num_hidden_layers": 8}},
            "distill.intermediate_layers: 9 is not a layer of the student; choose from 1 to 8",
        ),
        (
            {},
            {"engine": "hf", "distill": {"intermediate_layers": [[9, 32]]}, "prune": {"hidden_size": 3072}},
            "distill.intermediate_layers: the student's hidden_size 3072 is not the teacher's 4096, so their outputs",
        ),
        (
            {},
            {"distill": {"tensor_parallel_size": 16, "gpus": 16}},
            "distill.tensor_parallel_size: 16 does not divide the num_key_value_heads of LLAMA, 8; choose one of 1, 2",
        ),
        (
            {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},
            {"finetune": {"enabled": False}},
            "distill.engine: engine nemo supports LlamaForCausalLM, but LLAMA is a Qwen2ForCausalLM; use engine hf",
        ),
    ],
)
def test_a_teacher_that_cannot_be_compressed_is_refused_by_its_config(
    llama: str, tmp_path: Path, change: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    (Path(llama) / "config.json").write_text(json.dumps(LLAMA_3_1_8B | change))
    with pytest.raises(ConfigError) as refused:
        run_plan(tmp_path / "out", teacher=llama, document={"engine": "nemo"} | settings)
    assert str(refused.value).startswith(message.replace("LLAMA", llama))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("teacher", ["ngc://org/team/llama:1.0", "models:/llama@champion", "/nowhere", "hf://org/name"])
def test_a_teacher_that_cannot_be_read_yet_is_assumed_to_be_of_a_stated_size(
    teacher: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    outputs = run_plan(tmp_path / "out", preset="llama-3.1-minitron-4b-width", teacher=teacher)
    assert (outputs["finetune_memory"], outputs["distill_memory"]) == ("358Gi", "240Gi")
    said = f"the teacher's size is not known yet ({teacher}: "
    assert f"warning: plan: {said}" in capsys.readouterr().out
    page = html.unescape((tmp_path / "out" / "plan.html").read_text())
    assert said in page and "the memory is for 8,030,261,248 parameters; set STAGE.memory" in page


NEW = '    dropout: NonNegative = Field(0.0, description="Share of the activations that are dropped.")\n'


def test_a_new_setting_is_written_once(tmp_path: Path) -> None:
    """One line in the models puts a setting into help, reference, plan and stage; nothing has to be compiled again.

    A process imports the copy of the package that has one more setting.
    """
    package = shutil.copytree(
        REPOSITORY / "minitron", tmp_path / "minitron", ignore=shutil.ignore_patterns("__pycache__")
    )
    for part in ("components", "pipelines"):
        shutil.copytree(REPOSITORY / part, package / part)
    models = package / "config" / "settings" / "training.py"
    before, line, after = models.read_text().partition("    max_steps: PositiveInt")
    models.write_text(before + NEW + line + after)
    code = f"""
import json, pathlib
from typer.testing import CliRunner
from minitron.stages import plan
from minitron.cli.app import app
from minitron.config.stages import DistillConfig; from minitron.config.stages import PlanConfig
from minitron.config.reference import reference_page
from minitron.pipelines.compress import compress
from minitron.pipelines.tasks import write_compiled
root = pathlib.Path({str(tmp_path)!r})
config = PlanConfig(output=root / "out", teacher="/t", corpus="/c", document={{"distill": {{"dropout": 0.1}}}})
section = plan.run(config)["outputs"]["distill"]
stage = DistillConfig(output="/o", dataset="/d", teacher="/t", student="/s", **section)
write_compiled(compress, root / "compress.yaml")
help_text = CliRunner().invoke(app, ["run", "--help"]).output
print(json.dumps([help_text, reference_page(), (root / "out" / "plan.html").read_text(), section, stage.dropout]))
"""
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True, cwd=tmp_path)
    help_text, page, plan_page, section, value = json.loads(done.stdout.splitlines()[-1])
    meaning = "Share of the activations that are dropped."
    assert f"distill.dropout=0.0  {meaning}" in help_text and f"finetune.dropout=0.0  {meaning}" in help_text
    assert f"| `dropout` | `0.0` | {meaning} |" in page
    assert '<tr class="changed"><th scope="row">dropout</th><td>0.1</td>' in plan_page
    assert section["dropout"] == value == 0.1
    assert (tmp_path / "compress.yaml").read_text() == (REPOSITORY / "pipelines" / "compress.yaml").read_text()
