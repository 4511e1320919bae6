"""Text as tokens: what is read, what is held out, and the batches cut from it."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from streams import evaluation_batches, training_batch

from seqmix import SeqmixError
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
    return read_corpus(TextConfig(**{"paths": tuple(map(str, paths)), "sequence_length": 8} | fields))


def error(*paths, **fields) -> str:
    with pytest.raises(SeqmixError) as raised:
        read(*paths, **fields)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def files_in(tokens) -> set[int]:
    return set(tokens.tolist()) - {BEGIN}


# ---- splits


def test_by_file_holds_out_whole_files(folder):
    corpus = read(folder, split="by_file", validation_fraction=0.3)
    held, learned = files_in(corpus.validation), files_in(corpus.train)
    assert held | learned == set(range(40))
    assert not held & learned
    assert 4 <= len(held) <= 20
    assert len(corpus.train) == len(learned) * 31
    assert len(corpus.validation) == len(held) * 31


def test_which_files_are_held_out_is_fixed(folder):
    # a hash of the name: no other Python, machine or year may choose others
    held = files_in(read(folder, split="by_file", validation_fraction=0.2).validation)
    assert held == {14, 15, 16, 29, 34}


def test_the_side_of_a_file_does_not_depend_on_other_files(folder):
    before = files_in(read(folder, split="by_file", validation_fraction=0.3).validation)
    for number in range(0, 40, 2):
        (folder / f"file{number:02d}.txt").unlink()
    (folder / "a new file").write_bytes(b"\xff" * 30)
    after = files_in(read(folder, split="by_file", validation_fraction=0.3).validation)
    assert after - {0xFF} == {number for number in before if number % 2}


def test_a_larger_fraction_holds_out_more_of_the_same(folder):
    few, many = (files_in(read(folder, split="by_file", validation_fraction=share).validation) for share in (0.2, 0.6))
    assert few < many


def test_the_side_of_a_file_does_not_depend_on_where_the_folder_lies(folder):
    inner = folder / "inner"
    inner.mkdir()
    for file in folder.glob("*.txt"):
        file.rename(inner / file.name)
    before = files_in(read(inner, split="by_file", validation_fraction=0.3).validation)
    inner.rename(folder / "elsewhere")
    assert files_in(read(folder / "elsewhere", split="by_file", validation_fraction=0.3).validation) == before


def test_the_tail_of_every_file_is_held_out(folder):
    (folder / "file00.txt").write_bytes(bytes(range(100)))
    (folder / "file01.txt").write_bytes(bytes(range(100, 150)))
    corpus = read(folder / "file00.txt", folder / "file01.txt", split="tail", validation_fraction=0.2)
    assert corpus.train.tolist() == [BEGIN, *range(80), BEGIN, *range(100, 140)]
    assert corpus.validation.tolist() == [BEGIN, *range(80, 100), BEGIN, *range(140, 150)]


@pytest.mark.parametrize(("count", "split"), [(1, "tail"), (40, "by_file")])
def test_auto_is_by_file_where_there_are_files(folder, count, split):
    corpus = read(*sorted(folder.glob("*.txt"))[:count], split="auto", validation_fraction=0.3)
    assert (corpus.split, corpus.documents) == (split, count)


# ---- tokens


def test_a_begin_token_opens_every_document(folder):
    corpus = read(folder, split="tail", validation_fraction=0.5)
    for tokens in (corpus.train, corpus.validation):
        assert tokens.dtype == np.uint16
        assert tokens.reshape(40, 16)[:, 0].tolist() == [BEGIN] * 40
        assert (tokens.reshape(40, 16)[:, 1:] == np.arange(40)[:, None]).all()


def test_any_bytes_are_text(tmp_path):
    (tmp_path / "all").write_bytes(bytes(range(256)))
    corpus = read(tmp_path / "all", validation_fraction=0.25)
    assert [*corpus.train[1:], *corpus.validation[1:]] == list(range(256))


# ---- files


def test_hidden_files_and_folders_are_not_read(folder):
    (folder / ".hidden").write_bytes(b"\xff" * 30)
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_bytes(b"\xff" * 30)
    assert 0xFF not in files_in(read(folder, split="tail").train)


def test_a_hidden_file_that_is_named_is_read(folder):
    (folder / ".hidden").write_bytes(b"\xff" * 30)
    assert files_in(read(folder / ".hidden", validation_fraction=0.3).train) == {0xFF}


def test_a_folder_below_a_hidden_one_is_read(folder):
    (folder / ".cache").mkdir()
    (folder / ".cache" / "text").write_bytes(b"\xff" * 30)
    assert files_in(read(folder / ".cache", validation_fraction=0.3).train) == {0xFF}


def test_the_glob_chooses_files(folder):
    (folder / "sub").mkdir()
    (folder / "sub" / "code.py").write_bytes(b"\xff" * 30)
    assert files_in(read(folder, glob="**/*.py", validation_fraction=0.3).train) == {0xFF}
    assert 0xFF not in files_in(read(folder, glob="*.txt", split="tail").train)


def test_empty_files_are_no_documents(folder):
    (folder / "empty.txt").write_bytes(b"")
    assert read(folder, split="tail").documents == 40


def test_files_and_folders_go_together(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other") / "more.txt"
    other.write_bytes(b"\xfe" * 30)
    corpus = read(folder, other, split="tail")
    assert corpus.documents == 41
    assert files_in(corpus.train) == {*range(40), 0xFE}
    assert corpus.name == f"{folder}, {other}"


def test_a_path_may_start_at_home(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    assert files_in(read("~/file07.txt", validation_fraction=0.3).train) == {7}


def test_without_paths_the_text_is_python_s_own_source():
    corpus = read_corpus(TextConfig())
    assert corpus.name == "the source of Python's standard library"
    assert corpus.documents > 100
    assert corpus.split == "by_file"
    assert 0.05 < len(corpus.validation) / (len(corpus.train) + len(corpus.validation)) < 0.2
    text = bytes(corpus.train[corpus.train < BEGIN].astype(np.uint8))
    assert text.count(b"import ") > 100


# ---- what cannot be used


def test_a_missing_path_is_one_sentence(folder):
    assert error(folder / "no") == f"the corpus {folder / 'no'} does not exist"


def test_a_corpus_without_text_is_one_sentence(folder):
    assert error(folder, glob="*.md") == f"the corpus is empty: no text in {folder} (glob *.md)"
    (folder / "empty").mkdir()
    assert error(folder / "empty").startswith("the corpus is empty")
    (folder / "empty" / "file").write_bytes(b"")
    assert error(folder / "empty").startswith("the corpus is empty")


def test_a_file_that_cannot_be_read_is_one_sentence(folder, monkeypatch):
    def refuse(path, *_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)
    assert error(folder) == f"the corpus {folder / 'file00.txt'} cannot be read: Permission denied"


def test_a_pattern_in_place_of_a_path_names_the_glob(folder):
    assert "data.glob" in error(folder / "*.txt")


def test_a_home_that_is_not_there_is_one_sentence():
    assert "the corpus ~nobody-of-this-name/text cannot be found" in error("~nobody-of-this-name/text")


@pytest.mark.parametrize(("length", "fits"), [(80, True), (81, False)])
def test_a_text_shorter_than_a_sequence_is_one_sentence(tmp_path, length, fits):
    (tmp_path / "text").write_bytes(b"a" * 160)  # 80 and 80, and a begin token each
    fields = {"validation_fraction": 0.5, "sequence_length": length}
    if fits:
        read(tmp_path / "text", **fields)
    else:
        assert error(tmp_path / "text", **fields).startswith(
            f"the training text of {tmp_path / 'text'} has 81 tokens, and a sequence with its last target needs 82: "
            "lower data.sequence_length"
        )


def test_a_validation_text_shorter_than_a_sequence_is_one_sentence(tmp_path):
    (tmp_path / "text").write_bytes(b"a" * 160)
    assert error(tmp_path / "text", validation_fraction=0.05, sequence_length=9).startswith(
        f"the validation text of {tmp_path / 'text'} has 9 tokens, and a sequence with its last target needs 10: "
    )


def test_a_split_that_holds_out_nothing_names_the_other_one(folder):
    few = [folder / f"file{number:02d}.txt" for number in (0, 1)]
    message = error(*few)
    assert "the validation text of" in message
    assert "0 tokens" in message
    assert "data.split is by_file" in message
    assert "tail" in message


# ---- batches

STREAM = np.array([BEGIN, *range(50), BEGIN, *range(100, 150), BEGIN, *range(200, 250)], dtype=np.uint16)


def test_a_batch_is_cut_from_the_stream_with_the_token_behind_each():
    batch = training_batch(STREAM, 8, 32, seed=0, step=0)
    assert batch.inputs.shape == batch.targets.shape == (32, 8)
    assert batch.inputs.dtype is batch.targets.dtype is torch.int64
    windows = {tuple(STREAM[at : at + 9].tolist()) for at in range(len(STREAM) - 8)}
    for inputs, targets in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
        last = BEGIN if targets[-1] == IGNORED else targets[-1]
        assert (*inputs, last) in windows
        assert targets[:-1] == [IGNORED if token == BEGIN else token for token in inputs[1:]]


def test_every_place_of_the_stream_is_drawn_the_last_one_too():
    batch = training_batch(STREAM, 8, 5000, seed=0, step=0)
    starts = {tuple(row) for row in batch.inputs.tolist()}
    assert starts == {tuple(STREAM[at : at + 8].tolist()) for at in range(len(STREAM) - 8)}


def test_a_stream_of_one_sequence_and_its_last_target_is_enough():
    batch = training_batch(STREAM[1:10], 8, 4, seed=0, step=0)
    assert batch.inputs.tolist() == [list(range(8))] * 4
    assert batch.targets.tolist() == [list(range(1, 9))] * 4


def test_begin_tokens_are_read_and_never_predicted():
    batch = training_batch(STREAM, 8, 5000, seed=0, step=0)
    assert (batch.inputs == BEGIN).any()
    assert not (batch.targets == BEGIN).any()
    behind = batch.inputs[:, 1:] == BEGIN
    assert (batch.targets[:, :-1][behind] == IGNORED).all()


def test_a_batch_is_a_function_of_seed_and_step():
    def inputs(seed, step):
        return training_batch(STREAM, 8, 16, seed=seed, step=step).inputs

    torch.manual_seed(0)
    np.random.seed(0)  # which must play no part
    first = inputs(1, 2)
    np.random.seed(1)
    assert torch.equal(inputs(1, 2), first)
    others = [inputs(1, 3), inputs(2, 2), inputs(2, 1), inputs(12, 0), inputs(0, 12)]
    assert not any(torch.equal(other, first) for other in others)


@pytest.mark.parametrize("batch_size", [1, 4, 5, 100])
@pytest.mark.parametrize("extra", [0, 1, 7])
def test_evaluation_covers_the_stream_once(batch_size, extra):
    stream = np.arange(12 * 8 + 1 + extra, dtype=np.uint16)
    batches = evaluation_batches(stream, 8, batch_size, None)
    assert len(batches) == math.ceil(12 / batch_size)
    assert {batch.inputs.shape for batch in batches} == {(batch_size, 8)}
    inputs, targets = (torch.cat(parts).flatten() for parts in zip(*batches, strict=True))
    counted = targets != IGNORED
    assert inputs[counted].tolist() == list(range(12 * 8))
    assert targets[counted].tolist() == list(range(1, 12 * 8 + 1))


def test_the_padding_of_the_last_batch_is_not_counted():
    *_, last = evaluation_batches(np.arange(33, dtype=np.uint16), 8, 3, None)
    assert (last.targets[:1] != IGNORED).all()
    assert (last.targets[1:] == IGNORED).all()


def test_evaluation_does_not_predict_begin_tokens():
    targets = torch.cat([batch.targets for batch in evaluation_batches(STREAM, 8, 4, None)])
    assert not (targets == BEGIN).any()
    assert (targets != IGNORED).sum() == 19 * 8 - 2  # two begin tokens lie inside


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_a_limited_evaluation_is_spread_evenly_from_end_to_end(limit):
    stream = np.arange(100 * 8 + 1, dtype=np.uint16)
    batches = evaluation_batches(stream, 8, 4, limit)
    assert len(batches) == limit
    starts = torch.cat([batch.inputs[:, 0] for batch in batches]) // 8
    assert starts[0] == 0
    assert starts[-1] == 99
    gaps = starts.diff()
    assert gaps.max() - gaps.min() <= 1
    assert len(set(starts.tolist())) == 4 * limit


def test_a_limit_above_the_stream_is_no_limit():
    stream = np.arange(5 * 8 + 1, dtype=np.uint16)
    limited, whole = (evaluation_batches(stream, 8, 4, limit) for limit in (9, None))
    assert len(limited) == len(whole) == 2
    assert all(torch.equal(a.targets, b.targets) for a, b in zip(limited, whole, strict=True))


# ---- unigram entropy


def corpus_of(validation) -> Corpus:
    return Corpus("text", 1, "tail", np.array([], dtype=np.uint16), np.array(validation, dtype=np.uint16))


def test_the_unigram_entropy_is_that_of_the_bytes_held_out():
    shares = [0.5, 0.25, 0.125, 0.125]
    corpus = corpus_of([BEGIN, *[1] * 8, *[2] * 4, BEGIN, *[3] * 2, *[255] * 2])
    assert corpus.unigram_entropy == pytest.approx(-sum(share * math.log(share) for share in shares))


def test_the_unigram_entropy_of_all_bytes_is_8_bits():
    assert corpus_of(range(256)).unigram_entropy == pytest.approx(math.log(256))
    assert corpus_of([7, 7, 7]).unigram_entropy == pytest.approx(0)
