"""Text as tokens: which files are read, how the validation split is chosen, and how batches are cut."""

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_runs import refusal
from token_streams import evaluation_batches, training_batch

from seqmix.data import Corpus, TextConfig, read_corpus
from seqmix.models import IGNORED

BEGIN = 256


@pytest.fixture
def folder(tmp_path):
    """Forty files, each of bytes that tell which file they are of."""
    for number in range(40):
        (tmp_path / f"file{number:02d}.txt").write_bytes(bytes([number]) * 30)
    return tmp_path


def read(*paths, **fields) -> Corpus:
    return read_corpus(
        TextConfig(**{"paths": tuple(map(str, paths)), "sequence_length": 8, "encoding": "bytes"} | fields)
    )


def error(*paths, **fields) -> str:
    return refusal(lambda: read(*paths, **fields))


def files_in(tokens) -> set[int]:
    return set(tokens.tolist()) - {BEGIN}


def held_out(*paths, fraction: float = 0.3) -> set[int]:
    return files_in(read(*paths, split="by_file", validation_fraction=fraction).validation)


def test_by_file_split_holds_out_whole_files(folder):
    corpus = read(folder, split="by_file", validation_fraction=0.3)
    held, learned = files_in(corpus.validation), files_in(corpus.train)
    assert held | learned == set(range(40))
    assert not held & learned
    assert 4 <= len(held) <= 20
    assert len(corpus.train) == len(learned) * 31
    assert len(corpus.validation) == len(held) * 31
    # a hash of the name: no other Python, machine or year may choose others, and a larger fraction holds out more
    assert held_out(folder, fraction=0.2) == {14, 15, 16, 29, 34} < held_out(folder, fraction=0.6)
    # and auto is by_file where there are several
    for files, split in ((sorted(folder.iterdir()), "by_file"), ([folder / "file00.txt"], "tail")):
        corpus = read(*files, split="auto", validation_fraction=0.3)
        assert (corpus.split, corpus.documents) == (split, len(files))


def test_split_of_a_file_depends_only_on_its_name(folder):
    inner = folder / "inner"
    inner.mkdir()
    for file in folder.glob("*.txt"):
        file.rename(inner / file.name)
    before = held_out(inner)
    inner.rename(folder / "elsewhere")
    assert held_out(folder / "elsewhere") == before
    for number in range(0, 40, 2):
        (folder / "elsewhere" / f"file{number:02d}.txt").unlink()
    (folder / "elsewhere" / "a new file").write_bytes(b"\xff" * 30)
    assert held_out(folder / "elsewhere") - {0xFF} == {number for number in before if number % 2}


def test_tail_split_holds_out_the_end_of_every_file(tmp_path):
    (tmp_path / "0").write_bytes(bytes(range(100)))
    (tmp_path / "1").write_bytes(bytes(range(100, 150)))
    corpus = read(tmp_path / "0", tmp_path / "1", split="tail", validation_fraction=0.2)
    assert corpus.train.tolist() == [BEGIN, *range(80), BEGIN, *range(100, 140)]
    assert corpus.validation.tolist() == [BEGIN, *range(80, 100), BEGIN, *range(140, 150)]
    assert corpus.train.dtype == corpus.validation.dtype == np.uint16
    # all bytes are text
    (tmp_path / "all").write_bytes(bytes(range(256)))
    corpus = read(tmp_path / "all", validation_fraction=0.25)
    assert [*corpus.train[1:], *corpus.validation[1:]] == list(range(256))


@pytest.mark.parametrize("split", ["by_file", "by_document", "tail"])
def test_test_fraction_reserves_the_validation_split_of_a_final_run(folder, split):
    tuning = read(folder, split=split, test_fraction=0.3, validation_fraction=0.2)
    final = read(folder, split=split, validation_fraction=0.3)
    both = read(folder, split=split, validation_fraction=0.5)
    assert tuning.train.tolist() == both.train.tolist()
    counts = [np.bincount(corpus.validation, minlength=BEGIN) for corpus in (tuning, final, both)]
    assert counts[0].sum() > 0
    assert (counts[0] + counts[1] == counts[2])[:BEGIN].all()


@pytest.mark.parametrize(
    ("file", "paths", "fields", "alone"),
    [
        (".hidden", ["."], {}, None),
        (".git/config", ["."], {}, None),
        (".hidden", [".hidden"], {}, True),  # named
        (".cache/text", [".cache"], {}, True),  # below a hidden folder that is named
        ("sub/code.py", ["."], {"glob": "**/*.py"}, True),
        ("sub/code.py", ["."], {"glob": "*.txt"}, None),
        ("sub/code.py", [".", "sub/code.py"], {"glob": "*.txt"}, False),  # files and folders together
    ],
    ids=str,
)
def test_paths_and_glob_select_the_files_to_read(folder, file, paths, fields, alone):
    (folder / file).parent.mkdir(exist_ok=True)
    (folder / file).write_bytes(b"\xff" * 30)
    (folder / "empty.txt").write_bytes(b"")  # is not a document
    corpus = read(*(folder / path for path in paths), split="tail", validation_fraction=0.3, **fields)
    others = set() if alone else set(range(40))
    assert files_in(corpus.train) == others | ({0xFF} if alone is not None else set())
    assert corpus.documents == len(files_in(corpus.train))
    assert corpus.name == ", ".join(str(folder / path) for path in paths)


