"""The recurrent kernel of the delta family, token by token (notation of api.py).

P_t = exp(g_t) S_{t-1}      r_t = a_t^T P_t

for b = -beta k             e_t = v_t - r_t         S_t = P_t + beta_t k_t e_t^T
                            de_t = beta_t dS_t^T k_t            dv_t = de_t             dr_t = -de_t
                            dk_t = beta_t dS_t e_t              dbeta_t = <k_t, dS_t e_t>
for any b                   S_t = P_t + b_t r_t^T + k_t v_t^T
                            dr_t = dS_t^T b_t       db_t = dS_t r_t         dk_t = dS_t v_t         dv_t = dS_t^T k_t
for both                    dP_t = dS_t + a_t dr_t^T            dS_{t-1}^+ = exp(g_t) dP_t
                            da_t = P_t dr_t, part of dk_t where a is k          dg_t = <P_t, dP_t>
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..recurrence.family import Recurrence
from ..recurrence.token_loop import (
    TokenRule,
    TokenVectors,
    decayed_state,
    no_autocast,
    recurrent_kernel,
    token_decay,
    write_token,
)
from ..runtime.materialize import materialize


class DeltaRule(TokenRule):
    """Update and gradients of the delta rule: the equations of this module."""

    def step(self, x: Recurrence) -> tuple[Tensor, Tensor]:
        with no_autocast(x.q.device):
            query, key, value = (tensor.transpose(1, 2).to(x.wide_dtype) for tensor in (x.q, x.k, x.v))  # [B H 1 *]
            decay = token_decay(x)
            moved = []
            if x.initial_state is not None:
                read_key = key if x.a is None else x.a.transpose(1, 2).to(x.wide_dtype)
                read = materialize(read_key, 3) @ decayed_state(x.initial_state.to(x.wide_dtype), decay)
                if x.b is None:
                    value = value - read
                else:
                    moved = [(materialize(x.b.transpose(1, 2).to(x.wide_dtype).mT, 2), read)]
            value = value if x.beta is None else x.beta[:, 0, :, None, None].to(x.wide_dtype) * value
            state = write_token(x, decay, (materialize(key.transpose(2, 3), 2), materialize(value, 3)), *moved)
            output = materialize(x.scale * query, 3) @ state
        return output.to(x.q.dtype).transpose(1, 2), state

    def write(self, token: TokenVectors, state: Tensor, out: Tensor) -> None:
        decayed = token.apply_decay(state)
        if token.b is None:
            error = torch.baddbmm(token.v, token.a, decayed, alpha=-1)
            token.write(state, token.beta_k, error, out)
        else:
            token.write(state, token.k, token.v, out)
            out.addcmul_(token.b, token.a @ decayed)

    def carry(self, token: TokenVectors, d_state: Tensor) -> Tensor:
        return token.apply_decay(d_state.addcmul(token.a.mT, _d_read(token, d_state)))

    def gradients(self, x: TokenVectors, entries: Tensor, d_states: Tensor) -> Mapping[str, Tensor]:
        decayed = x.apply_decay(entries)
        read = x.a @ decayed
        d_read = _d_read(x, d_states)
        gradients = {"a": decayed @ d_read.mT}
        if x.kept is not None:  # <P, dP>, of which the gradient of a is already a part
            gradients["log_decay"] = (decayed * d_states).sum(3, keepdim=True).addcmul_(x.a.mT, gradients["a"])
        if x.b is not None:
            return gradients | {"k": d_states @ x.v.mT, "v": x.k.mT @ d_states, "b": d_states @ read.mT}
        d_beta_k = d_states @ (x.v - read).mT
        d_key = d_beta_k if x.beta is None else x.beta * d_beta_k
        return gradients | {"k": d_key, "v": -d_read, "beta": x.k.mT @ d_beta_k}


def _d_read(x: TokenVectors, d_state: Tensor) -> Tensor:
    """Return dr, the gradient of the values that a reads, from dS, the gradient of the state."""
    return -(x.beta_k.mT @ d_state) if x.b is None else x.b.mT @ d_state


delta_recurrent = recurrent_kernel("delta_recurrent", DeltaRule())
