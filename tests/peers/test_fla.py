"""The decay family against flash-linear-attention's plain references (fla-core 0.6.0), and where those fall short.

All but one cast to float32 inside: agreement is to 3e-5.
"""

import math
import re
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from seqmix.mixers import Paradigm
from seqmix.mixers.linear_attention import LinearAttentionConfig
from seqmix.mixers.ops.decay import decay

# not importorskip: it would also skip where fla is installed and its import fails; an uninstalled one leaves a folder
INSTALLED = getattr(find_spec("fla"), "origin", None) is not None
pytestmark = pytest.mark.skipif(not INSTALLED, reason="needs pip install --no-deps fla-core")

PARADIGMS = list(Paradigm)
B, T, H, K, V = 2, 64, 3, 8, 6
CHUNK = 24
"""Ours and theirs, where it is free; it does not divide T."""
# their functions: the shape of the decays, and whether they have states
ORACLES = {
    "retention": ("head", False),
    "parallel_simple_gla": ("token", False),
    "chunk_simple_gla": ("token", True),
    "recurrent_simple_gla": ("token", True),
    "recurrent_gla": ("key", True),
    "chunk_linear_attn": ("none", False),
    "recurrent_linear_attn": ("none", True),
}
every_paradigm = pytest.mark.parametrize("paradigm", PARADIGMS)


def naive(name):
    """One of their functions, by its file: these are plain torch, but importing fla needs triton, and takes seconds."""
    op = re.sub("^(parallel|chunk|recurrent)_", "", name)
    path = Path(find_spec("fla").submodule_search_locations[0], "ops", op, "naive.py")
    spec = spec_from_file_location(f"fla_naive_{op}", path)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, f"naive_{name}")


def theirs(oracle):
    """One of their functions with the arguments of ours: it gives output and final state (None of those without)."""
    function = naive(oracle)
    return {
        "retention": lambda q, k, v, a, s: (function(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2), None),
        "parallel_simple_gla": lambda q, k, v, a, s: (function(q, k, v, a)[0], None),
        "chunk_simple_gla": lambda q, k, v, a, s: function(q, k, v, a, s, True, CHUNK),
        "recurrent_simple_gla": lambda q, k, v, a, s: function(q, k, v, a, None, s, True),
        "recurrent_gla": lambda q, k, v, a, s: function(q, k, v, a, s, True),
        "chunk_linear_attn": lambda q, k, v, a, s: (function(q, k, v), None),
        "recurrent_linear_attn": lambda q, k, v, a, s: function(q, k, v, None, s, True),
    }[oracle]


def inputs(shape, batch=B):
    """q, k, v, log-decay and initial state; not all of theirs take a state that is not float32."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, batch, T, H, K, dtype=torch.float64, generator=generator)
    v = torch.randn(batch, T, H, V, dtype=torch.float64, generator=generator)
    a = -torch.rand(batch, T, H, K, dtype=torch.float64, generator=generator)
    fixed = torch.log1p(-(2.0 ** -torch.arange(5, 5 + H, dtype=torch.float64)))
    a = {"none": None, "head": fixed, "token": a[..., 0], "key": a}[shape]
    return q, k, v, a, torch.randn(batch, H, K, V, generator=generator)


def ours(paradigm, has_state=True, **options):
    if paradigm is Paradigm.CHUNKWISE:
        options["chunk_size"] = CHUNK

    def function(q, k, v, a, state):
        state = state if has_state else None
        return decay(paradigm, q, k, v, a, initial_state=state, output_final_state=has_state, **options)

    return function


def with_gradients(function, arguments):
    """What it returns, and the gradient of each argument (None where it plays no part)."""
    arguments = [None if x is None else x.clone().requires_grad_() for x in arguments]
    results = [x for x in function(*arguments) if x is not None]
    generator = torch.Generator().manual_seed(1)
    loss = sum((x * torch.randn(x.shape, generator=generator)).sum() for x in results)
    gradients = iter(torch.autograd.grad(loss, [x for x in arguments if x is not None], allow_unused=True))
    return [x.detach() for x in results], [None if x is None else next(gradients) for x in arguments]


def agree(actual, expected):
    assert_close(actual, expected, rtol=3e-5, atol=3e-5, check_dtype=False)


@pytest.mark.parametrize("oracle", ORACLES)
@every_paradigm
def test_outputs_states_and_gradients_are_theirs(oracle, paradigm):
    shape, has_state = ORACLES[oracle]
    results, gradients = with_gradients(ours(paradigm, has_state), inputs(shape))
    their_results, their_gradients = with_gradients(theirs(oracle), inputs(shape))
    agree(results, their_results)
    has_one = [x is not None for x in their_gradients]
    # retention's decays are fixed in their code
    assert has_one == [True, True, True, shape in ("token", "key"), has_state]
    agree([x for x, has in zip(gradients, has_one, strict=True) if has], [x for x in their_gradients if x is not None])


@pytest.mark.parametrize("oracle", ["recurrent_simple_gla", "recurrent_gla", "recurrent_linear_attn"])
@every_paradigm
def test_packed_documents_are_theirs_one_by_one(oracle, paradigm):
    borders = [0, 5, 6, 6, 40, T]
    *segment, _ = inputs(ORACLES[oracle][0], batch=1)
    states = torch.randn(5, H, K, V, generator=torch.Generator().manual_seed(2))
    output, final = ours(paradigm, cu_seqlens=torch.tensor(borders))(*segment, states)
    for n, (start, end) in enumerate(pairwise(borders)):
        document = (None if x is None else x[:, start:end] for x in segment)
        agree([output[:, start:end], final[n : n + 1]], list(theirs(oracle)(*document, states[n : n + 1])))


@every_paradigm
def test_a_decay_of_zero_resets_the_state_as_in_their_recurrence(paradigm):
    q, k, v, a, state = inputs("token")
    a[:, [0, 20, 21]] = -math.inf
    functions = ours(paradigm), theirs("recurrent_simple_gla")
    agree(*(with_gradients(function, (q, k, v, a, state)) for function in functions))
    # they subtract running sums, and inf - inf is nan
    for oracle in ("parallel_simple_gla", "chunk_simple_gla"):
        assert theirs(oracle)(q, k, v, a, state)[0].isnan().any()


@every_paradigm
@torch.no_grad()
def test_linear_attention_with_its_denominator_is_theirs(paradigm):
    config = LinearAttentionConfig(n_heads=H, eps=1e-10)  # their eps
    torch.manual_seed(0)
    layer = config.build(H * K, layer_idx=0, n_layers=1).double()
    x = torch.randn(B, T, H * K, dtype=torch.float64)
    q, k, v = (part.unflatten(-1, (H, K)) for part in layer.in_proj(x).chunk(3, dim=-1))
    q, k = F.elu(q) + 1, F.elu(k) + 1
    y, (memory,) = layer(x, paradigm=paradigm, return_state=True)

    chunked = naive("chunk_linear_attn")(q, k, v, normalize=True)
    agree(y, layer.out_proj(chunked.flatten(2)))

    # their state is S and z apart, and z has a dimension of tokens
    recurrent, state = naive("recurrent_linear_attn"), None
    for piece in (slice(0, 20), slice(20, T)):
        output, state = recurrent(q[:, piece], k[:, piece], v[:, piece], None, state, True, normalize=True)
        agree(y[:, piece], layer.out_proj(output.flatten(2)))
    agree(memory, torch.cat((state[0], state[1].permute(0, 2, 3, 1)), dim=-1))
