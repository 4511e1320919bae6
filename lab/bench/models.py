"""The benchmarks of whole models: a training step, the prefill of a prompt, and decoding."""

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch

from ...models import ModelConfig
from ...training import load_config
from ...training.monitoring.memory import keep_freed_memory, return_freed_memory
from .benchmark import Benchmark, Implementation, PreparedCall
from .llama_cpp import FORMATS, LlamaCpp
from .peers import PEERS, Peer, Size
from .timing import TimedCall

MODEL = ("model.d_model=512", "model.n_layers=6", "model.blocks.ret.mixer={n_heads: 4, chunk_size: 128}")
"""Changes to retnet-tiny that make the default model, about 20M parameters."""

STEPS = 16
"""Tokens that one timed call of decoding generates."""


def model_to_measure(config: str | None = None, changes: Sequence[str] = ()) -> ModelConfig:
    """Return the model of a configuration (by default retnet-tiny with the changes `MODEL`), changed, without dropout.

    The other projects' models have no dropout either.
    """
    return without_dropout(load_config(config or "retnet-tiny", changes if config else [*MODEL, *changes]).model)


def without_dropout(model: ModelConfig) -> ModelConfig:
    """Return the configuration of a model without its dropout."""
    blocks = {name: block.model_copy(update={"dropout": 0.0}) for name, block in model.blocks.items()}
    return model.model_copy(update={"dropout": 0.0, "blocks": blocks})


class ModelImplementation(Implementation):
    """Implementation that measures a peer; its model is built at the first use."""

    def __init__(self, benchmark: "ModelBenchmark", kind: type[Peer], size: Size, *, compiled: bool = False) -> None:
        self.benchmark = benchmark
        self.kind = kind
        self.size = size
        self.compiled = compiled
        self.name = f"{kind.name}-compiled" if compiled else kind.name
        self.base = kind.name if compiled else None

    def unavailable_reason(self) -> str | None:
        return self.kind.unavailable_reason(self.size, self.benchmark.settings.device)

    @cached_property
    def peer(self) -> Peer:
        """Peer with its model, ready for the benchmark."""
        settings = self.benchmark.settings
        peer = self.kind(self.size, settings.device, self.benchmark.parameter_dtype or settings.dtype)
        self.benchmark.prepare(peer, compiled=self.compiled)
        return peer

    def prepared_call(self, length: int) -> PreparedCall:
        return self.benchmark.prepared_call(self, length)

    def release(self) -> None:
        vars(self).pop("peer", None)
        if self.benchmark.settings.device.type == "cuda":
            torch.cuda.empty_cache()


class ModelBenchmark(Benchmark):
    """Benchmark of whole models; it measures the peers whose roles include its name."""

    parameter_dtype: ClassVar[torch.dtype | None] = None
    """dtype of the parameters; None for the dtype of the settings."""

    def prepare(self, peer: Peer, *, compiled: bool) -> None:
        """Prepare a new model: compile it if asked to."""
        if compiled:
            peer.compile(self.name)

    @abstractmethod
    def prepared_call(self, implementation: ModelImplementation, length: int) -> PreparedCall:
        """Return an implementation's timed call at a length, with the model ready to run."""

    def parts(self) -> dict[str, list[Implementation]]:
        return {self.name: list(self.implementations())}

    def implementations(self) -> Iterator[Implementation]:
        """Yield an implementation for each peer with this role, and its compiled variant if the settings ask for it."""
        size = Size(self.settings.model)
        for kind in PEERS:
            if self.name in kind.roles:
                yield ModelImplementation(self, kind, size)
            if self.name in kind.compiled_roles and self.settings.compile:
                yield ModelImplementation(self, kind, size, compiled=True)

    def tokens(self, batch: int, length: int) -> torch.Tensor:
        """Return random tokens [batch length] on the device."""
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(self.settings.model.vocab_size, (batch, length), generator=generator)
        return tokens.to(self.settings.device)

    def notes(self) -> Iterable[str]:
        config = self.settings.model
        layers = f"{config.n_layers} layer{'s' * (config.n_layers > 1)}"
        yield (
            f"{layers} of width {config.d_model}, vocabulary of {config.vocab_size:,}, "
            f"{Size(config).parameters:,} parameters; the other models' parameters are within 1 %."
        )


