"""The decorators `check` and `kernel_check`, which register checks, and the conditions for running one on a mixer."""

from collections.abc import Callable
from typing import Any

import torch

from ..mixers.base.contract import MixerConfig, SequenceMixer
from ..mixers.base.state import to_dict
from ..ops.runtime.kernel import Kernel
from .engine.check import Check
from .kernel.case import KernelDraw
from .kernel.trial import KernelTrial
from .mixer.case import Draw
from .mixer.options import alternatives
from .mixer.trial import Trial

MixerCheck = Check[MixerConfig, Draw, Trial]
KernelCheck = Check[Kernel, KernelDraw, KernelTrial]
Need = Callable[[MixerConfig, SequenceMixer], str | None]

CHECKS: dict[str, MixerCheck] = {}
"""All checks of mixers by name, in the order in which they run."""

KERNEL_CHECKS: dict[str, KernelCheck] = {}
"""All checks of kernels by name, in the order in which they run."""


def check(
    *needs: Need,
    share: float = 0.1,
    draw: Draw | None = None,
    compiles: bool = False,
    long: bool = False,
    stress: bool = False,
    use: str = "",
    remedy: str = "",
) -> Callable[[Callable[[Trial], None]], Callable[[Trial], None]]:
    """Register a function of a `Trial` as a check of mixers.

    The function's name is the name of the check, its docstring the property that reports show.

    Args:
        needs: conditions on the mixer; the check is skipped with the reason of the first one that does not hold.
        share: number of cases to run, as a share of the requested examples; 0 runs one case.
        draw: specification of the cases to draw; by default one segment from any state.
        compiles: True if the check compiles the mixer.
        long: True if most cases have hundreds of tokens.
        stress: True if the check runs under `--stress` alone.
        use: what breaks in practice if the property does not hold.
        remedy: what to declare or override if the mixer is meant to lack the property.

    Raises:
        ValueError: another check has the same name, or the function has no docstring.
    """
    draw = draw or Draw()
    return _register_in(
        CHECKS, needs=needs, share=share, draw=draw, compiles=compiles, long=long, stress=stress, use=use, remedy=remedy
    )


def kernel_check(
    *needs: Callable[[Kernel], str | None], share: float, draw: KernelDraw | None = None, use: str = ""
) -> Callable[[Callable[[KernelTrial], None]], Callable[[KernelTrial], None]]:
    """Register a function of a `KernelTrial` as a check of kernels.

    The function's name is the name of the check, its docstring the property that reports show.

    Args:
        needs: conditions on the kernel; the check is skipped with the reason of the first one that does not hold.
        share: number of cases to run, as a share of the requested examples; 0 runs one case.
        draw: specification of the cases to draw; by default the defaults of `KernelDraw`.
        use: what breaks in practice if the property does not hold.

    Raises:
        ValueError: another check has the same name, or the function has no docstring.
    """
    return _register_in(KERNEL_CHECKS, needs=needs, share=share, draw=draw or KernelDraw(), use=use)


def _register_in(checks: dict[str, Any], **fields: Any) -> Callable[[Callable[..., None]], Any]:
    """Return a decorator that adds a function to a registry as a check with these fields."""

    def register(test: Callable[..., None]) -> Callable[..., None]:
        name, sentence = test.__name__, " ".join((test.__doc__ or "").split())
        if name in checks:
            raise ValueError(f"a check called {name} already exists: rename the function")
        if not sentence:
            raise ValueError(
                f"expected the check {name} to have a docstring, got none: describe the property that it tests"
            )
        checks[name] = Check(name=name, property=sentence, test=test, **fields)
        return test

    return register


# ---- remedies: what to declare if the mixer is meant to lack the property

NOT_PACKED = "declare traits.packing=False"
NOT_INVARIANT = "declare traits.shift_invariant=False, or override shift_state if another leaf holds the position"
LESS_PRECISE = "give tolerances={torch.bfloat16: 4e-2} (--tolerance bfloat16=0.04)"
NOT_COMPILED = "declare traits.compiles=False"

# ---- conditions under which a check applies to a mixer


def make_need(words: str, holds: Callable[[MixerConfig, SequenceMixer], object], otherwise: str) -> Need:
    """Return a condition on a mixer.

    Args:
        words: the condition in words, for the page of checks.
        holds: the condition, a function of configuration and mixer.
        otherwise: reason for skipping the check if the condition does not hold; `{traits}` stands for the traits.
    """

    def need(config: MixerConfig, mixer: SequenceMixer) -> str | None:
        return None if holds(config, mixer) else otherwise.format(traits=config.traits)

    need.__doc__ = words
    return need


def declares(feature: str, words: str) -> Need:
    """Return the condition that a mixer has a feature, which an adapted module of another project may lack.

    Args:
        feature: key of the feature in the adapted mixer's `undeclared`, which holds the reason for skipping.
        words: the condition in words, for the page of checks.
    """

    def need(_: MixerConfig, mixer: SequenceMixer) -> str | None:
        return getattr(mixer, "undeclared", {}).get(feature)

    need.__doc__ = words
    return need


def shifted_leaves(mixer: SequenceMixer, tokens: int = 65) -> dict[str, bool]:
    """Return the leaves of a state that `shift_state` changes, by name: True if the leaf is a position, else False.

    A leaf is a position if a shift by `tokens` adds exactly `tokens` to it.
    """
    state = mixer.init_state(1)
    shifted = to_dict(mixer.shift_state(state, tokens))
    changed = {name: leaf for name, leaf in to_dict(state).items() if not torch.equal(shifted[name], leaf)}
    return {name: torch.equal(shifted[name], leaf + tokens) for name, leaf in changed.items()}


def several_paradigms(config: MixerConfig, _: SequenceMixer) -> str | None:
    """At least two paradigms."""
    (*others, last) = sorted(config.traits.paradigms)
    return None if others else f"traits.paradigms has {last} alone"


UNMOVED = "shift_state changes no leaf of the state"

optional = make_need("Options.", lambda c, _: alternatives(c), "the configuration has no options to vary")
packing = make_need("Packing.", lambda c, _: c.traits.packing, "traits.packing is False")
stateful = make_need("A state.", lambda c, _: c.traits.has_state, "traits.state is none")
constant = make_need("A constant state.", lambda c, _: c.traits.state == "constant", "traits.state is {traits.state}")
recurrent = make_need(
    "The recurrent paradigm.", lambda c, _: "recurrent" in c.traits.paradigms, "traits.paradigms has no recurrent"
)
compilable = make_need("Compiling.", lambda c, _: c.traits.compiles, "traits.compiles is False")
positioned = make_need("A position in the state.", lambda _, mixer: shifted_leaves(mixer), UNMOVED)
invariant = make_need("Shift invariance.", lambda c, _: c.traits.shift_invariant, "traits.shift_invariant is False")
shiftable = make_need(
    "Shift invariance, or a position in the state.", lambda c, m: c.traits.shift_invariant or shifted_leaves(m), UNMOVED
)
chunked = make_need(
    "`chunk_size`.", lambda c, _: "chunk_size" in type(c).model_fields, "the configuration has no chunk_size"
)
differentiable = make_need("Gradients.", lambda c, _: c.traits.differentiable, "traits.differentiable is False")
exact_gradients = make_need(
    "A backward pass that is the derivative of the forward.",
    lambda c, _: not c.traits.surrogate_gradients,
    "traits.surrogate_gradients is True",
)
