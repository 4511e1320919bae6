"""Calls of all native kernels with unusual scalars, sizes and memory; the reference must give the same results.

This is a program, because a wrong call may end the process. It prints every case before it computes it.
"""

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from seqmix.models.cpu_linear import linear
from seqmix.models.quantization import Int4Linear, Int8Linear
from seqmix.ops.cell import m2rnn, slstm
from seqmix.ops.convolution import short_convolution
from seqmix.ops.decay import decay, decay_reading_values
from seqmix.ops.delta import delta
from seqmix.ops.dplr import dplr
from seqmix.ops.scan import diagonal_scan, log_scan, scan, selective_scan
from seqmix.registry import SeqmixError


class Case(NamedTuple):
    """A call of an op."""

    what: str
    op: Callable[..., Any]
    inputs: dict[str, Tensor]
    options: Mapping[str, Any] = MappingProxyType({})

    def run(self, backend: str) -> list[Tensor] | str:
        """Output, final states and, if there are several tokens, gradients; or the error."""
        has_grad = next(iter(self.inputs.values())).shape[1] > 1
        inputs = {name: x.detach().requires_grad_(has_grad) for name, x in self.inputs.items()}
        options = {"paradigm": "recurrent", "output_final_state": True, **self.options}
        try:
            with torch.set_grad_enabled(has_grad):
                results = list(self.op(**inputs, **options, backend=backend))
        except SeqmixError as error:
            return str(error)
        if has_grad:
            loss = sum(x.double().square().sum() for x in results)
            results += torch.autograd.grad(loss, list(inputs.values()))
        return results


SIZES = {"B": 2, "T": 5, "H": 2, "K": 3, "V": 7, "C": 5, "W": 4, "4": 12, "2": 2}
MATRIX_OPS = {
    decay: {"q": "BTHK", "k": "BTHK", "v": "BTHV", "log_decay": "BTHK"},
    decay_reading_values: {"q": "BTHV", "k": "BTHK", "v": "BTHV", "log_decay": "BTHK"},
    delta: {"q": "BTHK", "k": "BTHK", "v": "BTHV", "beta": "BTH", "log_decay": "BTH"},
    dplr: {"q": "BTHK", "k": "BTHK", "v": "BTHV", "a": "BTHK", "b": "BTHK", "log_decay": "BTHK"},
}
CELLS = {
    slstm: {"gates": "BTH4", "recurrent": "HK4"},
    m2rnn: {"q": "BTHK", "k": "BTHK", "v": "BTHV", "log_decay": "BTH", "weight": "HVV"},
}
SCANS = {
    scan: {"x": "BTC", "log_decay": "BTC"},
    log_scan: {"x": "BTC", "log_decay": "BTC"},
    selective_scan: {"x": "BTC", "step": "BTC", "rate": "KC", "k": "BTK", "q": "BTK"},
    diagonal_scan: {"x": "BTC", "log_decay": "KC", "angle": "KC", "weight": "KC2"},
}
OPS = {**MATRIX_OPS, **CELLS, **SCANS, short_convolution: {"x": "BTC", "weight": "CW", "bias": "C"}}
"""Dimensions of the inputs of each op."""


def misaligned(x: Tensor) -> Tensor:
    """Copy a tensor to an address that is no multiple of its element size."""
    return torch.frombuffer(bytearray(1 + x.nbytes), dtype=x.dtype, offset=1).view_as(x).copy_(x)


LAYOUTS: list[Callable[[Tensor], Tensor]] = [
    lambda x: torch.stack((x, x), -1)[..., 0],  # every other number
    lambda x: x.mT.contiguous().mT if x.ndim > 1 else x,
    lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    lambda x: torch.cat((x.new_zeros(1), x.flatten()))[1:].view_as(x),
    lambda x: x[:1].expand_as(x),
    lambda x: torch._neg_view(x.neg()),
    misaligned,
    lambda x: misaligned(x.bfloat16()),
]
"""Functions that lay a tensor out in memory."""


