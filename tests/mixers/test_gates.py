"""Gated norms in the range of float16; their formulas are those of the mixers that have them."""

import pytest
import torch

from seqmix import MIXERS
from seqmix.mixers.parts import GatedNorm


@pytest.mark.parametrize("norm", ["rms", "group"])
@pytest.mark.parametrize("gate", ["swish", "sigmoid"])
def test_a_gated_norm_stays_in_the_range_of_float16(norm, gate):
    x, given = torch.randn(2, 1, 64).sign().half() * 6e4
    layer = GatedNorm(64, norm, gate, affine=True, eps=1e-6)  # its parameter is wide, as under autocast
    y = layer(x, given / 10000)
    assert y.dtype == torch.float32
    assert y.isfinite().all()
    assert y.half().isfinite().all()


def test_parts_are_not_mixers():
    assert not {"gates", "parts", "qkv", "short_convolution", "traits", "state"} & set(MIXERS.kinds())
