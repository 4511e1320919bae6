"""What the three benchmarks of whole models have in common."""

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence

import torch

from ..models import ModelConfig
from ..training import load_config
from .peers import PEERS, Peer, Size
from .suite import Benchmark, Entry, Implementation

MODEL = (
    "model.d_model=512",
    "model.n_layers=6",
    "model.blocks.ret.mixer={n_heads: 4, chunk_size: 128}",
)
"""The model where no configuration is given, about 20M parameters: how it differs from retnet-tiny."""


def model_to_measure(config: str | None = None, changes: Sequence[str] = ()) -> ModelConfig:
    """A configuration's model, without dropout, which the others have not; the default one and changes where none."""
    model = load_config(config or "retnet-tiny", changes if config else [*MODEL, *changes]).model
    blocks = {name: block.model_copy(update={"dropout": 0.0}) for name, block in model.blocks.items()}
    return model.model_copy(update={"dropout": 0.0, "blocks": blocks})


class ModelImplementation(Implementation):
    """A peer in a benchmark, built when it is first asked for."""

    def __init__(self, benchmark: "ModelBenchmark", kind: type[Peer], size: Size, *, compiled: bool = False) -> None:
        self.benchmark, self.kind, self.size, self.compiled = benchmark, kind, size, compiled
        self.name = f"{kind.name}-compiled" if compiled else kind.name
        self.base = kind.name if compiled else None
        self._peer: Peer | None = None

    def missing(self) -> str | None:
        return self.kind.missing(self.size, self.benchmark.settings.device)

    @property
    def peer(self) -> Peer:
        """The model."""
        if self._peer is None:
            self._peer = self.kind(self.size, self.benchmark.settings.device, self.benchmark.dtype)
            self.benchmark.prepare(self._peer, compiled=self.compiled)
        return self._peer

    def entry(self, length: int) -> Entry:
        return self.benchmark.entry(self, length)

    def release(self) -> None:
        self._peer = None
        if self.benchmark.settings.device.type == "cuda":
            torch.cuda.empty_cache()


class ModelBenchmark(Benchmark):
    """A benchmark of whole models; its name is the role in which peers take part."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters."""
        return self.settings.dtype

    def prepare(self, peer: Peer, *, compiled: bool) -> None:
        """Make a new model ready."""
        if compiled:
            peer.compile(self.name)

    @abstractmethod
    def entry(self, implementation: ModelImplementation, length: int) -> Entry:
        """A model ready to run at a length."""

    def parts(self) -> dict[str, list[Implementation]]:
        return {self.name: list(self.implementations())}

    def implementations(self) -> Iterator[Implementation]:
        """All that take part."""
        size = Size(self.settings.model)
        for kind in PEERS:
            if self.name in kind.roles:
                yield ModelImplementation(self, kind, size)
            if self.name in kind.compiled_roles and self.settings.compile:
                yield ModelImplementation(self, kind, size, compiled=True)

    def tokens(self, batch: int, length: int) -> torch.Tensor:
        """Random ones."""
        generator = torch.Generator().manual_seed(0)
        return torch.randint(self.settings.model.vocab_size, (batch, length), generator=generator).to(
            self.settings.device
        )

    def notes(self) -> Iterable[str]:
        config = self.settings.model
        layers = f"{config.n_layers} layer{'s' * (config.n_layers > 1)}"
        yield (
            f"{layers} of width {config.d_model}, vocabulary of {config.vocab_size:,}, "
            f"{Size(config).parameters:,} parameters; the others' within 1 %."
        )
