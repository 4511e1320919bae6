"""Adapter that makes any `nn.Module` a mixer, so that the conformance kit can check it.

    config = adapt(lambda d_model: MyLayer(d_model), call=..., state=...)
    report = check_mixer(config)

The adapter does not guess: checks of features that a module does not declare (a state, packing, its cost) are skipped
with that reason.
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

from ...mixers.base.contract import MixerConfig, SequenceMixer
from ...mixers.base.state import concatenate, select
from ...mixers.base.traits import ContractError, Traits, require_state
from ...ops.runtime.call import Call
from ...ops.runtime.paradigm import Paradigm
from ...registry import require_name

Result = tuple[Tensor, Any]
"""Output and final state; the state is None unless it is requested."""

CallModule = Callable[[Any, Tensor, Any, Tensor | None, bool], Result]
"""`call(module, x, state, cu_seqlens, return_state)`: mixes a segment x, [B T D]; a `state` of None begins a text."""

InitialState = Callable[[Any, int], tuple[Any, ...]]
"""`state(module, batch_size)`: the state before the first token, a NamedTuple of tensors, each with the batch first."""


class AdaptedConfig(MixerConfig):
    """Configuration of a module of another project; a subclass defines how to create and call it, and its traits.

    A module with a state has two paradigms: parallel is one call, and recurrent is one call per token, so that the kit
    compares decoding with the call on all tokens.
    """

    paradigm: Paradigm = Field(default=Paradigm.PARALLEL, strict=False)
    """Default paradigm, in training and evaluation."""
    layer: ClassVar[type["Adapted"]]
    """Class of the mixer that the configuration builds."""

    @property
    def fixed_d_model(self) -> int | None:
        """The only width that the module supports; None if it supports any."""
        return None

    @abstractmethod
    def module(self, d_model: int) -> nn.Module:
        """Return the module for a width."""

    @abstractmethod
    def call(self, module: Any, x: Tensor, state: Any, cu_seqlens: Tensor | None, return_state: bool) -> Result:
        """Mix a segment; see `CallModule`."""

    def state(self, module: Any, batch_size: int) -> tuple[Any, ...]:
        """Return the initial state; see `InitialState`."""
        raise NotImplementedError

    def flops(self, module: Any, length: int, paradigm: Paradigm, context: int) -> int | None:  # noqa: ARG002
        """Return the floating-point operations of a call, as in `SequenceMixer.flops`; None if it is not declared."""
        return None

    def undeclared(self, module: Any) -> dict[str, str]:
        """Return the features that cannot be checked, each with the reason."""
        name = type(module).__name__
        reasons = {"refusals": "the adapter, not the module, refuses features that are not declared"}
        if not callable(getattr(module, "reset_parameters", None)):
            reasons["reset_parameters"] = f"{name} has no reset_parameters"
        if self.flops(module, 1, self.paradigm, 0) is None:
            reasons["flops"] = "flops is not declared"
        if self.traits.state == "growing":
            reasons["rows"] = "traits.state is growing, and rows of different lengths need a common max_length"
        return reasons

    def build(self, d_model: int, *, layer_idx: int, n_layers: int) -> "Adapted":  # noqa: ARG002
        if self.fixed_d_model not in (None, d_model):
            raise ContractError(f"{self.kind} supports only d_model = {self.fixed_d_model}, got {d_model}")
        module = self.module(d_model)
        if not isinstance(module, nn.Module):
            raise ContractError(f"{self.kind}: expected an nn.Module to adapt, got {module!r}")
        return self.layer(self, module)


class Adapted(SequenceMixer[Any]):
    """Mixer that calls a module of another project."""

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
        """Call the module once per token, each time from the previous state."""
        outputs = []
        for token in x.split(1, dim=1):
            y, state = self._call(token, state, None, True)
            outputs.append(y)
        return torch.cat(outputs, dim=1), state

    def _call(self, x: Tensor, state: Any, cu_seqlens: Tensor | None, return_state: bool) -> Result:
        """Call the module, and check that it returns an output and a state."""
        with self._exact():
            result: Any = self.config.call(self.module, x, state, cu_seqlens, return_state)
        if not isinstance(result, tuple) or len(result) != 2 or not isinstance(result[0], Tensor):
            types = ", ".join(type(part).__name__ for part in (result if isinstance(result, tuple) else (result,)))
            raise ContractError(
                f"{self.kind}: expected call to return (output, state), got {types}: "
                "pass call= to adapt, such as lambda module, x, *_: (module(x)[0], None)"
            )
        return result

    def _exact(self) -> Any:
        """Return a context in which a module with float64 parameters does not round to float32 inside."""
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
            raise ContractError(f"{self.kind} does not declare its cost: pass flops= to adapt")
        return cost


AdaptedConfig.layer = Adapted


class _InFloat64(TorchFunctionMode):
    """Torch function mode that replaces float32 by float64 in the arguments of all functions."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
        kwargs = {name: torch.float64 if arg is torch.float32 else arg for name, arg in (kwargs or {}).items()}
        return func(*args, **kwargs)


