"""Softmax attention through xformers' memory-efficient attention (notation of attention/api.py).

    segment                        xformers' mask
    alone                          LowerTriangularMask
    all rows with equal caches     LowerTriangularFromBottomRightMask
      either, under a window       LowerTriangularFromBottomRightLocalAttentionMask
    packed documents               BlockDiagonalCausalMask
      under a window               BlockDiagonalCausalLocalAttentionMask
    rows or documents that differ  BlockDiagonalCausalFromBottomRightMask
      in their past; with window   BlockDiagonalCausalLocalAttentionFromBottomRightMask

The masks know lengths and no positions: the last query sees the last key. So the slots of a cache that are filled are
first gathered in the order of their positions, which also puts a ring in order and leaves out what no query sees.
These masks hold lengths as Python numbers: with packed documents or a cache a call waits for the device to read them.

A call to xformers is its own autograd function, which a compiler does not take in. Compiled code therefore has one
custom op, whose backward pass recomputes the forward: what xformers saves between the two, the logarithms of the
softmax's sums, has a shape that depends on the kernel that it chooses, and that no fake could tell.

xformers is imported where it is called.
"""

from collections.abc import Sequence
from importlib import import_module
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..attention.inputs import AttentionInputs, AttentionOutput, factored, require_range, without_scores
from ..attention.kv_cache import RingCache
from ..runtime.custom_op import Gradients, Op, needs_grad
from ..runtime.kernel import Kernel, Probe, declare, installed
from ..runtime.paradigm import Paradigm

FLASH_WIDTH = 256
"""The widest heads of the kernels for 16 bits."""


def limits(probe: Probe) -> list[str]:
    """Why it cannot run what it is asked about, beside the dtype."""
    reasons = without_scores("xformers", probe)
    if not installed("xformers"):
        reasons.append("xformers is not installed (pip install 'seqmix[gpu]', on Linux)")
    if probe.device.type != "cuda":
        reasons.append(f"it needs a CUDA device and not {probe.device.type}")
    multiple = 4 if probe.dtype == torch.float32 else 8  # of 16 bytes
    if probe.key_width % multiple or probe.value_width % multiple:
        reasons.append(
            f"in this dtype widths are multiples of {multiple}, not {probe.key_width} and {probe.value_width}"
        )
    # there are two families of kernels, and this is what the first takes; the second takes float32 and other widths
    first = probe.dtype != torch.float32 and probe.key_width == probe.value_width <= FLASH_WIDTH
    if not first and probe.window and probe.needs_grad:
        reasons.append(
            "under a window there is a backward pass only in 16 bits, "
            f"with keys and values of one width up to {FLASH_WIDTH}"
        )
    if probe.device.type == "cuda" and torch.cuda.is_available():
        capability = torch.cuda.get_device_capability(probe.device)
        if first and capability < (8, 0):
            reasons.append(f"its kernels for 16 bits need compute capability 8.0, and this device has {capability}")
        if not first and capability > (9, 0):
            reasons.append(
                "float32, and keys and values of two widths, end with compute capability 9.0, "
                f"and this device has {capability}"
            )
    return reasons


class _Inputs(NamedTuple):
    """What the op is given; keys and values are those offered, the cache's first."""

    q: Tensor
    keys: Tensor
    values: Tensor
    read: Tensor | None
    """Tokens that each row or document has read before; None without a cache."""
    cu_seqlens: Tensor | None
    boundaries: Sequence[int] | None
    capacity: int
    """Slots of the cache."""
    ring: bool
    window: int
    """0 is none."""
    scale: float


def softmax_parallel_xformers(x: AttentionInputs) -> AttentionOutput:
    """The parallel paradigm by xformers.

    Raises:
        SeqmixError: `KERNEL` does not take this.
    """
    KERNEL.require(x.probe())
    require_range(x.log_decay, x.q.shape[1], x.q.dtype)
    offer = x.offer()
    kept = x.kept
    query, keys = factored(x.q, 0, offer, x.log_decay)
    inputs = _Inputs(
        query,
        keys,
        offer.values,
        None if kept is None else kept.length,
        None if x.documents is None else x.documents.cu_seqlens,
        None if x.documents is None else x.documents.boundaries,
        0 if kept is None else kept.keys.shape[1],
        isinstance(kept, RingCache),
        x.window or 0,
        x.scale,
    )
    (output,) = OP(inputs) if torch.compiler.is_compiling() else _attend(OP.checked(inputs))
    return output, x.final()


