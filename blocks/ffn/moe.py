"""A mixture of experts: each token is routed to the `top_k` of n gated networks with the highest scores.

    s = sigmoid(x W_r)  (or softmax)           one score per expert, in float32 or wider
    chosen = the top_k of s + b                g = s / (sum of s over the chosen) * routed_scale
    y = sum over the chosen of g_e E_e(x)  +  the shared expert, if there is one        E(x) = (f(x W_g) * x W_u) W_d
    without `renormalize`, g = s * routed_scale

No token is dropped: experts have no capacity limit, so a token's output does not depend on other tokens. The load is
balanced without an auxiliary loss (Wang et al., arXiv 2408.15664, as in DeepSeek-V3, arXiv 2412.19437): after every
optimizer step, the bias b of an expert rises by `balance_rate` if its load is below the mean, and falls if it is above.
The bias affects which experts are chosen, not their weights g.
"""

from collections.abc import Callable, Mapping
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn

from ...mixers.base.roles import Role, Roles
from ...ops.grouped_linear import grouped_linear
from . import ACTIVATIONS, Activation, FeedForward, FfnConfig
from .swiglu import Swiglu, SwigluConfig


class MoeConfig(FfnConfig):
    """Configuration of a mixture of gated experts, each of hidden width expansion * d_model, without auxiliary loss."""

    deprecated_names: ClassVar[Mapping[str, str]] = {"scores": "score_function"}
    kind: Literal["moe"] = "moe"
    n_experts: int = Field(gt=0, le=4096)
    """Number of experts that tokens are routed to."""
    top_k: int = Field(gt=0)
    """Number of experts per token."""
    shared_expansion: float = Field(default=0.0, ge=0, le=1000)
    """Hidden width, divided by d_model, of a shared expert that is applied to all tokens; 0 means no shared expert."""
    shared_gate: bool = False
    """True to multiply the shared expert's output by a gate per token, the sigmoid of a linear map (Qwen3-Next)."""
    score_function: Literal["sigmoid", "softmax"] = "sigmoid"
    """Function that turns the router's logits into scores."""
    renormalize: bool = True
    """True to divide the weights of a token's experts by their sum; False leaves the scores as they are (Jamba)."""
    routed_scale: float = Field(default=1.0, gt=0)
    """Factor by which the sum of the routed experts' outputs is multiplied."""
    balance_rate: float = Field(default=1e-3, ge=0, lt=1)
    """Amount by which an expert's bias rises or falls after each optimizer step; 0 turns load balancing off."""
    activation: Activation = "silu"
    """Activation function f of the experts' gates."""

    @model_validator(mode="after")
    def _check_experts(self) -> "MoeConfig":
        if self.top_k > self.n_experts:
            raise ValueError(f"top_k must be at most n_experts = {self.n_experts}, got {self.top_k}")
        if self.shared_gate and not self.shared_expansion:
            raise ValueError("shared_gate needs a shared expert: set shared_expansion above 0")
        return self

    def build(self, d_model: int) -> "Moe":
        """Build the network."""
        return Moe(self, d_model)


