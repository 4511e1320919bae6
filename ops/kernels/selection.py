"""Which backend computes a layer: resolved once, when a model is built, for its device and its activations' dtype.

A name means that backend wherever it has a kernel, and the reference in the paradigms it has none for. `auto` is the
first of `AUTO` whose kernel can run, else the reference. A kernel of `AUTO` has a trial first, on the GPU itself and as
training and decoding will call it.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from functools import cache
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from ...registry import SeqmixError, nearest
from ..recurrence.family import Recurrence
from ..runtime.kernel import KERNELS, ON_DEMAND, Kernel, Probe, find, reference
from ..runtime.paradigm import Paradigm

AUTO: Mapping[str, Mapping[Paradigm, Sequence[str]]] = {
    "decay": {Paradigm.CHUNKWISE: ("triton", "fla"), Paradigm.RECURRENT: ("triton",)},
    "delta": {Paradigm.CHUNKWISE: ("triton",)},
}
"""The backends that `auto` tries on a GPU, in this order, by op. A backend that is named has the same trial."""

TRIAL_LENGTH = 259
"""Tokens of a trial: whole chunks, and a ragged one."""

log = logging.getLogger("seqmix")


@cache  # one trial and one log line for all layers with the same question
def choose(op: str, backend: str, probe: Probe) -> Mapping[Paradigm, str]:
    """The name of the backend that computes each paradigm where the configuration says `backend`, possibly `auto`.

    Args:
        op: the op's name.
        backend: what the configuration says.
        probe: what its kernels will be asked.

    Raises:
        SeqmixError: a named backend has no kernel of this op, or none that can run what it will be asked: its reasons.
    """
    fallback = reference(op, Paradigm.CHUNKWISE).backend
    found = dict.fromkeys(Paradigm, fallback)
    where = f"on {probe.device} in {probe.dtype}"
    if backend == "auto":
        for paradigm, names in AUTO.get(op, {}).items() if probe.device.type == "cuda" else ():
            reasons = []
            for name in names:
                kernel = find(op, paradigm, name)
                reason = "; ".join(kernel.unsupported(probe)) or disagreement(kernel, probe)
                if reason is None:
                    log.info("%s %s %s: %s", op, paradigm, where, name)
                    found[paradigm] = name
                    break
                reasons.append(reason)
            else:
                log.warning("%s %s %s: the reference, since %s", op, paradigm, where, "; ".join(reasons))
    elif backend != fallback:
        reasons = {kernel.paradigm: kernel.unsupported(probe) for kernel in _kernels(op, backend)}
        for paradigm in AUTO.get(op, {}) if probe.device.type == "cuda" else ():
            if reasons.get(paradigm) == [] and (reason := disagreement(find(op, paradigm, backend), probe)):
                raise SeqmixError(f"backend {backend} cannot run: {reason}")
        if all(reasons.values()):
            raise SeqmixError(f"backend {backend} cannot run: {'; '.join(next(iter(reasons.values())))}")
        for paradigm, why in reasons.items():
            if why:
                log.warning("%s %s %s: the reference, since %s", op, paradigm, where, "; ".join(why))
            else:
                found[paradigm] = backend
    return MappingProxyType(found)


def described(op: str, backends: Mapping[Paradigm, str]) -> str:
    """The backend that was chosen, in few words: with its paradigms where it has kernels of others that cannot run."""
    fallback = reference(op, Paradigm.CHUNKWISE).backend
    chosen = {paradigm: name for paradigm, name in backends.items() if name != fallback}
    if not chosen:
        return fallback
    (name,) = set(chosen.values())
    every = {kernel.paradigm for kernel in _kernels(op, name)}
    return name if set(chosen) == every else f"{name} ({', '.join(sorted(chosen))})"


def _kernels(op: str, backend: str) -> list[Kernel]:
    """All kernels of a backend; a SeqmixError where there is none."""
    for paradigm in Paradigm if backend in ON_DEMAND else ():
        try:
            find(op, paradigm, backend)
        except SeqmixError:
            continue
    found = [kernel for key, kernel in KERNELS.items() if (key.op, key.backend) == (op, backend)]
    if not found:
        later = (name for name, modules in ON_DEMAND.items() if op in modules)
        known = sorted({"auto", *later, *(key.backend for key in KERNELS if key.op == op)})
        raise SeqmixError(f"{op} has no backend {backend!r}; there are {', '.join(known)}{nearest(backend, known)}")
    return found


def disagreement(kernel: Kernel, probe: Probe) -> str | None:
    """Run a kernel of the decay or delta family on a few tokens, forward and backward; None if it is as the reference.

    Rates that are fixed per head are tried as those of retention, without a gradient, too: that is another kernel. A
    recurrent one reads one token, forward. This is not the conformance kit; but what a compiler or a driver gets wrong
    is wrong by far more.

    Raises:
        SeqmixError: after its failure the device does not compute any more, as after an illegal access.
    """
    step = kernel.paradigm is Paradigm.RECURRENT
    for learned in (False,) if step else (True, False) if probe.log_decay == "H" else (True,):
        try:
            reason = _difference(kernel, probe, _trial(kernel.op, probe, 1 if step else TRIAL_LENGTH, learned))
        except Exception as error:  # whatever a compiler or a driver raises
            short = f"{type(error).__name__}: {(str(error) or 'no reason').splitlines()[0]}"
            reason = f"{kernel.key} failed in a trial: {short}"
            if not _computes(probe.device):
                raise SeqmixError(
                    f"{reason}; {probe.device} does not compute any more in this process: start it again with "
                    f"`backend: {reference(kernel.op, Paradigm.CHUNKWISE).backend}`"
                ) from error
        if reason is not None:
            return reason
    return None


def _computes(device: torch.device) -> bool:
    """Whether a device still does, after an error."""
    try:
        return float(torch.ones(2, device=device).sum()) == 2
    except Exception:
        return False


def _difference(kernel: Kernel, probe: Probe, tensors: Mapping[str, Tensor]) -> str | None:
    """What is not the reference's."""
    results = _results(kernel, probe, tensors)
    expected = _results(reference(kernel.op, kernel.paradigm), probe, tensors)
    for name, result in results.items():
        exact = expected[name].double()
        error = float((result.double() - exact).norm() / exact.norm())
        if not error <= 10 * kernel.tolerances[probe.dtype]:
            return f"{kernel.key} was wrong in a trial: {name} is off by {error:.1e} of its norm"
    return None


def _trial(op: str, probe: Probe, length: int, learned: bool) -> dict[str, Tensor]:
    """Two sequences of two heads of random numbers, with a layer's strides: q, k and v are columns of one projection.

    Every tensor wants its gradient, decays where they are learned; but not of one token: that is decoding. Keys of the
    delta rule have norm 1.
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
        log_decay = (-random(probe.log_decay, wide).detach().abs() / 16).requires_grad_(length > 1 and learned)
        tensors["log_decay"] = log_decay
    if op == "delta":
        tensors["k"] = F.normalize(tensors["k"], dim=-1)
        tensors["beta"] = random("B T H", wide).detach().sigmoid().requires_grad_(length > 1)
    tensors["initial_state"] = random("B H K V", wide)
    return tensors


def _results(kernel: Kernel, probe: Probe, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Output, final state and all gradients that are wanted."""
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
    wanted = {name: tensor for name, tensor in tensors.items() if tensor.requires_grad}
    if wanted:
        for name, gradient in zip(wanted, torch.autograd.grad(loss, list(wanted.values())), strict=True):
            results[f"the gradient of {name}"] = gradient
    return results
