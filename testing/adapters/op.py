"""Adapter that makes a function of queries, keys and values a mixer, with the projections of a layer around it."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .module import AdaptedConfig, Result, adapt


class OpState(NamedTuple):
    """State of a function of queries, keys and values (`adapt_op`)."""

    memory: Tensor
    """One matrix per head, [B H K V]."""


class _Projections(nn.Module):
    """Layer around a function: x is projected to q, k, v, [B T H D/H], and the gates, [B T H]; o to the output."""

    def __init__(self, d_model: int, n_heads: int, gates: Mapping[str, Callable[[Tensor], Tensor]]) -> None:
        super().__init__()
        self.n_heads, self.gates = n_heads, gates
        self.in_proj = nn.Linear(d_model, 3 * d_model + n_heads * len(gates))
        self.out_proj = nn.Linear(d_model, d_model)

    def forward(self, function: Callable[..., Any], x: Tensor, **options: Any) -> tuple[Tensor, Tensor | None]:
        d_model = x.shape[-1]
        *qkv, raw = self.in_proj(x).split([d_model] * 3 + [self.n_heads * len(self.gates)], dim=-1)
        heads = [part.unflatten(-1, (self.n_heads, -1)) for part in qkv]
        parts = raw.unflatten(-1, (max(1, len(self.gates)), -1)).unbind(-2) if self.gates else ()
        gates = {name: gate(part) for (name, gate), part in zip(self.gates.items(), parts, strict=True)}
        result = function(*heads, **gates, **options)
        o, memory = result if isinstance(result, tuple) else (result, None)
        return self.out_proj(o.flatten(-2)), memory


def adapt_op(
    function: Callable[..., Any],
    *,
    n_heads: int = 2,
    gates: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
    state: bool = False,
    traits: Mapping[str, Any] | None = None,
    kind: str = "",
) -> AdaptedConfig:
    """Return a mixer configuration of a function of q, k and v, each [B T H K], for `check_mixer`.

    Args:
        function: returns o, [B T H V], or (o, memory). The names of its arguments are those of flash-linear-attention.
        n_heads: the number of heads, H.
        gates: further arguments, [B T H], by name, each with the function that maps any number to a valid value:
            `{"g": F.logsigmoid}`.
        state: True if the function has the arguments `initial_state`, a memory [B H K V], and `output_final_state`.
        traits: as in `adapt`; with `packing`, the function gets `cu_seqlens`.
        kind: the name in reports; by default that of the function.
    """

    def call(module: Any, x: Tensor, before: Any, cu_seqlens: Tensor | None, return_state: bool) -> Result:
        options: dict[str, Any] = {} if cu_seqlens is None else {"cu_seqlens": cu_seqlens}
        if state:
            options |= {"initial_state": before and before.memory, "output_final_state": return_state}
        y, memory = module(function, x, **options)
        return y, None if memory is None else OpState(memory)

    def initial(module: Any, batch_size: int) -> OpState:
        weight = module.out_proj.weight
        size = weight.shape[0] // n_heads
        wide = torch.promote_types(weight.dtype, torch.float32)
        return OpState(weight.new_zeros(batch_size, n_heads, size, size, dtype=wide))

    name = kind or getattr(function, "__name__", "op")
    initial_state = initial if state else None
    make = lambda d_model: _Projections(d_model, n_heads, gates or {})  # noqa: E731
    return adapt(make, call=call, state=initial_state, traits=traits, kind=name)
