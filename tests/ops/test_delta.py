"""The delta family beyond its kernel checks (test_kernels.py): numerics, unit-norm keys and errors."""

from functools import partial

import pytest
import torch
from recurrence_calls import CPU, case_of, run
from torch.testing import assert_close

from seqmix.ops.delta import delta, delta_flops, unit_norm
from seqmix.ops.runtime.paradigm import Paradigm
from seqmix.registry import SeqmixError
from seqmix.testing.kernel.families import DeltaCase

PARADIGMS = [Paradigm.RECURRENT, Paradigm.CHUNKWISE]
case_of = partial(case_of, kind=DeltaCase, strength=0.3, rate=2.0)  # betas from 0 to 2
every_paradigm = pytest.mark.parametrize("paradigm", PARADIGMS)
every_decay = pytest.mark.parametrize("log_decay", [None, "H", "B T H"])
exactly = partial(assert_close, rtol=1e-9, atol=1e-9)


@every_paradigm
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_identical_keys_stay_accurate(paradigm, dtype):
    # the hardest triangular system: every key the same, and every transition a reflection
    case = case_of(None, [1000, 1000], key_width=4, chunk_size=64, dtype=dtype)
    inputs = case.inputs(CPU) | {"beta": torch.full((2, 1000, 2), 2.0)}
    inputs["k"] = torch.full_like(inputs["k"], 0.5)
    exact = run(case, Paradigm.RECURRENT, {name: x.double() for name, x in inputs.items()})
    for actual, expected in zip(run(case, paradigm, inputs), exact, strict=True):
        error = (actual.double() - expected).norm() / expected.norm()
        assert error <= (1e-4 if dtype == torch.float32 or actual.dtype == torch.float32 else 3e-3)


def test_unit_norm_normalises_keys_and_keeps_zeros():
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    exactly(unit_norm(x), x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt())
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        large = torch.full((2, 64), 3e3, dtype=dtype, requires_grad=True)  # whose squares leave float16
        assert_close(unit_norm(large).float(), torch.full((2, 64), 0.125), rtol=1e-5, atol=0)
        zeros = torch.zeros(2, 64, dtype=dtype, requires_grad=True)
        unit_norm(zeros).sum().backward()
        assert not unit_norm(zeros).any()
        assert zeros.grad.isfinite().all()


Q, K, V, B = torch.randn(2, 6, 2, 4), torch.randn(2, 6, 2, 4), torch.randn(2, 6, 2, 3), torch.rand(2, 6, 2)


@pytest.mark.parametrize(
    ("tensors", "options", "named"),
    [
        ((Q, K, V, B[..., None], None), {}, r"beta .* 2, 6, 2, got \[2, 6, 2, 1\]"),
        ((Q, K, V, B.long(), None), {}, "beta .* int64"),
        ((Q, K, V, B, torch.zeros(2, 6, 2, 3)), {}, r"\[B T H\] or \[B T H K\] .* \[2, 6, 2, 3\]"),
        ((Q, K, V, B, None), {"initial_state": torch.zeros(2, 2, 3, 4)}, r"\[2, 2, 4, 3\].* \[2, 2, 3, 4\]"),
        ((Q, K, V, B), {"paradigm": Paradigm.PARALLEL}, "parallel .* chunkwise, recurrent"),
        ((Q, K, V, B), {"chunk_size": 0}, "chunk_size .* 0"),
    ],
)
def test_mismatched_arguments_raise(tensors, options, named):
    with pytest.raises(SeqmixError, match=named):
        delta(*tensors, **options)
    with pytest.raises(SeqmixError, match="parallel"):
        delta_flops(Paradigm.PARALLEL, 4, 2, 2)
