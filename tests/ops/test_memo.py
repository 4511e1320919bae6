"""A memo computes a function once per pass for the same arguments, and keeps constants across passes."""

import torch
from torch.testing import assert_close

from seqmix.ops.runtime.memo import Memo, once


def test_memo_computes_once_for_equal_positions_or_the_same_tensor():
    calls = []

    def scaled(x, factor):
        calls.append(factor)
        return factor * x

    memo = Memo()
    positions, floats = torch.tensor([3, 5]), torch.ones(2)
    first = once(memo, scaled, positions, 2)
    assert once(memo, scaled, positions.clone(), 2) is first
    positions.add_(1)  # as one who owns a state may
    for x, factor in ((positions, 2), (positions[:1], 2), (positions, 3), (floats, 2), (floats.clone(), 2)):
        assert_close(once(memo, scaled, x, factor), factor * x)
        once(memo, scaled, x, factor)
    assert calls == [2, 2, 2, 3, 2, 2]
    once(memo.next_pass(), scaled, floats, 2)
    assert len(calls) == 7
    for _ in range(2):
        once(None, scaled, floats, 2)
    assert len(calls) == 9


def test_constants_are_kept_for_the_next_pass():
    memo, calls = Memo(), []

    def constant(size):
        calls.append(size)
        return torch.arange(size)

    for _ in range(2):
        assert_close(once(memo.next_pass(), constant, 3), torch.arange(3))
    assert calls == [3]


@torch.no_grad()
def test_memo_works_under_vmap():
    memo, positions = Memo(), torch.tensor([[1], [1], [4]])
    assert_close(torch.vmap(lambda x: once(memo, torch.square, x))(positions), positions.square())
