"""Triton kernels of the decay and delta families, on a GPU if there is one and otherwise in Triton's interpreter.

The interpreter must be selected before triton is first imported, so `test_triton_tests_pass_in_the_interpreter` runs
these tests in a separate process. It runs about a hundred programs per second, so sizes are small and examples few.
"""

import itertools
import math
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from recurrence_calls import CPU, INPUTS, case_of, differentiate
from torch._inductor.utils import run_and_get_code

from seqmix import build_model
from seqmix.mixers.delta_net import DeltaNetConfig
from seqmix.mixers.gated_delta_net import GatedDeltaNetConfig
from seqmix.mixers.kda import KDAConfig
from seqmix.models import Decoder, ModelConfig, prefill
from seqmix.ops.decay import decay
from seqmix.ops.kernels.triton.decay import launch as triton_launch
from seqmix.ops.kernels.triton.decay import op as decay_triton
from seqmix.ops.kernels.triton.decay.launch import INTERPRETED, choose_configuration, configurations
from seqmix.ops.kernels.triton.decay.op import KERNEL, STEP_KERNEL, TF32X3_KERNEL, decay_step_triton
from seqmix.ops.kernels.triton.delta import op as delta_triton
from seqmix.ops.kernels.triton.launch import addressable, chunk_table
from seqmix.ops.recurrence.family import Recurrence
from seqmix.ops.recurrence.groups import capacity
from seqmix.ops.runtime.kernel import Probe, find
from seqmix.ops.runtime.paradigm import Paradigm
from seqmix.registry import SeqmixError
from seqmix.testing import DecayCase, parametrize_kernels
from seqmix.testing.kernel.families import DeltaCase

PROCESS = "SEQMIX_TEST_PROCESS"
NATIVE = torch.cuda.is_available()
INTERPRETS = os.environ.get(PROCESS) == "interpreter"
DEVICE = "cuda" if NATIVE else "cpu"

decay_recurrent = partial(decay, paradigm="recurrent")
decay_chunkwise_triton = partial(decay, paradigm="chunkwise", backend="triton")
decay_recurrent_triton = partial(decay, paradigm="recurrent", backend="triton")


