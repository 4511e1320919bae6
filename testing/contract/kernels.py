"""Checks of kernels: a kernel equals the definition of its op within its tolerance, or raises an error."""

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
from ..kernel.case import KernelDraw, Tensors, leaves, supports, to_float64
from ..kernel.families import FAMILIES
from ..kernel.trial import KernelTrial

FEW = st.integers(1, 9)
"""Strategy of lengths, in tokens, for checks that are expensive, or to which long segments add nothing."""


def with_grad(kernel: Kernel, probe: Probe) -> bool:
    """Return True for a probe with gradients, if the kernel supports its calls."""
    return probe.needs_grad and supports(kernel, probe)


def widest_with_grad(kernel: Kernel, probe: Probe) -> bool:
    """Return True for a probe with gradients in the kernel's most exact dtype, if the kernel supports its calls."""
    return probe.dtype == min(kernel.tolerances, key=lambda dtype: torch.finfo(dtype).eps) and with_grad(kernel, probe)


def in_pieces(kernel: Kernel, probe: Probe) -> bool:
    """Return True if the kernel supports the calls that a probe describes, both at once and in pieces."""
    return probe.final_state and supports(kernel, probe) and supports(kernel, replace(probe, initial_state=True))


def token_by_token_in_16_bits(kernel: Kernel, probe: Probe) -> bool:
    """Return True for a probe in 16 bits, neither packed nor with gradients, if the kernel can run token by token.

    Only ops whose state is a sum over tokens count.
    """
    low = probe.dtype in (torch.bfloat16, torch.float16)
    plain = not probe.packed and not probe.needs_grad
    return FAMILIES[kernel.op].state_is_sum and low and plain and in_pieces(kernel, probe)


def calls_no_higher_order_op(kernel: Kernel) -> str | None:
    """No higher-order op."""
    reason = f"{kernel.key} calls a higher-order op, which does not run in a dispatch mode that records ops"
    return reason if kernel.higher_order else None


@kernel_check(
    share=1.0,
    draw=KernelDraw(
        runs_on=lambda kernel, probe: not probe.needs_grad and supports(kernel, probe), rare=True, fixed=True
    ),
    use="every call: the numbers are wrong",
)
def outputs_are_the_definitions(trial: KernelTrial) -> None:
    """Output and final state equal those of the definition: every element, shape and dtype, and the class of the
    state."""
    trial.compare("against the definition", trial.run(trial.leaves()))


@kernel_check(share=1.0, draw=KernelDraw(runs_on=with_grad, rare=True, fixed=True), use="training: gradients are wrong")
def gradients_are_the_definitions(trial: KernelTrial) -> None:
    """Gradients with respect to any inputs, through the output, the final state or both, equal those of the definition.
    So do the outputs of calls with gradients."""
    inputs = trial.leaves()
    outputs = trial.run(inputs)
    trial.compare("with gradients, against the definition", outputs, trial.gradients(outputs, inputs))


@kernel_check(
    share=0.5,
    draw=KernelDraw(runs_on=in_pieces, cut=True, rare=True, fixed=True),
    use="prefill in pieces, decoding after it, and backpropagation through states: results are wrong",
)
def a_cut_changes_nothing(trial: KernelTrial) -> None:
    """Two pieces, the second from the final state of the first, equal the definition of the whole: output, final state,
    and gradients through the state between them."""
    case, inputs = trial.case, trial.leaves()
    rest = tuple(length - cut for length, cut in zip(case.lengths, case.cuts, strict=True))
    outputs = _in_pieces(trial, inputs, [piece for piece in (case.cuts, rest) if sum(piece)])
    gradients = trial.gradients(outputs, inputs)
    trial.compare("in two pieces, against the definition of the whole", outputs, gradients)


