"""The report: offline, escaped, complete, and its plots hold the data of real stages."""

import json
import re
import shutil
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from minitron.config import metrics
from minitron.config.metrics import SPEED
from minitron.config.stages import EvaluateConfig, PruneConfig
from minitron.registry import gates
from minitron.report import charts
from minitron.report.page import write_report
from minitron.stages import prune
from minitron.storage.layout import IMPORTANCE, MANIFEST
from tests.constants import SEQUENCE, STEPS
from tests.report.evaluations import EVALUATION, change_evaluation, judge_evaluation, make_gated_evaluation

SEQUENCES = {"sequence_length": SEQUENCE, "micro_batch_size": 4}


class Page(HTMLParser):
    """What a browser would find: tags, attributes, text by section, tooltips and styles."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html, self.tags, self.attributes, self.styles = html, [], [], []
        self.titles: list[str] = []
        self.links: list[str] = []
        self.text: dict[str, str] = {}
        self._section, self._tag = "", ""
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self._tag = tag
        self.tags.append(tag)
        self.attributes += attributes
        self.links += [value for name, value in attributes if (tag, name) == ("a", "href") and value]
        if tag in ("section", "header"):
            self._section = dict(attributes)["id"] or ""

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)

    def handle_endtag(self, tag: str) -> None:
        self._tag = ""
        if tag in ("section", "header"):
            self._section = ""

    def handle_data(self, data: str) -> None:
        if self._tag == "style":
            self.styles.append(data)
        elif self._tag == "title":
            self.titles.append(data)
        words = self.text.get(self._section, "")
        self.text[self._section] = " ".join([*words.split(), *data.split()])

    def read_attributes(self, *names: str) -> list[str]:
        return [value or "" for name, value in self.attributes if name in names]


@pytest.fixture(scope="module")
def page(compressed: EvaluateConfig, tmp_path_factory: pytest.TempPathFactory) -> Page:
    return write_page(tmp_path_factory.mktemp("page"), compressed, EVALUATION)


def write_page(directory: Path, config: EvaluateConfig, evaluation: dict[str, Any]) -> Page:
    write_report(directory, config, evaluation)
    return Page((directory / "report.html").read_text(encoding="utf-8"))


def read_record(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "stage.json").read_text())


@pytest.fixture
def bare(compressed: EvaluateConfig, tmp_path: Path) -> EvaluateConfig:
    """Models and a dataset that no stage of ours wrote."""
    paths = {name: tmp_path / name for name in ("dataset", "teacher", "pruned", "student")}
    for path in paths.values():
        path.mkdir()
    return compressed.model_copy(update=paths)


def test_opens_offline(page: Page) -> None:
    assert not {"script", "link", "iframe", "object", "base"} & set(page.tags)
    references = page.read_attributes("src", "href", "xlink:href", "srcset", "action", "data")
    assert references
    loaded = [reference for reference in references if not reference.startswith(("#", "data:image/png;base64,"))]
    assert [reference for reference in loaded if reference not in page.links] == []
    styles = " ".join(page.styles + page.read_attributes("style", "clip-path", "fill"))
    assert "@import" not in styles
    assert set(re.findall(r"url\(\s*['\"]?(.)", page.html)) == {"#"}
    assert "http" not in styles


def test_it_leads_to_mlflow_without_a_password(compressed: EvaluateConfig, tmp_path: Path) -> None:
    student = shutil.copytree(compressed.student, tmp_path / "student")
    (student / "stage.json").write_text(json.dumps(read_record(student) | {"mlflow_run_id": "f00d"}))
    uri = "https://me:secret@mlflow.example/sub/"
    page = write_page(tmp_path, compressed.model_copy(update={"tracking_uri": uri, "student": student}), EVALUATION)
    outward = [link for link in page.links if not link.startswith("#")]
    assert outward == ["https://mlflow.example/sub", "https://mlflow.example/sub/#/runs/f00d"]
    assert "secret" not in page.html


def test_ids_are_unique_and_references_have_a_target(page: Page) -> None:
    ids = page.read_attributes("id")
    assert len(ids) == len(set(ids))
    targets = re.findall(r"url\(#([^)]*)\)", page.html) + [
        value[1:] for value in page.read_attributes("href", "xlink:href") if value.startswith("#")
    ]
    assert targets
    assert set(targets) <= set(ids)


def test_figures_are_described_and_follow_the_page(page: Page) -> None:
    figures = re.findall(r"<svg[^>]*>", page.html)
    assert len(figures) == 2 + 4 + 5
    assert all('role="img"' in figure and 'aria-label="' in figure for figure in figures)
    assert not any(' width="' in figure for figure in figures)
    for color in (charts.INK, charts.BLUE):
        assert color not in page.html.partition("<body>")[2]


def test_headline(page: Page) -> None:
    text = page.text["verdict"]
    assert "67.1 % of the parameters, 75.0 % of the gap closed" in text  # 90214488 / 134515008
    assert "The distilled student has 90.21 M parameters, the corrected teacher 134.5 M." in text
    assert (
        "validation loss is 1.000 (95 % interval: 0.970 to 1.030) nats per token above the corrected teacher's; its "
        "perplexity is 30.0 against 20.0." in text
    )
    assert "Generation speed 1.50× 30.0 tokens/s, corrected teacher 20.0" in text


@pytest.mark.parametrize(
    ("gap", "loss", "words"),
    [
        (
            None,
            1.5,
            "gap to close. The student's validation loss is 0.500 (95 % interval: 0.400 to 0.600) nats per token below",
        ),
        (-0.25, 7.0, "the gap in validation loss after pruning grew by 25.0 %"),
    ],
)
def test_headline_without_a_gain(
    compressed: EvaluateConfig, tmp_path: Path, gap: float | None, loss: float, words: str
) -> None:
    changes = {"student__validation_loss": loss, "student__differences": {"validation_loss": [-0.6, -0.4]}}
    page = write_page(tmp_path, compressed, change_evaluation(gap_closed=gap, **changes))
    assert words in page.text["verdict"]
    assert "of the gap closed" not in page.text["verdict"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "1.5× smaller, 1.5× faster; loses 10.0 points of arc"),
        ({"student__tasks": {"arc": {"acc": 0.65}}}, "1.5× smaller, 1.5× faster; gains 5.0 points of arc"),
        ({f"student__{SPEED}": 16.0}, "1.5× smaller, 0.8× as fast; loses"),
        ({f"student__{SPEED}": None, "teacher__tasks": {}}, "1.5× smaller; validation loss 1.000 nats higher"),
        (
            {"student__differences": {"arc_acc": [-0.02, 0.01]}},
            "1.5× smaller, 1.5× faster; validation loss 1.000 nats higher, accuracy the same within the error",
        ),
    ],
)
def test_the_title_is_for_readers_who_were_not_there(
    compressed: EvaluateConfig, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    page = write_page(tmp_path, compressed, change_evaluation(**changes))
    assert words in page.text["verdict"]


def test_table_of_models(page: Page) -> None:
    text = page.text["models"]
    assert "Parameters 134.5 M +0.0 % 134.5 M 90.21 M ▲ −32.9 % 90.21 M ▲ −32.9 %" in text
    assert "Validation loss nats per token 2.500 2.450 to 2.550 ▼ +0.500 2.000 1.950 to 2.050 6.000 5.950 to " in text
    assert "tokens per second, one text at a time 20.0 +0.0 % 20.0 25.0 ▲ +25.0 % 30.0 ▲ +50.0 %" in text
    assert "same most likely next token 40.0 % 50.0 % 16.7 % 33.3 %" in text
    assert "arc accuracy 58.0 % 48.0 to 68.0 % −2.0 points 60.0 % 50.0 to 70.0 % 30.0 % 20.0 to 40.0 % ▼ −30.0" in text


def test_a_difference_within_the_error_is_neither_better_nor_worse(compressed: EvaluateConfig, tmp_path: Path) -> None:
    doubt = {"validation_loss": (-0.2, 1.2), "arc_acc": (-0.3, 0.1), SPEED: (-1.0, 20.0)}
    evaluation = change_evaluation(student__differences=doubt, gap_closed_interval=(-0.1, 1.6))
    text = write_page(tmp_path, compressed, evaluation).text
    assert "3.000 2.950 to 3.050 +1.000" in text["models"] and "50.0 % 40.0 to 60.0 % −10.0 points" in text["models"]
    assert "30.0 +50.0 %" in text["models"] and "3.050 ▼" not in text["models"]
    assert "no measurable part of the gap in validation loss after pruning: 75.0 % (95 % i" in text["verdict"]
    assert "above the corrected teacher's, which is within the error; its perplexity" in text["verdict"]


def test_a_distillation_that_did_nothing_is_said_first(compressed: EvaluateConfig, page: Page, tmp_path: Path) -> None:
    student = shutil.copytree(compressed.student, tmp_path / "student")
    record = read_record(student)
    record["metrics"]["best_step"] = 0
    (student / "stage.json").write_text(json.dumps(record))
    idle = write_page(tmp_path, compressed.model_copy(update={"student": student}), EVALUATION)
    words = f"Distillation did nothing: none of its {STEPS} steps had a lower validation loss than the pruned student"
    assert words in idle.text["verdict"] and "did nothing" not in page.html


def test_two_validation_losses_are_told_apart(compressed: EvaluateConfig, page: Page, tmp_path: Path) -> None:
    """The trainings of these models validate on 8 sequences, this evaluation on 640 or 8."""
    words = (
        "This training validates on 8 sequences, but the evaluation above on 640, so the two validation losses differ."
    )
    assert page.text["training"].count(words) == 2 and "(640 validation, 320 test sequences)" in page.text["comparison"]
    same = change_evaluation(sequences={"validation": 8, "test": 8})
    assert "another number" not in write_page(tmp_path, compressed, same).text["training"]


def test_a_value_that_was_not_measured_is_left_out(compressed: EvaluateConfig, tmp_path: Path) -> None:
    nothing = {f"{name}__test_loss": None for name in ("teacher_before", "teacher", "pruned", "student")}
    page = write_page(
        tmp_path, compressed, change_evaluation(**nothing, student__tasks={}, pruned__perplexity=float("inf"))
    )
    assert "Test loss" not in page.text["models"]
    assert "Perplexity 25.0 ▼ +5.0 20.0 – 30.0 ▼ +10.0" in page.text["models"]
    assert "95 % interval The values that another sample" in page.text["words"]
    assert len([title for title in page.titles if "validation:" in title]) == 4
    assert not [title for title in page.titles if title.startswith("Distilled student, arc")]


def test_bars_have_the_values_and_error_bars(page: Page) -> None:
    assert "Pruned student, validation: 6.000 (5.950 to 6.050)" in page.titles
    assert "Distilled student, test: 3.250" in page.titles
    assert "Distilled student, arc: 50.0 (40.0 to 60.0)" in page.titles
    assert len([title for title in page.titles if re.match(r".*, (validation|test|arc): ", title)]) == 4 * 3


def read_points(html: str, name: str) -> list[list[tuple[float, float]]]:
    """The corners of the first path in every group of a name, in the page's coordinates."""
    groups = re.findall(rf'<g class="{name}">\s*(?:<defs>.*?</defs>\s*)?<path d="([^"]*)"', html, re.DOTALL)
    return [[(float(x), float(y)) for x, y in re.findall(r"[ML] (\S+) (\S+)", group)] for group in groups]


