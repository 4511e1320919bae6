"""The tiny presets with one kind of block: every mixer at one size."""

from ..configs import PRESETS
from .config import RunConfig
from .start import load_config


def single_kind_presets() -> dict[str, RunConfig]:
    """The tiny text presets whose layers are all of one kind, by name."""
    presets = {file.stem: load_config(file.stem) for file in sorted(PRESETS.glob("*-tiny.yaml"))}
    return {
        name: config
        for name, config in presets.items()
        if len(set(config.model.layers)) == 1 and config.data == presets["retnet-tiny"].data
    }


def mixer_kind(config: RunConfig) -> str:
    """The kind of the mixer of all layers."""
    return config.model.blocks[config.model.layers[0]].mixer.kind