@kernel_check(
    share=0.06,
    draw=KernelDraw(runs_on=token_by_token_in_16_bits, tokens=st.just(128)),
    use="long generation in 16 bits: it drifts away from the results of prefill",
)
def a_carried_state_does_not_drift(trial: KernelTrial) -> None:
    """In 16 bits, the results of many tokens that are processed one by one, each from the state before it, are as exact
    as those of all tokens at once. If a state is rounded at every token, they drift away."""
    case, inputs = trial.case, trial.leaves()
    outputs = _in_pieces(trial, inputs, [(1,) * case.rows] * case.length)
    trial.compare("one by one, against the definition of the whole", outputs)


@kernel_check(
    share=0.15,
    draw=KernelDraw(rare=True),
    use="reproducible runs, and activation checkpointing, which runs forward twice: results differ",
)
def results_are_deterministic(trial: KernelTrial) -> None:
    """The same arguments give the same bits, forward and backward. A second backward pass through a retained graph
    gives the same bits, or raises an error. Document boundaries that are written over earlier ones in the same
    tensor, as by a data loader or a CUDA graph, take effect."""
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
    except Exception:  # the kernel may free what its backward pass needs: an error is allowed
        again = {}
    for what, results in (("a second call against the first", second), ("a second backward pass of a graph", again)):
        with Differences(what, 0) as differences:
            for name, tensor in results.items():
                differences.tensor(name, tensor, first[name], trial.case.axes_of(name.removeprefix("the gradient of ")))


@kernel_check(
    share=0.15,
    draw=KernelDraw(rare=True),
    use="reusing a state (beam search, a prompt cache), and backward passes that need the inputs: values are lost",
)
def inputs_are_left_alone(trial: KernelTrial) -> None:
    """A call writes neither into an input nor into an upstream gradient, not even the same values, and no result is a
    view of an input. The exception is a cache, if the call has no gradients and returns the next cache."""
    inputs, before = trial.leaves(), trial.leaves()
    versions = {name: x._version for name, x in inputs.items() if name not in trial.case.overwritable}
    memory = {inputs[name].untyped_storage().data_ptr(): name for name in versions if inputs[name].numel()}
    # contiguous gradients may have their own code path, and are seldom drawn
    for contiguous in (True, False) if trial.case.grad else (False,):
        outputs = trial.run(inputs)
        upstream = {name: x.contiguous() if contiguous else x for name, x in trial.upstream(outputs).items()}
        saved = {name: (x._version, x.clone()) for name, x in upstream.items()}
        results = _with_gradients(outputs, trial.gradients(outputs, inputs, upstream))
        for name, (version, values) in saved.items():
            same = upstream[name]._version == version and torch.equal(upstream[name], values)
            require(same, f"the upstream gradient of {name} was written in place")
        for name, result in results.items():
            input_name = memory.get(result.untyped_storage().data_ptr()) if result.numel() else None
            require(input_name is None, f"{name} is a view of the input {input_name}")
    for name, version in versions.items():
        same = inputs[name]._version == version and torch.equal(inputs[name].detach(), before[name].detach())
        require(same, f"the input {name} was written in place")


@kernel_check(
    share=0.2,
    draw=KernelDraw(runs_on=lambda kernel, probe: not supports(kernel, probe), tokens=FEW, rare=True),
    use="the choice of a kernel: a call outside its limits gives wrong numbers silently",
)
def what_is_not_taken_is_refused(trial: KernelTrial) -> None:
    """A call in a dtype that is not declared, or one that `limits` has a reason against, raises an error."""
    inputs = trial.leaves()

    def run_with_gradients() -> Tensors:
        outputs = trial.run(inputs)
        if roots := [x.abs().sum() for x in outputs.values() if x.requires_grad]:
            torch.autograd.grad(roots, [inputs[name] for name in trial.case.grad], allow_unused=True)
        return outputs

    if (outputs := _run_unless_refused(run_with_gradients)) is None:
        return
    reasons = "; ".join(trial.kernel.unsupported(trial.case.probe(trial.device)))
    raise CheckFailure(
        f"expected an error, because the kernel declares that it cannot run this call ({reasons}), "
        f"got an output in {outputs['output'].dtype}"
    )


