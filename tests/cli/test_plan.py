"""`minitron plan` says what a run needs from config.json alone, recommends settings, and refuses what cannot fit."""

import json
import shlex
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from minitron.cli.app import app
from minitron.config.document import make_plan, merge, nest_sections, read_preset
from minitron.config.resources import count_models
from minitron.config.resources.estimate import estimate_run, find_memory_faults, recommend
from minitron.config.resources.gpus import GPUS
from minitron.config.shapes import PruneSettings
from tests.constants import LLAMA_3_1_8B

WIDTH = "llama-3.1-minitron-4b-width"
ONE_GPU = {"engine": "hf", "finetune": {"enabled": False}, "sequence_length": 2048, "prune": {"num_hidden_layers": 4}}
"""A student of 1.9 billion parameters, which one H100 can train."""


@pytest.fixture
def llama(tmp_path: Path) -> str:
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text(json.dumps(LLAMA_3_1_8B))
    return str(tmp_path / "llama")


def run_plan(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["plan", *arguments])


def read_plan(*arguments: str) -> dict[str, Any]:
    done = run_plan(*arguments, "--json")
    return json.loads(done.stdout)


def write_preset(path: Path, document: dict[str, Any]) -> str:
    path.write_text(yaml.safe_dump(document))
    return str(path)


def test_every_stage_has_a_row_and_every_sum_its_terms(llama: str) -> None:
    done = run_plan("--preset", WIDTH, "--preset", "gke-gpu", "--set", f"teacher={llama}")
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert lines[0].startswith(
        "teacher 8.03 B, student 4.513 B parameters; h100-80gb: 80 GB, 989 TFLOP/s (data sheet: "
    )
    rows = {line.split()[0]: line.split() for line in lines[2:10]}
    assert list(rows) == ["stage", "prepare", "finetune", "prune", "distill", "evaluate", "register", "together"]
    assert rows["distill"][1:3] == ["nemo", "8"] and rows["distill"][5:7] == ["240Gi", "64"]
    assert max(map(len, lines[2:19])) <= 80, "the tables fit a terminal"
    assert (
        "master weights and Adam's moments, fp32" in done.output and "Model-Optimizer, pull request 861" in done.output
    )


def test_json_has_the_same_in_bytes_operations_and_seconds(llama: str) -> None:
    plan = read_plan("--preset", WIDTH, "--set", f"teacher={llama}")
    assert plan["parameters"] == {"teacher": 8_030_261_248, "student": 4_512_746_496} and not plan["does_not_fit"]
    distill = plan["stages"]["distill"]
    assert distill["tokens"] == 1000 * 128 * 8192
    trained = distill["tokens"] * (6 * 4.1e9 + 2 * 7.5e9)  # without the embeddings, which are only looked up
    assert distill["operations"] == pytest.approx(trained, rel=0.3)
    peak = plan["gpu"]["peak"] * distill["gpus"] * distill["utilization"]["share"]
    assert distill["seconds"] == pytest.approx(distill["operations"] / peak)
    assert distill["gpu_hours"] == pytest.approx(distill["seconds"] / 3600 * 8)
    assert sum(distill["phases"]["loss"].values()) < plan["gpu"]["memory"]


@pytest.mark.parametrize(("enabled", "teachers"), [("true", 2), ("false", 1)])
def test_without_finetune_evaluate_holds_the_teacher_once(llama: str, enabled: str, teachers: int) -> None:
    plan = read_plan("--preset", WIDTH, "--set", f"teacher={llama}", "--set", f"finetune.enabled={enabled}")
    teacher, student = plan["parameters"].values()
    evaluate = plan["stages"]["evaluate"]
    assert evaluate["phases"]["losses"]["all models, bf16"] == 2 * (teachers * teacher + 2 * student)
    read = evaluate["operations"] / evaluate["tokens"]
    assert read == pytest.approx(2 * (teachers * teacher + 2 * student), rel=0.15)


