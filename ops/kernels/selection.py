"""Choice of the kernel backend of a layer, made once when a model is built, for its device and activations' dtype.

A backend that is named in the configuration computes every paradigm it has a kernel for; the reference computes the
others. `auto` means, per paradigm, the first backend of `AUTO` whose kernel can run, else the reference. On a GPU,
kernels of `AUTO` must first pass a trial on the device itself, with calls as in training and decoding. On a CPU, `auto`
means the native kernel, if the op has one and it can be compiled.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from functools import cache
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from ...registry import SeqmixError
from ..recurrence.family import Recurrence
from ..runtime.kernel import KERNELS, ON_DEMAND, Kernel, Probe, find, reference, require_backend
from ..runtime.paradigm import Paradigm
from .native.build import is_off

AUTO: Mapping[str, Mapping[Paradigm, Sequence[str]]] = {
    "decay": {Paradigm.CHUNKWISE: ("triton", "fla"), Paradigm.RECURRENT: ("triton",)},
    "delta": {Paradigm.CHUNKWISE: ("triton",)},
}
"""Backends that `auto` tries on a GPU, in this order, by op and paradigm. A backend that a configuration names must
pass the same trial."""

UNMEASURED = ("triton",)
"""Backends of `AUTO` with kernels whose speed on a GPU is unknown: a warning says so when `auto` chooses one."""

_LOOPS = (Paradigm.RECURRENT, Paradigm.CHUNKWISE)
AUTO_ON_CPU: Mapping[str, Sequence[Paradigm]] = {
    "decay": _LOOPS,
    "delta": _LOOPS,
    "dplr": _LOOPS,
    "diagonal_scan": _LOOPS,
    "log_scan": _LOOPS,
    "scan": _LOOPS,
    "selective_scan": _LOOPS,
    "slstm": (Paradigm.RECURRENT,),
    "m2rnn": (Paradigm.RECURRENT,),
    "short_convolution": (Paradigm.PARALLEL,),
}
"""Paradigms that `auto` computes with native kernels on a CPU, by op."""

REFERENCE_ON_CPU = {("decay", Paradigm.CHUNKWISE): (None, "H")}
"""Kinds of log-decays, by op and paradigm, for which `auto` keeps the reference on a CPU: with these it is matrix
products alone."""

TRIAL_LENGTH = 259
"""Tokens of a trial: several whole chunks and an incomplete one."""

log = logging.getLogger("seqmix")


@cache  # one trial and one log line for all layers with the same arguments
def choose(op: str, backend: str, probe: Probe) -> Mapping[Paradigm, str]:
    """Return the backend that computes each paradigm.

    Args:
        op: name of the op.
        backend: the backend in the configuration, or `auto`.
        probe: description of the calls that its kernels will receive.

    Raises:
        SeqmixError: the named backend has no kernel of this op, none of its kernels can run the calls, or one of them
            fails its trial.
    """
    fallback = fallback_of(op)
    chosen = dict.fromkeys(Paradigm, fallback)
    where = f"on {probe.device} in {probe.dtype}"
    if backend == "auto" and probe.device.type == "cpu" and not is_off():
        for paradigm in AUTO_ON_CPU.get(op, ()):
            if probe.log_decay in REFERENCE_ON_CPU.get((op, paradigm), ()):
                continue
            reasons = find(op, paradigm, "native").unsupported(probe)  # logs a missing compiler
            log.debug("%s %s %s: %s", op, paradigm, where, "; ".join(reasons) or "native")
            chosen[paradigm] = fallback if reasons else "native"
    elif backend == "auto":
        for paradigm, names in AUTO.get(op, {}).items() if probe.device.type == "cuda" else ():
            reasons = []
            for name in names:
                kernel = find(op, paradigm, name)
                reason = "; ".join(kernel.unsupported(probe)) or disagreement(kernel, probe)
                if reason is None:
                    log.info("%s %s %s: %s", op, paradigm, where, name)
                    if name in UNMEASURED:
                        _warn_unmeasured(name)
                    chosen[paradigm] = name
                    break
                reasons.append(reason)
            else:
                log.warning("%s %s %s: using the reference, because %s", op, paradigm, where, "; ".join(reasons))
    elif backend != fallback:
        reasons = {kernel.paradigm: kernel.unsupported(probe) for kernel in _kernels_of(op, backend)}
        for paradigm in AUTO.get(op, {}) if probe.device.type == "cuda" else ():
            if reasons.get(paradigm) == [] and (reason := disagreement(find(op, paradigm, backend), probe)):
                raise SeqmixError(f"backend {backend} cannot run: {reason}; use backend={fallback}")
        if all(reasons.values()):
            reason = "; ".join(next(iter(reasons.values())))
            raise SeqmixError(f"backend {backend} cannot run: {reason}; use backend={fallback}")
        for paradigm, paradigm_reasons in reasons.items():
            if paradigm_reasons:
                message = "%s %s %s: using the reference, because %s"
                log.warning(message, op, paradigm, where, "; ".join(paradigm_reasons))
            else:
                chosen[paradigm] = backend
    return MappingProxyType(chosen)


@cache  # one line per process
def _warn_unmeasured(backend: str) -> None:
    log.warning(
        "backend auto chose %s, whose kernels passed a trial here but have not been measured on a GPU yet; "
        "set backend=reference, or backend=fla where a mixer has it, to use others, or backend=%s to hide this warning",
        backend,
        backend,
    )


def fallback_of(op: str) -> str:
    """Return the name of the backend of an op's reference kernels."""
    return next(kernel.backend for kernel in KERNELS.values() if kernel.op == op and kernel.reference)


