"""Read the manifest of a dataset, `manifest.json`, without torch: register's image has none."""

import json
from pathlib import Path
from typing import Any

from minitron.data.tokenizer import tokenizer_hash
from minitron.errors import ConfigError
from minitron.storage.layout import MANIFEST


def read_manifest(dataset: Path) -> dict[str, Any]:
    """Return the manifest of a prepared dataset.

    Raises:
        ConfigError: the directory has no manifest.
    """
    path = dataset / MANIFEST
    if not path.is_file():
        raise ConfigError(f"{dataset}: no {MANIFEST}; give a directory that prepare wrote")
    return json.loads(path.read_text())


def check_tokenizer(dataset: Path, model: Path) -> None:
    """Check that a model has the same tokenizer as the dataset.

    Raises:
        ConfigError: the tokenizers differ.
    """
    expected, actual = read_manifest(dataset)["tokenizer_sha256"], tokenizer_hash(model)
    if actual != expected:
        raise ConfigError(
            f"{model}: tokenizer {actual[:12]}, but {dataset} was tokenized with {expected[:12]}; "
            "prepare the corpus again with this model as teacher"
        )
