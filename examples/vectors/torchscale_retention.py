"""Retention of torchscale, `parallel` and `recurrent`, as decays per head.

It divides outputs by the root of the sum of the decays, which is multiplied back here, and by max(|sum of scores|, 1),
which is 1 for queries that are small enough. Its chunks divide by a scale of their own and are not called here.
"""

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch_adapter import on_tensors, require_no_groups, require_none

# what RetNet's module imports of fairscale and timm, and does not need here
for name in ("fairscale", "fairscale.nn", "timm", "timm.models", "timm.models.layers"):
    sys.modules.setdefault(name, ModuleType(name))
for name, attribute in (("fairscale.nn", "checkpoint_wrapper"), ("fairscale.nn", "wrap")):
    setattr(sys.modules[name], attribute, None)
sys.modules["timm.models.layers"].drop_path = None  # type: ignore[attr-defined]

from torchscale.architecture.retnet import RetNetRelPos  # noqa: E402
from torchscale.component.multiscale_retention import MultiScaleRetention  # noqa: E402

Tensors = dict[str, torch.Tensor]
SMALL = 2.0**-30
"""Factor of the queries, an exact power of two."""


def _log_decay(x: Tensors) -> torch.Tensor:
    require_none(x, "cu_seqlens")
    require_no_groups(x)
    a = x.get("log_decay", x["v"].new_zeros(x["v"].shape[2]))
    if a.ndim > 1:
        raise NotImplementedError("no log-decays per token")
    return a


def _layer(x: Tensors) -> Any:
    """Return what the layer's methods read of it."""
    heads, key_width, width = x["v"].shape[2], x["k"].shape[3], x["v"].shape[3]
    return SimpleNamespace(num_heads=heads, key_dim=key_width, head_dim=width)


def _parallel(x: Tensors, attributes: dict[str, Any]) -> Tensors:
    require_none(x, "state")
    positions, length = SimpleNamespace(decay=_log_decay(x), angle=torch.zeros(1)), x["q"].shape[1]
    _, mask = RetNetRelPos.forward(positions, length)  # type: ignore[arg-type]
    q, k = (y.transpose(1, 2) for y in (SMALL * attributes["scale"] * x["q"], x["k"]))
    output = MultiScaleRetention.parallel_forward(_layer(x), q, k, x["v"].flatten(2), mask)
    total = mask.diagonal(dim1=1, dim2=2).T[..., None]  # the root of the sum of decays, inverted
    return {"output": output / total / SMALL}


def _recurrent(x: Tensors, attributes: dict[str, Any]) -> Tensors:
    decay, state, outputs = _log_decay(x).exp(), {}, []
    if "state" in x:
        state = {"prev_key_value": x["state"].mT, "scale": torch.ones_like(decay)}
    for t in range(x["q"].shape[1]):
        q, k = (y[:, t, :, None] for y in (attributes["scale"] * x["q"], x["k"]))
        output = MultiScaleRetention.recurrent_forward(_layer(x), q, k, x["v"][:, t : t + 1].flatten(2), decay, state)
        outputs.append(output * state["scale"].sqrt()[:, None])
    return {
        "output": torch.stack(outputs, 1),
        "state": (state["prev_key_value"] * state["scale"].sqrt()[:, None, None]).mT,
    }


parallel = SimpleNamespace(decay=on_tensors(_parallel, without=("log_decay",)))  # decays are no parameters there
recurrent = SimpleNamespace(decay=on_tensors(_recurrent))
