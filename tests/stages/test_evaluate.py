"""evaluate on real small models: its numbers against plain transformers, its tasks offline, bad input."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from lm_eval.models.huggingface import HFLM
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, LlamaModel

from minitron.config.metrics import SPEED_BATCH, SPEEDS
from minitron.config.parse import parse
from minitron.config.stages import EvaluateConfig
from minitron.data.indexed import IndexedDataset
from minitron.data.packed import PackedDataset
from minitron.engines.hf import measuring
from minitron.errors import ConfigError, RunError
from minitron.models import generation
from minitron.models.checkpoint import save_model
from minitron.models.generation import ROUNDS
from minitron.models.tasks import downstream, shared_context
from minitron.registry import gates, intervals
from minitron.stages import evaluate
from minitron.tracking.client import connect
from tests.constants import REPOSITORY

MODELS = ("teacher_before", "teacher", "pruned", "student")
SEQUENCES = 6
PROMPTS = ["bako dilu", "a b"]
TASK = "tiny_continuation"


def save_llama(like: Path, directory: Path, layers: int, seed: int) -> Path:
    """Save a random model of the tiny teacher's shape with fewer layers; large weights, so that models disagree."""
    config = LlamaConfig.from_pretrained(like)
    config.num_hidden_layers, config.initializer_range = layers, 0.2
    torch.manual_seed(seed)
    save_model(LlamaForCausalLM(config), directory, tokenizer_from=like)
    return directory


