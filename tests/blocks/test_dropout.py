"""Dropout masks depend only on key and position, however a batch is divided."""

import pytest
import torch

from seqmix.blocks import Dropout

ROWS, LENGTH, WIDTH = 16, 64, 128


def mask(rows=ROWS, length=LENGTH, *, p=0.1, key=1 << 40, first=0, row=LENGTH, width=WIDTH) -> torch.Tensor:
    """What is dropped, [B T D], as numbers."""
    dropout = Dropout(p).train()
    dropout.place = torch.tensor([key, first, row])
    y = dropout(torch.ones(rows, length, width))
    assert set(y.unique().tolist()) <= {0.0, torch.tensor(1 / (1 - p)).item()}
    return (y == 0).double()


@pytest.mark.parametrize("p", [1e-3, 0.1, 0.5, 0.9, 0.999])
def test_dropped_share_matches_p_in_every_row_token_and_channel(p):
    dropped, deviation = mask(p=p) - p, (p * (1 - p)) ** 0.5
    for dims in ((0, 1, 2), (1, 2), (0, 2), (0, 1), (2,)):
        found = dropped.mean(dims)
        count = dropped.numel() / found.numel()
        assert found.abs().max() < 5 * deviation / count**0.5 + 5 / count


def test_masks_are_uncorrelated_across_keys_and_neighbours():
    one, bound = mask(p=0.5) - 0.5, 5 * 0.25 / (ROWS * LENGTH * WIDTH) ** 0.5
    for other in (mask(p=0.5, key=key) - 0.5 for key in (0, 1, (1 << 40) + 1, -5, 2**62)):
        assert (one * other).mean().abs() < bound
    for dim in range(3):
        for distance in (1, 2, 8):
            assert (one * one.roll(distance, dim)).mean().abs() < 1.2 * bound


def test_part_of_batch_gets_same_masks_as_whole_batch():
    whole = mask()
    assert torch.equal(mask(4, first=8 * LENGTH), whole[8:12])
    # a segment of every row, as ranks share them; and rows in one, as packing has them
    assert torch.equal(mask(4, 16, first=8 * LENGTH + 16), whole[8:12, 16:32])
    assert torch.equal(mask(1, 4 * LENGTH, first=8 * LENGTH)[0], whole[8:12].flatten(0, 1))


def test_dropout_without_place_matches_torch_and_eval_is_identity():
    dropout, x = Dropout(0.5), torch.randn(2, 3, 4)
    torch.manual_seed(0)
    expected = torch.nn.functional.dropout(x, 0.5)
    torch.manual_seed(0)
    assert torch.equal(dropout(x), expected)
    dropout.place = torch.zeros(3, dtype=torch.int64)
    assert torch.equal(dropout.eval()(x), x)
