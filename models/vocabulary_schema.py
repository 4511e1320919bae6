"""Safety checks on a tokenizer.json before the library reads it: parts that would abort the process or expand texts.

A vocabulary may come from an untrusted source. The library checks its own format; these checks refuse files that are
valid for the library but unsafe.
"""

import base64
import json
from typing import Any

from ..registry import DataError

MAX_EXPANSION = 64
"""Maximum factor by which a part of a tokenizer (normalizer, decoder, ...) may increase the bytes of a text."""
MAX_INSERTED_BYTES = 1000
"""Maximum number of bytes that a part may insert into a text at one position."""
MAX_TOKEN_IDS = 2**31
"""Upper bound of token IDs, exclusive."""


def require_safe(vocabulary: bytes, name: object) -> None:
    """Refuse a tokenizer.json that is unsafe to read or to encode with; `name` is its name in errors.

    Raises:
        DataError: the file is not JSON, gives a key twice, encodes at random (dropout), or expands texts.
    """
    try:
        tree = json.loads(vocabulary, object_pairs_hook=_mapping)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise DataError(f"the tokenizer {name} is not a tokenizer.json: {reason}") from error
    if not isinstance(tree, dict):
        raise DataError(f"the tokenizer {name} is not a tokenizer.json: it is a {type(tree).__name__}")
    model = tree.get("model")
    if isinstance(model, dict) and model.get("dropout"):
        raise DataError(
            f"the tokenizer {name} has a dropout of {model['dropout']!r}, which encodes a text differently every time: "
            "set model.dropout to null in the file"
        )
    try:
        for part in ("normalizer", "pre_tokenizer", "decoder"):
            if (times := _expansion(tree.get(part))) > MAX_EXPANSION:
                raise ValueError(
                    f"its {part} makes texts up to {times:,.0f} times longer; at most {MAX_EXPANSION} is allowed"
                )
    except (ValueError, RecursionError) as error:
        raise DataError(f"the tokenizer {name} is refused: {error}") from error


def _mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object; refuse a key that is given twice, as other readers may use the other value."""
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        raise ValueError("a key is given twice")
    return mapping


def _expansion(part: Any) -> float:
    """Return the largest factor by which a part of a tokenizer lengthens a text.

    Raises:
        ValueError: the part is unsafe.
    """
    if isinstance(part, list):
        times = 1.0
        for step in part:
            times = min(times * _expansion(step), 1e9)
        return times
    if not isinstance(part, dict):
        return 1.0
    kind = part.get("type")
    inserted = part.get("content", part.get("prepend"))
    size = len(inserted.encode(errors="replace")) if isinstance(inserted, str) else 0
    if size > MAX_INSERTED_BYTES:
        raise ValueError(f"its {kind} inserts {size:,} bytes into a text; at most {MAX_INSERTED_BYTES:,} are allowed")
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
    """Refuse a table of characters whose first number, a size in bytes, is wrong: the library allocates that many."""
    table = base64.b64decode(encoded) if isinstance(encoded, str) and encoded.isascii() else b""
    size = int.from_bytes(table[:4], "little")
    if len(table) < 8 or not size or size % 4 or size > len(table) - 4:
        raise ValueError("its table of characters (precompiled_charsmap) is damaged")
