"""Which backend computes a layer: settled once, when a model is built, for its device and its activations' dtype.

A name means that backend wherever it has a kernel, and the reference in the paradigms it has none for. `auto` is the
first of `AUTO` whose kernel can run and passes a trial on the device itself, else the reference.
"""

import logging
from collections.abc import Mapping, Sequence
from functools import cache

import torch
from torch import Tensor

from ...registry import SeqmixError, nearest
from ..paradigm import Paradigm
from .kernels import KERNELS, ON_DEMAND, Kernel, Probe, find, reference

AUTO: Mapping[str, Sequence[tuple[Paradigm, str]]] = {"decay": ((Paradigm.CHUNKWISE, "triton"),)}
"""The kernels that `auto` tries on a GPU, by op."""

TRIAL_LENGTH = 259
"""Tokens of a trial: whole chunks, and a ragged one."""

log = logging.getLogger("seqmix")


@cache  # one trial, and one line of the log, for all layers that ask the same
def choose(op: str, backend: str, probe: Probe) -> str:
    """The name of the backend that `backend`, maybe `auto`, means here.

    Args:
        op: the op's name.
        backend: what the configuration says.
        probe: what its kernels will be asked.

    Raises:
        SeqmixError: a named backend has no kernel of this op, or cannot run what it will be asked: its reasons.
    """
    fallback = reference(op, Paradigm.CHUNKWISE).backend
    if backend == "auto":
        for paradigm, name in AUTO.get(op, ()) if probe.device.type == "cuda" else ():
            kernel = find(op, paradigm, name)
            reason = "; ".join(kernel.unsupported(probe)) or disagreement(kernel, probe)
            if reason is None:
                log.info("%s on %s in %s: %s", op, probe.device, probe.dtype, kernel.key)
                return name
            log.warning("%s on %s in %s: the reference, since %s", op, probe.device, probe.dtype, reason)
        return fallback
    if backend != fallback:
        kernels = _kernels(op, backend)
        reasons = [kernel.unsupported(probe) for kernel in kernels]
        if all(reasons):
            raise SeqmixError(f"backend {backend} cannot run: {'; '.join(reasons[0])}")
    return backend


def _kernels(op: str, backend: str) -> list[Kernel]:
    """All kernels of a backend, of which there is one at least.

    Raises:
        SeqmixError: there is none.
    """
    for paradigm in Paradigm if backend in ON_DEMAND else ():
        try:
            find(op, paradigm, backend)
        except SeqmixError:
            continue
    found = [kernel for key, kernel in KERNELS.items() if (key.op, key.backend) == (op, backend)]
    if not found:
        known = sorted({"auto", *ON_DEMAND, *(key.backend for key in KERNELS if key.op == op)})
        raise SeqmixError(f"{op} has no backend {backend!r}; there are {', '.join(known)}{nearest(backend, known)}")
    return found


def disagreement(kernel: Kernel, probe: Probe) -> str | None:
    """Run a kernel of the decay family on a few tokens, forward and backward; None if it does what the reference does.

    Far from a proof, which is the conformance kit's; but what a compiler or a driver gets wrong is wrong by far more.
    """
    tensors = _trial(probe)
    try:
        results = _results(kernel, tensors)
    except Exception as error:  # whatever a compiler or a driver raises
        return f"{kernel.key} failed in a trial: {type(error).__name__}: {(str(error) or 'no reason').splitlines()[0]}"
    expected = _results(reference(kernel.op, kernel.paradigm), tensors)
    for name, result in results.items():
        exact = expected[name].double()
        error = float((result.double() - exact).norm() / exact.norm())
        if not error <= 10 * kernel.tolerances[probe.dtype]:
            return f"{kernel.key} was wrong in a trial: {name} is off by {error:.1e} of its norm"
    return None


def _trial(probe: Probe) -> dict[str, Tensor]:
    """Two sequences of two heads of random numbers; every tensor wants its gradient."""
    generator = torch.Generator().manual_seed(0)
    wide = torch.promote_types(probe.dtype, torch.float32)
    sizes = {"B": 2, "T": TRIAL_LENGTH, "H": 2, "K": probe.key_width, "V": probe.value_width}

    def random(dimensions: str, dtype: torch.dtype) -> Tensor:
        return torch.randn([sizes[name] for name in dimensions.split()], generator=generator).to(probe.device, dtype)

    tensors = {"q": "B T H K", "k": "B T H K", "v": "B T H V"}
    tensors = {name: random(dimensions, probe.dtype) for name, dimensions in tensors.items()}
    if probe.log_decay is not None:
        tensors["log_decay"] = -random(probe.log_decay, wide).abs() / 16
    tensors["initial_state"] = random("B H K V", wide)
    return {name: tensor.requires_grad_() for name, tensor in tensors.items()}


def _results(kernel: Kernel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Output, final state and all gradients."""
    q, k, v, initial_state = (tensors[name] for name in ("q", "k", "v", "initial_state"))
    with torch.enable_grad():
        output, state = kernel.function(
            q, k, v, tensors.get("log_decay"), initial_state=initial_state, output_final_state=True
        )
        loss = output.double().square().mean() + state.double().square().mean()
    gradients = torch.autograd.grad(loss, list(tensors.values()))
    named = {f"the gradient of {name}": x for name, x in zip(tensors, gradients, strict=True)}
    return {"output": output.detach(), "final state": state.detach(), **named}