@kernel_check(
    share=0.1,
    draw=KernelDraw(runs_on=with_grad, tokens=FEW),
    use="forward-mode differentiation (torch.func.jvp): its results are silently wrong",
)
def tangents_are_right_or_refused(trial: KernelTrial) -> None:
    """Forward-mode derivatives equal those of the definition, or raise an error. If a custom op has only a
    backward formula, torch silently uses a tangent of zero."""
    case, cpu, randn = trial.case, torch.device("cpu"), trial.case.randn()
    exact_inputs = {name: to_float64(x) for name, x in case.inputs(cpu).items()}
    # proportional to the inputs, except for a log-decay, which may be -inf and has to stay so
    sizes = {name: 1 if name == "log_decay" else exact_inputs[name].abs() for name in case.grad}
    directions = {name: randn(exact_inputs[name].shape) * size for name, size in sizes.items()}

    def tangents(function: Callable[[Tensors], Tensors], inputs: Tensors) -> Tensors:
        with dual_level():
            # make_dual refuses an expanded tensor
            primals = {name: inputs[name].clone(memory_format=torch.contiguous_format) for name in directions}
            duals = {name: make_dual(x, directions[name].to(x)) for name, x in primals.items()}
            outputs = {name: x for name, x in function(inputs | duals).items() if x.is_floating_point()}
            pairs = {name: unpack_dual(x) for name, x in outputs.items()}
        return {name: torch.zeros_like(x) if tangent is None else tangent for name, (x, tangent) in pairs.items()}

    exact = tangents(case.define, exact_inputs)
    if (actual := _run_unless_refused(lambda: tangents(trial.run, case.inputs(trial.device)))) is None:
        return
    # a wide tolerance: kernels declare no precision of tangents, and a missing one is entirely wrong
    with Differences("tangents against the definition's", 0.1) as differences:
        for name, tangent in exact.items():
            size = trial.exact.outputs_terms[name] + tangent.abs() + 10 * torch.finfo(case.dtype_of(name)).tiny
            differences.close(
                f"the tangent of {name}", actual[name], tangent, case.dtype_of(name), size, case.axes_of(name)
            )


@kernel_check(
    share=0.1,
    draw=KernelDraw(runs_on=widest_with_grad, tokens=FEW),
    use="penalties on gradients, and Hessians: they are silently wrong",
)
def second_derivatives_are_right_or_refused(trial: KernelTrial) -> None:
    """Second derivatives equal those of the definition, or raise an error. A backward pass that detaches its tensors
    would leave them out."""
    case, cpu, randn = trial.case, torch.device("cpu"), trial.case.randn()
    exact_inputs = {name: to_float64(x) for name, x in case.inputs(cpu).items()}
    directions = {name: randn(exact_inputs[name].shape) for name in case.grad}

    def second(function: Callable[[Tensors], Tensors], inputs: Tensors) -> Tensors:
        outputs, varied = function(inputs), {name: inputs[name] for name in case.grad}
        upstream = {
            name: case.cotangent(name, outputs[name].detach(), cpu).to(outputs[name]) for name in case.differentiated
        }
        first = gradients(outputs, upstream, varied, create_graph=True)
        return gradients(first, {name: direction.to(first[name]) for name, direction in directions.items()}, varied)

    exact = second(case.define, leaves(exact_inputs, case.grad))
    if (actual := _run_unless_refused(lambda: second(trial.run, trial.leaves()))) is None:
        return
    negligible = 100 * torch.finfo(case.dtype).eps
    with Differences("second derivatives against the definition's", 0.1) as differences:
        for name, derivative in exact.items():
            size = derivative.abs() + derivative.abs().mean() + negligible
            label = f"the second derivative of {name}"
            differences.close(label, actual[name], derivative, case.dtype_of(name), size, case.axes_of(name))


