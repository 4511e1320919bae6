"""Streamed datasets: every row is read once per pass, shuffled by seed, and resuming is bitwise exact."""

import json
from importlib import import_module
from pathlib import Path

import pytest
import torch
from small_runs import refusal

from seqmix.data import TextConfig, dataset_stream

datasets = pytest.importorskip("datasets")
BEGIN = 256
N = 50


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def rows(start: int, stop: int) -> list[dict]:
    return [{"text": f"{n:03d}" * (1 + n % 7)} for n in range(start, stop)]


@pytest.fixture
def folders(tmp_path) -> dict[str, dict]:
    """The same rows in three shards, as JSON lines, as Parquet, and as `save_to_disk` writes them."""
    (tmp_path / "lines").mkdir()
    (tmp_path / "tables").mkdir()
    arrow, parquet = import_module("pyarrow"), import_module("pyarrow.parquet")
    for number, (start, stop) in enumerate(((0, 20), (20, 21), (21, N))):
        text = "".join(f"{json.dumps(row)}\n" for row in rows(start, stop))
        (tmp_path / "lines" / f"{number}.jsonl").write_text(text)
        table = arrow.Table.from_pylist(rows(start, stop))
        parquet.write_table(table, tmp_path / "tables" / f"{number}.parquet", row_group_size=7)
    datasets.Dataset.from_list(rows(0, N)).save_to_disk(str(tmp_path / "saved"), num_shards=3)
    (tmp_path / "held.txt").write_text("the validation split " * 20)
    return {
        "lines": {"path": str(tmp_path / "lines")},
        "files": {"path": "json", "data_files": [str(tmp_path / "lines" / "*.jsonl")]},
        "tables": {"path": "parquet", "data_files": [str(tmp_path / "tables" / "*.parquet")]},
        "saved": {"path": str(tmp_path / "saved")},
    }


KINDS = ("files", "tables", "saved")


def text_of(folders, kind="lines", sequence_length=16, **options):
    dataset = folders[kind] | {"streaming": True, "shuffle_buffer": 8} | options
    held = Path(folders["lines"]["path"]).parent / "held.txt"
    return TextConfig(dataset=dataset, validation={"paths": [str(held)]}, sequence_length=sequence_length).open(257)


