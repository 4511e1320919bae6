"""`seqmix mixers`: list the available mixers and their traits."""

import warnings

from ..mixers import MIXERS, Paradigm
from ..registry.providers import reason_of
from .console import plain_table, terminal


def mixers() -> None:
    """List the available mixers and their traits: paradigms, state, packing.

    Plug-ins are listed with their module, or with the reason why they cannot be imported.
    """
    console = terminal()
    table = plain_table("kind", "paradigms", "state", "packing", "shift-invariant")
    foreign: dict[str, str] = {}
    broken = MIXERS.broken()
    for kind in MIXERS.kinds():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # plug-ins with the kind of a built-in mixer are reported below
            if not (module := MIXERS.origin(kind)).startswith("seqmix."):
                foreign[kind] = module
            config = MIXERS.resolve(kind)
        try:
            traits = config.example().traits
        except ValueError as error:
            table.add_row(kind, f"depends on the configuration: {error}")
            continue
        except Exception as error:  # a plug-in's own code may raise anything
            if kind not in foreign:
                raise
            broken[kind] = f"its example has no traits: {reason_of(error)}"
            continue
        table.add_row(
            kind,
            " ".join(p for p in Paradigm if p in traits.paradigms),
            traits.state,
            "yes" if traits.packing else "no",
            "yes" if traits.shift_invariant else "no",
        )
    console.print(table)
    console.print(
        "Traits are those of the default options; others may change them (a window bounds attention's state)."
    )
    for kind, module in foreign.items():
        console.print(f"{kind} comes from {module}")
    for name, reason in broken.items():
        console.print(f"plug-in {name} is broken: {reason}", style="red")
