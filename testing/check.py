"""How a check is declared: the decorators `check` and `kernel_check`, and what a check may need of a mixer."""

from collections.abc import Callable
from typing import Any

import torch

from ..mixers.contract import MixerConfig, SequenceMixer
from ..mixers.state import to_dict
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
"""All checks of mixers by name, in the order they run."""

KERNEL_CHECKS: dict[str, KernelCheck] = {}
"""All checks of kernels."""


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
    """Register a function of a `Trial` as a check of mixers; its docstring is the property.

    Raises:
        ValueError: its name is taken, or it has no docstring.
    """
    draw = draw or Draw()
    return _registers(
        CHECKS, needs=needs, share=share, draw=draw, compiles=compiles, long=long, stress=stress, use=use, remedy=remedy
    )


def kernel_check(
    *needs: Callable[[Kernel], str | None], share: float, draw: KernelDraw | None = None, use: str = ""
) -> Callable[[Callable[[KernelTrial], None]], Callable[[KernelTrial], None]]:
    """Register a function of a `KernelTrial` as a check of kernels; its docstring is the property.

    Raises:
        ValueError: its name is taken, or it has no docstring.
    """
    return _registers(KERNEL_CHECKS, needs=needs, share=share, draw=draw or KernelDraw(), use=use)


def _registers(checks: dict[str, Any], **fields: Any) -> Callable[[Callable[..., None]], Any]:
    def register(test: Callable[..., None]) -> Callable[..., None]:
        name, sentence = test.__name__, " ".join((test.__doc__ or "").split())
        if name in checks:
            raise ValueError(f"there is a check {name} already")
        if not sentence:
            raise ValueError(f"{name} needs a docstring: the property it tests")
        checks[name] = Check(name=name, property=sentence, test=test, **fields)
        return test

    return register


# ---- what to declare where a mixer is meant to be so

NOT_PACKED = "declare traits.packing=False"
NOT_INVARIANT = "declare traits.shift_invariant=False, or override shift_state where another leaf is the position"
LESS_PRECISE = "give tolerances={torch.bfloat16: 4e-2} (--tolerance bfloat16=0.04)"
NOT_COMPILED = "declare traits.compiles=False"

# ---- what checks of mixers need


def needing(words: str, holds: Callable[[MixerConfig, SequenceMixer], object], otherwise: str) -> Need:
    """What a check needs, in words; where that does not hold, a reason, which may name {traits}."""

    def need(config: MixerConfig, mixer: SequenceMixer) -> str | None:
        return None if holds(config, mixer) else otherwise.format(traits=config.traits)

    need.__doc__ = words
    return need


def declares(what: str, words: str) -> Need:
    """What a module of another project may not have (`undeclared` of the adapted mixer says why), also in words."""

    def need(_: MixerConfig, mixer: SequenceMixer) -> str | None:
        return getattr(mixer, "undeclared", {}).get(what)

    need.__doc__ = words
    return need


def shifted(mixer: SequenceMixer, tokens: int = 65) -> dict[str, bool]:
    """The leaves of the state that a shift changes; and whether each is a position, which moves by as many tokens."""
    state = mixer.init_state(1)
    moved = to_dict(mixer.shift_state(state, tokens))
    changed = {name: leaf for name, leaf in to_dict(state).items() if not torch.equal(moved[name], leaf)}
    return {name: torch.equal(moved[name], leaf + tokens) for name, leaf in changed.items()}


def several_paradigms(config: MixerConfig, _: SequenceMixer) -> str | None:
    """Two paradigms."""
    (*others, one) = sorted(config.traits.paradigms)
    return None if others else f"traits.paradigms has {one} alone"


UNMOVED = "shift_state moves no leaf of the state"

optional = needing("Options.", lambda c, _: alternatives(c), "the configuration has no options to vary")
packing = needing("Packing.", lambda c, _: c.traits.packing, "traits.packing is False")
stateful = needing("A state.", lambda c, _: c.traits.has_state, "traits.state is none")
constant = needing("A constant state.", lambda c, _: c.traits.state == "constant", "traits.state is {traits.state}")
recurrent = needing(
    "The recurrent paradigm.", lambda c, _: "recurrent" in c.traits.paradigms, "traits.paradigms has no recurrent"
)
compilable = needing("Compiling.", lambda c, _: c.traits.compiles, "traits.compiles is False")
positioned = needing("A position in the state.", lambda _, mixer: shifted(mixer), UNMOVED)
invariant = needing("Shift invariance.", lambda c, _: c.traits.shift_invariant, "traits.shift_invariant is False")
shiftable = needing(
    "Shift invariance, or a position in the state.", lambda c, m: c.traits.shift_invariant or shifted(m), UNMOVED
)
chunked = needing(
    "`chunk_size`.", lambda c, _: "chunk_size" in type(c).model_fields, "the configuration has no chunk_size"
)
differentiable = needing("Gradients.", lambda c, _: c.traits.differentiable, "traits.differentiable is False")
exact_gradients = needing(
    "A backward pass that is the derivative of the forward.",
    lambda c, _: not c.traits.surrogate_gradients,
    "traits.surrogate_gradients is True",
)
