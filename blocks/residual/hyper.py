"""Hyper-connections: n residual streams, which every branch reads and writes by learned weights per token.

    X [n D]     streams, each of which starts as the embedding; the final norm reads their mean
    x = sum_i a_i X_i                          what the branch f reads
    X_j = sum_i H_ij X_i + b_j f(x)            the streams after it

Hyper-connections (Zhu et al., arXiv 2409.19606, dynamic): the weights of stream i come from that stream,

    (a_i, b_i, H_i1 ... H_in) = s * tanh(W RMSNorm(X_i)) + static weights

with a static a that reads stream (index of the branch mod n), b = 1 and H = 1 (Eq. 14 there). With `manifold`, those
of Xie et al. (mHC, arXiv 2512.24880) come from all streams, and H is doubly stochastic:

    u = s * W RMSNorm(vec X) + static logits
    a = sigmoid(u_a)        b = 2 sigmoid(u_b)        H = Sinkhorn(exp(u_H)), rows first, columns last

W starts at 0 and s at 0.01. Equal streams, a with sum 1 and b = 1 are the plain connection for any H whose columns have
the sum 1, so a model starts as the plain one. Its streams do not stay equal: branches read different streams.

Differences from the papers: the norm has no weights, because W follows it; the final norm reads the mean of the
streams, not their sum. RMSNorm, and a scale s for each of a, b and H, are those by which mHC restates hyper-connections
(its Eq. 5); Algorithm 2 of the first paper has LayerNorm, and a and H share their scale. In mHC, the static logits are
chosen here: a starts with 0.7 for one stream and 0.3 for the others together, and the diagonal of H with 0.9, far
enough from 1 to learn.
"""

import math
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from ...mixers.base.roles import Role, Roles
from . import Branch, Residual, ResidualConfig, ResidualEnds

READ = 0.7
"""Initial weight of the stream that a branch reads most, with `manifold`."""
KEPT = 0.9
"""Initial diagonal of H, with `manifold`."""


class HyperConfig(ResidualConfig):
    """Configuration of hyper-connections: n residual streams with learned reads, writes and mixtures."""

    kind: Literal["hyper"] = "hyper"
    n_streams: int = Field(default=4, ge=2, le=64)
    """Number n of residual streams; activation memory of the stream grows with it."""
    manifold: bool = False
    """True to make the mixtures doubly stochastic, and reads and writes positive (mHC)."""
    iterations: int = Field(default=20, gt=0, le=1000)
    """Number of Sinkhorn iterations; only with `manifold`."""
    eps: float = Field(default=1e-6, ge=0)
    """Constant added to the mean square of the streams."""

    def build(self, d_model: int, *, index: int, place: int, layer: int) -> "Hyper":  # noqa: ARG002 the same for all places
        """Build the connection of one branch."""
        return Hyper(self, d_model, index)

    def build_ends(self, d_model: int, *, n_layers: int) -> "HyperEnds":  # noqa: ARG002 no parameters
        """Build the ends of the stream."""
        return HyperEnds(self.n_streams)


class Hyper(Residual):
    """The connection of one branch with n streams."""

    parameter_roles: ClassVar[Roles] = {
        "weight": Role.GATE,
        "scale": Role.VECTOR,
        "read": Role.RATE,
        "write": Role.RATE,
        "mixture": Role.RATE,
    }

    def __init__(self, config: HyperConfig, d_model: int, index: int) -> None:
        super().__init__()
        n = config.n_streams
        self.config = config
        self.index = index
        # not nn.Linear: a model's `init` draws the weights of those at random
        rows = n * (n + 2) if config.manifold else n + 2
        self.weight = nn.Parameter(torch.empty(rows, n * d_model if config.manifold else d_model))
        self.scale = nn.Parameter(torch.empty(3))
        self.read, self.write = (nn.Parameter(torch.empty(n)) for _ in range(2))
        self.mixture = nn.Parameter(torch.empty(n, n))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start as the plain connection."""
        n = self.config.n_streams
        nn.init.zeros_(self.weight)
        nn.init.constant_(self.scale, 0.01)
        favourite = torch.arange(n, device=self.read.device) == self.index % n
        eye = torch.eye(n, device=self.read.device)
        if self.config.manifold:
            self.read.copy_(torch.where(favourite, READ, (1 - READ) / (n - 1)).logit())
            self.write.zero_()  # 2 sigmoid(0) = 1
            self.mixture.copy_(eye * math.log(KEPT / (1 - KEPT) * (n - 1)))
        else:
            self.read.copy_(favourite)
            self.write.fill_(1)
            self.mixture.copy_(eye)

    def forward(self, stream: Float[Tensor, "B T n D"], branch: Branch) -> Float[Tensor, "B T n D"]:
        """Return the streams after a branch."""
        read, write, mixture = (weights.to(stream.dtype) for weights in self.weights(stream))
        y = branch((read[..., None, :] @ stream).squeeze(-2))
        return mixture.transpose(-1, -2) @ stream + write[..., None] * y[..., None, :]

    def weights(
        self, stream: Float[Tensor, "B T n D"]
    ) -> tuple[Float[Tensor, "B T n"], Float[Tensor, "B T n"], Float[Tensor, "B T n n"]]:
        """Return the weights a, b and H of every token; float32 or wider."""
        n = self.config.n_streams
        x = stream.flatten(-2) if self.config.manifold else stream
        dynamic = F.linear(F.rms_norm(x, x.shape[-1:], eps=self.config.eps), self.weight.to(x.dtype))
        dynamic = dynamic.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, n + 2))
        dynamic = dynamic.view(*stream.shape[:-1], n + 2)
        dynamic = dynamic if self.config.manifold else dynamic.tanh()
        read = self.read + self.scale[0] * dynamic[..., 0]
        write = self.write + self.scale[1] * dynamic[..., 1]
        mixture = self.mixture + self.scale[2] * dynamic[..., 2:]
        if not self.config.manifold:
            return read, write, mixture
        return read.sigmoid(), 2 * write.sigmoid(), sinkhorn(mixture, self.config.iterations)

    def flops(self, index: int) -> int:
        """Return the FLOPs per token of the weights and of reads, mixtures and writes."""
        del index
        n = self.config.n_streams
        maps = self.weight.numel() * (1 if self.config.manifold else n)
        width = self.weight.shape[1] // (n if self.config.manifold else 1)
        return 2 * maps + 2 * (n + n * n) * width


class HyperEnds(ResidualEnds):
    """The streams start as copies of the embedding; the final norm reads their mean."""

    def __init__(self, n_streams: int) -> None:
        super().__init__()
        self.n_streams = n_streams

    def start(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T n D"]:
        """Return the streams before the first branch."""
        return x[..., None, :].expand(*x.shape[:-1], self.n_streams, -1)

    def forward(self, stream: Float[Tensor, "B T n D"]) -> Float[Tensor, "B T D"]:
        """Return the vectors that the final norm reads."""
        return stream.mean(-2)


def sinkhorn(logits: Float[Tensor, "*batch n n"], iterations: int) -> Float[Tensor, "*batch n n"]:
    """Return exp(logits) with rows and columns scaled in turn to the sum 1, columns last.

    It is computed on logarithms, which neither overflow nor vanish.
    """
    for _ in range(iterations):
        logits = logits - logits.logsumexp(-1, keepdim=True)
        logits = logits - logits.logsumexp(-2, keepdim=True)
    return logits.exp()
