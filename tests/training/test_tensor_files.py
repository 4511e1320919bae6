"""Tensor files written in one partition into chunks can be read in any other."""

import json
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from seqmix.training.tensor_files import CheckpointError, Chunk, fill, read_tensors, write_chunks


def rows(tensor, cuts):
    """A tensor in chunks of rows, which may be empty."""
    edges = [0, *sorted(cuts), len(tensor)]
    return [Chunk(tensor[a:b], (a, *(0 for _ in tensor.shape[1:])), tuple(tensor.shape)) for a, b in pairwise(edges)]


CUTS = st.lists(st.integers(0, 7), max_size=3)


@given(written=CUTS, read=CUTS, width=st.sampled_from([(), (1,), (3,), (2, 2)]))
def test_chunks_can_be_read_in_any_other_partition(tmp_path_factory, written, read, width):
    folder, x = tmp_path_factory.mktemp("chunks"), torch.randn(7, *width)
    files = [folder / f"{number}.safetensors" for number in range(len(written) + 1)]
    for file, chunk in zip(files, rows(x, written), strict=True):
        number = {"step": Chunk.whole(torch.tensor(3.0))} if file == files[0] else {}
        write_chunks(file, {"x": chunk, **number} if len(chunk.values) else number, {"of": "us"})
    whole, metadata = read_tensors(files)
    assert torch.equal(whole["x"], x)
    assert whole["step"] == 3
    assert metadata["of"] == "us"
    for chunk in rows(torch.empty_like(x), read):
        step = Chunk.whole(torch.zeros(()))
        fill(files, {"x": chunk, "step": step})
        first = chunk.begin[0]
        assert torch.equal(chunk.values, x[first : first + len(chunk.values)])
        assert step.values == 3


@pytest.fixture
def halves(tmp_path):
    files = [tmp_path / "x-1-of-2.safetensors", tmp_path / "x-2-of-2.safetensors"]
    for file, chunk in zip(files, rows(torch.randn(6, 2), [4]), strict=True):
        write_chunks(file, {"x": chunk}, {})
    return files


def test_missing_part_is_refused_before_any_copy(halves):
    ours = torch.zeros(6, 2)
    with pytest.raises(CheckpointError, match=r"x-2-of-2.* parts of x that do not make up the whole"):
        fill(halves[1:], {"x": Chunk.whole(ours)})
    halves[1].unlink()
    with pytest.raises(CheckpointError, match=r"x-2-of-2.safetensors is missing"):
        read_tensors(halves)
    assert not ours.any()


@pytest.mark.parametrize(
    "begins",
    ["", "[]", "1", "{}x", '{"y": 1}', *(json.dumps({"x": {"saved_offsets": x}}) for x in (1, [0], [-1, 0], "ab"))],
)
def test_invalid_chunk_positions_are_refused(halves, begins):
    save_file(load_file(halves[1]), halves[1], {"DCP_SHARDING_INFO": begins})
    with pytest.raises(CheckpointError, match=r"x-2-of-2.safetensors is damaged|do not make up the whole"):
        read_tensors(halves)


@pytest.mark.slow
def test_torch_distributed_checkpoint_reads_chunks(halves):
    import torch.distributed.checkpoint as dcp

    found = {"x": torch.zeros(6, 2)}
    dcp.load(found, storage_reader=dcp.HuggingFaceStorageReader(str(halves[0].parent)), no_dist=True)
    assert torch.equal(found["x"], read_tensors(halves)[0]["x"])
