"""What a mixer declares about itself, and the error of a call that it does not declare."""

from dataclasses import dataclass
from itertools import chain
from typing import Literal

from ..ops.runtime.paradigm import Paradigm
from ..registry import SeqmixError, nearest


class ContractError(SeqmixError):
    """A mixer was asked for something it does not declare; it refuses instead of computing something else."""


@dataclass(frozen=True, kw_only=True)
class Traits:
    """What a mixer declares about itself; every line is checked by tests."""

    paradigms: frozenset[Paradigm]
    """The paradigms it has. All of them compute the same map."""
    state: Literal["constant", "growing", "none"]
    """How the state's size depends on the sequence length; "none" of a mixer that neither takes nor returns one."""
    packing: bool
    """Whether it honours `cu_seqlens` (several documents in one row)."""
    shift_invariant: bool
    """Whether the output is independent of absolute position."""
    parallel_from_state: bool = True
    """Whether the parallel paradigm takes a state; it returns a final state in any case."""
    compiles: bool = True
    """Whether it can be compiled with `torch.compile` (fullgraph)."""
    surrogate_gradients: bool = False
    """Whether the backward pass is another function's derivative, as of a straight-through estimator."""
    value_residual: bool = False
    """Whether its layers give their values to later ones, and can mix in those of the first."""
    differentiable: bool = True
    """Whether there are gradients at all; decoding with a cache that is written in place has none."""

    def __post_init__(self) -> None:
        names = self.paradigms
        allowed = ", ".join(f"Paradigm.{paradigm.name}" for paradigm in Paradigm)
        if not isinstance(names, (frozenset, set)) or not names or not set(names) <= set(Paradigm):
            raise ContractError(f"Traits.paradigms needs a frozenset of {allowed}, and was given {names!r}")
        # a name is equal to its paradigm, but is not printed as one; and a set could change
        object.__setattr__(self, "paradigms", frozenset(map(Paradigm, names)))
        if self.state not in (states := ("constant", "growing", "none")):
            hint = nearest(str(self.state), states)
            raise ContractError(
                f"Traits.state needs 'constant', 'growing' or 'none', and was given {self.state!r}{hint}"
            )
        for name, value in vars(self).items():
            if name not in ("paradigms", "state") and not isinstance(value, bool):
                raise ContractError(f"Traits.{name} needs True or False, and was given {value!r}")
        if self.has_state and not any(map(self.takes_state, self.paradigms)):
            raise ContractError("Traits.parallel_from_state is False, and no other paradigm is there to take a state")

    @property
    def has_state(self) -> bool:
        """Whether there is a state: what was read before a segment, or what a segment leaves."""
        return self.state != "none"

    def takes_state(self, paradigm: Paradigm) -> bool:
        """Whether a segment can be mixed from a state in this paradigm."""
        return self.has_state and (self.parallel_from_state or paradigm is not Paradigm.PARALLEL)

    def prefer(self, *paradigms: Paradigm, from_state: bool = False) -> Paradigm:
        """The first of these paradigms that is declared, else any; `from_state` one that takes a state."""
        for paradigm in chain(paradigms, Paradigm):
            if paradigm in self.paradigms and (not from_state or self.takes_state(paradigm)):
                return paradigm
        raise ContractError("a state was to be taken where there is none")


def require_paradigm(paradigm: Paradigm, traits: Traits, kind: str) -> None:
    """Refuse a paradigm that a mixer does not declare."""
    if paradigm not in traits.paradigms:
        allowed = sorted(str(p) for p in traits.paradigms)
        raise ContractError(
            f"{kind} has no paradigm {str(paradigm)!r}; it declares {', '.join(allowed)}"
            f"{nearest(str(paradigm), allowed)}"
        )


def require_state(traits: Traits, kind: str) -> None:
    """Refuse a state, given or wanted, where a mixer has none."""
    if not traits.has_state:
        raise ContractError(
            f"{kind} has no state (traits.state is 'none'): it mixes whole sequences, and cannot decode"
        )


def require_state_is_taken(paradigm: Paradigm, traits: Traits, kind: str) -> None:
    """Refuse a state in a paradigm that takes none."""
    if not traits.takes_state(paradigm):
        require_state(traits, kind)
        others = ", ".join(sorted(traits.paradigms - {paradigm}))
        raise ContractError(f"{kind} takes no state in the {paradigm} paradigm; it takes one in: {others}")


def require_compiles(traits: Traits, kind: str) -> None:
    """Refuse to compile a mixer that cannot be compiled."""
    if not traits.compiles:
        raise ContractError(f"{kind} cannot be compiled (traits.compiles is False): use it without torch.compile")


def require_room(length: int, max_length: int | None, kind: str) -> None:
    """Refuse a capacity smaller than the processed prefix."""
    if max_length is not None and length > max_length:
        raise ContractError(f"{kind} has processed {length} tokens, which do not fit into max_length = {max_length}")
