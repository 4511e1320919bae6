"""The op benchmark: retention and attention of given queries, keys and values, forward and forward + backward."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...mixers import Paradigm
from ...models import ModelConfig
from ...ops.decay import decay
from ...ops.runtime.kernel import Probe, find
from ...registry import SeqmixError
from .benchmark import Benchmark, Implementation, PreparedCall, Settings, Skip
from .peers.gpt import eager_attention
from .peers.peer import GPU_ONLY, Size, install_hint
from .peers.torchscale import CHUNK, torchscale
from .timing import TimedCall


class Shapes(NamedTuple):
    """Number of heads, key and value width per head, and chunk length of a model's retention."""

    heads: int
    keys: int
    values: int
    chunk: int

    @classmethod
    def of(cls, model: ModelConfig) -> "Shapes":
        """Return the shapes of a model's first retention layer.

        Raises:
            SeqmixError: the model has no retention layer.
        """
        if (config := Size(model).retention) is None:
            kinds = ", ".join(sorted({model.blocks[name].mixer.kind for name in model.layers}))
            raise SeqmixError(f"bench op needs a model with retention, got one with {kinds}: choose a retnet preset")
        keys, values = (
            round(model.d_model * expand) // config.n_heads for expand in (config.expand_k, config.expand_v)
        )
        return cls(config.n_heads, keys, values, config.chunk_size)


@dataclass
class OpImplementation(Implementation):
    """Function of queries, keys and values [B T H K or V], timed with random inputs."""

    name: str
    settings: Settings
    widths: tuple[int, int, int]
    function: Callable[[Tensor, Tensor, Tensor], Tensor]
    backward: bool
    dtype: torch.dtype
    reason: str | None = None
    base: str | None = None

    def unavailable_reason(self) -> str | None:
        return self.reason

    def prepared_call(self, length: int) -> PreparedCall:
        batch, (heads, keys, values) = self.settings.batch, self.widths
        device = self.settings.device
        generator = torch.Generator(device).manual_seed(0)  # on the device: drawing on a CPU would take long

        def random(width: int) -> Tensor:
            return torch.randn(batch, length, heads, width, generator=generator, device=device).to(self.dtype)

        # keys are scaled as in a mixer, so that sums of scores stay in range
        q, k, v = random(keys), random(keys) * keys**-0.5, random(values)
        upstream = random(values) if self.backward else None
        if self.backward:
            q, k, v = (x.requires_grad_() for x in (q, k, v))

        def run() -> None:
            with torch.set_grad_enabled(self.backward):
                output = self.function(q, k, v)
            if upstream is not None:
                output.backward(upstream)
                q.grad = k.grad = v.grad = None

        return PreparedCall(call=TimedCall(run), tokens=batch * length, record=None if self.base else run)


