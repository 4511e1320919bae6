"""`seqmix mixers`: list the available mixers and their traits."""

import warnings
from dataclasses import dataclass

from ...mixers import MIXERS, Paradigm
from ...registry import reason_of
from ..console import plain_table, terminal


@dataclass(frozen=True)
class MixerTraits:
    """A mixer, and its traits with the default options."""

    kind: str
    """Kind of the mixer."""
    module: str
    """Module that provides it."""
    paradigms: list[str]
    """Paradigms that it computes."""
    state: str
    """`constant`, `growing` or `none`."""
    packing: bool
    """True if it takes packed documents."""
    shift_invariant: bool
    """True if the output does not depend on absolute positions."""


@dataclass(frozen=True)
class MixersResult:
    """Result of `seqmix mixers`."""

    mixers: list[MixerTraits]
    """The available mixers whose default options define traits."""
    without_defaults: dict[str, str]
    """Mixers whose traits depend on required options: the reason, by kind."""
    broken: dict[str, str]
    """Plug-ins that cannot be used: the reason, by kind."""


def mixers() -> MixersResult:
    """List the available mixers and their traits: paradigms, state, packing.

    Plug-ins are listed with their module, or with the reason why they cannot be imported.
    """
    console = terminal()
    table = plain_table("kind", "paradigms", "state", "packing", "shift-invariant")
    listed: list[MixerTraits] = []
    without_defaults: dict[str, str] = {}
    foreign: dict[str, str] = {}
    broken = MIXERS.broken()
    for kind in MIXERS.kinds():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # plug-ins with the kind of a built-in mixer are reported below
            module = MIXERS.origin(kind)
            if not module.startswith("seqmix."):
                foreign[kind] = module
            config = MIXERS.resolve(kind)
        try:
            traits = config.example().traits
        except ValueError as error:
            without_defaults[kind] = str(error)
            table.add_row(kind, f"depends on the configuration: {error}")
            continue
        except Exception as error:  # a plug-in's own code may raise anything
            if kind not in foreign:
                raise
            broken[kind] = f"its example has no traits: {reason_of(error)}"
            continue
        paradigms = [str(p) for p in Paradigm if p in traits.paradigms]
        listed.append(MixerTraits(kind, module, paradigms, traits.state, traits.packing, traits.shift_invariant))
        packing, invariant = ("yes" if trait else "no" for trait in (traits.packing, traits.shift_invariant))
        table.add_row(kind, " ".join(paradigms), traits.state, packing, invariant)
    console.print(table)
    console.print(
        "Traits are those of the default options; others may change them (a window bounds attention's state)."
    )
    for kind, module in foreign.items():
        console.print(f"{kind} comes from {module}")
    for name, reason in broken.items():
        console.print(f"plug-in {name} is broken: {reason}", style="red")
    return MixersResult(listed, without_defaults, broken)
