"""Kernels: the functions that compute an op, each declared with what it takes and how exact it is.

An op is a family of recurrences; a kernel is one function that computes it, by one paradigm and one backend, from one
value that describes the call. It is declared beside its code:

    declare(
        Kernel(
            op="decay",
            paradigm=Paradigm.CHUNKWISE,
            backend="reference",
            function=decay_chunkwise,
            tolerances={torch.float64: 1e-9, torch.float32: 3e-6},
        )
    )

`seqmix.testing.check_kernel` tests what a kernel declares against the definition of its op.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ...registry import SeqmixError, nearest
from .paradigm import Paradigm

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""The dtypes that references compute in."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What a kernel may be asked to run: all that is known of its calls when a model is built."""

    device: torch.device
    dtype: torch.dtype
    """Of queries, keys and values."""
    key_width: int
    value_width: int
    log_decay: str | None = None
    """The dimensions of the log-decays, as the op's signature names them ("B T H"); None where there are none."""
    window: bool = False
    """Whether queries see a limited number of keys."""
    packed: bool = False
    """Whether documents are packed (`cu_seqlens`)."""
    initial_state: bool = False
    final_state: bool = False
    """Whether the state after the last token is wanted."""
    needs_grad: bool = False
    wide_output: bool = False
    """Whether the output of 16-bit inputs is to be float32."""
    scores: tuple[str, ...] = ()
    """What changes scores beside their scale, decay and window, by the names of the op's arguments."""


class Key(NamedTuple):
    """The name of a kernel."""

    op: str
    paradigm: Paradigm
    backend: str

    def __str__(self) -> str:
        return "/".join(self)


def takes_everything(probe: Probe) -> list[str]:  # noqa: ARG001
    """The limits of a kernel without any."""
    return []


@dataclass(frozen=True, kw_only=True, eq=False)
class Kernel:
    """One way to compute an op."""

    op: str
    """The family: "decay", "softmax"."""
    paradigm: Paradigm
    backend: str
    """The kernel backend: "reference" and "sdpa" are plain torch, "triton" is this library's."""
    function: Callable[..., Any]
    """Takes one value that describes the call (`Recurrence`, `Attention`) and returns (output, final state or None);
    raises a SeqmixError for what it cannot compute."""
    tolerances: Mapping[torch.dtype, float]
    """The supported dtypes. Every element of outputs, final states and gradients is within this of the definition in
    float64 on the same numbers, relative to the sum of the absolute values of the terms that the element adds up, and
    the mean of that over its head. What is smaller than the dtype's smallest normal number may be lost."""
    limits: Callable[[Probe], list[str]] = takes_everything
    """The reasons, apart from the dtype, why it cannot run a call: device, widths, features. Empty if it can."""
    reference: bool = False
    """Whether it is the fallback: it runs wherever torch does and takes everything. An op has one per paradigm."""
    differences: bool = False
    """Whether it forms gradients of given log-decays as differences of sums: what is added and taken away again counts
    among the terms. Where decays are strong, that is all that is left."""
    higher_order: bool = False
    """Whether it calls a higher-order op of torch, one that takes functions: a dispatch mode cannot intercept it."""

    @property
    def key(self) -> Key:
        """Its name."""
        return Key(self.op, self.paradigm, self.backend)

    def unsupported(self, probe: Probe) -> list[str]:
        """The reasons why it cannot run a call; empty if it can."""
        if probe.dtype in self.tolerances:
            return self.limits(probe)
        given, *taken = (str(dtype).removeprefix("torch.") for dtype in (probe.dtype, *self.tolerances))
        return [f"{self.key} takes {', '.join(taken)}, not {given}", *self.limits(probe)]

    def require(self, probe: Probe) -> None:
        """Raise a SeqmixError with the reasons if it cannot run a call."""
        if reasons := self.unsupported(probe):
            raise SeqmixError("; ".join(reasons))


OPS = (__package__ or "").rpartition(".")[0]
"""The package of all ops."""
KERNELS: dict[Key, Kernel] = {}
"""All that were declared: those of an op once its module is imported."""

ON_DEMAND: Mapping[str, Mapping[str, str]] = {
    "triton": {"decay": "triton.decay.op", "delta": "triton.delta.op"},
    "triton_tf32x3": {"decay": "triton.decay.op"},
    "fla": {"decay": "fla"},
    "flex": {"softmax": "flex"},
    "xformers": {"softmax": "xformers"},
}
"""By backend and op, the module of `ops.kernels` that declares its kernels; imported when one of them is looked up."""


def import_kernels(backend: str) -> None:
    """Import the modules that declare the kernels of a backend; nothing if the ops declare them themselves."""
    for module in ON_DEMAND.get(backend, {}).values():
        import_module(f"{OPS}.kernels.{module}")


def declare(kernel: Kernel) -> Kernel:
    """Register a kernel.

    Raises:
        SeqmixError: its op, paradigm and backend have one already.
    """
    if kernel.key in KERNELS:
        known = KERNELS[kernel.key].function
        raise SeqmixError(f"there is a kernel {kernel.key} already: {known.__module__}.{known.__qualname__}")
    KERNELS[kernel.key] = kernel
    return kernel


def all_kernels() -> dict[str, Kernel]:
    """Every kernel by its name, including those imported on demand."""
    for file in sorted(Path(__file__).parents[1].glob("*/api.py")):
        import_module(f"{OPS}.{file.parent.name}.api")
    for backend in ON_DEMAND:
        import_kernels(backend)
    return {str(key): kernel for key, kernel in KERNELS.items()}


def declare_references(
    op: str,
    functions: Mapping[Paradigm, tuple[Callable[..., Any], Mapping[torch.dtype, float]]],
    backend: str = "reference",
) -> None:
    """Declare the kernels that run wherever torch does: the function and tolerances of each paradigm."""
    for paradigm, (function, tolerances) in functions.items():
        declare(
            Kernel(op=op, paradigm=paradigm, backend=backend, function=function, tolerances=tolerances, reference=True)
        )


def find(op: str, paradigm: Paradigm, backend: str) -> Kernel:
    """A declared kernel; a SeqmixError names the nearest match if there is none."""
    key = Key(op, paradigm, backend)
    if key not in KERNELS:
        import_kernels(backend)
    if key not in KERNELS:
        known = [str(other) for other in KERNELS]
        raise SeqmixError(f"there is no kernel {key}{nearest(str(key), known)}")
    return KERNELS[key]


def reference(op: str, paradigm: Paradigm) -> Kernel:
    """The kernel of a paradigm that runs everywhere; the op's module must have been imported.

    Raises:
        SeqmixError: none was declared.
    """
    for kernel in KERNELS.values():
        if kernel.reference and (kernel.op, kernel.paradigm) == (op, paradigm):
            return kernel
    raise SeqmixError(f"no kernel of {op}/{paradigm} was declared as the reference")


def chosen(op: str, paradigm: Paradigm, backend: str) -> Kernel:
    """The kernel of a backend; the reference if it has none of this paradigm, or is an unresolved `auto`."""
    key = Key(op, paradigm, backend)
    if key not in KERNELS and not torch.compiler.is_compiling():
        import_kernels(backend)
    return KERNELS.get(key) or reference(op, paradigm)


@cache
def installed(library: str) -> bool:
    """Whether a library is installed, without importing it."""
    # an uninstalled package may leave a folder, which is not a package
    return getattr(find_spec(library), "origin", None) is not None
