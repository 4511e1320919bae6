"""The delta family, token by token (notation of api.py).

P_t = exp(g_t) S_{t-1}      r_t = a_t^T P_t

of b = -beta k              e_t = v_t - r_t         S_t = P_t + beta_t k_t e_t^T
                            de_t = beta_t dS_t^T k_t            dv_t = de_t             dr_t = -de_t
                            dk_t = beta_t dS_t e_t              dbeta_t = <k_t, dS_t e_t>
of any b                    S_t = P_t + b_t r_t^T + k_t v_t^T
                            dr_t = dS_t^T b_t       db_t = dS_t r_t         dk_t = dS_t v_t         dv_t = dS_t^T k_t
of both                     dP_t = dS_t + a_t dr_t^T            dS_{t-1}^+ = exp(g_t) dP_t
                            da_t = P_t dr_t, part of dk_t where a is k          dg_t = <P_t, dP_t>
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
    read,
    recurrent_kernel,
)


class DeltaRule(TokenRule):
    """The equations above."""

    def step(self, x: Recurrence) -> tuple[Tensor, Tensor]:
        with no_autocast(x.q.device):
            query, key, value = (tensor.transpose(1, 2).to(x.wide) for tensor in (x.q, x.k, x.v))  # [B H 1 *]
            state, own = entry_of(x)
            if state is not None:
                reader = key if x.a is None else x.a.transpose(1, 2).to(x.wide)
                found = materialize(reader, 3) @ state
                if x.b is None:
                    value = value - found
                else:
                    state = add_outer(state, own, materialize(x.b.transpose(1, 2).to(x.wide).mT, 2), found)
            value = value if x.beta is None else x.beta[:, 0, :, None, None].to(x.wide) * value
            column, value = materialize(key.transpose(2, 3), 2), materialize(value, 3)
            state = column * value if state is None else add_outer(state, own, column, value)
            output = materialize(x.scale * query, 3) @ state
        return output.to(x.q.dtype).transpose(1, 2), state

    def write(self, x: Recurrence, t: int, state: Tensor) -> Tensor:
        key, value, decayed, found = self._read(x, t, state)
        if x.b is not None:
            return decayed + outer(x.b[:, t], found) + outer(key, value)
        return decayed + outer(key, self._rate(x, t) * (value - found))

    def write_backward(
        self, x: Recurrence, t: int, state: Tensor, d_state: Tensor, out: Mapping[str, Tensor]
    ) -> Tensor:
        key, value, decayed, found = self._read(x, t, state)
        if x.b is None:
            written, rate = torch.einsum("bhkv,bhv->bhk", d_state, value - found), self._rate(x, t)
            d_value = rate * read(key, d_state)
            d_key, d_found = rate * written, -d_value
            if x.beta is not None:
                out["beta"][:, t] = (key * written).sum(2)
        else:
            d_value, d_key = read(key, d_state), torch.einsum("bhkv,bhv->bhk", d_state, value)
            d_found = read(x.b[:, t], d_state)
            out["b"][:, t] = torch.einsum("bhkv,bhv->bhk", d_state, found)
        d_reader = torch.einsum("bhkv,bhv->bhk", decayed, d_found)
        if x.a is None:
            d_key = d_key + d_reader
        else:
            out["a"][:, t] = d_reader
        out["k"][:, t], out["v"][:, t] = d_key, d_value
        d_state = d_state + outer(self._reader(x, t), d_found)
        add_decay_gradient(out, t, (decayed * d_state).sum(3))
        return decay_at(x.log_decay, t, x.wide) * d_state

    def _read(self, x: Recurrence, t: int, state: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """k_t, v_t, P_t and r_t."""
        decayed = decay_at(x.log_decay, t, x.wide) * state
        return x.k[:, t], x.v[:, t], decayed, read(self._reader(x, t), decayed)

    def _reader(self, x: Recurrence, t: int) -> Tensor:
        """a_t."""
        return (x.k if x.a is None else x.a)[:, t]

    def _rate(self, x: Recurrence, t: int) -> Tensor | float:
        """beta_t."""
        return 1.0 if x.beta is None else x.beta[:, t, :, None]


delta_recurrent = recurrent_kernel("delta_recurrent", DeltaRule())