@pytest.fixture(scope="module")
def job(inputs: dict[str, Path], dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Four different models, and everything evaluate does with them."""
    base, root = inputs["teacher"], tmp_path_factory.mktemp("models")
    return {
        "teacher_before": str(base),
        "teacher": save_llama(base, root / "teacher", 4, seed=1),
        "pruned": save_llama(base, root / "pruned", 3, seed=2),
        "student": save_llama(base, root / "student", 2, seed=3),
        "dataset": dataset,
        "sequence_length": 32,
        "micro_batch_size": 4,
        "evaluation_sequences": SEQUENCES,
        "tasks": [TASK],
        "task_directory": inputs["evaluate.task_directory"],
        "task_limit": 15,
        "prompts": PROMPTS,
        "generation_tokens": 5,
    }


@pytest.fixture(scope="module")
def result(job: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("evaluate") / "evaluation"
    evaluate.run(EvaluateConfig(output=output, **job))
    return output


@pytest.fixture(scope="module")
def found(result: Path) -> dict[str, Any]:
    return json.loads((result / "evaluation.json").read_text())


def logits(directory: Path | str, rows: Tensor) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        return model(input_ids=rows).logits


def split(dataset: Path, name: str) -> tuple[Tensor, Tensor]:
    """The first sequences of a split, as PackedDataset (tested apart) gives them: inputs and next tokens [N, S]."""
    packed = PackedDataset(dataset / name, 32, seed=1234)
    items = [packed[index] for index in range(SEQUENCES)]
    return torch.stack([item["input_ids"] for item in items]), torch.stack([item["labels"] for item in items])


@pytest.mark.parametrize("model", MODELS)
def test_losses_are_those_of_plain_transformers(model: str, job: dict[str, Any], found: dict[str, Any]) -> None:
    for name in ("validation", "test"):
        rows, labels = split(job["dataset"], name)
        expected = F.cross_entropy(logits(job[model], rows).flatten(0, 1), labels.flatten())
        assert found[model][f"{name}_loss"] == pytest.approx(expected.item(), abs=1e-4)
        if name == "validation":
            assert found[model]["perplexity"] == pytest.approx(expected.exp().item(), rel=1e-4)


@pytest.mark.parametrize("model", MODELS)
def test_closeness_to_the_teacher_is_that_of_plain_pytorch(
    model: str, job: dict[str, Any], found: dict[str, Any]
) -> None:
    rows, _ = split(job["dataset"], "validation")
    guide, own = (logits(job[name], rows).flatten(0, 1).log_softmax(-1) for name in ("teacher", model))
    kl = F.kl_div(own, guide, reduction="batchmean", log_target=True)
    assert found[model]["kl"] == pytest.approx(kl.item(), abs=1e-4)
    agreement = (own.argmax(-1) == guide.argmax(-1)).double().mean()
    assert found[model]["top1_agreement"] == pytest.approx(agreement.item(), abs=1e-9)
    assert (found[model]["kl"] > 0.1) == (model != "teacher")


def likelihood(model: Any, tokenizer: Any, question: str, choice: str) -> float:
    """The log probability of " choice" after the question, which lm-eval joins by one space."""
    context = tokenizer(question)["input_ids"]
    answer = tokenizer(f"{question} {choice}")["input_ids"][len(context) :]
    with torch.no_grad():
        scores = model(input_ids=torch.tensor([context + answer])).logits[0].log_softmax(-1)
    return sum(scores[len(context) + place - 1, token].item() for place, token in enumerate(answer))


def count_right_answers(directory: Path | str, job: dict[str, Any]) -> dict[str, float]:
    """A model's accuracies on the task, with their standard errors."""
    network, tokenizer = (cls.from_pretrained(directory) for cls in (AutoModelForCausalLM, AutoTokenizer))
    rows = (job["task_directory"] / f"{TASK}.jsonl").read_text().splitlines()[: job["task_limit"]]
    right, right_per_character = [], []
    for row in map(json.loads, rows):
        scores = [likelihood(network, tokenizer, row["question"], choice) for choice in row["choices"]]
        per_character = [score / len(choice) for score, choice in zip(scores, row["choices"], strict=True)]
        right.append(float(scores.index(max(scores)) == row["label"]))
        right_per_character.append(float(per_character.index(max(per_character)) == row["label"]))
    expected = {}
    for metric, hits in (("acc", right), ("acc_norm", right_per_character)):
        mean = sum(hits) / len(hits)
        deviation = (sum((hit - mean) ** 2 for hit in hits) / (len(hits) - 1)) ** 0.5
        expected |= {metric: mean, f"{metric}_stderr": deviation / len(hits) ** 0.5}
    return expected


@pytest.mark.parametrize("model", ["teacher", "student"])
def test_task_accuracy_is_that_of_an_independent_count(model: str, job: dict[str, Any], found: dict[str, Any]) -> None:
    expected = count_right_answers(job[model], job)
    assert 0 < expected["acc"] < 1
    assert found[model]["tasks"] == {TASK: pytest.approx(expected, abs=1e-9)}


@pytest.mark.parametrize("model", MODELS)
def test_samples_are_greedy_continuations(model: str, job: dict[str, Any], found: dict[str, Any]) -> None:
    network, tokenizer = (cls.from_pretrained(job[model]) for cls in (AutoModelForCausalLM, AutoTokenizer))
    expected = []
    for prompt in PROMPTS:
        start = tokenizer(prompt)["input_ids"]
        tokens = list(start)
        while len(tokens) < len(start) + 5 and tokens[-1:] != [tokenizer.eos_token_id]:
            with torch.no_grad():
                tokens.append(network(input_ids=torch.tensor([tokens])).logits[0, -1].argmax().item())
        expected.append(tokenizer.decode(tokens[len(start) :], skip_special_tokens=True))
    assert found[model]["samples"] == expected
    assert found[model]["generation_tokens_per_second"] > 0


def test_sizes_gap_and_circumstances(job: dict[str, Any], found: dict[str, Any]) -> None:
    for model in MODELS:
        network = AutoModelForCausalLM.from_pretrained(job[model], dtype=torch.float32)
        count = sum(parameter.numel() for parameter in network.parameters())
        assert found[model]["parameters"] == count
        assert found[model]["weights_mb"] == pytest.approx(4 * count / 2**20, rel=0.01)
    pruned, student, teacher = (found[name]["validation_loss"] for name in ("pruned", "student", "teacher"))
    expected = (pruned - student) / (pruned - teacher) if pruned > teacher else None
    assert found["gap_closed"] == (expected and pytest.approx(expected))
    assert found["sequences"] == {"validation": SEQUENCES, "test": SEQUENCES}
    assert found["prompts"] == PROMPTS


def test_the_gap_is_the_share_of_the_damage_that_was_repaired() -> None:
    assert evaluate.compute_gap_closed(pruned=4.0, student=3.25, teacher=3.0) == pytest.approx(0.75)
    assert evaluate.compute_gap_closed(pruned=4.0, student=4.5, teacher=3.0) == pytest.approx(-0.5)
    assert evaluate.compute_gap_closed(pruned=3.0, student=2.5, teacher=3.0) is None


def test_the_layout_of_evaluation_json(found: dict[str, Any]) -> None:
    assert set(found) == {
        *MODELS, "gap_closed", "gap_closed_interval", "sequences", "prompts", "test_set", "champion", "gates", "passed",
        "contamination",
    }  # fmt: skip
    assert (found["champion"], found["gates"], found["passed"]) == (None, [], None)
    for model in MODELS:
        assert set(found[model]) == {
            "parameters", "validation_loss", "test_loss", "out_of_domain_loss", "perplexity", "kl", "top1_agreement",
            "tasks", "generation_tokens_per_second", "batch_generation_tokens_per_second", "weights_mb", "samples",
            "intervals", "differences",
        }  # fmt: skip


def test_every_question_sequence_and_round_is_kept(result: Path, job: dict[str, Any], found: dict[str, Any]) -> None:
    packed = (result / "items.json").read_text()
    assert len(packed) < 10_000
    items = intervals.unpack_items(json.loads(packed))
    assert items.keys() == set(MODELS)
    for model, metrics in items.items():
        own = found[model]
        assert np.mean(metrics["validation_loss"]) == pytest.approx(own["validation_loss"], rel=1e-5)
        assert len(metrics["test_loss"]) == len(metrics["kl"]) == SEQUENCES
        assert len(metrics[f"{TASK}_acc"]) == job["task_limit"]
        assert np.mean(metrics[f"{TASK}_acc"]) == pytest.approx(own["tasks"][TASK]["acc"])
        assert np.median(metrics["generation_tokens_per_second"]) == pytest.approx(
            own["generation_tokens_per_second"], rel=1e-5
        )
    rows, labels = split(job["dataset"], "validation")
    per_token = F.cross_entropy(logits(job["student"], rows).transpose(1, 2), labels, reduction="none")
    assert items["student"]["validation_loss"] == pytest.approx(per_token.mean(1).tolist(), abs=1e-4)


@pytest.mark.parametrize(
    "metric", ["validation_loss", "test_loss", "perplexity", "kl", "top1_agreement", f"{TASK}_acc"]
)
def test_every_value_lies_in_its_interval(metric: str, found: dict[str, Any]) -> None:
    for model in MODELS:
        low, high = found[model]["intervals"][metric]
        value = found[model].get(metric, found[model]["tasks"][TASK]["acc"])
        assert low <= value <= high and (low < high or (model, metric) == ("teacher", "kl") or value == 1)
    low, high = found["student"]["differences"]["validation_loss"]
    assert low < found["student"]["validation_loss"] - found["teacher"]["validation_loss"] < high
    alone = [
        end - start for start, end in (found[name]["intervals"]["validation_loss"] for name in ("student", "teacher"))
    ]
    assert high - low < sum(alone), "paired: what is hard for both does not count"


def test_the_record_has_every_number_under_one_name(result: Path, found: dict[str, Any]) -> None:
    metrics = json.loads((result / "stage.json").read_text())["metrics"]
    assert metrics["student_kl"] == found["student"]["kl"]
    assert metrics["pruned_test_loss"] == found["pruned"]["test_loss"]
    assert metrics[f"teacher_before_{TASK}_acc"] == found["teacher_before"]["tasks"][TASK]["acc"]
    assert metrics["parameters_ratio"] == found["student"]["parameters"] / found["teacher"]["parameters"]
    assert metrics.get("gap_closed") == found["gap_closed"]
    assert all(isinstance(value, int | float) for value in metrics.values())


def test_questions_in_the_training_text_are_counted(result: Path, job: dict[str, Any], found: dict[str, Any]) -> None:
    """As slow Python counts them."""
    train = IndexedDataset(Path(job["dataset"]) / "train")
    texts = [train[index].tolist() for index in range(len(train))]
    runs = {tuple(ids[start : start + 13]) for ids in texts for start in range(len(ids) - 12)}
    tokenizer = AutoTokenizer.from_pretrained(job["teacher"])
    lines = (Path(job["task_directory"]) / f"{TASK}.jsonl").read_text().splitlines()[: job["task_limit"]]
    count = 0
    for line in lines:
        text = json.loads(line)["question"]
        variants = [tokenizer.encode(start + text, add_special_tokens=False) for start in ("", " ")]
        count += any(tuple(ids[at : at + 13]) in runs for ids in variants for at in range(len(ids) - 12))
    share = count / len(lines)
    assert found["contamination"] == {TASK: {"questions": len(lines), "found": count, "share": share}}
    assert json.loads((result / "stage.json").read_text())["metrics"][f"contamination_{TASK}"] == share
    assert "Questions in the training text" in (result / "report.html").read_text()


def test_only_the_result_is_left(result: Path) -> None:
    assert sorted(path.name for path in result.parent.rglob("*")) == [
        "evaluation", "evaluation.json", "items.json", "lineage.json", "report.html", "stage.json",
    ]  # fmt: skip


def test_models_with_equal_weights_are_measured_once(
    job: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pruned model stands in for the student, from another directory; every forward pass is counted."""
    copy = save_llama(Path(job["teacher_before"]), tmp_path / "copy", 3, seed=2)
    calls: list[tuple[int, ...]] = []
    forward = LlamaModel.forward

    def counted(self: LlamaModel, *arguments: Any, **named: Any) -> Any:
        calls.append((self.config.num_hidden_layers, *named["input_ids"].shape))
        return forward(self, *arguments, **named)

    monkeypatch.setattr(LlamaModel, "forward", counted)
    settings = job | {"student": copy, "teacher": Path(job["teacher_before"]), "prompts": ["a b"]}
    evaluate.run(EvaluateConfig(output=tmp_path / "out", **settings))
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert found["teacher"] == found["teacher_before"] and found["student"] == found["pruned"]
    assert found["teacher"] != found["student"] and found["teacher"]["kl"] == 0
    for layers in (4, 3):
        # Six sequences, four at a time, of two splits; of five new tokens the first comes with the prompt. One text is
        # a sample, one warms up, the others are timed.
        assert [calls.count((layers, *shape)) for shape in ((4, 32), (2, 32), (1, 1))] == [2, 2, 4 * (2 + ROUNDS)]
        assert calls.count((layers, SPEED_BATCH, 1)) == 4 * (1 + ROUNDS)
    assert {layers for layers, *_ in calls} == {4, 3}


def test_the_command_is_quiet_greedy_offline_and_leaves_nothing(
    job: dict[str, Any], found: dict[str, Any], tmp_path: Path
) -> None:
    """With an empty Hugging Face home, no way out, and a generation_config.json that asks for sampling."""
    student = save_llama(Path(job["teacher_before"]), tmp_path / "student", 2, seed=3)
    wild = {"do_sample": True, "temperature": 5.0, "top_p": 0.9, "repetition_penalty": 3.0}
    path = student / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | wild))
    settings = job | {"student": student, "output": tmp_path / "out"}
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()}
    (tmp_path / "evaluate.yaml").write_text(yaml.safe_dump(plain))
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": "http://127.0.0.1:9"}
    command = [sys.executable, "-m", "minitron.evaluate", "--config", str(tmp_path / "evaluate.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert (
        json.loads((tmp_path / "out" / "evaluation.json").read_text())["student"]["samples"]
        == found["student"]["samples"]
    )
    bars = {line.split(":")[0] for line in done.stderr.replace("\r", "\n").splitlines() if line.strip()}
    assert bars == {"Loading weights", "validation", "test", *MODELS}, done.stderr
    assert not [path for path in (tmp_path / "home").rglob("*") if path.is_file()]
    before = (tmp_path / "out" / "stage.json").stat().st_mtime_ns
    assert evaluate.run(EvaluateConfig(**settings))["stage"] == "evaluate"
    assert (tmp_path / "out" / "stage.json").stat().st_mtime_ns == before, "a finished result was made again"


def random_requests(lengths: list[tuple[int, list[int]]]) -> list[tuple[Any, list[int], list[int]]]:
    """Questions and answers of given lengths, in a random order, as lm-eval hands them to a model."""
    rng = random.Random(0)
    requests = []
    for place, (question, answers) in enumerate(lengths):
        context = [rng.randrange(2, 512) for _ in range(question)]
        for length in answers:
            requests.append((("", f"{place}"), context, [rng.randrange(2, 512) for _ in range(length)]))
    rng.shuffle(requests)
    return requests


@pytest.mark.parametrize("per_pass", [1, 60, 100_000])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "mistral"])
def test_answers_that_share_a_question_score_as_if_alone(
    architecture: str, per_pass: int, job: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against lm-eval's own adapter, one text per pass: short and long questions, one beyond the model's 256 tokens."""
    shape = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, initializer_range=0.2, **shape)).eval()
    settings = {"pretrained": model, "tokenizer": AutoTokenizer.from_pretrained(job["teacher"])}
    requests = random_requests([(20, [4, 1, 1]), (1, [7, 3]), (50, [5, 5, 9, 2]), (250, [30, 3])])
    expected = HFLM(batch_size=1, **settings)._loglikelihood_tokens(requests, disable_tqdm=True)
    monkeypatch.setattr(shared_context, "FORWARD_TOKENS", {"cpu": per_pass})
    with tqdm(disable=True) as bar:
        found = shared_context.SharedContextLM(bar, batch_size=1, **settings)._loglikelihood_tokens(requests)
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=1e-3)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def test_without_tasks_and_test_documents(job: dict[str, Any], tmp_path: Path) -> None:
    """What there is nothing of is left empty: no task, and a corpus without a test split."""
    from minitron.data.indexed import IndexedWriter

    data = tmp_path / "data"
    data.mkdir()
    for path in Path(job["dataset"]).iterdir():
        (data / path.name).write_bytes(path.read_bytes())
    IndexedWriter(data / "test", 512).close()
    settings = job | {"dataset": data, "tasks": [], "task_directory": None, "prompts": ["a"]}
    record = evaluate.run(EvaluateConfig(output=tmp_path / "out", **settings))
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert all(found[model]["test_loss"] is None and found[model]["tasks"] == {} for model in MODELS)
    assert found["sequences"] == {"validation": SEQUENCES, "test": 0}
    assert "student_test_loss" not in record["metrics"]


