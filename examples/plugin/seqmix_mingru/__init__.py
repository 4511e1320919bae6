"""minGRU (Feng et al., "Were RNNs All We Needed?", arXiv 2410.01201).

    z_t  = sigmoid(x_t W_z)      h~_t = x_t W_h
    h_t  = (1 - z_t) * h_{t-1} + z_t * h~_t
    y_t  = h_t W_O

This is the paper's plain variant, in which h~ may have any sign. In the log-space variant, h~ passes through a positive
function g, because h is computed from the logarithms of all terms. The scan below takes no logarithm, so it needs no g.
It does not divide either: it multiplies by numbers in [0, 1], so a saturated gate needs no special care. Projections
have no bias.

seqmix also has minGRU as its built-in mixer `min_gru`, based on one of its ops. This version uses only torch.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from seqmix import Call, MixerConfig, Paradigm, SequenceMixer, Traits

__all__ = ["MinGRU", "MinGRUConfig", "MinGRUState"]


class MinGRUConfig(MixerConfig):
    """minGRU: a gated recurrent unit whose gate does not depend on the state, which allows parallel computation."""

    kind: Literal["mingru"] = "mingru"
    expansion: int = Field(default=1, gt=0, le=1000, examples=[2])
    """Width of the state, divided by d_model."""
    paradigm: Paradigm = Field(default=Paradigm.PARALLEL, strict=False)
    """Paradigm of training and evaluation."""

    @property
    def traits(self) -> Traits:
        """Traits: no chunkwise paradigm, so seqmix rejects chunkwise calls and processes prompts in parallel."""
        paradigms = frozenset({Paradigm.PARALLEL, Paradigm.RECURRENT})
        return Traits(paradigms=paradigms, state="constant", packing=True, shift_invariant=True)

    def build(self, d_model: int, *, layer_idx: int, n_layers: int) -> "MinGRU":  # noqa: ARG002
        """Build the layer."""
        return MinGRU(self, d_model)


class MinGRUState(NamedTuple):
    """State after a prefix."""

    hidden: Float[Tensor, "B D"]
    """h, float32 or float64."""


class MinGRU(SequenceMixer[MinGRUState]):
    """Layer configured by `MinGRUConfig`."""

    def __init__(self, config: MinGRUConfig, d_model: int) -> None:
        super().__init__(config)
        self.width = config.expansion * d_model
        self.in_proj = nn.Linear(d_model, 2 * self.width, bias=False)  # W_z and W_h
        self.out_proj = nn.Linear(self.width, d_model, bias=False)

    def reset_parameters(self) -> None:
        """Initialise as torch's linear layers."""
        self.in_proj.reset_parameters()
        self.out_proj.reset_parameters()

    def init_state(self, batch_size: int, *, max_length: int | None = None) -> MinGRUState:  # noqa: ARG002
        """Return the initial state, zeros."""
        return MinGRUState(torch.zeros(batch_size, self.width, device=self.device, dtype=self.state_dtype))

    def flops(self, length: int, paradigm: Paradigm, context: int = 0) -> int:  # noqa: ARG002
        """Count the operations of the projections; the recurrence has no matrix product."""
        return 2 * length * (self.in_proj.weight.numel() + self.out_proj.weight.numel())

    def mix(self, x: Float[Tensor, "B T D"], call: Call) -> tuple[Float[Tensor, "B T D"], MinGRUState | None]:
        """Compute h_t = keep_t * h_{t-1} + new_t, by a scan or token by token."""
        projected = self.in_proj(x)
        gate, candidate = projected.to(self.state_dtype).chunk(2, dim=-1)
        keep, new = (-gate).sigmoid(), gate.sigmoid() * candidate  # sigmoid(-gate), as 1 - z would round to 0 too early
        run = _parallel if call.paradigm is Paradigm.PARALLEL else _recurrent
        before = (self.init_state(call.rows(x.shape[0])) if call.state is None else call.state).hidden
        if call.documents is None:
            hidden = run(keep, new, before)
            after = hidden[:, -1].clone()  # a view would keep all of `hidden` alive
        else:
            cu_seqlens, document = call.documents.cu_seqlens, call.documents.of_token
            first = (torch.arange(x.shape[1], device=x.device) == cu_seqlens[document])[:, None]
            # the first token of a document keeps nothing of the row; what it keeps of its own state is added to new
            new = torch.where(first, new + keep * before[document], new)
            hidden = run(keep.masked_fill(first, 0), new, torch.zeros_like(before[:1]))
            after = torch.where(cu_seqlens.diff()[:, None] > 0, hidden[0, cu_seqlens[1:] - 1], before)
        return self.out_proj(hidden.to(projected.dtype)), MinGRUState(after)


def _parallel(keep: Float[Tensor, "B T D"], new: Float[Tensor, "B T D"], before: Float[Tensor, "B D"]) -> Tensor:
    """Run Hillis and Steele's scan: each of its log2 T passes doubles the tokens that every (keep, new) covers."""
    reach = 1
    while reach < keep.shape[1]:  # torch.compile makes one graph per power of two
        new = new + keep * F.pad(new, (0, 0, reach, -reach))  # shifted by `reach` tokens
        keep = keep * F.pad(keep, (0, 0, reach, -reach), value=1.0)
        reach *= 2
    return new + keep * before[:, None]


def _recurrent(keep: Float[Tensor, "B T D"], new: Float[Tensor, "B T D"], before: Float[Tensor, "B D"]) -> Tensor:
    """Compute the definition, token by token."""
    hidden = [before]
    for keep_t, new_t in zip(keep.unbind(1), new.unbind(1), strict=True):
        hidden.append(keep_t * hidden[-1] + new_t)
    return torch.stack(hidden[1:], dim=1)