def describe_backends(op: str, backends: Mapping[Paradigm, str]) -> str:
    """Return a short description of the chosen backend, such as "triton" or "triton (recurrent)".

    Paradigms are listed only if the backend has kernels of other paradigms that are not in use.
    """
    fallback = fallback_of(op)
    chosen = {paradigm: name for paradigm, name in backends.items() if name != fallback}
    if not chosen:
        return fallback
    (name,) = set(chosen.values())
    supported = {kernel.paradigm for kernel in _kernels_of(op, name)}
    return name if set(chosen) == supported else f"{name} ({', '.join(sorted(chosen))})"


def _kernels_of(op: str, backend: str) -> list[Kernel]:
    """Return all kernels that a backend has of an op.

    Raises:
        SeqmixError: there are none.
    """
    for paradigm in Paradigm if backend in ON_DEMAND else ():
        try:
            find(op, paradigm, backend)
        except SeqmixError:
            continue
    require_backend(op, backend)
    return [kernel for key, kernel in KERNELS.items() if (key.op, key.backend) == (op, backend)]


def disagreement(kernel: Kernel, probe: Probe) -> str | None:
    """Compare a kernel of the decay or delta family with the reference in a trial.

    Return a sentence that says what is wrong, or None.

    The trial runs a few tokens forward and backward; a recurrent kernel runs one token forward. Decays per head are
    tried with and without a gradient, as these are different kernels (retention has none). A trial does not replace the
    conformance kit, but errors of a compiler or a driver are far larger than the kernel's tolerance.

    Raises:
        SeqmixError: the kernel failed, and the device does not work any more, as after an illegal memory access.
    """
    one_token = kernel.paradigm is Paradigm.RECURRENT
    length = 1 if one_token else TRIAL_LENGTH
    for decay_needs_grad in (False,) if one_token else (True, False) if probe.log_decay == "H" else (True,):
        try:
            reason = _compare_with_reference(kernel, probe, _trial_inputs(kernel.op, probe, length, decay_needs_grad))
        except Exception as error:  # whatever a compiler or a driver raises
            short = f"{type(error).__name__}: {(str(error) or 'no reason').splitlines()[0]}"
            reason = f"{kernel.key} failed in a trial: {short}"
            if not _device_works(probe.device):
                raise SeqmixError(
                    f"{reason}; {probe.device} no longer works in this process: restart the process with "
                    f"`backend: {fallback_of(kernel.op)}`"
                ) from error
        if reason is not None:
            return reason
    return None


