"""Recurrences with a matrix state per head: the inputs of a kernel, and the code that all families share.

Notation: B batch, T tokens, H heads, G groups of heads that share queries and keys (G = H except in the decay family),
K key width, V value width, N rows of the state (one per packed document, else one per row of the batch).

    S_t = A_t S_{t-1} + W_t(k_t, v_t)       state  [H K V]
    o_t = scale * q_t S_t                   the query reads the updated state

A family defines the transition A_t and the write W_t. The engines in token_loop.py and chunk_loop.py run it, and
runtime/custom_op.py registers them as ops.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from ...registry import SeqmixError
from ..runtime.call import Call
from ..runtime.custom_op import is_recorded, needs_grad
from ..runtime.kernel import FLOATS, Probe, chosen, reference
from ..runtime.packing import Stretch, stretches
from ..runtime.paradigm import Paradigm
from ..runtime.recording import record


class Recurrence(NamedTuple):
    """Inputs of one call of a recurrence; kernels of all families take this value."""

    q: Tensor
    """Queries [B T G K]; [B T H V] if `reads_values` is set."""
    k: Tensor
    """Keys [B T G K]."""
    v: Tensor
    """Values [B T H V]."""
    log_decay: Tensor | None
    """Natural logarithm of the decay, <= 0: None, [H], [B T H] or [B T H K]."""
    beta: Tensor | None
    """Write strength of the delta family [B T H]: factor of the prediction error that is written."""
    initial_state: Tensor | None
    """State before the first token [N H K V]; None means zero."""
    cu_seqlens: Tensor | None
    """Boundaries of packed documents [N+1], with B = 1; None if the batch is not packed."""
    boundaries: Sequence[int] | None
    """Values of cu_seqlens; None where they are not known."""
    scale: float
    """Factor of the output."""
    chunk_size: int
    """Chunk length in tokens of the chunkwise paradigm."""
    output_final_state: bool
    """True if the final state is requested."""
    needs_grad: bool = False
    """True if a backward pass may follow; set by the op."""
    a: Tensor | None = None
    """Keys of the delta family that read the decayed state, [B T H K]; None means k."""
    b: Tensor | None = None
    """Keys of the delta family that write back the values read with a, [B T H K]; None means -k, or -beta k."""
    tf32x3: bool = False
    """True if a kernel computes each float32 product as three TF32 products."""
    decay: Tensor | None = None
    """`fixed_decay` of decays fixed per head, if a decoder has computed it once for all its steps."""
    donated: bool = False
    """True if the final state may overwrite the initial state."""
    wide_output: bool = False
    """True if output and its gradient have the dtype of states, because they may exceed the range of the inputs'."""
    reads_values: bool = False
    """True if queries read the state along its values: o_t = scale S_t q_t, [B T H K]."""

    @property
    def wide_dtype(self) -> torch.dtype:
        """Dtype of states and sums: float32, or float64 for float64 inputs."""
        return torch.promote_types(self.q.dtype, torch.float32)

    @property
    def wide(self) -> torch.dtype:
        """Deprecated name of `wide_dtype`; it will be removed in 0.4."""
        warnings.warn("Recurrence.wide is now Recurrence.wide_dtype", DeprecationWarning, stacklevel=2)
        return self.wide_dtype

    @property
    def output_dtype(self) -> torch.dtype:
        """Dtype of the output and of its gradient."""
        return self.wide_dtype if self.wide_output else self.q.dtype

    @property
    def rows(self) -> int:
        """Number of rows of the state, N."""
        return self.q.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """Shape (H, K, V) of the state of one row."""
        return (self.v.shape[2], self.k.shape[3], self.v.shape[3])

    @property
    def matrix(self) -> tuple[int, int, int]:
        """Deprecated name of `state_shape`; it will be removed in 0.4."""
        warnings.warn("Recurrence.matrix is now Recurrence.state_shape", DeprecationWarning, stacklevel=2)
        return self.state_shape

    @property
    def heads_per_key(self) -> int:
        """Number of heads that share a query and a key, H / G."""
        return self.v.shape[2] // self.q.shape[2]

    def by_head(self) -> "Recurrence":
        """Return the inputs with queries and keys repeated for every head (as views if there is one group)."""
        if self.heads_per_key == 1:
            return self
        q, k = (x[:, :, :, None].expand(-1, -1, -1, self.heads_per_key, -1).flatten(2, 3) for x in (self.q, self.k))
        return self._replace(q=q, k=k)

    @property
    def stretches(self) -> list[Stretch]:
        """Ranges of tokens that are processed as one sequence each; use it inside an op only: it may wait for a GPU."""
        return stretches(self.q.shape[0], self.q.shape[1], self.cu_seqlens, self.boundaries)

    def widened(self) -> "Recurrence":
        """Return the inputs with all floating-point tensors in the dtype of states."""
        return self._replace(
            **{
                name: x.to(self.wide_dtype)
                for name, x in self._asdict().items()
                if isinstance(x, Tensor) and x.is_floating_point()
            }
        )

    def new_output(self) -> Tensor:
        """Allocate the output, [B T H V], or [B T H K] if `reads_values` is set."""
        width = (self.k if self.reads_values else self.v).shape[3]
        return self.v.new_empty((*self.v.shape[:3], width), dtype=self.output_dtype)

    def new_state(self, *leading: int) -> Tensor:
        """Allocate uninitialised states, [*leading H K V]."""
        return self.q.new_empty((*leading, *self.state_shape), dtype=self.wide_dtype)

    def probe(self) -> Probe:
        """Return the properties of this call that a kernel must support."""
        names = {1: "H", 3: "B T H", 4: "B T H K"}
        return Probe(
            device=self.q.device,
            dtype=self.q.dtype,
            key_width=self.k.shape[3],
            value_width=self.v.shape[3],
            log_decay=None if self.log_decay is None else names[self.log_decay.ndim],
            needs_grad=needs_grad(*(x for x in self if isinstance(x, Tensor))),
            wide_output=self.wide_output,
        )


