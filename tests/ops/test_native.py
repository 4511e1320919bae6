"""Native CPU kernels: which are chosen, and that results depend neither on thread count nor on other rows.

test_kernels.py tests their results, with those of all kernels; test_native_libraries.py tests their libraries.
"""

import itertools
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from seqmix import build_model, load_config
from seqmix.mixers.parts import ShortConvolution
from seqmix.ops.cell import m2rnn, slstm
from seqmix.ops.convolution import short_convolution
from seqmix.ops.kernels.native import build
from seqmix.ops.runtime.kernel import chosen, find, reference
from seqmix.ops.runtime.paradigm import Paradigm
from seqmix.ops.scan import diagonal_scan, log_scan, scan, selective_scan

C, K, W, H = 70, 3, 4, 2

needs_compiler = pytest.mark.skipif(build.failure("scan") is not None, reason="there is no C++ compiler")


@needs_compiler
def test_unusual_scalars_sizes_and_memory_match_the_reference():
    program = Path(__file__).parents[1] / "helpers" / "native_calls.py"
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, check=False)
    *_, last = done.stdout.splitlines() or [""]
    assert done.returncode == 0, f"{last}: {done.stderr}"


@needs_compiler
def test_loading_a_library_leaves_the_floating_point_environment_alone():
    build.library("scan")
    tiny = torch.tensor(1e-40)
    assert (tiny * 1).item() != 0  # not flushed


@needs_compiler
def test_unsupported_dtype_or_device_falls_back_to_the_reference():
    find("scan", Paradigm.CHUNKWISE, "native")
    use = partial(chosen, "scan", Paradigm.CHUNKWISE, "native")
    assert use(torch.zeros(1)).backend == use(torch.zeros(1, dtype=torch.bfloat16)).backend == "native"
    for x in (torch.zeros(1).double(), torch.zeros(1).half(), torch.zeros(1, device="meta")):
        assert use(x) is reference("scan", Paradigm.CHUNKWISE)
    model = build_model(load_config("mamba-tiny", ["model.n_layers=1"]).model, seed=0)
    assert model.backends == {"mamba": "native"}
    tokens = torch.arange(40)[None]
    exact = model.double()(tokens).logits
    torch.testing.assert_close(model.float()(tokens).logits.double(), exact, rtol=1e-4, atol=1e-4)


@needs_compiler
def test_short_convolutions_follow_the_backend_of_their_mixer():
    def backends(preset, *changes):
        model = build_model(load_config(preset, ["model.n_layers=1", *changes]).model)
        return {part.backend for part in model.modules() if isinstance(part, ShortConvolution)}

    assert backends("gated-delta-net-tiny") == backends("mamba-tiny") == {"native"}
    assert backends("gated-delta-net-tiny", "model.blocks.delta.mixer.backend=reference") == {"reference"}
    assert backends("mamba-tiny", "model.blocks.mamba.mixer.backend=native") == {"native"}


def _slstm(gates, recurrent, initial_state, **options):
    """The cell of sLSTM, with the first half of its state; log n starts as the mean of the cell."""
    state = initial_state, initial_state[:, :, 1].double()
    return slstm(gates, recurrent, initial_state=state, **options)[:2]


def op_of(name, batch, length):
    """An op of this name on random inputs, which need gradients: its function, its inputs and the rows of its state."""
    torch.manual_seed(0)
    x, step = torch.randn(batch, length, C), torch.rand(batch, length, C)
    keys = (torch.randn(batch, length, K), torch.randn(batch, length, K))
    functions = {
        "scan": (scan, (x, -step), (C,)),
        "log_scan": (log_scan, (x, -step), (C,)),
        "selective_scan": (selective_scan, (x, step, -torch.rand(K, C), *keys), (K, C)),
        "diagonal_scan": (diagonal_scan, (x, -torch.rand(K, C), torch.randn(K, C), torch.randn(K, C, 2)), (K, C, 2)),
        "slstm": (_slstm, (torch.randn(batch, length, H, 4 * W), torch.randn(H, W, 4 * W) / W), (H, 2, W)),
        "m2rnn": (
            m2rnn,
            (*torch.randn(3, batch, length, H, W), -step[..., :H], torch.randn(H, W, W) / W),
            (H, W, W),
        ),
        "short_convolution": (
            partial(short_convolution, activation="silu"),
            (x, torch.randn(C, W), torch.randn(C)),
            (W - 1, C),
        ),
    }
    return functions[name]


