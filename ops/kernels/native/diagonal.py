"""The scan with complex states and fixed decays on a CPU, token by token (diagonal.cpp)."""

import torch
from torch import Tensor

from ...runtime.custom_op import Gradients, Op
from ...runtime.kernel import Kernel, declare
from ...runtime.paradigm import Paradigm
from ...scan.diagonal import Diagonal
from .common import GROUPS, contiguous, limits_of, rows, saved_states, sequences
from .functions import call


def _allocate(x: Diagonal) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate the output, the final state, and the states before every chunk."""
    KERNELS[0].require(x.probe())  # inside the op, which a compiler does not trace
    final_shape = (rows(x.x, x.cu_seqlens), *x.weight.shape) if x.output_final_state else (0,)
    output, final = (x.x.new_empty(shape, dtype=torch.float32) for shape in (x.x.shape, final_shape))
    entries = saved_states(x.x, x.cu_seqlens, (2, *x.log_decay.shape)) if x.needs_grad else final.new_empty(0)
    return output, final, entries


def _decay(x: Diagonal) -> Tensor:
    """Return exp(log_decay + i angle) as complex numbers, [K C]; in float64, as a large angle needs its digits."""
    return torch.polar(x.log_decay.double().exp(), x.angle.double())


def _factors(x: Diagonal) -> Tensor:
    """Return the decays, as coarse numbers and the rest, and the weights, [6 K C]; of each, real before imaginary."""
    decay = torch.view_as_real(_decay(x)).movedim(-1, 0)
    coarse = decay.to(torch.bfloat16).double()
    return torch.cat((coarse, decay - coarse, x.weight.double().movedim(-1, 0))).to(torch.float32)


def _initial(x: Diagonal) -> Tensor | None:
    """Return the initial states as [N 2 K C]."""
    return None if x.initial_state is None else contiguous(x.initial_state.movedim(-1, 1))


def _forward(x: Diagonal) -> tuple[Tensor, Tensor, Tensor]:
    output, final, entries = _allocate(x)
    bounds = sequences(x.x, x.cu_seqlens)
    keys, channels = x.log_decay.shape
    parts = final.new_empty((len(bounds) - 1, 2, keys, channels)) if x.output_final_state else None
    call(
        "diagonal",
        "diagonal_forward",
        contiguous(x.x),
        _factors(x),
        _initial(x),
        bounds,
        len(bounds) - 1,
        channels,
        keys,
        output,
        parts,
        entries if x.needs_grad else None,
    )
    if parts is not None:
        final.copy_(parts.movedim(1, -1))
    return output, final, entries


def _backward(x: Diagonal, gradients: Gradients) -> dict[str, Tensor]:
    (d_output, d_final), (entries,) = gradients.outputs, gradients.saved
    bounds = sequences(x.x, x.cu_seqlens)
    keys, channels = x.log_decay.shape
    groups = min(len(bounds) - 1, GROUPS)
    d_x = x.x.new_empty(x.x.shape, dtype=torch.float32)
    d_factors = x.x.new_empty((groups, 4, keys, channels), dtype=torch.float64)
    d_initial = None
    if x.initial_state is not None:
        d_initial = x.x.new_empty((len(bounds) - 1, 2, keys, channels), dtype=torch.float32)
    call(
        "diagonal",
        "diagonal_backward",
        contiguous(x.x),
        _factors(x),
        entries,
        contiguous(d_output),
        contiguous(d_final.movedim(-1, 1)) if d_final is not None and x.output_final_state else None,
        bounds,
        len(bounds) - 1,
        groups,
        channels,
        keys,
        d_x,
        d_factors,
        d_initial,
    )
    real, imaginary, *d_weight = d_factors.sum(0).unbind()
    d_exponent = torch.complex(real, imaginary) * _decay(x).conj()
    d = {"x": d_x, "log_decay": d_exponent.real, "angle": d_exponent.imag, "weight": torch.stack(d_weight, dim=-1)}
    return d if d_initial is None else d | {"initial_state": d_initial.movedim(1, -1)}


DIAGONAL = Op("diagonal_scan_native", Diagonal, fake=_allocate, forward=_forward, backward=_backward, saves=1)


def diagonal_scan_native(x: Diagonal) -> tuple[Tensor, Tensor | None]:
    """Compute the diagonal scan token by token, in float32.

    Raises:
        SeqmixError: the kernel does not support the call.
    """
    output, final, _ = DIAGONAL(x)
    return output.to(x.x.dtype), final if x.output_final_state else None


KERNELS = [
    declare(
        Kernel(
            op="diagonal_scan",
            paradigm=paradigm,
            backend="native",
            function=diagonal_scan_native,
            tolerances={torch.float32: 1e-5, torch.bfloat16: 4e-3},
            limits=limits_of("diagonal"),
            follows_inputs=True,
        )
    )
    for paradigm in (Paradigm.RECURRENT, Paradigm.CHUNKWISE)
]
