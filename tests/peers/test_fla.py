"""The decay family against flash-linear-attention's plain references, and where those fall short."""

import ast
import math
import re
import sys
from dataclasses import replace
from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from fla_oracles import agree, loaded, needs_fla, path_of, with_gradients
from torch.testing import assert_close

from seqmix.mixers import Paradigm
from seqmix.mixers.linear_attention import LinearAttentionConfig
from seqmix.ops.decay import decay
from seqmix.ops.kernels import fla as decay_fla
from seqmix.ops.recurrence.family import Recurrence
from seqmix.ops.runtime.kernel import Probe, find
from seqmix.registry import SeqmixError

pytestmark = needs_fla

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
    """One of their functions."""
    return getattr(loaded(re.sub("^(parallel|chunk|recurrent)_", "", name)), f"naive_{name}")


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
    options |= {"paradigm": paradigm, "chunk_size": CHUNK}

    def function(q, k, v, a, state):
        state = state if has_state else None
        return decay(q, k, v, a, initial_state=state, output_final_state=has_state, **options)

    return function


@pytest.mark.parametrize("oracle", ORACLES)
@every_paradigm
def test_outputs_states_and_gradients_match_fla_references(oracle, paradigm):
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
def test_packed_documents_match_fla_reference_run_per_document(oracle, paradigm):
    boundaries = [0, 5, 6, 6, 40, T]
    *segment, _ = inputs(ORACLES[oracle][0], batch=1)
    states = torch.randn(5, H, K, V, generator=torch.Generator().manual_seed(2))
    output, final = ours(paradigm, cu_seqlens=torch.tensor(boundaries))(*segment, states)
    for n, (start, end) in enumerate(pairwise(boundaries)):
        document = (None if x is None else x[:, start:end] for x in segment)
        agree([output[:, start:end], final[n : n + 1]], list(theirs(oracle)(*document, states[n : n + 1])))


@every_paradigm
def test_zero_decay_resets_the_state_as_in_fla_recurrence(paradigm):
    q, k, v, a, state = inputs("token")
    a[:, [0, 20, 21]] = -math.inf
    functions = ours(paradigm), theirs("recurrent_simple_gla")
    agree(*(with_gradients(function, (q, k, v, a, state)) for function in functions))
    # they subtract running sums, and inf - inf is nan
    for oracle in ("parallel_simple_gla", "chunk_simple_gla"):
        assert theirs(oracle)(q, k, v, a, state)[0].isnan().any()


@every_paradigm
@torch.no_grad()
def test_linear_attention_with_denominator_matches_fla_references(paradigm):
    config = LinearAttentionConfig(n_heads=H, eps=1e-10)  # their eps
    torch.manual_seed(0)
    layer = config.build(H * K, layer_idx=0, n_layers=1).double()
    x = torch.randn(B, T, H * K, dtype=torch.float64)
    q, k, v = (part.unflatten(-1, (H, K)) for part in layer.in_proj(x).chunk(3, dim=-1))
    q, k = F.elu(q) + 1, F.elu(k) + 1
    y, (memory, *_) = layer(x, paradigm=paradigm, return_state=True)

    chunked = naive("chunk_linear_attn")(q, k, v, normalize=True)
    agree(y, layer.out_proj(chunked.flatten(2)))

    # their state is S and z apart, and z has a dimension of tokens
    recurrent, state = naive("recurrent_linear_attn"), None
    for piece in (slice(0, 20), slice(20, T)):
        output, state = recurrent(q[:, piece], k[:, piece], v[:, piece], None, state, True, normalize=True)
        agree(y[:, piece], layer.out_proj(output.flatten(2)))
    agree(memory, torch.cat((state[0], state[1].permute(0, 2, 3, 1)), dim=-1))


# their kernels as a backend: what they are called with; their plain references stand in for them
by_fla = partial(decay, backend="fla")


def signature(op, name):
    """The arguments that one of their functions names, read from its file: importing it needs triton."""
    (found,) = (
        x for x in ast.parse(path_of(op, "chunk").read_text()).body if isinstance(x, ast.FunctionDef) and x.name == name
    )
    return [argument.arg for argument in found.args.args]


