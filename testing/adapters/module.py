"""A module of another project as a mixer: what the conformance kit takes of any `nn.Module`.

    config = adapt(lambda d_model: MyLayer(d_model), call=..., state=...)
    report = check_mixer(config)

Nothing is guessed: what a module does not declare (a state, packing, its cost) is skipped by name.
"""

import copy
from abc import abstractmethod
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import fields
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ...mixers.contract import MixerConfig, SequenceMixer
from ...mixers.state import concatenate, select
from ...mixers.traits import ContractError, Traits, require_state
from ...ops.runtime.call import Call
from ...ops.runtime.paradigm import Paradigm
from ...registry import require_name

Result = tuple[Tensor, Any]
"""Output and final state (None where none is wanted)."""

Calls = Callable[[Any, Tensor, Any, Tensor | None, bool], Result]
"""`call(module, x, state, cu_seqlens, return_state)`: mixes a segment x, [B T D]; a state of None is nothing before."""

Begins = Callable[[Any, int], tuple[Any, ...]]
"""`state(module, batch_size)`: the state before the first token, a NamedTuple of tensors, batch first in every leaf."""


class AdaptedConfig(MixerConfig):
    """A module of another project; a subclass says how it is made and called, and what its traits are.

    A module with a state has two paradigms: parallel is one call, recurrent is a call for every token, so that
    decoding is compared with the whole.
    """

    paradigm: Paradigm = Field(default=Paradigm.PARALLEL, strict=False)
    """The paradigm of training and evaluation."""
    layer: ClassVar[type["Adapted"]]
    """What it builds."""

    @property
    def fixed_d_model(self) -> int | None:
        """The only width that it has; None where it is made for any."""
        return None

    @abstractmethod
    def module(self, d_model: int) -> nn.Module:
        """The module."""

    @abstractmethod
    def call(self, module: Any, x: Tensor, state: Any, cu_seqlens: Tensor | None, return_state: bool) -> Result:
        """Mix a segment; see `Calls`."""

    def state(self, module: Any, batch_size: int) -> tuple[Any, ...]:
        """The initial state; see `Begins`."""
        raise NotImplementedError

    def flops(self, module: Any, length: int, paradigm: Paradigm, context: int) -> int | None:  # noqa: ARG002
        """The cost, as `SequenceMixer.flops` has it; None where it is not declared."""
        return None

    def undeclared(self, module: Any) -> dict[str, str]:
        """What there is nothing to check of, each with the reason."""
        name = type(module).__name__
        reasons = {"refusals": "the adapter refuses what is not declared, not the module"}
        if not callable(getattr(module, "reset_parameters", None)):
            reasons["reset_parameters"] = f"{name} has no reset_parameters"
        if self.flops(module, 1, self.paradigm, 0) is None:
            reasons["flops"] = "flops is not declared"
        if self.traits.state == "growing":
            reasons["rows"] = "traits.state is growing, and rows of other lengths need one max_length"
        return reasons

    def build(self, d_model: int, *, layer_idx: int, n_layers: int) -> "Adapted":  # noqa: ARG002
        if self.fixed_d_model not in (None, d_model):
            raise ContractError(f"{self.kind} has d_model = {self.fixed_d_model}, and {d_model} was asked for")
        module = self.module(d_model)
        if not isinstance(module, nn.Module):
            raise ContractError(f"{self.kind}: what is adapted has to be an nn.Module, and is {module!r}")
        return self.layer(self, module)


class Adapted(SequenceMixer[Any]):
    """A module of another project as a mixer."""

    def __init__(self, config: AdaptedConfig, module: nn.Module) -> None:
        super().__init__(config)
        self.config, self.module = config, module
        if not any(tensor.is_floating_point() for tensor in (*module.parameters(), *module.buffers())):
            self.register_buffer("one", torch.ones(1), persistent=False)
        self.undeclared = config.undeclared(module)

    def mix(self, x: Tensor, call: Call) -> Result:
        cu_seqlens = None if call.documents is None else call.documents.cu_seqlens
        if call.paradigm is not Paradigm.RECURRENT:
            return self._call(x, call.state, cu_seqlens, call.return_state)
        if cu_seqlens is None:
            return self._token_by_token(x, call.state)
        cuts, initial = cu_seqlens.tolist(), call.state or self.init_state(len(cu_seqlens) - 1)
        outputs, states = [x[:, :0]], []
        for n, (start, stop) in enumerate(pairwise(cuts)):
            state = select(initial, torch.tensor([n]))
            y, state = self._token_by_token(x[:, start:stop], state) if start < stop else (x[:, :0], state)
            outputs.append(y)
            states.append(state)
        return torch.cat(outputs, dim=1), concatenate(states)

    def _token_by_token(self, x: Tensor, state: Any) -> Result:
        outputs = []
        for token in x.split(1, dim=1):
            y, state = self._call(token, state, None, True)
            outputs.append(y)
        return torch.cat(outputs, dim=1), state

    def _call(self, x: Tensor, state: Any, cu_seqlens: Tensor | None, return_state: bool) -> Result:
        with self._exact():
            result: Any = self.config.call(self.module, x, state, cu_seqlens, return_state)
        if not isinstance(result, tuple) or len(result) != 2 or not isinstance(result[0], Tensor):
            found = ", ".join(type(part).__name__ for part in (result if isinstance(result, tuple) else (result,)))
            raise ContractError(
                f"{self.kind}: call has to return (output, state), and returned {found}: "
                "give adapt a call=, such as lambda module, x, *_: (module(x)[0], None)"
            )
        return result

    def _exact(self) -> Any:
        """Float64 parameters ask for mathematics, not for what is rounded to float32 inside."""
        return _InFloat64() if self.dtype == torch.float64 else nullcontext()

    def init_state(self, batch_size: int, *, max_length: int | None = None) -> Any:  # noqa: ARG002
        require_state(self.traits, self.kind)
        with self._exact():
            return self.config.state(self.module, batch_size)

    def reset_parameters(self) -> None:
        if "reset_parameters" not in self.undeclared:
            self.module.reset_parameters()  # pyright: ignore[reportCallIssue]

    def flops(self, length: int, paradigm: Paradigm, context: int = 0) -> int:
        cost = self.config.flops(self.module, length, paradigm, context)
        if cost is None:
            raise ContractError(f"{self.kind} declares no flops")
        return cost


