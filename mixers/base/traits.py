"""Traits that a mixer declares, and the error of a call that its mixer does not support."""

from dataclasses import dataclass
from itertools import chain
from typing import Literal

from ...ops.runtime.paradigm import Paradigm
from ...registry import SeqmixError, nearest_hint


class ContractError(SeqmixError):
    """Error of a mixer that is asked for something it does not declare, or that breaks the contract."""


@dataclass(frozen=True, kw_only=True)
class Traits:
    """Properties that a mixer declares; the conformance kit tests every one of them."""

    paradigms: frozenset[Paradigm]
    """Supported paradigms. All of them compute the same map."""
    state: Literal["constant", "growing", "none"]
    """Growth of the state with the sequence length; "none" if the mixer neither takes nor returns a state."""
    packing: bool
    """True if `cu_seqlens` is supported: several documents in one row."""
    shift_invariant: bool
    """True if the output does not depend on absolute position."""
    parallel_from_state: bool = True
    """True if the parallel paradigm accepts an initial state; it returns a final state in any case."""
    compiles: bool = True
    """True if `torch.compile` works with fullgraph=True."""
    surrogate_gradients: bool = False
    """True if the backward pass is the derivative of another function than the forward pass (straight-through)."""
    value_residual: bool = False
    """True if layers pass their values to later layers, and can mix in the values of the first layer."""
    kv_sharing: bool = False
    """True if the mixer can pass its keys and values to later layers, and can read those of an earlier layer."""
    auxiliary_loss: bool = False
    """True if some parameters learn from a loss of the mixer's own, not from the output (`LayerCall.return_loss`)."""
    differentiable: bool = True
    """True if gradients are supported; False for a module that writes its cache in place."""

    def __post_init__(self) -> None:
        names = self.paradigms
        allowed = ", ".join(f"Paradigm.{paradigm.name}" for paradigm in Paradigm)
        if not isinstance(names, (frozenset, set)) or not names or not set(names) <= set(Paradigm):
            raise ContractError(f"Traits.paradigms expects a non-empty frozenset, got {names!r}; allowed: {allowed}")
        # a name equals its paradigm but is printed differently, and a set is mutable
        object.__setattr__(self, "paradigms", frozenset(map(Paradigm, names)))
        if self.state not in (states := ("constant", "growing", "none")):
            hint = nearest_hint(str(self.state), states)
            raise ContractError(f"Traits.state expects 'constant', 'growing' or 'none', got {self.state!r}{hint}")
        for name, value in vars(self).items():
            if name not in ("paradigms", "state") and not isinstance(value, bool):
                raise ContractError(f"Traits.{name} expects True or False, got {value!r}")
        if self.has_state and not any(map(self.takes_state, self.paradigms)):
            raise ContractError(
                "Traits.parallel_from_state = False needs another paradigm that accepts a state: "
                "declare one, or declare state='none'"
            )

    @property
    def has_state(self) -> bool:
        """True if the mixer has a state, so that a segment can continue an earlier one."""
        return self.state != "none"

    def takes_state(self, paradigm: Paradigm) -> bool:
        """True if the mixer accepts an initial state in this paradigm."""
        return self.has_state and (self.parallel_from_state or paradigm is not Paradigm.PARALLEL)

    def prefer(self, *paradigms: Paradigm, from_state: bool = False) -> Paradigm:
        """Return the first of these paradigms that the mixer declares, or else any that it declares.

        With `from_state`, only paradigms that accept an initial state count.
        """
        for paradigm in chain(paradigms, Paradigm):
            if paradigm in self.paradigms and (not from_state or self.takes_state(paradigm)):
                return paradigm
        raise ContractError("no declared paradigm accepts a state: leave out the state, or declare another paradigm")


def require_paradigm(paradigm: Paradigm, traits: Traits, kind: str) -> None:
    """Reject a paradigm that the mixer does not declare."""
    if paradigm not in traits.paradigms:
        allowed = sorted(str(p) for p in traits.paradigms)
        raise ContractError(
            f"{kind} has no paradigm {str(paradigm)!r}; it declares {', '.join(allowed)}"
            f"{nearest_hint(str(paradigm), allowed)}"
        )


def require_state(traits: Traits, kind: str) -> None:
    """Reject a call that passes or requests a state, if the mixer has no state."""
    if not traits.has_state:
        raise ContractError(
            f"{kind} has no state (traits.state is 'none'): leave out state and return_state; decoding is not possible"
        )


def require_initial_state(paradigm: Paradigm, traits: Traits, kind: str) -> None:
    """Reject an initial state in a paradigm that does not accept one."""
    if not traits.takes_state(paradigm):
        require_state(traits, kind)
        accepting = ", ".join(sorted(traits.paradigms - {paradigm}))
        raise ContractError(f"{kind} takes no state in the {paradigm} paradigm: use {accepting}")


def require_compiles(traits: Traits, kind: str) -> None:
    """Reject compilation of a mixer that does not support it."""
    if not traits.compiles:
        raise ContractError(f"{kind} cannot be compiled (traits.compiles is False): use it without torch.compile")


def require_capacity(length: int, max_length: int | None, kind: str) -> None:
    """Reject a capacity `max_length` in tokens that is smaller than the processed prefix of `length` tokens."""
    if max_length is not None and length > max_length:
        raise ContractError(f"{kind} has processed {length} tokens: expected max_length >= {length}, got {max_length}")