def test_paths_expand_home_and_default_to_the_python_sources(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    assert files_in(read("~/file07.txt", validation_fraction=0.3).train) == {7}
    corpus = read_corpus(TextConfig())
    assert "Python" in corpus.name
    assert corpus.documents > 100
    assert corpus.split == "by_file"
    assert 0.05 < len(corpus.validation) / (len(corpus.train) + len(corpus.validation)) < 0.2
    text = bytes(corpus.train[corpus.train < BEGIN].astype(np.uint8))
    assert text.count(b"import ") > 100


def test_error_names_a_source_without_text(folder, monkeypatch):
    assert str(folder / "no") in error(folder / "no")
    assert "data.glob" in error(folder / "*.txt")
    assert "~nobody-of-this-name/text" in error("~nobody-of-this-name/text")
    assert "*.md" in error(folder, glob="*.md")
    (folder / "empty").mkdir()
    for _ in range(2):
        assert str(folder / "empty") in error(folder / "empty")
        (folder / "empty" / "file").touch()

    def refuse(path, *_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)
    assert error(folder, glob="*.txt").endswith(f"{folder / 'file00.txt'} cannot be read: Permission denied")


def test_split_shorter_than_a_sequence_is_refused(tmp_path, folder):
    text = tmp_path / "text"
    text.write_bytes(b"a" * 160)  # 80 and 80, and a begin token each
    assert read(text, validation_fraction=0.5, sequence_length=80)
    for name, fraction, length, found in (("training", 0.5, 81, 81), ("validation", 0.05, 9, 9)):
        message = error(text, validation_fraction=fraction, sequence_length=length)
        for part in (name, str(text), f"got {found}:", str(length + 1), "data.sequence_length"):
            assert part in message
    # a split that holds out nothing names the other ones
    message = error(folder / "file00.txt", folder / "file01.txt")
    for part in ("validation", "got 0:", "data.split is by_file", "tail"):
        assert part in message


STREAM = np.array([BEGIN, *range(50), BEGIN, *range(100, 150), BEGIN, *range(200, 250)], dtype=np.uint16)


def test_batch_targets_are_the_next_tokens_without_begin_tokens():
    batch = training_batch(STREAM, 8, 5000, seed=0, step=0)
    assert batch.inputs.shape == batch.targets.shape == (5000, 8)
    assert batch.inputs.dtype is batch.targets.dtype is torch.int64
    # every place is drawn, the last one too; begin tokens are read and never predicted
    windows = {tuple(STREAM[at : at + 9].tolist()) for at in range(len(STREAM) - 8)}
    found = set()
    for inputs, targets in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
        assert targets[:-1] == [IGNORED if token == BEGIN else token for token in inputs[1:]]
        found.add((*inputs, BEGIN if targets[-1] == IGNORED else targets[-1]))
    assert found == windows
    assert not (batch.targets == BEGIN).any()
    targets = torch.cat([batch.targets for batch in evaluation_batches(STREAM, 8, 4, None)])
    assert not (targets == BEGIN).any()
    assert (targets != IGNORED).sum() == 19 * 8 - 2  # two begin tokens lie inside
    # one sequence and its last target are enough
    batch = training_batch(STREAM[1:10], 8, 4, seed=0, step=0)
    assert batch.inputs.tolist() == [list(range(8))] * 4
    assert batch.targets.tolist() == [list(range(1, 9))] * 4


@pytest.mark.parametrize("batch_size", [1, 4, 5, 100])
@pytest.mark.parametrize("extra", [0, 1, 7])
def test_evaluation_covers_the_stream_once(batch_size, extra):
    stream = np.arange(12 * 8 + 1 + extra, dtype=np.uint16)
    batches = evaluation_batches(stream, 8, batch_size, None)
    assert len(batches) == math.ceil(12 / batch_size)
    assert {batch.inputs.shape for batch in batches} == {(batch_size, 8)}
    inputs, targets = (torch.cat(parts).flatten() for parts in zip(*batches, strict=True))
    counted = targets != IGNORED
    # the padding of the last batch is not
    assert inputs[counted].tolist() == list(range(12 * 8))
    assert targets[counted].tolist() == list(range(1, 12 * 8 + 1))
    limited = evaluation_batches(stream, 8, batch_size, 12)  # a limit beyond the stream has no effect
    assert all(torch.equal(a.targets, b.targets) for a, b in zip(limited, batches, strict=True))


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_limited_evaluation_is_spread_evenly_over_the_stream(limit):
    batches = evaluation_batches(np.arange(100 * 8 + 1, dtype=np.uint16), 8, 4, limit)
    assert len(batches) == limit
    starts = torch.cat([batch.inputs[:, 0] for batch in batches]) // 8
    assert (starts[0], starts[-1]) == (0, 99)
    gaps = starts.diff()
    assert gaps.max() - gaps.min() <= 1
    assert len(set(starts.tolist())) == 4 * limit


@pytest.mark.parametrize(
    ("validation", "expected"),
    [
        ([BEGIN, *[1] * 8, *[2] * 4, BEGIN, *[3] * 2, *[255] * 2], 1.75 * math.log(2)),
        (range(256), math.log(256)),
        ([7, 7, 7], 0),
    ],
)
def test_unigram_entropy_is_computed_on_the_validation_split(validation, expected):
    corpus = Corpus("text", 1, "tail", np.array([], dtype=np.uint16), np.array(validation, dtype=np.uint16))
    assert corpus.unigram_entropy == pytest.approx(expected)


def test_unigram_entropy_excludes_the_begin_token():
    tokens = np.array([1, *[0] * 4, 1, *[2] * 4], dtype=np.uint16)
    corpus = Corpus("text", 1, "tail", tokens, tokens, SimpleNamespace(begin=1))
    assert corpus.unigram_entropy == pytest.approx(math.log(2))


def test_summary_uses_the_singular_for_one_document(tmp_path):
    (tmp_path / "text.txt").write_text("a text of one document. " * 40)
    source = TextConfig(paths=(str(tmp_path / "text.txt"),), sequence_length=8).open(vocab_size=257)
    assert source.summary.startswith("1 document, ")
