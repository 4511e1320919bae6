"""Attention residuals: every branch reads a softmax-weighted mean of the outputs of all earlier branches.

    sources s_0 ... s_J     s_0 the embedding; then the outputs of the branches (full, block_size 1), or their sums over
                            blocks of `block_size` consecutive branches, the last of which may still grow
    p = softmax_j(w . RMSNorm(s_j))                    w [D] of the branch, RMSNorm without weights
    h = sum_j p_j s_j                                  what the branch reads
    s_{J+1} = f(h), or s_J <- s_J + f(h)               the branch starts a block, or continues one

After the last branch, one more w chooses what the final norm reads. Kimi Team, Attention Residuals, arXiv 2603.15031.

w starts at 0: h is then the mean of all sources, and the norm of the branch makes it the plain residual connection, up
to the norm's eps. The weights of the paper's RMSNorm are left out: their product with w is w. A block counts branches,
so that mixers and feed-forward networks without a partner count too. w has weight decay, like other maps of tokens to
gates, which pulls towards the plain connection.
"""

from functools import reduce
from operator import add
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from ...mixers.base.roles import Role, Roles
from . import Branch, Residual, ResidualConfig, ResidualEnds


class Sources(NamedTuple):
    """Stream: the sources that a branch chooses from."""

    values: tuple[Float[Tensor, "B T D"], ...]
    """Sources, the embedding first."""
    open: int
    """Number of branches in the last source; the block size if the next branch starts another source."""


class AttentionResidualConfig(ResidualConfig):
    """Configuration of attention residuals: each branch chooses from the earlier branches' outputs by a softmax."""

    grows: ClassVar[bool] = True
    kind: Literal["attention"] = "attention"
    block_size: int = Field(default=1, gt=0)
    """Number of consecutive branches whose outputs are added to one source; 1 makes each output a source (full
    attention residuals). Memory grows with the number of sources; the paper uses about 8 in a model."""
    eps: float = Field(default=1e-6, ge=0)
    """Constant added to the mean square of a source."""

    def build(self, d_model: int, *, index: int, place: int, layer: int) -> "AttentionResidual":  # noqa: ARG002 the same for all branches
        """Build the connection of one branch."""
        return AttentionResidual(self, d_model)

    def build_ends(self, d_model: int, *, n_layers: int) -> "AttentionEnds":  # noqa: ARG002
        """Build the ends of the stream."""
        return AttentionEnds(self, d_model)

    def n_sources(self, n_branches: int) -> int:
        """Return the number of sources after `n_branches` branches."""
        return 1 + -(-n_branches // self.block_size)


class WeightedSources(nn.Module):
    """Weighted mean of sources, sum_j p_j s_j with p = softmax_j(w . RMSNorm(s_j))."""

    parameter_roles: ClassVar[Roles] = {"weight": Role.GATE}

    def __init__(self, d_model: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, d_model))
        self.eps = eps

    def reset_parameters(self) -> None:
        """Set w to 0: all sources have the same weight."""
        nn.init.zeros_(self.weight)

    def forward(self, sources: tuple[Tensor, ...]) -> Tensor:
        """Return the mean [B T D] of sources [B T D]."""
        weighted = (p * s for p, s in zip(self.weights(sources), sources, strict=True))
        return reduce(add, weighted).to(sources[0].dtype)

    def weights(self, sources: tuple[Tensor, ...]) -> Float[Tensor, "J B T 1"]:
        """Return the weight of each source at each token; float32 or wider.

        Only scalars per token are saved for the backward pass: w . RMSNorm(s) is (w . s) / rms(s).
        """
        scores = []
        for source in sources:
            wide = torch.promote_types(source.dtype, torch.float32)
            norm = torch.linalg.vector_norm(source, dim=-1, keepdim=True, dtype=wide)
            rms = (norm.square() / source.shape[-1] + self.eps).sqrt()
            scores.append(F.linear(source, self.weight.to(source.dtype)).to(wide) / rms)
        return torch.stack(scores).softmax(0)


class AttentionResidual(Residual):
    """The connection of one branch: its input is chosen from the sources, its output is added to them."""

    def __init__(self, config: AttentionResidualConfig, d_model: int) -> None:
        super().__init__()
        self.choice = WeightedSources(d_model, config.eps)
        self.config = config

    def reset_parameters(self) -> None:
        """Initialise every parameter."""
        self.choice.reset_parameters()

    def forward(self, stream: Sources, branch: Branch) -> Sources:
        """Return the sources after a branch."""
        values, n_open = stream
        y = branch(self.choice(values))
        if n_open == self.config.block_size:
            return Sources((*values, y), 1)
        return Sources((*values[:-1], values[-1] + y), n_open + 1)

    def flops(self, index: int) -> int:
        """Return the FLOPs per token of scores and weighted sum."""
        return 4 * self.config.n_sources(index) * self.choice.weight.numel()


class AttentionEnds(ResidualEnds):
    """The stream starts with the embedding as its only source; a last choice is what the final norm reads."""

    def __init__(self, config: AttentionResidualConfig, d_model: int) -> None:
        super().__init__()
        self.choice = WeightedSources(d_model, config.eps)
        self.config = config

    def reset_parameters(self) -> None:
        """Initialise every parameter."""
        self.choice.reset_parameters()

    def start(self, x: Float[Tensor, "B T D"]) -> Sources:
        """Return the stream before the first branch."""
        return Sources((x,), self.config.block_size)

    def forward(self, stream: Sources) -> Float[Tensor, "B T D"]:
        """Return the vectors that the final norm reads."""
        return self.choice(stream.values)

    def flops(self, n_branches: int) -> int:
        """Return the FLOPs per token of scores and weighted sum."""
        return 4 * self.config.n_sources(n_branches) * self.choice.weight.numel()