@pytest.fixture(scope="module")
def judged(job: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """An evaluation against a champion, with text of another kind, and gates: its configuration, record and result."""
    root = tmp_path_factory.mktemp("judged")
    champion = save_llama(Path(job["teacher_before"]), root / "champion", 3, seed=4)
    texts = [f"dilu bako {number} a c d b" for number in range(400)]
    (root / "other.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    gates = [
        {"metric": "parameters", "against": "teacher", "by": "ratio", "at_most": 0.9},
        {"metric": "validation_loss", "against": "champion", "at_most": -100},
        {"metric": f"{TASK}_acc", "at_least": 0.0},
    ]
    settings = job | {"champion": str(champion), "out_of_domain": str(root / "other.jsonl"), "gates": gates}
    record = evaluate.run(EvaluateConfig(output=root / "out", **settings))
    return {"settings": settings, "record": record, "found": json.loads((root / "out" / "evaluation.json").read_text())}


def test_the_champion_is_measured_on_the_same_text(job: dict[str, Any], judged: dict[str, Any]) -> None:
    champion, settings = judged["found"]["champion"], judged["settings"]
    rows, labels = split(job["dataset"], "validation")
    expected = F.cross_entropy(logits(settings["champion"], rows).flatten(0, 1), labels.flatten())
    assert champion["validation_loss"] == pytest.approx(expected.item(), abs=1e-4)
    assert champion["tasks"] == {TASK: pytest.approx(count_right_answers(settings["champion"], job), abs=1e-9)}
    assert len(champion["samples"]) == len(PROMPTS)
    assert champion["address"] == settings["champion"]
    assert champion["sha256"] == judged["record"]["inputs"]["champion"]["sha256"]


def test_text_of_another_kind_is_scored_as_plain_transformers_does(job: dict[str, Any], judged: dict[str, Any]) -> None:
    """The stream of its documents, each with its EOS, in the seeded order, cut into sequences."""
    tokenizer = AutoTokenizer.from_pretrained(job["student"])
    lines = Path(judged["settings"]["out_of_domain"]).read_text().splitlines()
    documents, texts, tokens = [], [json.loads(line)["text"] for line in lines], 0
    while tokens < SEQUENCES * 32 + 1:
        documents.append([*tokenizer(texts[len(documents)])["input_ids"], tokenizer.eos_token_id])
        tokens += len(documents[-1])
    order = np.random.default_rng(1234).permutation(len(documents))
    stream = torch.tensor([token for place in order for token in documents[place]][: SEQUENCES * 32 + 1])
    for model in ("teacher", "student"):
        expected = F.cross_entropy(logits(job[model], stream[:-1].view(-1, 32)).flatten(0, 1), stream[1:])
        assert judged["found"][model]["out_of_domain_loss"] == pytest.approx(expected.item(), abs=1e-4)


def test_the_gates_are_judged_and_logged(judged: dict[str, Any], found: dict[str, Any]) -> None:
    rows, metrics = judged["found"]["gates"], judged["record"]["metrics"]
    assert [row["outcome"] for row in rows] == ["passed", "failed", "passed"] and judged["found"]["passed"] is False
    student, champion = (judged["found"][model]["validation_loss"] for model in ("student", "champion"))
    assert rows[1]["found"] == pytest.approx(student - champion)
    assert rows[2]["found"] == judged["found"]["student"]["tasks"][TASK]["acc"]
    assert (metrics["gates_met"], metrics["gates_missed"]) == (2, 1)
    assert metrics["champion_validation_loss"] == champion
    assert judged["found"]["test_set"] != found["test_set"], "it has text that the other has not"


def test_other_gates_do_not_make_another_test_set(job: dict[str, Any], found: dict[str, Any], tmp_path: Path) -> None:
    gates = [{"metric": "validation_loss", "against": "champion", "at_most": 0.0}]
    evaluate.run(EvaluateConfig(output=tmp_path / "out", **job | {"gates": gates}))
    again = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert again["test_set"] == found["test_set"]
    assert again["gates"][0]["outcome"] == "no champion" and again["passed"] is True


def write_task(directory: Path, rows: str, **changes: Any) -> Path:
    """Write a task of one question's shape under the name `own`."""
    directory.mkdir()
    (directory / "own.jsonl").write_text(rows)
    task = {
        "task": "own",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": "own.jsonl"}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{label}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (directory / "own.yaml").write_text(yaml.safe_dump(task | changes))
    return directory


ROW = '{"question": "a b", "choices": ["c", "d"], "label": 1}\n'


def expect_refusal(job: dict[str, Any], output: Path, **changes: Any) -> str:
    """Run a job that must be refused before a model is loaded, leaving nothing behind; return the message."""
    before = sorted(output.parent.iterdir())
    with pytest.raises(ConfigError) as caught:
        evaluate.run(EvaluateConfig(output=output, **job | changes))
    assert sorted(output.parent.iterdir()) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(path: Path) -> None:
        raise AssertionError(f"{path} was loaded")

    monkeypatch.setattr(measuring, "_load_model", load)


@pytest.mark.usefixtures("no_model")
class TestRefusedBeforeAModelIsLoaded:
    def test_an_unknown_task(self, job: dict[str, Any], tmp_path: Path) -> None:
        message = expect_refusal(job, tmp_path / "out", tasks=["tiny_continuatoin"])
        assert message == (
            f"evaluate.tasks: tiny_continuatoin is not a task in {job['task_directory']}; give one of tiny_continuation"
        )

    def test_a_directory_without_tasks(self, job: dict[str, Any], tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        message = expect_refusal(job, tmp_path / "out", task_directory=tmp_path / "empty")
        assert message == (
            f"evaluate.task_directory: {tmp_path / 'empty'} holds no task; give a directory with lm-eval's .yaml files"
        )

    def test_a_missing_directory(self, job: dict[str, Any], tmp_path: Path) -> None:
        message = expect_refusal(job, tmp_path / "out", task_directory=tmp_path / "none")
        assert message.startswith(f"{tmp_path / 'none'}: no such file or directory")

    def test_a_missing_data_file(self, job: dict[str, Any], tmp_path: Path) -> None:
        tasks = write_task(tmp_path / "tasks", ROW)
        (tasks / "own.jsonl").unlink()
        message = expect_refusal(job, tmp_path / "out", tasks=["own"], task_directory=tasks)
        assert message.startswith("evaluate.tasks: own cannot be loaded (FileNotFoundError: ")
        remedy = f"correct the files in {tasks}; its tasks can read only datasets beside them"
        assert "own.jsonl" in message and message.endswith(remedy)

    @pytest.mark.parametrize(
        ("rows", "changes", "named"),
        [
            (ROW, {"doc_to_text": "{{query}}"}, "query"),
            (ROW, {"doc_to_choice": "{{options}}"}, "options"),
            (ROW, {"test_split": "dev"}, "dev"),
            ("not JSON\n", {}, "JSON"),
        ],
    )
    def test_a_task_that_does_not_fit_its_data(
        self, rows: str, changes: dict[str, Any], named: str, job: dict[str, Any], tmp_path: Path
    ) -> None:
        tasks = write_task(tmp_path / "tasks", rows, **changes)
        message = expect_refusal(job, tmp_path / "out", tasks=["own"], task_directory=tasks)
        assert message.startswith("evaluate.tasks: own cannot be loaded (") and named in message

    def test_a_local_task_with_data_on_a_hub_is_not_fetched(self, job: dict[str, Any], tmp_path: Path) -> None:
        tasks = write_task(tmp_path / "tasks", ROW, dataset_path="org/name", dataset_kwargs={})
        message = expect_refusal(job, tmp_path / "out", tasks=["own"], task_directory=tasks)
        assert "offline" in message.lower() or "org/name" in message

    def test_a_tokenizer_of_another_model(self, job: dict[str, Any], tmp_path: Path) -> None:
        other = save_llama(Path(job["teacher_before"]), tmp_path / "other", 1, seed=4)
        tokenizer = json.loads((other / "tokenizer.json").read_text())
        (other / "tokenizer.json").write_text(json.dumps(tokenizer | {"truncation": None}, indent=1))
        message = expect_refusal(job, tmp_path / "out", pruned=other)
        assert message.startswith(f"{other}: tokenizer ") and str(job["dataset"]) in message

    def test_sequences_longer_than_a_model_takes(self, job: dict[str, Any], tmp_path: Path) -> None:
        message = expect_refusal(job, tmp_path / "out", sequence_length=257)
        assert message == (
            "evaluate.sequence_length: 257 is above max_position_embeddings 256 of teacher_before "
            f"{job['teacher_before']}; choose at most 256"
        )

    def test_a_split_shorter_than_a_sequence(self, job: dict[str, Any], tmp_path: Path) -> None:
        from minitron.data.indexed import IndexedWriter

        data = tmp_path / "data"
        data.mkdir()
        for path in Path(job["dataset"]).iterdir():
            (data / path.name).write_bytes(path.read_bytes())
        writer = IndexedWriter(data / "test", 512)
        writer.add_documents([[5, 6, 1]])
        writer.close()
        message = expect_refusal(job, tmp_path / "out", dataset=data)
        assert message.startswith(f"{data / 'test'}: 3 tokens are fewer than one sequence of 32 + 1")

    @pytest.mark.parametrize("prompts", [[], [""]])
    def test_no_prompt(self, prompts: list[str], job: dict[str, Any], tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"evaluate\.prompts"):
            parse("evaluate", job | {"prompts": prompts, "output": tmp_path / "out"})


def test_two_processes_measure_what_one_does(
    job: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sequences that do not divide, answers that are scored, and answers that are generated."""
    tasks = write_task(
        tmp_path / "tasks",
        "".join(json.dumps({"question": f"a b {word}", "label": word}) + "\n" for word in "cdefg"),
        **CODE | {"unsafe_code": False, "metric_list": [{"metric": "exact_match", "aggregation": "mean"}]},
    )
    shutil.copytree(job["task_directory"], tasks, dirs_exist_ok=True)
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({"text": f"a b {number} c d"}) + "\n" for number in range(200)))
    changes = {"tasks": [TASK, "own"], "task_directory": tasks, "evaluation_sequences": 5, "out_of_domain": str(other)}
    evaluate.run(EvaluateConfig(output=tmp_path / "one", **job | changes))
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.setattr(evaluate, "_count_processes", lambda config: 2)
    monkeypatch.setattr(measuring, "_load_model", pytest.fail)
    evaluate.run(EvaluateConfig(output=tmp_path / "two", **job | changes))
    one, two = (json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("one", "two"))
    for model in MODELS:
        assert two[model]["tasks"] == {task: pytest.approx(one[model]["tasks"][task]) for task in (TASK, "own")}
        assert two[model]["samples"] == one[model]["samples"]
        for metric in ("validation_loss", "test_loss", "out_of_domain_loss", "kl", "top1_agreement"):
            assert two[model][metric] == pytest.approx(one[model][metric], abs=1e-6)
            assert two[model]["intervals"][metric] == pytest.approx(one[model]["intervals"][metric], abs=1e-6)
    assert two["contamination"] == one["contamination"] and two["sequences"] == one["sequences"]
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == sorted(
        path.name for path in (tmp_path / "one").iterdir()
    )


CODE = {"output_type": "generate_until", "doc_to_target": "{{label}}", "doc_to_choice": None}
CODE |= {"generation_kwargs": {"max_gen_toks": 4, "until": ["\n"]}, "unsafe_code": True}
FUNCTIONS = """
def pass_at_k(references, predictions, k=(1,)):
    return {f"pass@{n}": 0.5 for n in k}
"""


def write_code_task(directory: Path, **changes: Any) -> Path:
    """Write a task as humaneval is: it runs generated code, and its metric is pass@1."""
    tasks = write_task(directory, ROW * 2, **CODE | changes)
    text = (tasks / "own.yaml").read_text()
    begin = text.index("metric_list:")
    end = text.index("output_type:")
    metric = "metric_list:\n- {metric: !function utils.pass_at_k, aggregation: mean, higher_is_better: true, k: [1]}\n"
    (tasks / "own.yaml").write_text(text[:begin] + metric + text[end:])
    (tasks / "utils.py").write_text(FUNCTIONS)
    return tasks


@pytest.mark.usefixtures("no_model")
def test_a_task_that_runs_code_is_refused_first(job: dict[str, Any], tmp_path: Path) -> None:
    tasks = write_code_task(tmp_path / "tasks")
    (tasks / "utils.py").write_text("raise SystemExit('it was run')\n")  # not even loaded
    message = expect_refusal(job, tmp_path / "out", tasks=["own"], task_directory=tasks)
    assert message == (
        "evaluate.tasks: own runs code that the models write; remove it, or add it to evaluate.unsafe_tasks if "
        "that code can do no harm"
    )


def test_a_task_that_is_named_may_run_code_and_its_metric_reaches_mlflow(
    job: dict[str, Any], tmp_path: Path, mlflow_file: str
) -> None:
    """The name pass@1 stays in evaluation.json and in gates; only MLflow, which refuses it, has another."""
    tasks = write_code_task(tmp_path / "tasks")
    gate = {"metric": "own_pass@1", "against": "teacher_before", "at_least": 0.0}
    settings = job | {"tasks": ["own"], "unsafe_tasks": ["own"], "task_directory": tasks, "gates": [gate]}
    record = evaluate.run(
        EvaluateConfig(output=tmp_path / "out", tracking_uri=mlflow_file, experiment="code", **settings)
    )
    assert record["metrics"]["student_own_pass@1"] == 0.5
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert found["gates"][0]["outcome"] == "passed" and found["student"]["tasks"]["own"]["pass@1"] == 0.5
    metrics = connect(mlflow_file).get_run(record["mlflow_run_id"]).data.metrics
    assert metrics["student_own_pass_at_1"] == 0.5 and metrics["student_kl"] == record["metrics"]["student_kl"]


def write_examples_task(directory: Path, **changes: Any) -> Path:
    """Write a task of four questions, and eight solved ones in a split of their own."""
    rows = "".join(json.dumps({"question": f"q{n}", "choices": ["c", "d"], "label": n % 2}) + "\n" for n in range(4))
    tasks = write_task(directory, rows, **changes)
    (tasks / "train.jsonl").write_text(rows.replace(': "q', ': "example '))
    return tasks


def test_examples_stand_before_every_question_the_same_for_every_model(
    job: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"data_files": {"test": "own.jsonl", "train": "train.jsonl"}}
    tasks = write_examples_task(tmp_path / "tasks", dataset_kwargs=files, training_split="train", test_split="test")
    contexts: list[list[str]] = []
    score = shared_context.SharedContextLM.loglikelihood

    def record(self: Any, requests: list[Any], *arguments: Any) -> Any:
        contexts.append([request.args[0] for request in requests])
        return score(self, requests, *arguments)

    monkeypatch.setattr(shared_context.SharedContextLM, "loglikelihood", record)
    settings = job | {"tasks": ["own"], "task_directory": tasks, "num_fewshot": {"own": 3}, "task_limit": None}
    evaluate.run(EvaluateConfig(output=tmp_path / "out", **settings))
    assert len(contexts) == len(MODELS) and all(context == contexts[0] for context in contexts)
    assert {context.count("example ") for context in contexts[0]} == {3}
    assert {context.split("\n\n")[-1] for context in contexts[0]} == {"q0", "q1", "q2", "q3"}
    assert all(line[-1] in "cd" for line in contexts[0][0].split("\n\n")[:-1]), "an example has its answer"


@pytest.mark.usefixtures("no_model")
def test_examples_that_would_be_the_questions_are_refused(job: dict[str, Any], tmp_path: Path) -> None:
    tasks = write_examples_task(tmp_path / "tasks")
    message = expect_refusal(job, tmp_path / "out", tasks=["own"], task_directory=tasks, num_fewshot=2)
    assert message == (
        "evaluate.num_fewshot: own has no examples apart from its questions; give the task a training_split or "
        "fewshot_split, or set its number to 0"
    )


@pytest.mark.parametrize("setting", [{"num_fewshot": {"mmlu": 5}}, {"unsafe_tasks": ["mmlu"]}])
def test_a_setting_for_a_task_that_is_not_run_is_refused(setting: dict[str, Any], job: dict[str, Any]) -> None:
    with pytest.raises(
        ConfigError, match=rf"evaluate\.{next(iter(setting))}: mmlu is not in evaluate\.tasks \({TASK}\)"
    ):
        parse("evaluate", job | setting | {"output": "out"})


def test_two_models_of_one_shape_are_equally_fast(
    job: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More rounds than usual, so that chance does not decide; a gate on their ratio holds both ways."""
    monkeypatch.setattr(generation, "ROUNDS", 16)
    twin = save_llama(Path(job["teacher_before"]), tmp_path / "twin", 2, seed=9)
    bounds = [{"at_least": 1.0}, {"at_most": 1.0}]
    declared = [
        {"metric": metric, "against": "champion", "by": "ratio"} | bound for metric in SPEEDS for bound in bounds
    ]
    settings = job | {"tasks": [], "task_directory": None, "champion": str(twin), "gates": declared}
    evaluate.run(EvaluateConfig(output=tmp_path / "out", **settings | {"generation_tokens": 12}))
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert found["passed"] is True, [gates.describe_gate(row) for row in found["gates"]]
    assert all(row["interval"][0] <= 1 <= row["interval"][1] for row in found["gates"])


def test_an_unknown_task_of_the_catalog_is_answered_with_the_closest() -> None:
    """The catalog itself, which takes ten seconds to read, is left out."""
    message = downstream._explain_unknown_task("helaswag", ["hellaswag", "arc_easy"], None)
    assert message == (
        "evaluate.tasks: helaswag is not a task of lm-eval; give hellaswag, or a task_directory of your own"
    )


def test_damaged_weights_end_the_run_and_leave_nothing(job: dict[str, Any], tmp_path: Path) -> None:
    broken = save_llama(Path(job["teacher_before"]), tmp_path / "broken", 1, seed=5)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(RunError, match="weights cannot be read"):
        evaluate.run(EvaluateConfig(output=tmp_path / "out", **job | {"student": broken}))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken"]


@pytest.mark.parametrize("fault", ["tokenizer", "max_position_embeddings"])
def test_a_champion_that_cannot_read_the_data_is_left_out(
    job: dict[str, Any], tmp_path: Path, fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    champion = save_llama(Path(job["teacher_before"]), tmp_path / "champion", 2, seed=5)
    file = champion / ("tokenizer.json" if fault == "tokenizer" else "config.json")
    content = json.loads(file.read_text())
    if fault == "tokenizer":
        content["added_tokens"] = []
    file.write_text(json.dumps(content | ({} if fault == "tokenizer" else {fault: 16})))
    gates = [{"metric": "validation_loss", "against": "champion", "at_most": 9.0}]
    settings = job | {"tasks": [], "task_directory": None, "champion": str(champion), "gates": gates}
    record = evaluate.run(EvaluateConfig(output=tmp_path / "out", **settings))
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert "not compared with the champion: " in capsys.readouterr().err
    assert found["champion"].keys() == {"address", "sha256", "tasks"} and found["passed"] is False
    assert found["gates"][0]["outcome"] == "not measured" and record["metrics"]["gates_missed"] == 1
    assert "not measured" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize("workspace", ["workspace", None])
def test_a_mistake_in_a_gate_throws_no_measurement_away(
    workspace: str | None, job: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = [{"metric": f"{TASK}_accuracy", "at_least": 0.5}]
    settings = job | {"output": tmp_path / "out", "workspace": workspace and tmp_path / workspace}
    with pytest.raises(ConfigError, match=f"{TASK}_accuracy is not measured; give one of {TASK}_acc, {TASK}_acc_"):
        evaluate.run(EvaluateConfig(**settings, gates=wrong))
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(measuring, "_load_model", pytest.fail)
    monkeypatch.setattr(measuring, "load_tasks", pytest.fail)
    gates = [{"metric": f"{TASK}_acc", "at_least": 0.0}]
    evaluate.run(EvaluateConfig(**settings, gates=gates))
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert found["passed"] is True and found["student"]["tasks"][TASK].keys() >= {"acc", "acc_stderr"}
    if workspace is None:
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
    else:
        evaluate.run(EvaluateConfig(**settings, gates=[{"metric": "kl", "at_most": -1.0}]))
        again = json.loads((tmp_path / "out" / "evaluation.json").read_text())
        assert again["passed"] is False and again["student"] == found["student"]


def test_a_killed_evaluation_measures_only_what_is_missing(
    job: dict[str, Any], found: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[Path] = []
    load, score = measuring._load_model, measuring.score_tasks

    def interrupt(config: Any, tasks: Any, model: Any, tokenizer: Any, description: str) -> Any:
        if description.startswith("pruned"):
            raise KeyboardInterrupt
        return score(config, tasks, model, tokenizer, description)

    monkeypatch.setattr(measuring, "_load_model", lambda path: loaded.append(path) or load(path))
    config = EvaluateConfig(output=tmp_path / "out", workspace=tmp_path / "workspace", **job)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(measuring, "score_tasks", interrupt)
        evaluate.run(config)
    assert loaded == [Path(job[name]) for name in MODELS]
    evaluate.run(config)
    assert loaded[4:] == [job["pruned"], job["student"]]
    again = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    for model in MODELS:
        assert again[model]["tasks"] == found[model]["tasks"] and again[model]["samples"] == found[model]["samples"]
        assert again[model]["intervals"]["kl"] == found[model]["intervals"]["kl"]
    evaluate.run(config.model_copy(update={"caching": False}))
    assert len(loaded) == 6 + 4, "caching: false measures anew"


@pytest.mark.parametrize("place", ["teacher", "student", "champion"])
def test_a_model_whose_loss_is_not_a_number_is_not_measured(
    place: str, job: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A champion is left out, so that gates against it are not met; any other ends the stage, which names it."""
    broken = save_llama(job["teacher"], tmp_path / "broken", 2, seed=4)
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"] *= 1e30  # finite, but they overflow where they meet
    weights["lm_head.weight"] *= 1e30
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    gates = [{"metric": "validation_loss", "against": "champion", "at_most": 0.0}]
    values = job | {"output": tmp_path / "out", "tasks": [], "task_directory": None, "gates": gates}
    config = EvaluateConfig(**values | {place: str(broken) if place == "champion" else broken})
    message = (
        f"evaluate: {broken}: {place}.validation_loss is (nan|inf); the weights are damaged, or a training diverged"
    )
    if place == "champion":
        evaluate.run(config)
        assert re.search(f"warning: {message}: not compared with the champion\n", capsys.readouterr().err)
        found = json.loads((tmp_path / "out" / "evaluation.json").read_text(), parse_constant=pytest.fail)
        assert found["gates"][0]["outcome"] == "not measured" and found["passed"] is False
    else:
        with pytest.raises(RunError, match=f"^{message}; make the model again with a lower learning_rate$") as caught:
            evaluate.run(config)
        assert caught.value.exit_status == 1 and not (tmp_path / "out").exists()