def documents(batches) -> list[str]:
    """The complete documents of consecutive batches."""
    tokens = torch.cat([batch.inputs.flatten() for batch in batches]).tolist()
    assert tokens[0] == BEGIN
    pieces = "".join(" " if token == BEGIN else chr(token) for token in tokens)[1:].split(" ")
    return pieces[:-1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("buffer", [1, 8, 1000])
def test_every_row_is_read_once_per_pass_in_seeded_order(folders, kind, buffer):
    expected = [row["text"] for row in rows(0, N)]

    def passes(seed):
        text = text_of(folders, kind, shuffle_buffer=buffer)
        return documents(text.training_batch(step, 4, seed) for step in range(25))

    found = passes(0)
    assert len(found) > 2 * N
    assert sorted(found[:N]) == sorted(found[N : 2 * N]) == expected
    assert passes(0) == found
    if buffer == 1:
        assert found[:N] == found[N : 2 * N] == expected
        return
    assert found[:N] != found[N : 2 * N]
    assert passes(1) != found
    for at in range(0, N, buffer):  # in blocks
        assert sorted(found[at : at + buffer][: N - at]) == expected[at : at + buffer]


def test_sequences_follow_each_other_and_targets_are_the_next_tokens(folders):
    batches = [text_of(folders).training_batch(0, 20, seed=0)]
    text = text_of(folders)
    batches += [text.training_batch(step, 4, seed=0) for step in range(5)]
    assert torch.equal(torch.cat([b.inputs for b in batches[1:]]), batches[0].inputs)
    flat, targets = (x.flatten() for x in batches[0])
    assert ((targets[:-1] == flat[1:]) | (flat[1:] == BEGIN)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_stream_resumes_at_its_place_without_rereading_earlier_rows(folders, kind, monkeypatch):
    whole = text_of(folders, kind)
    steps = [whole.training_batch(step, 4, seed=3) for step in range(30)]
    # every row that is read, beyond those of the block
    count, read = [0], dataset_stream.row_documents

    def counted(config, given, first):
        for document in read(config, given, first):
            count[0] += 1
            yield document

    monkeypatch.setattr(dataset_stream, "row_documents", counted)
    for stop in (1, 9, 23):
        text = text_of(folders, kind)
        for step in range(stop):
            text.training_batch(step, 4, seed=3)
        assert torch.equal(text.training_batch(stop - 1, 4, seed=3).inputs, steps[stop - 1].inputs)  # once more
        state = json.loads(json.dumps(text.state_dict()))
        again = text_of(folders, kind)
        again.load_state_dict(state)
        count[0] = 0
        for step in range(stop, 30):
            assert torch.equal(again.training_batch(step, 4, seed=3).inputs, steps[step].inputs)
            assert step > stop or count[0] <= 5 * 8
        # and a step is the same without a place, and another seed does not use it
        assert torch.equal(text_of(folders, kind).training_batch(stop, 4, seed=3).inputs, steps[stop].inputs)
        again.load_state_dict(state)
        expected = text_of(folders, kind).training_batch(stop, 4, seed=4)
        assert torch.equal(again.training_batch(stop, 4, seed=4).inputs, expected.inputs)
        assert torch.equal(again.training_batch(0, 4, seed=3).inputs, steps[0].inputs)  # back, too


def test_processes_divide_the_rows_of_a_step(folders):
    whole = text_of(folders)
    ranks = [text_of(folders) for _ in range(4)]
    for step in range(4):
        expected = whole.training_batch(step, 8, seed=0)
        parts = [text.training_batch(step, 8, 0, rank, 4) for rank, text in enumerate(ranks)]
        assert torch.equal(torch.cat([part.inputs for part in parts]), expected.inputs)
    assert {json.dumps(text.state_dict()) for text in ranks} == {json.dumps(whole.state_dict())}


@pytest.mark.parametrize("kind", KINDS)
def test_skip_and_documents_limit_the_rows_read(folders, kind):
    text = text_of(folders, kind, skip=19, documents=15, shuffle_buffer=4)
    batches = [text.training_batch(step, 4, seed=0) for step in range(8)]
    assert {int(document[:3]) for document in documents(batches)} == set(range(19, 34))
    again = text_of(folders, kind, skip=19, documents=15, shuffle_buffer=4)
    text = text_of(folders, kind, skip=19, documents=15, shuffle_buffer=4)
    for step in range(5):
        text.training_batch(step, 4, seed=0)
    again.load_state_dict(text.state_dict())
    for step in range(5, 8):
        assert torch.equal(again.training_batch(step, 4, seed=0).inputs, batches[step].inputs)


def test_first_rows_can_serve_as_the_validation_split(folders):
    text = TextConfig(
        dataset=folders["saved"] | {"streaming": True, "skip": 40},
        validation={"dataset": folders["lines"] | {"streaming": True, "documents": 40}},
        sequence_length=16,
    ).open(257)
    assert text.corpus.documents == 40
    assert "".join(map(chr, text.corpus.validation[1:4])) == "000"
    assert {int(found[:3]) for found in documents([text.training_batch(0, 40, seed=0)])} == set(range(40, N))


def test_packing_has_room_for_the_shortest_documents(folders, tmp_path):
    (tmp_path / "lines" / "3.jsonl").write_text('{"text": "x"}\n' * 300)
    text = text_of(folders, skip=N)
    text = TextConfig(**text.config.model_dump() | {"packing": True}).open(257)
    for step in range(4):
        batch = text.training_batch(step, 4, seed=0)
        packed = text.packed(batch)
        assert len(set(packed.cu_seqlens.tolist())) >= 4 * 8 + 1


def test_streaming_errors_name_the_cause(folders, tmp_path):
    fields = {"sequence_length": 16, "text_field": "body", "validation": {"paths": [str(tmp_path / "held.txt")]}}
    text = TextConfig(dataset=folders["lines"] | {"streaming": True, "skip": 20}, **fields).open(257)
    assert "row 20: there is no field 'body'; fields: text" in refusal(lambda: text.training_batch(0, 8, seed=0))
    for file in (tmp_path / "lines").glob("*"):
        file.write_text('{"text": ""}\n')
    assert "no text in" in refusal(lambda: text_of(folders).training_batch(0, 8, seed=0))
    assert "cannot be read" in refusal(lambda: text_of(folders, data_files=["no*"]).training_batch(0, 8, seed=0))
