"""The benchmark of all mixers: a training step of the tiny preset of each, relative to retention's."""

from collections.abc import Iterable, Iterator

from ...mixers import MIXERS
from ...models import ModelConfig
from ...registry import SeqmixError
from ...training import load_config
from ...training.presets import mixer_kind, single_kind_presets
from .benchmark import Implementation
from .models import ModelImplementation, TrainBenchmark, without_dropout
from .peers import Size
from .peers.ours import Reference, Seqmix

FIRST = "retention"
"""Kind of mixer that the ratios are relative to."""
REFERENCE = "-reference"
"""End of the name of a model in plain torch."""


def former_names() -> dict[str, str]:
    """Return the deprecated names, those of presets, with the names that replace them."""
    kinds = {preset.removesuffix("-tiny"): mixer_kind(config) for preset, config in single_kind_presets().items()}
    return {name + end: kind + end for name, kind in kinds.items() if name != kind for end in ("", REFERENCE)}


def _plug_in(kind: str) -> ModelConfig:
    """Return the model of the preset retnet-tiny with a mixer given by its path, my_module:MyConfig."""
    heads = ", n_heads: 2" if "n_heads" in MIXERS.resolve(kind).model_fields else ""
    return load_config("retnet-tiny", [f"model.blocks.ret.mixer={{kind: '{kind}'{heads}}}"]).model


class MixersBenchmark(TrainBenchmark):
    """Benchmark of a training step of every mixer, with native kernels and with the reference where both exist."""

    name = "mixers"
    title = "A training step of the tiny preset of every mixer"

    def implementations(self) -> Iterator[Implementation]:
        if self.settings.compile:
            raise SeqmixError("bench mixers measures no compiled variants: leave out --compile")
        presets = {mixer_kind(config): config.model for config in single_kind_presets().values()}
        models = {FIRST: presets.pop(FIRST), **presets}
        paths = [name.removesuffix(REFERENCE) for name in self.settings.only if ":" in name]
        models |= {path: _plug_in(path) for path in paths}
        for kind, model in models.items():
            size = Size(without_dropout(model))
            for peer, variant in ((Seqmix, kind), (Reference, kind + REFERENCE)):
                implementation = ModelImplementation(self, peer, size)
                implementation.name = variant
                if implementation.unavailable_reason() is None:
                    yield implementation

    def notes(self) -> Iterable[str]:
        yield (
            "Models of about 0.9M parameters (`seqmix show PRESET` prints each). Ratios are to retention. A name that "
            "ends in -reference is the same model in plain torch, without native kernels; only mixers that have native "
            "kernels are listed twice."
        )
        _, *rest = super().notes()
        yield from rest
