"""Base classes of Mamba-2 and Mamba-3: projections, and groups of heads that share B and C (arXiv 2405.21060, §7)."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from ..base.roles import Role, RowBlock
from .matrix_state import MatrixStateMixer
from .projections import projections_of
from .time_step import TimeStepRange
from .widths import heads_of


class StateSpaceConfig(TimeStepRange):
    """Fields of a mixer with heads of fixed width, in groups that share keys B and queries C."""

    expand: float = Field(default=2.0, gt=0, le=1000, examples=[1.0])
    """Total width of the values, and of the gate, divided by d_model."""
    head_dim: int = Field(default=64, gt=0, le=2**20, examples=[6, 12, 24])
    """Width of the values of a head; there are expand * d_model / head_dim heads."""
    d_state: int = Field(default=128, gt=0, le=2**20, examples=[5, 1])
    """Width of the keys B and queries C of a head."""
    n_groups: int = Field(default=1, gt=0, le=2**20, examples=[2])
    """Number of groups of heads; the heads of a group share B and C."""
    norm_eps: float = Field(default=1e-5, ge=0)
    """Constant added to the mean square in norms."""

    @classmethod
    def example_fields(cls) -> dict[str, Any]:
        """Return fields, by name, for small heads; the smallest model with default heads would be 32 wide."""
        return {"head_dim": 6, "d_state": 5}


class StateSpaceMixer(MatrixStateMixer):
    """A mixer with a single input projection to a gate, values, and the keys and queries of each group.

    A subclass adds its modules, calls `reset_parameters`, and defines `mix`.

    Args:
        config: the mixer's configuration.
        d_model: width of the residual stream.
        n_layers: number of layers of the model; the output projection starts smaller in deeper models.
        gates: names and widths of further projections, the gates of the recurrence; None stands for `n_heads`, one
            scalar per head.

    Raises:
        ContractError: heads or groups do not divide the widths.
    """

    log_decay_shape = "B T H"

    def __init__(self, config: Any, d_model: int, n_layers: int, gates: Sequence[tuple[str, int | None]]) -> None:
        super().__init__(config)
        self.config = config
        self.n_layers = n_layers
        self.n_groups = config.n_groups
        self.n_heads = heads_of(d_model, config.expand, config.head_dim, config.n_groups)
        self.key_dim = config.d_state
        self.value_dim = config.head_dim
        values = self.n_heads * config.head_dim
        keys = config.n_groups * config.d_state
        self.widths = [values, keys, keys]
        gate_widths = {name: self.n_heads if width is None else width for name, width in gates}
        self.in_widths = [values, sum(self.widths), *gate_widths.values()]
        self.row_blocks = [
            RowBlock("gate", values, heads=self.n_heads),
            RowBlock("v", values, heads=self.n_heads),
            RowBlock("k", keys, heads=self.n_groups),
            RowBlock("q", keys, heads=self.n_groups),
            *(RowBlock(name, width, Role.GATE) for name, width in gate_widths.items()),
        ]
        self.parameter_roles = {"in_proj.weight": self.row_blocks}
        self.in_proj = nn.Linear(d_model, sum(self.in_widths), bias=False)
        self.out_proj = nn.Linear(values, d_model, bias=False)
        self.D = nn.Parameter(torch.empty(self.n_heads))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise as the authors' code: torch's defaults, with the output projection divided by sqrt(n_layers)."""
        parts: list[Any] = [part for part in self.children() if part is not self.out_proj]
        for part in (*parts, self.out_proj):
            part.reset_parameters()
        self.out_proj.weight.div_(math.sqrt(self.n_layers))
        nn.init.ones_(self.D)

    @property
    def projections(self) -> dict[str, Float[Tensor, "H _ D"]]:
        return projections_of(self.in_proj, self.out_proj, self.row_blocks, self.n_heads)

    def by_group(self, x: Float[Tensor, "B T G*K"]) -> Float[Tensor, "B T G K"]:
        """Split keys B or queries C by group; all heads of a group use the same."""
        return x.unflatten(-1, (self.n_groups, -1))
