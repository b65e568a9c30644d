"""A model comes out of every stage with every file and key that it had, changed only where it was cut."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig

from minitron.config.stages import DistillConfig, FinetuneConfig, PruneConfig
from minitron.engines.nemo import engine as nemo
from minitron.models.checkpoint import finish_derived_model
from minitron.models.pruning.surgery import Shape
from minitron.stages import distill, finetune, prune
from minitron.storage.hashing import content_hash

TRAINING: dict[str, Any] = {
    "sequence_length": 32,
    "micro_batch_size": 2,
    "global_batch_size": 2,
    "max_steps": 2,
    "validation_interval": 2,
    "validation_sequences": 4,
    "learning_rate": 1e-3,
}


def make_snapshot(model: Path, root: Path) -> Path:
    """Lay a model out as huggingface_hub's cache does: a directory of relative links to blobs named by their hash."""
    blobs, snapshot = root / "blobs", root / "snapshots" / "0123abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in model.iterdir():
        name = hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.copy(path, blobs / name)
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", name))
    return snapshot


def assert_real_files(directory: Path, model: Path) -> None:
    """Check that a directory has the files of a model, and no links."""
    files = {path.name: path for path in directory.iterdir() if path.name not in ("stage.json", "checkpoints")}
    assert files.keys() == {path.name for path in model.iterdir()}
    for name, path in files.items():
        assert path.is_file() and not path.is_symlink() and path.read_bytes() == (model / name).read_bytes()


