"""The benchmarks of whole models, one a peer: a training step, a prompt that is read, tokens that are decoded."""

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch

from ..models import ModelConfig
from ..training import load_config
from ..training.monitoring.memory import keep_freed_memory, return_freed_memory
from .benchmark import Benchmark, Entry, Implementation
from .measure import TimedCall
from .peers import PEERS, Peer, Size

MODEL = ("model.d_model=512", "model.n_layers=6", "model.blocks.ret.mixer={n_heads: 4, chunk_size: 128}")
"""The model where no configuration is given, about 20M parameters: how it differs from retnet-tiny."""

STEPS = 16
"""Tokens that one timed call makes."""


def model_to_measure(config: str | None = None, changes: Sequence[str] = ()) -> ModelConfig:
    """A configuration's model, without dropout, which the others have not; the default one and changes where none."""
    model = load_config(config or "retnet-tiny", changes if config else [*MODEL, *changes]).model
    blocks = {name: block.model_copy(update={"dropout": 0.0}) for name, block in model.blocks.items()}
    return model.model_copy(update={"dropout": 0.0, "blocks": blocks})


class ModelImplementation(Implementation):
    """A peer in a benchmark, built when it is first asked for."""

    def __init__(self, benchmark: "ModelBenchmark", kind: type[Peer], size: Size, *, compiled: bool = False) -> None:
        self.benchmark = benchmark
        self.kind = kind
        self.size = size
        self.compiled = compiled
        self.name = f"{kind.name}-compiled" if compiled else kind.name
        self.base = kind.name if compiled else None

    def missing(self) -> str | None:
        return self.kind.missing(self.size, self.benchmark.settings.device)

    @cached_property
    def peer(self) -> Peer:
        """The model."""
        settings = self.benchmark.settings
        peer = self.kind(self.size, settings.device, self.benchmark.parameter_dtype or settings.dtype)
        self.benchmark.prepare(peer, compiled=self.compiled)
        return peer

    def entry(self, length: int) -> Entry:
        return self.benchmark.entry(self, length)

    def release(self) -> None:
        vars(self).pop("peer", None)
        if self.benchmark.settings.device.type == "cuda":
            torch.cuda.empty_cache()


class ModelBenchmark(Benchmark):
    """A benchmark of whole models; its name is the role in which peers take part."""

    parameter_dtype: ClassVar[torch.dtype | None] = None
    """None: the settings'."""

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
        tokens = torch.randint(self.settings.model.vocab_size, (batch, length), generator=generator)
        return tokens.to(self.settings.device)

    def notes(self) -> Iterable[str]:
        config = self.settings.model
        layers = f"{config.n_layers} layer{'s' * (config.n_layers > 1)}"
        yield (
            f"{layers} of width {config.d_model}, vocabulary of {config.vocab_size:,}, "
            f"{Size(config).parameters:,} parameters; the others' within 1 %."
        )


