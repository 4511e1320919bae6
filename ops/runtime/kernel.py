"""Kernels: the functions that compute an op, each declared with its limits and its tolerances.

An op is a family of recurrences, or softmax attention. A kernel is one function that computes an op, with one paradigm
and one backend, from one value that describes the call. It is declared beside its code:

    declare(
        Kernel(
            op="decay",
            paradigm=Paradigm.CHUNKWISE,
            backend="reference",
            function=decay_chunkwise,
            tolerances={torch.float64: 1e-9, torch.float32: 3e-6},
        )
    )

`seqmix.testing.check_kernel` tests a kernel against its declaration and the definition of its op.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...registry import SeqmixError, choices_hint, nearest_hint
from .paradigm import Paradigm

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Dtypes that the reference kernels support."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Properties of the calls that a kernel must run, as far as they are known when a model is built."""

    device: torch.device
    dtype: torch.dtype
    """Dtype of queries, keys and values."""
    key_width: int
    value_width: int
    log_decay: str | None = None
    """Dimensions of the log-decays, as in the op's signature ("B T H"); None for calls without decays."""
    window: bool = False
    """True if each query sees a limited number of keys."""
    packed: bool = False
    """True if documents are packed (`cu_seqlens`)."""
    initial_state: bool = False
    final_state: bool = False
    """True if the state after the last token is wanted."""
    needs_grad: bool = False
    wide_output: bool = False
    """True if the output of 16-bit inputs must be float32."""
    scores: tuple[str, ...] = ()
    """Names of the op's arguments that change scores, other than scale, decay and window."""


class Key(NamedTuple):
    """Name of a kernel, printed as op/paradigm/backend."""

    op: str
    paradigm: Paradigm
    backend: str

    def __str__(self) -> str:
        return "/".join(self)


def no_limits(probe: Probe) -> list[str]:  # noqa: ARG001
    """Return no reasons: the limits of a kernel that can run every call."""
    return []


@dataclass(frozen=True, kw_only=True, eq=False)
class Kernel:
    """Declaration of one function that computes an op."""

    op: str
    """Name of the op: "decay", "softmax"."""
    paradigm: Paradigm
    backend: str
    """Kernel backend: "reference" and "sdpa" are plain torch, "native" (C++, on CPUs) and "triton" this library's."""
    function: Callable[..., Any]
    """Computes the op from one value that describes the call (`Recurrence`, `AttentionInputs`). Returns (output, final
    state or None); raises a SeqmixError for a call that it does not support."""
    tolerances: Mapping[torch.dtype, float]
    """Largest error of every element of outputs, final states and gradients, by supported dtype.

    The error is measured against the definition in float64 on the same numbers, relative to the sum of the absolute
    values of the terms that the element adds up, plus the mean of these sums over the element's head. Values below the
    dtype's smallest normal number may be lost."""
    limits: Callable[[Probe], list[str]] = no_limits
    """Returns the reasons, apart from the dtype, why the kernel cannot run a call: device, widths, features. Empty if
    it can."""
    reference: bool = False
    """True for the fallback, which runs on every device and supports every call. An op has one per paradigm."""
    gradient_by_subtraction: bool = False
    """True if the gradient of a log-decay per token is computed as a difference of sums. The tolerance then also allows
    for the terms that cancel: where decays are strong, only their rounding errors remain of the difference."""
    follows_inputs: bool = False
    """True if the reference runs in place of this kernel when inputs are not on a CPU or have an unsupported dtype.
    A layer chooses its kernel when its model is built, on a CPU, and the model may be moved or converted afterwards."""
    reads_values: bool = False
    """True if the kernel supports `Recurrence.reads_values`; the chunkwise reference of the decay family does."""
    higher_order: bool = False
    """True if the kernel calls a higher-order op of torch (an op that takes functions), which a dispatch mode cannot
    intercept."""

    @property
    def key(self) -> Key:
        """Name of the kernel."""
        return Key(self.op, self.paradigm, self.backend)

    def unsupported(self, probe: Probe) -> list[str]:
        """Return the reasons why the kernel cannot run a call; empty if it can."""
        if probe.dtype in self.tolerances:
            return self.limits(probe)
        dtype, *supported = (str(dtype).removeprefix("torch.") for dtype in (probe.dtype, *self.tolerances))
        return [f"{self.key} supports {', '.join(supported)}, got {dtype}", *self.limits(probe)]

    def require(self, probe: Probe) -> None:
        """Raise a SeqmixError with the reasons if the kernel cannot run a call."""
        if reasons := self.unsupported(probe):
            raise SeqmixError(f"kernel {self.key} cannot run: {'; '.join(reasons)}; use another backend")


OPS = (__package__ or "").rpartition(".")[0]
"""Name of the package that contains all ops."""
KERNELS: dict[Key, Kernel] = {}
"""All declared kernels; importing the module of an op declares its kernels."""

