"""A mixture of experts: every token goes to the `top_k` of n gated networks whose scores are highest.

    s = sigmoid(x W_r)  (or softmax)           one score per expert, in float32
    chosen = the top_k of s + b                g = s / (sum of s over the chosen) * routed_scale
    y = sum over the chosen of g_e E_e(x)  +  the shared expert, if there is one        E(x) = (f(x W_g) * x W_u) W_d

No token is dropped, whatever the load: an expert's part is as long as it has tokens, so that a token's output depends
on itself alone. Load is balanced without an auxiliary loss (Wang et al., arXiv 2408.15664, as in DeepSeek-V3, arXiv
2412.19437): after every optimizer step, b rises by `balance_rate` for experts with less than the mean load, and falls
for those with more; it takes part in the choice and not in the output.
"""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn

from ...ops.grouped_linear import grouped_linear
from . import ACTIVATIONS, Activation, FeedForward, FfnConfig
from .swiglu import Swiglu, SwigluConfig


class MoeConfig(FfnConfig):
    """A mixture of gated experts, each of hidden width expansion * d_model, and no auxiliary loss."""

    kind: Literal["moe"] = "moe"
    n_experts: int = Field(gt=0, le=4096)
    """Experts that tokens are routed to."""
    top_k: int = Field(gt=0)
    """Experts per token."""
    shared_expansion: float = Field(default=0.0, ge=0, le=1000)
    """Hidden width over d_model of an expert that all tokens go to; 0 for none."""
    shared_gate: bool = False
    """Whether the shared expert's output has a gate, one per token, the sigmoid of a linear map (Qwen3-Next)."""
    scores: Literal["sigmoid", "softmax"] = "sigmoid"
    """What the router makes of its logits."""
    routed_scale: float = Field(default=1.0, gt=0)
    """Factor of the routed experts' sum."""
    balance_rate: float = Field(default=1e-3, ge=0, lt=1)
    """What an expert's bias moves by after an optimizer step; 0 leaves the load as it is."""
    activation: Activation = "silu"
    """f."""

    @model_validator(mode="after")
    def _there_are_as_many_experts(self) -> "MoeConfig":
        if self.top_k > self.n_experts:
            raise ValueError(f"top_k = {self.top_k} experts per token, and n_experts is {self.n_experts}")
        if self.shared_gate and not self.shared_expansion:
            raise ValueError("shared_gate weighs the shared expert, and shared_expansion = 0 says that there is none")
        return self

    def build(self, d_model: int) -> "Moe":
        """Build the network."""
        return Moe(self, d_model)


class Moe(FeedForward):
    """The network of `MoeConfig`."""

    bias: Tensor
    """b, [E]; part of a checkpoint, and not learned by gradients."""
    load: Tensor
    """Tokens that each expert had since the last optimizer step, [E]."""

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
            own = {"expansion": config.shared_expansion, "multiple_of": config.multiple_of}
            self.shared = SwigluConfig(**own, activation=config.activation).build(d_model)
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
        y = self._routed(tokens, weights, chosen, load.cumsum(0).to(torch.int32)).view_as(x)
        if self.shared is None:
            return y
        return y + (self.shared(x) if self.shared_gate is None else self.shared_gate(x).sigmoid() * self.shared(x))

    def route(self, x: Float[Tensor, "N D"]) -> tuple[Float[Tensor, "N k"], Int[Tensor, "N k"]]:
        """The weights of each token's experts, and which they are; float32, in which close scores stay apart."""
        with torch.autocast(x.device.type, enabled=False):
            wide = torch.promote_types(x.dtype, torch.float32)
            logits = F.linear(x.to(wide), self.router.weight.to(wide))
        scores = logits.sigmoid() if self.config.scores == "sigmoid" else logits.softmax(-1)
        chosen = (scores.detach() + self.bias).topk(self.config.top_k, dim=-1).indices
        weights = scores.gather(1, chosen)
        return self.config.routed_scale * weights / weights.sum(-1, keepdim=True), chosen

    def _routed(self, x: Tensor, weights: Tensor, chosen: Tensor, ends: Tensor) -> Tensor:
        """Tokens sorted by expert, each expert's together in one product."""
        order = chosen.flatten().argsort(stable=True)
        inverse = order.argsort()
        own = x[order // self.config.top_k]
        hidden = ACTIVATIONS[self.config.activation](self.gate_proj(own, ends)) * self.up_proj(own, ends)
        # back in the tokens' order, and not added up there: the order of a sum would be the device's
        of_experts = self.down_proj(hidden, ends)[inverse].view(*chosen.shape, -1)
        return (of_experts * weights[..., None].to(of_experts.dtype)).sum(1).to(x.dtype)

    @torch.no_grad()
    def balance(self, total: Callable[[Tensor], Tensor]) -> float:  # noqa: D102
        load = total(self.load)
        self.bias += self.config.balance_rate * (load.mean() - load).sign()
        violation = (load.max() / load.mean() - 1).item()
        self.load.zero_()  # what `total` gave may be the same tensor
        return violation

    def flops(self, length: int) -> int:  # noqa: D102
        expert = sum(part.weight[0].numel() for part in (self.gate_proj, self.up_proj, self.down_proj))
        shared = 0 if self.shared is None else self.shared.flops(length)
        shared += 0 if self.shared_gate is None else 2 * length * self.shared_gate.weight.numel()
        return 2 * length * (self.router.weight.numel() + self.config.top_k * expert) + shared


class ExpertLinear(nn.Module):
    """A linear map per expert, without biases."""

    def __init__(self, experts: int, d_in: int, d_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, d_in, d_out))

    def reset_parameters(self) -> None:
        """Uniform within 1/sqrt(d_in), as `nn.Linear`."""
        bound = self.weight.shape[1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, x: Float[Tensor, "M d_in"], ends: Int[Tensor, " E"]) -> Float[Tensor, "M d_out"]:
        """Tokens sorted by expert, of which those of expert e end before `ends[e]`."""
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        return grouped_linear(x.to(dtype), self.weight.to(dtype), ends)
