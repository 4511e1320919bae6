"""The decay family, token by token (notation of api.py).

S_t = exp(a_t) S_{t-1} + k_t v_t^T
dS_{t-1}^+ = exp(a_t) dS_t      dk_t = dS_t v_t      dv_t = k_t dS_t      da_t = <exp(a_t) S_{t-1}, dS_t>_V
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..materialize import materialize
from ..recurrence import Recurrence
from ..recurrent import (
    TokenRule,
    add_decay_gradient,
    add_outer,
    decay_at,
    entry_of,
    no_autocast,
    outer,
    recurrent_kernel,
)


class _Decay(TokenRule):
    def step(self, x: Recurrence) -> tuple[Tensor, Tensor]:
        dtype = x.output_dtype
        with no_autocast(x.q.device):
            x = x if x.q.dtype == x.wide else x.widened()
            # not transposed: an axis of one would keep its stride, which the state would take over
            column, value = materialize(x.k.squeeze(1).unsqueeze(3), 2), x.v.squeeze(1).unsqueeze(2)
            kept, own = entry_of(x)
            state = column * value if kept is None else add_outer(kept, own, column, value)
            query = x.q.transpose(1, 2)
            output = materialize(query if x.scale == 1 else x.scale * query, 3) @ state
        return output.to(dtype).transpose(1, 2), state

    def write(self, x: Recurrence, t: int, state: Tensor) -> Tensor:
        written = outer(x.k[:, t], x.v[:, t])
        return decay_at(x.log_decay, t, x.wide) * state + written

    def write_backward(
        self, x: Recurrence, t: int, state: Tensor, d_state: Tensor, out: Mapping[str, Tensor]
    ) -> Tensor:
        out["k"][:, t] = torch.einsum("bhkv,bhv->bhk", d_state, x.v[:, t])
        out["v"][:, t] = torch.einsum("bhkv,bhk->bhv", d_state, x.k[:, t])
        d_state = decay_at(x.log_decay, t, x.wide) * d_state
        add_decay_gradient(out, t, (state * d_state).sum(3))
        return d_state


decay_recurrent = recurrent_kernel("decay_recurrent", _Decay())