class Moe(FeedForward):
    """The mixture of experts of `MoeConfig`."""

    parameter_roles: ClassVar[Roles] = {"router.weight": Role.GATE, "shared_gate.weight": Role.GATE}
    bias: Tensor
    """Bias b of each expert, [E]; saved in checkpoints, not learned by gradients."""
    load: Tensor
    """Number of tokens routed to each expert since the last optimizer step, [E]."""

    def __init__(self, config: MoeConfig, d_model: int) -> None:
        super().__init__()
        self.config = config
        experts = config.n_experts
        hidden = config.hidden_width(d_model)
        self.router = nn.Linear(d_model, experts, bias=False)
        self.gate_proj = ExpertLinear(experts, d_model, hidden)
        self.up_proj = ExpertLinear(experts, d_model, hidden)
        self.down_proj = ExpertLinear(experts, hidden, d_model)
        self.shared: Swiglu | None = None
        if config.shared_expansion:
            shared = SwigluConfig(
                expansion=config.shared_expansion, multiple_of=config.multiple_of, activation=config.activation
            )
            self.shared = shared.build(d_model)
        self.shared_gate = nn.Linear(d_model, 1, bias=False) if config.shared_gate else None
        self.register_buffer("bias", torch.zeros(experts, dtype=torch.float32))
        self.register_buffer("load", torch.zeros(experts, dtype=torch.float32), persistent=False)

    def reset_parameters(self) -> None:  # noqa: D102
        super().reset_parameters()
        for part in (self.gate_proj, self.up_proj, self.down_proj):
            part.reset_parameters()
        self.bias.zero_()
        self.load.zero_()

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:  # noqa: D102
        tokens = x.flatten(0, -2)
        weights, chosen = self.route(tokens)
        load = F.one_hot(chosen, self.config.n_experts).sum((0, 1))
        if self.training and torch.is_grad_enabled():
            self.load += load
        y = self._apply_experts(tokens, weights, chosen, load.cumsum(0).to(torch.int32)).view_as(x)
        if self.shared is None:
            return y
        return y + (self.shared(x) if self.shared_gate is None else self.shared_gate(x).sigmoid() * self.shared(x))

    def route(self, x: Float[Tensor, "N D"]) -> tuple[Float[Tensor, "N k"], Int[Tensor, "N k"]]:
        """Return the weights and the indices of each token's k = `top_k` experts.

        Scores are float32 or wider, so that close scores do not round to ties.
        """
        with torch.autocast(x.device.type, enabled=False):
            wide = torch.promote_types(x.dtype, torch.float32)
            logits = F.linear(x.to(wide), self.router.weight.to(wide))
        scores = logits.sigmoid() if self.config.score_function == "sigmoid" else logits.softmax(-1)
        chosen = (scores.detach() + self.bias).topk(self.config.top_k, dim=-1).indices
        weights = scores.gather(1, chosen)
        if self.config.renormalize:
            weights = weights / weights.sum(-1, keepdim=True)
        return self.config.routed_scale * weights, chosen

    def _apply_experts(self, x: Tensor, weights: Tensor, chosen: Tensor, ends: Tensor) -> Tensor:
        """Return each token's weighted sum of expert outputs. Tokens are sorted by expert, for one grouped product.

        `ends` has, for each expert, the index after its last row among the sorted rows.
        """
        order = chosen.flatten().argsort(stable=True)
        inverse = order.argsort()
        by_expert = x[order // self.config.top_k]
        hidden = ACTIVATIONS[self.config.activation](self.gate_proj(by_expert, ends)) * self.up_proj(by_expert, ends)
        # gather and sum, not a scatter-add, whose order of summation the device would choose
        outputs = self.down_proj(hidden, ends)[inverse].view(*chosen.shape, -1)
        return (outputs * weights[..., None].to(outputs.dtype)).sum(1).to(x.dtype)

    @torch.no_grad()
    def balance(self, total: Callable[[Tensor], Tensor]) -> float:  # noqa: D102
        load = total(self.load)
        self.bias += self.config.balance_rate * (load.mean() - load).sign()
        violation = (load.max() / load.mean() - 1).item()
        self.load.zero_()  # last, because `total` may have returned the same tensor
        return violation

    def flops(self, length: int) -> int:  # noqa: D102
        expert = sum(part.weight[0].numel() for part in (self.gate_proj, self.up_proj, self.down_proj))
        shared_flops = 0 if self.shared is None else self.shared.flops(length)
        shared_flops += 0 if self.shared_gate is None else 2 * length * self.shared_gate.weight.numel()
        return 2 * length * (self.router.weight.numel() + self.config.top_k * expert) + shared_flops


class ExpertLinear(nn.Module):
    """One linear map per expert, without biases."""

    parameter_roles: ClassVar[Roles] = {"weight": Role.MATRIX}

    def __init__(self, experts: int, d_in: int, d_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, d_in, d_out))

    def reset_parameters(self) -> None:
        """Initialise the weights uniformly within +-1/sqrt(d_in), as `nn.Linear` does."""
        bound = self.weight.shape[1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, x: Float[Tensor, "M d_in"], ends: Int[Tensor, " E"]) -> Float[Tensor, "M d_out"]:
        """Apply each expert's map to its rows of x, which are sorted by expert; rows of expert e end at `ends[e]`."""
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        return grouped_linear(x.to(dtype), self.weight.to(dtype), ends)
