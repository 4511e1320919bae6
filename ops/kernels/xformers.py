"""Softmax attention through xformers' memory-efficient attention (notation of attention/api.py).

    segment                        xformers' mask
    without a cache                LowerTriangularMask
    caches of equal length         LowerTriangularFromBottomRightMask
      either, with a window        LowerTriangularFromBottomRightLocalAttentionMask
    packed documents               BlockDiagonalCausalMask
      with a window                BlockDiagonalCausalLocalAttentionMask
    caches of different lengths    BlockDiagonalCausalFromBottomRightMask
      with a window                BlockDiagonalCausalLocalAttentionFromBottomRightMask

The masks know lengths but no positions: the last query sees the last key. So the filled slots of a cache are first
gathered in the order of their positions, which also sorts a ring and drops keys that no query sees. The masks store
lengths as Python numbers: with packed documents or a cache, a call waits for the device to read them.

A compiler cannot trace xformers' attention, which is an autograd function. So compiled code has one custom op, whose
backward pass recomputes the forward pass: the logsumexp that xformers saves has a shape that depends on the kernel it
chooses, which the op's fake implementation cannot know.

Releases of xformers after 0.0.35 have moved these functions and masks to the package mslk, with unchanged signatures:
`fmha` imports the package that has them. It is imported only for a call on a GPU.
"""

import functools
from collections.abc import Sequence
from importlib import import_module
from itertools import pairwise
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...registry import SeqmixError
from ..attention.inputs import AttentionInputs, AttentionOutput, apply_decay, require_range, unsupported_scores
from ..attention.kv_cache import RingCache
from ..runtime.custom_op import Gradients, Op, needs_grad
from ..runtime.kernel import Kernel, Probe, declare
from ..runtime.paradigm import Paradigm

FLASH_WIDTH = 256
"""Largest head width of the 16-bit kernels."""


@functools.cache
def fmha() -> ModuleType:
    """Import the package with the attention of xformers: mslk's if there is one, else xformers' own.

    Raises:
        SeqmixError: neither has it. Without mslk, later releases of xformers import an empty package without an error.
    """
    failures = []
    for name in ("mslk.attention.fmha", "xformers.ops.fmha"):
        try:
            package = import_module(name)
        except Exception as error:  # a compiled library for another torch raises anything
            failures.append((str(error) or type(error).__name__).splitlines()[0])
        else:
            if hasattr(package, "memory_efficient_attention"):
                return package
            failures.append(f"{name} is empty")
    raise SeqmixError(
        f"xformers has no attention here ({'; '.join(failures)}): pip install 'xformers<0.0.36', or mslk-cuda, on Linux"
    )


@torch.compiler.assume_constant_result
def missing() -> str | None:
    """Return the reason why there is no attention of xformers; None if there is."""
    try:
        fmha()
    except SeqmixError as error:
        return str(error)
    return None


def limits(probe: Probe) -> list[str]:
    """Return the reasons, apart from the dtype, why this backend cannot run a call; empty if it can."""
    reasons = unsupported_scores("xformers", probe)
    if probe.device.type != "cuda":
        reasons.append(f"xformers needs a CUDA device, got {probe.device.type}")
    elif (reason := missing()) is not None:
        reasons.append(reason)
    multiple = 4 if probe.dtype == torch.float32 else 8  # its loads are of 16 bytes
    if probe.key_width % multiple or probe.value_width % multiple:
        reasons.append(
            f"in this dtype xformers needs widths that are multiples of {multiple}, got {probe.key_width} and "
            f"{probe.value_width}"
        )
    # xformers has two families of kernels: flash for 16 bits and one width, cutlass for everything else
    is_flash = probe.dtype != torch.float32 and probe.key_width == probe.value_width <= FLASH_WIDTH
    if not is_flash and probe.window and probe.needs_grad:
        reasons.append(
            "with a window, xformers' backward pass needs a 16-bit dtype, and keys and values of the same width, "
            f"at most {FLASH_WIDTH}"
        )
    if probe.device.type == "cuda" and torch.cuda.is_available():
        capability = torch.cuda.get_device_capability(probe.device)
        got = f"got {'.'.join(map(str, capability))}"
        if is_flash and capability < (8, 0):
            reasons.append(f"xformers' 16-bit kernels need compute capability 8.0 or later, {got}")
        if not is_flash and capability > (9, 0):
            reasons.append(
                "xformers' kernels for float32, and for keys and values of different widths, need compute capability "
                f"9.0 or earlier, {got}"
            )
    return reasons


class _Inputs(NamedTuple):
    """Inputs of the xformers op; keys and values are the cached ones, then the segment's."""

    q: Tensor
    keys: Tensor
    values: Tensor
    read: Tensor | None
    """Number of tokens read before the segment, per row or document; None without a cache."""
    cu_seqlens: Tensor | None
    boundaries: Sequence[int] | None
    capacity: int
    """Slots of the cache."""
    is_ring: bool
    """True if the cache is a ring."""
    window: int
    """Number of keys that a query sees; 0 means all."""
    scale: float


