"""A checkpoint that is not what its config says is refused by one line; before the corpus is read, if headers tell."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
import transformers
import yaml
from lm_eval.tasks import TaskManager
from safetensors.torch import load_file, save_file

from minitron.config.stages import DistillConfig, FinetuneConfig, PrepareConfig, PruneConfig
from minitron.errors import ConfigError, MinitronError, RunError
from minitron.models.checks import INDEX, check_model, list_weight_files
from minitron.models.tasks import names
from minitron.stages import distill, finetune, prepare, prune
from tests.constants import REPOSITORY
from tests.servers import forks

EMBEDDING = "model.embed_tokens.weight"
PROJECTION = "model.layers.1.mlp.up_proj.weight"


def edit_json(path: Path, **values: Any) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | values))


def edit_config(**values: Any) -> Callable[[Path], None]:
    return lambda model: edit_json(model / "config.json", **values)


def write_json(name: str, content: dict[str, Any]) -> Callable[[Path], None]:
    return lambda model: edit_json(model / name, **content)


def edit_weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def edit(model: Path) -> None:
        weights = load_file(model / "model.safetensors")
        change(weights)
        save_file(weights, model / "model.safetensors", {"format": "pt"})

    return edit


def add_tensors(*names: str) -> Callable[[Path], None]:
    return edit_weights(lambda weights: weights.update({name: torch.ones(4) for name in names}))


def store_as(dtype: torch.dtype, name: str = PROJECTION) -> Callable[[Path], None]:
    return edit_weights(lambda weights: weights.update({name: weights[name].to(dtype)}))


def rename_weights(name: str) -> Callable[[Path], None]:
    return lambda model: (model / "model.safetensors").rename(model / name) and None


def add_token(model: Path) -> None:
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append(
        {
            "id": 512,
            "content": "<|im_end|>",
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
    )
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))


def shard(model: Path, files: int = 2, missing: int = 0) -> None:
    """Split the weights over files, and write their index; leave the first ones out."""
    weights = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    names = sorted(weights)
    index = {
        name: f"model-{position % files + 1:05d}-of-{files:05d}.safetensors" for position, name in enumerate(names)
    }
    for file in sorted(set(index.values()))[missing:]:
        save_file({name: weights[name] for name in names if index[name] == file}, model / file, {"format": "pt"})
    edit_json(model / "model.safetensors.index.json", weight_map=index)


def leave_other_shards(model: Path) -> None:
    shard(model)
    for path in model.glob("model-*"):
        path.rename(model / path.name.replace("-of-00002", "-of-00003"))


NO_MODEL = (
    r"config.json does not describe a model \(.*\); correct it"
    if transformers.__version__ >= "5"
    else r"but config.json describes \[512, 63\]; give the config.json of these weights"
)
"""transformers 4 accepts sizes that do not divide, and leaves them to the check of shapes."""

CASES: dict[str, tuple[Callable[[Path], Any], type[MinitronError], str]] = {
    "gptq": (
        edit_config(quantization_config={"quant_method": "gptq"}),
        ConfigError,
        r"quantized \(quantization_config of config.json: gptq\); give the original model, in bfloat16, float16",
    ),
    "compressed": (
        edit_config(compression_config={"format": "int-quantized"}),
        ConfigError,
        r"quantized \(compression_config",
    ),
    "modelopt": (
        write_json("hf_quant_config.json", {"quantization": {"quant_algo": "FP8"}}),
        ConfigError,
        r"quantized \(hf_quant_config.json: FP8\)",
    ),
    "autogptq": (
        write_json("quantize_config.json", {"bits": 4}),
        ConfigError,
        r"quantized \(quantize_config.json: unknown",
    ),
    "autoawq": (
        write_json("quant_config.json", {"quant_method": "awq"}),
        ConfigError,
        r"quantized \(quant_config.json: awq",
    ),
    "fp8": (store_as(torch.float8_e4m3fn), ConfigError, rf"{PROJECTION} has the quantized dtype F8_E4M3; give"),
    "int8": (store_as(torch.int8), ConfigError, r"has the quantized dtype I8; give"),
    "packed": (store_as(torch.uint8), ConfigError, r"has the quantized dtype U8; give"),
    "scales": (
        add_tensors(f"{PROJECTION}_scale", PROJECTION.replace("weight", "input_scale")),
        ConfigError,
        r"quantized, because it has model.layers.1.mlp.up_proj.input_scale, model.layers.1.*weight_scale; ",
    ),
    "biases": (
        add_tensors("model.layers.0.self_attn.q_proj.bias"),
        ConfigError,
        r"1 tensors are not in the model of config.json \(model.layers.0.self_attn.q_proj.bias\) and would be dropped",
    ),
    "layers": (
        edit_config(num_hidden_layers=3),
        ConfigError,
        r"9 tensors are not in the model of config.json \(model.layers.3.input_layernorm.weight, .* …\)",
    ),
    "value head": (add_tensors("v_head.summary.weight"), ConfigError, r"1 tensors .* \(v_head.summary.weight\)"),
    "shape": (
        edit_config(intermediate_size=96),
        ConfigError,
        r"mlp.down_proj.weight has shape \[64, 128\], but config.json describes \[64, 96\]; give the config.json of",
    ),
    "vocabulary": (
        edit_config(vocab_size=500),
        ConfigError,
        r"lm_head.weight has shape \[512, 64\], but config.json describes \[500, 64\]",
    ),
    "more layers": (
        edit_config(num_hidden_layers=5),
        RunError,
        r"9 weights are missing \(model.layers.4.input_layernorm.weight …\); get the model again",
    ),
    "two heads": (
        edit_config(tie_word_embeddings=True),
        ConfigError,
        r"lm_head.weight and model.embed_tokens.weight differ, so one would be dropped; set tie_word",
    ),
    "no model": (edit_config(hidden_size=63), ConfigError, NO_MODEL),
    "no JSON": (
        lambda model: (model / "config.json").write_text("{"),
        ConfigError,
        r"config.json: not JSON \(.*\); get the model again",
    ),
    "adapter": (
        write_json("adapter_config.json", {"peft_type": "LORA"}),
        ConfigError,
        r"adapter_config.json belongs to an adapter \(LoRA\), not to a model; merge it into its model",
    ),
    "pickles": (
        rename_weights("pytorch_model.bin"),
        ConfigError,
        r"no model.safetensors, only pytorch_model.bin; only safetensors are supported: load the model with",
    ),
    "gguf": (
        rename_weights("model.Q4_1.gguf"),
        ConfigError,
        r"no model.safetensors, only model.Q4_1.gguf; GGUF is not supported: give the Hugging Face directory that",
    ),
    "no weights": (
        lambda model: (model / "model.safetensors").unlink(),
        ConfigError,
        r"no model.safetensors; give a Hugging Face model directory with its weights",
    ),
    "missing shard": (
        lambda model: shard(model, files=3, missing=1),
        RunError,
        r"1 of 3 files in model.safetensors.index.json are missing \(model-00001-of-00003.safetensors\)",
    ),
    "other shards": (
        leave_other_shards,
        RunError,
        r"2 of 2 files .* are missing \(model-00001-of-00002.safetensors, .*, found model-00001-of-00003",
    ),
    "two sets": (
        write_json("model.safetensors.index.json", {"weight_map": {EMBEDDING: "model-00001-of-00002.safetensors"}}),
        ConfigError,
        r"has model.safetensors, but model.safetensors.index.json names other files",
    ),
    "outside": (
        lambda model: (model / INDEX).write_text(json.dumps({"weight_map": {EMBEDDING: "../other.safetensors"}})),
        ConfigError,
        r"model.safetensors.index.json names files outside the model \(../other.safetensors\); move them into it",
    ),
    "token": (
        add_token,
        ConfigError,
        r"the tokenizer's token <\|im_end\|> has the id 512, but the embedding has 512 rows; enlarge it",
    ),
    "eos": (
        write_json("tokenizer_config.json", {"eos_token": "<|im_end|>"}),
        ConfigError,
        r"the tokenizer's token <\|im_end\|> has the id 512",
    ),
    "config's eos": (
        edit_config(eos_token_id=[1, 512]),
        ConfigError,
        r"eos_token_id of config.json is \[1, 512\], but the embedding has 512 rows; correct it",
    ),
    "generation's pad": (
        write_json("generation_config.json", {"pad_token_id": 512}),
        ConfigError,
        r"pad_token_id of generation_config.json is 512",
    ),
}
"""What is done to a good teacher; the error; its message."""


@pytest.fixture
def model(teacher: Path, tmp_path: Path) -> Path:
    """A copy of the teacher, to be spoilt."""
    return Path(shutil.copytree(teacher, tmp_path / "teacher"))


@pytest.mark.parametrize("case", CASES)
def test_a_model_that_is_not_what_its_config_says_is_refused_before_the_corpus_is_read(
    case: str, model: Path, tmp_path: Path
) -> None:
    spoil, error, message = CASES[case]
    spoil(model)
    (tmp_path / "corpus.jsonl").write_text("no JSON: to read this would be an error of its own")
    config = PrepareConfig(corpus=str(tmp_path / "corpus.jsonl"), teacher=str(model), output=tmp_path / "out")
    with pytest.raises(error, match=message) as refused:
        prepare.run(config)
    assert type(refused.value) is error and "\n" not in str(refused.value)
    assert str(refused.value).startswith(str(model))
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_an_adapter_alone_is_refused_as_such(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="an adapter"):
        check_model(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    (tmp_path / "llama.gguf").write_text("GGUF")
    with pytest.raises(ConfigError, match=r"no config.json, only llama.gguf; GGUF is not supported"):
        check_model(tmp_path)


def run_stage(stage: str, model: Path, teacher: Path, dataset: Path, output: Path) -> None:
    """Run a stage that changes the model."""
    common = {"dataset": dataset, "output": output, "sequence_length": 64}
    match stage:
        case "finetune":
            finetune.run(FinetuneConfig(teacher=str(model), **common))
        case "prune":
            prune.run(PruneConfig(teacher=model, num_hidden_layers=3, **common))
        case "distill":
            distill.run(DistillConfig(teacher=teacher, student=model, **common))


@pytest.mark.parametrize("stage", ["finetune", "prune", "distill"])
@pytest.mark.parametrize("case", ["biases", "token", "fp8"])
def test_every_stage_that_changes_a_model_refuses_it(
    stage: str, case: str, model: Path, teacher: Path, dataset: Path, tmp_path: Path
) -> None:
    spoil, error, message = CASES[case]
    spoil(model)
    with pytest.raises(error, match=message):
        run_stage(stage, model, teacher, dataset, tmp_path / "out")


@pytest.mark.parametrize(("stage", "value"), [("finetune", "nan"), ("prune", "inf"), ("distill", "-inf")])
def test_weights_that_are_no_numbers_are_refused_at_step_0(
    stage: str, value: str, model: Path, teacher: Path, dataset: Path, tmp_path: Path
) -> None:
    def spoil(weights: dict[str, torch.Tensor]) -> None:
        weights[PROJECTION] = weights[PROJECTION].bfloat16()
        weights[PROJECTION][3, 5:7] = float(value)

    edit_weights(spoil)(model)
    message = rf"teacher: {PROJECTION} has 2 NaN or infinite values, of 8192; get the model again, or an"
    with pytest.raises(RunError, match=message):
        run_stage(stage, model, teacher, dataset, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("stage", ["finetune", "distill"])
def test_sequences_longer_than_the_model_are_refused_before_training(
    stage: str, teacher: Path, dataset: Path, tmp_path: Path
) -> None:
    common = {"dataset": dataset, "output": tmp_path / "out", "sequence_length": 512}
    message = rf"{stage}.sequence_length: 512 is above max_position_embeddings 256 of .*teacher; choose at most 256"
    with pytest.raises(ConfigError, match=message):
        if stage == "finetune":
            finetune.run(FinetuneConfig(teacher=str(teacher), **common))
        else:
            distill.run(DistillConfig(teacher=teacher, student=teacher, **common))


def tie_equal_heads(weights: dict[str, torch.Tensor]) -> None:
    weights["lm_head.weight"] = weights[EMBEDDING].clone()


@pytest.mark.parametrize(
    "case", ["buffers", "tied and stored twice", "tied", "shards", "library's token", "padding -1"]
)
def test_what_is_no_fault_is_taken(case: str, model: Path) -> None:
    match case:
        case "buffers":
            add_tensors("model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq")(model)
        case "tied and stored twice":
            edit_weights(tie_equal_heads)(model)
            edit_json(model / "config.json", tie_word_embeddings=True)
        case "tied":
            edit_weights(lambda weights: weights.pop("lm_head.weight"))(model)
            edit_json(model / "config.json", tie_word_embeddings=True)
        case "shards":
            shard(model)
            save_file({"other": torch.ones(1)}, model / "consolidated.safetensors")
            assert len(list_weight_files(model)) == 2
        case "library's token":  # the class adds its own, which no file names and no text gives
            edit_json(model / "tokenizer_config.json", tokenizer_class="Qwen2Tokenizer")
        case "padding -1":
            edit_json(model / "config.json", pad_token_id=-1)
    assert check_model(model).eos_token_id == 1


@pytest.mark.parametrize(("case", "status"), [("biases", 2), ("missing shard", 1)])
def test_the_command_line_refuses_with_one_line_and_the_status(
    case: str, status: int, model: Path, tmp_path: Path
) -> None:
    CASES[case][0](model)
    (tmp_path / "corpus.jsonl").write_text('{"text": "a"}')
    file = tmp_path / "prepare.yaml"
    values = {"corpus": tmp_path / "corpus.jsonl", "teacher": model, "output": tmp_path / "out"}
    file.write_text(yaml.safe_dump({key: str(value) for key, value in values.items()}))
    finished = forks.run_python("-m", "minitron.prepare", "--config", str(file))
    assert finished.returncode == status
    assert finished.stderr.startswith(f"error: {model}: ") and finished.stderr.count("\n") == 1


def test_the_list_of_tasks_is_that_of_the_version_in_the_images() -> None:
    """Part of the catalog is read: the whole of it takes ten seconds."""
    catalog = names.read_task_names()
    for constraints in ("constraints.txt", "constraints-nemo.txt"):
        assert f"lm_eval=={catalog['version']}\n" in (REPOSITORY / constraints).read_text()
    tasks = Path(lm_eval.__file__).parent / "tasks" / "arc"
    arc = TaskManager(include_path=str(tasks), include_defaults=False).all_tasks
    assert "arc_easy" in arc and {*arc} <= {*catalog["tasks"]} and "humaneval" in catalog["unsafe"]
