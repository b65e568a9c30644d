"""Render conversations by the tokenizer's chat template, and find in the text what the assistant says.

A conversation is a list of messages, each {role, content}. Of its tokens, those of the assistant's answers count in the
loss, the token that ends an answer among them. Answers are found

- by the template's own marks, `{% generation %}` and `{% endgeneration %}`, if it has them;
- else by its text: the conversation before an answer is rendered with the prompt for one, and once more with the
  answer. The first text must begin the second, and the second the whole; what the second adds is the answer's. Most
  published templates are so. Some begin only the last answer with a thought, such as Qwen3's: without it, the second
  text must begin the whole. Others are refused, because they write a message in another way when others follow.

White space after the token that ends an answer is the template's, and does not count.
"""

import re
from pathlib import Path
from typing import Any

from minitron.data.text import Conversation, list_end_tokens, normalize_text
from minitron.errors import ConfigError

_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""The mark of an answer, as transformers finds it."""

_FIXED_DATE = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}"
"""Put before a template that writes the day's date, so that it writes Llama 3.1's default, and a dataset is the same on
every day."""

_PROBE = "\ue000"
"""An answer that no template has in its own text."""

_REMEDY = "mark the answers in the template with {% generation %} and {% endgeneration %}"


class ChatReader:
    """Read the conversations in a field of records.

    Attributes:
        field: the field of the messages.
        count: number of conversations read.
    """

    def __init__(self, tokenizer: Any, field: str, model: Path) -> None:
        """Take the tokenizer's template.

        Raises:
            ConfigError: it has none; `model` is named.
        """
        self.field, self.count = field, 0
        try:
            template = tokenizer.get_chat_template()
        except ValueError as error:
            raise ConfigError(
                f"{model}: the tokenizer has no chat template, which prepare.messages_field needs; give an "
                "instruction-tuned model, or put the chat_template.jinja of one beside tokenizer.json"
            ) from error
        self._template = (_FIXED_DATE if "strftime_now" in template else "") + template
        self._special_tokens = tokenizer.special_tokens_map
        self._end_tokens = list_end_tokens(tokenizer)

    def read(self, messages: Any, where: str) -> Conversation:
        """Return a conversation, rendered; it is empty if the assistant has no answer, or one without text.

        Args:
            messages: the value of the field.
            where: names the record in messages of errors.

        Raises:
            ConfigError: the messages are malformed, the template refuses them, or the answers cannot be found.
        """
        self.count += 1
        messages = self._check_messages(messages, where)
        places = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
        if not places or not all(messages[place]["content"] for place in places):
            return Conversation("")
        if _MARK.search(self._template):
            (text,), (answers,) = self._render([messages], where, return_assistant_tokens_mask=True)
        else:
            text, answers = self._find_answers(messages, places, where)
        words = "\n".join(message["content"] for message in messages)
        return Conversation(text, [(start, end) for start, end in answers if start < end], words)

    def _check_messages(self, messages: Any, where: str) -> list[dict[str, str]]:
        """Return role and normalized content of every message."""
        if not isinstance(messages, list):
            kind = type(messages).__name__
            raise ConfigError(f"{where}: field {self.field!r} is {kind}, not a list of messages with role and content")
        return [
            _check_message(message, f"{where}: message {number}") for number, message in enumerate(messages, start=1)
        ]

    def _find_answers(
        self, messages: list[dict[str, str]], places: list[int], where: str
    ) -> tuple[str, list[tuple[int, int]]]:
        """Return the text of a conversation, and start and end of the answers in it."""
        prompts, _ = self._render([messages[:place] for place in places], where, add_generation_prompt=True)
        ends = sorted({*(place + 1 for place in places), len(messages)})
        texts, _ = self._render([messages[:end] for end in ends], where)
        text, answers = texts[-1], list[tuple[int, int]]()
        for place, prompt, until in zip(places, prompts, texts[: len(places)], strict=True):
            if not text.startswith(until):
                until = prompt + until[len(self._render_lead(messages[:place], prompt, where)) :]
            if not (until.startswith(prompt) and text.startswith(until)):
                raise ConfigError(
                    f"{where}: message {place + 1}: the chat template writes the conversation up to this answer in "
                    f"another way than in the whole, so it cannot be told what the assistant says; {_REMEDY}"
                )
            stripped = until.rstrip()
            answers.append((len(prompt), len(stripped if stripped.endswith(self._end_tokens) else until)))
        return text, answers

    def _render_lead(self, messages: list[dict[str, str]], prompt: str, where: str) -> str:
        """Return the text up to the words of an answer, the last one of a conversation; the prompt for it begins it."""
        (text,), _ = self._render([[*messages, {"role": "assistant", "content": _PROBE}]], where)
        lead, found, _ = text.partition(_PROBE)
        return lead if found and lead.startswith(prompt) else prompt

    def _render(self, conversations: list[list[dict[str, str]]], where: str, **options: Any) -> Any:
        """Return the texts of conversations, and of each what is marked in it if that is asked for."""
        from transformers.utils.chat_template_utils import render_jinja_template

        values = {"chat_template": self._template, **self._special_tokens, **options}
        try:
            return render_jinja_template(conversations=conversations, **values)
        except Exception as error:  # a template may raise anything
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise ConfigError(
                f"{where}: the chat template refuses the conversation ({reason}); leave it out of the corpus, or "
                "change the template"
            ) from error


def _check_message(message: Any, where: str) -> dict[str, str]:
    """Return role and normalized content of a message; a content of null counts as empty.

    Raises:
        ConfigError: it has other fields, calls a tool or is from one, or its content is not text.
    """
    if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
        found = ", ".join(message) if isinstance(message, dict) else type(message).__name__
        raise ConfigError(f"{where}: no role and content (found: {found}); name its fields role and content")
    role, content = message["role"], message["content"]
    if role == "tool" or message.get("tool_calls"):
        raise ConfigError(f"{where}: a call of a tool or its result, which is not supported; leave such records out")
    if not isinstance(role, str):
        raise ConfigError(f"{where}: role is {type(role).__name__}, not text; correct it")
    if not isinstance(content, str | None):
        raise ConfigError(f"{where}: content is {type(content).__name__}, not text; make it one text")
    return {"role": role, "content": normalize_text(content or "")}