class OpBenchmark(Benchmark):
    """Benchmark of retention without its projections: in several paradigms, of other projects, and beside attention."""

    name = "op"
    title = "A map over a sequence, without weights"

    def parts(self) -> dict[str, list[Implementation]]:
        return {
            "forward": self._implementations(backward=False),
            "forward + backward": self._implementations(backward=True),
        }

    def _implementations(self, *, backward: bool) -> list[Implementation]:
        s = Shapes.of(self.settings.model)
        settings = self.settings
        device = settings.device
        dtype = settings.dtype
        log_decay = torch.log1p(-(2.0 ** (-5 - torch.arange(s.heads, device=device))))
        triton = find("decay", Paradigm.CHUNKWISE, "triton")
        probe = Probe(
            device=device, dtype=dtype, key_width=s.keys, value_width=s.values, log_decay="H", needs_grad=backward
        )
        triton_problem = "; ".join(triton.unsupported(probe)) or None
        torchscale_problem = install_hint("torchscale", "torchscale")
        fla_problem = GPU_ONLY if device.type != "cuda" else install_hint("fla", "fla-core")

        def op(paradigm: Paradigm, backend: str = "reference") -> Callable[[Tensor, Tensor, Tensor], Tensor]:
            options = {"paradigm": paradigm, "chunk_size": s.chunk, "backend": backend}
            return lambda q, k, v: decay(q, k, v, log_decay, **options).output

        def implementation(
            name: str, function: Any, *, values: int = s.values, dtype: torch.dtype = dtype, **options: Any
        ) -> Implementation:
            return OpImplementation(name, settings, (s.heads, s.keys, values), function, backward, dtype, **options)

        lower_dtypes = [torch.bfloat16] if dtype == torch.float32 else []
        return [
            implementation("chunkwise", op(Paradigm.CHUNKWISE)),
            *(implementation("chunkwise-bfloat16", op(Paradigm.CHUNKWISE), dtype=lower) for lower in lower_dtypes),
            implementation("triton", op(Paradigm.CHUNKWISE, "triton"), reason=triton_problem, base="chunkwise"),
            implementation("parallel", op(Paradigm.PARALLEL)),
            implementation(
                "torchscale-chunkwise", TorchscaleOp(settings, s, chunkwise=True), reason=torchscale_problem
            ),
            implementation(
                "torchscale-parallel", TorchscaleOp(settings, s, chunkwise=False), reason=torchscale_problem
            ),
            implementation("fla", _fla_retention, reason=fla_problem, base="chunkwise"),
            implementation("sdpa", _attention(F.scaled_dot_product_attention), values=s.keys),
            implementation("eager", _attention(eager_attention), values=s.keys),
            implementation("copy", _Copy.apply),
        ]

    def notes(self) -> Iterable[str]:
        s = Shapes.of(self.settings.model)
        yield (
            f"{self.settings.batch} sequence(s), {s.heads} heads, keys {s.keys} and values {s.values} wide, "
            f"chunks of {s.chunk} tokens (torchscale: {CHUNK})."
        )
        yield (
            f"sdpa and eager compute softmax attention instead, with values {s.keys} wide, as in a Transformer of the "
            "same width. torchscale also normalises scores, which retention here does outside the op; the masks "
            "and decays of its parallel mode are computed before the timed call."
        )
        yield (
            "copy moves as much memory as an op that reads its inputs and writes its results once. The share is the "
            "time of the op's own matrix products timed alone (for triton and fla, those of chunkwise) divided by the "
            "time of the op; causal squares count in full, but as half for sdpa."
        )


class TorchscaleOp:
    """torchscale's retention as a function of queries, keys and values."""

    def __init__(self, settings: Settings, shapes: Shapes, *, chunkwise: bool) -> None:
        self.settings = settings
        self.shapes = shapes
        self.chunkwise = chunkwise
        self.positions: tuple[int, Any] = (0, None)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Convert to torchscale's layout (queries and keys [B H T *], values [B T D]) and compute retention."""
        length = q.shape[1]
        if self.chunkwise and length % min(CHUNK, length):
            raise Skip(f"expects a length divisible by {CHUNK} (its chunk length), got {length}")
        if self.positions[0] != length:
            self.positions = (length, self._positions(length))
        layer, decays = self.positions[1]
        q, k = q.transpose(1, 2), k.transpose(1, 2)
        if not self.chunkwise:
            return layer.parallel_forward(q, k, v.flatten(2), decays)
        # chunk_recurrent_forward expects contiguous queries and keys
        output = layer.chunk_recurrent_forward(q.contiguous(), k.contiguous(), v.flatten(2), decays)
        return output.reshape(v.shape)

    def _positions(self, length: int) -> tuple[Any, Any]:
        s = self.shapes
        dtype = self.settings.dtype
        classes = torchscale()
        config = classes.Config(
            decoder_embed_dim=s.heads * s.keys, decoder_retention_heads=s.heads, recurrent_chunk_size=min(CHUNK, length)
        )
        layer = classes.Retention(config, s.heads * s.keys, s.heads * s.values, s.heads)
        positions = classes.RelPos(config).to(self.settings.device)
        _, decays = positions(length, chunkwise_recurrent=self.chunkwise)
        return layer, tuple(x.to(dtype) for x in decays) if self.chunkwise else decays.to(dtype)


def _attention(attend: Callable[..., Tensor]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda q, k, v: attend(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True).transpose(1, 2)


class _Copy(torch.autograd.Function):
    """Copies of inputs and gradients with about the least memory traffic of an op, forward and backward."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        k.clone()
        return v.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        q, k, v = ctx.saved_tensors
        v.clone()
        return q.clone(), k.clone(), gradients[0].clone()


def _fla_retention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from fla.ops.retention import chunk_retention  # type: ignore[import-not-found]

    return chunk_retention(q, k, v)[0]