def by_document(function, q, k, v, gates, *, scale, initial_state, output_final_state, cu_seqlens):
    """One of their references, which take neither packed documents nor a learned decay per head, on each document."""
    assert cu_seqlens is None or cu_seqlens.dtype == torch.int64
    assert initial_state is None or initial_state.dtype == torch.float32
    boundaries = [0, q.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    outputs, states = [], []
    for n, (start, stop) in enumerate(pairwise(boundaries)):
        tokens = (x[:, start:stop] for x in (q, k, v, gates))
        rows = slice(None) if cu_seqlens is None else slice(n, n + 1)
        state = None if initial_state is None else initial_state[rows]
        output, final = function(*tokens, scale, state)
        outputs.append(output)
        states.append(final)
    return torch.cat(outputs, dim=1), torch.cat(states) if output_final_state else None


def chunk_simple_gla(q, k, v, g=None, g_gamma=None, *, reference="recurrent", **options):
    """Their function of this name."""
    assert g is None or g_gamma is None
    assert {"g", "g_gamma", *options} <= set(signature("simple_gla", "chunk_simple_gla"))
    if g is None:  # it gives no gradient of decays that are fixed a head
        gates = q.new_zeros(q.shape[2]) if g_gamma is None else g_gamma.detach()
        g = gates.expand(*q.shape[:3])
    assert g.dtype == torch.float32 or g_gamma is None
    if reference == "chunk":
        function = naive("chunk_simple_gla")
        return by_document(lambda q, k, v, g, scale, s: function(q, k, v, g, s, True, 64, scale), q, k, v, g, **options)
    function = naive("recurrent_simple_gla")
    return by_document(lambda q, k, v, g, scale, s: function(q, k, v, g, scale, s, True), q, k, v, g, **options)


def chunk_gla(q, k, v, g, **options):
    """Their function of this name; its reference has a fixed scale."""
    assert set(options) <= set(signature("gla", "chunk_gla"))
    function = naive("recurrent_gla")
    return by_document(
        lambda q, k, v, g, scale, s: function(scale * K**0.5 * q, k, v, g, s, True), q, k, v, g, **options
    )


@pytest.fixture
def standing_in(monkeypatch):
    """Their modules, with the functions above; and the kernel without its limits."""
    for name, function in (("simple_gla", chunk_simple_gla), ("gla", chunk_gla)):
        monkeypatch.setitem(sys.modules, f"fla.ops.{name}", SimpleNamespace(**{function.__name__: function}))
    tolerances = dict.fromkeys((torch.float64, torch.float32), 1.0)
    monkeypatch.setattr(decay_fla, "KERNEL", replace(decay_fla.KERNEL, tolerances=tolerances, limits=lambda _: []))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("shape", ["none", "head", "token", "key"])
def test_backend_calls_fla_with_our_conventions(shape, packed, standing_in):
    *segment, state = inputs(shape, batch=1 if packed else B)
    options = {"scale": 0.3, "output_final_state": True}
    if packed:  # int32, and an empty document
        options["cu_seqlens"] = torch.tensor([0, 5, 6, 6, 40, T], dtype=torch.int32)
        state = torch.randn(5, H, K, V, generator=torch.Generator().manual_seed(2))
    results = [
        with_gradients(lambda q, k, v, a, s, f=f: f(q, k, v, a, initial_state=s, **options), (*segment, state))
        for f in (by_fla, decay)
    ]
    (found, gradients), (expected, exact) = results
    agree(found, expected)
    agree(gradients, exact)
    with torch.no_grad():
        output, none = by_fla(*segment, cu_seqlens=options.get("cu_seqlens"))
    assert none is None
    agree(output, decay(*segment, cu_seqlens=options.get("cu_seqlens")).output)


@torch.no_grad()
def test_backend_handles_resets_that_fla_chunk_kernels_get_wrong(standing_in, monkeypatch):
    def chunked(*args, **options):
        return chunk_simple_gla(*args, **options, reference="chunk")

    monkeypatch.setitem(sys.modules, "fla.ops.simple_gla", SimpleNamespace(chunk_simple_gla=chunked))
    q, k, v, a, state = inputs("token")
    a[:, [0, 20, 21]] = -math.inf
    options = {"initial_state": state, "output_final_state": True}
    found, expected = (f(q, k, v, a, **options) for f in (by_fla, decay))
    assert_close(list(found), list(expected), rtol=1e-3, atol=1e-3, check_dtype=False)


def test_fla_receives_a_new_copy_of_the_boundaries_on_each_call(standing_in, monkeypatch):
    seen = []

    def function(*args, cu_seqlens, **options):
        seen.append(cu_seqlens)
        return chunk_simple_gla(*args, cu_seqlens=cu_seqlens, **options)

    monkeypatch.setitem(sys.modules, "fla.ops.simple_gla", SimpleNamespace(chunk_simple_gla=function))
    *segment, _ = inputs("token", batch=1)
    boundaries = torch.tensor([0, 5, T])
    for _ in range(2):  # they cache tables by the identity of the tensor
        by_fla(*segment, cu_seqlens=boundaries)
    assert seen[0] is not seen[1]
    assert boundaries is not seen[0]


class Theirs(torch.autograd.Function):
    """Their reference as one autograd function, which theirs is: inside a custom op nothing else is recorded."""

    @staticmethod
    def forward(ctx, q, k, v, g, state, options):
        ctx.save_for_backward(q, k, v, g, state)
        ctx.options = options
        with torch.no_grad():
            return chunk_simple_gla(q, k, v, g, initial_state=state, **options)

    @staticmethod
    def backward(ctx, *above):
        guard = torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False)
        with guard, torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in ctx.saved_tensors]
            outputs = chunk_simple_gla(*leaves[:4], initial_state=leaves[4], **ctx.options)
            given = [(x, d) for x, d in zip(outputs, above, strict=True) if x is not None]
            return *torch.autograd.grad([x for x, _ in given], leaves, [d for _, d in given]), None


