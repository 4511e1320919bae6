"""Softmax attention with FlexAttention and xformers: the masks passed to them, and the full kernels where they run.

The kernels of xformers need a GPU. Without one, dense attention with the masks of xformers replaces them, so that the
code around them is still tested.
"""

import sys
from copy import deepcopy
from dataclasses import replace
from functools import partial
from importlib import import_module
from itertools import accumulate
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recorded_operations import Watched
from torch.testing import assert_close

from seqmix.ops.attention import softmax_attention
from seqmix.ops.attention.inputs import visible_keys
from seqmix.ops.attention.kv_cache import GrowingCache, RingCache, join_key_values
from seqmix.ops.kernels import flex as softmax_flex
from seqmix.ops.kernels import xformers as softmax_xformers
from seqmix.ops.kernels.flex import BLOCK
from seqmix.ops.kernels.selection import choose
from seqmix.ops.runtime.kernel import Probe, find
from seqmix.ops.runtime.packing import Documents
from seqmix.ops.runtime.paradigm import Paradigm
from seqmix.registry import SeqmixError
from seqmix.testing import Status, check_kernel

needs_xformers = pytest.mark.skipif(
    softmax_xformers.missing() is not None, reason="needs pip install --no-deps 'xformers<0.0.36'"
)

by_flex, by_xformers = partial(softmax_attention, backend="flex"), partial(softmax_attention, backend="xformers")
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
PROBE = Probe(device=CUDA, dtype=torch.bfloat16, key_width=64, value_width=64)


