"""The model card: what Hugging Face's hub reads of it, and what a person does."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from minitron.config.parse import parse
from minitron.config.stages import RegisterConfig
from minitron.report.card import write_card
from tests.report.evaluations import EVALUATION, make_gated_evaluation

RECORD = {"started": 0.0, "seconds": 90.0, "seed": 7, "versions": {"minitron": "0.1.0"}, "metrics": {}}
INPUTS = {
    "corpus": {"address": "hf://org/text/plain", "sha256": "c0/plain", "pinned": "hf://org/text@c0/plain"},
    "teacher": {"address": "hf://meta/llama@main", "sha256": "ab12", "pinned": "hf://meta/llama@d4"},
}
STAGES = {
    "prepare": RECORD | {"stage": "prepare", "inputs": INPUTS, "image": "registry/trainer:1", "mlflow_run_id": "run3"},
    "distill": RECORD | {"stage": "distill", "inputs": {}, "metrics": {"tokens": 31_000}, "output_sha256": "ff00"},
}
LICENSES = {
    "data": "CC BY-SA 4.0",
    "teacher": {"license": "other", "license_name": "llama3.1", "license_link": "LICENSE"},
}


@pytest.fixture
def config(tmp_path: Path) -> RegisterConfig:
    paths = dict.fromkeys(("output", "student", "evaluation", "dataset"), tmp_path)
    return parse("register", paths | {"name": "small", "tracking_uri": "sqlite:///x"})  # type: ignore[return-value]


def write_test_card(config: RegisterConfig, evaluation: dict[str, Any], **origin: Any) -> ModelCard:
    path = config.output / "README.md"
    write_card(path, config, evaluation, {"stages": STAGES, "licences": LICENSES} | origin)
    return ModelCard.load(path)


def test_the_hub_reads_the_front_matter(config: RegisterConfig) -> None:
    data = write_test_card(config, EVALUATION).data
    assert (data.license, data.license_name, data.license_link) == ("other", "llama3.1", "LICENSE")
    assert (data.base_model, data.datasets, data.library_name) == ("meta/llama", ["org/text"], "transformers")
    assert data.pipeline_tag == "text-generation" and {"pruning", "distillation"} <= set(data.tags)
    assert data.model_name == "small"
    found = {(result.dataset_type, result.metric_name): result.metric_value for result in data.eval_results}
    assert found == {
        ("corpus", "validation loss"): 3.0,
        ("corpus", "perplexity"): 30.0,
        ("arc", "acc"): 0.5,
        ("arc", "acc_norm"): 0.51,
    }


def test_markdown_that_knows_no_front_matter_makes_no_heading_of_it(config: RegisterConfig) -> None:
    write_test_card(config, EVALUATION)
    tokens = MarkdownIt().parse((config.output / "README.md").read_text())
    headings = [following.content for token, following in pairwise(tokens) if token.type == "heading_open"]
    assert headings[0] == "small" and "Results" in headings and not any("written" in text for text in headings)


def test_the_text_has_results_provenance_and_licenses(config: RegisterConfig) -> None:
    text = write_test_card(config, make_gated_evaluation()).text
    assert "90.21 M parameters, compressed from one of 134.5 M" in text
    assert (
        "| Validation loss (nats per token) | 2.500 [2.450 to 2.550] (+0.500 ▼) | 2.000 [1.950 to 2.050] | 6." in text
    )
    assert "| Parameters | 134.5 M (+0.0 %) | 134.5 M | 90.21 M (−32.9 % ▲)" in text
    assert "| arc (accuracy) | 58.0 % [48.0 to 68.0 %] (−2.0 points) | 60.0 % [50.0 to 70.0 %] | 30.0 % [20.0" in text
    assert "| arc, accuracy, length-normalized | 51.0 % | – | 51.0 % (41.3 to 60.6 %) | at least 53.0 %" in text
    assert "| Teacher | `hf://meta/llama@d4` |" in text and "| Corpus, content | `c0/plain` |" in text
    assert "image `registry/trainer:1`, MLflow run `run3` |" in text and "31 k tokens, seed 7" in text
    assert "- Teacher: llama3.1 (LICENSE).\n- Corpus: CC BY-SA 4.0.\n" in text
    assert "Warning" not in text and "models:/small@challenger" in text


@pytest.mark.parametrize(
    ("data", "teacher", "words"),
    [
        ("unknown", "unknown", "neither license is known"),
        ("unknown", "mit", "the license of the corpus is not known"),
        ("CC0", "unknown", "the license of the teacher is not known"),
    ],
)
def test_an_unknown_license_is_a_warning(config: RegisterConfig, data: str, teacher: str, words: str) -> None:
    card = write_test_card(config, EVALUATION, licences={"data": data, "teacher": {"license": teacher}})
    assert f"**Warning:** {words}" in card.text
    assert card.data.license == teacher


def test_what_only_this_machine_knows_is_not_indexed(config: RegisterConfig) -> None:
    local = {name: {"address": "/data/x", "sha256": "ab"} for name in INPUTS}
    data = write_test_card(config, EVALUATION, stages={"prepare": STAGES["prepare"] | {"inputs": local}}).data
    assert data.base_model is None and data.datasets is None


def test_a_table_and_a_front_matter_are_not_broken_by_what_they_hold(config: RegisterConfig) -> None:
    evaluation = json.loads(json.dumps(EVALUATION).replace('"arc"', '"a|b: [c"'))
    card = write_test_card(config, evaluation, licences={"data": "a\n---\nb: c", "teacher": {"license": "x: [y\n---"}})
    assert card.data.license == "x: [y\n---"
    assert "| a\\|b: [c (accuracy) |" in card.text
    rows = [line for line in card.text.splitlines() if line.startswith("| ")]
    assert {line.replace("\\|", "").count("|") for line in rows[:8]} == {6}


def test_an_evaluation_without_teacher_still_has_a_card(config: RegisterConfig) -> None:
    card = write_test_card(config, {"student": {"parameters": 213_568}}, stages={})
    assert "A language model of 213.6 k parameters:" in card.text


def test_questions_in_the_training_text_are_reported(config: RegisterConfig) -> None:
    assert "Questions that are in the training text" not in write_test_card(config, EVALUATION).text
    counts = {"questions": 200, "found": 3, "share": 0.015}
    card = write_test_card(config, EVALUATION | {"contamination": {"arc": counts, "piqa": counts}})
    assert "arc 3 of 200 (1.5 %)," in card.text and "piqa 3 of 200 (1.5 %)." in card.text


def test_several_corpora_are_named_one_by_one(config: RegisterConfig) -> None:
    parts = [INPUTS["corpus"], {"address": "/data/own", "sha256": "ee"}]
    corpus = {"address": "[…]", "sha256": "both", "parts": parts}
    uses = [{"share": 0.75, "passes": 1.0}, {"share": 0.25, "passes": 2.5, "licence": "CC0"}]
    record = STAGES["prepare"] | {"inputs": INPUTS | {"corpus": corpus}, "corpora": uses}
    card = write_test_card(config, EVALUATION, stages=STAGES | {"prepare": record})
    assert card.data.datasets == ["org/text"]
    assert "| Corpus 1, 75.0 % of the tokens | `hf://org/text@c0/plain` |" in card.text
    assert "| Corpus 2, 25.0 % of the tokens | `/data/own` |" in card.text
    assert "- Corpus 1: unknown.\n- Corpus 2: CC0.\n" in card.text and "Warning" not in card.text
    licenses = LICENSES | {"data": "unknown; CC0"}
    card = write_test_card(config, EVALUATION, stages=STAGES | {"prepare": record}, licences=licenses)
    assert "**Warning:** the license of the corpus is not known" in card.text