def softmax_parallel_xformers(x: AttentionInputs) -> AttentionOutput:
    """Compute softmax attention in the parallel paradigm by xformers.

    Raises:
        SeqmixError: `KERNEL` does not support the call.
    """
    KERNEL.require(x.probe())
    require_range(x.log_decay, x.q.shape[1], x.q.dtype)
    kv = x.key_values()
    cache = x.key_cache if kv.keys.shape[1] > x.k.shape[1] else None  # an empty cache is left out of the keys
    query, keys = apply_decay(x.q, 0, kv, x.log_decay)
    inputs = _Inputs(
        query,
        keys,
        kv.values,
        None if cache is None else cache.length,
        None if x.documents is None else x.documents.cu_seqlens,
        None if x.documents is None else x.documents.boundaries,
        0 if cache is None else cache.keys.shape[1],
        isinstance(cache, RingCache),
        x.window or 0,
        x.scale,
    )
    (output,) = OP(inputs) if torch.compiler.is_compiling() else _attend(OP.checked(inputs))
    return output, x.final()


# ---- masks


def bias(
    queries: Sequence[int], keys: Sequence[int], window: int | None, *, packed: bool, device: torch.device | None = None
) -> Any:
    """Build the mask object that xformers takes as `attn_bias`.

    Args:
        queries: number of queries of each row or document.
        keys: number of keys of each row or document, at least its number of queries; the last are the queries' own.
        window: number of keys that a query sees; None means all.
        packed: True if rows or documents lie one after another in one row.
        device: device of the mask's tensors.
    """
    masks = fmha().attn_bias
    if window is not None and window >= max(keys):
        window = None
    no_cache = list(queries) == list(keys)
    if packed:
        blocks = masks.BlockDiagonalMask.from_seqlens(list(queries), list(keys), device=device)
        if window is None:
            return blocks.make_causal() if no_cache else blocks.make_causal_from_bottomright()
        if no_cache:
            return blocks.make_local_attention(window)
        return blocks.make_local_attention_from_bottomright(window)
    if window is not None:
        return masks.LowerTriangularFromBottomRightLocalAttentionMask(window)
    return masks.LowerTriangularMask() if no_cache else masks.LowerTriangularFromBottomRightMask()


class Plan(NamedTuple):
    """Layout of a call to xformers: which keys belong to which queries."""

    queries: list[int]
    """Number of queries of each row or document."""
    keys: list[int]
    """Number of keys of each row or document."""
    packed: bool
    """True if rows or documents lie one after another in one row."""
    key_indices: Tensor | None
    """Indices of the keys used among cached keys, then the segment's, on the host; None means the segment's alone."""


def plan(
    rows: int,
    length: int,
    read: Sequence[int] | None,
    boundaries: Sequence[int] | None,
    *,
    capacity: int = 0,
    is_ring: bool = False,
    window: int | None = None,
) -> Plan:
    """Lay out a call to xformers; empty documents are left out.

    Args:
        rows: rows of the batch.
        length: tokens of the segment.
        read: number of tokens read before the segment, per row or document; None without a cache.
        boundaries: boundaries of packed documents; None if the batch is not packed.
        capacity: slots of the cache. They come before a row's own tokens, or before all tokens of a packed row.
        is_ring: True if position p is in slot p mod capacity; otherwise slots are right-aligned.
        window: number of keys that a query sees; None means all.
    """
    spans = [(0, length)] * rows if boundaries is None else list(pairwise(boundaries))
    spans = [(row, start, stop) for row, (start, stop) in enumerate(spans) if start < stop]
    queries = [stop - start for _, start, stop in spans]
    if read is None:
        return Plan(queries, queries, boundaries is not None, None)
    keys = []
    key_indices = []
    row_keys = capacity + length  # of one row of a batch
    for (row, start, stop), tokens in zip(spans, queries, strict=True):
        n_read = read[row]
        cached = min(n_read, capacity if window is None else min(capacity, window - 1))
        slots = torch.arange(n_read - cached, n_read)
        slots = slots % capacity if is_ring else slots - n_read + capacity
        if boundaries is None:
            key_indices += [row * row_keys + slots, row * row_keys + capacity + torch.arange(tokens)]
        else:
            key_indices += [row * capacity + slots, len(read) * capacity + torch.arange(start, stop)]
        keys.append(cached + tokens)
    return Plan(queries, keys, boundaries is not None or len(set(keys)) > 1, torch.cat(key_indices))


class _Call(NamedTuple):
    """Arguments of a call to xformers."""

    q: Tensor
    """Queries, [. . H K]."""
    k: Tensor
    """Keys in order, [. . G K]."""
    v: Tensor
    """Values in order, [. . G V]."""
    options: dict[str, Any]
    """Mask and scale."""
    key_indices: Tensor | None
    """Indices of the keys among all keys of the op; None means all, in order."""


