"""The elementwise scan and its log-domain form on a CPU, token by token (scan.cpp)."""

import torch
from torch import Tensor

from ...runtime.custom_op import Gradients, Op
from ...runtime.kernel import Kernel, declare
from ...runtime.paradigm import Paradigm
from ...scan.elementwise import Scan
from ...scan.logarithmic import LOG_STATE
from .common import contiguous, limits_of, rows, sequences
from .functions import call


def _allocate(x: Scan, kernel: Kernel) -> tuple[Tensor, Tensor]:
    """Allocate the final state and the output; the output, which is every token's state, is saved for backward."""
    kernel.require(x.probe())  # inside the op, which a compiler does not trace
    shape = (rows(x.x, x.cu_seqlens), *x.x.shape[2:])
    final = x.x.new_empty(shape if x.output_final_state else (0,), dtype=_state_dtype(kernel))
    return final, x.x.new_empty(x.x.shape, dtype=torch.float32)


def _state_dtype(kernel: Kernel) -> torch.dtype:
    return LOG_STATE if kernel.op == "log_scan" else torch.float32


def _inputs(x: Scan, kernel: Kernel) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return inputs, log-decays and initial states as both functions read them."""
    initial = None if x.initial_state is None else x.initial_state.to(_state_dtype(kernel)).contiguous()
    return contiguous(x.x), contiguous(x.log_decay), initial


def _forward(x: Scan, kernel: Kernel) -> tuple[Tensor, Tensor]:
    final, output = _allocate(x, kernel)
    bounds = sequences(x.x, x.cu_seqlens)
    call(
        "scan",
        f"{kernel.op}_forward",
        *_inputs(x, kernel),
        bounds,
        len(bounds) - 1,
        x.x.shape[2:].numel(),
        output,
        final if x.output_final_state else None,
    )
    return final, output


def _backward(x: Scan, gradients: Gradients, kernel: Kernel) -> dict[str, Tensor]:
    (d_final, d_output), (output,) = gradients.outputs, gradients.saved
    bounds = sequences(x.x, x.cu_seqlens)
    inputs = {"x": x.x, "log_decay": x.log_decay, "initial_state": x.initial_state}
    d = {name: y.new_empty(y.shape, dtype=torch.float32) for name, y in inputs.items() if y is not None}
    call(
        "scan",
        f"{kernel.op}_backward",
        *_inputs(x, kernel),
        output,
        contiguous(d_output),
        contiguous(d_final if x.output_final_state else None),
        bounds,
        len(bounds) - 1,
        x.x.shape[2:].numel(),
        d["x"],
        d["log_decay"],
        d.get("initial_state"),
    )
    return d


def _declare(op: str) -> None:
    """Declare the kernels of an op, whose functions in the source have its name."""
    custom_op: Op[Scan] = Op(
        f"{op}_native",
        Scan,
        fake=lambda x: _allocate(x, kernel),
        forward=lambda x: _forward(x, kernel),
        backward=lambda x, gradients: _backward(x, gradients, kernel),
        outputs=2,
        reads=1,
    )

    def run(x: Scan) -> tuple[Tensor, Tensor | None]:
        final, output = custom_op(x)
        return output.to(x.x.dtype), final if x.output_final_state else None

    for paradigm in (Paradigm.RECURRENT, Paradigm.CHUNKWISE):
        kernel = declare(
            Kernel(
                op=op,
                paradigm=paradigm,
                backend="native",
                function=run,
                tolerances={torch.float32: 1e-5, torch.bfloat16: 4e-3},
                limits=limits_of("scan"),
                follows_inputs=True,
            )
        )


_declare("scan")
_declare("log_scan")
