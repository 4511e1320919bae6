"""Contestants of the three benchmarks of whole models: a competitor, built when it is first asked for."""

from collections.abc import Iterable, Iterator
from typing import ClassVar

import torch

from .peers import COMPETITORS, Competitor, Size
from .suite import Benchmark, Contestant, Settings


class ModelContestant(Contestant):
    """A competitor in a benchmark."""

    role: ClassVar[str]

    def __init__(self, kind: type[Competitor], settings: Settings, size: Size, *, compiled: bool) -> None:
        self.kind, self.settings, self.size, self.compiled = kind, settings, size, compiled
        self.name = f"{kind.name}-compiled" if compiled else kind.name
        self.base = kind.name if compiled else None
        self._competitor: Competitor | None = None

    def missing(self) -> str | None:
        return self.kind.missing(self.size, self.settings.device)

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters."""
        return self.settings.dtype

    @property
    def competitor(self) -> Competitor:
        """The model."""
        if self._competitor is None:
            self._competitor = self.kind(self.size, self.settings.device, self.dtype)
            self.prepare(self._competitor)
        return self._competitor

    def prepare(self, competitor: Competitor) -> None:
        """Make a new model ready."""
        if self.compiled:
            competitor.compile(self.role)

    def release(self) -> None:
        self._competitor = None
        if self.settings.device.type == "cuda":
            torch.cuda.empty_cache()

    def rows(self, length: int) -> int:
        del length
        return self.settings.batch

    def tokens(self, batch: int, length: int) -> torch.Tensor:
        """Random ones."""
        generator = torch.Generator().manual_seed(0)
        vocab = self.size.config.vocab_size
        return torch.randint(vocab, (batch, length), generator=generator).to(self.settings.device)


class ModelBenchmark(Benchmark):
    """A benchmark of whole models."""

    contestant: ClassVar[type[ModelContestant]]

    def parts(self) -> dict[str, list[Contestant]]:
        return {self.name: list(self._contestants())}

    def _contestants(self) -> Iterator[Contestant]:
        size, role = Size(self.settings.model), self.contestant.role
        for kind in COMPETITORS:
            if role in kind.roles:
                yield self.contestant(kind, self.settings, size, compiled=False)
            if role in kind.compiled_roles and self.settings.compile:
                yield self.contestant(kind, self.settings, size, compiled=True)

    def notes(self) -> Iterable[str]:
        size = Size(self.settings.model)
        layers = f"{size.config.n_layers} layer{'s' * (size.config.n_layers > 1)}"
        yield (
            f"{layers} of width {size.config.d_model}, vocabulary of {size.config.vocab_size:,}, "
            f"{size.parameters:,} parameters; the others' within 1 %."
        )
