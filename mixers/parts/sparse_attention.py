"""Base class of softmax attention over chosen keys: projections, heads, positions and the cache."""

from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from ...ops.attention import cast_cache
from ...ops.runtime.call import Call
from ...ops.runtime.paradigm import Paradigm
from ..base.layer_call import Mixed, MixResult
from ..base.roles import Role, RowBlock
from ..base.traits import ContractError, Traits
from .cached import CachedMixer, CachedState, GroupedQueryConfig
from .gates import Gate, GatedNorm
from .projections import projections_of
from .qk_norm import QKNorm
from .rotary import rotated
from .widths import divided


class SparseAttentionConfig(GroupedQueryConfig):
    """Fields of all attentions over chosen keys; those that `attention` has too mean the same."""

    head_dim: int | None = Field(default=None, gt=0, examples=[8])
    """Width of one head; d_model / n_heads when null."""
    positions: Literal["rope", "none"] = "rope"
    """Position encoding: `rope` rotates queries and keys (RoFormer), `none` rotates nothing."""
    rope_base: float = Field(default=10000.0, gt=1, examples=[100.0])
    """Base of the rotation frequencies."""
    qk_norm: Literal["rms", "none"] = "none"
    """Norm of queries and keys per head, before rotation."""
    norm_eps: float = Field(default=1e-6, ge=0)
    """Constant added to the mean square in `qk_norm`."""
    gate: Gate = "none"
    """Elementwise output gate."""
    chunk_size: int = Field(default=128, gt=0, le=2**20)
    """Queries per block of the chunkwise paradigm; changes the cost, never the result."""
    paradigm: Paradigm = Field(default=Paradigm.PARALLEL, strict=False)
    """Paradigm of training and evaluation."""

    small: ClassVar[dict[str, Any]] = {}
    """Fields of the example, so small that the short texts of checks have more keys than a query reads."""

    @classmethod
    def example_fields(cls) -> dict[str, Any]:
        return super().example_fields() | cls.small

    @property
    def traits(self) -> Traits:
        """Traits: all paradigms, a growing state; blocks depend on the distance from a document's first token."""
        return Traits(paradigms=frozenset(Paradigm), state="growing", packing=True, shift_invariant=False)


class SparseAttentionMixer(CachedMixer):
    """Queries, keys and values by head, an attention over chosen keys (`attend`), output gate and projection.

    Args:
        config: the configuration.
        d_model: width of the residual stream.
        others: rows of further projections of the input, by name; their role is that of gates.
    """

    supports_context_parallel = False

    def __init__(self, config: SparseAttentionConfig, d_model: int, **others: int) -> None:
        super().__init__(config)
        self.n_heads = config.n_heads
        self.n_kv_heads = config.n_kv_heads or config.n_heads
        self.head_dim = config.head_dim or divided(
            d_model, 1.0, "1", self.n_heads, "n_heads", f"{self.n_heads} heads do"
        )
        if config.positions == "rope" and self.head_dim % 2:
            raise ContractError(
                f"{self.kind} rotates pairs of dimensions (positions = rope) and needs an even head_dim, "
                f"got {self.head_dim}: set head_dim, or positions = none"
            )
        heads = {"q": self.n_heads, "k": self.n_kv_heads, "v": self.n_kv_heads}
        if config.gate != "none":
            heads["gate"] = self.n_heads
        self.row_blocks = [RowBlock(name, n * self.head_dim, Role.MATRIX, n) for name, n in heads.items()]
        self.row_blocks += [RowBlock(name, rows, Role.GATE) for name, rows in others.items()]
        self.parameter_roles = {"in_proj.weight": self.row_blocks}
        # one matrix product for all projections
        self.in_proj = nn.Linear(d_model, sum(block.rows for block in self.row_blocks), bias=False)
        key_heads = (self.n_heads, self.n_kv_heads)
        self.qk_norm = QKNorm(key_heads, self.head_dim, config.norm_eps) if config.qk_norm == "rms" else None
        self.gate = GatedNorm(self.head_dim, "none", config.gate, affine=False, eps=0)
        self.out_proj = nn.Linear(self.n_heads * self.head_dim, d_model, bias=False)

    def reset_parameters(self) -> None:
        """Initialise as softmax attention: Xavier-uniform, with gain 2^-0.5 for all but the output projection."""
        for projection in self.in_proj.weight.split([block.rows for block in self.row_blocks]):
            nn.init.xavier_uniform_(projection, gain=2**-0.5)
        if self.qk_norm is not None:
            self.qk_norm.reset_parameters()
        nn.init.xavier_uniform_(self.out_proj.weight)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, others: dict[str, Tensor], x: Tensor, call: Call
    ) -> tuple[Any, ...]:
        """Return the output by head [B T H V] and the final cache, then the loss if there is one and the call asks.

        `others` are the further projections of the input x.
        """
        raise NotImplementedError

    def mix(self, x: Float[Tensor, "B T D"], call: Call) -> Mixed[CachedState]:
        parts = self.in_proj(x).split([block.rows for block in self.row_blocks], dim=-1)
        named = {block.name: part for block, part in zip(self.row_blocks, parts, strict=True)}
        q, k, v = (named.pop(name).unflatten(-1, (-1, self.head_dim)) for name in ("q", "k", "v"))
        qk = torch.cat((q, k), dim=2)
        qk = qk if self.qk_norm is None else self.qk_norm(qk)
        if self.config.positions == "rope":
            qk = rotated(qk, self.positions(x, call), "rope", self.config.rope_base, memo=call.memo)
        q, k = qk.split([self.n_heads, self.n_kv_heads], dim=2)
        gate = named.pop("gate").unflatten(-1, (self.n_heads, -1)) if "gate" in named else None
        output, final_state, *loss = self.attend(q, k, v, named, x, call)
        if final_state is not None:
            final_state = cast_cache(final_state, self.dtype)  # under autocast, a new cache has a narrower dtype
        y = self.out_proj(self.gate(output, gate).to(output.dtype).flatten(2))
        return MixResult(y, final_state, loss=loss[0]) if loss else (y, final_state)

    def positions(self, x: Tensor, call: Call) -> Tensor:
        """Return the positions of the tokens of x."""
        return call.positions(x, None if call.state is None else call.state.length)

    @property
    def projections(self) -> dict[str, Float[Tensor, "H _ D"]]:
        return projections_of(self.in_proj, self.out_proj, self.row_blocks, self.n_heads)

    @property
    def score_width(self) -> int:
        return self.head_dim

    @property
    def cache_window(self) -> None:
        return None

    @property
    def cache_sizes(self) -> tuple[int, int, int]:
        return self.n_kv_heads, self.head_dim, self.head_dim

    @property
    def projection_weights(self) -> int:
        """Number of weights that a token is multiplied by."""
        return self.in_proj.weight.numel() + self.out_proj.weight.numel()