def adapt(
    module: nn.Module | Callable[[int], nn.Module],
    *,
    call: CallModule | None = None,
    state: InitialState | None = None,
    traits: Mapping[str, Any] | None = None,
    flops: Callable[[Any, int, Paradigm, int], int] | None = None,
    d_model: int | None = None,
    kind: str = "",
) -> AdaptedConfig:
    """Return a mixer configuration of any module, for `check_mixer`, `parametrize_checks` and `seqmix check`.

    Args:
        module: a module, or a function that creates one for a width (the class, if the width is its only argument).
        call: `call(module, x, state, cu_seqlens, return_state) -> (y, state)`; by default `module(x)`, without a state.
        state: `state(module, batch_size)`, the state before the first token; None if the module has no state. Checks
            that need a state (segments, decoding, saved states) are then skipped.
        traits: fields of `Traits` that differ from the defaults, such as `{"packing": True}`. The defaults are a
            constant state if `state` is given and no state otherwise, no packing, and no invariance to shifts.
        flops: `flops(module, length, paradigm, context)`; if it is None, the cost is not checked.
        d_model: the only width that is supported; required if `module` is an instance.
        kind: the name in reports; by default that of the class or function.

    Raises:
        ContractError: the arguments do not fit together.
    """
    name = kind or (type(module) if isinstance(module, nn.Module) else module).__name__.strip("<>")
    make: Callable[[int], nn.Module] = module
    if isinstance(module, nn.Module):
        if d_model is None:
            raise ContractError(
                f"adapt needs d_model= if it gets a module instead of a function that creates one, got none for {name}"
            )
        make = lambda _: copy.deepcopy(module).to(torch.get_default_device())  # noqa: E731
    for trait in traits or {}:
        require_name("trait", trait, [field.name for field in fields(Traits)])
    paradigms = frozenset({Paradigm.PARALLEL, Paradigm.RECURRENT} if state is not None else {Paradigm.PARALLEL})
    defaults: dict[str, Any] = {
        "paradigms": paradigms,
        "packing": False,
        "shift_invariant": False,
        "state": "none" if state is None else "constant",
    }
    declared = Traits(**{**defaults, **(traits or {})})
    if declared.has_state is (state is None):
        remedy = "pass state=" if state is None else "omit state="
        argument = "no state=" if state is None else "state="
        got = f"got {argument} and traits.state {declared.state!r}"
        raise ContractError(f"adapt needs state= if traits.state is not none, and only then, {got}: {remedy}")
    call_module = call or (lambda module, x, *_: (module(x), None))
    undeclared = {"yaml": "YAML cannot describe a module that adapt was given"}
    members = {
        "module": lambda _, d_model: make(d_model),
        "call": lambda _, *arguments: call_module(*arguments),
        "state": lambda _, module, batch_size: state(module, batch_size) if state else None,
        "flops": lambda _, *arguments: None if flops is None else flops(*arguments),
        "undeclared": lambda self, module: undeclared | AdaptedConfig.undeclared(self, module),
        "traits": property(lambda _: declared),
        "fixed_d_model": property(lambda _: d_model),
        "written": property(lambda _: f"adapt({name}, ...)"),
    }
    kind_field = {"__module__": __name__, "__annotations__": {"kind": Literal[name]}, "kind": name}
    config_class: Any = type(f"{name}Config", (AdaptedConfig,), kind_field | members)
    config_class.layer = type(name, (Adapted,), {})  # cannot be imported, which marks it as not picklable
    return config_class()