def test_curves_hold_every_step(page: Page, compressed: EvaluateConfig) -> None:
    drawn = read_points(page.html, "training")
    validations = read_points(page.html, "validation")
    assert [len(line) for line in drawn] == [STEPS] * 4
    assert [len(line) for line in validations] == [4, 4]  # steps 0, 2, 4, 6
    assert page.html.count('<g class="kept">') == 2
    [[(_, y), (_, also)]] = read_points(page.html, "floor")
    assert y == also
    history = read_record(compressed.student)["history"]
    losses = [row["validation_loss"] for row in history if "validation_loss" in row]
    slope = (validations[1][-1][1] - validations[1][0][1]) / (losses[-1] - losses[0])  # the axis is linear
    expected = [row["cross_entropy"] - losses[0] for row in history if "cross_entropy" in row]
    assert [y - validations[1][0][1] for _, y in drawn[1]] == pytest.approx(
        [slope * difference for difference in expected], abs=0.01
    )
    floor = read_record(compressed.student)["metrics"]["teacher_validation_loss"]
    assert y - validations[1][0][1] == pytest.approx(slope * (floor - losses[0]), abs=0.01)
    assert f"corrected teacher: {floor:.3f}" in page.text["training"]


def test_long_curves_are_averaged() -> None:
    thinned = charts.downsample(list(range(1000)))
    assert len(thinned) == charts.MOST_POINTS
    assert thinned[0] == 1.0  # the mean of 0, 1, 2
    assert np.average(thinned, weights=[3] * 200 + [2] * 200) == pytest.approx(499.5)
    assert charts.downsample([1.0, 3.0]).tolist() == [1.0, 3.0]


