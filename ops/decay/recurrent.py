"""The decay family, token by token (notation of api.py).

S_t = exp(a_t) S_{t-1} + k_t v_t^T
dS_{t-1}^+ = exp(a_t) dS_t      dk_t = dS_t v_t      dv_t = k_t dS_t      da_t = <exp(a_t) S_{t-1}, dS_t>_V
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..materialize import materialize
from ..recurrence import Recurrence
from ..recurrent import TokenRule, add_decay_gradient, decay_at, no_autocast, outer, recurrent_kernel


class _Decay(TokenRule):
    def step(self, x: Recurrence) -> tuple[Tensor, Tensor]:
        with no_autocast(x.q.device):
            query, key, value = (tensor.squeeze(1).to(x.wide) for tensor in (x.q, x.k, x.v))  # [B H *]
            # not transposed: an axis of one would keep its stride, which the state would take over
            column, value = materialize(key[..., None], 2), value[:, :, None]
            if x.initial_state is None:
                state = column * value
            else:
                kept, decay = x.initial_state.to(x.wide), decay_at(x.log_decay, 0, x.wide)
                kept = kept * materialize(decay, 1) if isinstance(decay, Tensor) else kept
                # one pass over the state less than a product and a sum
                state = torch.addcmul(kept, column, value)
            output = materialize(x.scale * query[:, :, None], 3) @ state
        return output.to(x.q.dtype).transpose(1, 2), state

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