class RecurrenceOutput(NamedTuple):
    """Result of a recurrence."""

    output: Float[Tensor, "B T H V"]
    """Output in the dtype of the queries, or of states if `wide_output` is set."""
    final_state: Float[Tensor, "N H K V"] | None
    """State after the last token, float32 (float64 for float64 inputs); None unless requested."""


Run: TypeAlias = Callable[[Recurrence], RecurrenceOutput]
"""Type of the function of a kernel."""


class Family(NamedTuple):
    """Description of a family of recurrences, as mixers use it."""

    name: str
    """Name of the op, under which its kernels are declared."""
    paradigms: frozenset[Paradigm]
    flops: Callable[..., int]
    """Counts the operations of one head's matrix products in a forward pass, from (paradigm, length, key_width,
    value_width)."""
    segment: "Callable[[Recurrence, Run, Call], tuple[Tensor, Tensor]] | None" = None
    """Computes the map S -> M S + U of one process's segment from (its inputs, the kernel, the call of the whole row).
    Returns (M, U). None if the recurrence is not linear in S."""
    apply: Callable[[Tensor, Tensor], Tensor] | None = None
    """Computes M S from (M, S); None if the recurrence is not linear in S."""


def recur(
    family: Family,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    call: Call,
    *,
    scale: float | None,
    wide_output: bool = False,
    reads_values: bool = False,
    **optional: Tensor | None,
) -> RecurrenceOutput:
    """Run the kernel that a call selects, on the tokens of one process or of a context-parallel group.

    In a group the kernel runs twice: first to find the map from the state before the segment to the state after it,
    then from the actual state, which the preceding segments leave.

    Args:
        family: the family of recurrences.
        q: queries.
        k: keys.
        v: values.
        call: context of the call.
        scale: factor of the output; None means 1/sqrt(K).
        wide_output: True if the output of 16-bit inputs must be float32.
        reads_values: True if queries read the state along its values; the reference runs in place of a kernel without.
        optional: the optional tensors of the family: log_decay, beta, a, b, as in `Recurrence`.

    Raises:
        SeqmixError: if shapes or dtypes do not fit, or the kernel does not support them.
    """
    declared = chosen(family.name, call.paradigm, call.backend, q)
    if reads_values and not declared.reads_values:
        declared = reference(family.name, call.paradigm)
    kernel = declared.function
    cp = call.cp_group
    documents = call.documents
    local = documents if cp is None else cp.local(documents, q.shape[1])
    x = Recurrence(
        q,
        k,
        v,
        optional.get("log_decay"),
        optional.get("beta"),
        call.state,
        None if local is None else local.cu_seqlens,
        None if local is None else local.boundaries,
        k.shape[-1] ** -0.5 if scale is None else scale,
        call.chunk_size,
        call.return_state,
        a=optional.get("a"),
        b=optional.get("b"),
        decay=_memoized_decay(call, q, optional.get("log_decay")),
        donated=call.donated,
        wide_output=wide_output,
        reads_values=reads_values,
    )
    require_recurrence(x)
    if cp is None:
        result = kernel(x)
        record(family.name, v, x.log_decay, result[0])
        return result
    assert family.segment is not None
    assert family.apply is not None
    transition, written = family.segment(x, kernel, call)
    state = cp.entry(transition, written, call.state, documents, q.shape[1], family.apply)
    output, final_state = kernel(x._replace(initial_state=state))
    return RecurrenceOutput(output, None if final_state is None else cp.final(final_state, documents, q.shape[1]))