def test_importance_marks_what_was_kept(page: Page, compressed: EvaluateConfig) -> None:
    [dropped] = json.loads((compressed.pruned / "pruning.json").read_text())["dropped_layers"]
    scores = load_file(compressed.pruned / IMPORTANCE)
    for number, score in enumerate(scores["layers"].tolist(), start=1):
        state = "dropped" if number == dropped else "kept"
        assert f"Layer {number}: {score:.4g}, {state}" in page.titles
    hidden = sorted(scores["hidden"].tolist(), reverse=True)
    assert f"48 channels kept: {hidden[0]:.4g} to {hidden[47]:.4g}" in page.titles
    assert f"16 channels cut: {hidden[48]:.4g} to {hidden[63]:.4g}" in page.titles
    assert sum("96 of 128 channels kept" in title for title in page.titles) == 3
    assert f"Layer {dropped}: dropped with its channels" in page.titles
    assert f"the kept part holds {100 * sum(hidden[:48]) / sum(hidden):.1f} % of the score" in page.text["pruning"]
    crosses = re.findall(r'<g class="cut-black">.*?</g>\s*</g>', page.html, re.DOTALL)
    assert [group.count("<use") for group in crosses] == [4 * 1 + 2 * 3, 2 * 1 + 1 * 3]  # a dropped layer, then heads