def inputs(lengths, *, packed=False, reads=None, ring=False, capacity=0, width=16, grad=False, seed=0):
    """q, k, v (4 heads, 2 of keys) and the options of a call."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*sizes):
        return torch.randn(*sizes, generator=generator).requires_grad_(grad)

    rows, length = (1, sum(lengths)) if packed else (len(lengths), lengths[0])
    q, k, v = (randn(rows, length, heads, width) for heads in (4, 2, 2))
    cache = None
    if reads is not None:
        leaves = (randn(len(lengths), capacity, 2, width) for _ in range(2))
        cache = (RingCache if ring else GrowingCache)(*leaves, torch.tensor(reads))
    boundaries = torch.tensor([0, *accumulate(lengths)]) if packed else None
    return (q, k, v), {"initial_state": cache, "cu_seqlens": boundaries}


@st.composite
def segments(draw, sizes):
    """What `inputs` takes, and a window."""
    packed = draw(st.booleans())
    some = st.lists(st.just(0) | sizes, min_size=1, max_size=4).filter(sum)
    lengths = draw(some if packed else sizes.map(lambda n: [n] * 3))
    window = draw(st.none() | st.just(1) | st.integers(1, 2 * max(lengths)))
    found = {"lengths": lengths, "packed": packed}
    if draw(st.booleans()):
        reads = draw(st.lists(st.integers(0, 9) | sizes, min_size=len(lengths), max_size=len(lengths)))
        reads = draw(st.sampled_from([reads, [max(reads)] * len(reads)]))
        ring = draw(st.booleans())
        # a ring holds what its window needs, or everything
        capacity = max(reads) + draw(st.integers(0, 3))
        if ring and window is not None:
            capacity = window + draw(st.integers(0, 3))
        found |= {"reads": reads, "ring": ring, "capacity": max(1, capacity)}
    return found, window


def offered(segment, options):
    """The keys and values that the queries may see."""
    _, k, v = (x.detach() for x in segment)
    return join_key_values(k, v, options["initial_state"], Documents.of(options["cu_seqlens"], k.shape[1]))


def seen(offer, length, window):
    """The mask of the reference, a row of the batch each: [_ T M]."""
    return visible_keys(torch.arange(length), offer, window)[:, 0]


@given(segments(st.integers(1, 9) | st.integers(100, 300)))
@settings(max_examples=60, deadline=None)
def test_flex_block_mask_and_mask_function_match_the_dense_mask(drawn):
    options, window = drawn
    segment, given_ = inputs(**options, width=1)
    offer, length = offered(segment, given_), segment[0].shape[1]
    keys = offer.keys.shape[1]
    dense = seen(offer, length, window)
    mask = softmax_flex.make_mask_mod(offer, window)
    row, query, key = (torch.arange(n) for n in (dense.shape[0], length, keys))
    assert_close(mask(row[:, None, None], torch.tensor(0), query[:, None], key).expand_as(dense), dense)

    some, every = (x[:, 0] for x in softmax_flex.visible_blocks(length, offer, window))
    whole = torch.zeros(dense.shape[0], some.shape[1] * BLOCK, some.shape[2] * BLOCK, dtype=torch.bool)
    whole[:, :length, :keys] = dense
    by_block = whole.unflatten(2, (-1, BLOCK)).unflatten(1, (-1, BLOCK))
    assert not (by_block.any(4).any(2) & ~some).any()
    assert not (every & ~by_block.all(4).all(2)).any()
    assert not (every & ~some).any()


@pytest.mark.parametrize("window", [None, 1, 100, 128, 129, 300])
def test_block_mask_without_a_cache_matches_create_block_mask(window):
    from torch.nn.attention.flex_attention import create_block_mask

    (_, k, v), _ = inputs([700], width=1)
    offer = join_key_values(k, v, None, None)
    ours = softmax_flex.block_mask(700, offer, window)
    theirs = create_block_mask(softmax_flex.make_mask_mod(offer, window), 1, 1, 700, 700, "cpu", BLOCK_SIZE=BLOCK)
    assert_close(ours.to_dense(), theirs.to_dense())
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert_close(getattr(ours, name), getattr(theirs, name))


def test_block_mask_never_allocates_all_pairs():
    lengths = [1500, 0, 2596]
    offer = offered(*inputs(lengths, packed=True, reads=[9, 40, 0], capacity=40, width=1))
    with Watched() as watched:
        softmax_flex.block_mask(sum(lengths), offer, 100)
    assert watched.largest <= 2 * sum(lengths)


CALLS = {
    "alone": ({"lengths": [150, 150]}, None),
    "window": ({"lengths": [150, 150]}, 20),
    "packed": ({"lengths": [70, 0, 150], "packed": True}, 30),
    "grown": ({"lengths": [40, 40], "reads": [130, 7], "capacity": 130}, None),
    "ring": ({"lengths": [40, 40], "reads": [200, 7], "capacity": 30, "ring": True}, 30),
    "grown documents": ({"lengths": [3, 0, 40], "packed": True, "reads": [5, 4, 130], "capacity": 130}, 50),
}
LOG_DECAY = -torch.rand(16, generator=torch.Generator().manual_seed(3)) / 200


@pytest.mark.slow
@pytest.mark.parametrize("call", ["alone", "ring", "grown documents"])
@torch.no_grad()
def test_flex_traces_into_one_graph(call):
    torch.compiler.reset()
    options, window = CALLS[call]
    arguments, options = inputs(**options)
    options |= {"window": window, "log_decay": LOG_DECAY, "output_final_state": True}
    compiled = torch.compile(by_flex, fullgraph=True, backend="aot_eager")
    # a ring is written in place
    results = [function(*arguments, **deepcopy(options)) for function in (compiled, softmax_attention)]
    assert_close(*results, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@torch.no_grad()
def test_compiled_flex_kernel_matches_softmax_attention():
    torch.compiler.reset()
    arguments, options = inputs([300], width=16)
    compiled = torch.compile(by_flex, fullgraph=True)
    # blocks that are passed over, seen in part, and not whole
    found, expected = (f(*arguments, **options, window=40)[0] for f in (compiled, softmax_attention))
    assert_close(found, expected, rtol=1e-5, atol=1e-5)


def reasons(kernel, named, **asked):
    """Whether what is asked of a kernel is refused, for one reason that names this."""
    (reason,) = kernel.unsupported(replace(PROBE, **asked))
    return named in reason


def test_flex_explains_unsupported_inputs():
    flex = find("softmax", Paradigm.PARALLEL, "flex")
    for taken in ({}, {"needs_grad": True, "window": True, "packed": True}, {"device": CPU, "key_width": 1}):
        assert flex.unsupported(replace(PROBE, **taken)) == []
    assert reasons(flex, "backward", device=CPU, needs_grad=True)
    assert reasons(flex, "float64", dtype=torch.float64)
    assert reasons(flex, "64 and 8", value_width=8)
    assert reasons(flex, "mps", device=torch.device("mps"))
    arguments, options = inputs([5], grad=True)
    with pytest.raises(SeqmixError, match=r"backward .* CPU"):
        by_flex(*arguments, **options)


def test_higher_order_op_skips_opcheck():
    flex = find("softmax", Paradigm.PARALLEL, "flex")
    (outcome,) = check_kernel(flex, checks=["dispatched_ops_pass_opcheck"]).outcomes
    assert outcome.status is Status.SKIPPED
    assert "higher-order" in outcome.reason


def test_only_keys_visible_to_a_query_are_gathered():
    found = softmax_xformers.plan(2, 1, [9, 2], None, capacity=9, window=4)
    assert found.keys == [4, 3]
    assert found.packed
    assert found.key_indices.tolist() == [6, 7, 8, 9, 17, 18, 19]
    ring = softmax_xformers.plan(1, 2, [9], None, capacity=4, is_ring=True, window=4)
    assert ring.key_indices.tolist() == [2, 3, 0, 4, 5]  # positions 6, 7, 8, and its own


def _dense(q, k, v, attn_bias, scale):
    """Attention [B M H .] or [B M G H .] by a mask of xformers', and what its kernels ask of strides."""
    for x in (q, k, v):
        assert x.stride(-1) == 1
        assert all(stride * x.element_size() % 16 == 0 for stride in x.stride()[:-1])
    groups = q.shape[2:-1]
    q, k, v = (x.flatten(2, -2).transpose(1, 2).float() for x in (q, k, v))
    assert q.shape[1] == k.shape[1] == v.shape[1]
    scores = scale * q @ k.mT + attn_bias.materialize((q.shape[2], k.shape[2]))
    return (scores.softmax(-1) @ v).transpose(1, 2).unflatten(2, groups)


