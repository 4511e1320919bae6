"""A check: a named property, what it needs of what is tested, what it draws, and the function that tests it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

from ..mixers.contract import MixerConfig, SequenceMixer
from ..mixers.state import to_dict
from ..ops.kernels import Kernel
from .kernel_case import KernelDraw
from .kernel_trial import KernelTrial
from .mixer_case import Draw
from .mixer_options import alternatives
from .mixer_trial import Trial

S = TypeVar("S")
D = TypeVar("D")
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Check(Generic[S, D, T]):
    """One property, of mixers (S is their configuration) or of kernels."""

    name: str
    """As in reports: that of the function."""
    property: str
    """One sentence: the function's docstring."""
    test: Callable[[T], None]
    """Raises where the property does not hold."""
    needs: tuple[Callable[..., str | None], ...]
    """Each gives the reason why there is nothing to test (the trait, by name), or None."""
    draw: D
    """What a case holds."""
    share: float
    """Cases, as a share of the examples asked for; 0 means one."""
    compiles: bool = False
    """Whether it compiles: slow, and left out of quick runs."""
    use: str = ""
    """Which use breaks where the property does not hold, and how: "training on packed text: documents leak"."""

    def examples(self, asked: int) -> int:
        """How many cases to run where `asked` were asked for."""
        return max(1, round(asked * self.share))

    def skip_reason(self, *subject: Any) -> str | None:
        """Why it does not apply to a kernel, or to a configuration and its mixer."""
        return next((reason for need in self.needs if (reason := need(*subject))), None)


MixerCheck = Check[MixerConfig, Draw, Trial]
KernelCheck = Check[Kernel, KernelDraw, KernelTrial]

CHECKS: dict[str, MixerCheck] = {}
"""All checks of mixers by name, in the order they run."""

KERNEL_CHECKS: dict[str, KernelCheck] = {}
"""All checks of kernels."""


def check(
    *needs: Callable[[MixerConfig, SequenceMixer], str | None],
    share: float = 0.1,
    draw: Draw | None = None,
    compiles: bool = False,
    use: str = "",
) -> Callable[[Callable[[Trial], None]], Callable[[Trial], None]]:
    """Register a function of a `Trial` as a check of mixers; its docstring is the property.

    Raises:
        ValueError: its name is taken, or it has no docstring.
    """
    return _registers(CHECKS, needs=needs, share=share, draw=draw or Draw(), compiles=compiles, use=use)


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


# ---- what checks of mixers need


def declares(what: str, words: str) -> Callable[[MixerConfig, SequenceMixer], str | None]:
    """What a module of another project may not have (`undeclared` of the adapted mixer says why), also in words."""

    def need(_: MixerConfig, mixer: SequenceMixer) -> str | None:
        return getattr(mixer, "undeclared", {}).get(what)

    need.__doc__ = words
    return need


def optional(config: MixerConfig, _: SequenceMixer) -> str | None:
    """Options."""
    return None if alternatives(config) else "the configuration has no options to vary"


def packing(config: MixerConfig, _: SequenceMixer) -> str | None:
    """Packing."""
    return None if config.traits.packing else "traits.packing is False"


def stateful(config: MixerConfig, _: SequenceMixer) -> str | None:
    """A state."""
    return None if config.traits.has_state else "traits.state is none"


def constant(config: MixerConfig, _: SequenceMixer) -> str | None:
    """A constant state."""
    return None if config.traits.state == "constant" else f"traits.state is {config.traits.state}"


def recurrent(config: MixerConfig, _: SequenceMixer) -> str | None:
    """The recurrent paradigm."""
    return None if "recurrent" in config.traits.paradigms else "traits.paradigms has no recurrent"


def compilable(config: MixerConfig, _: SequenceMixer) -> str | None:
    """Compiling."""
    return None if config.traits.compiles else "traits.compiles is False"


def positioned(_: MixerConfig, mixer: SequenceMixer) -> str | None:
    """A position in the state."""
    return None if positions(mixer) else "shift_state moves no leaf of the state"


def positions(mixer: SequenceMixer) -> list[str]:
    """The leaves of the state that a position moves."""
    state = mixer.init_state(1)
    moved = to_dict(mixer.shift_state(state, 1))
    return [name for name, leaf in to_dict(state).items() if not torch.equal(moved[name], leaf)]


def shiftable(config: MixerConfig, mixer: SequenceMixer) -> str | None:
    """Shift invariance, or a position in the state."""
    return None if config.traits.shift_invariant else positioned(config, mixer)


def several_paradigms(config: MixerConfig, _: SequenceMixer) -> str | None:
    """Two paradigms."""
    (*others, one) = sorted(config.traits.paradigms)
    return None if others else f"traits.paradigms has {one} alone"


def chunked(config: MixerConfig, _: SequenceMixer) -> str | None:
    """`chunk_size`."""
    return None if "chunk_size" in type(config).model_fields else "the configuration has no chunk_size"


def differentiable(config: MixerConfig, _: SequenceMixer) -> str | None:
    """Gradients."""
    return None if config.traits.differentiable else "traits.differentiable is False"


def exact_gradients(config: MixerConfig, _: SequenceMixer) -> str | None:
    """A backward pass that is the derivative of the forward."""
    return "traits.surrogate_gradients is True" if config.traits.surrogate_gradients else None


def value_residual(config: MixerConfig, _: SequenceMixer) -> str | None:
    """A value residual."""
    return None if config.traits.value_residual else "traits.value_residual is False"


def context_parallel(_: MixerConfig, mixer: SequenceMixer) -> str | None:
    """Its own context parallelism."""
    own = mixer.supports_context_parallel
    return None if own else "supports_context_parallel is False: states go from rank to rank, as for any mixer"