def test_sizes_that_were_cut(page: Page, compressed: EvaluateConfig) -> None:
    account = json.loads((compressed.pruned / "pruning.json").read_text())
    assert "Layers 4 3 75.0 % Hidden channels 64 48 75.0 % MLP channels per layer 128 96 75.0 %" in page.text["pruning"]
    before, after = account["teacher"]["parameters"], account["student"]["parameters"]
    assert f"{100 * after / before:.1f} %" in page.text["pruning"]
    assert "over 256 tokens (8 sequences)" in page.text["pruning"]


def test_cost_and_lineage(page: Page, compressed: EvaluateConfig) -> None:
    for directory in (compressed.teacher, compressed.pruned, compressed.student):
        record = read_record(directory)
        row = f"{record['stage']} {record['seconds']:.1f} s {metrics.format_megabytes(record['peak_rss_mb'])}"
        assert row in page.text["cost"]
        for entry in record["inputs"].values():
            assert f"sha256 {entry['sha256']}" in page.text["lineage"]
        assert record["output_sha256"][:12] in page.text["lineage"]
        assert record["versions"]["torch"] in page.text["lineage"]
    assert "learning_rate 0.001" in page.text["lineage"]
    assert "secret" not in page.html


def test_several_corpora_have_a_table_with_their_licenses(compressed: EvaluateConfig, tmp_path: Path) -> None:
    dataset = shutil.copytree(compressed.dataset, tmp_path / "dataset")
    use = {"share_asked": 0.5, "share": 0.5, "tokens": 1200, "passes": 1.0}
    uses = {"corpora": [use, use | {"passes": 2.5, "licence": "CC0"}]}
    parts = [{"address": name, "sha256": "ab"} for name in ("/data/web", "/data/own")]
    inputs = {"corpus": {"address": "[…]", "sha256": "both", "parts": parts}}
    record = read_record(compressed.student) | {"stage": "prepare", "inputs": inputs, "config": {"licence": "MIT"}}
    (dataset / "stage.json").write_text(json.dumps(record | uses))
    manifest = json.loads((dataset / MANIFEST).read_text()) | {"licence": "MIT"}
    (dataset / MANIFEST).write_text(json.dumps(manifest | uses))
    page = write_page(tmp_path, compressed.model_copy(update={"dataset": dataset}), EVALUATION)
    assert "of the corpus: MIT; CC0 ." in page.text["lineage"]
    assert "/data/web 50.0 % 50.0 % 1,200 1.00 MIT /data/own 50.0 % 50.0 % 1,200 2.50 CC0" in page.text["lineage"]


