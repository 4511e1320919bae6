"""Which tokenizers the page implements: bytes, and byte-level BPE as `seqmix tokenize` trains it."""

import json
from typing import Any

from ...models import Tokenizer
from ...registry import SeqmixError

DEFAULT_BPE = {
    "dropout": (None,),
    "unk_token": (None,),
    "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, ""),
    "fuse_unk": (None, False),
    "byte_fallback": (None, False),
    "ignore_merges": (None, False),
}
"""Values of the options of BPE that the page implements."""
PRE_TOKENIZER = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}


def require_page_tokenizer(tokenizer: Tokenizer | None, run: object) -> None:
    """Raise SeqmixError if the page cannot encode text like a run's tokenizer."""
    if tokenizer is None:
        raise SeqmixError(f"the playground needs runs trained on text, but {run} was trained on a task")
    if tokenizer.vocabulary is None:
        return
    if difference := _difference(json.loads(tokenizer.vocabulary)):
        raise SeqmixError(
            f"the playground reads bytes and byte-level BPE as `seqmix tokenize` trains it, but the tokenizer of {run} "
            f"has {difference}"
        )


def _difference(vocabulary: dict[str, Any]) -> str | None:
    """Return the first part of a tokenizer.json that the page does not implement; None if there is none."""
    model = vocabulary["model"]
    if model.get("type", "BPE") != "BPE":
        return f"a model of type {model['type']}"
    for option, values in DEFAULT_BPE.items():
        if model.get(option) not in values:
            return f"the option {option}: {model[option]!r}"
    if vocabulary.get("normalizer") is not None:
        return "a normalizer"
    if vocabulary.get("added_tokens"):
        return f"added tokens, such as {vocabulary['added_tokens'][0]['content']!r}"
    for part in ("pre_tokenizer", "decoder"):
        if (vocabulary.get(part) or {}).get("type") != "ByteLevel":
            return f"a {part} other than ByteLevel"
    used = PRE_TOKENIZER | vocabulary["pre_tokenizer"]
    different = (name for name, value in PRE_TOKENIZER.items() if used[name] != value)
    return next((f"the option {name} of ByteLevel" for name in different), None)