def test_backend_compiles_to_one_graph_with_gradients(standing_in, monkeypatch):
    def function(q, k, v, g, *, initial_state, **options):
        return Theirs.apply(q, k, v, g, initial_state, options)

    monkeypatch.setitem(sys.modules, "fla.ops.simple_gla", SimpleNamespace(chunk_simple_gla=function))
    *segment, _ = (x if x is None else x.float() for x in inputs("token", batch=1))
    state = torch.randn(3, H, K, V, generator=torch.Generator().manual_seed(2))
    boundaries = torch.tensor([0, 5, 5, T])
    compiled = torch.compile(by_fla, fullgraph=True, backend="aot_eager")

    def run(function):
        def call(q, k, v, a, s):
            return function(q, k, v, a, initial_state=s, output_final_state=True, cu_seqlens=boundaries)

        return with_gradients(call, (*segment, state))

    (found, gradients), (expected, exact) = run(compiled), run(decay)
    agree(found, expected)
    agree(gradients, exact)
    leaves = [x.clone().requires_grad_() for x in (*segment, state)]
    names = ("q", "k", "v", "log_decay", "initial_state")
    call = Recurrence(
        **dict(zip(names, leaves, strict=True)),
        beta=None,
        cu_seqlens=boundaries,
        boundaries=None,
        scale=0.3,
        chunk_size=CHUNK,
        output_final_state=True,
    )
    results = torch.library.opcheck(torch.ops.seqmix.decay_chunkwise_fla.default, call)
    assert set(results.values()) == {"SUCCESS"}


def test_backend_reports_what_it_does_not_support(monkeypatch):
    fla = find("decay", Paradigm.CHUNKWISE, "fla")
    probe = Probe(device=torch.device("cuda"), dtype=torch.bfloat16, key_width=256, value_width=512, log_decay="H")

    def refused(named, **asked):
        (reason,) = fla.unsupported(replace(probe, **asked))
        return named in reason

    assert fla.unsupported(probe) == []
    assert refused("cpu", device=torch.device("cpu"))
    assert refused("float32", dtype=torch.float32)
    assert refused("256 and 5", value_width=5)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (10, 0))
    for accepted in ({}, {"needs_grad": True, "key_width": 128, "value_width": 128}, {"log_decay": "B T H K"}):
        assert fla.unsupported(replace(probe, **accepted)) == []
    assert fla.unsupported(replace(probe, needs_grad=True, log_decay="B T H K")) == []
    assert refused("10.0", needs_grad=True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert fla.unsupported(replace(probe, needs_grad=True)) == []
    versions = {"3.3.1": False, "3.4.0": True, "3.6.0+git1": True, "3.7.1": False, "3.9.0": False}
    for installed, wrong in versions.items():
        monkeypatch.setattr(decay_fla, "version", lambda _, installed=installed: installed)
        decay_fla._is_miscompiled.cache_clear()
        reasons = fla.unsupported(replace(probe, needs_grad=True, log_decay="B T H"))
        assert bool(reasons) == wrong, (installed, reasons)
        reasons = fla.unsupported(replace(probe, needs_grad=True, key_width=64))
        assert ["may be wrong" in reason for reason in reasons] == [True] * wrong
    decay_fla._is_miscompiled.cache_clear()
    monkeypatch.setattr(decay_fla, "is_installed", lambda name: name != "fla")
    assert refused("pip install")
    monkeypatch.undo()
    *segment, _ = inputs("token")
    with pytest.raises(SeqmixError, match=r"CUDA .* cpu"):
        by_fla(*segment)