def inputs_of(op: Callable[..., Any], **sizes: int) -> dict[str, Tensor]:
    """Random inputs of an op, of SIZES unless others are given."""
    sizes = SIZES | sizes
    torch.manual_seed(0)
    inputs = {name: torch.randn([sizes[n] for n in dimensions]) / 2 for name, dimensions in OPS[op].items()}
    negative = {name: -inputs[name].abs() for name in ("log_decay", "rate") if name in inputs}
    positive = {name: inputs[name].sigmoid() for name in ("beta", "step") if name in inputs}
    return inputs | negative | positive


def cases() -> Iterator[Case]:
    """All cases; integers come first, because they once decided how later arguments were read."""
    for length in (1, 5):
        for op in MATRIX_OPS:
            for scale in (2, True, np.int64(2), np.float32(0.5), torch.tensor(0.5)):
                yield Case(f"scale {scale!r}", op, inputs_of(op, T=length), {"scale": scale})
        for flag in (1, True, np.True_):
            yield Case(f"exponential {flag!r}", slstm, inputs_of(slstm, T=length), {"exponential": flag})
        for op in OPS:
            for i, lay_out in enumerate(LAYOUTS):
                inputs = {name: lay_out(x) for name, x in inputs_of(op, T=length).items()}
                yield Case(f"layout {i}", op, inputs)
            documents = torch.tensor([0, 0, length, length])
            yield Case("empty documents", op, inputs_of(op, B=1, T=length), {"cu_seqlens": documents})
            yield Case("no heads", op, inputs_of(op, T=length, H=0))
        for op in OPS.keys() - SCANS.keys():  # the reference of scans wants a row
            yield Case("no rows", op, inputs_of(op, B=0, T=length))
    for op in OPS:
        yield Case("no tokens", op, inputs_of(op, T=0))


def check_ops() -> None:
    """Compare all cases."""
    for case in cases():
        shapes = {name: list(x.shape) for name, x in case.inputs.items()}
        print(case.op.__name__, case.what, shapes, flush=True)
        results, expected = case.run("native"), case.run("reference")
        if isinstance(expected, str):
            assert results == expected
            continue
        tolerance = 2e-2 if next(iter(case.inputs.values())).dtype == torch.bfloat16 else 1e-5
        assert_close(results, expected, rtol=tolerance, atol=tolerance)


def check_scans_without_rows() -> None:
    """Call the scans with an empty batch."""
    for op in SCANS:
        print(op.__name__, "without rows", flush=True)
        output, *_ = Case("no rows", op, inputs_of(op, B=0)).run("native")
        assert output.shape == (0, SIZES["T"], SIZES["C"])


@torch.no_grad()
def check_linear() -> None:
    """Compare products with matrices of floats and of codes."""
    torch.manual_seed(0)
    layer = nn.Linear(300, 256)
    for lay_out in LAYOUTS:
        x, weight, bias = map(lay_out, (torch.randn(3, 300), layer.weight, layer.bias))
        tolerance = 2e-2 if x.dtype == torch.bfloat16 else 1e-4
        for rows in (x, x[:0]):
            print("linear", list(rows.shape), rows.stride(), rows.dtype, flush=True)
            expected = linear(rows, weight, bias, native=False)
            assert_close(linear(rows, weight, bias), expected, rtol=tolerance, atol=tolerance)
        for kind in (Int4Linear, Int8Linear):
            print(kind.__name__, x.stride(), x.dtype, flush=True)
            quantized = kind(layer.weight, nn.Parameter(bias))
            quantized.encode(layer.weight)
            expected = nn.functional.linear(x.float(), quantized.weight, bias.float())
            assert_close(quantized(x).float(), expected, rtol=5 * tolerance, atol=5 * tolerance)
            assert quantized(x[:0]).shape == (0, 256)


if __name__ == "__main__":
    torch.set_num_threads(2)
    check_ops()
    check_scans_without_rows()
    check_linear()
