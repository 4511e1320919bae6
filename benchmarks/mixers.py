"""The benchmark of all mixers: a training step of the tiny preset of each, relative to retention's."""

from collections.abc import Iterable, Iterator

from ..registry import SeqmixError
from ..training.presets import single_kind_presets
from .benchmark import Implementation
from .models import ModelImplementation, TrainBenchmark, without_dropout
from .peers import Size
from .peers.ours import Reference, Seqmix

FIRST = "retnet-tiny"
"""Preset that the ratios are relative to."""


class MixersBenchmark(TrainBenchmark):
    """Benchmark of a training step of every mixer, with native kernels and with the reference where both exist."""

    name = "mixers"
    title = "A training step of the tiny preset of every mixer"

    def implementations(self) -> Iterator[Implementation]:
        if self.settings.compile:
            raise SeqmixError("bench mixers measures no compiled variants: leave out --compile")
        presets = single_kind_presets()
        for preset in (FIRST, *(name for name in presets if name != FIRST)):
            size = Size(without_dropout(presets[preset].model))
            name = preset.removesuffix("-tiny")
            for peer, variant in ((Seqmix, name), (Reference, f"{name}-reference")):
                implementation = ModelImplementation(self, peer, size)
                implementation.name = variant
                if implementation.unavailable_reason() is None:
                    yield implementation

    def notes(self) -> Iterable[str]:
        yield (
            "Models of about 0.9M parameters (`seqmix show PRESET` prints each). Ratios are to retnet. A name that "
            "ends in -reference is the same model in plain torch, without native kernels; only mixers that have native "
            "kernels are listed twice."
        )
        _, *rest = super().notes()
        yield from rest
