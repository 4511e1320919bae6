"""Operations on any state: one layer's, or the nested states of a model."""

from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close

from seqmix.mixers import ContractError
from seqmix.mixers.base.state import clone, concatenate, from_dict, nbytes, to_dict


class Matrix(NamedTuple):
    memory: Tensor
    position: Tensor


class Pair(NamedTuple):
    left: Matrix
    right: Tensor


def matrix(rows=3, start=0):
    memory = torch.arange(start, start + rows * 2, dtype=torch.float32).view(rows, 2)
    return Matrix(memory, torch.arange(start, start + rows))


def model_state(rows=3, start=0):
    return (matrix(rows, start), Pair(matrix(rows, start + 10), torch.full((rows, 1), float(start))), ())


NAMES = ["0.memory", "0.position", "1.left.memory", "1.left.position", "1.right"]


def same(actual, expected):
    assert type(actual) is type(expected)
    if isinstance(expected, Tensor):
        assert_close(actual, expected, rtol=0, atol=0)
        return
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        same(a, b)


def test_leaves_are_named_by_their_path():
    state = model_state()
    leaves = to_dict(state)
    assert list(leaves) == NAMES
    assert leaves["1.left.memory"] is state[1].left.memory
    assert list(to_dict(state[0])) == ["memory", "position"]
    assert to_dict(()) == {}


def test_state_round_trips_through_its_leaves(tmp_path):
    state = model_state()
    same(from_dict(model_state(start=100), to_dict(state)), state)
    # in any order, and from the disk
    same(from_dict(model_state(start=100), dict(reversed(to_dict(state).items()))), state)
    save_file(to_dict(state), tmp_path / "state.safetensors")
    same(from_dict(model_state(start=100), load_file(tmp_path / "state.safetensors")), state)


@pytest.mark.parametrize(
    ("like", "names", "words"),
    [
        (model_state(), NAMES[:-1], r"0.memory, .*1.right.*0.memory, .*1.left.position$"),
        (model_state(), [*NAMES, "2.memory"], "2.memory"),
        (model_state(), [], "none"),
        ((), ["x"], "none.* x"),
    ],
)
def test_mismatched_leaves_raise(like, names, words):
    with pytest.raises(ContractError, match=words):
        from_dict(like, {name: torch.zeros(1) for name in names})


@pytest.mark.parametrize(
    ("states", "words"),
    [
        ([], "concatenate"),
        ([model_state(), (matrix(), Pair(matrix(), torch.zeros(3, 4)), ())], r"\(1,\).*\(4,\).*max_length"),
        ([matrix(), Pair(matrix(), torch.zeros(3, 1))], "Matrix of 2.*Pair of 2"),
        ([model_state(), model_state()[:2]], "tuple of 2.*tuple of 3"),
    ],
)
def test_concatenating_incompatible_states_raises(states, words):
    with pytest.raises(ContractError, match=words):
        concatenate(states)


def test_gradients_pass_through_cloning():
    memory = torch.ones(3, 2, requires_grad=True)
    clone((Matrix(memory, torch.arange(3)),))[0].memory.sum().backward()
    assert_close(memory.grad, torch.ones(3, 2))


def test_nbytes_counts_all_leaves():
    rows, float32, int64 = 3, 4, 8
    assert nbytes(model_state()) == 2 * rows * (2 * float32 + int64) + rows * float32
    assert nbytes(()) == 0
