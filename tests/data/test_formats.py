"""File formats: compressed, Parquet and Arrow files are read, and files that are not text are refused."""

import bz2
import gzip
import json
import lzma
import re
import sys
import tracemalloc
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from small_runs import refusal, trainer_of

from seqmix.data import TextConfig, formats, read_corpus, read_documents

TEXTS = ["one", "zw€i\n", "three " * 50]
LINES = "".join(f"{json.dumps({'id': n, 'text': text})}\n" for n, text in enumerate(TEXTS)).encode()


def zstd():
    try:
        return import_module("compression.zstd")
    except ModuleNotFoundError:
        return pytest.importorskip("backports.zstd")


def zstd_compress(text: bytes) -> bytes:
    """With a checksum, as the command writes it."""
    module = zstd()
    return module.compress(text, options={module.CompressionParameter.checksum_flag: 1})


COMPRESSORS: dict[str, Callable[[], Callable[[bytes], bytes]]] = {
    ".gz": lambda: gzip.compress,
    ".xz": lambda: lzma.compress,
    ".bz2": lambda: bz2.compress,
    ".zst": lambda: zstd() and zstd_compress,
}


def texts(path: Path, **fields) -> list[bytes]:
    config = TextConfig(paths=(str(path),), **{"sequence_length": 4} | fields)
    return [document.text for document in read_documents(config)]


