"""Registration of custom ops in torch: one mechanism for all families, from functions of one NamedTuple of inputs.

    class Inputs(NamedTuple): ...       # tensors, numbers and flags
    OP = Op("name", Inputs, fake=fake, forward=forward, backward=backward, saves=1)
    output, final_state, entries = OP(Inputs(q, k, v, scale=0.5))

registers `seqmix::name` and `seqmix::name_backward`, each with a schema and a fake implementation for compilers. Both
run with autocast off and with the device of their tensors as the current one. Such an op is one node of a compiled
graph, and of autograd's graph in eager mode. It has no forward-mode derivatives (torch would treat a tangent as zero)
and no second derivatives: both raise a SeqmixError.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from operator import attrgetter
from typing import Any, Generic, NamedTuple, TypeVar, get_type_hints

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import has_torch_function
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from ...registry import SeqmixError

I = TypeVar("I", bound=tuple[Any, ...])  # noqa: E741 inputs
Outputs = tuple[Tensor, ...]

SCHEMAS: Mapping[Any, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    Sequence[int] | None: "SymInt[]?",
    int: "SymInt",
    float: "float",
    float | None: "float?",
    int | None: "SymInt?",
    bool: "bool",
    str: "str",
}
"""Allowed types of inputs, with their names in torch's schemas."""


class Gradients(NamedTuple):
    """Arguments of a backward pass besides the op's inputs."""

    outputs: tuple[Tensor | None, ...]
    """Gradients of the returned outputs; None for an output that the loss does not depend on."""
    saved: Outputs
    """Outputs that the forward pass saved: the last `reads + saves` ones."""
    wanted: frozenset[str]
    """Names of the inputs whose gradients are wanted."""


