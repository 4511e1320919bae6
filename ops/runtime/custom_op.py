"""How an op enters torch: one way for all families, from functions of one NamedTuple of inputs.

    class Inputs(NamedTuple): ...       # of tensors, numbers and flags
    OP = Op("name", Inputs, fake=fake, forward=forward, backward=backward, saves=1)
    output, final_state, entries = OP(Inputs(q, k, v, scale=0.5))

registers `seqmix::name` and `seqmix::name_backward`, each with a schema, a fake for compilers, and inside autocast off
and the device of the tensors as the current one. Such an op is one node of a compiler's graph, in eager mode too, and
has no forward-mode derivatives (torch would take a tangent for zero) and no second ones: both raise a SeqmixError.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Generic, NamedTuple, TypeVar, get_type_hints

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

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
"""The types that inputs may have, as torch's schemas name them."""


class Gradients(NamedTuple):
    """What a backward pass starts from."""

    outputs: tuple[Tensor | None, ...]
    """The gradients of the outputs that are not saved; None where nothing depends on one."""
    saved: Outputs
    """The last outputs of the forward pass, as many as the op reads and saves."""
    wanted: frozenset[str]
    """The names of the inputs whose gradients are wanted."""


class Op(Generic[I]):
    """A custom op and its backward pass.

    Args:
        name: seqmix::name.
        inputs: the NamedTuple of inputs. A field `needs_grad` is set by the call: whether a backward pass may follow.
        fake: the outputs, empty, from inputs on any device; never looks at the numbers in a tensor.
        forward: the outputs, none of which may share memory with an input.
        backward: the gradients of inputs by name, of those wanted or of more; what is missing is zero.
        outputs: how many there are.
        saves: how many of them, the last ones, are saved for backward alone.
        reads: how many of those before are saved for backward too.
        mutates: the inputs that are written in place.
        result: what a call returns, from its inputs and outputs; the outputs by default.
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
        self.inputs: Any = inputs  # a NamedTuple, which has no type of its own
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
        op = torch.library.custom_op(f"seqmix::{name}", self._run, mutates_args=mutates, schema=schema)
        op.register_fake(lambda *args: self._packed(self.fake(self.inputs._make(args))))
        self.op = getattr(torch.ops.seqmix, name).default
        if backward is not None:
            self._differentiate(op, arguments)

    def __call__(self, x: I) -> Any:
        """The outputs, or the `result` made of them.

        Raises:
            SeqmixError: an input has a tangent.
        """
        found = self.op(*self.checked(x))
        outputs = (found,) if self.outputs == 1 else found
        return outputs if self.result is None else self.result(x, outputs)

    def checked(self, x: I) -> I:
        """The inputs with `needs_grad`.

        Raises:
            SeqmixError: an input has a tangent.
        """
        tensors = [getattr(x, name) for name in self.tensors]
        if has_tangent(*tensors):
            raise SeqmixError(f"{self.name} has no forward-mode differentiation, only backward")
        named: Any = x
        return named._replace(needs_grad=needs_grad(*tensors)) if "needs_grad" in named._fields else x

    def _run(self, *args: Any) -> Any:
        x = self.inputs._make(args)
        with _as_it_stands(getattr(x, self.tensors[0]).device):
            return self._packed(self.forward(x))

    def _packed(self, outputs: Outputs) -> Any:
        return outputs[0] if self.outputs == 1 else outputs

    def _differentiate(self, op: Any, arguments: str) -> None:
        name = f"{self.name}_backward"
        given = self.outputs - self.saves
        results = ", ".join(["Tensor"] * len(self.tensors))
        d_outputs = "".join(f"Tensor? d_{i}, " for i in range(given))
        saved = "".join(f", Tensor saved_{i}" for i in range(self.reads + self.saves))
        schema = f"({d_outputs}{arguments}{saved}, bool[] wanted) -> ({results})"
        backward = torch.library.custom_op(f"seqmix::{name}", self._run_backward, mutates_args=(), schema=schema)
        backward.register_fake(self._fake_backward)
        backward.register_autograd(self._refuse_twice)
        backward_op = getattr(torch.ops.seqmix, name).default
        tensors = [self.inputs._fields.index(name) for name in self.tensors]

        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            # what is saved has no gradient, and zeros in its place would be as large as it is
            ctx.set_materialize_grads(False)
            ctx.rest = [None if i in tensors else value for i, value in enumerate(inputs)]
            saved = self._as_outputs(output)[given - self.reads :]
            ctx.save_for_backward(*(inputs[i] for i in tensors), *saved)

        def gradients(ctx: Any, *d_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
            found: list[Tensor | None] = [None] * len(ctx.rest)
            unpacked = ctx.saved_tensors  # once: activation checkpointing recomputes what is unpacked
            inputs = unpacked[: len(tensors)]
            saved = unpacked[len(tensors) :]
            arguments = list(ctx.rest)
            for i, tensor in zip(tensors, inputs, strict=True):
                arguments[i] = tensor
            wanted = [ctx.needs_input_grad[i] for i in tensors]
            if any(wanted) and any(d is not None for d in d_outputs[:given]):
                results = backward_op(*d_outputs[:given], *arguments, *saved, wanted)
                results = (results,) if len(tensors) == 1 else results
                for i, wants, gradient in zip(tensors, wanted, results, strict=True):
                    found[i] = gradient if wants else None
            return tuple(found)

        op.register_autograd(gradients, setup_context=setup_context)

    def _as_outputs(self, output: Any) -> Outputs:
        return (output,) if self.outputs == 1 else output

    def _unpacked(self, args: tuple[Any, ...]) -> tuple[I, Gradients]:
        """The arguments of the backward op."""
        given = self.outputs - self.saves
        count = len(self.inputs._fields)
        x = self.inputs._make(args[given : given + count])
        saved = args[given + count : -1]
        wanted = args[-1]
        names = frozenset(name for name, wants in zip(self.tensors, wanted, strict=True) if wants)
        return x, Gradients(args[:given], tuple(saved), names)

    def _run_backward(self, *args: Any) -> Tensor | tuple[Tensor, ...]:
        x, gradients = self._unpacked(args)
        assert self.backward is not None
        with _as_it_stands(getattr(x, self.tensors[0]).device):
            found = self.backward(x, gradients)
        return _results([self._gradient(x, name, gradients, found.get(name)) for name in self.tensors])

    def _fake_backward(self, *args: Any) -> Tensor | tuple[Tensor, ...]:
        x, gradients = self._unpacked(args)
        return _results([self._gradient(x, name, gradients, None) for name in self.tensors])

    def _gradient(self, x: I, name: str, gradients: Gradients, found: Tensor | None) -> Tensor:
        """The gradient of an input as the op returns it: contiguous, and empty where it is not wanted."""
        tensor = getattr(x, name)
        if tensor is None or name not in gradients.wanted:
            return getattr(x, self.tensors[0]).new_empty(0)
        return tensor.new_zeros(tensor.shape) if found is None else found.to(tensor.dtype).contiguous()

    def _refuse_twice(self, ctx: Any, *gradients: Tensor | None) -> Any:
        del ctx, gradients
        raise no_second_derivatives(self.name)


@contextmanager
def _as_it_stands(device: torch.device) -> Iterator[None]:
    """No autocast, and the tensors' device is the current one: Triton launches on that, wherever its tensors lie."""
    with current(device), torch.autocast(device.type, enabled=False):
        yield