def run(function, inputs, state, per_token, **options):
    """Output, final state, and the gradients of the inputs that have tokens and of the initial state."""
    leaves = [x.detach().clone().requires_grad_() for x in (*inputs, state)]
    output, final = function(
        *leaves[:-1], initial_state=leaves[-1], output_final_state=True, backend="native", **options
    )
    loss = output.square().sum() + final.square().sum()
    gradients = torch.autograd.grad(loss, leaves)
    wanted = [gradient for i, gradient in enumerate(gradients) if per_token is None or i in per_token]
    return [output, final, *wanted]


every_op = pytest.mark.parametrize(
    "name", ["diagonal_scan", "log_scan", "m2rnn", "scan", "selective_scan", "short_convolution", "slstm"]
)


@needs_compiler
@every_op
def test_thread_count_leaves_results_bitwise_unchanged(name):
    function, inputs, state = op_of(name, 3, 150)
    states = torch.randn(3, *state)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(run(function, inputs, states, None))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@needs_compiler
@every_op
def test_row_and_packed_document_match_each_computed_alone(name):
    function, inputs, state = op_of(name, 3, 100)
    states = torch.randn(3, *state)
    per_token = [i for i, x in enumerate(inputs) if x.shape[:2] == (3, 100)]
    kept = [*per_token, len(inputs)]
    whole = run(function, inputs, states, kept)
    for n in range(3):
        row = [x[n : n + 1] if i in per_token else x for i, x in enumerate(inputs)]
        alone = run(function, row, states[n : n + 1], kept)
        assert all(torch.equal(x[n : n + 1], y) for x, y in zip(whole, alone, strict=True))
    lengths = (70, 0, 30)
    boundaries = [0, *itertools.accumulate(lengths)]
    packed = [x[:1] if i in per_token else x for i, x in enumerate(inputs)]
    whole = run(function, packed, states, kept, cu_seqlens=torch.tensor(boundaries))
    for n, (start, stop) in enumerate(itertools.pairwise(boundaries)):
        if stop > start:
            document = [x[:, start:stop] if i in per_token else x for i, x in enumerate(packed)]
            alone = run(function, document, states[n : n + 1], kept)
            parts = [x[n : n + 1] if x.shape[0] == 3 else x[:, start:stop] for x in whole]
            assert all(map(torch.equal, parts, alone))


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("rate", [1e-5, 1e-4, 1e-3])
@pytest.mark.parametrize("name", ["diagonal_scan", "log_scan", "scan", "selective_scan"])
def test_slow_decays_do_not_drift_over_long_texts(name, rate):
    length = 2**16
    function, inputs, _ = op_of(name, 1, length)
    x, second, *rest = (x[..., :4] if x.shape[-1] == C else x[..., :4, :] if x.shape[-1] == 2 else x for x in inputs)
    if name == "selective_scan":
        inputs = [x + 1, torch.full_like(second, 0.0123), torch.full_like(rest[0], -rate / 0.0123), *rest[1:]]
    else:
        inputs = [x + 1, torch.full_like(second, -rate), *rest]
    results = []
    for dtype, options in ((torch.float64, {"paradigm": "chunkwise"}), (torch.float32, {"backend": "native"})):
        leaves = [y.to(dtype).requires_grad_() for y in inputs]
        output = function(*leaves, **options).output
        upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        results.append([output, *torch.autograd.grad(output, leaves, upstream)])
    for exact, result in zip(*results, strict=True):
        assert (result.double() - exact).norm() <= 1.5e-5 * exact.norm()