def test_it_takes_less_than_a_second(llama: str) -> None:
    document = merge({"teacher": llama, "corpus": "/c"}, read_preset(WIDTH))
    started = time.process_time()
    plan = make_plan(document)
    models = count_models(LLAMA_3_1_8B, PruneSettings(hidden_size=3072, intermediate_size=9216))
    estimate_run(plan, models, GPUS["h100-80gb"])
    recommend(plan, models, GPUS["h100-80gb"])
    assert time.process_time() - started < 1


def test_without_gpus_the_time_is_that_of_the_tutorial() -> None:
    plan = read_plan("--preset", "demo", "--gpu", "cpu")
    assert plan["gpu"] is None and not any(entry["phases"] for entry in plan["stages"].values())
    assert 60 < plan["stages"]["distill"]["seconds"] < 400  # 170 on two cores
    assert plan["parameters"]["teacher"] == 134_515_008


def test_settings_that_do_not_fit_are_refused_with_settings_that_do(llama: str, tmp_path: Path) -> None:
    preset = write_preset(tmp_path / "one.yaml", ONE_GPU)
    arguments = ["--preset", preset, "--set", f"teacher={llama}", "--gpu", "a100-40gb"]
    done = run_plan(*arguments, "--set", "prune.num_hidden_layers=6", "--set", "distill.micro_batch_size=32")
    assert done.exit_code == 2
    (line,) = [line for line in done.output.splitlines() if line.startswith("error: ")]
    assert "distill.gpus: 1 x a100-40gb, but each would hold " in line
    _, _, remedy = line.partition("distill.gpus")[2].partition("it fits with ")
    changes = [change for change in shlex.split(remedy.partition(";")[0]) if "=" in change]
    assert changes, line
    sets = [part for change in changes for part in ("--set", change)]
    assert "distill.gpus" not in read_plan(*arguments, "--set", "prune.num_hidden_layers=6", *sets)["does_not_fit"]


@pytest.mark.parametrize("preset", [WIDTH, "llama-3.1-minitron-4b-depth", "nemo-tutorial-width", "nemo-tutorial-depth"])
@pytest.mark.parametrize("cut", [(), ("--preset", "recommended")])
def test_a_preset_fits_the_gpus_that_it_is_for(llama: str, preset: str, cut: tuple[str, ...]) -> None:
    done = run_plan("--preset", preset, *cut, "--preset", "gke-gpu", "--set", f"teacher={llama}")
    assert done.exit_code == 0, done.output


def test_it_is_refused_before_it_is_submitted(llama: str) -> None:
    presets = [f"--preset={name}" for name in (WIDTH, "recommended", "gke-gpu")]
    values = ("corpus=gs://b/c", "tracking_uri=http://mlflow:5000", "prune.calibration_sequences=1024")
    sets = [f"--set={value}" for value in (f"teacher={llama}", *values)]
    done = CliRunner().invoke(app, ["submit", "compress", *presets, *sets, "--host", "http://127.0.0.1:9"])
    assert done.exit_code == 2 and "prune.gpus: 1 x h100-80gb, but each would hold 555 GB" in done.output, done.output


def test_calibration_that_does_not_fit_is_shared_or_shortened(llama: str) -> None:
    arguments = ["--preset", WIDTH, "--preset", "recommended", "--set", f"teacher={llama}"]
    done = run_plan(*arguments, "--set", "prune.calibration_sequences=1024")
    assert done.exit_code == 2 and "prune.gpus: 1 x h100-80gb, but each would hold 555 GB" in done.output
    assert done.output.strip().endswith("it fits with prune.gpus=8")
    plan = read_plan(*arguments, "--set", "prune.calibration_sequences=1024")
    assert plan["recommended"]["settings"]["prune.gpus"] == 8
    shared = read_plan(*arguments, "--set", "prune.calibration_sequences=1024", "--set", "prune.gpus=8")
    short = read_plan(*arguments, "--set", "prune.calibration_sequences=128")
    assert not shared["does_not_fit"] and not short["does_not_fit"]
    pair = [plan["stages"]["prune"] for plan in (shared, short)]
    assert len({prune["phases"]["fits of MLPs"]["states of the calibration"] for prune in pair}) == 1
    assert pair[0]["seconds"] == pytest.approx(pair[1]["seconds"])
    twice = run_plan(*arguments, "--set", "prune.calibration_sequences=2048")
    assert twice.output.strip().endswith("it fits with prune.calibration_sequences=128")


