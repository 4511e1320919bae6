"""The checks of kernels: each is its op's definition within its tolerance, and gives no wrong number silently."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd.forward_ad import dual_level, make_dual, unpack_dual
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from ...ops.runtime.kernel import Kernel, Probe
from ..check import kernel_check
from ..compare import CheckFailure, Differences, require
from ..gradients import gradients
from ..kernel.case import KernelDraw, Tensors, leaves, takes, wide
from ..kernel.families import FAMILIES
from ..kernel.trial import KernelTrial

FEW = st.integers(1, 9)
"""Lengths where every one costs much, or none shows more than a short one."""


def with_grad(kernel: Kernel, probe: Probe) -> bool:
    """What it takes with gradients."""
    return probe.needs_grad and takes(kernel, probe)


def widest_with_grad(kernel: Kernel, probe: Probe) -> bool:
    """What it takes with gradients, in the dtype that has the most digits of those it takes."""
    return probe.dtype == min(kernel.tolerances, key=lambda dtype: torch.finfo(dtype).eps) and with_grad(kernel, probe)


def in_pieces(kernel: Kernel, probe: Probe) -> bool:
    """What it takes as a whole and as pieces."""
    return probe.final_state and takes(kernel, probe) and takes(kernel, replace(probe, initial_state=True))


def carried_low(kernel: Kernel, probe: Probe) -> bool:
    """What it takes in 16 bits, token by token."""
    low = probe.dtype in (torch.bfloat16, torch.float16)
    plain = not probe.packed and not probe.needs_grad
    return FAMILIES[kernel.op].adds_up and low and plain and in_pieces(kernel, probe)


def calls_no_higher_order_op(kernel: Kernel) -> str | None:
    """No higher-order op."""
    reason = f"{kernel.key} calls a higher-order op, which does not run while ops are watched"
    return reason if kernel.higher_order else None


@kernel_check(
    share=1.0,
    draw=KernelDraw(asks=lambda kernel, probe: not probe.needs_grad and takes(kernel, probe), rare=True, fixed=True),
    use="every call: the numbers are wrong",
)
def outputs_are_the_definitions(trial: KernelTrial) -> None:
    """Output and final state are those of the definition: every element, and shape, dtype and kind of state."""
    trial.compare("against the definition", trial.run(trial.leaves()))


@kernel_check(share=1.0, draw=KernelDraw(asks=with_grad, rare=True, fixed=True), use="training: gradients are wrong")
def gradients_are_the_definitions(trial: KernelTrial) -> None:
    """Gradients of any of the inputs, through output or final state or both, are those of the definition, and with
    gradients the outputs are too."""
    inputs = trial.leaves()
    outputs = trial.run(inputs)
    trial.compare("with gradients, against the definition", outputs, trial.gradients(outputs, inputs))


@kernel_check(
    share=0.5,
    draw=KernelDraw(asks=in_pieces, cut=True, rare=True, fixed=True),
    use="prefill in pieces, decoding after it and backpropagation through states",
)
def a_cut_changes_nothing(trial: KernelTrial) -> None:
    """Tokens in two pieces, the second from the first's final state, give what the definition gives at once: output,
    final state, and gradients through the state between."""
    case, inputs = trial.case, trial.leaves()
    rest = tuple(length - cut for length, cut in zip(case.lengths, case.cuts, strict=True))
    outputs = _in_pieces(trial, inputs, [piece for piece in (case.cuts, rest) if sum(piece)])
    gradients = trial.gradients(outputs, inputs)
    trial.compare("in two pieces, against the definition of the whole", outputs, gradients)


@kernel_check(
    share=0.06,
    draw=KernelDraw(asks=carried_low, tokens=st.just(128)),
    use="long generation in 16 bits: it drifts away from what prefill gives",
)
def a_carried_state_does_not_drift(trial: KernelTrial) -> None:
    """In 16 bits, many tokens one by one, each from the final state before, are as exact as they are at once: a state
    that is rounded at every token drifts."""
    case, inputs = trial.case, trial.leaves()
    outputs = _in_pieces(trial, inputs, [(1,) * case.rows] * case.length)
    trial.compare("one by one, against the definition of the whole", outputs)


@kernel_check(
    share=0.15,
    draw=KernelDraw(rare=True),
    use="reproducible runs, and activation checkpointing, which runs forward twice",
)
def results_are_deterministic(trial: KernelTrial) -> None:
    """Twice the same arguments give the same bits, forward and backward; so does a second backward pass of a graph that
    is retained, or it is an error. Boundaries that were filled again, as a loader's or a graph's are, count."""
    inputs = trial.leaves()
    _require_own_memory(trial)
    _require_boundaries_read(trial)
    outputs = trial.run(inputs)
    first = _with_gradients(outputs, trial.gradients(outputs, inputs, retain_graph=True))
    others = trial.leaves()
    repeated = trial.run(others)
    second = _with_gradients(repeated, trial.gradients(repeated, others))
    try:
        again = _with_gradients({}, trial.gradients(outputs, inputs))
    except Exception:  # of what is retained only in part
        again = {}
    for what, results in (("a second call against the first", second), ("a second backward pass of a graph", again)):
        with Differences(what, 0) as differences:
            for name, tensor in results.items():
                differences.tensor(name, tensor, first[name], trial.case.axes_of(name.removeprefix("the gradient of ")))


@kernel_check(
    share=0.15,
    draw=KernelDraw(rare=True),
    use="using a state again (beam search, a prompt cache), and backward passes that need the inputs",
)
def inputs_are_left_alone(trial: KernelTrial) -> None:
    """No input and no gradient from above is written, not even with its own values, and no result is a view of an
    input; but for a cache, without gradients, where the next is wanted."""
    inputs, before = trial.leaves(), trial.leaves()
    versions = {name: x._version for name, x in inputs.items() if name not in trial.case.consumed}
    memory = {inputs[name].untyped_storage().data_ptr(): name for name in versions if inputs[name].numel()}
    # a contiguous gradient may have a path of its own, which few cases would take
    for contiguous in (True, False) if trial.case.grad else (False,):
        outputs = trial.run(inputs)
        above = {name: x.contiguous() if contiguous else x for name, x in trial.above(outputs).items()}
        passed = {name: (x._version, x.clone()) for name, x in above.items()}
        results = _with_gradients(outputs, trial.gradients(outputs, inputs, above))
        for name, (version, kept) in passed.items():
            same = above[name]._version == version and torch.equal(above[name], kept)
            require(same, f"the gradient from above of {name} was written in place")
        for name, result in results.items():
            shared = memory.get(result.untyped_storage().data_ptr()) if result.numel() else None
            require(shared is None, f"{name} is a view of {shared}")
    for name, version in versions.items():
        same = inputs[name]._version == version and torch.equal(inputs[name].detach(), before[name].detach())
        require(same, f"{name} was written in place")


@kernel_check(
    share=0.2,
    draw=KernelDraw(asks=lambda kernel, probe: not takes(kernel, probe), tokens=FEW, rare=True),
    use="the choice of a kernel: what it cannot compute, it computes wrongly without a word",
)
def what_is_not_taken_is_refused(trial: KernelTrial) -> None:
    """A dtype that is not declared, and whatever `limits` has a reason against, is an error, never a number."""
    inputs = trial.leaves()

    def computed() -> Tensors:
        outputs = trial.run(inputs)
        if roots := [x.abs().sum() for x in outputs.values() if x.requires_grad]:
            torch.autograd.grad(roots, [inputs[name] for name in trial.case.grad], allow_unused=True)
        return outputs

    if (outputs := _unless_refused(computed)) is None:
        return
    reasons = "; ".join(trial.kernel.unsupported(trial.case.probe(trial.device)))
    raise CheckFailure(f"it gave numbers (the output is {outputs['output'].dtype}), and declares: {reasons}")


@kernel_check(
    share=0.1,
    draw=KernelDraw(asks=with_grad, tokens=FEW),
    use="forward-mode differentiation (torch.func.jvp): its results are silently wrong",
)
def tangents_are_right_or_refused(trial: KernelTrial) -> None:
    """Forward-mode differentiation is that of the definition, or an error: of a custom op that has a backward formula
    alone, torch would take the tangent for zero."""
    case, cpu, randn = trial.case, torch.device("cpu"), trial.case.randn()
    given = {name: wide(x) for name, x in case.inputs(cpu).items()}
    # relative to the numbers themselves; a log-decay of -inf stays one
    sizes = {name: 1 if name == "log_decay" else given[name].abs() for name in case.grad}
    directions = {name: randn(given[name].shape) * size for name, size in sizes.items()}

    def tangents(function: Callable[[Tensors], Tensors], inputs: Tensors) -> Tensors:
        with dual_level():
            # a dual cannot be a view of numbers that are repeated
            primals = {name: inputs[name].clone(memory_format=torch.contiguous_format) for name in directions}
            duals = {name: make_dual(x, directions[name].to(x)) for name, x in primals.items()}
            outputs = {name: x for name, x in function(inputs | duals).items() if x.is_floating_point()}
            pairs = {name: unpack_dual(x) for name, x in outputs.items()}
        return {name: torch.zeros_like(x) if tangent is None else tangent for name, (x, tangent) in pairs.items()}

    exact = tangents(case.define, given)
    if (actual := _unless_refused(lambda: tangents(trial.run, case.inputs(trial.device)))) is None:
        return
    # a tangent that is missing is all wrong; how exact one is, is not declared
    with Differences("tangents against the definition's", 0.1) as differences:
        for name, tangent in exact.items():
            size = trial.exact.outputs_terms[name] + tangent.abs() + 10 * torch.finfo(case.dtype_of(name)).tiny
            differences.close(
                f"the tangent of {name}", actual[name], tangent, case.dtype_of(name), size, case.axes_of(name)
            )


@kernel_check(
    share=0.1,
    draw=KernelDraw(asks=widest_with_grad, tokens=FEW),
    use="penalties on gradients, and Hessians: they are silently wrong",
)
def second_derivatives_are_right_or_refused(trial: KernelTrial) -> None:
    """Second derivatives are those of the definition, or an error: a backward pass that is computed of bare numbers
    would leave them out."""
    case, cpu, randn = trial.case, torch.device("cpu"), trial.case.randn()
    given = {name: wide(x) for name, x in case.inputs(cpu).items()}
    directions = {name: randn(given[name].shape) for name in case.grad}

    def second(function: Callable[[Tensors], Tensors], inputs: Tensors) -> Tensors:
        outputs, varied = function(inputs), {name: inputs[name] for name in case.grad}
        above = {
            name: case.cotangent(name, outputs[name].detach(), cpu).to(outputs[name]) for name in case.differentiated
        }
        first = gradients(outputs, above, varied, create_graph=True)
        return gradients(first, {name: direction.to(first[name]) for name, direction in directions.items()}, varied)

    exact = second(case.define, leaves(given, case.grad))
    if (actual := _unless_refused(lambda: second(trial.run, trial.leaves()))) is None:
        return
    lost = 100 * torch.finfo(case.dtype).eps
    with Differences("second derivatives against the definition's", 0.1) as differences:
        for name, derivative in exact.items():
            size = derivative.abs() + derivative.abs().mean() + lost
            shown = f"the second derivative of {name}"
            differences.close(shown, actual[name], derivative, case.dtype_of(name), size, case.axes_of(name))


@kernel_check(
    calls_no_higher_order_op,
    share=0.04,
    draw=KernelDraw(tokens=FEW),
    use="torch.compile: compiled code is refused, or differs from eager",
)
def dispatched_ops_pass_opcheck(trial: KernelTrial) -> None:
    """`torch.library.opcheck` has nothing against the custom ops that a call dispatches, forward and backward, with the
    arguments that they get: schemas, fakes, autograd formulas, and compiled with dynamic shapes."""
    inputs = trial.leaves()
    with _CustomOps() as dispatched:
        outputs = trial.run(inputs)
        trial.gradients(outputs, inputs)
    for op, (args, kwargs) in dispatched.calls.items():
        for test, result in opcheck(op, args, kwargs, raise_exception=False).items():
            if result != "SUCCESS":
                lines = [line for line in str(result).splitlines() if line.strip()]
                raise CheckFailure("\n".join([f"{op} fails opcheck's {test}:", *(f"  {line}" for line in lines[:8])]))


def _unless_refused(call: Callable[[], Tensors]) -> Tensors | None:
    """What a call gives; None where it raises an error, in any words, torch's own too."""
    try:
        return call()
    except CheckFailure:
        raise
    except Exception:
        return None