ON_DEMAND: Mapping[str, Mapping[str, str]] = {
    "native": {
        "decay": "native.recurrence",
        "delta": "native.recurrence",
        "dplr": "native.recurrence",
        "scan": "native.scan",
        "log_scan": "native.scan",
        "diagonal_scan": "native.diagonal",
        "selective_scan": "native.selective",
        "slstm": "native.slstm",
        "m2rnn": "native.m2rnn",
        "short_convolution": "native.convolution",
    },
    "triton": {"decay": "triton.decay.op", "delta": "triton.delta.op"},
    "triton_tf32x3": {"decay": "triton.decay.op"},
    "fla": {"decay": "fla"},
    "flex": {"softmax": "flex"},
    "xformers": {"softmax": "xformers"},
}
"""Modules of `ops.kernels` that declare kernels, by backend and op; imported when one of their kernels is looked up."""


def import_kernels(backend: str) -> None:
    """Import the modules that declare the kernels of a backend; no effect if the ops themselves declare them."""
    for module in ON_DEMAND.get(backend, {}).values():
        import_module(f"{OPS}.kernels.{module}")


def declare(kernel: Kernel) -> Kernel:
    """Register a kernel.

    Raises:
        SeqmixError: if a kernel with the same op, paradigm and backend is already declared.
    """
    if kernel.key in KERNELS:
        known = KERNELS[kernel.key].function
        raise SeqmixError(f"kernel {kernel.key} is already declared: {known.__module__}.{known.__qualname__}")
    KERNELS[kernel.key] = kernel
    return kernel


def all_kernels() -> dict[str, Kernel]:
    """Return every kernel by name, including those that are imported on demand."""
    for file in sorted(Path(__file__).parents[1].glob("*/api.py")):
        import_module(f"{OPS}.{file.parent.name}.api")
    import_module(f"{OPS}.convolution")
    for backend in ON_DEMAND:
        import_kernels(backend)
    return {str(key): kernel for key, kernel in KERNELS.items()}


def declare_references(
    op: str,
    functions: Mapping[Paradigm, tuple[Callable[..., Any], Mapping[torch.dtype, float]]],
    backend: str = "reference",
) -> None:
    """Declare the reference kernels of an op, from the function and tolerances of each paradigm."""
    for paradigm, (function, tolerances) in functions.items():
        declare(
            Kernel(op=op, paradigm=paradigm, backend=backend, function=function, tolerances=tolerances, reference=True)
        )


def find(op: str, paradigm: Paradigm, backend: str) -> Kernel:
    """Return a declared kernel.

    Raises:
        SeqmixError: if it is not declared; the message names the nearest match.
    """
    key = Key(op, paradigm, backend)
    if key not in KERNELS:
        import_kernels(backend)
    if key not in KERNELS:
        known = [str(other) for other in KERNELS]
        raise SeqmixError(f"unknown kernel {key}{nearest_hint(str(key), known)}")
    return KERNELS[key]


def require_backend(op: str, backend: str) -> None:
    """Raise a SeqmixError, with the nearest match, if an op has no such backend; `auto` is one of every op."""
    on_demand = [name for name, modules in ON_DEMAND.items() if op in modules]
    declared = [key.backend for key in KERNELS if key.op == op] or ["reference"]
    known = sorted({"auto", *on_demand, *declared})
    if backend not in known:
        raise SeqmixError(f"{op} has no backend {backend!r}{choices_hint(str(backend), known, 'available')}")


def reference(op: str, paradigm: Paradigm) -> Kernel:
    """Return the reference kernel of a paradigm; the module of the op must have been imported.

    Raises:
        SeqmixError: if no reference is declared.
    """
    for kernel in KERNELS.values():
        if kernel.reference and (kernel.op, kernel.paradigm) == (op, paradigm):
            return kernel
    raise SeqmixError(f"no reference kernel is declared for {op}/{paradigm}: import the module of the op first")


def chosen(op: str, paradigm: Paradigm, backend: str, x: Tensor) -> Kernel:
    """Return the kernel of a backend for inputs like x.

    The reference is returned if the backend is `auto` or lacks this paradigm, or if its kernel `follows_inputs` and x
    has another device or dtype.
    """
    key = Key(op, paradigm, backend)
    if key not in KERNELS and not torch.compiler.is_compiling():
        import_kernels(backend)
    kernel = KERNELS.get(key)
    if kernel is None or (kernel.follows_inputs and (x.device.type != "cpu" or x.dtype not in kernel.tolerances)):
        return reference(op, paradigm)
    return kernel


@cache
def is_installed(library: str) -> bool:
    """True if a library is installed; does not import it."""
    # uninstalling may leave an empty folder behind: Python finds it, but without an origin
    return getattr(find_spec(library), "origin", None) is not None