class Op(Generic[I]):
    """A custom op and its backward pass.

    Args:
        name: the op is registered as seqmix::name.
        inputs: NamedTuple class of the inputs. If it has a field `needs_grad`, each call sets it: True if a backward
            pass may follow.
        fake: allocates the outputs, from inputs on any device, without reading the values of a tensor.
        forward: computes the outputs; none may share memory with an input.
        backward: computes the gradients of inputs, by name: at least the wanted ones. A missing gradient is zero. None
            means that the op is not differentiable.
        outputs: number of outputs.
        saves: number of outputs, counted from the end, that exist only for the backward pass.
        reads: number of outputs, directly before those, that are both returned and saved for the backward pass.
        mutates: names of the inputs that are written in place.
        result: builds the value that a call returns, from inputs and outputs; by default, the outputs.
    """

    def __init__(
        self,
        name: str,
        inputs: type[I],
        *,
        fake: Callable[[I], Outputs],
        forward: Callable[[I], Outputs],
        backward: Callable[[I, Gradients], Mapping[str, Tensor]] | None,
        outputs: int = 3,
        saves: int = 0,
        reads: int = 0,
        mutates: Sequence[str] = (),
        result: Callable[[I, Outputs], Any] | None = None,
    ) -> None:
        self.name = name
        self.inputs: Any = inputs  # Python has no type for NamedTuple classes
        self.fake = fake
        self.forward = forward
        self.backward = backward
        self.outputs = outputs
        self.saves = saves
        self.reads = reads
        self.result = result
        kinds = get_type_hints(inputs)
        self.tensors = [name for name, kind in kinds.items() if SCHEMAS[kind].startswith("Tensor")]
        types = {name: SCHEMAS[kind] for name, kind in kinds.items()}
        types |= {name: types[name].replace("Tensor", "Tensor(a!)") for name in mutates}
        arguments = ", ".join(f"{kind} {name}" for name, kind in types.items())
        results = ", ".join(["Tensor"] * outputs)
        schema = f"({arguments}) -> {results if outputs == 1 else f'({results})'}"
        self.mutated = [self.inputs._fields.index(name) for name in mutates]
        self.op = register(name, schema, self._run, lambda *args: _unwrap_single(self.fake(self.inputs._make(args))))
        if backward is not None:
            self._differentiate(arguments)

    def __call__(self, x: I) -> Any:
        """Run the op and return its outputs, or the `result` built from them.

        Raises:
            SeqmixError: if an input has a forward-mode tangent.
        """
        outputs = self._as_outputs(self.op(*self.checked(x)))
        return outputs if self.result is None else self.result(x, outputs)

    def checked(self, x: I) -> I:
        """Check the inputs and return them with `needs_grad` set.

        Raises:
            SeqmixError: if an input has a forward-mode tangent.
        """
        tensors = [getattr(x, name) for name in self.tensors]
        if has_tangent(*tensors):
            raise SeqmixError(f"{self.name} does not support forward-mode differentiation: use reverse mode (backward)")
        named: Any = x
        return named._replace(needs_grad=needs_grad(*tensors)) if "needs_grad" in named._fields else x

    def _run(self, *args: Any) -> Any:
        x = self.inputs._make(args)
        with _op_context(getattr(x, self.tensors[0]).device):
            outputs = _unwrap_single(self.forward(x))
        for i in self.mutated:  # so that autograd refuses a backward pass that needs the overwritten value
            if isinstance(args[i], Tensor) and not args[i].is_inference():
                torch.autograd.graph.increment_version(args[i])
        return outputs

    def _differentiate(self, arguments: str) -> None:
        name = f"{self.name}_backward"
        returned = self.outputs - self.saves
        results = ", ".join(["Tensor"] * len(self.tensors))
        d_outputs = "".join(f"Tensor? d_{i}, " for i in range(returned))
        saved = "".join(f", Tensor saved_{i}" for i in range(self.reads + self.saves))
        schema = f"({d_outputs}{arguments}{saved}, bool[] wanted) -> ({results})"
        backward_op = register(name, schema, self._run_backward, self._fake_backward)
        torch.library.register_autograd(backward_op, self._refuse_second_derivatives, lib=_LIBRARY)
        tensors = [self.inputs._fields.index(name) for name in self.tensors]

        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            # saved outputs have no gradients, and zeros in place of these would take as much memory as the outputs
            ctx.set_materialize_grads(False)
            ctx.rest = [None if i in tensors else value for i, value in enumerate(inputs)]
            saved = self._as_outputs(output)[returned - self.reads :]
            ctx.save_for_backward(*(inputs[i] for i in tensors), *saved)

        def gradients(ctx: Any, *d_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
            d_inputs: list[Tensor | None] = [None] * len(ctx.rest)
            unpacked = ctx.saved_tensors  # read once: with activation checkpointing, reading recomputes
            inputs = unpacked[: len(tensors)]
            saved = unpacked[len(tensors) :]
            arguments = list(ctx.rest)
            for i, tensor in zip(tensors, inputs, strict=True):
                arguments[i] = tensor
            wanted = [ctx.needs_input_grad[i] for i in tensors]
            if any(wanted) and any(d is not None for d in d_outputs[:returned]):
                results = backward_op(*d_outputs[:returned], *arguments, *saved, wanted)
                results = (results,) if len(tensors) == 1 else results
                for i, wants, gradient in zip(tensors, wanted, results, strict=True):
                    d_inputs[i] = gradient if wants else None
            return tuple(d_inputs)

        torch.library.register_autograd(self.op, gradients, setup_context=setup_context, lib=_LIBRARY)

    def _as_outputs(self, output: Any) -> Outputs:
        return (output,) if self.outputs == 1 else output

    def _unpack(self, args: tuple[Any, ...]) -> tuple[I, Gradients]:
        """Split the arguments of the backward op into the op's inputs and `Gradients`."""
        returned = self.outputs - self.saves
        count = len(self.inputs._fields)
        x = self.inputs._make(args[returned : returned + count])
        saved = args[returned + count : -1]
        wanted = args[-1]
        names = frozenset(name for name, wants in zip(self.tensors, wanted, strict=True) if wants)
        return x, Gradients(args[:returned], tuple(saved), names)

    def _run_backward(self, *args: Any) -> Tensor | tuple[Tensor, ...]:
        x, gradients = self._unpack(args)
        assert self.backward is not None
        with _op_context(getattr(x, self.tensors[0]).device):
            computed = self.backward(x, gradients)
        return _unwrap_single([self._gradient(x, name, gradients, computed.get(name)) for name in self.tensors])

    def _fake_backward(self, *args: Any) -> Tensor | tuple[Tensor, ...]:
        x, gradients = self._unpack(args)
        return _unwrap_single([self._gradient(x, name, gradients, None) for name in self.tensors])

    def _gradient(self, x: I, name: str, gradients: Gradients, computed: Tensor | None) -> Tensor:
        """Return the gradient of an input as the op's schema needs it: contiguous, or empty if it is not wanted."""
        tensor = getattr(x, name)
        if tensor is None or name not in gradients.wanted:
            return getattr(x, self.tensors[0]).new_empty(0)
        return tensor.new_zeros(tensor.shape) if computed is None else computed.to(tensor.dtype).contiguous()

    def _refuse_second_derivatives(self, ctx: Any, *gradients: Tensor | None) -> Any:
        del ctx, gradients
        raise no_second_derivatives(self.name)


_LIBRARY = torch.library.Library("seqmix", "FRAGMENT")
"""Registry of the ops. `torch.library.custom_op` would cost every call two more wrappers, and the first one a second
for the import of torch's compiler."""

BODIES: dict[Any, Callable[..., Any]] = {}
"""Python function of each op, by `torch.ops.seqmix.NAME`."""


def register(name: str, schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Register seqmix::name for all devices and return it."""
    _LIBRARY.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"seqmix::{name}", fake, lib=_LIBRARY)
    packet = getattr(torch.ops.seqmix, name)
    BODIES[packet] = run
    return packet.default


@contextmanager
def _op_context(device: torch.device) -> Iterator[None]:
    """Context of an op's code: autocast is off, and the tensors' device is current, where Triton launches kernels."""
    with current(device), torch.autocast(device.type, enabled=False):
        yield


def current(device: torch.device) -> AbstractContextManager[Any]:
    """Context in which a CUDA device is current, for launches, streams and graphs; no effect for other devices."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _unwrap_single(tensors: Sequence[Tensor]) -> Tensor | tuple[Tensor, ...]:
    """Return a tuple of tensors, or the tensor itself if there is only one, as torch's schemas require."""
    return tensors[0] if len(tensors) == 1 else tuple(tensors)


def no_second_derivatives(name: str) -> SeqmixError:
    """Return the error to raise when the gradients of an op are differentiated again."""
    return SeqmixError(f"{name} has no second derivatives: its gradients cannot be differentiated again")


class _RefuseSecondDerivatives(torch.autograd.Function):
    """Identity on gradients that raises a SeqmixError when they are differentiated again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(name: str, *gradients: Tensor) -> Outputs:  # noqa: ARG004 torch's signature
        return tuple(gradient.view_as(gradient) for gradient in gradients)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:  # noqa: ARG004
        ctx.name = inputs[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:  # noqa: ARG004
        raise no_second_derivatives(ctx.name)


def differentiable_once(name: str, output: Tensor, called: str) -> Tensor:
    """Return the output of a torch op with a hook that raises a SeqmixError on second derivatives.

    Args:
        name: name of the op in the error.
        output: output of the op.
        called: prefix of the name of the op's node in autograd's graph. Outputs of other nodes, which may have second
            derivatives, get no hook.
    """
    node = None if torch.compiler.is_compiling() else output.grad_fn
    if node is not None and type(node).__name__.startswith(called):

        def refuse(gradients: Sequence[Tensor | None], _: Any) -> Sequence[Tensor | None] | None:
            if not torch.is_grad_enabled():  # this backward pass is not recorded, so it cannot be differentiated
                return None
            refusing = iter(_RefuseSecondDerivatives.apply(name, *(x for x in gradients if x is not None)))
            return tuple(None if x is None else next(refusing) for x in gradients)

        node.register_hook(refuse)
    return output


def needs_grad(*tensors: Tensor | None) -> bool:
    """True if a backward pass may follow: gradients are enabled, and a tensor requires one."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def has_tangent(*tensors: Tensor | None) -> bool:
    """True if a tensor has a forward-mode tangent; always False in compiled code, which cannot see it."""
    # outside forward mode, which has a level, no tensor has one: decoding feels every call
    if getattr(forward_ad, "_current_level", 0) < 0 or torch.compiler.is_compiling():
        return False
    return any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors)


_dispatch_of = attrgetter("__torch_dispatch__")


def is_recorded(*tensors: Tensor | None) -> bool:
    """True if operations on these tensors may be recorded instead of computed, so that values must not be read.

    Compilers, `torch.jit.trace`, transforms of torch.func and dispatch modes record operations, and subclasses of
    tensors may have no memory.
    """
    if torch._C._get_tracing_state() is not None or torch.compiler.is_compiling():
        return True
    if is_in_torch_dispatch_mode() or torch._C._are_functorch_transforms_active() or has_torch_function(tensors):
        return True
    for x in tensors:  # noqa: SIM110  a generator costs a call per tensor, in every step of decoding
        if x is not None and _dispatch_of(type(x)) is not _dispatch_of(Tensor):
            return True
    return False
