"""Muon: row blocks, heads and gates, and the row normalization of NorMuon."""

import pytest
import torch
from torch import nn

from seqmix.mixers.base.roles import ParameterRole, Role, RowBlock
from seqmix.training.muon import Muon, normalized, orthogonalized

ROWS, COLUMNS = 8, 12


def gradients(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(ROWS, COLUMNS, generator=generator) for _ in range(count)]


def trained(blocks, steps, **options) -> torch.Tensor:
    """Return the weights after steps with these gradients, started from zeros."""
    weight = nn.Parameter(torch.zeros_like(steps[0]))
    roles = {weight: ParameterRole(Role.MATRIX, tuple(blocks))}
    settings = {"lr": 0.1, "momentum": 0.9, "betas": (0.8, 0.99)} | options
    optimizer = Muon([{"params": [weight]}], roles, **settings)
    for gradient in steps:
        weight.grad = gradient.clone()
        optimizer.step()
    return weight.detach()


@pytest.mark.parametrize("normalize_rows", [False, True])
def test_each_row_block_is_updated_as_a_separate_matrix(normalize_rows):
    steps = gradients(3)
    blocks = [RowBlock("q", 3), RowBlock("k", 3), RowBlock("v", 2)]
    together = trained(blocks, steps, normalize_rows=normalize_rows)
    parts = zip(*(step.split([3, 3, 2]) for step in steps), strict=True)
    alone = [trained([], list(part), normalize_rows=normalize_rows) for part in parts]
    torch.testing.assert_close(together, torch.cat(alone))
    # and a block that is declared is as one that is not
    torch.testing.assert_close(trained([RowBlock("all", ROWS)], steps), trained([], steps))


def test_reordering_heads_reorders_the_update():
    steps = gradients(3)
    order = [2, 0, 3, 1]

    def reordered(matrix):
        return matrix.unflatten(0, (4, 2))[order].flatten(0, 1)

    heads = [RowBlock("q", ROWS, heads=4)]
    by_head = trained(heads, steps, per_head=True)
    torch.testing.assert_close(reordered(by_head), trained(heads, list(map(reordered, steps)), per_head=True))
    assert (by_head - trained(heads, steps)).abs().max() > 0.01


def test_gate_rows_are_updated_by_adamw():
    steps = gradients(4)
    blocks = [RowBlock("q", 5), RowBlock("beta", 3, Role.GATE)]
    gates = nn.Parameter(torch.zeros(3, COLUMNS))
    adamw = torch.optim.AdamW([gates], lr=0.1, betas=(0.8, 0.99), weight_decay=0.0)
    for step in steps:
        gates.grad = step[5:].clone()
        adamw.step()
    weight = trained(blocks, steps)
    torch.testing.assert_close(weight[5:], gates.detach())
    torch.testing.assert_close(weight[:5], trained([], [step[:5] for step in steps]))


@pytest.mark.parametrize("shape", [(8, 8), (3, 40), (40, 3), (2, 16, 24)])
def test_singular_values_of_an_update_are_near_1(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    values = torch.linalg.svdvals(orthogonalized(matrices))
    well_conditioned = torch.linalg.svdvals(matrices) > 0.02 * matrices.norm(dim=(-2, -1))[..., None]
    assert ((values > 0.5) & (values < 1.5))[well_conditioned].all()
    # with the directions of the matrix
    product = orthogonalized(matrices) @ matrices.mT
    torch.testing.assert_close(product, product.mT, atol=0.2 * product.abs().max().item(), rtol=0.1)


def test_normuon_evens_out_rows_and_keeps_the_frobenius_norm():
    directions = orthogonalized(torch.randn(6, 4, generator=torch.Generator().manual_seed(2)))
    mean_square = torch.zeros(6, 1)
    result = normalized(directions, mean_square)
    assert result.norm() == pytest.approx(directions.norm().item(), rel=1e-5)
    rows = result.square().mean(1)
    assert rows.max() < 1.01 * rows.min()  # in the first step, every row has the same size
    assert mean_square.square().sum() > 0