@kernel_check(
    calls_no_higher_order_op,
    share=0.04,
    draw=KernelDraw(tokens=FEW),
    use="torch.compile: compiled code is refused, or differs from eager",
)
def dispatched_ops_pass_opcheck(trial: KernelTrial) -> None:
    """`torch.library.opcheck` passes for every custom op that a call dispatches, forward and backward, with the
    arguments of that call: schema, fake implementation, autograd formula, and compilation with dynamic shapes."""
    inputs = trial.leaves()
    with _CustomOps() as dispatched:
        outputs = trial.run(inputs)
        trial.gradients(outputs, inputs)
    for op, (args, kwargs) in dispatched.calls.items():
        for test, result in opcheck(op, args, kwargs, raise_exception=False).items():
            if result != "SUCCESS":
                lines = [line for line in str(result).splitlines() if line.strip()]
                raise CheckFailure("\n".join([f"{op} fails opcheck's {test}:", *(f"  {line}" for line in lines[:8])]))


def _run_unless_refused(call: Callable[[], Tensors]) -> Tensors | None:
    """Return the result of a call; None if it raises any error except a `CheckFailure`."""
    try:
        return call()
    except CheckFailure:
        raise
    except Exception:
        return None


def _in_pieces(trial: KernelTrial, inputs: Tensors, pieces: list[tuple[int, ...]]) -> Tensors:
    """Run a kernel on consecutive pieces, each from the final state of the one before.

    Args:
        trial: the kernel and the case.
        inputs: inputs of the whole case.
        pieces: for each piece, the number of tokens of every row or document.

    Returns:
        The output of the whole, and the final state of the last piece.
    """
    state: Tensors = {}
    before, outputs = None, []
    for part, tokens in trial.case.parts(inputs, pieces):
        before = part if before is None else part.continued(before)
        results = trial.run(inputs | state | tokens, before)
        outputs.append(before.sequences(results["output"]))
        state = {name: x for name, x in results.items() if name != "output"}
    whole = [torch.cat(parts) for parts in zip(*outputs, strict=True)]
    return {"output": trial.case.segment(whole), **state}


class _CustomOps(TorchDispatchMode):
    """A dispatch mode that records the arguments of the first call of every custom op."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[Any, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace not in ("aten", "prim", "prims"):
            # without grad mode, as in a backward pass, the arguments need no gradients
            graph = torch.is_grad_enabled()
            arguments = (args, kwargs or {})
            arguments = tree_map_only(Tensor, lambda x: x.detach().requires_grad_(x.requires_grad and graph), arguments)
            self.calls.setdefault(func, arguments)
        return func(*args, **(kwargs or {}))


def _require_own_memory(trial: KernelTrial) -> None:
    """Fail if a result without gradients lies in a buffer that a later call of the same shapes overwrites."""
    case = replace(trial.case, grad=())
    earlier = trial.run(case.inputs(trial.device), case)
    saved = {name: x.clone() for name, x in earlier.items()}
    later = replace(case, seed=case.seed + 1)
    trial.run(later.inputs(trial.device), later)
    for name, x in earlier.items():
        require(torch.equal(x.nan_to_num(), saved[name].nan_to_num()), f"a later call overwrites {name}")


def _require_boundaries_read(trial: KernelTrial) -> None:
    """Fail if a kernel still uses what it cached for earlier boundaries after new ones are written into the tensor."""
    case = replace(trial.case, grad=())
    other = replace(case, lengths=case.lengths[::-1])
    call, later = (each.call(each.inputs(trial.device)) for each in (case, other))
    boundaries = getattr(call, "cu_seqlens", None)  # softmax kernels get documents instead of boundaries
    if boundaries is None:
        return
    expected, _ = trial.kernel.function(later)
    trial.kernel.function(call)
    again, _ = trial.kernel.function(later._replace(cu_seqlens=boundaries.copy_(later.cu_seqlens)))
    what = "boundaries written over earlier ones in the same tensor, against boundaries in a new tensor"
    with Differences(what, 0) as differences:
        differences.tensor("the output", again, expected, case.axes_of("output"))


def _with_gradients(outputs: Tensors, gradients: Tensors) -> Tensors:
    return outputs | {f"the gradient of {name}": x for name, x in gradients.items()}
