"""Documents from JSON lines and datasets, and splits that do not leak."""

import json
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from small_runs import refusal

from seqmix.data import Corpus, DocumentsConfig, TextConfig, read_corpus, read_documents
from seqmix.data.corpus_config import SourceConfig, WeightedSourceConfig

BEGIN = 256


def config(*paths, **fields) -> TextConfig:
    paths = {"paths": tuple(map(str, paths))} if paths else {}
    return TextConfig(**{"sequence_length": 4} | paths | fields)


def texts(*paths, **fields) -> list[bytes]:
    paths = {"paths": tuple(map(str, paths))} if paths else {}
    return [document.text for document in read_documents(DocumentsConfig(**paths | fields))]


def error(*paths, **fields) -> str:
    return refusal(lambda: texts(*paths, **fields))


def documents_of(tokens) -> list[bytes]:
    """The documents of a stream."""
    pieces = np.split(tokens[:], np.flatnonzero(tokens[:] == BEGIN))
    return [bytes(piece[1:].astype(np.uint8)) for piece in pieces if len(piece)]


def lines(path, *rows):
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def test_every_json_line_is_a_document(tmp_path):
    file = lines(tmp_path / "b.jsonl", {"text": "one"}, {"id": 7, "text": "zw€i\n"}, {"text": ""}, {"text": "three"})
    assert texts(file) == texts(tmp_path) == [b"one", "zw€i\n".encode(), b"three"]
    # other files are text, empty lines and a missing last newline are nothing
    (tmp_path / "a.json").write_text('{"text": "as it stands"}')
    file.write_text('\n{"text": "one"}\n\n  \n{"text": "two"}')
    assert texts(tmp_path) == [b'{"text": "as it stands"}', b"one", b"two"]
    # and the field is configurable
    lines(file, {"text": "no", "body": "yes"})
    assert texts(file, text_field="body") == [b"yes"]
    assert texts(file, text_field=None) == [file.read_bytes()]


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ('{"text": "b"', "JSON: Expecting ',' delimiter"),
        ("\udcff", "JSON: "),
        ("[" * 100_000, "JSON: "),
        ('["text"]', "list"),
        ('{"txt": "b"}', "'text'; did you mean \"txt\".*Fields: txt;.*data.text_field"),
        ("{}", "'text'; fields: none;.*data.text_field"),
        ('{"text": 5}', "'text' .*int"),
        ('{"text": null}', "'text' .*NoneType"),
        ('{"text": "a\\ud800"}', r"1: '\\ud800'"),
    ],
    ids=lambda value: value[:12],
)
def test_invalid_json_line_error_names_file_and_line(tmp_path, line, named):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"text": "a"}\n\n' + line.encode(errors="surrogateescape") + b'\n{"text": "c"}\n')
    assert re.match(f"{file}:3: .*{named}", error(tmp_path))


class Library:
    """Stands in for `datasets` where it is not installed."""

    def __init__(self, rows, **splits):
        self.rows, self.splits, self.calls = rows, splits, []

    def load_dataset(self, *arguments, **options):
        self.calls.append((arguments, options))
        return iter(self.rows) if options["streaming"] else self.rows

    def load_from_disk(self, path):
        return self.splits or self.rows


@pytest.fixture
def library(monkeypatch):
    def install(rows, **splits) -> Library:
        stand_in = Library(rows, **splits)
        monkeypatch.setitem(sys.modules, "datasets", stand_in)
        return stand_in

    return install


ROWS = [{"text": "one", "id": 1}, {"text": "", "id": 2}, {"text": "two", "id": 3}, {"text": "three", "id": 4}]


@pytest.mark.parametrize("streaming", [False, True])
def test_every_dataset_row_is_a_document(library, streaming):
    stand_in = library(ROWS)
    asked = {"path": "wiki", "name": "small", "split": "test", "streaming": streaming}
    assert texts(dataset=asked) == [b"one", b"two", b"three"]
    assert stand_in.calls == [(("wiki", "small"), {"split": "test", "streaming": streaming})]
    assert texts(dataset=asked | {"documents": 3}) == [b"one", b"two"]


def test_saved_dataset_is_read_from_its_folder(library, tmp_path):
    library([{"text": "whole"}])
    for file in ("state.json", "dataset_info.json"):
        (tmp_path / file).touch()
    assert texts(dataset={"path": str(tmp_path)}) == [b"whole"]
    assert "is a saved dataset: set data.dataset={path: " in error(tmp_path)
    library([], train=ROWS, test=[{"text": "held"}])
    assert texts(dataset={"path": str(tmp_path), "split": "test"}) == [b"held"]
    assert re.search(
        "'tset'; did you mean \"test\".*train, test", error(dataset={"path": str(tmp_path), "split": "tset"})
    )