def _attention(q, k, v, *, attn_bias, scale):
    grouped = q.ndim == 5
    assert not (grouped and any(x.requires_grad for x in (q, k, v))), "the backward kernels take no groups"
    assert q.shape[0] == k.shape[0]
    return _dense(q, k, v, attn_bias, scale).to(q.dtype)


def _forward(q, k, v, *, attn_bias, scale):
    assert q.ndim == 4
    return _attention(q, k, v, attn_bias=attn_bias, scale=scale), q.new_empty(3, 1)


def _backward(above, output, sums, q, k, v, *, attn_bias, scale):
    assert above.shape == output.shape == (*q.shape[:3], v.shape[3])
    assert sums.shape == (3, 1)
    # inside a custom op autograd is off, and has to be let in again
    guard = torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False)
    with guard, torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        return torch.autograd.grad(_dense(*leaves, attn_bias, scale).to(q.dtype), leaves, above)


def _reasons_here(probe):
    """The limits without the device, and without what the stand-in can do more."""
    real = softmax_xformers.limits(replace(probe, needs_grad=False))
    return [reason for reason in real if "CUDA device" not in reason]


@pytest.fixture
def standing_in(monkeypatch):
    """The kernel, with dense attention for xformers' own."""
    fmha = softmax_xformers.fmha()
    monkeypatch.setattr(fmha, "memory_efficient_attention", _attention)
    monkeypatch.setattr(fmha, "memory_efficient_attention_forward_requires_grad", _forward)
    monkeypatch.setattr(fmha, "memory_efficient_attention_backward", _backward)
    kernel = replace(softmax_xformers.KERNEL, limits=_reasons_here)
    monkeypatch.setattr(softmax_xformers, "KERNEL", kernel)
    return kernel