def _in_pieces(trial: KernelTrial, inputs: Tensors, pieces: list[tuple[int, ...]]) -> Tensors:
    """The whole as consecutive pieces, each from the state of the one before."""
    state: Tensors = {}
    before, outputs = None, []
    for part, tokens in trial.case.parts(inputs, pieces):
        before = part if before is None else part.continued(before)
        found = trial.run(inputs | state | tokens, before)
        outputs.append(before.sequences(found["output"]))
        state = {name: x for name, x in found.items() if name != "output"}
    whole = [torch.cat(parts) for parts in zip(*outputs, strict=True)]
    return {"output": trial.case.segment(whole), **state}


class _CustomOps(TorchDispatchMode):
    """Records the first call of every op that is not torch's own."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[Any, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace not in ("aten", "prim", "prims"):
            # without grad mode, as in a backward pass, no gradient of a gradient is asked for
            graph = torch.is_grad_enabled()
            given = (args, kwargs or {})
            given = tree_map_only(Tensor, lambda x: x.detach().requires_grad_(x.requires_grad and graph), given)
            self.calls.setdefault(func, given)
        return func(*args, **(kwargs or {}))


def _require_own_memory(trial: KernelTrial) -> None:
    """No result without gradients is a buffer that a later call of the same shapes fills again."""
    case = replace(trial.case, grad=())
    earlier = trial.run(case.inputs(trial.device), case)
    kept = {name: x.clone() for name, x in earlier.items()}
    later = replace(case, seed=case.seed + 1)
    trial.run(later.inputs(trial.device), later)
    for name, x in earlier.items():
        require(torch.equal(x.nan_to_num(), kept[name].nan_to_num()), f"a later call writes over {name}")


def _require_boundaries_read(trial: KernelTrial) -> None:
    """What was made of boundaries is not used for others that are written into the same memory."""
    case = replace(trial.case, grad=())
    other = replace(case, lengths=case.lengths[::-1])
    call, later = (of.call(of.inputs(trial.device)) for of in (case, other))
    boundaries = getattr(call, "cu_seqlens", None)  # softmax is given what was made of them
    if boundaries is None:
        return
    expected, _ = trial.kernel.function(later)
    trial.kernel.function(call)
    again, _ = trial.kernel.function(later._replace(cu_seqlens=boundaries.copy_(later.cu_seqlens)))
    with Differences(
        "with boundaries written over those of the call before, against boundaries of their own", 0
    ) as differences:
        differences.tensor("the output", again, expected, case.axes_of("output"))


def _with_gradients(outputs: Tensors, gradients: Tensors) -> Tensors:
    return outputs | {f"the gradient of {name}": x for name, x in gradients.items()}
