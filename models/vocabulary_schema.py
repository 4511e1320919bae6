"""What of a tokenizer.json is refused before the library reads it: what aborts it, or expands texts without end.

A vocabulary may be a stranger's. The library checks its own format; here is what it takes and should not be given.
"""

import base64
import json
from typing import Any

from ..registry import SeqmixError

EXPANSION = 64
"""How many times longer a text may become, in bytes."""
LONGEST = 1000
"""Bytes that a part may put into a text at one place."""
LARGEST = 2**31
"""Token ids are below it."""


def require_safe(vocabulary: bytes, name: object) -> None:
    """Refuse a tokenizer.json that is unsafe to read or to encode with; errors call it `name`.

    Raises:
        SeqmixError: it is not JSON, gives a key twice, is random, or expands texts.
    """
    try:
        tree = json.loads(vocabulary, object_pairs_hook=_mapping)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise SeqmixError(f"the tokenizer {name} is not a tokenizer.json: {reason}") from error
    if not isinstance(tree, dict):
        raise SeqmixError(f"the tokenizer {name} is not a tokenizer.json: it is a {type(tree).__name__}")
    model = tree.get("model")
    if isinstance(model, dict) and model.get("dropout"):
        raise SeqmixError(
            f"the tokenizer {name} has a dropout of {model['dropout']!r}, so a text has other tokens every time: set "
            "model.dropout to null in it"
        )
    try:
        for part in ("normalizer", "pre_tokenizer", "decoder"):
            if (times := _expansion(tree.get(part))) > EXPANSION:
                raise ValueError(f"its {part} makes a text up to {times:,.0f} times longer, and {EXPANSION} are read")
    except (ValueError, RecursionError) as error:
        raise SeqmixError(f"the tokenizer {name} is refused: {error}") from error


def _mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; with a key twice, another reader may take the other value."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is given twice")
    return found


def _expansion(part: Any) -> float:
    """How many times longer a part of a tokenizer makes a text at most; ValueError: it is unsafe."""
    if isinstance(part, list):
        times = 1.0
        for each in part:
            times = min(times * _expansion(each), 1e9)
        return times
    if not isinstance(part, dict):
        return 1.0
    kind = part.get("type")
    inserted = part.get("content", part.get("prepend"))
    size = len(inserted.encode(errors="replace")) if isinstance(inserted, str) else 0
    if size > LONGEST:
        raise ValueError(f"its {kind} puts {size:,} bytes into a text, and {LONGEST:,} are read")
    if kind == "Precompiled":
        _require_table(part.get("precompiled_charsmap"))
    if kind == "Replace":
        pattern = part.get("pattern")
        replaced = pattern.get("String") if isinstance(pattern, dict) else None
        if replaced == "":
            raise ValueError("its Replace has an empty pattern")
        # a regular expression may match a single byte
        return max(1.0, size / len(replaced.encode(errors="replace")) if isinstance(replaced, str) else size)
    return _expansion([value for value in part.values() if isinstance(value, list | dict)])


def _require_table(encoded: Any) -> None:
    """Refuse a table of characters whose first number, the bytes that follow, is not that: the library allocates it."""
    table = base64.b64decode(encoded) if isinstance(encoded, str) and encoded.isascii() else b""
    size = int.from_bytes(table[:4], "little")
    if len(table) < 8 or not size or size % 4 or size > len(table) - 4:
        raise ValueError("its table of characters (precompiled_charsmap) is damaged")