def _device_works(device: torch.device) -> bool:
    """Return True if a device can still compute after an error."""
    try:
        return float(torch.ones(2, device=device).sum()) == 2
    except Exception:
        return False


def _compare_with_reference(kernel: Kernel, probe: Probe, tensors: Mapping[str, Tensor]) -> str | None:
    """Return a sentence about the first result of a kernel that differs too much from the reference, or None."""
    results = _run(kernel, probe, tensors)
    expected = _run(reference(kernel.op, kernel.paradigm), probe, tensors)
    for name, result in results.items():
        exact = expected[name].double()
        error = float((result.double() - exact).norm() / exact.norm())
        if not error <= 10 * kernel.tolerances[probe.dtype]:
            return f"{kernel.key} was wrong in a trial: {name} has a relative error of {error:.1e}"
    return None


def _trial_inputs(op: str, probe: Probe, length: int, decay_needs_grad: bool) -> dict[str, Tensor]:
    """Return random inputs of two sequences with two heads.

    Strides are those of a layer: q, k and v are columns of one projection. Keys of the delta rule have norm 1. Inputs
    of several tokens require gradients (decays only if `decay_needs_grad`); one token is a decoding step without.
    """
    generator = torch.Generator().manual_seed(0)
    wide = torch.promote_types(probe.dtype, torch.float32)
    sizes = {"B": 2, "T": length, "H": 2, "K": probe.key_width, "V": probe.value_width}

    def random(dimensions: str, dtype: torch.dtype) -> Tensor:
        shape = [math.prod(sizes[name] for name in joined.split("*")) for joined in dimensions.split()]
        return torch.randn(shape, generator=generator).to(probe.device, dtype).requires_grad_(length > 1)

    widths = [sizes["H"] * sizes[name] for name in "KKV"]
    parts = [random(f"B T H*{name}", probe.dtype) for name in "KKV"]
    columns = torch.cat(parts, dim=2).split(widths, dim=2)
    tensors = {name: x.unflatten(2, (sizes["H"], -1)) for name, x in zip("qkv", columns, strict=True)}
    if probe.log_decay is not None:
        log_decay = (-random(probe.log_decay, wide).detach().abs() / 16).requires_grad_(length > 1 and decay_needs_grad)
        tensors["log_decay"] = log_decay
    if op == "delta":
        tensors["k"] = F.normalize(tensors["k"], dim=-1)
        tensors["beta"] = random("B T H", wide).detach().sigmoid().requires_grad_(length > 1)
    tensors["initial_state"] = random("B H K V", wide)
    return tensors


def _run(kernel: Kernel, probe: Probe, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Run a kernel, and return its output, final state and all required gradients by name."""
    call = Recurrence(
        q=tensors["q"],
        k=tensors["k"],
        v=tensors["v"],
        log_decay=tensors.get("log_decay"),
        beta=tensors.get("beta"),
        initial_state=tensors.get("initial_state"),
        cu_seqlens=None,
        boundaries=None,
        scale=tensors["q"].shape[3] ** -0.5,
        chunk_size=128,
        output_final_state=True,
        wide_output=probe.wide_output,
    )
    with torch.enable_grad():
        output, state = kernel.function(call)
        loss = output.double().square().mean() + state.double().square().mean()
    results = {"output": output.detach(), "final state": state.detach()}
    leaves = {name: tensor for name, tensor in tensors.items() if tensor.requires_grad}
    if leaves:
        for name, gradient in zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True):
            results[f"the gradient of {name}"] = gradient
    return results