class TrainBenchmark(ModelBenchmark):
    """Benchmark of a training step: forward, backward, gradient clipping, AdamW; autocast for reduced precision."""

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

    def prepared_call(self, implementation: ModelImplementation, length: int) -> PreparedCall:
        tokens = self.tokens(self.rows(length), length + 1)
        inputs = tokens[:, :-1].contiguous()
        targets = tokens[:, 1:].contiguous()
        peer = implementation.peer
        dtype = self.settings.dtype
        optimizer = peer.optimizer
        assert optimizer is not None
        peer.module.train()
        handle_freed_memory = keep_freed_memory if peer.keeps_freed_memory else return_freed_memory

        def run() -> None:
            handle_freed_memory()
            with torch.autocast(self.settings.device.type, dtype=dtype, enabled=dtype != torch.float32):
                loss = peer.loss(inputs, targets)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(peer.module.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return PreparedCall(
            # on a CPU a step reuses memory that the step before freed, so an untimed step of the same model comes first
            call=TimedCall(run, run) if self.settings.device.type == "cpu" else TimedCall(run),
            tokens=inputs.numel(),
            parameters=peer.parameters,
            record=None if implementation.compiled else run,
        )

    def notes(self) -> Iterable[str]:
        yield from super().notes()
        yield (
            "seqmix keeps freed memory in the process, as `seqmix train` does; the other models return it to the "
            "system, as their own programs do. On a CPU, an untimed step of the same model precedes every timed step."
        )
        yield f"A step has at most {self.settings.tokens:,} tokens in sequences of T tokens, and at least one sequence."
        if self.settings.activation_checkpointing:
            yield "Activations are recomputed in the backward pass; the floor includes the products of this."
        yield (
            "The share is the time of the model's own matrix products, timed alone at their own shapes, forward and "
            "backward, divided by the time of the step; causal attention counts as half of a square. Peak memory is "
            "beyond parameters and optimizer."
        )


class PrefillBenchmark(ModelBenchmark):
    """Benchmark of prefill: a call processes a prompt; models that can do so compute the last token's logits only."""

    name = "prefill"
    title = "Prefill of a prompt"

    def prepared_call(self, implementation: ModelImplementation, length: int) -> PreparedCall:
        peer = implementation.peer
        tokens = self.tokens(self.settings.batch, length)
        peer.module.eval()

        @torch.no_grad()
        def run() -> None:
            peer.read(tokens)

        record = None if implementation.compiled else run
        return PreparedCall(call=TimedCall(run), tokens=tokens.numel(), parameters=peer.parameters, record=record)

    def notes(self) -> Iterable[str]:
        yield from super().notes()
        yield (
            f"{self.settings.batch} prompt(s) of T tokens, including the state for decoding. torchscale is left out: "
            "its parallel modes return no state, and its recurrent mode is measured by `decode`."
        )


class DecodeBenchmark(ModelBenchmark):
    """Benchmark of greedy decoding: a call generates several tokens, starting from a random state."""

    name = "decode"
    title = "Decoding, per token"
    order = 1

    def implementations(self) -> Iterator[Implementation]:
        yield from super().implementations()
        for weights in FORMATS:
            yield LlamaCpp(self.settings, Size(self.settings.model), weights, STEPS)

    def prepared_call(self, implementation: ModelImplementation, length: int) -> PreparedCall:
        peer = implementation.peer
        batch = self.settings.batch
        peer.module.eval()
        with torch.no_grad():
            state: Any = peer.state_after(length, batch, STEPS)
        first = self.tokens(batch, 1)[:, 0]
        moved_bytes = peer.moved_bytes(state)

        @torch.no_grad()
        def run() -> None:
            # `after` is discarded: `step` returns new states or changes `state` in place, which `prepare` then renews
            tokens = first
            after = state
            for _ in range(STEPS):
                logits, after = peer.step(tokens, after)
                tokens = logits.argmax(-1)

        @torch.no_grad()
        def prepare() -> None:
            nonlocal state
            state = peer.renew(state, length)
            run()  # fills the processor's caches as in the middle of a text, after another implementation's call
            state = peer.renew(state, length)

        return PreparedCall(
            call=TimedCall(run, prepare, units=STEPS),
            tokens=batch,
            parameters=peer.parameters,
            state_bytes=sum(x.nbytes for x in peer.tensors(state)),
            moved_bytes=moved_bytes,
        )

    def notes(self) -> Iterable[str]:
        yield from super().notes()
        yield (
            f"{self.settings.batch} sequence(s); {STEPS} greedy tokens per call after a context of T tokens, whose "
            f"state is random, and after {STEPS} untimed tokens. Peak memory is that of a call, beyond parameters and "
            "state."
        )
        yield (
            "The share is the time in which the machine, at its copy rate, moves the bytes that a token needs (weights "
            "and KV cache read, a state of constant size read and written), divided by the time of the token. It can "
            "exceed 100 % where weights stay in the processor's cache."
        )