def test_samples_stand_side_by_side(page: Page) -> None:
    text = page.text["samples"]
    assert "“In physics …” Teacher base two Corrected teacher teacher two Pruned student pruned two" in text
    assert text.index("“Once upon …”") < text.index("student one") < text.index("“In physics …”")


def test_generated_text_is_escaped(compressed: EvaluateConfig, tmp_path: Path) -> None:
    attack = "<script>alert('x')</script><img src=http://evil.example/x onerror=alert(1)>"
    evaluation = change_evaluation(prompts=[attack, attack], student__samples=[attack, attack])
    for name in ("teacher_before", "teacher", "pruned", "student"):
        evaluation[name]["tasks"] = {f'"{attack}': {"acc": 0.5}, "$a_1$": {"acc": 0.5}}
    page = write_page(tmp_path, compressed, evaluation)
    assert "script" not in page.tags
    assert "img" not in page.tags
    assert not page.read_attributes("onerror", "src")
    assert attack in page.text["samples"]
    assert attack in page.text["models"]
    assert f'Teacher, "{attack}: 50.0' in page.titles
    assert "Teacher, $a_1$: 50.0" in page.titles


def test_sections_without_data_are_absent(bare: EvaluateConfig, tmp_path: Path) -> None:
    page = write_page(tmp_path, bare, EVALUATION)
    assert re.findall(r'<(?:section|header) id="(\w+)"', page.html) == [
        "verdict",
        "models",
        "comparison",
        "samples",
        "lineage",
        "words",
    ]
    assert page.tags.count("svg") == 2


def test_no_tasks_and_no_prompts(bare: EvaluateConfig, tmp_path: Path) -> None:
    nothing = {f"{name}__tasks": {} for name in ("teacher_before", "teacher", "pruned", "student")}
    page = write_page(tmp_path, bare, change_evaluation(**nothing, prompts=[]))
    assert page.tags.count("svg") == 1
    assert "samples" not in page.text
    assert "accuracy" not in page.text["models"]


def test_sections_are_all_there(page: Page) -> None:
    assert re.findall(r'<(?:section|header) id="(\w+)"', page.html) == [
        "verdict",
        "models",
        "comparison",
        "training",
        "pruning",
        "samples",
        "cost",
        "lineage",
        "words",
    ]


def test_layers_dropped_by_hand(bare: EvaluateConfig, dataset: Path, teacher: Path, tmp_path: Path) -> None:
    pruned = tmp_path / "depth"
    prune.run(PruneConfig(output=pruned, dataset=dataset, teacher=teacher, drop_layers=[2, 3], **SEQUENCES))
    page = write_page(tmp_path, bare.model_copy(update={"pruned": pruned}), EVALUATION)
    assert "The cut was listed in the settings" in page.text["pruning"]
    assert "Layers 4 2 50.0 %" in page.text["pruning"]
    assert page.tags.count("svg") == 2


