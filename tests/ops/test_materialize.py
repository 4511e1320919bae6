"""Materialized values are computed once, as shown by the CPU code that inductor generates."""

import re

import pytest
import torch
from torch._inductor.utils import run_and_get_code

from seqmix.ops.runtime.materialize import materialize


def loops_around(source: str, call: str) -> int:
    """The most loops that an appearance of a call stands in."""
    deepest, scopes = 0, []
    for match in re.finditer(r"for\s*\(int64_t|[{}]|" + re.escape(call), source):
        found = match.group()
        if found == "{":
            scopes.append("block")
        elif found == "}":
            scopes.pop()
            while scopes and scopes[-1] == "loop":
                scopes.pop()
        elif found == call:
            deepest = max(deepest, scopes.count("loop"))
        else:
            scopes.append("loop")
    return deepest


@pytest.mark.slow
@pytest.mark.parametrize(("form", "loops"), [(materialize, 1), (lambda x, dim: x, 2)], ids=["materialized", "as it is"])
def test_materialize_prevents_recomputing_the_decay_for_every_state_entry(form, loops):
    torch._dynamo.reset()

    def step(state):
        leak = torch.exp2(-5 - torch.arange(4, dtype=torch.float64))
        return state * form(torch.log1p(-leak).float().exp(), 0)[:, None, None]

    _, sources = run_and_get_code(torch.compile(step, fullgraph=True), torch.randn(4, 8, 16))
    source = "\n".join(sources)
    kernels = source[: source.rindex("''')")]  # what follows is Python
    assert loops_around(kernels, "log1p") == loops


def test_materialize_returns_the_same_tensor_in_eager_mode():
    x = torch.rand(4)
    assert materialize(x, 0) is x
