"""Generate text from a Hugging Face directory. Every registered model has this module, so it does not need minitron.

mlflow.pyfunc.load_model("models:/minitron@challenger").predict(["The history of the city"])
"""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


class Generator:
    """A causal language model that continues texts greedily."""

    def __init__(self, directory: str) -> None:
        """Load the model and the tokenizer, on the GPU if there is one."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._tokenizer: Any = AutoTokenizer.from_pretrained(directory)
        model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype="auto")
        self._model = model.to(device).eval()

    def predict(self, model_input: Any, params: dict[str, Any] | None = None) -> list[str]:
        """Return the continuation of every text.

        Args:
            model_input: a list of texts, or the one-column DataFrame that MLflow makes from it.
            params: `max_new_tokens`, 64 by default.
        """
        texts = model_input.iloc[:, 0] if hasattr(model_input, "iloc") else model_input
        length = int((params or {}).get("max_new_tokens", 64))
        return [self._continue_text(str(text), length) for text in texts]

    @torch.inference_mode()
    def _continue_text(self, text: str, length: int) -> str:
        tokens = self._tokenizer(text, return_tensors="pt", return_token_type_ids=False).to(self._model.device)
        generated = self._model.generate(
            **tokens, max_new_tokens=length, do_sample=False, pad_token_id=self._tokenizer.eos_token_id
        )
        return self._tokenizer.decode(generated[0, tokens["input_ids"].shape[1] :], skip_special_tokens=True)


def _load_pyfunc(directory: str) -> Generator:
    """Load the model for mlflow.pyfunc."""
    return Generator(directory)
