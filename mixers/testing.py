"""The former place of the conformance kit, kept for 0.2: it is `seqmix.testing` now."""

import warnings
from importlib import import_module
from typing import Any

warnings.warn("seqmix.mixers.testing is now seqmix.testing: import it from there", DeprecationWarning, stacklevel=2)


def __getattr__(name: str) -> Any:
    # looked up when it is asked for: a mixer imports no kit, which stands a floor above
    return getattr(import_module("seqmix.testing"), name)