def _memoized_decay(call: Call, q: Tensor, log_decay: Tensor | None) -> Tensor | None:
    """Return the decay of states from the memo that layers and decoding steps share.

    Returns None without a memo, for several tokens, and for decays that are not fixed per head.
    """
    if call.memo is None or q.shape[1] > 1 or log_decay is None or log_decay.ndim > 1:
        return None
    return call.once(fixed_decay, log_decay, torch.promote_types(q.dtype, torch.float32))


def fixed_decay(log_decay: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the `split_decay` of a log_decay [H] as factors of states, [2 1 H 1 1]."""
    return split_decay(log_decay.to(dtype))[:, None, :, None, None]


SLOW = math.log(2) / 2
"""Log-decays with a magnitude below this are split as 1 + expm1; the native kernels have the same bound."""


def split_decay(log_decay: Tensor) -> Tensor:
    """Return exp(log_decay) as a sum of two factors (kept, change), stacked.

    A slow decay is 1 + expm1(log_decay), any other is 0 + exp(log_decay). A state is updated as
    kept S + (change S + k v^T). The rounding of exp itself, which would be the same at every token, then does not add
    up over thousands of tokens.
    """
    is_slow = log_decay.abs() < SLOW
    change = torch.where(is_slow, log_decay.expm1(), log_decay.exp())
    return torch.stack([is_slow.to(log_decay.dtype), change])


def require_recurrence(x: Recurrence) -> None:
    """Check the inputs of a recurrence: shapes, dtypes and the chunk length.

    Raises:
        SeqmixError: if they do not fit together.
    """
    require_floats(x.q, x.k, x.v)
    if x.reads_values:
        _require_value_reads(x)
        x = x._replace(q=x.k)
    fits = x.q.ndim == x.v.ndim == 4 and x.q.shape == x.k.shape and x.v.shape[:2] == x.q.shape[:2]
    if not fits or x.q.shape[1] < 1 or not 1 <= x.q.shape[2] <= x.v.shape[2] or x.v.shape[2] % x.q.shape[2]:
        shapes = ", ".join(str(list(tensor.shape)) for tensor in (x.q, x.k, x.v))
        expected = "q and k of shape [B T G K] and v of shape [B T H V] with T >= 1 and H a multiple of G"
        raise SeqmixError(f"expected {expected}, got {shapes}")
    if x.heads_per_key > 1 and (x.beta is not None or x.a is not None):
        raise SeqmixError(
            f"the delta rule expects q and k to have as many heads as v, {x.v.shape[2]}, got {x.q.shape[2]}"
        )
    batch, length, heads, key_width = per_head = (*x.v.shape[:3], x.k.shape[3])
    if x.beta is not None and (tuple(x.beta.shape) != (batch, length, heads) or not x.beta.is_floating_point()):
        raise SeqmixError(
            f"expected floating-point beta [B T H] with B, T, H = {batch}, {length}, {heads}, "
            f"got {list(x.beta.shape)} of {str(x.beta.dtype).removeprefix('torch.')}"
        )
    for name, tensor in (("a", x.a), ("b", x.b)):
        if tensor is not None and (tensor.shape != x.k.shape or not tensor.is_floating_point()):
            raise SeqmixError(
                f"expected floating-point {name} [B T H K] with the shape of k, {list(x.k.shape)}, "
                f"got {list(tensor.shape)} of {str(tensor.dtype).removeprefix('torch.')}"
            )
    # by number of dimensions: comparing unequal ones would tie the batch size to the heads in an exported graph
    allowed = {1: (heads,), 3: per_head[:3], 4: per_head}
    if x.log_decay is not None and x.log_decay.shape != allowed.get(x.log_decay.ndim):
        raise SeqmixError(
            f"expected log_decay None, [H], [B T H] or [B T H K] with B, T, H, K = {batch}, {length}, {heads}, "
            f"{key_width}, got {list(x.log_decay.shape)}"
        )
    if x.cu_seqlens is not None:
        require_packing(x.q, x.cu_seqlens)
    if x.initial_state is not None and tuple(x.initial_state.shape) != (state := (x.rows, *x.state_shape)):
        raise SeqmixError(f"expected an initial state of shape {list(state)}, got {list(x.initial_state.shape)}")
    require_chunk_size(x.chunk_size)


def require_decay(log_decay: Tensor | None) -> None:
    """Raise a SeqmixError for a positive log-decay in a direct call of an op.

    Values are read only on a CPU and where nothing records the call: elsewhere reading would wait for the device, or
    break a compiled graph. Calls of mixers, whose log-decays are never positive, do not pay for it.
    """
    if log_decay is None or log_decay.device.type != "cpu" or is_recorded(log_decay):
        return
    if bool((log_decay > 0).any()):
        raise SeqmixError(
            "log_decay is the natural log of a decay from 0 to 1: expected values <= 0, got up to "
            f"{float(log_decay.max()):.3g}; pass decay.log() if these are decays"
        )


def _require_value_reads(x: Recurrence) -> None:
    """Raise a SeqmixError if queries that read values differ from these in shape, or in their number of heads."""
    if x.q.shape != x.v.shape or x.k.shape[:-1] != x.v.shape[:-1]:
        shapes = ", ".join(str(list(tensor.shape)) for tensor in (x.q, x.k, x.v))
        raise SeqmixError(f"expected q and v of shape [B T H V] and k of shape [B T H K], got {shapes}")


def require_packing(x: Tensor, cu_seqlens: Tensor | None) -> None:
    """Raise a SeqmixError if documents are packed in a batch with several rows."""
    if cu_seqlens is not None and x.shape[0] != 1:
        raise SeqmixError(f"cu_seqlens requires one packed row (B = 1), got batch size {x.shape[0]}")


def require_chunk_size(chunk_size: int) -> None:
    """Raise a SeqmixError if the chunk length is not positive."""
    if chunk_size < 1:
        raise SeqmixError(f"chunk_size must be at least 1, got {chunk_size}")


def require_floats(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Check the dtypes of q, k and v: products of integers would be rounded silently.

    Raises:
        SeqmixError: if they do not share one dtype out of float64, float32, bfloat16 and float16.
    """
    if not (q.dtype == k.dtype == v.dtype and q.dtype in FLOATS):
        supported = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATS)
        dtypes = ", ".join(str(x.dtype).removeprefix("torch.") for x in (q, k, v))
        raise SeqmixError(f"expected q, k and v to share one dtype of {supported}, got {dtypes}")
