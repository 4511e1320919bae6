"""The recurrent kernel of the decay family, token by token (notation of api.py).

S_t = exp(a_t) S_{t-1} + k_t v_t^T
dS_{t-1}^+ = exp(a_t) dS_t      dk_t = dS_t v_t      dv_t = k_t dS_t      da_t = <exp(a_t) S_{t-1}, dS_t>_V
"""

from collections.abc import Mapping

from torch import Tensor

from ..recurrence.family import Recurrence
from ..recurrence.token_loop import (
    TokenRule,
    TokenVectors,
    no_autocast,
    recurrent_kernel,
    token_decay,
    write_token,
)
from ..runtime.materialize import materialize


class _Decay(TokenRule):
    def step(self, x: Recurrence) -> tuple[Tensor, Tensor]:
        dtype = x.output_dtype
        with no_autocast(x.q.device):
            x = x if x.q.dtype == x.wide_dtype else x.widened()
            # squeezed, not transposed: a transposed axis of size one keeps its stride, and the state would inherit it
            column = materialize(x.k.squeeze(1).unsqueeze(3), 2)
            value = x.v.squeeze(1).unsqueeze(2)
            state = write_token(x, token_decay(x), (column, value))
            query = x.q.transpose(1, 2)
            output = materialize(query if x.scale == 1 else x.scale * query, 3) @ state
        return output.to(dtype).transpose(1, 2), state

    def write(self, token: TokenVectors, state: Tensor, out: Tensor) -> None:
        token.write(state, token.k, token.v, out)

    def carry(self, token: TokenVectors, d_state: Tensor) -> Tensor:
        return token.apply_decay(d_state)

    def gradients(self, x: TokenVectors, entries: Tensor, d_states: Tensor) -> Mapping[str, Tensor]:
        gradients = {"k": d_states @ x.v.mT, "v": x.k.mT @ d_states}
        if x.kept is not None:
            gradients["log_decay"] = (x.apply_decay(entries) * d_states).sum(3, keepdim=True)
        return gradients


decay_recurrent = recurrent_kernel("decay_recurrent", _Decay())
