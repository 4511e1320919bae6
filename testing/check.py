"""A check: a named promise, what it needs of the mixer, what it draws, and the function that tests it."""

from collections.abc import Callable, Collection
from dataclasses import dataclass

from ..mixers.contract import MixerConfig
from .case import Draw
from .trial import Trial

Need = Callable[[MixerConfig], str | None]
"""Why a mixer of this configuration has nothing to check (the trait, by name), or None."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One promise of the contract."""

    name: str
    """As in reports: that of the function."""
    promise: str
    """One sentence: the function's docstring."""
    test: Callable[[Trial], None]
    """Raises where the promise is broken."""
    needs: tuple[Need, ...]
    """What a mixer must declare for it."""
    draw: Draw
    """What a case holds."""
    share: float
    """Cases, as a share of the examples asked for; 0 means one."""
    compiles: bool
    """Whether it compiles: slow, and left out of quick runs."""

    def examples(self, asked: int) -> int:
        """How many cases to run where `asked` were asked for."""
        return max(1, round(asked * self.share))

    def skip_reason(self, config: MixerConfig) -> str | None:
        """Why it does not apply to a mixer of this configuration."""
        return next((reason for need in self.needs if (reason := need(config))), None)


CHECKS: dict[str, Check] = {}
"""All checks by name, in the order they run."""


def check(
    *needs: Need, share: float = 0.1, draw: Draw | None = None, compiles: bool = False
) -> Callable[[Callable[[Trial], None]], Callable[[Trial], None]]:
    """Register a function of a `Trial` as a check of its name; its docstring is the promise."""

    def register(test: Callable[[Trial], None]) -> Callable[[Trial], None]:
        name, promise = name_and_promise(test, CHECKS)
        CHECKS[name] = Check(
            name=name,
            promise=promise,
            test=test,
            needs=needs,
            draw=draw or Draw(),
            share=share,
            compiles=compiles,
        )
        return test

    return register


def name_and_promise(test: Callable[..., None], known: Collection[str]) -> tuple[str, str]:
    """A check's name and promise: those of its function, and its docstring.

    Raises:
        ValueError: the name is taken, or there is no docstring.
    """
    if test.__name__ in known:
        raise ValueError(f"there is a check {test.__name__} already")
    promise = " ".join((test.__doc__ or "").split())
    if not promise:
        raise ValueError(f"{test.__name__} needs a docstring: the promise it checks")
    return test.__name__, promise


# ---- what checks need


def packing(config: MixerConfig) -> str | None:
    """Packing."""
    return None if config.traits.packing else "traits.packing is False"


def recurrent(config: MixerConfig) -> str | None:
    """The recurrent paradigm."""
    return None if "recurrent" in config.traits.paradigms else "traits.paradigms has no recurrent"


def several_paradigms(config: MixerConfig) -> str | None:
    """Two paradigms."""
    (*others, one) = sorted(config.traits.paradigms)
    return None if others else f"traits.paradigms has {one} alone"


def chunked(config: MixerConfig) -> str | None:
    """`chunk_size`."""
    return None if "chunk_size" in type(config).model_fields else "the configuration has no chunk_size"
