"""mLSTM of xlstm in plain torch: `parallel`, `chunkwise` and `recurrent`, as decays per head or per token.

mLSTM takes logits of forget gates and divides its output by max(|q n|, 1). With input gates of 1 and queries that are
small enough, the divisor is 1, and what remains is the decay family. Keys and values have one width there.
"""

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch_adapter import decay_per_token, on_tensors, pad_tokens, require_no_groups, require_none
from xlstm.blocks.mlstm.backends import chunkwise_simple, parallel_stabilized_simple, recurrent_step_stabilized_simple

Tensors = dict[str, torch.Tensor]
SMALL = 2.0**-30
"""Factor of the queries, an exact power of two."""


def _inputs(x: Tensors, attributes: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    """Return queries, keys and values of one width, heads first, and the logits of both gates, [B H T]."""
    require_none(x, "cu_seqlens")
    require_no_groups(x)
    width = max(x["k"].shape[3], x["v"].shape[3])
    q = SMALL * attributes["scale"] * width**0.5 * x["q"]
    q, k, v = (F.pad(y, (0, width - y.shape[3])).transpose(1, 2) for y in (q, x["k"], x["v"]))
    a = decay_per_token(x).transpose(1, 2)
    return q, k, v, torch.zeros_like(a), a - torch.log(-torch.expm1(a))


def _result(x: Tensors, output: torch.Tensor, state: torch.Tensor | None = None) -> Tensors:
    output = output.transpose(1, 2)[:, : x["q"].shape[1], :, : x["v"].shape[3]] / SMALL
    return {"output": output} | ({} if state is None else {"state": state[:, :, : x["k"].shape[3], : x["v"].shape[3]]})


def _parallel(x: Tensors, attributes: dict[str, Any]) -> Tensors:
    require_none(x, "state")
    q, k, v, i, f = _inputs(x, attributes)
    return _result(x, parallel_stabilized_simple(q, k, v, i[..., None], f[..., None]))


def _memory(x: Tensors, width: int) -> torch.Tensor:
    """Return the initial memory [B H D D], zero if the call has none."""
    shape = (x["q"].shape[0], x["v"].shape[2], width, width)
    state = x.get("state")
    if state is None:
        return x["q"].new_zeros(shape)
    return F.pad(state, (0, width - state.shape[3], 0, width - state.shape[2]))


def _chunkwise(x: Tensors, attributes: dict[str, Any]) -> Tensors:
    length = x["q"].shape[1]
    padded = {**x, **{name: pad_tokens(x[name], 64) for name in "qkv"}}
    if "log_decay" in x and x["log_decay"].ndim > 1:
        padded["log_decay"] = pad_tokens(x["log_decay"], 64)
    q, k, v, i, f = _inputs(padded, attributes)
    memory = _memory(x, q.shape[3])
    normalizer, stabilizer = torch.zeros_like(memory[..., 0]), torch.zeros_like(memory[..., 0, 0])
    f = torch.where(torch.arange(f.shape[2]) < length, f, torch.inf)  # what is padded forgets nothing
    output, (state, *_) = chunkwise_simple(q, k, v, i, f, memory, normalizer, stabilizer, return_last_state=True)
    return _result(x, output, state)


def _recurrent(x: Tensors, attributes: dict[str, Any]) -> Tensors:
    q, k, v, i, f = _inputs(x, attributes)
    width = q.shape[3]
    memory = _memory(x, width) / width**0.5  # the step scales keys, where the chunks scale queries
    normalizer, stabilizer = torch.zeros_like(memory[..., :1]), torch.zeros_like(memory[..., :1, :1])
    outputs = []
    for t in range(q.shape[2]):
        token = [y[:, :, t : t + 1].clone() for y in (q, k, v)]  # the step changes their shapes
        gates = (i[:, :, t, None, None], f[:, :, t, None, None])
        h, (memory, normalizer, stabilizer) = recurrent_step_stabilized_simple(
            memory, normalizer, stabilizer, *token, *gates
        )
        outputs.append(h[:, :, 0])
    return _result(x, torch.stack(outputs, 2), memory * width**0.5)


parallel = SimpleNamespace(decay=on_tensors(_parallel))
chunkwise = SimpleNamespace(decay=on_tensors(_chunkwise))
recurrent = SimpleNamespace(decay=on_tensors(_recurrent))
