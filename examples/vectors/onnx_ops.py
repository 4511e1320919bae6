"""ONNX operators: LinearAttention (opset 27) and Attention (opset 24), each as a model of one node.

`reference` runs onnx's reference evaluator, `onnxruntime_cpu` ONNX Runtime on a CPU.
"""

from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

Arrays = dict[str, np.ndarray]


def _model(op: str, opset: int, inputs: Arrays, results: list[str], attributes: dict[str, Any]) -> onnx.ModelProto:
    """Return a model of one node; an input with an empty array is left out."""
    names = [name if x.size else "" for name, x in inputs.items()]
    while names and not names[-1]:
        names.pop()
    node = helper.make_node(op, names, results, **attributes)
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, x.shape) for name, x in inputs.items() if x.size]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in results]
    graph = helper.make_graph([node], op, values, outputs)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=11)


def _by_reference(model: onnx.ModelProto, inputs: Arrays) -> list[np.ndarray]:
    return ReferenceEvaluator(model).run(None, inputs)


def _by_onnxruntime(model: onnx.ModelProto, inputs: Arrays) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, inputs)


def _require_none(inputs: Arrays, *names: str) -> None:
    for name in names:
        if name in inputs:
            raise NotImplementedError(f"no {name}")


def _flat(x: np.ndarray) -> np.ndarray:
    """Return [B T H K] as [B T H*K]."""
    return np.ascontiguousarray(x.reshape(*x.shape[:2], -1))


def _linear_attention(run: Any, x: Arrays, attributes: dict[str, Any], beta: np.ndarray | None) -> Arrays:
    _require_none(x, "cu_seqlens")
    batch, length, heads, width = x["v"].shape
    if x["k"].shape[2] != heads:
        raise NotImplementedError("no keys that value heads share")
    missing = np.zeros(0, np.float32)
    decay = x.get("log_decay", missing)
    if decay.ndim == 1 and decay.size:
        decay = np.broadcast_to(decay, (batch, length, heads))
    inputs = {name: _flat(x[letter]) for name, letter in (("query", "q"), ("key", "k"), ("value", "v"))}
    inputs |= {"past_state": x.get("state", missing), "decay": _flat(decay) if decay.size else missing}
    inputs["beta"] = missing if beta is None else beta
    rule = {(False, False): "linear", (True, False): "gated", (False, True): "delta", (True, True): "gated_delta"}
    options = {
        "update_rule": rule[bool(decay.size), beta is not None],
        "q_num_heads": heads,
        "kv_num_heads": heads,
        "scale": attributes["scale"],
    }
    model = _model("LinearAttention", 27, inputs, ["output", "present_state"], options)
    output, state = run(model, {name: np.ascontiguousarray(y) for name, y in inputs.items() if y.size})
    return {"output": output.reshape(batch, length, heads, width), "state": state}


def _attention(run: Any, x: Arrays, attributes: dict[str, Any]) -> Arrays:
    _require_none({**x, **attributes}, "cu_seqlens", "window", "slopes", "log_forget", "log_decay", "sinks")
    if "keys" in x and (x["length"] != x["keys"].shape[1]).any():
        raise NotImplementedError("past keys of all rows have one length")
    names = {"Q": "q", "K": "k", "V": "v", "past_key": "keys", "past_value": "values"}
    missing = np.zeros(0, np.float32)
    inputs = {name: x[key].transpose(0, 2, 1, 3) if key in x else missing for name, key in names.items()}
    inputs = {"Q": inputs["Q"], "K": inputs["K"], "V": inputs["V"], "attn_mask": missing} | inputs
    options = {"is_causal": 1, "scale": attributes["scale"], "softcap": attributes.get("softcap", 0.0)}
    results = ["Y", "present_key", "present_value"] if "keys" in x else ["Y"]
    model = _model("Attention", 24, inputs, results, options)
    output = run(model, {name: np.ascontiguousarray(y) for name, y in inputs.items() if y.size})[0]
    return {"output": output.transpose(0, 2, 1, 3)}


def _operators(run: Any) -> SimpleNamespace:
    return SimpleNamespace(
        decay=lambda x, attributes, _: _linear_attention(run, x, attributes, None),
        delta=lambda x, attributes, _: _linear_attention(run, x, attributes, x["beta"]),
        softmax=lambda x, attributes, _: _attention(run, x, attributes),
    )


reference, onnxruntime_cpu = _operators(_by_reference), _operators(_by_onnxruntime)
