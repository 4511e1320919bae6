"""The delta family, token by token (notation of api.py).

P_t = exp(a_t) S_{t-1}      e_t = v_t - k_t^T P_t       S_t = P_t + b_t k_t e_t^T

de_t = b_t dS_t^T k_t       dP_t = dS_t - k_t de_t^T    dS_{t-1}^+ = exp(a_t) dP_t
dk_t = b_t dS_t e_t - P_t de_t      dv_t = de_t         db_t = <k_t, dS_t e_t>      da_t = <P_t, dP_t>
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..materialize import materialize
from ..recurrence import Recurrence
from ..recurrent import TokenRule, add_decay_gradient, decay_at, no_autocast, outer, read, recurrent_kernel


class _Delta(TokenRule):
    def step(self, x: Recurrence) -> tuple[Tensor, Tensor]:
        assert x.beta is not None
        with no_autocast(x.q.device):
            query, key, error = (tensor.transpose(1, 2).to(x.wide) for tensor in (x.q, x.k, x.v))  # [B H 1 *]
            decayed = None
            if x.initial_state is not None:
                decay = decay_at(x.log_decay, 0, x.wide)
                decayed = x.initial_state.to(x.wide)
                decayed = decayed * materialize(decay, 1) if isinstance(decay, Tensor) else decayed
                error = error - materialize(key, 3) @ decayed
            rate = x.beta[:, 0, :, None, None].to(x.wide)
            state = materialize(key.transpose(2, 3), 2) * materialize(rate * error, 3)
            if decayed is not None:
                state = decayed + state
            output = materialize(x.scale * query, 3) @ state
        return output.to(x.q.dtype).transpose(1, 2), state

    def write(self, x: Recurrence, t: int, state: Tensor) -> Tensor:
        key, rate, decayed, error = self._predict(x, t, state)
        return decayed + outer(key, rate * error)

    def write_backward(
        self, x: Recurrence, t: int, state: Tensor, d_state: Tensor, out: Mapping[str, Tensor]
    ) -> Tensor:
        key, rate, decayed, error = self._predict(x, t, state)
        written = torch.einsum("bhkv,bhv->bhk", d_state, error)
        d_error = rate * read(key, d_state)
        out["k"][:, t] = rate * written - torch.einsum("bhkv,bhv->bhk", decayed, d_error)
        out["v"][:, t] = d_error
        out["beta"][:, t] = (key * written).sum(2)
        d_state = d_state - outer(key, d_error)
        add_decay_gradient(out, t, (decayed * d_state).sum(3))
        return decay_at(x.log_decay, t, x.wide) * d_state

    def _predict(self, x: Recurrence, t: int, state: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """k_t, b_t, P_t and e_t."""
        assert x.beta is not None
        key, value, rate = x.k[:, t].to(x.wide), x.v[:, t].to(x.wide), x.beta[:, t, :, None].to(x.wide)
        decayed = decay_at(x.log_decay, t, x.wide) * state
        return key, rate, decayed, value - read(key, decayed)


delta_recurrent = recurrent_kernel("delta_recurrent", _Delta())