@needs_xformers
def test_xformers_wrapper_passes_kernel_checks_with_dense_attention(standing_in):
    checks = ["outputs_are_the_definitions", "gradients_are_the_definitions", "a_cut_changes_nothing"]
    checks += ["inputs_are_left_alone", "what_is_not_taken_is_refused", "tangents_are_right_or_refused"]
    checks += ["dispatched_ops_pass_opcheck"]
    report = check_kernel(standing_in, checks=checks, examples=60, shrink=False)
    assert [outcome.status for outcome in report.outcomes] == [Status.PASSED] * len(checks), report


@needs_xformers
@pytest.mark.parametrize("call", CALLS)
def test_xformers_compiles_into_one_graph_with_gradients(call, standing_in):
    torch.compiler.reset()
    options, window = CALLS[call]
    arguments, options = inputs(**options, grad=True)
    options |= {"window": window, "log_decay": LOG_DECAY.clone().requires_grad_()}
    cache = options["initial_state"]
    leaves = [*arguments, options["log_decay"], *(() if cache is None else cache[:2])]
    results = []
    for function in (torch.compile(by_xformers, fullgraph=True, backend="aot_eager"), softmax_attention):
        output, _ = function(*arguments, **options)
        above = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
        results.append((output.detach(), *torch.autograd.grad(output, leaves, above)))
    for found, expected in zip(*results, strict=True):
        # the gradient of a decay adds up distances of hundreds of tokens, most of which cancel
        assert_close(found, expected, rtol=0, atol=3e-5 * expected.abs().max().clamp(min=1).item())


def test_tensors_xformers_cannot_load_are_copied():
    readable = softmax_xformers._aligned
    x = torch.zeros(2, 3, 4, 8)
    for given_ in (x, x[:, 1:], x[:, :, :1].expand(-1, -1, 4, -1)):
        assert readable(given_) is given_
    odd = torch.zeros(2, 3, 4, 9)
    for given_ in (x.mT, odd[..., :8], torch.zeros(193)[1:].view(2, 3, 4, 8)):
        assert readable(given_).is_contiguous()
        assert readable(given_) is not given_


def test_xformers_explains_unsupported_inputs(monkeypatch):
    xformers, low = find("softmax", Paradigm.PARALLEL, "xformers"), {"window": True, "needs_grad": True}
    monkeypatch.setattr(softmax_xformers, "fmha", lambda: None)
    single = {"dtype": torch.float32, "key_width": 20}
    everything = {**low, "packed": True, "initial_state": True, "final_state": True}
    for taken in (everything, single, {**single, "needs_grad": True}, {"value_width": 128, "window": True}):
        assert xformers.unsupported(replace(PROBE, **taken)) == []
    assert reasons(xformers, "cpu", device=CPU)
    assert reasons(xformers, "float64", dtype=torch.float64)
    assert reasons(xformers, "multiples of 8, got 20 and 64", key_width=20)
    for other in (single, {"value_width": 128}):
        assert reasons(xformers, "window", **other, **low)
    arguments, options = inputs([5])
    with pytest.raises(SeqmixError, match=r"CUDA .* cpu"):
        by_xformers(*arguments, **options)


