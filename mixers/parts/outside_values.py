"""Values from outside a mixer: those of the model's first layer of its kind, and those of an embedding of the tokens.

    v <- l_1 v^1 + l_2 v                      value residual (ResFormer, arXiv 2410.17897); l_1 = l_2 = 1/2 at the start
    v <- v + c sigmoid(x_:n W) E[token]       value embedding (modded-nanogpt, nanochat); W [n H] starts at 0

The second follows the first. Both change the values that the op gets: after a short convolution, and per head. W has
one gate per head, from the first n channels of the mixer's input. E belongs to the model, W to the mixer.
"""

from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from ...ops.runtime.call import Call
from ..base.contract import MixerConfig, SequenceMixer
from ..base.layer_call import Mixed, MixResult
from ..base.roles import Role, Roles
from ..base.state import S

ValueResidualOption = Annotated[
    bool,
    Field(
        description="True to mix the values of the model's first layer of this kind into those of later ones, with two "
        "learned factors per layer that start at 1/2 (ResFormer)."
    ),
]


class OutsideValues(SequenceMixer[S]):
    """A mixer with values per head that can take values from outside.

    A subclass sets `value_heads` and `value_width`, and calls `with_outside_values` on its own values. With the trait
    `value_residual`, its `mix` also returns its own values.
    """

    value_heads: int
    """Number of heads of the values; with several steps per token, the heads of all steps."""

    def __init__(self, config: MixerConfig) -> None:
        super().__init__(config)
        self.first_mix: FirstValues | None = None
        self.token_gate: TokenGate | None = None

    def accept_first_values(self) -> None:
        if not self.traits.value_residual:
            return super().accept_first_values()
        self.first_mix = FirstValues().to(self.device, self.dtype)
        self.takes_first_values = True
        return None

    def accept_token_values(self, scale: float, channels: int) -> None:
        self.token_gate = TokenGate(self.value_heads, scale, channels).to(self.device, self.dtype)
        self.takes_token_values = True

    def with_outside_values(
        self, v: Float[Tensor, "B T G V"], x: Float[Tensor, "B T D"], call: Call
    ) -> Float[Tensor, "B T G V"]:
        """Return the values v of x with those from outside."""
        if self.first_mix is not None:
            v = self.first_mix(v, call.first_values)
        return v if self.token_gate is None else self.token_gate(v, call.token_values, x)

    def with_own_values(self, y: Float[Tensor, "B T D"], state: Any, own: Float[Tensor, "B T G V"]) -> Mixed[Any]:
        """Return the result of `mix`: output and state, and with a value residual the mixer's own values."""
        return MixResult(y, state, own.flatten(2)) if self.traits.value_residual else (y, state)

    @property
    def outside_flops(self) -> int:
        """FLOPs per token of the gates of values from outside."""
        return 0 if self.token_gate is None else 2 * self.token_gate.weight.numel()


class FirstValues(nn.Module):
    """Value residual l_1 v^1 + l_2 v, with two learned factors per layer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise both factors as 1/2."""
        nn.init.constant_(self.weight, 0.5)

    def forward(self, v: Float[Tensor, "B T G V"], first: Float[Tensor, "B T C"] | None) -> Float[Tensor, "B T G V"]:
        """Return v mixed with the values of the first layer."""
        assert first is not None
        outer, own = self.weight.to(v.dtype).unbind()
        return outer * first.to(v.dtype).unflatten(-1, v.shape[2:]) + own * v


class TokenGate(nn.Module):
    """Gated value embedding, v + c sigmoid(x_:n W) E[token], with a gate per head."""

    parameter_roles: ClassVar[Roles] = {"weight": Role.GATE}

    def __init__(self, n_heads: int, scale: float, channels: int) -> None:
        super().__init__()
        self.scale = scale
        # not nn.Linear: a model's `init` draws the weights of those at random
        self.weight = nn.Parameter(torch.empty(n_heads, channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise W as 0, so that every gate is c / 2."""
        nn.init.zeros_(self.weight)

    def forward(
        self, v: Float[Tensor, "B T G V"], token: Float[Tensor, "B T C"] | None, x: Float[Tensor, "B T D"]
    ) -> Float[Tensor, "B T G V"]:
        """Return v plus the gated vectors of the tokens."""
        assert token is not None
        gate = self.scale * F.linear(x[..., : self.weight.shape[1]], self.weight.to(x.dtype)).sigmoid()
        return v + gate.to(v.dtype)[..., None] * token.to(v.dtype).unflatten(-1, v.shape[2:])