def test_a_large_model_and_a_long_training_stay_small(
    bare: EvaluateConfig, compressed: EvaluateConfig, tmp_path: Path
) -> None:
    generator = np.random.default_rng(0)
    layers, sizes = 32, {"intermediate": (14336, 9216), "heads": (32, 32), "key_value": (8, 8)}
    scores = {"layers": generator.random(layers), "hidden": generator.random(4096)}
    kept: dict[str, Any] = {"layers": list(range(layers)), "hidden": list(range(3072))}
    for axis, (before, after) in sizes.items():
        scores[axis] = generator.random((layers, before))
        kept[axis] = [list(range(after))] * layers
    account = json.loads((compressed.pruned / "pruning.json").read_text())
    account |= {"kept": kept, "dropped_layers": []}
    (bare.pruned / "pruning.json").write_text(json.dumps(account))
    (bare.pruned / IMPORTANCE).parent.mkdir()
    save_file(scores, bare.pruned / IMPORTANCE)
    record = read_record(compressed.student)
    row = record["history"][1]
    record["history"] = [{"step": 0, "validation_loss": 9.0}, *({**row, "step": step} for step in range(1, 20_001))]
    (bare.student / "stage.json").write_text(json.dumps(record))
    page = write_page(tmp_path, bare, EVALUATION)
    assert (tmp_path / "report.html").stat().st_size < 1_000_000
    assert page.text["pruning"].count("9216 of 14336 kept per layer") == 1
    assert all(len(line) == charts.MOST_POINTS for line in read_points(page.html, "training"))
    assert "the mean of about 50 steps" in page.text["training"]


@pytest.mark.parametrize(
    ("form", "value", "text"),
    [
        ("count", 4_513_000_000, "4.513 B"),
        ("count", 94e12, "94 T"),
        ("count", 65_536, "65.54 k"),
        ("count", 1_536, "1,536"),
        ("share", -0.1234, "−12.3 %"),
        ("duration", 59.94, "59.9 s"),
        ("duration", 100.4, "1 min 40 s"),
        ("duration", 7_265, "2 h 1 min"),
        ("megabytes", 1_536, "1.50 GB"),
        ("megabytes", 512, "512.0 MB"),
        ("loss", 2.0004, "2.000"),
        ("decimal", 1_234.56, "1,234.6"),
        ("moment", 0, "1970-01-01 00:00 UTC"),
    ],
)
def test_figures_in_words(form: str, value: float, text: str) -> None:
    assert metrics.FORMS[form](value) == text


def test_a_missing_figure_is_a_dash() -> None:
    assert {form(None) for name, form in metrics.FORMS.items() if name != "moment"} == {"–"}
    assert [metrics.parse_number(value) for value in (float("nan"), "N/A", True, 0.5)] == [None, None, None, 0.5]


