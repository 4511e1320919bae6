"""The former place of the conformance kit, deprecated in 0.2: it is `seqmix.testing` now."""

import warnings
from importlib import import_module
from typing import Any

warnings.warn("seqmix.mixers.testing is now seqmix.testing: import it from there", DeprecationWarning, stacklevel=2)


MODULES = {"KernelCase": ".kernel.case", "KernelReport": ".kernel.run", "Subject": ".mixer.subject"}
"""Modules of the names that `seqmix.testing` itself no longer has."""


def __getattr__(name: str) -> Any:
    # imported lazily: a mixer imports no kit, which stands a layer above
    return getattr(import_module(f"seqmix.testing{MODULES.get(name, '')}"), name)
