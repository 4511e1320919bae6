"""The reference functions (`naive`) of flash-linear-attention: `recurrent`, `chunk` and `attention`.

Its kernels need a GPU. Functions that require whole chunks get tokens of zeros after the text, as their callers do. The
functions of DPLR read the state before it decays; a of the vectors reads it after, so it is multiplied by the decay.
"""

from types import SimpleNamespace
from typing import Any

import torch
from fla.ops.attn.naive import naive_parallel_attn
from fla.ops.delta_rule.naive import delta_rule_chunkwise, delta_rule_recurrence
from fla.ops.gated_delta_product.naive import naive_recurrent_gated_delta_product
from fla.ops.gated_delta_rule.naive import naive_chunk_gated_delta_rule, naive_recurrent_gated_delta_rule
from fla.ops.generalized_delta_rule.dplr.naive import dplr_chunkwise, dplr_recurrence
from fla.ops.gla.naive import naive_recurrent_gla
from fla.ops.hgrn.naive import naive_chunk_hgrn, naive_recurrent_hgrn
from fla.ops.kda.naive import naive_chunk_kda, naive_recurrent_kda
from fla.ops.linear_attn.naive import naive_chunk_linear_attn, naive_recurrent_linear_attn
from fla.ops.simple_gla.naive import naive_chunk_simple_gla, naive_recurrent_simple_gla
from torch_adapter import (
    decay_per_key,
    decay_per_token,
    on_tensors,
    pad_tokens,
    require_no_groups,
    require_none,
)

Tensors = dict[str, torch.Tensor]


def _result(result: tuple[torch.Tensor, torch.Tensor | None], length: int) -> Tensors:
    output, state = result
    return {"output": output[:, :length]} | ({} if state is None else {"state": state})


def _decay(x: Tensors, _: dict[str, Any]) -> Tensors:
    require_none(x, "cu_seqlens")
    require_no_groups(x)
    tensors, options = (x["q"], x["k"], x["v"]), {"initial_state": x.get("state"), "output_final_state": True}
    if "log_decay" not in x:
        result = naive_recurrent_linear_attn(*tensors, **options)
    elif x["log_decay"].ndim == 4:
        result = naive_recurrent_gla(*tensors, x["log_decay"], **options)
    else:
        result = naive_recurrent_simple_gla(*tensors, decay_per_token(x), **options)
    return _result(result, x["q"].shape[1])


def _decay_chunk(x: Tensors, _: dict[str, Any]) -> Tensors:
    require_none(x, "cu_seqlens")
    require_no_groups(x)
    tensors, length = (x["q"], x["k"], x["v"]), x["q"].shape[1]
    if "log_decay" in x:
        options = {"initial_state": x.get("state"), "output_final_state": True}
        return _result(naive_chunk_simple_gla(*tensors, decay_per_token(x), **options), length)
    require_none(x, "state")
    return _result((naive_chunk_linear_attn(*(pad_tokens(y, 64) for y in tensors)), None), length)


def _delta(x: Tensors, _: dict[str, Any]) -> Tensors:
    require_none(x, "cu_seqlens")
    tensors, options = (x["q"], x["k"], x["v"]), {"initial_state": x.get("state"), "output_final_state": True}
    if "log_decay" not in x:
        heads_first = (y.transpose(1, 2) for y in (*tensors, x["beta"]))
        output, state = delta_rule_recurrence(*heads_first, **options)
        return {"output": output.transpose(1, 2), "state": state}
    if x["log_decay"].ndim == 4:
        return _result(naive_recurrent_kda(*tensors, x["log_decay"], x["beta"], **options), x["q"].shape[1])
    options |= {"g": decay_per_token(x), "beta": x["beta"]}
    return _result(naive_recurrent_gated_delta_rule(*tensors, **options), x["q"].shape[1])


def _delta_chunk(x: Tensors, _: dict[str, Any]) -> Tensors:
    require_none(x, "cu_seqlens")
    tensors, options = (x["q"], x["k"], x["v"]), {"initial_state": x.get("state"), "output_final_state": True}
    length = x["q"].shape[1]
    if "log_decay" not in x:
        require_none(x, "state")
        heads_first = (pad_tokens(y, 32).transpose(1, 2) for y in (*tensors, x["beta"]))
        output, state = delta_rule_chunkwise(*heads_first)
        return _result((output.transpose(1, 2), state), length)
    if x["log_decay"].ndim == 4:
        padded = (pad_tokens(y, 64) for y in (*tensors, x["log_decay"], x["beta"]))
        return _result(naive_chunk_kda(*padded, **options), length)
    return _result(naive_chunk_gated_delta_rule(*tensors, decay_per_token(x), x["beta"], **options), length)


def _delta_product(x: Tensors, attributes: dict[str, Any]) -> Tensors:
    options = {"num_householder": attributes["steps"], "initial_state": x.get("state"), "output_final_state": True}
    tensors = (x["q"], x["k"], x["v"], x["log_decay"], x["beta"])
    result = naive_recurrent_gated_delta_product(*tensors, attributes["scale"], x.get("cu_seqlens"), **options)
    return _result(result, x["q"].shape[1])


def _dplr(x: Tensors, chunk: bool) -> Tensors:
    require_none(x, "cu_seqlens")
    a = decay_per_key(x)
    b = x.get("b", -x["k"])
    tensors = [x["q"], x["k"], x["v"], x["a"] * a.exp(), b, a]
    if chunk:
        tensors = [pad_tokens(y, 32) for y in tensors]
    function = dplr_chunkwise if chunk else dplr_recurrence
    output, state = function(*(y.transpose(1, 2) for y in tensors), initial_state=x.get("state"))
    return _result((output.transpose(1, 2), state), x["q"].shape[1])


def _scan(x: Tensors, chunk: bool) -> Tensors:
    require_none(x, "cu_seqlens")
    state = x["state"].flatten(1) if "state" in x else None
    tokens, decay = (pad_tokens(x[name].flatten(2), 64 if chunk else 1) for name in ("x", "log_decay"))
    function = naive_chunk_hgrn if chunk else naive_recurrent_hgrn
    output, state = function(tokens, decay, state, True)
    shape = x["x"].shape[2:]
    return _result((output.unflatten(2, shape), state.unflatten(1, shape)), x["x"].shape[1])


def _softmax(x: Tensors, attributes: dict[str, Any]) -> Tensors:
    require_none({**x, **attributes}, "cu_seqlens", "keys", "slopes", "softcap", "log_decay")
    options = {"window_size": attributes.get("window"), "g": x.get("log_forget"), "sink_bias": x.get("sinks")}
    return {"output": naive_parallel_attn(x["q"], x["k"], x["v"], attributes["scale"], **options)[0]}


recurrent = SimpleNamespace(
    decay=on_tensors(_decay),
    delta=on_tensors(_delta),
    delta_product=on_tensors(_delta_product),
    dplr=on_tensors(lambda x, _: _dplr(x, chunk=False)),
    scan=on_tensors(lambda x, _: _scan(x, chunk=False)),
)
chunk = SimpleNamespace(
    decay=on_tensors(_decay_chunk),
    delta=on_tensors(_delta_chunk),
    dplr=on_tensors(lambda x, _: _dplr(x, chunk=True)),
    scan=on_tensors(lambda x, _: _scan(x, chunk=True)),
)
attention = SimpleNamespace(softmax=on_tensors(_softmax))