# ---- masks


def bias(
    queries: Sequence[int], keys: Sequence[int], window: int | None, *, apart: bool, device: torch.device | None = None
) -> Any:
    """xformers' mask of so many queries, and keys (no fewer, their own the last), of each row or document; `apart` is
    whether they are packed one after another in one row."""
    masks = import_module("xformers.ops.fmha.attn_bias")
    if window is not None and window >= max(keys):
        window = None
    alone = list(queries) == list(keys)
    if apart:
        blocks = masks.BlockDiagonalMask.from_seqlens(list(queries), list(keys), device=device)
        if window is None:
            return blocks.make_causal() if alone else blocks.make_causal_from_bottomright()
        if alone:
            return blocks.make_local_attention(window)
        return blocks.make_local_attention_from_bottomright(window)
    if window is not None:
        return masks.LowerTriangularFromBottomRightLocalAttentionMask(window)
    return masks.LowerTriangularMask() if alone else masks.LowerTriangularFromBottomRightMask()


class Plan(NamedTuple):
    """How a segment and what came before it become rows or blocks."""

    queries: list[int]
    """Of each row or document."""
    keys: list[int]
    """That each has."""
    apart: bool
    """Whether they are packed one after another in one row."""
    chosen: Tensor | None
    """Which of all keys offered they are, on the host; None where they are those of the segment as it is."""


def plan(
    rows: int,
    length: int,
    read: Sequence[int] | None,
    boundaries: Sequence[int] | None,
    *,
    capacity: int = 0,
    ring: bool = False,
    window: int | None = None,
) -> Plan:
    """How it is done; documents without tokens are left out.

    `read` is the tokens that each row or document has read before (None without a cache of so many slots), which come
    before a row's own tokens, a packed row's before all; in a ring position p is in slot p mod S.
    """
    spans = [(0, length)] * rows if boundaries is None else list(pairwise(boundaries))
    spans = [(row, start, stop) for row, (start, stop) in enumerate(spans) if start < stop]
    queries = [stop - start for _, start, stop in spans]
    if read is None:
        return Plan(queries, queries, boundaries is not None, None)
    keys = []
    chosen = []
    offered = capacity + length  # of one row of a batch
    for (row, start, stop), tokens in zip(spans, queries, strict=True):
        last = read[row]
        cached = min(last, capacity if window is None else min(capacity, window - 1))
        slots = torch.arange(last - cached, last)
        slots = slots % capacity if ring else slots - last + capacity
        if boundaries is None:
            chosen += [row * offered + slots, row * offered + capacity + torch.arange(tokens)]
        else:
            chosen += [row * capacity + slots, len(read) * capacity + torch.arange(start, stop)]
        keys.append(cached + tokens)
    return Plan(queries, keys, boundaries is not None or len(set(keys)) > 1, torch.cat(chosen))


class _Call(NamedTuple):
    """What xformers is given."""

    q: Tensor
    k: Tensor
    v: Tensor
    options: dict[str, Any]
    chosen: Tensor | None
    """Which of the keys offered these are; None where they are all, in order."""


def _call(x: _Inputs) -> _Call:
    """Queries [. . H K], and keys and values in order [. . G .]."""
    rows, length, n_heads, width = x.q.shape
    boundaries = x.boundaries
    if boundaries is None and x.cu_seqlens is not None:
        boundaries = x.cu_seqlens.tolist()
    found = plan(
        rows,
        length,
        None if x.read is None else x.read.tolist(),
        boundaries,
        capacity=x.capacity,
        ring=x.ring,
        window=x.window or None,
    )
    q = x.q
    keys = x.keys
    values = x.values
    chosen = None if found.chosen is None else found.chosen.to(q.device)
    if chosen is not None:
        keys, values = (y.flatten(0, 1).index_select(0, chosen) for y in (keys, values))
        keys, values = (y.unflatten(0, (1 if found.apart else rows, -1)) for y in (keys, values))
    if found.apart:
        q = q.reshape(1, rows * length, n_heads, width)
    mask = bias(found.queries, found.keys, x.window or None, apart=found.apart, device=q.device)
    options = {"attn_bias": mask, "scale": x.scale}
    return _Call(_readable(q), _readable(keys), _readable(values), options, chosen)