def _call(x: _Inputs) -> _Call:
    """Arrange the op's inputs for a call to xformers."""
    rows, length, n_heads, width = x.q.shape
    boundaries = x.boundaries
    if boundaries is None and x.cu_seqlens is not None:
        boundaries = x.cu_seqlens.tolist()
    layout = plan(
        rows,
        length,
        None if x.read is None else x.read.tolist(),
        boundaries,
        capacity=x.capacity,
        is_ring=x.is_ring,
        window=x.window or None,
    )
    q = x.q
    keys = x.keys
    values = x.values
    key_indices = None if layout.key_indices is None else layout.key_indices.to(q.device)
    if key_indices is not None:
        keys, values = (y.flatten(0, 1).index_select(0, key_indices) for y in (keys, values))
        keys, values = (y.unflatten(0, (1 if layout.packed else rows, -1)) for y in (keys, values))
    if layout.packed:
        q = q.reshape(1, rows * length, n_heads, width)
    mask = bias(layout.queries, layout.keys, x.window or None, packed=layout.packed, device=q.device)
    options = {"attn_bias": mask, "scale": x.scale}
    return _Call(_aligned(q), _aligned(keys), _aligned(values), options, key_indices)


def _aligned(x: Tensor) -> Tensor:
    """Return x itself if the vectors of its heads are contiguous and start at multiples of 16 bytes, else a copy."""
    offsets = (x.storage_offset(), *x.stride()[:-1])
    if x.stride(-1) == 1 and all(offset * x.element_size() % 16 == 0 for offset in offsets):
        return x
    return x.clone(memory_format=torch.contiguous_format)  # contiguous() would return a misaligned view as it is


def _group_heads(call: _Call) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k, v as [B M G H/G .], where a key head serves several query heads without a copy."""
    n_kv_heads = call.k.shape[2]
    heads_per_key = call.q.shape[2] // call.k.shape[2]
    k, v = (x[:, :, :, None].expand(-1, -1, -1, heads_per_key, -1) for x in (call.k, call.v))
    return call.q.unflatten(2, (n_kv_heads, heads_per_key)), k, v


def _repeat_keys(call: _Call) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k, v as [B M H .] with copies of key heads: the backward kernels support no groups."""
    heads_per_key = call.q.shape[2] // call.k.shape[2]
    k, v = (x if heads_per_key == 1 else x.repeat_interleave(heads_per_key, dim=2) for x in (call.k, call.v))
    return call.q, k, v


# ---- the op


def _attend(x: _Inputs) -> tuple[Tensor]:
    """Compute the output; gradients come from xformers' autograd function."""
    _require(x)
    wants_grad = needs_grad(x.q, x.keys, x.values)
    if not wants_grad:
        # xformers decides by the tensors, not by grad mode, whether a backward pass will follow
        x = x._replace(q=x.q.detach(), keys=x.keys.detach(), values=x.values.detach())
    call = _call(x)
    grouped = call.q.shape[2] != call.k.shape[2] and not wants_grad
    inputs = _group_heads(call) if grouped else _repeat_keys(call)
    output = fmha().memory_efficient_attention(*inputs, **call.options)
    return (output.reshape(*x.q.shape[:3], x.values.shape[3]),)


def _require(x: _Inputs) -> None:
    """Raise a SeqmixError for a call that `KERNEL` does not support."""
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
    _require(x)
    return (x.q.new_empty(*x.q.shape[:3], x.values.shape[3]),)


def _forward(x: _Inputs) -> tuple[Tensor]:
    with torch.no_grad():
        return (_attend(x)[0].contiguous(),)


def _backward(x: _Inputs, gradients: Gradients) -> dict[str, Tensor]:
    """Return the gradients; the forward pass is recomputed."""
    (d_output,) = gradients.outputs
    assert d_output is not None
    call = _call(x._replace(q=x.q.detach(), keys=x.keys.detach(), values=x.values.detach()))
    inputs = _repeat_keys(call)
    output, log_sum = fmha().memory_efficient_attention_forward_requires_grad(*inputs, **call.options)
    d_output = _aligned(d_output.reshape(output.shape))
    dq, dk, dv = fmha().memory_efficient_attention_backward(d_output, output, log_sum, *inputs, **call.options)
    heads_per_key = call.q.shape[2] // call.k.shape[2]

    def scatter(gradient: Tensor, target: Tensor) -> Tensor:
        """Sum a gradient over the query heads of a key, and put it where the keys are in `target`."""
        flat = gradient.unflatten(2, (-1, heads_per_key)).sum(3).flatten(0, 1)
        if call.key_indices is not None:  # unused keys have a gradient of zero
            flat = flat.new_zeros(target.shape).flatten(0, 1).index_copy(0, call.key_indices, flat)
        return flat.reshape(target.shape)

    return {"q": dq.reshape(x.q.shape), "keys": scatter(dk, x.keys), "values": scatter(dv, x.values)}


OP = Op("softmax_xformers", _Inputs, fake=_allocate, forward=_forward, backward=_backward, outputs=1)

KERNEL = declare(
    Kernel(
        op="softmax",
        paradigm=Paradigm.PARALLEL,
        backend="xformers",
        function=softmax_parallel_xformers,
        # the tolerances of SDPA, but a fused softmax rounds its float32 running sums once per block
        tolerances={torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 1.3e-3},
        limits=limits,
    )
)
