"""The elementwise scan on a CPU: h_t = exp(a_t) h_{t-1} + x_t, token by token (scan.cpp)."""

import torch
from torch import Tensor

from ...runtime.custom_op import Gradients, Op
from ...runtime.kernel import Kernel, declare
from ...runtime.paradigm import Paradigm
from ...scan.elementwise import Scan
from . import build
from .common import contiguous, limits_of, sequences


def _allocate(x: Scan) -> tuple[Tensor, Tensor]:
    """Allocate the final state and the output; the output, which is every token's state, is saved for backward."""
    KERNELS[0].require(x.probe())  # inside the op, which a compiler does not trace
    rows = x.x.shape[0] if x.cu_seqlens is None else x.cu_seqlens.shape[0] - 1
    final = x.x.new_empty((rows, *x.x.shape[2:]) if x.output_final_state else (0,), dtype=torch.float32)
    return final, x.x.new_empty(x.x.shape, dtype=torch.float32)


def _forward(x: Scan) -> tuple[Tensor, Tensor]:
    final, output = _allocate(x)
    bounds = sequences(x.x, x.cu_seqlens)
    build.run(
        "scan",
        "scan_forward",
        contiguous(x.x),
        contiguous(x.log_decay),
        contiguous(x.initial_state),
        bounds,
        len(bounds) - 1,
        x.x[0, 0].numel(),
        output,
        final if x.output_final_state else None,
    )
    return final, output


def _backward(x: Scan, gradients: Gradients) -> dict[str, Tensor]:
    (d_final, d_output), (output,) = gradients.outputs, gradients.saved
    bounds = sequences(x.x, x.cu_seqlens)
    inputs = {"x": x.x, "log_decay": x.log_decay, "initial_state": x.initial_state}
    d = {name: y.new_empty(y.shape, dtype=torch.float32) for name, y in inputs.items() if y is not None}
    build.run(
        "scan",
        "scan_backward",
        contiguous(x.log_decay),
        contiguous(x.initial_state),
        output,
        contiguous(d_output),
        contiguous(d_final if x.output_final_state else None),
        bounds,
        len(bounds) - 1,
        x.x[0, 0].numel(),
        d["x"],
        d["log_decay"],
        d.get("initial_state"),
    )
    return d


SCAN = Op("scan_native", Scan, fake=_allocate, forward=_forward, backward=_backward, outputs=2, reads=1)


def scan_native(x: Scan) -> tuple[Tensor, Tensor | None]:
    """Compute the scan token by token, in float32.

    Raises:
        SeqmixError: the kernel does not support the call.
    """
    final, output = SCAN(x)
    return output.to(x.x.dtype), final if x.output_final_state else None


KERNELS = [
    declare(
        Kernel(
            op="scan",
            paradigm=paradigm,
            backend="native",
            function=scan_native,
            tolerances={torch.float32: 3e-6, torch.bfloat16: 4e-3},
            limits=limits_of("scan"),
            follows_inputs=True,
        )
    )
    for paradigm in (Paradigm.RECURRENT, Paradigm.CHUNKWISE)
]
