"""Where documents come from: JSON lines and data sets; and splits that cannot leak."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from seqmix import ConfigError, SeqmixError
from seqmix.data import Corpus, TextConfig, read_corpus, read_documents

BEGIN = 256


def config(*paths, **fields) -> TextConfig:
    paths = {"paths": tuple(map(str, paths))} if paths else {}
    return TextConfig(**{"sequence_length": 4} | paths | fields)


def texts(*paths, **fields) -> list[bytes]:
    return [document.text for document in read_documents(config(*paths, **fields))]


def error(*paths, **fields) -> str:
    with pytest.raises(SeqmixError) as raised:
        texts(*paths, **fields)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def documents_of(tokens) -> list[bytes]:
    """The documents of a stream."""
    pieces = np.split(tokens[:], np.flatnonzero(tokens[:] == BEGIN))
    return [bytes(piece[1:].astype(np.uint8)) for piece in pieces if len(piece)]


# ---- JSON lines


def lines(path, *rows):
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def test_every_line_is_a_document(tmp_path):
    file = lines(tmp_path / "a.jsonl", {"text": "one"}, {"id": 7, "text": "zw€i\n"}, {"text": ""}, {"text": "three"})
    assert texts(file) == [b"one", "zw€i\n".encode(), b"three"]
    assert texts(tmp_path) == texts(file)


def test_empty_lines_and_a_missing_last_newline_are_nothing(tmp_path):
    (tmp_path / "a.jsonl").write_text('\n{"text": "one"}\n\n  \n{"text": "two"}')
    assert texts(tmp_path) == [b"one", b"two"]


def test_the_field_is_configurable(tmp_path):
    file = lines(tmp_path / "a.jsonl", {"text": "no", "body": "yes"})
    assert texts(file, text_field="body") == [b"yes"]
    assert texts(file, text_field=None) == [file.read_bytes()]


def test_other_files_are_text_beside_json_lines(tmp_path):
    lines(tmp_path / "b.jsonl", {"text": "one"}, {"text": "two"})
    (tmp_path / "a.json").write_text('{"text": "as it stands"}')
    assert texts(tmp_path) == [b'{"text": "as it stands"}', b"one", b"two"]


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ('{"text": "b"', "the line is no JSON: Expecting ',' delimiter"),
        ("\udcff", "the line is no JSON: "),
        ('["text"]', "a line holds a mapping with a text, and this one a list"),
        ('{"txt": "b"}', "there is no field 'text'; fields: txt; did you mean \"txt\"?; data.text_field names it"),
        ("{}", "there is no field 'text'; fields: none; data.text_field names it"),
        ('{"text": 5}', "the field 'text' holds no text but a int"),
        ('{"text": null}', "the field 'text' holds no text but a NoneType"),
        ('{"text": "a\\ud800"}', "the text has no character at 1: '\\ud800'"),
        ("[" * 100_000, "the line is no JSON: "),
    ],
    ids=lambda value: value[:12],
)
def test_a_broken_line_is_named_with_file_and_line(tmp_path, line, sentence):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"text": "a"}\n\n' + line.encode(errors="surrogateescape") + b'\n{"text": "c"}\n')
    assert error(tmp_path).startswith(f"{file}:3: {sentence}")


# ---- data sets


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
def test_every_row_is_a_document(library, streaming):
    stand_in = library(ROWS)
    asked = {"path": "wiki", "name": "small", "split": "test", "streaming": streaming}
    assert texts(dataset=asked) == [b"one", b"two", b"three"]
    assert stand_in.calls == [(("wiki", "small"), {"split": "test", "streaming": streaming})]
    assert texts(dataset=asked | {"documents": 3}) == [b"one", b"two"]


def test_a_saved_data_set_is_read_from_its_folder(library, tmp_path):
    library([{"text": "whole"}])
    (tmp_path / "state.json").touch()
    assert texts(dataset={"path": str(tmp_path)}) == [b"whole"]
    library([], train=ROWS, test=[{"text": "held"}])
    assert texts(dataset={"path": str(tmp_path), "split": "test"}) == [b"held"]
    assert "has no split 'tset'; splits: train, test" in error(dataset={"path": str(tmp_path), "split": "tset"})


def test_what_a_data_set_cannot_give_is_one_sentence(library, monkeypatch):
    library([{"text": "a"}, {"body": "b"}])
    assert error(dataset={"path": "w"}).startswith("w (train), row 1: there is no field 'text'; fields: body")

    def refuse(*arguments, **options):
        raise FileNotFoundError("Couldn't find it\non the hub")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=refuse))
    assert error(dataset={"path": "w"}) == "the data set w cannot be read: Couldn't find it"
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert error(dataset={"path": "w"}) == "data.dataset needs datasets: pip install 'seqmix[data]'"


def test_the_library_s_own_data_sets_are_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{"body": text} for text in ("one", "zw€i", "three")])
    rows.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": rows, "test": rows.select([1])}).save_to_disk(str(tmp_path / "two"))
    (tmp_path / "rows").mkdir()
    lines(tmp_path / "rows" / "a.jsonl", *rows)
    expected = [b"one", "zw€i".encode(), b"three"]
    assert texts(dataset={"path": str(tmp_path / "one")}, text_field="body") == expected
    assert texts(dataset={"path": str(tmp_path / "two"), "split": "test"}, text_field="body") == expected[1:2]
    for streaming in (False, True):
        asked = {"path": str(tmp_path / "rows"), "streaming": streaming}
        assert texts(dataset=asked, text_field="body") == expected
    assert "row 0: there is no field 'text'; fields: body" in error(dataset={"path": str(tmp_path / "one")})
    message = error(dataset={"path": str(tmp_path / "nowhere")})
    assert message.startswith(f"the data set {tmp_path / 'nowhere'} cannot be read: ")


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"paths": ("a",)}, "paths and dataset are two sources: give one of them"),
        ({"text_field": None}, "text_field names the field"),
        ({"split": "by_file"}, "a dataset has none: by_document holds out its rows"),
    ],
    ids=str,
)
def test_a_data_set_that_does_not_fit_the_rest_is_refused(fields, sentence):
    with pytest.raises((ConfigError, ValueError), match=sentence):
        TextConfig(dataset={"path": "w"}, **fields)


# ---- splits


@pytest.fixture
def copies(tmp_path):
    """JSON lines in four files: 60 documents, and each of them three times under other names."""
    for number in range(4):
        rows = [{"text": f"document {n}", "id": f"{number}/{n}"} for n in range(60) if number == 0 or n % 4 != number]
        lines(tmp_path / f"{number}.jsonl", *rows)
    return tmp_path


def read(path, **fields) -> Corpus:
    return read_corpus(config(path, validation_fraction=0.3, **fields))


def test_copies_of_a_document_lie_on_one_side(copies):
    corpus = read(copies, split="by_document")
    learned, held = documents_of(corpus.train), documents_of(corpus.validation)
    assert len(learned) + len(held) == corpus.documents == 60 + 3 * 45
    assert len(set(learned) | set(held)) == 60
    assert not set(learned) & set(held)
    assert 6 <= len(set(held)) <= 30


def test_by_file_does_not_promise_that(copies):
    corpus = read_corpus(config(copies, split="by_file", validation_fraction=0.5))
    assert set(documents_of(corpus.train)) & set(documents_of(corpus.validation))


def test_the_side_of_a_document_is_a_function_of_its_text(copies, tmp_path):
    held = set(documents_of(read(copies, split="by_document").validation))
    other = tmp_path / "other"
    other.mkdir()
    for number in range(0, 60, 2):
        (other / f"{number}.md").write_text(f"document {number}")
    (other / "new.md").write_text("a new document")
    again = set(documents_of(read(other, split="by_document").validation))
    assert again - {b"a new document"} == {text for text in held if int(text.split()[1]) % 2 == 0}


def test_auto_is_by_document_where_files_are_no_documents(copies, library):
    assert read(copies).split == "by_document"
    assert read(copies / "0.jsonl").split == "by_document"
    assert read_corpus(config(copies, text_field=None, validation_fraction=0.5)).split == "by_file"
    library([{"text": f"document {n}"} for n in range(30)])
    corpus = read_corpus(config(dataset={"path": "wiki"}, validation_fraction=0.3))
    assert (corpus.split, corpus.name) == ("by_document", "wiki (train)")


def test_one_line_is_split_at_its_tail(tmp_path):
    corpus = read(lines(tmp_path / "a.jsonl", {"text": "0123456789"}), sequence_length=2)
    assert corpus.split == "tail"
    assert (documents_of(corpus.train), documents_of(corpus.validation)) == ([b"0123456"], [b"789"])