def test_dataset_errors_name_the_cause(library, monkeypatch):
    def refuse(*arguments, **options):
        raise FileNotFoundError("Couldn't find it\non the hub")

    library([{"text": "a"}, {"body": "b"}])
    assert re.match(r"w \(train\), row 1: .*'text'; fields: body", error(dataset={"path": "w"}))
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=refuse))
    assert error(dataset={"path": "w"}).endswith("w cannot be read: Couldn't find it")
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install datasets" in error(dataset={"path": "w"})


def test_datasets_written_by_the_real_library_are_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{"body": text} for text in ("one", "zw€i", "three")])
    rows.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": rows, "test": rows.select([1])}).save_to_disk(str(tmp_path / "two"))
    (tmp_path / "rows").mkdir()
    lines(tmp_path / "rows" / "a.jsonl", *rows)
    expected = [b"one", "zw€i".encode(), b"three"]
    for name, options, found in (
        ("one", {}, expected),
        ("two", {"split": "test"}, expected[1:2]),
        ("rows", {}, expected),
        ("rows", {"streaming": True}, expected),
    ):
        assert texts(dataset={"path": str(tmp_path / name)} | options, text_field="body") == found
    assert re.search("row 0: .*'text'; fields: body", error(dataset={"path": str(tmp_path / "one")}))
    assert str(tmp_path / "nowhere") in error(dataset={"path": str(tmp_path / "nowhere")})


@pytest.mark.parametrize(
    "fields",
    [{"paths": ("a",)}, {"text_field": None}, {"split": "by_file"}, {"glob": "*.md"}, {"encoding": "ascii"}],
    ids=str,
)
def test_dataset_with_conflicting_fields_is_refused(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        TextConfig(dataset={"path": "w"}, **fields)


@pytest.fixture
def copies(tmp_path):
    """JSON lines in four files: 60 documents, and each of them three times under other names."""
    for number in range(4):
        rows = [{"text": f"document {n}", "id": f"{number}/{n}"} for n in range(60) if number == 0 or n % 4 != number]
        lines(tmp_path / f"{number}.jsonl", *rows)
    return tmp_path


def read(path, **fields) -> Corpus:
    return read_corpus(config(path, **{"validation_fraction": 0.3} | fields))


def test_copies_of_a_document_share_a_split(copies):
    corpus = read(copies, split="by_document")
    learned, held = documents_of(corpus.train), documents_of(corpus.validation)
    assert len(learned) + len(held) == corpus.documents == 60 + 3 * 45
    assert len(set(learned) | set(held)) == 60
    assert not set(learned) & set(held)
    assert 6 <= len(set(held)) <= 30
    # and by file they do not
    corpus = read(copies, split="by_file", validation_fraction=0.5)
    assert set(documents_of(corpus.train)) & set(documents_of(corpus.validation))


def test_split_of_a_document_depends_only_on_its_text(copies, tmp_path):
    held = set(documents_of(read(copies, split="by_document").validation))
    other = tmp_path / "other"
    other.mkdir()
    for number in range(0, 60, 2):
        (other / f"{number}.md").write_text(f"document {number}")
    (other / "new.md").write_text("a new document")
    again = set(documents_of(read(other, split="by_document").validation))
    assert again - {b"a new document"} == {text for text in held if int(text.split()[1]) % 2 == 0}


def test_auto_split_is_by_document_for_files_of_several_documents(copies, library, tmp_path):
    assert read(copies).split == read(copies / "0.jsonl").split == "by_document"
    assert read(copies, text_field=None, validation_fraction=0.5).split == "by_file"
    library([{"text": f"document {n}"} for n in range(30)])
    corpus = read_corpus(config(dataset={"path": "wiki"}, validation_fraction=0.3))
    assert (corpus.split, corpus.name) == ("by_document", "wiki (train)")
    # one document is split at its tail
    corpus = read(lines(tmp_path / "a.jsonl", {"text": "0123456789"}), sequence_length=2)
    assert corpus.split == "tail"
    assert (documents_of(corpus.train), documents_of(corpus.validation)) == ([b"0123456"], [b"789"])


def test_missing_field_error_names_the_setting_of_its_source(tmp_path):
    file = lines(tmp_path / "a.jsonl", {"txt": "b"})
    for kind, more, named in (
        (WeightedSourceConfig, {"weight": 1.0}, "text_field of this entry of data.sources"),
        (SourceConfig, {}, "data.validation.text_field"),
    ):
        config = kind(paths=(str(file),), **more)
        assert named in refusal(lambda config=config: list(read_documents(config)))
