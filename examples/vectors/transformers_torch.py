"""The torch functions of transformers that run where no kernel library is installed.

`gated_delta_chunk` and `gated_delta_recurrent` are those of Qwen3-Next, `kda_chunk` and `kda_recurrent` those of Kimi
Linear; `mamba`, `mamba2` and `rg_lru` (RecurrentGemma). Mamba multiplies its inputs by the step size, so they are
divided by it here.
"""

import inspect
from types import SimpleNamespace
from typing import Any

import torch
from torch_adapter import decay_per_key, decay_per_token, on_tensors, require_none
from transformers.models.kimi_linear import modeling_kimi_linear as kimi
from transformers.models.mamba import modeling_mamba as mamba_model
from transformers.models.mamba2 import modeling_mamba2 as mamba2_model
from transformers.models.qwen3_next import modeling_qwen3_next as qwen
from transformers.models.recurrent_gemma.modeling_recurrent_gemma import RecurrentGemmaRglru

Tensors = dict[str, torch.Tensor]


def _delta(function: Any, log_decay: Any) -> Any:
    function = inspect.unwrap(function)  # without the choice of a kernel library

    def delta(x: Tensors, _: dict[str, Any]) -> Tensors:
        require_none(x, "cu_seqlens")
        options = {"g": log_decay(x), "beta": x["beta"], "output_final_state": True}
        output, state = function(x["q"], x["k"], x["v"], initial_state=x.get("state"), **options)
        return {"output": output, "state": state}

    return SimpleNamespace(delta=on_tensors(delta))


gated_delta_chunk = _delta(qwen.torch_chunk_gated_delta_rule, decay_per_token)
gated_delta_recurrent = _delta(qwen.torch_recurrent_gated_delta_rule, decay_per_token)
kda_chunk = _delta(kimi.chunk_kimi_delta_attention, decay_per_key)
kda_recurrent = _delta(kimi.recurrent_kimi_delta_attention, decay_per_key)


def _selective_scan(x: Tensors, _: dict[str, Any]) -> Tensors:
    require_none(x, "cu_seqlens")
    u = (x["x"] / x["step"]).mT  # the function multiplies by the step size, whose gradient is then a difference
    step, rate, k, q = x["step"].mT, x["rate"].T, x["k"].mT, x["q"].mT
    if "state" not in x:
        scan = inspect.unwrap(mamba_model.mamba_selective_scan)
        output, state = scan(u, step, rate, k, q, return_last_state=True)
        return {"output": output.mT, "state": state.mT}
    update, state, outputs = inspect.unwrap(mamba_model.mamba_selective_state_update), x["state"].mT.clone(), []
    with torch.no_grad():  # only its decoding step takes a state, which it overwrites
        for t in range(u.shape[2]):
            outputs.append(update(state, u[..., t], step[..., t], rate, k[..., t], q[..., t]))
    return {"output": torch.stack(outputs, 1), "state": state.mT}


def _short_convolution(module: Any) -> Any:
    def short_convolution(x: Tensors, attributes: dict[str, Any]) -> Tensors:
        require_none(x, "cu_seqlens")
        options = {"bias": x.get("bias"), "activation": attributes.get("activation")}
        if "state" not in x:
            convolve = inspect.unwrap(module.causal_conv1d_fn)
            return {"output": convolve(x["x"].mT, x["weight"], **options).mT}
        state = x["state"].mT.clone()
        output = inspect.unwrap(module.causal_conv1d_update)(x["x"].mT, state, x["weight"], **options)
        return {"output": output.mT, "state": state.mT}

    return on_tensors(short_convolution)


mamba = SimpleNamespace(
    selective_scan=on_tensors(_selective_scan, without=("step",)), short_convolution=_short_convolution(mamba_model)
)


def _mamba2(x: Tensors, attributes: dict[str, Any]) -> Tensors:
    require_none(x, "cu_seqlens")
    a = decay_per_token(x)
    if torch.isinf(a).any():
        raise NotImplementedError("step sizes are finite")
    per_token = "log_decay" in x and x["log_decay"].ndim == 3
    step = -a if per_token else torch.ones_like(a)
    rate = -torch.ones_like(a[0, 0]) if per_token else a[0, 0]
    initial = x["state"].mT if "state" in x else None
    options = {"chunk_size": 64, "initial_states": initial, "return_final_states": True}
    values = x["v"] / step[..., None]  # the function multiplies by the step size, whose gradient is then a difference
    scan = inspect.unwrap(mamba2_model.mamba2_chunk_scan)
    output, state = scan(values, step, rate, x["k"], attributes["scale"] * x["q"], **options)
    return {"output": output, "state": state.mT}


mamba2 = SimpleNamespace(decay=on_tensors(_mamba2), short_convolution=_short_convolution(mamba2_model))


def _rg_lru(x: Tensors, _: dict[str, Any]) -> Tensors:
    tokens, gate = (x[name].flatten(2) for name in ("x", "log_decay"))
    reset = torch.zeros(*gate.shape[:2], 1, dtype=torch.bool)
    if "cu_seqlens" in x:
        require_none(x, "state")
        reset[0, [start for start in x["cu_seqlens"].tolist() if start < reset.shape[1]]] = True
    state = x["state"].flatten(1) if "state" in x else None
    output, state = RecurrentGemmaRglru._rnn_scan(None, tokens, gate.exp(), reset, state)  # type: ignore[arg-type]
    final = {} if "cu_seqlens" in x else {"state": state.unflatten(1, x["x"].shape[2:])}
    return {"output": output.unflatten(2, x["x"].shape[2:]), **final}


rg_lru = SimpleNamespace(scan=on_tensors(_rg_lru))
