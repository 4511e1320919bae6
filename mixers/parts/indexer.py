"""The indexer of DeepSeek sparse attention: queries, keys and weights by which tokens are chosen."""

from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from ...ops.runtime.call import Call
from ...ops.runtime.paradigm import Paradigm
from ...ops.sparse_attention import Index
from ..base.contract import MixerConfig
from ..base.roles import Role, RowBlock
from ..base.traits import Traits
from .rotary import rotated


class IndexedConfig(MixerConfig):
    """Fields of attention to the tokens that an indexer chooses."""

    small: ClassVar[dict[str, Any]] = {"topk": 2, "index_heads": 2, "index_dim": 8}
    """Fields of the example, so small that the short texts of checks have more tokens than a query reads."""
    topk: int = Field(default=2048, ge=2, examples=[3])
    """Tokens that a query reads; at least 2, as the indexer's loss over a single token is 0."""
    index_heads: int = Field(default=64, gt=0, examples=[1])
    """Heads H_I of the indexer."""
    index_dim: int = Field(default=128, ge=4, multiple_of=2, examples=[6])
    """Width D_I of an index key; at least 4, as a LayerNorm of two numbers leaves nothing but their order."""

    paradigm: Paradigm = Field(default=Paradigm.PARALLEL, strict=False)
    """Paradigm of training and evaluation."""

    @classmethod
    def example_fields(cls) -> dict[str, Any]:
        return super().example_fields() | cls.small

    @property
    def traits(self) -> Traits:
        """Traits: all paradigms, a growing state, a loss of the indexer; positions count only by their distance."""
        return Traits(
            paradigms=frozenset(Paradigm),
            state="growing",
            packing=True,
            shift_invariant=True,
            auxiliary_loss=True,
            surrogate_gradients=True,  # those of the state's index keys end at the indexer
        )


class Indexer(nn.Module):
    """Map of tokens, which are detached, to index queries, index keys and weights of the index heads.

    Args:
        d_model: width of the tokens.
        n_heads: number of index heads.
        width: width of an index key.
        rope_base: base of the rotation frequencies of the first half of the dimensions; None to rotate nothing.
    """

    def __init__(self, d_model: int, n_heads: int, width: int, rope_base: float | None) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.width = width
        self.rope_base = rope_base
        self.rotary_dim = max(2, width // 4 * 2)
        self.row_blocks = [
            RowBlock("q", n_heads * width, heads=n_heads),
            RowBlock("k", width),
            RowBlock("weights", n_heads, Role.GATE),
        ]
        self.parameter_roles = {"proj.weight": self.row_blocks}
        self.proj = nn.Linear(d_model, sum(block.rows for block in self.row_blocks), bias=False)
        self.key_norm = nn.LayerNorm(width, eps=1e-6)

    def reset_parameters(self) -> None:
        """Initialise the projections as Xavier-uniform, and the norm as the identity."""
        for projection in self.proj.weight.split([block.rows for block in self.row_blocks]):
            nn.init.xavier_uniform_(projection)
        self.key_norm.reset_parameters()

    def forward(self, x: Float[Tensor, "B T D"], positions: Int[Tensor, "_ T"], call: Call) -> Index:
        """Return the index tensors of tokens at these positions."""
        q, k, weights = self.proj(x.detach()).split([block.rows for block in self.row_blocks], dim=-1)
        qk = torch.cat((q, self.key_norm(k).to(q.dtype)), dim=-1).unflatten(-1, (self.n_heads + 1, self.width))
        if self.rope_base is not None:
            qk = rotated(qk, positions, "rope", self.rope_base, self.rotary_dim, memo=call.memo)
        return Index(qk[:, :, :-1], qk[:, :, -1], weights * (self.n_heads * self.width) ** -0.5)