def call_of(q, k, v, log_decay, state, scale=None):
    """The call of a step."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return Recurrence(q, k, v, log_decay, None, state, None, None, scale, chunk_size=128, output_final_state=True)


runs = pytest.mark.skipif(
    not (NATIVE or INTERPRETS), reason="in the interpreter's process: test_triton_tests_pass_in_the_interpreter"
)
on_a_gpu = pytest.mark.skipif(not NATIVE, reason="needs a GPU")


@pytest.mark.slow
@pytest.mark.skipif(NATIVE or INTERPRETS, reason="here the tests run themselves")
def test_triton_tests_pass_in_the_interpreter(request):
    pytest.importorskip("triton")
    profile = request.config.getoption("--hypothesis-profile")
    options = ["-q", "-p", "no:cacheprovider", *(["--hypothesis-profile", profile] if profile else [])]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, __file__],
        env=os.environ | {"TRITON_INTERPRET": "1", PROCESS: "interpreter"},
        cwd=request.config.rootpath,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@runs
@pytest.mark.conformance
@parametrize_kernels([KERNEL, STEP_KERNEL, delta_triton.KERNEL, *([TF32X3_KERNEL] if NATIVE else [])])
def test_triton_kernel_passes_the_check(check):
    check(device=DEVICE, examples=settings().max_examples // (1 if NATIVE else 50))


CASES = {
    "a chunk and a token": {"lengths": [17], "n_heads": 2, "chunk_size": 16},
    "several tiles": {"lengths": [18], "key_width": 32, "value_width": 48, "chunk_size": 16},
    "more keys than values": {"lengths": [33], "key_width": 80, "chunk_size": 32},
    "documents": {"lengths": [0, 17, 1, 0, 20, 0], "packed": True, "chunk_size": 16},
    "documents of one token": {"lengths": [1, 1, 1], "packed": True, "n_heads": 2},
}


DECAYS = [None, "H", "fixed", "B T H"]
"""By their dimensions; "fixed" is [H] without a gradient, as retention's are: its backward pass is another kernel's."""
KEYS = "B T H K"


@runs
@pytest.mark.parametrize(
    ("case", "decay"), [*itertools.product(CASES, DECAYS), *((case, KEYS) for case in ("several tiles", "documents"))]
)
def test_output_state_and_gradients_match_the_recurrence(case, decay):
    compare(decay, **CASES[case])


@runs
@pytest.mark.parametrize(
    ("kind", "decay", "before", "after"),
    [
        *((kind, decay, False, False) for kind in (DecayCase, DeltaCase) for decay in ("B T H", KEYS)),
        (DecayCase, "B T H", True, False),
        (DecayCase, "B T H", False, True),
    ],
)
def test_packed_documents_match_the_recurrence_with_optional_states(kind, decay, before, after):
    fields = {"kind": kind, "initial_state": before, "final_state": after}
    fields |= {"rate": 2.0} if kind is DeltaCase else {}
    fields["grad"] = (*"qkv", *kind.extras, "log_decay", *(["state"] if before else []))
    compare(decay, [0, 17, 1, 0, 40], packed=True, chunk_size=16, **fields)


@runs
@pytest.mark.parametrize("decay", [None, "B T H", KEYS])
@pytest.mark.parametrize("length", [1, 37])
def test_wide_outputs_hold_sums_beyond_the_range_of_float16(decay, length):
    """Sums of float16 exceed its range; products and incoming gradients are rounded like the operands."""
    fields = {"key_width": 20, "value_width": 33, "chunk_size": 16, "dtype": torch.float16, "wide_output": True}
    compare(decay, [length], tolerance=1e-3, **fields)
    q, k, v = (torch.full((1, length, 1, 16), x, dtype=torch.float16, device=DEVICE) for x in (200.0, 2.0, 100.0))
    for function in (decay_chunkwise_triton, decay_recurrent_triton):
        output = function(q, k, v, scale=1.0, wide_output=True).output
        assert output.dtype == torch.float32
        torch.testing.assert_close(output, decay_recurrent(q.float(), k.float(), v.float(), scale=1.0).output)


@runs
@pytest.mark.parametrize("decay", [*DECAYS, KEYS])
@pytest.mark.parametrize("n_heads", [1, 2])
def test_heads_of_a_group_share_queries_and_keys(decay, n_heads):
    compare(decay, [18, 18], n_heads=n_heads, shared=3, chunk_size=16)
    compare(decay, [5, 0, 17], n_heads=n_heads, shared=2, chunk_size=16, packed=True)


@runs
def test_partial_last_tile_of_per_key_decays_matches_the_recurrence():
    compare(KEYS, [18], key_width=48, chunk_size=16)


@runs
@pytest.mark.parametrize(
    ("case", "decay"),
    [
        *zip(CASES, ["H", None, "fixed", "B T H", "B T H"], strict=True),
        *((case, KEYS) for case in ("several tiles", "documents")),
    ],
)
def test_delta_output_state_and_gradients_match_the_recurrence(case, decay):
    sizes = CASES[case] | {"key_width": min(CASES[case].get("key_width", 16), 48)}
    compare(decay, kind=DeltaCase, rate=2.0, **sizes)


@runs
def test_identical_keys_match_the_recurrence():
    """Every transition is a reflection, so powers of the system would overflow float32."""
    compare(None, [64], kind=DeltaCase, rate=0.0, tolerance=2e-5, beta=2.0)


@runs
def test_key_products_are_not_rounded_before_the_solve():
    """Rounding to float16 would give an error of 5.6e-3, because rounding errors of a system add up."""
    options = {"rate": 0.0, "strength": 0.01, "dtype": torch.float16, "tolerance": 3.8e-3}
    compare(KEYS, [64], kind=DeltaCase, beta=1.9, spread=0.5, **options)


@on_a_gpu
@pytest.mark.parametrize("widths", [(64, 64), (64, 128), (100, 100), (128, 128), (192, 384), (256, 512)])
@pytest.mark.parametrize("decay", [*DECAYS, KEYS])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 6e-3), (torch.float16, 1e-3)])
@pytest.mark.parametrize("chunk_size", [64, 128])
@pytest.mark.parametrize("kind", [DecayCase, DeltaCase])
def test_gpu_head_widths_match_the_recurrence(widths, decay, dtype, tolerance, chunk_size, kind):
    if kind is DeltaCase and widths[0] > (64 if dtype == torch.float32 else 128 if decay == KEYS else 256):
        pytest.skip("refused")
    sizes = {"kind": kind} | {
        "key_width": widths[0],
        "value_width": widths[1],
        "dtype": dtype,
        "chunk_size": chunk_size,
    }
    for length in (1, 127, 128, 129, 300):
        compare(decay, [length, length], n_heads=2, tolerance=tolerance, **sizes)
    compare(decay, [130, 0, 1, 200], packed=True, tolerance=tolerance, **sizes)


@on_a_gpu
@pytest.mark.parametrize("widths", [(64, 64), (100, 100), (256, 512)])
@pytest.mark.parametrize("decay", DECAYS)
def test_tf32x3_products_match_the_recurrence_on_a_gpu(widths, decay):
    sizes = {"key_width": widths[0], "value_width": widths[1], "tolerance": 2e-6, "backend": "triton_tf32x3"}
    compare(decay, [300, 300], n_heads=2, **sizes)
    compare(decay, [130, 0, 1, 200], packed=True, **sizes)


nightly = pytest.mark.skipif(settings().max_examples < 1000, reason="takes a minute: --hypothesis-profile nightly")


@runs
@pytest.mark.skipif(NATIVE, reason="on a GPU these are in use")
@pytest.mark.parametrize(
    ("widths", "lengths"),
    [
        ((64, 64), [129]),
        pytest.param((128, 128), [129], marks=nightly),
        pytest.param((64, 128), [260], marks=nightly),
        pytest.param((72, 130), [65], marks=nightly),
        pytest.param((128, 64), [0, 129, 0, 0, 40, 0], marks=nightly),
        pytest.param((256, 512), [65], marks=nightly),
    ],
)
@pytest.mark.parametrize(
    ("bits", "decay"),
    [
        *itertools.product([16, 32], DECAYS),
        (16, KEYS),
        pytest.param(32, KEYS, marks=nightly),
        ("tf32x3", "H"),
        *(pytest.param("tf32x3", decay, marks=nightly) for decay in ("fixed", "B T H")),
    ],
)
def test_gpu_tiles_match_the_recurrence_in_the_interpreter(widths, lengths, decay, bits, monkeypatch):
    # a few large tiles take the interpreter less time than many small ones
    table = configurations(32, *widths, tf32x3=True) if bits == "tf32x3" else configurations(bits, *widths)
    monkeypatch.setattr(triton_launch, "INTERPRETED", table)
    sizes = {"key_width": widths[0], "value_width": widths[1], "chunk_size": 128}
    compare(decay, lengths, packed=len(lengths) > 1, **sizes)


@runs
@pytest.mark.skipif(NATIVE, reason="on a GPU these are in use")
@pytest.mark.parametrize(
    ("bits", "decay"),
    [(16, KEYS), *(pytest.param(*x, marks=nightly) for x in ((16, "B T H"), (32, "B T H"), (32, KEYS)))],
)
def test_delta_gpu_tiles_match_the_recurrence_in_the_interpreter(bits, decay, monkeypatch):
    monkeypatch.setattr(triton_launch, "INTERPRETED", configurations(bits, 64, 64))
    monkeypatch.setattr(delta_triton, "is_interpreted", lambda: False)
    compare(decay, [129], kind=DeltaCase, rate=2.0, key_width=64, value_width=64)


def compare(decay, lengths, *, tolerance=2e-6, beta=None, spread=0.0, backend="triton", **fields):
    """Against the recurrence in float64, by the norm of each tensor; with a beta given, of keys that are nearly one.

    The gradient of a decay fixed per head is one number, of which thousands of terms with both signs may leave almost
    nothing: its error is relative to the sum of their absolute values.
    """
    defaults = {"n_heads": 1, "key_width": 16, "value_width": 16, "dtype": torch.float32, "chunk_size": 128}
    names = [name for name in INPUTS if (name, decay) != ("log_decay", "fixed")]
    decay = "H" if decay == "fixed" else decay
    case = case_of(decay, lengths, layout="fused", **{**defaults, **fields})
    moved = "qv" if fields.get("kind") is DeltaCase else "qkv"
    inputs = {name: x - 1 if name in moved else x for name, x in case.inputs(CPU).items()}
    if beta is not None:
        keys = F.normalize(0.25 + spread * inputs["k"].float(), dim=-1)
        inputs |= {"beta": torch.full_like(inputs["beta"], beta), "k": keys.to(inputs["k"].dtype)}
    exact = differentiate(case, "recurrent", inputs, names=names, wide=True)
    sizes = {name: x.norm() for name, x in exact.items()}
    if "log_decay" in exact and decay == "H":
        terms = differentiate(case, "recurrent", inputs, wide=True, absolute=True)
        sizes["log_decay"] = terms["log_decay"].norm()
    found = differentiate(case, "chunkwise", inputs, names=names, device=DEVICE, backend=backend)
    for name, actual in found.items():
        error = (actual.cpu().double() - exact[name]).norm() / sizes[name]
        assert error < tolerance, f"{name} is off by {error:.1e}"


@runs
@pytest.mark.parametrize(
    ("strength", "dtype", "tolerance", "decay"),
    [
        (0.05, torch.float32, 1e-5, "B T H"),
        (20.0, torch.float32, 1e-5, "B T H"),
        (20.0, torch.float32, 1e-5, KEYS),
        (5.0, torch.float16, 2e-3, "B T H"),
        (5.0, torch.float16, 2e-3, KEYS),
    ],
)
def test_gradients_of_strong_decays_have_small_relative_error(strength, dtype, tolerance, decay):
    """The gradients are tiny, but an optimizer that divides by their size still depends on their accuracy."""
    # numbers above 0: what no sign takes away is there to be seen, token by token
    q, k, v, a, state = (x.abs() for x in tokens(decay, length=20, widths=(16, 20), heads=1))
    q, k, v, a = q.to(dtype), k.to(dtype), v.to(dtype), -strength * (0.9 + 0.2 * a)

    def gradient(function, *inputs, **options):
        rate = inputs[3].requires_grad_()
        output, final = function(*inputs[:4], initial_state=inputs[4], output_final_state=True, **options)
        return torch.autograd.grad(output.sum() + final.sum(), rate)[0].double()

    expected = gradient(decay_recurrent, *(x.double() for x in (q, k, v, a, state)))
    actual = gradient(decay_chunkwise_triton, q, k, v, a, state, chunk_size=16)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=0)


@runs
@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=on_a_gpu)])
def test_states_of_16_bit_inputs_accumulate_in_float32(dtype):
    # without a decay, and with a scale that is a power of two, nothing is rounded before it is added
    q, k, v = (1 + torch.randn(1, 8 * 16, 1, 16).to(DEVICE, dtype) for _ in range(3))
    initial = torch.randn(1, 1, 16, 16, device=DEVICE).requires_grad_()
    output, final = decay_chunkwise_triton(
        q, k, v, None, initial_state=initial, output_final_state=True, scale=0.25, chunk_size=16
    )
    (gradient,) = torch.autograd.grad((output * v).sum() + final.sum(), initial)
    exact = initial + torch.einsum("bthk,bthv->bhkv", k.double(), v.double())
    exact_gradient = 1 + torch.einsum("bthk,bthv->bhkv", 0.25 * q.double(), v.double())
    torch.testing.assert_close(final.double(), exact, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=1e-6, atol=1e-5)


@runs
@pytest.mark.parametrize("keys", [(), (16,)])
def test_resets_block_earlier_tokens_and_keep_gradients_finite(keys):
    q, k, v = (torch.randn(1, 40, 1, 16, device=DEVICE) for _ in range(3))
    a, resets = torch.full((1, 40, 1, *keys), -0.1, device=DEVICE), [0, 5, 16, 39]
    a[:, resets] = -math.inf
    changed = k.clone()
    changed[:, :16] = 1e6
    outputs = [decay_chunkwise_triton(q, x, v, a, chunk_size=16).output[:, 16:] for x in (k, changed)]
    assert torch.equal(*outputs)
    (gradient,) = torch.autograd.grad(decay_chunkwise_triton(q, k, v, a.requires_grad_()).output.sum(), a)
    assert gradient.isfinite().all()
    assert not gradient[:, resets].any()


@runs
@pytest.mark.parametrize("keys", [(), (16,)])
def test_nan_decay_propagates_to_later_outputs(keys):
    q, k, v = (torch.ones(1, 4, 1, 16, device=DEVICE) for _ in range(3))
    a = torch.full((1, 4, 1, *keys), -1.0, device=DEVICE)
    a[0, 2].view(-1)[-1] = math.nan
    output = decay_chunkwise_triton(q, k, v, a).output
    assert output[:, :2].isfinite().all()
    assert output[:, 2:].isnan().all()


@on_a_gpu
def test_tensors_with_more_elements_than_int32_give_correct_results():
    q, k = (torch.randn(1, 2**17, 4, 64, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    v = torch.randn(1, 2**17, 40, 512, device=DEVICE, dtype=torch.bfloat16)
    q, k = (x.repeat(1, 1, 10, 1) for x in (q, k))
    assert v.numel() > 2**31
    a, cut = torch.full((40,), -0.01, device=DEVICE), 2**17 - 1000
    whole = decay_chunkwise_triton(q, k, v, a).output[:, cut:].clone()
    _, state = decay_chunkwise_triton(q[:, :cut], k[:, :cut], v[:, :cut], a, output_final_state=True)
    rest = decay_chunkwise_triton(q[:, cut:], k[:, cut:], v[:, cut:], a, initial_state=state).output
    torch.testing.assert_close(whole, rest, rtol=3e-2, atol=3e-2)


DECAYS = [None, "H", "B T H", KEYS]
BACKENDS = ["reference", "triton"]


def tokens(decay, length=64, widths=(20, 40), heads=2, batch=2):
    """Inputs of a text, q, k and v as slices of one tensor."""
    sizes = [widths[0], widths[0], widths[1]]
    q, k, v = torch.randn(batch, length, heads, sum(sizes), device=DEVICE).split(sizes, -1)
    shapes = {"H": (heads,), "B T H": (batch, length, heads), "B T H K": (batch, length, heads, widths[0])}
    a = None if decay is None else -torch.rand(shapes[decay], device=DEVICE)
    return q, k, v, a, torch.randn(batch, heads, *widths, device=DEVICE)


@runs
@torch.no_grad()
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("initial", [True, False])
def test_recurrent_kernel_keeps_the_state_unless_donated(decay, initial):
    *inputs, state = tokens(decay, length=1)
    options = {"initial_state": state if initial else None, "output_final_state": True}
    expected, before = decay_recurrent(*inputs, **options), state.clone()
    for actual, exact in zip(decay_recurrent_triton(*inputs, **options), expected, strict=True):
        torch.testing.assert_close(actual, exact)
    options["donate_state"] = True
    torch.testing.assert_close(
        decay_recurrent_triton(*inputs, **options | {"output_final_state": False}).output, expected.output
    )
    assert torch.equal(state, before)
    output, final = decay_recurrent_triton(*inputs, **options)
    torch.testing.assert_close(output, expected.output)
    torch.testing.assert_close(final, expected.final_state)
    assert (final is state) == initial


@runs
def test_recurrent_kernel_leaves_gradients_and_longer_inputs_to_the_reference(monkeypatch):
    monkeypatch.setattr(decay_triton, "STEP_OP", None)
    for length, wanted in ((2, False), (1, True)):
        q, k, v, a, state = tokens("B T H", length=length)
        q = q.clone().requires_grad_(wanted)
        found = decay_recurrent_triton(q, k, v, a, initial_state=state, output_final_state=True, donate_state=True)
        expected = decay_recurrent(q, k, v, a, initial_state=state, output_final_state=True)
        torch.testing.assert_close(tuple(found), tuple(expected), rtol=0, atol=0)
    boundaries = torch.tensor([0, 1], device=DEVICE)
    q, k, v, a, state = tokens("H", length=1, batch=1)
    assert decay_recurrent_triton(q, k, v, a, initial_state=state, cu_seqlens=boundaries).output.isfinite().all()


@runs
@pytest.mark.parametrize("kind", [DeltaNetConfig, GatedDeltaNetConfig, KDAConfig])
def test_delta_layers_train_with_the_triton_kernel(kind):
    layers = [kind(n_heads=2, backend=name).build(32, layer_idx=0, n_layers=1).to(DEVICE) for name in BACKENDS]
    x, found = torch.randn(2, 20, 32, device=DEVICE), []
    for layer in layers:
        layer.resolve_backend(torch.float32)
        layer.load_state_dict(layers[0].state_dict())
        y, state = layer(x, return_state=True)
        loss = y.square().mean() + state.memory.square().mean()
        found.append([y, state.memory, *torch.autograd.grad(loss, list(layer.parameters()))])
    assert [layer.backends[Paradigm.CHUNKWISE] for layer in layers] == BACKENDS
    torch.testing.assert_close(*found)


@runs
@pytest.mark.parametrize("kind", ["retention", "linear_attention", "mamba2", "gla"])
def test_layers_decode_with_the_step_kernel(kind, monkeypatch):
    """Prefill, then decoding token by token with an in-place state, matches the references."""

    def model_of(backend):
        heads = {"head_dim": 32} if kind == "mamba2" else {"n_heads": 2}
        mixer, norm = {"kind": kind, "backend": backend, **heads}, {"kind": "rmsnorm"}
        blocks = {"a": {"mixer": mixer, "ffn": {"kind": "mlp", "expansion": 1.0}, "norm": norm}}
        settings = {"d_model": 32, "n_layers": 1, "vocab_size": 257, "blocks": blocks, "pattern": ["a"], "norm": norm}
        return build_model(ModelConfig.model_validate(settings), device=DEVICE).eval()

    models, launched, step_op = [model_of("triton"), model_of("reference")], [], decay_triton.STEP_OP
    assert models[0].backends == {"a": "triton"}
    counted = lambda x: launched.append(x.initial_state.data_ptr()) or step_op(x)  # noqa: E731
    monkeypatch.setattr(decay_triton, "STEP_OP", counted)
    prompt, steps = torch.arange(20, device=DEVICE), torch.arange(3, device=DEVICE)[:, None]
    decoders = [Decoder(model, prefill(model, [prompt])[1]) for model in models]
    for tokens in steps:
        torch.testing.assert_close(*(decoder.step(tokens) for decoder in decoders))
    assert len(launched) == 3
    assert len(set(launched)) == 1


@runs
@pytest.mark.parametrize(("function", "length"), [(decay_chunkwise_triton, 5), (decay_recurrent_triton, 1)])
def test_triton_kernel_compiles_into_one_graph(function, length):
    q, k, v, a, state = tokens("H", length=length)
    options = {"initial_state": state, "output_final_state": True}
    compiled = torch.compile(function, backend="eager", fullgraph=True)
    before = state.clone()
    with torch.no_grad():
        expected = tuple(decay_recurrent(q, k, v, a, **options))
        found = tuple(compiled(q, k, v, a, **options))
    torch.testing.assert_close(found, expected)
    assert torch.equal(state, before)


@runs
def test_step_passes_opcheck():
    q, k, v, a, state = tokens("H", length=1, widths=(16, 32))
    torch.library.opcheck(torch.ops.seqmix.decay_step_triton.default, call_of(q, k, v, a, state, 0.3))


@runs
def test_unsupported_step_inputs_raise():
    q, k, v, a, state = tokens("H", length=2)
    one = [x[:, :1] for x in (q, k, v)]
    for segment, before, named in (
        ((q, k, v), state, "one token.* 2"),
        (one, state.double(), "float32 and contiguous"),
        (one, state.mT.contiguous().mT, "float32 and contiguous"),
        ((one[0].clone().requires_grad_(), *one[1:]), state, "no_grad"),
        ([x.double() for x in one], state, "float64"),
    ):
        with pytest.raises(SeqmixError, match=named):
            decay_step_triton(call_of(*segment, a, before))


@runs
@nightly
@torch.no_grad()
def test_compiled_step_does_not_copy_a_donated_state():
    q, k, v, a = (x.to(DEVICE) for x in (*torch.randn(2, 2, 1, 2, 16), torch.randn(2, 1, 2, 16), -torch.rand(2)))
    given, copied = torch.randn(2, 2, 2, 16, 16, device=DEVICE)
    options = {"initial_state": given, "output_final_state": True}
    expected = decay_recurrent_triton(q, k, v, a, **options)

    def decoded(state, donate_state):
        return decay_recurrent_triton(q, k, v, a, **options | {"initial_state": state}, donate_state=donate_state)

    compiled = torch.compile(decoded, fullgraph=True)
    found, (code,) = run_and_get_code(compiled, given, True)
    torch.testing.assert_close(tuple(found), tuple(expected))
    assert found.final_state.data_ptr() == given.data_ptr()
    assert "clone" not in code[code.index("def call(") :]
    torch._dynamo.reset()
    _, (code,) = run_and_get_code(compiled, copied, False)
    assert "clone" in code[code.index("def call(") :]


@on_a_gpu
def test_step_can_be_captured_in_a_cuda_graph():
    q, k, v, a, state = tokens("H")
    eager, static = state.clone(), [x[:, :1].clone() for x in (q, k, v)]
    decay_step_triton(call_of(*static, a, state.clone()))  # compiled before the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = decay_step_triton(call_of(*static, a, state))
    where = state.data_ptr()
    for t in range(64):
        for buffer, x in zip(static, (q, k, v), strict=True):
            buffer.copy_(x[:, t : t + 1])
        graph.replay()
        expected = decay_step_triton(call_of(*(x[:, t : t + 1] for x in (q, k, v)), a, eager))
        assert torch.equal(output, expected)
    assert torch.equal(state, eager)
    assert state.data_ptr() == where


PROBE = Probe(device=torch.device("cuda"), dtype=torch.float32, key_width=16, value_width=16)


@pytest.fixture
def native(monkeypatch):
    """As if triton were there, and compiled."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("seqmix.ops.kernels.triton.launch.is_installed", lambda library: True)
    return monkeypatch


