"""Conversations: what of them counts, by templates of the forms of published ones, and trainings on them."""

import json
import re
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import torch
from megatron.core.datasets import indexed_dataset as megatron
from pyarrow import parquet
from tokenizers import processors
from torch import Tensor

from minitron.config.document import make_plan
from minitron.config.stages import DistillConfig, EvaluateConfig, FinetuneConfig, PrepareConfig
from minitron.data.chat import ChatReader
from minitron.data.indexed import SPLITS, IndexedDataset, IndexedWriter
from minitron.data.packed import IGNORED, PackedDataset, open_training_data
from minitron.data.text import DocumentTokenizer, Tokens
from minitron.data.tokenizer import load_tokenizer
from minitron.engines.nemo import engine as nemo_engine
from minitron.engines.samples import tiny_sentences, tiny_tokenizer
from minitron.errors import ConfigError, RunError
from minitron.models.checkpoint import load_model
from minitron.models.scoring import list_scores, score_models, share_among_sequences, sum_scores
from minitron.runtime.preflight import check_plan
from minitron.stages import distill, prepare
from minitron.storage.layout import MANIFEST, RECORD
from minitron.tracking.stage_run import Tracker

MARKED = (
    "{% for message in messages %}{% if message['role'] != 'assistant' %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% else %}"
    "{{ '<|im_start|>assistant\n' }}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{{ '\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""ChatML with marks around the answers."""

CHATML = re.sub(r"{% (end)?generation %}", "", MARKED)
LLAMA = (
    "{{ bos_token }}{% if not date_string is defined %}{% if strftime_now is defined %}"
    '{% set date_string = strftime_now("%d %b %Y") %}{% else %}{% set date_string = "26 Jul 2024" %}{% endif %}'
    "{% endif %}{{ '<|start|>system<|stop|>\n\nToday Date: ' + date_string + '\n\n<|eot|>' }}"
    "{% for message in messages %}{{ '<|start|>' + message['role'] + '<|stop|>\n\n' + message['content'] | trim + "
    "'<|eot|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant<|stop|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}"
    "{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
PLAIN = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
LAST_THINKS = CHATML.replace(
    "{{ message['content'] + '<|im_end|>' }}",
    "{{ ('<think>\n\n</think>\n\n' if loop.last else '') + message['content'] + '<|im_end|>' }}",
)
"""As Qwen3's: only the last answer begins with a thought."""

CHAT = [
    {"role": "user", "content": "gaf  lem 🎉?"},
    {"role": "assistant", "content": "  lem café 🎉\nok"},
    {"role": "user", "content": "and"},
    {"role": "assistant", "content": "no."},
]


def make_tokenizer(template: str | None = CHATML) -> Any:
    tokenizer = tiny_tokenizer(tiny_sentences(40))
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>", "<|start|>", "<|stop|>", "<|eot|>"], special_tokens=True)
    tokenizer.chat_template = template
    return tokenizer


def tokenize(tokenizer: Any, messages: Any) -> Tokens:
    conversation = ChatReader(tokenizer, "messages", Path("model")).read(messages, "record 1")
    return DocumentTokenizer(tokenizer).tokenize([conversation])[0]


def decode_counted(tokenizer: Any, tokens: Tokens) -> list[str]:
    """Return the stretches of tokens that count, decoded."""
    assert tokens.mask is not None
    edges = [0, *(i for i in range(1, len(tokens.ids)) if tokens.mask[i] != tokens.mask[i - 1]), len(tokens.ids)]
    return [tokenizer.decode(tokens.ids[a:b]) for a, b in pairwise(edges) if tokens.mask[a]]


def test_the_mask_is_that_of_transformers_with_and_without_marks() -> None:
    """Where white space is left out of offsets, as by many tokenizers, transformers finds no answer that begins so."""
    system = {"role": "system", "content": "ab"}
    marked, *others = tokenizers = [make_tokenizer(MARKED), make_tokenizer(CHATML), make_tokenizer(CHATML)]
    for tokenizer, trims in zip(tokenizers, (False, False, True), strict=True):
        tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=trims)
    for messages in ([system, *CHAT], CHAT[:2], CHAT[2:], [*CHAT, CHAT[2]], [*CHAT[:2], CHAT[3]]):
        expected = marked.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        tokens = tokenize(marked, messages)
        assert tokens.ids == [*expected["input_ids"], marked.eos_token_id]
        assert [*(tokens.mask or b"")] == [*expected["assistant_masks"], 0]  # <|im_end|> is not this tokenizer's EOS
        assert [tokenize(tokenizer, messages) for tokenizer in others] == [tokens] * 2


@pytest.mark.parametrize(
    ("template", "answers"),
    [
        (CHATML, ["  lem café 🎉\nok<|im_end|>", "no.<|im_end|>"]),
        (LLAMA, ["lem café 🎉\nok<|eot|>", "no.<|eot|>"]),
        (MISTRAL, ["   lem café 🎉\nok</s>", " no.</s>"]),
        (PLAIN, ["   lem café 🎉\nok\n", " no.\n</s>"]),
    ],
    ids=["ChatML", "Llama 3", "Mistral", "without end tokens"],
)
def test_an_answer_counts_with_what_ends_it(template: str, answers: list[str]) -> None:
    tokenizer = make_tokenizer(template)
    tokens = tokenize(tokenizer, CHAT)
    text = tokenizer.decode(tokens.ids)
    assert decode_counted(tokenizer, tokens) == answers
    assert text.count("<s>") == template.count("bos_token")
    assert text.endswith("</s>") and not text.endswith("</s></s>")
    assert ("26 Jul 2024" in text) == (template == LLAMA)


def test_a_thought_that_only_the_last_answer_has_counts_there() -> None:
    tokenizer = make_tokenizer(LAST_THINKS)
    answers = ["  lem café 🎉\nok<|im_end|>", "<think>\n\n</think>\n\nno.<|im_end|>"]
    assert decode_counted(tokenizer, tokenize(tokenizer, CHAT)) == answers


def test_a_template_that_changes_what_was_said_is_refused_unless_it_marks_the_answers() -> None:
    """It ends a conversation with a token of its own, as Phi-3's."""
    tokenizer = make_tokenizer(end_conversation(CHATML))
    assert decode_counted(tokenizer, tokenize(tokenizer, CHAT[:2])) == ["  lem café 🎉\nok<|im_end|>\n</s>"]
    message = r"record 1: message 2: the chat template writes .* in another way .* mark the answers .*{% generation %}"
    with pytest.raises(ConfigError, match=message):
        tokenize(tokenizer, CHAT)
    tokenizer = make_tokenizer(end_conversation(MARKED))
    assert decode_counted(tokenizer, tokenize(tokenizer, CHAT))[0] == "  lem café 🎉\nok<|im_end|>"


def end_conversation(template: str) -> str:
    return template.removesuffix("{% endif %}") + "{% else %}{{ eos_token }}{% endif %}"


def answer(content: Any, **fields: Any) -> list[dict[str, Any]]:
    return [CHAT[0], {"role": "assistant", "content": content, **fields}]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hello", "record 1: field 'messages' is str, not a list of messages with role and content"),
        (["hello"], r"message 1: no role and content \(found: str\); name its fields role and content"),
        ([{"from": "human", "value": "x"}], r"message 1: no role and content \(found: from, value\)"),
        (answer([{"type": "text", "text": "x"}]), "message 2: content is list, not text; make it one text"),
        (answer("x", tool_calls=[{"name": "f"}]), "message 2: a call of a tool or its result, .* leave such records"),
        ([*CHAT, {"role": "tool", "content": "4"}], "message 5: a call of a tool or its result"),
        ([{"role": 3, "content": "x"}], "message 1: role is int, not text; correct it"),
        (CHAT[1:], r"record 1: the chat template refuses the conversation \(Conversation roles must alternate"),
    ],
)
def test_malformed_messages_are_refused_by_their_numbers(messages: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tokenize(make_tokenizer(MISTRAL), messages)


@pytest.mark.parametrize("messages", [[], CHAT[:1], answer(None), answer(" \r\n"), [*CHAT[:3], *answer("")]])
def test_a_conversation_with_nothing_to_learn_is_empty(messages: Any) -> None:
    assert not ChatReader(make_tokenizer(), "messages", Path("model")).read(messages, "record 1")


def test_messages_are_normalized_like_documents() -> None:
    messages = [{"role": role, "content": f"e\u0301 {role} \r\nx\0 \n"} for role in ("user", "assistant")]
    text = ChatReader(make_tokenizer(), "messages", Path("model")).read(messages, "record 1")
    assert "<|im_start|>user\né user\nx<|im_end|>" in text


# --- datasets ----------------------------------------------------------------------------------------------------

TURNS = (
    "{% for message in messages %}{{ '[' + message['role'] + '] ' + message['content'] + eos_token + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)
"""A template of Zephyr's form, for a tokenizer without special tokens but BOS and EOS."""


def make_records(count: int) -> list[dict[str, Any]]:
    """Return conversations of one and two questions, some of which are long and have no answer for a while."""
    sentences = tiny_sentences(4 * count)
    records = []
    for number in range(count):
        question, reply, more, last = (text.split() for text in sentences[4 * number : 4 * number + 4])
        messages = [("user", question[: 5 + 60 * (number % 5 == 0)]), ("assistant", reply[:12])]
        messages += [("user", more[:3]), ("assistant", last[:20])] if number % 2 else []
        records.append({"messages": [{"role": role, "content": " ".join(words)} for role, words in messages]})
    return records


@pytest.fixture(scope="module")
def chat_teacher(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny teacher with a chat template."""
    directory = shutil.copytree(teacher, tmp_path_factory.mktemp("chat") / "teacher")
    (directory / "chat_template.jinja").write_text(TURNS)
    return directory


@pytest.fixture(scope="module")
def chat_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conversations, two of them twice, one without an answer, and some texts."""
    path = tmp_path_factory.mktemp("corpus") / "chat.jsonl"
    records: list[Any] = make_records(300)
    texts = [{"text": text, "messages": None} for text in tiny_sentences(20, seed=9)]
    records += [*records[:2], {"messages": records[0]["messages"][:1]}, *texts]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def prepare_chat(corpus: Any, teacher: Path, output: Path, **settings: Any) -> dict[str, Any]:
    shares = {"validation_fraction": 0.2, "test_fraction": 0.1, "messages_field": "messages"}
    address = str(corpus) if isinstance(corpus, Path) else corpus
    values: dict[str, Any] = {"corpus": address, "teacher": str(teacher), "output": output} | shares | settings
    return prepare.run(PrepareConfig(**values))


@pytest.fixture(scope="module")
def chat_dataset(chat_corpus: Path, chat_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("prepared") / "dataset"
    metrics = prepare_chat(chat_corpus, chat_teacher, output)["metrics"]
    assert metrics["duplicates"] == 2 and metrics["empty"] == 1 and metrics["documents"] == 320
    assert 0 < metrics["validation_counted_tokens"] < metrics["validation_tokens"]
    return output


def test_prepare_writes_conversations_and_their_masks(chat_dataset: Path, chat_teacher: Path) -> None:
    manifest = json.loads((chat_dataset / MANIFEST).read_text())
    assert manifest["messages_field"] == "messages"
    tokenizer, whole = load_tokenizer(chat_teacher), 0
    expected = {
        (f"{answers[-1]['content']}</s>", len(answers))
        for record in make_records(300)
        if (answers := [message for message in record["messages"] if message["role"] == "assistant"])
    }
    for split in SPLITS:
        read, theirs = IndexedDataset(chat_dataset / split), megatron.IndexedDataset(str(chat_dataset / split))
        assert manifest["counted_tokens"][split] == int(read.mask.sum()) == read.count_tokens_of_loss()
        assert set(manifest["mask_sha256"]) == set(SPLITS) and len(theirs) == len(read) > 0
        for index in range(len(read)):
            tokens = Tokens(read[index].tolist(), read.read_mask(index).tobytes())
            assert theirs[index].tolist() == tokens.ids
            counted = decode_counted(tokenizer, tokens)
            if all(tokens.mask or b""):
                whole += 1
            else:
                assert (counted[-1].removeprefix(" "), len(counted)) in expected
    assert whole == 20  # the texts


def test_parquet_and_a_field_of_another_name_give_the_same_dataset(
    chat_corpus: Path, chat_teacher: Path, chat_dataset: Path, tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in chat_corpus.read_text().splitlines()]
    rows = [{"turns": row["messages"], "text": row.get("text"), "id": 1} for row in rows]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "chat.parquet")
    prepare_chat(tmp_path / "chat.parquet", chat_teacher, tmp_path / "out", messages_field="turns")
    for name in ("train.bin", "train.idx", "train.mask", "validation.mask"):
        assert (tmp_path / "out" / name).read_bytes() == (chat_dataset / name).read_bytes()


def test_text_alone_is_written_as_without_the_setting_and_a_wrong_field_refused(
    inputs: dict[str, Path], chat_teacher: Path, chat_corpus: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"no record has the field 'messages'; set prepare.messages_field to the"):
        prepare_chat(inputs["corpus"], chat_teacher, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"no field 'text' \(found: messages\); .* or messages_field to that of conv"):
        prepare_chat(chat_corpus, chat_teacher, tmp_path / "out", messages_field=None)
    prepare_chat(inputs["corpus"], chat_teacher, tmp_path / "out", messages_field=None)
    assert not list((tmp_path / "out").glob("*.mask"))
    assert (
        not {"messages_field", "counted_tokens", "mask_sha256"}
        & json.loads((tmp_path / "out" / MANIFEST).read_text()).keys()
    )


def test_a_tokenizer_without_a_template_is_refused_before_anything_is_written(
    chat_corpus: Path, teacher: Path, tmp_path: Path
) -> None:
    message = f"{teacher}: the tokenizer has no chat template, .* put the chat_template.jinja of one beside tokenizer"
    with pytest.raises(ConfigError, match=message):
        prepare_chat(chat_corpus, teacher, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_a_template_says_makes_no_near_duplicates(chat_teacher: Path, tmp_path: Path) -> None:
    model, corpus = shutil.copytree(chat_teacher, tmp_path / "model"), tmp_path / "chat.jsonl"
    (model / "chat_template.jinja").write_text(" ".join(map(str, range(100))) + TURNS)
    words = [text.split()[:12] for text in tiny_sentences(60)]
    said = [" ".join(some) for some in (*words, [*words[0], "also"])]
    records = [{"messages": [CHAT[0], {"role": "assistant", "content": text}]} for text in said]
    corpus.write_text("".join(json.dumps(record) + "\n" for record in records))
    metrics = prepare_chat(corpus, model, tmp_path / "out", near_duplicates=0.7)["metrics"]
    assert metrics["near_duplicates"] == 1 and metrics["documents"] == 60


def test_a_mixture_repeats_conversations_with_their_masks(
    inputs: dict[str, Path], chat_corpus: Path, chat_teacher: Path, tmp_path: Path
) -> None:
    corpus = [{"address": str(chat_corpus), "weight": 3}, {"address": str(inputs["corpus"]), "weight": 1}]
    prepare_chat(corpus, chat_teacher, tmp_path / "out")
    read, tokenizer = IndexedDataset(tmp_path / "out" / "train"), load_tokenizer(chat_teacher)
    assert len(set(read.starts)) < len(read)
    for index in range(len(read)):
        is_chat = "[assistant]" in tokenizer.decode(read[index].tolist())
        assert is_chat != read.read_mask(index).all()
    own = [corpus[0] | {"messages_field": "messages"}, corpus[1]]
    prepare_chat(own, chat_teacher, tmp_path / "own", messages_field=None)
    for kind in (".bin", ".idx", ".mask"):
        assert (tmp_path / "own" / f"train{kind}").read_bytes() == (tmp_path / "out" / f"train{kind}").read_bytes()
    own[1] = corpus[1] | {"messages_field": "messages"}
    with pytest.raises(
        ConfigError, match=rf"corpus {inputs['corpus']}: no record has the field 'messages'; set its messages_field"
    ):
        prepare_chat(own, chat_teacher, tmp_path / "none", messages_field=None)


def test_labels_are_ignored_where_the_mask_says_so(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    documents = [rng.integers(2, 500, size=length).tolist() for length in rng.integers(1, 40, size=60)]
    masks = [rng.integers(0, 2, size=len(ids), dtype=np.uint8).tobytes() for ids in documents]
    masks[3:5] = [None, None]
    writer = IndexedWriter(tmp_path / "train", 512, has_masks=True)
    writer.add_documents(documents, masks)
    writer.close()
    order = np.random.default_rng(5).permutation(60)
    stream = [token for index in order for token in documents[index]]
    counts = [bit for index in order for bit in (masks[index] or b"\1" * len(documents[index]))]
    packed = PackedDataset(tmp_path / "train", 16, seed=5)
    for index in range(len(packed)):
        span = range(index * 16 + 1, index * 16 + 17)
        assert packed[index]["input_ids"].tolist() == stream[index * 16 : index * 16 + 16]
        assert packed[index]["labels"].tolist() == [stream[i] if counts[i] else IGNORED for i in span]
    path = tmp_path / "train.mask"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(RunError, match=r"train.mask: damaged: \d+ bytes for \d+ tokens; run prepare again"):
        PackedDataset(tmp_path / "train", 16, seed=5)


# --- losses ------------------------------------------------------------------------------------------------------


def compute_dense_terms(teacher: Any, student: Any, items: list[dict[str, Tensor]]) -> dict[str, float]:
    """Return the means over the tokens that count, from whole logits in float64."""
    input_ids = torch.stack([item["input_ids"] for item in items])
    labels = torch.stack([item["labels"] for item in items])
    with torch.no_grad():
        log_p, log_q = (torch.log_softmax(model(input_ids).logits.double(), -1) for model in (teacher, student))
    counts = labels != IGNORED
    kl, chosen = (log_p.exp() * (log_p - log_q)).sum(-1), labels.clamp(min=0)[..., None]
    rows = {"kl": kl, "cross_entropy": -log_q.gather(-1, chosen)[..., 0], "teacher": -log_p.gather(-1, chosen)[..., 0]}
    return {name: values[counts].mean().item() for name, values in rows.items()}


TRAINING = {
    "sequence_length": 16, "global_batch_size": 8, "max_steps": 2, "warmup_steps": 0, "validation_interval": 1,
    "validation_sequences": 40, "learning_rate": 1e-3, "cross_entropy_weight": 0.5,
}  # fmt: skip
"""Sequences so short that no token counts in some of them."""


@pytest.fixture(scope="module")
def models(compressed: EvaluateConfig) -> dict[str, Path]:
    return {"teacher": compressed.teacher, "student": compressed.pruned}


def test_a_distillation_has_the_means_over_the_tokens_that_count(
    models: dict[str, Path], chat_dataset: Path, tmp_path: Path
) -> None:
    places = {**models, "dataset": chat_dataset}
    teacher, student = (load_model(path, torch.float32) for path in models.values())
    train, validation = open_training_data(DistillConfig(output=tmp_path, micro_batch_size=1, **places, **TRAINING))
    batch = [train[index] for index in range(8)]
    assert any((item["labels"] == IGNORED).all() for item in batch)
    dense = compute_dense_terms(teacher, student, batch)
    held_out = compute_dense_terms(teacher, student, [validation[index] for index in range(40)])
    histories = {}
    for name, change in {
        "in ones": {"micro_batch_size": 1},
        "in fours": {"micro_batch_size": 4},
        "cached": {"micro_batch_size": 4, "teacher_cache": "sampled", "teacher_cache_size": 255, "workspace": tmp_path},
    }.items():
        result = distill.run(DistillConfig(output=tmp_path / name, **places, **TRAINING, **change))
        assert result["metrics"]["teacher_validation_loss"] == pytest.approx(held_out["teacher"], rel=1e-5)
        untrained, first, *_ = histories[name] = result["history"]
        assert untrained["validation_loss"] == pytest.approx(held_out["cross_entropy"], rel=1e-5)
        is_cached = name == "cached"
        assert first["kl"] == pytest.approx(dense["kl"], rel=0.1 if is_cached else 1e-5)
        assert first["cross_entropy"] == pytest.approx(dense["cross_entropy"], rel=1e-5)
        assert first["teacher_loss"] == pytest.approx(dense["teacher"], rel=1e-5)
        if not is_cached:
            assert first["loss"] == pytest.approx(dense["kl"] + 0.5 * dense["cross_entropy"], rel=1e-5)
    for left, right in zip(histories["in ones"], histories["in fours"], strict=True):
        shared = {name: value for name, value in left.items() if name in right and "per_second" not in name}
        assert {name: right[name] for name in shared} == pytest.approx(shared, rel=1e-4), (left, right)


def test_a_step_in_which_no_token_counts_has_no_loss_and_no_gradient(
    models: dict[str, Path], chat_dataset: Path, tmp_path: Path
) -> None:
    dataset = shutil.copytree(chat_dataset, tmp_path / "dataset")
    (dataset / "train.mask").write_bytes(bytes((dataset / "train.mask").stat().st_size))
    (dataset / RECORD).unlink()
    config = DistillConfig(output=tmp_path / "out", dataset=dataset, micro_batch_size=4, **models, **TRAINING)
    untrained, *rows = distill.run(config)["history"]
    steps = [row for row in rows if "loss" in row]
    assert len(steps) == 2 and all(row["loss"] == row["kl"] == row["grad_norm"] == 0 for row in steps)
    assert rows[-1]["validation_loss"] == pytest.approx(untrained["validation_loss"], rel=1e-3)


def test_scores_are_means_over_the_tokens_that_count(models: dict[str, Path], chat_dataset: Path) -> None:
    teacher, student = (load_model(path, torch.float32) for path in models.values())
    dataset = PackedDataset(chat_dataset / "validation", 16, seed=1234)
    dense = compute_dense_terms(teacher, student, [dataset[index] for index in range(40)])
    found = score_models({"student": student}, dataset, 40, 3, teacher)["student"]
    assert {name: found[name] for name in ("loss", "kl")} == pytest.approx(
        {"loss": dense["cross_entropy"], "kl": dense["kl"]}, rel=1e-5
    )
    items = list_scores(*sum_scores({"student": student}, dataset, 40, 3, teacher), has_reference=True)["student"]
    alone = next(index for index in range(40) if (dataset[index]["labels"] == IGNORED).all())
    assert items["loss"][alone] == pytest.approx(found["loss"])


def test_shares_vary_over_resamples_as_the_mean_over_tokens_does() -> None:
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(0, 60, (400,), generator=generator).double()
    sums = counts * (2 + torch.rand(400, generator=generator).double())
    shares = share_among_sequences(sums[:, None], counts)[:, 0]
    drawn = torch.randint(400, (2000, 400), generator=generator)
    means = sums[drawn].sum(-1) / counts[drawn].sum(-1)
    torch.testing.assert_close(shares.mean(), sums.sum() / counts.sum())
    torch.testing.assert_close(shares[drawn].mean(-1), means, rtol=5e-3, atol=0)
    torch.testing.assert_close(shares[drawn].mean(-1).std(), means.std(), rtol=2e-2, atol=0)
    same = share_among_sequences(sums[:, None], torch.full_like(counts, 32))
    assert torch.equal(same, sums[:, None] / 32)
    with pytest.raises(ConfigError, match="no token of the 400 sequences scored is an assistant's; raise validation_"):
        share_among_sequences(sums[:, None], torch.zeros(400, dtype=torch.float64))


# --- engine nemo -------------------------------------------------------------------------------------------------


def test_engine_nemo_is_refused_before_a_gpu_is_paid_for(
    models: dict[str, Path], chat_dataset: Path, tmp_path: Path
) -> None:
    mixture = [{"address": "/a", "weight": 1, "messages_field": "messages"}, {"address": "/b", "weight": 1}]
    for corpus in ({"corpus": "/c", "prepare.messages_field": "messages"}, {"corpus": mixture}):
        with pytest.raises(ConfigError, match=r"engine: nemo does not support the masks of conversations .*; use hf"):
            check_plan(make_plan({"teacher": "/t", "engine": "nemo"} | corpus), [])
    config = FinetuneConfig(
        engine="nemo", output=tmp_path / "out", dataset=chat_dataset, teacher=str(models["teacher"])
    )
    with pytest.raises(
        ConfigError, match=r"engine nemo: .* has masks of conversations, which it does not support; use"
    ):
        nemo_engine.train(config, models["teacher"], tmp_path / "out", Tracker({}))
