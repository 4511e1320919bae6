"""torchscale's RetNet on stubs of what its module imports and does not need here."""

import sys
from types import ModuleType, SimpleNamespace

import pytest


def torchscale_classes():
    """Its classes. The module of RetNet imports fairscale and timm, and what is used of it here needs neither."""
    names = ["fairscale", "fairscale.nn", "timm", "timm.models", "timm.models.layers"]
    stubs = {name: ModuleType(name) for name in names}
    stubs["fairscale.nn"].checkpoint_wrapper = stubs["fairscale.nn"].wrap = None
    stubs["timm.models.layers"].drop_path = None
    with pytest.MonkeyPatch.context() as patch:
        for name, stub in stubs.items():
            patch.setitem(sys.modules, name, stub)
        try:
            from torchscale.architecture.config import RetNetConfig
            from torchscale.architecture.retnet import RetNetDecoder, RetNetRelPos
            from torchscale.component.multiscale_retention import MultiScaleRetention
        finally:  # no other test may find modules that were built on stubs
            for name in [name for name in sys.modules if name.split(".")[0] == "torchscale"]:
                del sys.modules[name]
    return SimpleNamespace(
        Config=RetNetConfig, RelPos=RetNetRelPos, Retention=MultiScaleRetention, Decoder=RetNetDecoder
    )
