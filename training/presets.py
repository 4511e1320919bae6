"""The tiny presets whose layers are all of one kind: one preset per mixer, all of about the same size."""

from ..configs import PRESETS
from .config import RunConfig
from .warm_start import load_config


def single_kind_presets() -> dict[str, RunConfig]:
    """Load the tiny text presets whose layers are all of one kind, by name."""
    presets = {file.stem: load_config(file.stem) for file in sorted(PRESETS.glob("*-tiny.yaml"))}
    return {
        name: config
        for name, config in presets.items()
        if len(set(config.model.layers)) == 1 and config.data == presets["retnet-tiny"].data
    }


def mixer_kind(config: RunConfig) -> str:
    """Return the kind of the first layer's mixer."""
    return config.model.blocks[config.model.layers[0]].mixer.kind