@pytest.mark.parametrize("kind", GPUS)
def test_what_is_recommended_is_valid_and_fits(llama: str, tmp_path: Path, kind: str) -> None:
    preset = write_preset(tmp_path / "one.yaml", ONE_GPU)
    arguments = ["--preset", preset, "--set", f"teacher={llama}", "--gpu", kind]
    advice = read_plan(*arguments)["recommended"]
    flat = [f"--set={key}={json.dumps(value)}" for key, value in advice["settings"].items()]
    done = run_plan(*arguments, *flat, "--json")
    stages = json.loads(done.stdout)["stages"]
    assert max(sum(terms.values()) for terms in stages["distill"]["phases"].values()) == advice["peak"]
    assert "distill.gpus" not in json.loads(done.stdout)["does_not_fit"]


def test_engine_hf_is_recommended_where_its_gpus_divide_the_models(llama: str, tmp_path: Path) -> None:
    plan = read_plan("--preset", WIDTH, "--set", f"teacher={llama}")
    better = write_preset(tmp_path / "better.yaml", nest_sections(plan["recommended"]["settings"]))
    again = read_plan("--preset", WIDTH, "--preset", better, "--set", f"teacher={llama}")
    assert again["stages"]["distill"]["engine"] == "hf" and again["stages"]["distill"]["gpus"] == 8
    assert again["recommended"]["settings"] == {"engine": "hf"} and not again["does_not_fit"]
    assert again["stages"]["distill"]["seconds"] < plan["stages"]["distill"]["seconds"]


def test_what_nothing_holds_is_said() -> None:
    huge = LLAMA_3_1_8B | {"num_hidden_layers": 3000}
    document = merge({"teacher": "/t", "corpus": "/c"}, read_preset(WIDTH))
    faults = dict(find_memory_faults(make_plan(document), count_models(huge, PruneSettings()), GPUS["h100-80gb"]))
    assert "up to 64 of any of l4-24gb, " in faults["finetune.gpus"]
    assert recommend(make_plan(document), count_models(huge, PruneSettings()), GPUS["h100-80gb"]) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", WIDTH, "--gpu", "h200"], "error: GPU h200: unknown; give one of l4-24gb, a100-40gb, l40s-48gb, "),
        (["--preset", "tinny"], "error: preset tinny: no such file or preset; did you mean 'tiny'?"),
        ([], "error: teacher: missing; give it a value"),
        (["--set", "teacher=LLAMA", "--set", "distill.max_step=3"], "error: distill.max_step: unknown key; did you "),
    ],
)
def test_bad_input_is_one_line(llama: str, arguments: list[str], message: str) -> None:
    done = run_plan(*(argument.replace("LLAMA", llama) for argument in arguments))
    assert done.exit_code == 2 and message in done.output


@pytest.mark.parametrize("name", ["vocab_size", "intermediate_size", "num_hidden_layers"])
def test_a_size_that_is_missing_is_named(llama: str, name: str) -> None:
    path = Path(llama) / "config.json"
    path.write_text(json.dumps({key: value for key, value in LLAMA_3_1_8B.items() if key != name}))
    done = run_plan("--preset", WIDTH, "--set", f"teacher={llama}")
    assert done.exit_code == 2 and f"config.json has no {name}" in done.output


def test_a_teacher_that_cannot_be_read_yet_is_assumed_to_be_llama() -> None:
    done = run_plan("--preset", WIDTH, "--set", "teacher=ngc://org/team/llama:1.0")
    assert done.exit_code == 0 and "student 4.513 B" in done.output
    assert "warning: sizes are those of Llama-3.1-8B, until the teacher can be read: ngc://org" in done.output