ATTENTION = "def memory_efficient_attention(): ..."


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Put packages, by name and code, in the place of xformers and mslk."""

    def write(**code_by_name):
        for name, code in code_by_name.items():
            folder = tmp_path
            for part in name.split("."):
                folder = folder / part
                folder.mkdir()
                (folder / "__init__.py").touch()
            (folder / "__init__.py").write_text(code)

    monkeypatch.syspath_prepend(tmp_path)
    softmax_xformers.fmha.cache_clear()
    choose.cache_clear()
    with mock.patch.dict(sys.modules):
        for name in [name for name in sys.modules if name.startswith(("xformers", "mslk"))]:
            del sys.modules[name]
        yield write
    softmax_xformers.fmha.cache_clear()
    choose.cache_clear()


@pytest.mark.parametrize(
    ("mslk", "xformers", "imported"),
    [
        (ATTENTION, "", "mslk.attention.fmha"),
        (ATTENTION, ATTENTION, "mslk.attention.fmha"),
        ("", ATTENTION, "xformers.ops.fmha"),
        ("raise OSError('libc10_cuda.so: cannot open')", ATTENTION, "xformers.ops.fmha"),
    ],
)
def test_attention_is_imported_from_whichever_package_has_it(packages, mslk, xformers, imported):
    packages(**{"mslk.attention.fmha": mslk, "xformers.ops.fmha": xformers})
    assert softmax_xformers.fmha().__name__ == imported
    assert choose("softmax", "xformers", PROBE)[Paradigm.PARALLEL] == "xformers"


def test_xformers_without_attention_raises_with_a_remedy(packages):
    packages(**{"mslk": "", "xformers.ops.fmha": "# imports from mslk, and passes over an error"})
    with pytest.raises(SeqmixError) as refused:
        choose("softmax", "xformers", PROBE)
    expected = ["mslk.attention", "xformers.ops.fmha is empty", "xformers<0.0.36", "mslk-cuda", "use backend=sdpa"]
    assert all(words in str(refused.value) for words in expected)
    assert "\n" not in str(refused.value)


def test_search_for_attention_is_constant_in_compiled_code(packages, counter):
    packages(**{"mslk": "", "xformers.ops.fmha": ""})
    compiled = torch.compile(lambda x: x + len(softmax_xformers.limits(PROBE)), fullgraph=True, backend=counter)
    assert compiled(torch.zeros(1)) == 1


@needs_xformers
def test_limits_match_those_of_xformers_kernels():
    fmha = softmax_xformers.fmha()
    attn_bias, cutlass, flash = (import_module(f"{fmha.__name__}.{name}") for name in ("attn_bias", "cutlass", "flash"))
    bottom, blocks = "FromBottomRight", "BlockDiagonalCausal"
    local = (f"LowerTriangular{bottom}LocalAttentionMask", f"{blocks}LocalAttention{bottom}Mask")
    plain = ("LowerTriangularMask", f"LowerTriangular{bottom}Mask", f"{blocks}Mask", f"{blocks}{bottom}Mask")
    local, plain = ([getattr(attn_bias, name) for name in names] for names in (local, plain))
    for mask in (*plain, *local, attn_bias.BlockDiagonalCausalLocalAttentionMask):
        assert all(mask in op.SUPPORTED_ATTN_BIAS_TYPES for op in (flash.FwOp, flash.BwOp, cutlass.FwOp))
    # the second family has no backward under a window that reaches back before the segment
    assert all(mask in cutlass.BwOp.SUPPORTED_ATTN_BIAS_TYPES for mask in plain)
    assert not any(mask in cutlass.BwOp.SUPPORTED_ATTN_BIAS_TYPES for mask in local)
    assert flash.FwOp.SUPPORTED_MAX_K == softmax_xformers.FLASH_WIDTH
    assert flash.FwOp.CUDA_MINIMUM_COMPUTE_CAPABILITY == (8, 0)
    assert cutlass.FwOp.CUDA_MAXIMUM_COMPUTE_CAPABILITY == (9, 0)
    assert not flash.FwOp.SUPPORTS_DIFFERENT_VALUE_EMBED
    assert flash.FwOp.SUPPORTS_BMGHK
    assert cutlass.FwOp.SUPPORTS_BMGHK
    assert not flash.BwOp.SUPPORTS_BMGHK
    assert not cutlass.BwOp.SUPPORTS_BMGHK