def _readable(x: Tensor) -> Tensor:
    """x as it lies, if its heads are contiguous and begin at multiples of 16 bytes."""
    offsets = (x.storage_offset(), *x.stride()[:-1])
    if x.stride(-1) == 1 and all(offset * x.element_size() % 16 == 0 for offset in offsets):
        return x
    return x.clone(memory_format=torch.contiguous_format)  # contiguous() would leave what begins between two of them


def _grouped(call: _Call) -> tuple[Tensor, Tensor, Tensor]:
    """[B M G H/G .]: each key head serves several query heads without a copy."""
    n_kv_heads = call.k.shape[2]
    several = call.q.shape[2] // call.k.shape[2]
    k, v = (x[:, :, :, None].expand(-1, -1, -1, several, -1) for x in (call.k, call.v))
    return call.q.unflatten(2, (n_kv_heads, several)), k, v


def _repeated(call: _Call) -> tuple[Tensor, Tensor, Tensor]:
    """[B M H .]: the backward kernels take no groups, so key heads are copied."""
    several = call.q.shape[2] // call.k.shape[2]
    k, v = (x if several == 1 else x.repeat_interleave(several, dim=2) for x in (call.k, call.v))
    return call.q, k, v


# ---- as it is called


def _attend(x: _Inputs) -> tuple[Tensor]:
    """Output; with gradients by xformers' own autograd function."""
    _refuse(x)
    differentiated = needs_grad(x.q, x.keys, x.values)
    if not differentiated:
        # xformers decides by the tensors, not by grad mode, whether a backward pass will follow
        x = x._replace(q=x.q.detach(), keys=x.keys.detach(), values=x.values.detach())
    call = _call(x)
    grouped = call.q.shape[2] != call.k.shape[2] and not differentiated
    inputs = _grouped(call) if grouped else _repeated(call)
    output = import_module("xformers.ops.fmha").memory_efficient_attention(*inputs, **call.options)
    return (output.reshape(*x.q.shape[:3], x.values.shape[3]),)


def _refuse(x: _Inputs) -> None:
    """Refuse what `KERNEL` does not take."""
    probe = Probe(
        device=x.q.device,
        dtype=x.q.dtype,
        key_width=x.q.shape[3],
        value_width=x.values.shape[3],
        window=x.window > 0,
        needs_grad=needs_grad(x.q, x.keys, x.values),
    )
    KERNEL.require(probe)


def _allocate(x: _Inputs) -> tuple[Tensor]:
    _refuse(x)
    return (x.q.new_empty(*x.q.shape[:3], x.values.shape[3]),)


def _forward(x: _Inputs) -> tuple[Tensor]:
    with torch.no_grad():
        return (_attend(x)[0].contiguous(),)


def _backward(x: _Inputs, gradients: Gradients) -> dict[str, Tensor]:
    """Recomputes the forward."""
    fmha = import_module("xformers.ops.fmha")
    (d_output,) = gradients.outputs
    assert d_output is not None
    call = _call(x._replace(q=x.q.detach(), keys=x.keys.detach(), values=x.values.detach()))
    inputs = _repeated(call)
    output, sums = fmha.memory_efficient_attention_forward_requires_grad(*inputs, **call.options)
    above = _readable(d_output.reshape(output.shape))
    dq, dk, dv = fmha.memory_efficient_attention_backward(above, output, sums, *inputs, **call.options)
    several = call.q.shape[2] // call.k.shape[2]

    def of_offered(gradient: Tensor, given: Tensor) -> Tensor:
        flat = gradient.unflatten(2, (-1, several)).sum(3).flatten(0, 1)
        if call.chosen is not None:  # what was not read has no gradient
            flat = flat.new_zeros(given.shape).flatten(0, 1).index_copy(0, call.chosen, flat)
        return flat.reshape(given.shape)

    return {"q": dq.reshape(x.q.shape), "keys": of_offered(dk, x.keys), "values": of_offered(dv, x.values)}


OP = Op("softmax_xformers", _Inputs, fake=_allocate, forward=_forward, backward=_backward, outputs=1)

KERNEL = declare(
    Kernel(
        op="softmax",
        paradigm=Paradigm.PARALLEL,
        backend="xformers",
        function=softmax_parallel_xformers,
        # those of SDPA; in float32 a fused softmax rounds its running sums once per block
        tolerances={torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 1.3e-3},
        limits=limits,
    )
)