@pytest.fixture(scope="module")
def snapshot(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_snapshot(teacher, tmp_path_factory.mktemp("hub") / "models--org--name")


@pytest.mark.parametrize("change", [{"enabled": False}, {"learning_rate": 0.1, "min_learning_rate": 0.1}])
def test_a_hub_model_that_is_passed_on_comes_out_as_real_files(
    snapshot: Path, teacher: Path, dataset: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    """Fine-tuning that is switched off, and one that makes the model worse."""
    output = tmp_path / "out"
    record = finetune.run(FinetuneConfig(teacher=str(snapshot), dataset=dataset, output=output, **TRAINING | change))
    assert record["metrics"]["corrected"] == 0
    assert record["inputs"]["teacher"]["sha256"] == record["output_sha256"] == content_hash(teacher)
    shutil.copytree(output, moved := tmp_path / "elsewhere" / "moved")
    assert_real_files(moved, teacher)


def test_engine_nemo_passes_a_hub_model_on_as_real_files(
    snapshot: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a size to cut it needs no NeMo, which is not installed here."""
    monkeypatch.setattr(nemo, "check_installed", lambda: None)
    config = PruneConfig(output=tmp_path / "unused", teacher=snapshot, dataset=tmp_path, engine="nemo")
    shape = Shape(**{name: json.loads((teacher / "config.json").read_text())[name] for name in Shape.__annotations__})
    (tmp_path / "out").mkdir()
    nemo.prune(config, shape, None, tmp_path / "out")
    assert_real_files(tmp_path / "out", teacher)


FILES = {
    "LICENSE": "the licence",
    "USE_POLICY.md": "the policy",
    "README.md": "---\nlicense: llama3.1\n---\nthe teacher's card",
    "chat_template.jinja": "{{ messages }}",
    "generation_config.json": json.dumps({"temperature": 0.6, "top_p": 0.9, "bos_token_id": 0, "eos_token_id": [1]}),
}
"""What models have beside weights, config and tokenizer. transformers 4.57 loads this generation_config, but saves none
that has a temperature without do_sample."""

OTHER_FORMATS = (
    "original/params.json", "original/consolidated.00.pth", "consolidated.safetensors", "pytorch_model.bin",
    "training_args.bin", "onnx/model.onnx", "model.gguf", "optimizer.pt",
)  # fmt: skip
"""Weights in other formats, and pickles: no model that a stage makes has them."""

OWN_KEYS = {"use_cache": True, "custom": {"a": 1}, "attention_dropout": 0.0, "_name_or_path": "org/name"}


@pytest.fixture(scope="module")
def whole(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher with all that a model can have: bfloat16 with norms in float32, though its config names no dtype."""
    directory = tmp_path_factory.mktemp("whole") / "teacher"
    shutil.copytree(teacher, directory)
    weights = load_file(directory / "model.safetensors")
    weights = {name: weight if "norm" in name else weight.bfloat16() for name, weight in weights.items()}
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    config = json.loads((directory / "config.json").read_text()) | OWN_KEYS
    del config["dtype"], config["torch_dtype"]
    (directory / "config.json").write_text(json.dumps(config))
    for name, text in (FILES | dict.fromkeys(OTHER_FORMATS, "of no use")).items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(text)
    return directory


@pytest.fixture(scope="module")
def made(whole: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What every stage makes of it."""
    root = tmp_path_factory.mktemp("made")
    common = {"dataset": dataset} | TRAINING
    sequences = {"dataset": dataset, "sequence_length": 32, "micro_batch_size": 2, "calibration_sequences": 2}
    cut = {"hidden_size": 48, "intermediate_size": 96, "num_key_value_heads": 1, "num_hidden_layers": 3}
    worse = {"learning_rate": 0.1, "min_learning_rate": 0.1}
    before = content_hash(whole)
    trained = finetune.run(FinetuneConfig(output=root / "finetune", teacher=str(whole), **common))
    kept = finetune.run(FinetuneConfig(output=root / "better", teacher=str(whole), **common | worse))
    finetune.run(FinetuneConfig(output=root / "disabled", teacher=str(whole), dataset=dataset, enabled=False))
    prune.run(PruneConfig(output=root / "prune", teacher=root / "finetune", **sequences, **cut))
    inputs = {"teacher": root / "finetune", "student": root / "prune"}
    distilled = distill.run(DistillConfig(output=root / "distill", **inputs, **common))
    assert [record["metrics"]["best_step"] for record in (trained, kept, distilled)] == [2, 0, 2]
    assert content_hash(whole) == before, "the teacher was changed"
    return {name: root / name for name in ("finetune", "better", "disabled", "prune", "distill")}


def read_config(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text())


def assert_kept(directory: Path, source: Path, cut: tuple[str, ...] = ()) -> None:
    """Compare two models file by file, key by key and dtype by dtype; `cut` are the keys that differ."""
    for path in source.rglob("*"):
        name = path.relative_to(source)
        if path.is_dir() or name.suffix == ".safetensors" or name.name in ("config.json", "stage.json"):
            continue
        if str(name) in OTHER_FORMATS:
            assert not (directory / name).exists(), name
            continue
        there = directory / ("README.teacher.md" if cut and str(name) == "README.md" else name)
        assert there.read_bytes() == path.read_bytes(), name
    expected, found = read_config(source), read_config(directory)
    assert {key for key in expected if found[key] != expected[key]} == set(cut)
    assert found.keys() - expected.keys() <= {"head_dim"}
    stored, written = (load_file(place / "model.safetensors") for place in (source, directory))
    assert (written.keys() <= stored.keys() and len(written) == len(stored)) or cut
    assert all(weight.dtype == stored[name].dtype for name, weight in written.items())


@pytest.mark.parametrize("stage", ["finetune", "better", "disabled"])
def test_a_corrected_teacher_has_every_file_key_and_dtype_of_the_teacher(
    whole: Path, made: dict[str, Path], stage: str
) -> None:
    assert_kept(made[stage], whole)
    trained, before = (load_file(place / "model.safetensors") for place in (made[stage], whole))
    assert (stage == "finetune") != all(torch.equal(trained[name], before[name]) for name in before)


def test_a_pruned_model_has_every_file_and_key_but_those_that_the_cut_changed(made: dict[str, Path]) -> None:
    sizes = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers")
    assert_kept(made["prune"], made["finetune"], sizes)
    assert not (made["prune"] / "README.md").exists(), "the teacher's card says what is not so of the student"


def test_a_distilled_model_has_every_file_key_and_dtype_of_the_student(made: dict[str, Path]) -> None:
    assert_kept(made["distill"], made["prune"])
    student = AutoModelForCausalLM.from_pretrained(made["distill"])
    assert student.config.use_cache and student.config.custom == {"a": 1}


def test_what_engine_nemo_exports_gets_files_keys_and_dtypes_of_the_model_it_was_made_from(
    whole: Path, tmp_path: Path
) -> None:
    """NeMo writes weights in another dtype, and config and generation_config of its own."""
    model = AutoModelForCausalLM.from_pretrained(whole, dtype=torch.float32)
    model.generation_config = GenerationConfig()
    model.save_pretrained(tmp_path / "exported", max_shard_size="200KB")
    finish_derived_model(tmp_path / "exported", whole)
    index = json.loads((tmp_path / "exported" / "model.safetensors.index.json").read_text())
    shards = [load_file(tmp_path / "exported" / name) for name in sorted(set(index["weight_map"].values()))]
    assert len(shards) > 1
    weights = {name: weight for shard in shards for name, weight in shard.items()}
    assert index["metadata"]["total_size"] == sum(weight.nbytes for weight in weights.values())
    expected = load_file(whole / "model.safetensors")
    assert weights.keys() == expected.keys()
    assert all(weights[name].dtype == tensor.dtype for name, tensor in expected.items())
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
    save_file(weights, tmp_path / "exported" / "model.safetensors", {"format": "pt"})
    assert_kept(tmp_path / "exported", whole)
