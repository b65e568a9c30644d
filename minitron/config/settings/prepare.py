"""The settings of prepare."""

from typing import Annotated

from pydantic import Field

from minitron.config.fields import Fraction
from minitron.config.settings.base import StageSettings


class PrepareSettings(StageSettings):
    """Corpus → deduplicated, split, tokenized dataset."""

    text_field: str = Field("text", description="Field of a JSON or Parquet record that holds the text.")
    messages_field: Annotated[str, Field(min_length=1)] | None = Field(
        None,
        description="Field of a JSON or Parquet record that holds a conversation, a list of {role, content}, such as "
        "messages. The tokenizer's chat template renders it, and only the tokens of the assistant count in losses. A "
        "record without it is text; none: all records are text. Needs engine hf.",
    )
    document_separator: Annotated[str, Field(min_length=1)] | None = Field(
        None,
        description="Text between two documents of a .txt file, such as a blank line; none: the file is one document, "
        "or articles if it is WikiText's.",
    )
    near_duplicates: Annotated[float, Field(ge=0.7, lt=1)] | None = Field(
        None,
        description="Drop a document if its similarity to an earlier one is at least this, such as 0.8: the Jaccard "
        "similarity of their runs of five words. Takes 2.5 kB of memory per document; none: only equal texts are "
        "dropped.",
    )
    own_splits: bool = Field(
        True,
        description="Use the corpus's own validation and test splits if it has them; False: divide all documents by "
        "the fractions.",
    )
    validation_fraction: Fraction = Field(
        0.01, description="Share of the documents kept for validation, unless the corpus has its own."
    )
    test_fraction: Fraction = Field(
        0.01, description="Share of the documents kept for testing, unless the corpus has its own."
    )
    licence: str = Field("unknown", description="License of the corpus, for the manifest and the model card.")
