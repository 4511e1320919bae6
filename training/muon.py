"""Muon for matrices that hold several maps in blocks of rows, and NorMuon.

    M <- mu M + (1 - mu) G            G + mu (M - G) is orthogonalised, block by block: O has singular values near 1
    W <- W - lr (wd W + 0.2 sqrt(max(rows, columns)) O)

Muon is by Jordan et al. (2024), the scale that makes its steps as large as AdamW's by Liu et al. (arXiv 2502.16982).
Queries, keys and values are often rows of one matrix: orthogonalised together, a change of one of them would depend on
the others, so each block of rows is a matrix of its own here. Rows that compute gates are updated as AdamW does.
NorMuon (Li et al., arXiv 2510.05491) divides each row of O by a running root mean square, and keeps O's Frobenius norm.
"""

from collections.abc import Callable, Mapping
from itertools import groupby
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..mixers.base.roles import ParameterRole, Role, RowBlock
from .distributed.sharding import assign, full_tensor, local_tensor, shard_of

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Coefficients of the Newton-Schulz iteration x <- a x + (b A + c A^2) x, A = x x^T (Jordan et al.)."""
ITERATIONS = 5
EPSILON = 1e-8
"""Constant against division by 0."""
ROW_DECAY = 0.95
"""Decay rate of NorMuon's running mean square of each row."""


class Muon(torch.optim.Optimizer):
    """Optimizer of matrices, by their blocks of rows.

    Args:
        groups: parameter groups, each with its `weight_decay` (decoupled, of all rows).
        roles: role of each parameter, with its blocks of rows.
        lr: learning rate.
        momentum: decay rate mu of the mean gradient.
        betas: decay rates of AdamW's moments, for rows that compute gates.
        per_head: True to orthogonalise each head of a block separately.
        normalize_rows: True for NorMuon.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        roles: Mapping[nn.Parameter, ParameterRole],
        *,
        lr: float,
        momentum: float,
        betas: tuple[float, float],
        per_head: bool = False,
        normalize_rows: bool = False,
    ) -> None:
        defaults = {"lr": lr, "weight_decay": 0.0, "momentum": momentum, "betas": betas}
        defaults |= {"lr_multiplier": 1.0, "gate_multiplier": 1.0}
        super().__init__(groups, defaults)
        self.normalize_rows = normalize_rows
        self.blocks = {parameter: _blocks(parameter, roles[parameter], per_head=per_head) for parameter in roles}
        # created now, not by the first step, so that checkpoints have it also for parameters without a gradient
        for parameter, blocks in self.blocks.items():
            state = self.state[parameter]
            state["momentum_buffer"] = torch.zeros_like(parameter)
            # rows of gates have the moments of AdamW, of which the momentum buffer is the first
            if any(block.role is Role.GATE for block in blocks):
                state["exp_avg_sq"] = torch.zeros_like(parameter)
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            if normalize_rows:
                state["row_mean_square"] = torch.zeros_like(parameter[..., :1])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every parameter that has a gradient; a closure computes the gradients first, and returns the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        sharded = self.state[parameter]
        # every process updates the whole matrix: the blocks of a shard may be cut anywhere
        wide = torch.promote_types(parameter.dtype, torch.float32)
        state = {name: full_tensor(value).to(wide) for name, value in sharded.items()}
        if "step" in sharded:
            sharded["step"] += 1
            state["step"] = sharded["step"]
        gradient = full_tensor(cast("Tensor", parameter.grad)).to(wide)
        updates = []
        start = 0
        for block, equal_blocks in groupby(self.blocks[parameter]):
            count = len(list(equal_blocks))
            rows = slice(start, start := start + count * block.rows)
            if block.role is Role.GATE:
                ratio = group["gate_multiplier"] / group["lr_multiplier"]
                updates.append(ratio * _adam_update(gradient[rows], state, rows, group))
                continue
            mean = state["momentum_buffer"][rows]
            mean.lerp_(gradient[rows], 1 - group["momentum"])
            # equal blocks are a batch of matrices; a parameter of more dimensions is one already
            matrices = gradient[rows].lerp(mean, group["momentum"])
            matrices = matrices.unflatten(0, (count, block.rows)) if parameter.ndim == 2 else matrices
            directions = orthogonalized(matrices)
            if self.normalize_rows:
                directions = normalized(directions, state["row_mean_square"][rows].view_as(directions[..., :1]))
            scale = 0.2 * max(directions.shape[-2:]) ** 0.5
            updates.append(scale * directions.view_as(gradient[rows]))
        for name, value in state.items():
            assign(sharded[name], value)
        weight = local_tensor(parameter)
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.sub_(shard_of(torch.cat(updates), parameter), alpha=group["lr"])


def _blocks(parameter: Tensor, role: ParameterRole, *, per_head: bool) -> list[RowBlock]:
    """Return the blocks of rows that are orthogonalised separately.

    Their names are left out, so that blocks with the same rows and role compare equal.
    """
    blocks = []
    for block in role.blocks or [RowBlock("", parameter.shape[0])]:
        parts = block.heads if per_head and block.role is Role.MATRIX else 1
        blocks += [RowBlock("", block.rows // parts, block.role)] * parts
    return blocks


def _adam_update(gradient: Tensor, state: Mapping[str, Tensor], rows: slice, group: Mapping[str, Any]) -> Tensor:
    """Return AdamW's update of some rows, and update their moments."""
    beta1, beta2 = group["betas"]
    mean = state["momentum_buffer"][rows].lerp_(gradient, 1 - beta1)
    mean_square = state["exp_avg_sq"][rows].lerp_(gradient.square(), 1 - beta2)
    step = state["step"]
    return (mean / (1 - beta1**step)) / ((mean_square / (1 - beta2**step)).sqrt() + EPSILON)


def orthogonalized(matrices: Float[Tensor, "*batch rows columns"]) -> Float[Tensor, "*batch rows columns"]:
    """Return matrices with the same singular vectors and singular values near 1, between about 0.7 and 1.2.

    On a GPU the iteration runs in bfloat16, whose rounding is far below the iteration's error; on a CPU small products
    are faster in float32.
    """
    a, b, c = COEFFICIENTS
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = (matrices.mT if is_tall else matrices).to(torch.bfloat16 if matrices.is_cuda else torch.float32)
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=EPSILON)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return (x.mT if is_tall else x).to(matrices.dtype)


def normalized(
    directions: Float[Tensor, "*batch rows columns"], mean_square: Float[Tensor, "*batch rows 1"]
) -> Float[Tensor, "*batch rows columns"]:
    """Return NorMuon's directions: rows divided by their running root mean square, with the Frobenius norm as before.

    `mean_square` is updated in place.
    """
    mean_square.lerp_(directions.square().mean(-1, keepdim=True), 1 - ROW_DECAY)
    divided = directions / (mean_square.sqrt() + EPSILON)
    norms = [x.norm(dim=(-2, -1), keepdim=True) for x in (directions, divided)]
    return divided * (norms[0] / norms[1].clamp(min=EPSILON))
