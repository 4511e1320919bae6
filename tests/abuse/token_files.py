"""Token files of anyone's making: every checksum matches, and what is in them no text has."""

import json
import random
from collections.abc import Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
from abuse.tally import Case

from seqmix import load_config
from seqmix.cli.progress import run_with_progress
from seqmix.models import train_bpe

SMALL = (
    *("model.d_model=16", "model.n_layers=1", "model.vocab_size=400", "data.sequence_length=16", "training.steps=1"),
    *("training.batch_size=2", "training.evaluation_batches=1", "training.final_evaluation_batches=2"),
)
NUMBERS = ("0", "-1", "1", "9" * 400, "9" * 5000, "1e3", "1.5", "", " ", "nan", "inf", "٣٣٣", "0x10", "²", str(2**63))
TOKENS, DOCUMENTS = 4000, 20


def token_files(folder: Path, drawn: random.Random) -> Iterator[Case]:
    """Every table and every field of the metadata with other values."""
    (folder / "text.txt").write_text("the text of a small run, over and over again. " * 60)
    vocabulary = train_bpe([("a", b"the text of a small run")], 300, folder / "t.json")
    number = count()
    for name, begin, identity in (("bytes", 256, "bytes"), (folder / "t.json", vocabulary.begin, vocabulary.identity)):

        def case(what: str, name: Any = name, begin: int = begin, identity: str = identity, **changes: Any) -> Case:
            file = folder / f"{next(number)}.tokens"
            refused = changes.pop("refused", True)
            return Case(f"{identity[:6]}: {what}", partial(_use, file, name, begin, identity, changes), refused)

        yield case("whole", refused=False)
        yield from (case(f"{value!r:.20} bytes", bytes=value) for value in NUMBERS)
        yield from (case(f"begins with {value!r:.20}", begins=value) for value in (*NUMBERS, "3", "399", "65535"))
        for what, change in _tokens(begin, drawn):
            yield case(what, tokens=change)
        for what, ends in _ends(drawn):
            yield case(what, ends=ends)
        for table in ("digests", "checks"):
            yield case(f"fewer {table}", **{table: lambda x: x[:-1]})
            yield case(f"more {table}", **{table: lambda x: np.concatenate((x, x))})
            yield case(f"no {table}", **{table: lambda x: x[:0]})
            yield case(f"{table} of two dimensions", **{table: lambda x: x[None]})
        yield case("equal digests", digests=lambda x: x * 0, refused=False)
        for dtype in ("<u1", "<i2", "<f4", "<u8", "<i8"):
            yield case(f"tokens as {dtype}", tokens=lambda x, d=dtype: x.astype(d))


def _tokens(begin: int, drawn: random.Random) -> Iterator[tuple[str, Any]]:
    at = drawn.randrange(1, 150)

    def with_one(value: int) -> Any:
        def change(x: np.ndarray) -> np.ndarray:
            x = x.astype("<u4" if value >= 2**16 else x.dtype)
            x[at] = value
            return x

        return change

    for value in (begin + 1, 399, 400, 401, 65535, 65536, 2**31, 2**32 - 1):
        yield f"token {value} at {at}", with_one(value)
    yield "one token", lambda x: x[:1]
    yield "a token less", lambda x: x[:-1]
    yield "a token more", lambda x: np.concatenate((x, x[:1]))
    yield "no tokens", lambda x: x[:0]
    yield "all tokens out of range", lambda x: x * 0 + 60000
    yield "begin tokens alone", lambda x: x * 0 + begin
    yield "begin tokens in documents", lambda x: np.where(np.arange(len(x)) % 7 == 0, begin, x).astype(x.dtype)


def _ends(drawn: random.Random) -> Iterator[tuple[str, Any]]:
    for value in (-1, 0, -(2**63), 2**63 - 1, 2**62, TOKENS + 1, TOKENS * 1000):
        for at in (0, drawn.randrange(1, DOCUMENTS - 1), -1):

            def change(x: np.ndarray, value: int = value, at: int = at) -> np.ndarray:
                x = x.copy()
                x[at] = value
                return x

            yield f"end {value} at {at}", change
    yield "falling ends", lambda x: x[::-1].copy()
    yield "equal ends", lambda x: x * 0 + TOKENS
    yield "twice one end", lambda x: np.sort(np.concatenate((x[:-1], x[:1])))
    yield "fewer ends", lambda x: x[:-1]


def _use(file: Path, tokenizer: Any, begin: int, identity: str, changes: dict[str, Any]) -> None:
    """Write a token file with right checksums, and train on it with every split and order."""
    drawn = np.random.default_rng(0)
    tokens = drawn.integers(0, min(begin, 256), TOKENS).astype("<u2")
    ends = np.arange(1, DOCUMENTS + 1, dtype="<i8") * (TOKENS // DOCUMENTS)
    tokens[[0, *ends[:-1]]] = begin
    tables = {"ends": ends, "digests": drawn.integers(0, 2**63, DOCUMENTS).astype("<u8") * 2}
    tokens = changes.get("tokens", lambda x: x)(tokens)
    tables["checks"] = np.array([crc32(tokens.tobytes())], dtype="<u4")
    tables = {name: changes.get(name, lambda x: x)(table) for name, table in tables.items()}
    check = 0
    for table in tables.values():
        check = crc32(table.tobytes(), check)
    metadata = {"tokens": "1", "tokenizer": identity, "begin": changes.get("begins", str(begin))}
    metadata |= {"bytes": changes.get("bytes", str(TOKENS - DOCUMENTS)), "tables": str(check)}
    _write(file, {"tokens": tokens} | tables, metadata)
    for number, more in enumerate(
        (["data.split=tail", "data.packing=true"], ["data.split=by_document", "data.order=epochs"])
    ):
        changed = [*SMALL, f"data.paths=[{file}]", f"data.tokenizer={tokenizer}", *more]
        run_with_progress(load_config("retnet-tiny", changed), file.with_suffix(f".{number}"), resume=False)


def _write(file: Path, arrays: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    entries: dict[str, Any] = {"__metadata__": {f"seqmix.{key}": value for key, value in metadata.items()}}
    end = 0
    for name, array in arrays.items():
        start, end = end, end + array.nbytes
        kind = f"{array.dtype.kind.upper()}{8 * array.dtype.itemsize}"
        entries[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": [start, end]}
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    file.write_bytes(
        len(header).to_bytes(8, "little") + header + b"".join(array.tobytes() for array in arrays.values())
    )
