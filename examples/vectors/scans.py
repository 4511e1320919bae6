"""Scans of two packages: `mambapy` (pscan, and Mamba's selective scan) and `min_gru` (the scan of minGRU-pytorch)."""

from types import SimpleNamespace
from typing import Any

import torch
from mambapy.mamba import MambaBlock
from mambapy.pscan import pscan
from minGRU_pytorch.minGRU import heinsen_associative_scan_log
from torch_adapter import on_tensors, require_none

Tensors = dict[str, torch.Tensor]


def _scan(x: Tensors, _: dict[str, Any]) -> Tensors:
    require_none(x, "cu_seqlens", "state")
    output = pscan(x["log_decay"].exp(), x["x"])
    return {"output": output, "state": output[:, -1]}


def _selective_scan(x: Tensors, _: dict[str, Any]) -> Tensors:
    require_none(x, "cu_seqlens", "state")
    skip = torch.zeros(x["x"].shape[2], dtype=x["x"].dtype)
    u = x["x"] / x["step"]  # the function multiplies by the step size, whose gradient is then a difference
    output = MambaBlock.selective_scan(None, u, x["step"], x["rate"].T, x["k"], x["q"], skip)  # type: ignore[arg-type]
    return {"output": output}


def _log_scan(x: Tensors, _: dict[str, Any]) -> Tensors:
    require_none(x, "cu_seqlens")
    values, coefficients = x["x"], x["log_decay"]
    if "state" in x:  # as minGRU does
        values = torch.cat((x["state"][:, None], values), 1)
        coefficients = torch.cat((torch.zeros_like(coefficients[:, :1]), coefficients), 1)
    output = heinsen_associative_scan_log(coefficients, values).log()[:, -x["x"].shape[1] :]
    return {"output": output, "state": output[:, -1]}


mambapy = SimpleNamespace(scan=on_tensors(_scan), selective_scan=on_tensors(_selective_scan, without=("step",)))
min_gru = SimpleNamespace(log_scan=on_tensors(_log_scan))
