"""Several corpora: their shares, what is held out, their identities, and lists that are refused."""

import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from megatron.core.datasets import indexed_dataset as megatron

from minitron.config.addresses import find_missing_paths, find_scheme_faults, list_addresses
from minitron.config.document import make_plan
from minitron.config.parse import parse
from minitron.config.pipelines import check_arguments, compiled_pipeline, get_parameters, read_request
from minitron.config.stages import PrepareConfig
from minitron.data.indexed import SPLITS, IndexedDataset
from minitron.data.mixture import MOST_PASSES, order_documents
from minitron.data.packed import PackedDataset
from minitron.errors import ConfigError
from minitron.registry import lineage
from minitron.runtime.inputs import find_inputs
from minitron.stages import prepare
from minitron.storage.hashing import content_hash
from minitron.storage.layout import MANIFEST, MIXTURE

if TYPE_CHECKING:  # engine nemo's environment has no emulator
    from tests.servers.gcs import World

Prepared = Callable[..., tuple[Path, dict[str, Any], dict[str, Any]]]


def write_texts(path: Path, name: str, count: int, words: int, seed: int) -> list[str]:
    """Write distinct documents of about so many words to a corpus; return them."""
    rng = random.Random(seed)
    texts = [
        f"{name} {number} " + " ".join(rng.choices(["alpha", "beta", "gamma"], k=rng.randint(1, 2 * words)))
        for number in range(count)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return texts


@pytest.fixture
def corpora(tmp_path: Path) -> dict[str, Path]:
    """A large corpus, a small one, and one with splits of its own; some texts are in several."""
    web, domain = tmp_path / "web.jsonl", tmp_path / "domain.jsonl"
    texts = write_texts(web, "web", 2000, 20, 1)
    write_texts(domain, "domain", 100, 40, 2)
    own = tmp_path / "own"
    trained = write_texts(own / "train.jsonl", "own", 200, 20, 3)
    held_out = [*texts[:5], *trained[:5]]
    (own / "test.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in held_out))
    with domain.open("a") as stream:
        stream.writelines(json.dumps({"text": text}) + "\n" for text in texts[5:25])
    return {"web": web, "domain": domain, "own": own}


@pytest.fixture
def prepared(teacher: Path, tmp_path: Path) -> Prepared:
    """Run prepare; return the directory, the manifest and the record."""

    def run(corpus: Any, name: str = "dataset", **settings: Any) -> tuple[Path, dict[str, Any], dict[str, Any]]:
        shares = {"validation_fraction": 0.1, "test_fraction": 0.1}
        values = {"corpus": corpus, "teacher": str(teacher), "output": tmp_path / name} | shares | settings
        record = prepare.run(PrepareConfig(**values))
        return tmp_path / name, json.loads((tmp_path / name / MANIFEST).read_text()), record

    return run


def weigh(corpora: dict[str, Path], **weights: float) -> list[dict[str, Any]]:
    return [{"address": str(corpora[name]), "weight": weight} for name, weight in weights.items()]


def read_split(directory: Path, split: str) -> list[tuple[int, ...]]:
    read = IndexedDataset(directory / split)
    return [tuple(read[index].tolist()) for index in range(len(read))]


def test_each_corpus_gets_its_share_of_the_training_tokens(prepared: Prepared, corpora: dict[str, Path]) -> None:
    directory, manifest, record = prepared(weigh(corpora, web=3, domain=2, own=1))
    web, domain, own = manifest[MIXTURE]
    assert [entry["share_asked"] for entry in (web, domain, own)] == [0.5, 0.3333, 0.1667]
    for entry in (web, domain, own):
        assert entry["share"] == pytest.approx(entry["share_asked"], abs=0.002)
    assert web["passes"] == 1 and domain["passes"] > own["passes"] > 1
    copies = Counter(read_split(directory, "train"))
    assert len(copies) == manifest["documents"]["train"], "every document is there"
    assert Counter(copies.values())[1] >= web["documents"]["train"]
    assert max(copies.values()) == int(np.ceil(domain["passes"]))
    metrics = record["metrics"]
    assert (metrics["corpus_1_share"], metrics["corpus_2_passes"]) == (web["share"], domain["passes"])
    assert metrics["epoch_tokens"] == sum(map(len, copies.elements())) == sum(e["tokens"] for e in manifest[MIXTURE])
    assert metrics["train_tokens"] == sum(map(len, copies))
    packed = PackedDataset(directory / "train", 64, seed=1)
    assert len(packed) == (metrics["epoch_tokens"] - 1) // 64, "training sees the mixture"


def test_no_held_out_text_of_any_corpus_is_trained_on(prepared: Prepared, corpora: dict[str, Path]) -> None:
    directory, manifest, _ = prepared(weigh(corpora, web=1, domain=1, own=1))
    splits = {split: read_split(directory, split) for split in SPLITS}
    for split in ("validation", "test"):
        assert len(set(splits[split])) == len(splits[split]), "held-out text is not repeated"
    assert not set(splits["train"]) & {*splits["validation"], *splits["test"]}
    assert not {*splits["validation"]} & {*splits["test"]}
    assert manifest[MIXTURE][2]["own_splits"] == ["train", "test"] and "own_splits" not in manifest
    assert manifest[MIXTURE][2]["documents"]["test"] == 10, "the split of its own comes first"
    assert sum(manifest["overlaps"].values()) == 10 and manifest["duplicates"] == 20
    assert sum(sum(entry["documents"].values()) for entry in manifest[MIXTURE]) == sum(manifest["documents"].values())


def test_a_mixture_is_identified_by_content_and_shares(prepared: Prepared, corpora: dict[str, Path]) -> None:
    first, manifest, record = prepared(weigh(corpora, web=1, domain=1), "first")
    entry = record["inputs"]["corpus"]
    assert [part["address"] for part in entry["parts"]] == [str(corpora["web"]), str(corpora["domain"])]
    identities = [content_hash(corpora[name]) for name in ("web", "domain")]
    assert [part["sha256"] for part in entry["parts"]] == identities
    assert [part["corpus_sha256"] for part in manifest[MIXTURE]] == identities
    assert manifest["corpus_sha256"] == entry["sha256"] and json.loads(entry["address"]) == [
        {"address": str(corpora[name]), "weight": 1.0} for name in ("web", "domain")
    ]
    moved = {name: path.rename(path.with_name(f"moved-{path.name}")) for name, path in corpora.items()}
    again, _, same = prepared(weigh(moved, web=2, domain=2), "again")
    for file in [*(f"{split}{kind}" for split in SPLITS for kind in (".bin", ".idx")), MANIFEST]:
        assert (first / file).read_bytes() == (again / file).read_bytes(), file
    assert same["key"] == record["key"]
    for other in (weigh(moved, web=1, domain=2), weigh(moved, domain=1, web=1)):
        assert prepared(other, "other")[2]["key"] != record["key"]


def test_each_corpus_may_have_settings_of_its_own(prepared: Prepared, corpora: dict[str, Path]) -> None:
    """The domain's text is in another field: what is written is what a corpus with the usual field gives."""
    plain, manifest, record = prepared(weigh(corpora, web=1, domain=1), "plain", licence="MIT")
    assert "licence" not in manifest[MIXTURE][1]
    pairs = [[content_hash(corpora[name]), 0.5] for name in ("web", "domain")]
    before = hashlib.sha256(json.dumps(pairs).encode()).hexdigest()
    assert manifest["corpus_sha256"] == before, "without settings of its own the identity is that of 0.7"
    domain = {"address": str(corpora["domain"]), "weight": 1, "licence": "CC0"}
    named, _, other = prepared([*weigh(corpora, web=1), domain], "named", licence="MIT")
    assert other["key"] != record["key"] and lineage.read_data_license(named) == "MIT; CC0"
    body = corpora["domain"].with_name("body.jsonl")
    body.write_text(corpora["domain"].read_text().replace('{"text": ', '{"body": '))
    own = {"text_field": "body", "licence": "CC0"}
    mixture = [*weigh(corpora, web=1), {"address": str(body), "weight": 1} | own]
    directory, manifest, record = prepared(mixture, "fields", licence="MIT")
    for file in (f"{split}{kind}" for split in SPLITS for kind in (".bin", ".idx")):
        assert (plain / file).read_bytes() == (directory / file).read_bytes(), file
    first, second = manifest[MIXTURE]
    assert own.items() <= second.items() and not own.keys() & first.keys() and manifest["licence"] == "MIT"
    assert json.loads(record["inputs"]["corpus"]["address"])[1] == {"address": str(body), "weight": 1.0} | own
    origin = {"stages": {"prepare": record}}
    assert [entry["licence"] for entry in lineage.read_corpora(origin)] == ["MIT", "CC0"]
    with pytest.raises(ConfigError, match=r"body\.jsonl.*: no field 'text' \(found: body\)"):
        prepared([*weigh(corpora, web=1), {"address": str(body), "weight": 1}], "missing")


def test_a_list_of_one_corpus_is_its_address(prepared: Prepared, corpora: dict[str, Path]) -> None:
    plain, manifest, record = prepared(str(corpora["domain"]), "plain")
    single, _, same = prepared(weigh(corpora, domain=0.3), "single")
    assert MIXTURE not in manifest and MIXTURE not in record and "parts" not in record["inputs"]["corpus"]
    assert same["key"] == record["key"] and content_hash(plain) == content_hash(single)


def test_every_corpus_is_pinned_one_by_one(
    corpora: dict[str, Path], teacher: Path, world: "World", tmp_path: Path, prepared: Prepared
) -> None:
    world.put("text/web.jsonl", corpora["web"])
    mixture = [{"address": "gs://bucket/text", "weight": 1}, {"address": str(corpora["domain"]), "weight": 2}]
    _, manifest, record = prepared(mixture)
    remote, local = manifest[MIXTURE]
    generation = world.generation("bucket", "text/web.jsonl")
    assert remote["corpus_objects"] == [f"web.jsonl#{generation}"] and "corpus_objects" not in local
    assert [part["sha256"] for part in record["inputs"]["corpus"]["parts"]] == [
        remote["corpus_sha256"],
        local["corpus_sha256"],
    ]
    with corpora["domain"].open("a") as stream:
        stream.write(json.dumps({"text": "new"}) + "\n")
    changed = find_inputs(PrepareConfig(corpus=mixture, teacher=str(teacher), output=tmp_path / "x"), "corpus")
    assert changed["corpus"].sha256 != manifest["corpus_sha256"], "resolve sees new text in any of them"


def test_megatron_reads_the_mixture(prepared: Prepared, corpora: dict[str, Path]) -> None:
    directory, _, _ = prepared(weigh(corpora, web=1, domain=1))
    read = megatron.IndexedDataset(str(directory / "train"))
    ours = IndexedDataset(directory / "train")
    assert len(read) == len(ours)
    assert all((read[index] == ours[index]).all() for index in range(0, len(ours), 37))


def test_every_stretch_has_the_shares_and_no_corpus_is_repeated_without_end() -> None:
    rng = np.random.default_rng(0)
    lengths, ends = rng.integers(1, 500, 20_100), np.array([20_000, 20_100])

    def measure(order: Any) -> Any:
        used = np.bincount(np.searchsorted(ends, order, side="right"), lengths[order], 2)
        return used / used.sum()

    order = order_documents(lengths, ends, [0.9, 0.1], seed=0)
    tenth = len(order) // 10
    for number in range(10):
        assert measure(order[number * tenth : (number + 1) * tenth]) == pytest.approx([0.9, 0.1], abs=0.01)
    order = order_documents(lengths, ends, [0.5, 0.5], seed=0)
    assert measure(order) == pytest.approx([0.5, 0.5], abs=0.005)
    copies = np.bincount(order, minlength=20_100)
    assert set(copies[20_000:]) == {MOST_PASSES} and set(copies[:20_000]) == {0, 1}, "then the others are cut"


BAD: dict[str, tuple[list[tuple[str, float]], str]] = {
    "zero": ([("a", 0), ("b", 1)], r"corpus\.0\.weight: Input should be greater than 0 \(found 0\)"),
    "negative": ([("a", 1), ("b", -2)], r"corpus\.1\.weight: Input should be greater than 0 \(found -2\)"),
    "not finite": ([("a", 1), ("b", float("inf"))], r"corpus\.1\.weight: Input should be a finite number"),
    "twice": ([("a", 1), ("b", 1), ("a", 2)], r"corpus\.2\.address: a: given twice; give it once, with the sum"),
    "empty": ([], r"corpus: an empty list; give an address, or a list of \{address, weight\}"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_list_is_refused_by_name(case: str) -> None:
    pairs, message = BAD[case]
    corpus = [{"address": address, "weight": weight} for address, weight in pairs]
    with pytest.raises(ConfigError, match=message):
        parse("prepare", {"corpus": corpus, "teacher": "t", "output": "o"})


@pytest.mark.parametrize(
    ("corpus", "message"),
    [
        (
            [{"address": "a"}, {"address": "b", "weight": 1, "field": "x"}],
            r"corpus\.0\.weight: missing; .*1\.field: un",
        ),
        ('[{"address": "a"', r"corpus: not a JSON list \(.*\); give \[\{\"address\": …, \"weight\": …\}, …\]"),
        ([{"address": "a", "weight": True}], r"corpus: found true"),
        ([{"address": "a", "weight": 1, "text_field": "x"}], r"corpus\.0\.text_field: x: .* set prepare\.text_field"),
    ],
)
def test_a_list_of_another_form_is_refused(corpus: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse("prepare", {"corpus": corpus, "teacher": "t", "output": "o"})


def test_a_list_travels_as_json(corpora: dict[str, Path]) -> None:
    """From a preset or --set, through Kubeflow's form, to the task."""
    parameters = get_parameters(compiled_pipeline("compress"))
    settings = ["corpus=[{address: a, weight: 2}, {address: gs://b/c, weight: 1e-1}]", "teacher=t", "tracking_uri=x"]
    arguments = check_arguments(read_request([], settings, parameters), parameters)
    text = arguments["corpus"]
    parsed = parse("prepare", {"corpus": text, "teacher": "t", "output": "o"})
    assert isinstance(text, str) and isinstance(parsed, PrepareConfig)
    assert json.loads(parsed.corpus) == [{"address": "a", "weight": 2.0}, {"address": "gs://b/c", "weight": 0.1}]
    settings[0] = "corpus=[{address: a, weight: 0}, {address: s3://b, weight: 1}]"
    with pytest.raises(ConfigError, match=r"corpus\.0\.weight: Input should be greater than 0 \(found 0\)"):
        check_arguments(read_request([], settings, parameters), parameters)


def test_a_missing_corpus_is_refused_before_anything_is_written(
    prepared: Prepared, corpora: dict[str, Path], tmp_path: Path
) -> None:
    mixture = [*weigh(corpora, web=1), {"address": str(tmp_path / "nothing"), "weight": 1}]
    before = {*tmp_path.iterdir()}
    with pytest.raises(ConfigError, match=r"nothing: no such file or directory; give an existing path"):
        prepared(mixture)
    assert {*tmp_path.iterdir()} == before
    plan = make_plan({"corpus": mixture, "teacher": "hf://org/name"})
    assert [fault.key for fault in find_missing_paths(plan, Path("/"))] == ["corpus.1.address"]
    schemes = make_plan({"corpus": [{"address": "s3://b", "weight": 1}, *mixture], "teacher": "hf://org/name"})
    faults = [
        fault.key for key, address in list_addresses(schemes).items() for fault in find_scheme_faults(key, address)
    ]
    assert faults == ["corpus.0.address"]


def test_a_corpus_without_text_of_its_own_is_refused(prepared: Prepared, corpora: dict[str, Path]) -> None:
    copy = corpora["web"].with_name("copy.jsonl")
    copy.write_bytes(corpora["web"].read_bytes())
    with pytest.raises(ConfigError, match=r"corpus .*copy\.jsonl: nothing to train on, because .*; leave it out"):
        prepared([*weigh(corpora, web=1), {"address": str(copy), "weight": 1}])
    assert not [path for path in copy.parent.iterdir() if "dataset" in path.name], "nothing was written"