AdaptedConfig.layer = Adapted


class _InFloat64(TorchFunctionMode):
    """Whatever is asked for in float32 is float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
        kwargs = {name: torch.float64 if arg is torch.float32 else arg for name, arg in (kwargs or {}).items()}
        return func(*args, **kwargs)


def adapt(
    module: nn.Module | Callable[[int], nn.Module],
    *,
    call: Calls | None = None,
    state: Begins | None = None,
    traits: Mapping[str, Any] | None = None,
    flops: Callable[[Any, int, Paradigm, int], int] | None = None,
    d_model: int | None = None,
    kind: str = "",
) -> AdaptedConfig:
    """Make any module one that `check_mixer`, `parametrize_checks` and `seqmix check` take.

    Args:
        module: the module, or what makes it of a width (its class, if the width is all that it takes).
        call: `call(module, x, state, cu_seqlens, return_state) -> (y, state)`; by default `module(x)`, without a state.
        state: `state(module, batch_size)`, the state before the first token; None where the module has none. Then what
            needs one (pieces, decoding, saved states) is skipped by name.
        traits: fields of `Traits` that differ from what is assumed, such as `{"packing": True}`. Assumed is a constant
            state if `state` is given and none otherwise, no packing, and nothing about shifts.
        flops: `flops(module, length, paradigm, context)`; without it the cost is not checked.
        d_model: the width of a module; required for one that is made already.
        kind: its name in reports; the class's or function's by default.

    Raises:
        ContractError: an argument does not fit the others, in one sentence.
    """
    name = kind or (type(module) if isinstance(module, nn.Module) else module).__name__.strip("<>")
    make: Callable[[int], nn.Module] = module
    if isinstance(module, nn.Module):
        if d_model is None:
            raise ContractError(f"adapt was given a {name}, whose width it cannot know: give d_model=")
        make = lambda _: copy.deepcopy(module).to(torch.get_default_device())  # noqa: E731
    for trait in traits or {}:
        require_name("trait", trait, [field.name for field in fields(Traits)])
    paradigms = frozenset({Paradigm.PARALLEL, Paradigm.RECURRENT} if state is not None else {Paradigm.PARALLEL})
    assumed = {"packing": False, "shift_invariant": False, "state": "none" if state is None else "constant"}
    declared = Traits(**{"paradigms": paradigms, **assumed, **(traits or {})})
    if declared.has_state is (state is None):
        raise ContractError(f"adapt was given traits.state {declared.state!r} and {'no ' * (state is None)}state=")
    calls, undeclared = call or (lambda module, x, *_: (module(x), None)), {"yaml": "what adapt makes is not in YAML"}
    given = {
        "module": lambda _, d_model: make(d_model),
        "call": lambda _, *given: calls(*given),
        "state": lambda _, module, batch_size: state(module, batch_size) if state else None,
        "flops": lambda _, *given: None if flops is None else flops(*given),
        "undeclared": lambda self, module: undeclared | AdaptedConfig.undeclared(self, module),
        "traits": property(lambda _: declared),
        "fixed_d_model": property(lambda _: d_model),
        "written": property(lambda _: f"adapt({name}, ...)"),
    }
    typed = {"__module__": __name__, "__annotations__": {"kind": Literal[name]}, "kind": name}
    made: Any = type(f"{name}Config", (AdaptedConfig,), typed | given)
    made.layer = type(name, (Adapted,), {})  # which cannot be imported, so nobody tries to pickle functions
    return made()