class TrainBenchmark(ModelBenchmark):
    """A call is forward, backward, a clipped gradient, and AdamW; reduced precision by autocast."""

    name = "train"
    title = "A training step of a whole model"
    parameter_dtype = torch.float32

    def prepare(self, peer: Peer, *, compiled: bool) -> None:
        if self.settings.activation_checkpointing:
            peer.recompute_activations()
        super().prepare(peer, compiled=compiled)
        peer.optimizer = torch.optim.AdamW(peer.module.parameters(), lr=1e-4, fused=True)

    def rows(self, length: int) -> int:
        return max(1, self.settings.tokens // length)

    def entry(self, implementation: ModelImplementation, length: int) -> Entry:
        tokens = self.tokens(self.rows(length), length + 1)
        inputs = tokens[:, :-1].contiguous()
        targets = tokens[:, 1:].contiguous()
        peer = implementation.peer
        dtype = self.settings.dtype
        optimizer = peer.optimizer
        assert optimizer is not None
        peer.module.train()
        freed_memory = keep_freed_memory if peer.keeps_freed_memory else return_freed_memory

        def run() -> None:
            freed_memory()
            with torch.autocast(self.settings.device.type, dtype=dtype, enabled=dtype != torch.float32):
                loss = peer.loss(inputs, targets)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(peer.module.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return Entry(
            # the memory that a step finds on a CPU is what the step before has left, which is to be its own
            call=TimedCall(run, run) if self.settings.device.type == "cpu" else TimedCall(run),
            tokens=inputs.numel(),
            parameters=peer.parameters,
            record=None if implementation.compiled else run,
        )

    def notes(self) -> Iterable[str]:
        yield from super().notes()
        yield (
            "Freed memory stays with the process in the steps of seqmix, as `seqmix train` has it, and goes back to "
            "the system in those of the others, as in their own programs. On a CPU every timed step follows one of the "
            "same model that is not timed, as in training."
        )
        yield f"A step has at most {self.settings.tokens:,} tokens, in sequences of T, and one sequence at least."
        if self.settings.activation_checkpointing:
            yield "Activations are recomputed in backward; the products of that count in the floor."
        yield (
            "The share is that of the model's own matrix products timed alone, at their own shapes, forward and "
            "backward; causal attention counts as half of a square. Peak memory is beyond parameters and optimizer."
        )


class PrefillBenchmark(ModelBenchmark):
    """A call reads a prompt; it forms logits of the last token alone where they can be had."""

    name = "prefill"
    title = "Reading a prompt"

    def entry(self, implementation: ModelImplementation, length: int) -> Entry:
        peer = implementation.peer
        tokens = self.tokens(self.settings.batch, length)
        peer.module.eval()

        @torch.no_grad()
        def run() -> None:
            peer.read(tokens)

        record = None if implementation.compiled else run
        return Entry(call=TimedCall(run), tokens=tokens.numel(), parameters=peer.parameters, record=record)

    def notes(self) -> Iterable[str]:
        yield from super().notes()
        yield (
            f"{self.settings.batch} prompt(s) of T tokens, with the state that decoding goes on from. torchscale takes "
            "no part: its parallel modes give no state, and token by token it reads at the speed of `decode`."
        )


class DecodeBenchmark(ModelBenchmark):
    """A call makes several tokens, each the most probable one; states are random numbers."""

    name = "decode"
    title = "Decoding, a token"
    order = 1

    def entry(self, implementation: ModelImplementation, length: int) -> Entry:
        peer = implementation.peer
        batch = self.settings.batch
        peer.module.eval()
        with torch.no_grad():
            state: Any = peer.state_after(length, batch, STEPS)
        first = self.tokens(batch, 1)[:, 0]
        moved = peer.moved(state)

        @torch.no_grad()
        def run() -> None:
            # the last state is not kept: one that is a value has not changed, and one that is not is renewed
            tokens = first
            after = state
            for _ in range(STEPS):
                logits, after = peer.step(tokens, after)
                tokens = logits.argmax(-1)

        @torch.no_grad()
        def prepare() -> None:
            nonlocal state
            state = peer.renew(state, length)
            run()  # as in the midst of a text: what the last implementation left in the caches is nobody's cost
            state = peer.renew(state, length)

        return Entry(
            call=TimedCall(run, prepare, units=STEPS),
            tokens=batch,
            parameters=peer.parameters,
            state_bytes=sum(x.nbytes for x in peer.tensors(state)),
            moved=moved,
        )

    def notes(self) -> Iterable[str]:
        yield from super().notes()
        yield (
            f"{self.settings.batch} sequence(s); {STEPS} greedy tokens a call, after a context of T tokens whose "
            f"state is random numbers, and after {STEPS} that are not timed, as in the midst of a text. Peak memory is "
            "beyond parameters and state, over a call."
        )
        yield (
            "The share is that of the time in which memory moves what a token needs, at the machine's copy rate: "
            "weights and cache read, a state of constant size read and written. Weights that stay in the processor's "
            "cache can be above it."
        )
