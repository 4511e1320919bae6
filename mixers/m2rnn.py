"""M2RNN, a recurrent network with a matrix state (Mishra et al., arXiv 2603.14360).

    z, (u, k, q), dt = x W_in
    u, k, q = silu(conv((u, k, q))) by channel      f = exp(-softplus(dt + b) e^{A_log}) per head, as in Mamba-2
    S_t = f_t S_{t-1} + (1 - f_t) tanh(S_{t-1} W + k_t u_t^T)       W [V V] per head, the identity at the start
    o_t = q_t S_t + D u_t
    y   = (RMSNorm(o * silu(z)) * w) W_O

The state goes through tanh at every token, so that tokens can only be computed one after another: the recurrent
paradigm is the only one. In exchange, the paper finds that the layer tracks states, such as permutations, also in texts
that are longer than those it was trained on. Everything around the recurrence is that of Mamba-2, with many heads of
few values, which share one query and one key (`n_groups: 1`).

Differences from the authors' code and configurations (lm-engine):

- Gradients of states are not clipped inside the recurrence, which would make them those of another function; training
  clips the norm of the whole gradient.
- D is one scalar per head, not one per channel.
- The convolution has a bias.
- The values of all heads together are twice as wide as the model (`expand: 2`), not 1.3 to 1.4 times.
- The decay rates start between 1 and 16 (`a_range`), not between 0 and 16, and matrices start as in `mamba2`, not from
  a normal distribution of standard deviation 0.02.
"""

from typing import Literal

from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from ..ops.cell import M2RNN_FAMILY, m2rnn
from .base.roles import Role
from .mamba2 import Mamba2, Mamba2Config
from .parts import Call, Paradigm, RecurrenceOutput
from .parts.matrix_state import Chunk


class M2RNNConfig(Mamba2Config):
    """M2RNN: a matrix state per head that goes through tanh at every token; sequential, but it tracks states."""

    kind: Literal["m2rnn"] = "m2rnn"  # pyright: ignore[reportIncompatibleVariableOverride]
    family = M2RNN_FAMILY
    head_dim: int = Field(default=16, gt=0, le=2**20, examples=[6, 12, 24])
    """Width of the values of a head; there are expand * d_model / head_dim heads."""
    d_state: int = Field(default=64, gt=0, le=2**20, examples=[5, 1])
    """Width of the keys and queries of a head."""
    chunk_size: Chunk = 32
    paradigm: Paradigm = Field(default=Paradigm.RECURRENT, strict=False)
    """Paradigm of training and evaluation."""

    def build(self, d_model: int, *, layer_idx: int, n_layers: int) -> "M2RNN":
        return M2RNN(self, d_model, n_layers)


class M2RNN(Mamba2):
    """Layer configured by `M2RNNConfig`."""

    supports_context_parallel = False

    def __init__(self, config: M2RNNConfig, d_model: int, n_layers: int = 1) -> None:
        super().__init__(config, d_model, n_layers)
        width = config.head_dim
        self.state_weight = nn.Parameter(self.D.new_empty(self.n_heads, width, width))
        self.parameter_roles = {**self.parameter_roles, "state_weight": Role.GATE}
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as Mamba-2, and W as the identity."""
        super().reset_parameters()
        if (weight := getattr(self, "state_weight", None)) is not None:
            nn.init.zeros_(weight)
            nn.init.ones_(weight.diagonal(dim1=1, dim2=2))

    def set_reach(self, tokens: Float[Tensor, " H"]) -> list[str]:
        """Set nothing: how far the memory reaches depends on W and on tanh more than on the decays."""
        del tokens
        return []

    def recur(
        self,
        q: Float[Tensor, "B T G K"],
        k: Float[Tensor, "B T G K"],
        u: Float[Tensor, "B T H V"],
        dt: Float[Tensor, "B T H"],
        more: list[Tensor],
        call: Call,
    ) -> RecurrenceOutput:
        """Compute the cell; a group's heads share its query and key."""
        del more
        _, log_decay = self.decay(dt)
        q, k = (x.repeat_interleave(self.n_heads // self.n_groups, dim=2) for x in (q, k))
        return m2rnn(q, k, u, log_decay, self.state_weight.to(self.state_dtype), call.enter("memory"))
