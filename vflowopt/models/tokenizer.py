"""A model's tokenizer, with the chat template that knows pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer
from transformers.utils.hub import cached_file


def load_tokenizer(model: str | Path) -> Any:
    """Load the tokenizer of a folder or hub id; errors are Hugging Face's."""
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    # Folders of before chat_template.jinja keep the template that knows pictures here, and the one of the language
    # model, which takes text alone, with the tokenizer: the processor's goes first, as in Hugging Face's processor.
    template = cached_file(
        str(model),
        "chat_template.json",
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if template is not None:
        tokenizer.chat_template = json.loads(Path(template).read_text(encoding="utf-8"))["chat_template"]
    return tokenizer
