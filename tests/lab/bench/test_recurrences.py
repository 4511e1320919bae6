"""The timed recurrences: the loop and the chunkwise form compute the same function."""

import pytest
import torch
from torch.testing import assert_close

from seqmix.lab.bench.recurrences import CASES


@pytest.mark.parametrize("name", CASES)
def test_loop_matches_chunkwise_op_in_float64(name):
    case, generator = CASES[name], torch.Generator().manual_seed(0)
    inputs = case.inputs(lambda *shape: torch.randn(2, 70, *shape, generator=generator, dtype=torch.float64))
    leaves = [x.requires_grad_() for x in inputs.values()]
    above = torch.randn(2, 70, *case.output, generator=generator, dtype=torch.float64)
    outputs = [function(inputs) for function in (case.chunkwise, case.loop)]
    gradients = [torch.autograd.grad(output, leaves, above) for output in outputs]
    assert_close(outputs[0], outputs[1], rtol=1e-9, atol=1e-9)
    assert_close(gradients[0], gradients[1], rtol=1e-9, atol=1e-9)