def error(path: Path, content: bytes | None = None, **fields) -> str:
    if content is not None:
        path.write_bytes(content)
    message = refusal(lambda: texts(path, **fields))
    assert message.startswith((str(path), f"the corpus {path}"))
    assert "\n" not in message
    return message


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_compressed_files_are_read_and_damaged_ones_refused(tmp_path, suffix):
    compress = COMPRESSORS[suffix]()
    text = tmp_path / f"a.txt{suffix}"
    text.write_bytes(compress(LINES))
    assert texts(text) == [LINES]
    rows = tmp_path / f"a.jsonl{suffix}"
    rows.write_bytes(compress(LINES[:50]) + compress(LINES[50:]))  # members and frames one after another
    assert texts(rows) == [text.encode() for text in TEXTS]
    assert texts(rows, text_field=None) == [LINES]
    many = tmp_path / f"many.jsonl{suffix}"
    many.write_bytes(compress(b"".join(b'{"text": "document %d"}\n' % n for n in range(30))))
    corpus = read_corpus(TextConfig(paths=(str(many),), sequence_length=2, validation_fraction=0.3))
    assert (corpus.split, corpus.documents) == ("by_document", 30)
    whole = compress(np.random.default_rng(0).integers(97, 123, 9999).astype(np.uint8).tobytes())
    assert re.search(f"truncated: its {suffix}", error(text, whole[: len(whole) // 2]))
    assert re.search(f"damaged, or is not a {suffix} file", error(text, b"plain text, as it stands"))
    middle = bytes(byte ^ 0x55 for byte in whole[200:260])
    assert re.search("damaged|truncated|not UTF-8", error(text, whole[:200] + middle + whole[260:]))


def test_decompression_bomb_is_refused_in_little_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "EXPANSION_LIMIT_FROM", 2**22)
    bomb = gzip.compress(b"a" * 2**25)
    tracemalloc.start()
    for name in ("a.txt.gz", "a.jsonl.gz"):
        assert re.search(r"expands more than 500 times, to \d,", error(tmp_path / name, bomb))
    # what is not text is refused before it is collected
    assert "offset 0 (byte 0x00)" in error(tmp_path / "a.gz", gzip.compress(bytes(2**25)))
    assert tracemalloc.get_traced_memory()[1] < 2**26
    tracemalloc.stop()


def test_compressed_json_lines_are_streamed_in_little_memory(tmp_path):
    file = tmp_path / "a.jsonl.gz"
    row = json.dumps({"text": "".join(map(chr, np.random.default_rng(0).integers(97, 123, 2**12)))}).encode() + b"\n"
    with gzip.open(file, "wb", compresslevel=1) as opened:
        for _ in range(2**12):
            opened.write(row)
    tracemalloc.start()
    assert sum(1 for _ in read_documents(TextConfig(paths=(str(file),)))) == 2**12
    assert tracemalloc.get_traced_memory()[1] < 2**23
    tracemalloc.stop()


@pytest.mark.parametrize("suffix", [".parquet", ".arrow", "-stream.arrow"])
def test_table_rows_are_read_as_documents(tmp_path, suffix):
    arrow = pytest.importorskip("pyarrow")
    table = arrow.table({"id": [1, 2, 3], "body": TEXTS, "number": [1, 2, None]})
    file = tmp_path / f"a{suffix}"
    if suffix == ".parquet":
        import_module("pyarrow.parquet").write_table(table, file, row_group_size=2)
    else:
        new = arrow.ipc.new_stream if "stream" in suffix else arrow.ipc.new_file
        with arrow.OSFile(str(file), "wb") as sink, new(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    assert texts(file, text_field="body") == [text.encode() for text in TEXTS]
    assert re.search("row 0: .*'text'; fields: id, body, number", error(file))
    assert re.search("row 0: .*'number' must be text, got int", error(file, text_field="number"))
    assert re.search("data.text_field .*, got null", error(file, text_field=None))
    whole = file.read_bytes()
    assert re.search("damaged, truncated", error(file, whole[: len(whole) // 3], text_field="body"))
    assert re.search("damaged, truncated", error(file, b"text", text_field="body"))
    assert re.search("not UTF-8 .*(Parquet|Arrow)", error(tmp_path / "a.txt", whole))
    assert "must not be compressed again" in error(tmp_path / "a.parquet.gz", gzip.compress(whole))


def test_missing_library_error_names_the_package_to_install(tmp_path, monkeypatch):
    for name in ("pyarrow", "pyarrow.parquet", "compression.zstd", "backports.zstd"):
        monkeypatch.setitem(sys.modules, name, None)
    for suffix, name in ((".parquet", "pyarrow"), (".arrow", "pyarrow"), (".zst", "backports.zstd")):
        assert f"pip install {name}" in error(tmp_path / f"a{suffix}", b"any")


RANDOM = np.random.default_rng(0).bytes(4000)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (RANDOM, "offset "),
        (b"#!/bin/sh\n" * 200_000 + RANDOM * 20, r"offset 2,000,0\d\d "),  # a text with a binary at its end
        (np.arange(4000).tobytes(), r"offset 0 \(byte 0x00\)"),  # numbers
        ("Wörter über Wörter".encode("utf-16"), "UTF-16"),
        ("слова".encode("koi8-r") * 9, "data.encoding for another encoding"),
        (gzip.compress(LINES, mtime=0), "gzip"),
        (lzma.compress(LINES), "xz"),
        (bz2.compress(LINES), "bzip2"),
        (b"PK\3\4" + b"stored text " * 999, "a zip archive"),
        (b"a.txt".ljust(257, b"\0") + b"ustar\x0000" + b"text " * 9999, "a tar archive"),
    ],
    ids=lambda value: str(value[:8]),
)
def test_non_text_file_is_refused_with_the_reason(tmp_path, content, named):
    (tmp_path / "folder").mkdir()
    file = tmp_path / "folder" / "a.txt"
    message = error(file, content)
    assert re.search(named, message)
    assert "data.glob" in message
    # as it is refused in a folder, compressed, and where lines are plain text; and learned as bytes if asked for
    assert refusal(lambda: texts(tmp_path)) == message
    assert "is not UTF-8 text" in error(tmp_path / "a.gz", gzip.compress(content))
    assert "is not UTF-8 text" in error(tmp_path / "a.jsonl", content, text_field=None)
    assert texts(file, encoding="bytes") == [content]


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"one text\0and another\0" * 99, r"has NUL bytes.* offset 8 \(byte 0x00\)"),
        ("Wörter über Wörter".encode("utf-16-le"), r"has NUL bytes.* offset 1 \(byte 0x00\)"),
        (b"\x7fELF\2\1\1" + bytes(57), r"has control characters.* offset 0 \(byte 0x7f\)"),
    ],
    ids=["NUL between texts", "UTF-16", "program"],
)
def test_utf8_with_control_characters_is_refused_with_the_remedies(tmp_path, content, named):
    messages = [
        error(tmp_path / "a.txt", content),
        error(tmp_path / "a.gz", gzip.compress(content)),
        error(tmp_path / "a.jsonl", content, text_field=None),
    ]
    for message in messages:
        assert re.search(f"{named}.*data.encoding", message)
        assert "remove them" in message
        assert "not UTF-8" not in message
    assert texts(tmp_path / "a.txt", encoding="bytes") == [content]


def test_text_with_a_few_odd_bytes_is_read_unchanged(tmp_path):
    file = tmp_path / "a.py"
    for content in (
        b'name = "caf\xe9"\n',
        b"x" * 2**20 + "€".encode() * 2**10,  # characters on the edges of pieces
        b"Stra\xdfe und Wald und Wiese und Berg und Tal und noch viel mehr von alledem\n" * 99,
        b"\x1b[1mcolours\x1b[0m\r\n\f",
        "日本語、中文、한국어。".encode() * 9,
        b"",
    ):
        file.write_bytes(content)
        assert texts(file) == ([content] if content else [])


def test_configured_encoding_is_used_to_decode_text(tmp_path):
    file, rows = tmp_path / "a.txt", tmp_path / "a.jsonl.gz"
    for encoding in ("latin-1", "utf-16", "UTF8"):
        file.write_bytes("Straße".encode(encoding))
        rows.write_bytes(gzip.compress('{"text": "Straße"}\n{"text": "Öl"}\n'.encode(encoding)))
        assert texts(file, encoding=encoding) == ["Straße".encode()]
        assert texts(rows, encoding=encoding) == ["Straße".encode(), "Öl".encode()]
    undecodable = "cannot be decoded as ascii, the value of data.encoding"
    assert re.search(undecodable, error(file, "Straße".encode(), encoding="ascii"))
    rows.write_bytes(gzip.compress('{"text": "Straße"}'.encode()))
    assert re.search(undecodable, error(rows, encoding="ascii"))
    for wrong in ("latin-9999", "hex"):
        with pytest.raises(ValueError, match="encoding must be bytes or a text encoding"):
            TextConfig(encoding=wrong)


def test_training_loss_is_identical_for_each_format(config_of, tmp_path):
    words = np.random.default_rng(0).choice(["red", "green", "blue", "and", "or"], 600)
    text = " ".join(words).encode()
    (tmp_path / "random.txt").write_bytes(RANDOM)
    message = refusal(config_of(f"data.paths=[{tmp_path / 'random.txt'}]").open_data)
    assert message.startswith(f"{tmp_path / 'random.txt'} is not UTF-8 text")
    (tmp_path / "plain.txt").write_bytes(text)
    (tmp_path / "a.gz").write_bytes(gzip.compress(text))
    losses = []
    for name in ("plain.txt", "a.gz", "a.zst", "a.parquet"):
        file = tmp_path / name
        if name == "a.zst":
            file.write_bytes(zstd().compress(text))
        elif name == "a.parquet":
            arrow = pytest.importorskip("pyarrow")
            import_module("pyarrow.parquet").write_table(arrow.table({"text": [text.decode()]}), file)
        losses.append(trainer_of(config_of(f"data.paths=[{file}]")).train_step(0).loss)
    assert len(set(losses)) == 1
