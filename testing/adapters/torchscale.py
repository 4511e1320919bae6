"""Adapter for torchscale's retention layer in its three modes: recurrent, parallel, and chunkwise (with `chunk`)."""

import sys
from functools import cache
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar, Literal, NamedTuple
from unittest.mock import patch

import torch
from pydantic import Field
from torch import Tensor, nn

from ...mixers.base.traits import ContractError, Traits
from ...ops.runtime.paradigm import Paradigm
from .module import Adapted, AdaptedConfig, Result


class RetentionState(NamedTuple):
    """State of the recurrent mode; all rows have processed the same number of tokens."""

    memory: Tensor
    """Memory, divided by the square root of the sum of decays, [B H V K]."""
    position: Tensor
    """Number of tokens processed, [B]."""


class TorchscaleConfig(AdaptedConfig):
    """torchscale's `MultiScaleRetention`: parallel or in chunks, and token by token."""

    kind: Literal["torchscale"] = "torchscale"
    n_heads: int = Field(default=2, gt=0, le=19)
    """Number of heads, at most 19: the decay of the twentieth rounds to 1 in float32, and the norm divides 0 by 0."""
    chunk: int = Field(default=0, ge=0)
    """Chunk length in tokens; 0 for the parallel mode."""

    layer: ClassVar[type[Adapted]] = type("Torchscale", (Adapted,), {})  # not picklable: torchscale needs the stubs

    @property
    def traits(self) -> Traits:
        paradigms = frozenset({Paradigm.PARALLEL, Paradigm.RECURRENT})
        # not invariant to shifts: the sum of decays depends on the position, and the norm adds eps to a result of it
        fixed = {"packing": False, "shift_invariant": False, "compiles": False}
        return Traits(paradigms=paradigms, state="constant", parallel_from_state=False, **fixed)

    def undeclared(self, module: Any) -> dict[str, str]:
        return {"rows": "a call has one position for all rows"} | super().undeclared(module.rel_pos)

    def module(self, d_model: int) -> nn.Module:
        if d_model % (2 * self.n_heads):  # rotations need pairs of channels
            raise ContractError(
                f"heads must have an even width: expected d_model to be a multiple of {2 * self.n_heads}, got {d_model}"
            )
        return _Layer(d_model, self.n_heads, self.chunk)

    def state(self, module: Any, batch_size: int) -> RetentionState:
        like = module.retention.out_proj.weight
        size = len(like) // self.n_heads
        position = torch.zeros(batch_size, dtype=torch.int64, device=like.device)
        return RetentionState(like.new_zeros(batch_size, self.n_heads, size, size), position)

    def call(self, module: Any, x: Tensor, state: Any, cu_seqlens: Tensor | None, return_state: bool) -> Result:  # noqa: ARG002
        if x.shape[1] == 1:
            return module.step(x, self.state(module, len(x)) if state is None else state)
        y = module(x)
        if return_state:  # only the recurrent mode gives a state
            state = self.state(module, len(x))
            for token in x.split(1, dim=1):
                _, state = module.step(token, state)
        return y, state


class _Layer(nn.Module):
    """torchscale's retention layer with its relative positions."""

    def __init__(self, d_model: int, n_heads: int, chunk: int) -> None:
        super().__init__()
        self.chunk = chunk
        classes = torchscale()
        args = classes.Config(
            decoder_embed_dim=d_model, decoder_retention_heads=n_heads, recurrent_chunk_size=chunk or 1
        )
        self.rel_pos = classes.RelPos(args)
        self.retention = classes.Retention(args, d_model, d_model, n_heads)

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        if not self.chunk:
            return self.retention(x, self.rel_pos(length))
        padded = nn.functional.pad(x, (0, 0, 0, -length % self.chunk))  # as torchscale's decoder does
        rel_pos = self.rel_pos(padded.shape[1], chunkwise_recurrent=True)
        return self.retention(padded, rel_pos, chunkwise_recurrent=True)[:, :length]

    def step(self, x: Tensor, state: RetentionState) -> tuple[Tensor, RetentionState]:
        """Process one token from a state; return the output and the next state."""
        position, decay = int(state.position[0]), self.rel_pos.decay.exp()
        incremental = {"prev_key_value": state.memory, "scale": (1 - decay**position) / (1 - decay)} if position else {}
        y = self.retention(x, self.rel_pos(position + 1, activate_recurrent=True), False, incremental)
        return y, RetentionState(incremental["prev_key_value"], state.position + 1)


@cache
def torchscale() -> SimpleNamespace:
    """Import torchscale's classes for RetNet.

    The module of RetNet imports fairscale and timm, which these classes do not need: stubs replace them.

    Raises:
        ContractError: torchscale is not installed.
    """
    names = ["fairscale", "fairscale.nn", "timm", "timm.models", "timm.models.layers"]
    stubs: dict[str, Any] = {name: ModuleType(name) for name in names}
    stubs["fairscale.nn"].checkpoint_wrapper = stubs["fairscale.nn"].wrap = None
    stubs["timm.models.layers"].drop_path = None
    with patch.dict(sys.modules, stubs):  # afterwards, the stubs and the modules that use them are forgotten
        try:
            from torchscale.architecture.config import RetNetConfig  # pyright: ignore[reportMissingImports]
            from torchscale.architecture.retnet import (  # pyright: ignore[reportMissingImports]
                RetNetDecoder,
                RetNetRelPos,
            )
            from torchscale.component.multiscale_retention import (  # pyright: ignore[reportMissingImports]
                MultiScaleRetention,
            )
        except ModuleNotFoundError as error:
            raise ContractError(f"{error.name} is not installed: pip install --no-deps torchscale") from None
    classes = {"Config": RetNetConfig, "Decoder": RetNetDecoder, "RelPos": RetNetRelPos}
    return SimpleNamespace(**classes, Retention=MultiScaleRetention)
