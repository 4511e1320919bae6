"""Test of a residual connection: seqmix's own check, and the equations in a plain loop."""

import torch
from seqmix_mingru.momentum import MomentumConfig
from torch.testing import assert_close

from seqmix import build_model, load_config
from seqmix.blocks import RESIDUALS
from seqmix.testing import check_residual


def build():
    """Build a small model with the connection, found by its kind."""
    return build_model(load_config("attention-tiny", ["model.residual={kind: momentum}", "model.d_model=16"]).model)


def test_the_check_of_residual_connections():
    """Compare start, segments, documents, checkpointing and gradients."""
    assert RESIDUALS.resolve("momentum") is MomentumConfig
    check_residual(build())


def test_it_computes_its_definition():
    """Compare the stream with the equations, for two branches."""
    first, second = (MomentumConfig().build(4, index=i, place=i, layer=0) for i in range(2))
    with torch.no_grad():
        first.gamma.fill_(0.25)
        second.gamma.fill_(0.5)
    x = torch.randn(2, 3, 4)
    stream = second(first(MomentumConfig().build_ends(4, n_layers=1).start(x), torch.sin), torch.cos)
    v = 0.75 * x.sin()
    x = x + v
    v = 0.5 * v + 0.5 * x.cos()
    assert_close(stream, (x + v, v))