def current(device: torch.device) -> AbstractContextManager[Any]:
    """A device as the current one, where devices have an index: launches, streams and graphs are the current one's."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _results(tensors: list[Tensor]) -> Tensor | tuple[Tensor, ...]:
    """What an op returns: a schema with one result has no tuple."""
    return tensors[0] if len(tensors) == 1 else tuple(tensors)


def no_second_derivatives(name: str) -> SeqmixError:
    """What an op refuses them with."""
    return SeqmixError(f"{name} has no second derivatives: its gradients cannot be differentiated again")


class _Once(torch.autograd.Function):
    """Gradients as they are, which cannot be differentiated again."""

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
    """The output of an op of torch's own, which says by its name that there are no second derivatives.

    Args:
        name: as the error has it.
        output: of the op.
        called: how the name of its node in the graph begins; other ways to compute the same may have them.
    """
    node = None if torch.compiler.is_compiling() else output.grad_fn
    if node is not None and type(node).__name__.startswith(called):

        def refuse(gradients: Sequence[Tensor | None], _: Any) -> Sequence[Tensor | None] | None:
            if not torch.is_grad_enabled():  # no graph is made of this backward pass
                return None
            wanted = iter(_Once.apply(name, *(x for x in gradients if x is not None)))
            return tuple(None if x is None else next(wanted) for x in gradients)

        node.register_hook(refuse)
    return output


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether a backward pass may follow."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def has_tangent(*tensors: Tensor | None) -> bool:
    """Whether forward-mode differentiation is under way, which a compiler does not see."""
    return not torch.compiler.is_compiling() and any(
        x is not None and unpack_dual(x).tangent is not None for x in tensors
    )