def test_pages_are_reproducible(bare: EvaluateConfig, tmp_path: Path) -> None:
    pages = [write_page(tmp_path, bare, EVALUATION).html for _ in range(2)]
    without_time = [re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", "", page) for page in pages]
    assert all(one == other for one, other in pairwise(without_time))


@pytest.fixture(scope="module")
def gated(compressed: EvaluateConfig, tmp_path_factory: pytest.TempPathFactory) -> Page:
    return write_page(tmp_path_factory.mktemp("gated"), compressed, make_gated_evaluation())


def test_the_decision_and_the_gates_come_first(gated: Page) -> None:
    sections = re.findall(r'<(?:section|header) id="(\w+)"', gated.html)
    assert sections[:3] == ["verdict", "gates", "models"]
    words = "Not passed: of 6 gates 3 passed, 1 failed, 1 within error, 1 not measured"
    assert f"{gates.FAILED} {words}" in gated.text["verdict"]


def test_a_gate_is_a_sentence_with_its_numbers(gated: Page) -> None:
    text = gated.text["gates"].replace(gates.FAILED, "x").replace(gates.PASSED, "v")
    for row in (
        "Validation loss, difference from the champion's v passed 0.100 at most 0.150 +0.050 3.000 champion: 2.900",
        "arc, accuracy, difference from the champion's x failed −5.0 points (−9.5 to −0.3 points) at least 5.0 points "
        "−10.0 50.0 % champion: 55.0 %",
        "arc, accuracy, length-normalized ≈ within error 51.0 % (41.3 to 60.6 %) at least 53.0 % −2.0 51.0 % –",
        "Perplexity, ratio to the corrected teacher's v passed 1.500 at most 1.600 +0.100 30.0 corrected teacher: 20.0",
        "Test loss – not measured – at most 3.500 – – –",
        "Out-of-domain loss v passed 3.100 at most 3.500 +0.400 3.100 –",
    ):
        assert row in text


def test_the_champion_has_its_column(gated: Page, page: Page) -> None:
    text = gated.text["models"]
    assert "Distilled student Champion, small/3 Parameters" in text
    assert "3.000 2.950 to 3.050 ▼ +1.000 2.900 2.850 to 2.950 ▼ +0.900" in text
    assert "Out-of-domain loss nats per token, on other text – – – 3.100 3.200" in text
    assert "Champion" not in page.text["models"] and "Out-of-domain" not in page.text["models"]


def test_the_champion_has_its_bars(gated: Page) -> None:
    assert "Champion, small/3, validation: 2.900" in gated.html and "Champion, small/3, arc: 55.0" in gated.html


def test_without_a_champion_a_gate_against_it_is_passed_over(compressed: EvaluateConfig, tmp_path: Path) -> None:
    against = {"metric": "validation_loss", "against": "champion", "at_most": 0.01}
    evaluation = judge_evaluation(EVALUATION, against, {"metric": "validation_loss", "at_most": 3.5})
    page = write_page(tmp_path, compressed, evaluation)
    assert "Passed: of 2 gates 1 no champion, 1 passed" in page.text["verdict"]
    row = "Validation loss, difference from the champion's – no champion – at most 0.010 – 3.000 champion: –"
    assert row in page.text["gates"]


def test_without_gates_there_is_no_verdict(compressed: EvaluateConfig, tmp_path: Path) -> None:
    page = write_page(tmp_path, compressed, judge_evaluation(EVALUATION))
    assert "No verdict: no gates were set, so no pipeline promotes this version" in page.text["verdict"]
    assert "gates" not in page.text


def test_gates_on_size_alone_are_no_verdict_on_quality(compressed: EvaluateConfig, tmp_path: Path) -> None:
    smaller = {"metric": "parameters", "against": "teacher", "by": "ratio", "at_most": 0.9}
    page = write_page(tmp_path, compressed, judge_evaluation(EVALUATION, smaller))
    words = "Passed: of 1 gates 1 passed; no gate judged the quality, so no pipeline promotes this version"
    assert words in page.text["verdict"]


def test_cost_has_tokens_and_gpu_hours_where_gpus_were_held(
    compressed: EvaluateConfig, page: Page, tmp_path: Path
) -> None:
    assert "GPU-hours" not in page.text["cost"]
    student = shutil.copytree(compressed.student, tmp_path / "student")
    record = read_record(student) | {
        "gpus": 8,
        "seconds": 900.0,
        "image": "registry/trainer:1",
        "mlflow_run_id": "run7",
    }
    (student / "stage.json").write_text(json.dumps(record))
    gpu_page = write_page(tmp_path, compressed.model_copy(update={"student": student}), EVALUATION)
    tokens = metrics.format_count(record["metrics"]["tokens"])
    speed = metrics.format_decimal(record["metrics"]["tokens_per_second"])
    memory = metrics.format_megabytes(record["peak_rss_mb"])
    operations = f"{record['metrics']['tflops_per_second']:.3g}"
    assert f"distill 15 min 0 s {memory} {tokens} {speed} {operations} 2.00" in gpu_page.text["cost"]
    assert "image registry/trainer:1 pipeline run – MLflow run run7 seed 1234" in gpu_page.text["lineage"]