@pytest.mark.skipif(INTERPRETS, reason="takes a process of its own: once is enough")
def test_kernel_is_found_without_importing_triton():
    program = """
import sys
sys.modules["triton"] = None  # as if it were not there
import torch
from seqmix.ops.runtime.kernel import Probe, find
probe = Probe(device=torch.device("cuda"), dtype=torch.float32, key_width=1, value_width=1)
print(*find("decay", "chunkwise", "triton").unsupported(probe))
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert "pip install triton" in done.stdout
    assert find("decay", Paradigm.CHUNKWISE, "triton") is KERNEL


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"device": torch.device("cpu")}, "TRITON_INTERPRET=1"),
        ({"dtype": torch.float64}, "float64"),
        ({"key_width": 257}, "257 and 16"),
        ({"value_width": 513}, "16 and 513"),
    ],
)
def test_unsupported_inputs_are_reported_with_reasons(native, asked, named):
    for dtype, log_decay in itertools.product((torch.bfloat16, torch.float16, torch.float32), DECAYS):
        widest = {"key_width": 256, "value_width": 512, "needs_grad": True}
        assert not KERNEL.unsupported(replace(PROBE, dtype=dtype, log_decay=log_decay, **widest))
    (reason,) = KERNEL.unsupported(replace(PROBE, **asked))
    assert named in reason
    delta, wide = delta_triton.KERNEL, {"key_width": 256, "value_width": 512, "log_decay": "B T H"}
    assert not delta.unsupported(replace(PROBE, dtype=torch.bfloat16, **wide))
    assert "float32 keys must be at most 64 wide, got 256" in delta.unsupported(replace(PROBE, **wide))[0]
    assert delta.unsupported(replace(PROBE, **asked))
    by_key = replace(PROBE, dtype=torch.bfloat16, key_width=128, value_width=512, log_decay=KEYS)
    assert not delta.unsupported(by_key)
    assert "per dimension must be at most 128 wide, got 129" in delta.unsupported(replace(by_key, key_width=129))[0]
    assert not TF32X3_KERNEL.unsupported(PROBE)
    assert "take more registers" in TF32X3_KERNEL.unsupported(replace(PROBE, log_decay=KEYS))[0]
    assert "supports float32, got bfloat16" in TF32X3_KERNEL.unsupported(replace(PROBE, dtype=torch.bfloat16))[0]
    native.setenv("TRITON_INTERPRET", "1")
    assert not KERNEL.unsupported(replace(PROBE, device=torch.device("cpu")))
    assert "interpreter" in KERNEL.unsupported(replace(PROBE, dtype=torch.bfloat16))[0]


def test_chunk_size_selects_the_configuration():
    table = configurations(16, 256, 512)
    assert [choose_configuration(table, size).chunk for size in (1, 63, 64, 100, 128, 1000)] == [
        64,
        64,
        64,
        64,
        128,
        128,
    ]
    heads = (16, 64), (65, 16), (16, 65), (256, 512)
    tables = [configurations(bits, *widths) for bits in (16, 32) for widths in heads]
    for table in (INTERPRETED, *tables, *(configurations(32, *widths, tf32x3=True) for widths in heads)):
        chunks = [configuration.chunk for configuration in table]
        assert chunks == sorted(chunks, reverse=True)


@pytest.mark.parametrize(
    ("starts", "ends", "entering", "leaving"),
    [
        (True, True, [0, 1, 2, 3], [0, 1, 2, 3]),
        (False, False, [0, 1, 0, 0], [1, 0, 0, 0]),
        (True, False, [0, 1, 2, 3], [1, 0, 0, 0]),
        (False, True, [0, 1, 0, 0], [0, 1, 2, 3]),
    ],
)
def test_chunk_table_lists_chunks_and_their_states(starts, ends, entering, leaving):
    boundaries = torch.tensor([0, 0, 5, 5, 9, 10, 10], dtype=torch.int32)
    firsts, table = chunk_table(boundaries, 10, 4, starts=starts, ends=ends)
    assert firsts.tolist() == [0, 0, 2, 2, 3, 4, 4]
    assert [(start, m) for start, m, *_ in table.tolist() if m] == [(0, 4), (4, 1), (5, 4), (9, 1)]
    assert table[:4, 1].all()
    assert table.shape == (3 + 6, 4)
    assert table[:4, 2].tolist() == entering
    assert table[:4, 3].tolist() == leaving


@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.integers(1, 4))
def test_each_state_between_chunks_has_its_own_slot(lengths, chunk):
    length = sum(lengths)
    boundaries = torch.tensor([0, *lengths]).cumsum(0)
    firsts, table = chunk_table(boundaries, length, chunk, starts=False, ends=False)
    found, between = table[: firsts[-1]], [-(-length // chunk) - 1 for length in lengths if length]
    places = [place for place in found[:, 2].tolist() if place]
    assert places == list(range(1, 1 + sum(between)))
    # what enters a chunk is what left the one before it
    assert all(out == into for out, into in zip(found[:-1, 3].tolist(), found[1:, 2].tolist(), strict=True))
    assert not any((*found[:1, 2].tolist(), *found[-1:, 3].tolist()))
    assert len(places) < max(capacity(length, chunk, None), 1)


def test_tensors_are_copied_only_if_chunk_offsets_exceed_32_bits():
    far = torch.empty_strided((1, 4, 1, 16), (1, 2**28, 16, 1), device="meta")
    assert addressable(far, 4) is far
    farther = torch.empty_strided((1, 8, 1, 16), (1, 2**28, 16, 1), device="meta")
    assert addressable(farther, 4) is farther
    assert addressable(farther, 8).stride() == (128, 16, 16, 1)
    # a stride is that of nothing where there is one token, and a copy keeps it
    single = farther[:, :1]
    assert addressable(single, 8) is single
    assert addressable(torch.zeros(1, 2, 3, 4).mT, 8).stride(3) == 1
