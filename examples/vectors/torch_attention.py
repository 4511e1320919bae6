"""Attention of torch: `sdpa` (scaled_dot_product_attention) and `flex` (flex_attention, which is not compiled here, and
has no gradients on a CPU)."""

import warnings
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch_adapter import on_tensors, require_none

Tensors = dict[str, torch.Tensor]


def _past(x: Tensors) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Return keys and values with those before the segment, heads first, and the number of keys before it."""
    keys, values, past = x["k"], x["v"], 0
    if "keys" in x:
        past = x["keys"].shape[1]
        if (x["length"] != past).any():
            raise NotImplementedError("past keys of all rows have one length")
        keys, values = torch.cat((x["keys"], keys), 1), torch.cat((x["values"], values), 1)
    return keys.transpose(1, 2), values.transpose(1, 2), past


def _sdpa(x: Tensors, attributes: dict[str, Any]) -> Tensors:
    require_none({**x, **attributes}, "cu_seqlens", "window", "slopes", "log_forget", "log_decay", "sinks", "softcap")
    keys, values, past = _past(x)
    mask: Any = {"attn_mask": causal_lower_right(x["q"].shape[1], keys.shape[2])} if past else {"is_causal": True}
    q = x["q"].transpose(1, 2)
    output = F.scaled_dot_product_attention(q, keys, values, scale=attributes["scale"], enable_gqa=True, **mask)
    return {"output": output.transpose(1, 2)}


def _flex(x: Tensors, attributes: dict[str, Any]) -> Tensors:
    require_none(x, "log_forget", "log_decay", "sinks")
    keys, values, past = _past(x)
    length, window = x["q"].shape[1], attributes.get("window")
    document = torch.zeros(past + length, dtype=torch.int64)
    if "cu_seqlens" in x:
        document = torch.repeat_interleave(torch.arange(len(x["cu_seqlens"]) - 1), x["cu_seqlens"].diff())

    def mask(b: Any, h: Any, n: Any, m: Any) -> Any:  # noqa: ARG001
        near = n + past - m < (window or past + length)
        return (n + past >= m) & near & (document[n + past] == document[m])

    def score(s: Any, b: Any, h: Any, n: Any, m: Any) -> Any:  # noqa: ARG001
        if "softcap" in attributes:
            s = attributes["softcap"] * torch.tanh(s / attributes["softcap"])
        return s - x["slopes"][h] * (n + past - m) if "slopes" in x else s

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is not compiled
        blocks = create_block_mask(mask, None, None, length, past + length, device="cpu")
        q = x["q"].transpose(1, 2)
        output = flex_attention(
            q, keys, values, score_mod=score, block_mask=blocks, scale=attributes["scale"], enable_gqa=True
        )
    return {"output": output.transpose(1, 2)}  # type: ignore[union-attr]


sdpa = SimpleNamespace(softmax=on_tensors(_sdpa))
flex = SimpleNamespace(softmax=on_tensors(_flex, differentiable=False))
