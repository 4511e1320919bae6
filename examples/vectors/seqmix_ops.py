"""The ops of seqmix, by backend and paradigm: `reference`, `native`, `recurrent`."""

from typing import Any

import torch
from torch_adapter import on_tensors

from seqmix.ops.attention import GrowingCache, softmax_attention
from seqmix.ops.attention.kv_cache import ForgettingCache
from seqmix.ops.convolution import long_convolution as long_op
from seqmix.ops.convolution import short_convolution as short_op
from seqmix.ops.decay import decay as decay_op
from seqmix.ops.delta import delta as delta_op
from seqmix.ops.delta import delta_product as delta_product_op
from seqmix.ops.dplr import dplr as dplr_op
from seqmix.ops.scan import diagonal_scan as diagonal_op
from seqmix.ops.scan import log_scan as log_op
from seqmix.ops.scan import scan as scan_op
from seqmix.ops.scan import selective_scan as selective_op

Tensors = dict[str, torch.Tensor]


class Ops:
    """The ops with one backend, and one paradigm where an op has several."""

    def __init__(self, backend: str, paradigm: str) -> None:
        self.backend, self.paradigm = backend, paradigm
        for name in (
            "decay",
            "delta",
            "delta_product",
            "dplr",
            "scan",
            "log_scan",
            "selective_scan",
            "diagonal_scan",
            "softmax",
        ):
            setattr(self, name, on_tensors(getattr(self, f"_{name}")))
        self.short_convolution = on_tensors(self._short_convolution)
        self.long_convolution = on_tensors(self._long_convolution)

    def _call(self, x: Tensors, paradigm: str | None = None) -> dict[str, Any]:
        options: dict[str, Any] = {"backend": self.backend, "paradigm": paradigm or self.paradigm}
        return options | {
            "initial_state": x.get("state"),
            "output_final_state": True,
            "cu_seqlens": x.get("cu_seqlens"),
        }

    def _result(self, result: tuple[torch.Tensor, Any]) -> Tensors:
        return {"output": result[0], "state": result[1]}

    def _decay(self, x: Tensors, attributes: dict[str, Any]) -> Tensors:
        return self._result(decay_op(x["q"], x["k"], x["v"], x.get("log_decay"), **attributes, **self._call(x)))

    def _delta(self, x: Tensors, attributes: dict[str, Any]) -> Tensors:
        tensors = (x["q"], x["k"], x["v"], x["beta"], x.get("log_decay"))
        return self._result(delta_op(*tensors, **attributes, **self._call(x)))

    def _delta_product(self, x: Tensors, attributes: dict[str, Any]) -> Tensors:
        tensors = (x["q"], x["k"], x["v"], x["beta"], x["log_decay"])
        return self._result(delta_product_op(*tensors, scale=attributes["scale"], **self._call(x)))

    def _dplr(self, x: Tensors, attributes: dict[str, Any]) -> Tensors:
        tensors = (x["q"], x["k"], x["v"], x["a"], x.get("b"), x.get("log_decay"))
        return self._result(dplr_op(*tensors, **attributes, **self._call(x)))

    def _scan(self, x: Tensors, _: dict[str, Any]) -> Tensors:
        return self._result(scan_op(x["x"], x["log_decay"], **self._call(x)))

    def _log_scan(self, x: Tensors, _: dict[str, Any]) -> Tensors:
        return self._result(log_op(x["x"], x["log_decay"], **self._call(x)))

    def _selective_scan(self, x: Tensors, _: dict[str, Any]) -> Tensors:
        return self._result(selective_op(x["x"], x["step"], x["rate"], x["k"], x["q"], **self._call(x)))

    def _diagonal_scan(self, x: Tensors, _: dict[str, Any]) -> Tensors:
        return self._result(diagonal_op(x["x"], x["log_decay"], x["angle"], x["weight"], **self._call(x)))

    def _softmax(self, x: Tensors, attributes: dict[str, Any]) -> Tensors:
        cache: Any = GrowingCache(x["keys"], x["values"], x["length"]) if "keys" in x else None
        cache = ForgettingCache(cache, x["gates"]) if "gates" in x else cache
        options = {name: x[name] for name in ("log_decay", "log_forget", "slopes", "sinks") if name in x}
        call = {"initial_state": cache, "cu_seqlens": x.get("cu_seqlens"), "paradigm": self.paradigm}
        return {"output": softmax_attention(x["q"], x["k"], x["v"], **attributes, **options, **call)[0]}

    def _short_convolution(self, x: Tensors, attributes: dict[str, Any]) -> Tensors:
        call = self._call(x, "parallel")
        return self._result(short_op(x["x"], x["weight"], x.get("bias"), **attributes, **call))

    def _long_convolution(self, x: Tensors, _: dict[str, Any]) -> Tensors:
        paradigm = "recurrent" if self.paradigm == "recurrent" else "parallel"
        call = self._call(x, paradigm) | {"backend": "reference"}  # the only one
        return {"output": long_op(x["x"], x["filters"], **call)[0]}


reference, native, recurrent = Ops("reference", "chunkwise"), Ops("native", "chunkwise"), Ops("reference", "recurrent")
