"""A recurrence with a matrix state per head: one call of it, and what all families of them share.

Notation: B batch, T tokens, H heads, G groups of heads that share queries and keys (H but in the decay family), K key
width, V value width, N rows of the state (packed documents, or the batch).

    S_t = A_t S_{t-1} + (what k_t and v_t write)        state  [H K V]
    o_t = scale * q_t S_t                               the query reads the updated state

A family says what A_t is and what is written; the engines of token_loop.py and chunk_loop.py do the rest, and
runtime/custom_op.py makes ops of them.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from ...registry import SeqmixError
from ..runtime.call import Call
from ..runtime.custom_op import needs_grad
from ..runtime.kernel import FLOATS, Probe, chosen
from ..runtime.packing import Stretch, stretches
from ..runtime.paradigm import Paradigm
from ..runtime.recording import record


class Recurrence(NamedTuple):
    """One call of a recurrence: what a kernel of any family takes."""

    q: Tensor
    """[B T G K]."""
    k: Tensor
    """[B T G K]."""
    v: Tensor
    """[B T H V]."""
    log_decay: Tensor | None
    """Natural logarithm of the decay, <= 0: None, [H], [B T H] or [B T H K]."""
    beta: Tensor | None
    """[B T H]: how much of the prediction's error is written, in the delta family."""
    initial_state: Tensor | None
    """[N H K V]; None means zero."""
    cu_seqlens: Tensor | None
    """[N+1]: boundaries of packed documents (B = 1)."""
    boundaries: Sequence[int] | None
    """The same as numbers, where they are known."""
    scale: float
    chunk_size: int
    output_final_state: bool
    needs_grad: bool = False
    a: Tensor | None = None
    """[B T H K]: what reads the decayed state in the delta family; None is k."""
    b: Tensor | None = None
    """[B T H K]: where what a reads is added, in the delta family; None is -k, or -beta k."""
    tf32x3: bool = False
    """Whether a kernel forms each product of float32 as three of TF32."""
    decay: Tensor | None = None
    """[1 H 1 1]: exp(log_decay) of decays fixed per head, where a decoder has formed it once for all its steps."""
    donated: bool = False
    """True if the final state may be written over the initial one."""
    wide_output: bool = False
    """Whether the output, and its gradient, has the dtype of states: it may leave the range of the inputs' dtype."""

    @property
    def wide(self) -> torch.dtype:
        """The dtype of states and sums: float32, or float64 of float64 inputs."""
        return torch.promote_types(self.q.dtype, torch.float32)

    @property
    def output_dtype(self) -> torch.dtype:
        """The dtype of the output and of its gradient."""
        return self.wide if self.wide_output else self.q.dtype

    @property
    def rows(self) -> int:
        """N."""
        return self.q.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    @property
    def matrix(self) -> tuple[int, int, int]:
        """The shape [H K V] of one row's state."""
        return (self.v.shape[2], self.q.shape[3], self.v.shape[3])

    @property
    def shared(self) -> int:
        """H / G."""
        return self.v.shape[2] // self.q.shape[2]

    def by_head(self) -> "Recurrence":
        """The same with queries and keys of every head, as views where there is one group."""
        if self.shared == 1:
            return self
        q, k = (x[:, :, :, None].expand(-1, -1, -1, self.shared, -1).flatten(2, 3) for x in (self.q, self.k))
        return self._replace(q=q, k=k)

    @property
    def stretches(self) -> list[Stretch]:
        """The runs of tokens that depend on each other; inside an op only."""
        return stretches(self.q.shape[0], self.q.shape[1], self.cu_seqlens, self.boundaries)

    def widened(self) -> "Recurrence":
        """The same with all inputs in the dtype of states."""
        return self._replace(
            **{
                name: x.to(self.wide)
                for name, x in self._asdict().items()
                if isinstance(x, Tensor) and x.is_floating_point()
            }
        )

    def new_output(self) -> Tensor:
        """Empty room for the output, [B T H V]."""
        return self.v.new_empty(self.v.shape, dtype=self.output_dtype)

    def new_state(self, *leading: int) -> Tensor:
        """Empty room for states, [.. H K V]."""
        return self.q.new_empty((*leading, *self.matrix), dtype=self.wide)

    def probe(self) -> Probe:
        """What this call asks of a kernel."""
        names = {1: "H", 3: "B T H", 4: "B T H K"}
        return Probe(
            device=self.q.device,
            dtype=self.q.dtype,
            key_width=self.q.shape[3],
            value_width=self.v.shape[3],
            log_decay=None if self.log_decay is None else names[self.log_decay.ndim],
            needs_grad=needs_grad(*(x for x in self if isinstance(x, Tensor))),
            wide_output=self.wide_output,
        )


class RecurrenceOutput(NamedTuple):
    """What a recurrence returns."""

    output: Float[Tensor, "B T H V"]
    """In the dtype of the queries, or in that of states where it is to be wide."""
    final_state: Float[Tensor, "N H K V"] | None
    """float32 (float64 of float64 inputs); None unless wanted."""


Run: TypeAlias = Callable[[Recurrence], RecurrenceOutput]
"""A kernel's function."""


class Family(NamedTuple):
    """What a mixer knows of a family of recurrences."""

    name: str
    """That its kernels are declared under."""
    paradigms: frozenset[Paradigm]
    flops: Callable[..., int]
    """Operations of one head's matrix products, forward, of (paradigm, length, key_width, value_width)."""
    segment: "Callable[[Recurrence, Run, Call], tuple[Tensor, Tensor]]"
    """Of a call, its kernel and the call of the whole row: M and U of S -> M S + U, what a segment makes of a state."""
    apply: Callable[[Tensor, Tensor], Tensor]
    """M S."""


def recur(
    family: Family,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    call: Call,
    *,
    scale: float | None,
    wide_output: bool = False,
    **given: Tensor | None,
) -> RecurrenceOutput:
    """The map by the kernel that a call names, over one process's tokens or over those of a context-parallel group.

    In a group the map is computed twice: once for what the segment does with any state, and then from the state that
    the segments before it leave.

    Tensors are as in `Recurrence`; `given` has the optional ones of the family. No scale is 1/sqrt(K).

    Raises:
        SeqmixError: shapes or dtypes do not fit, or the kernel does not take them.
    """
    kernel = chosen(family.name, call.paradigm, call.backend).function
    cp = call.cp_group
    documents = call.documents
    local = documents if cp is None else cp.local(documents, q.shape[1])
    x = Recurrence(
        q,
        k,
        v,
        given.get("log_decay"),
        given.get("beta"),
        call.state,
        None if local is None else local.cu_seqlens,
        None if local is None else local.boundaries,
        k.shape[-1] ** -0.5 if scale is None else scale,
        call.chunk_size,
        call.return_state,
        a=given.get("a"),
        b=given.get("b"),
        decay=_fixed_decay_of(call, q, given.get("log_decay")),
        donated=call.donated,
        wide_output=wide_output,
    )
    require_recurrence(x)
    if cp is None:
        result = kernel(x)
        record(family.name, v, x.log_decay, result[0])
        return result
    transition, written = family.segment(x, kernel, call)
    state = cp.entry(transition, written, call.state, documents, q.shape[1], family.apply)
    output, final_state = kernel(x._replace(initial_state=state))
    return RecurrenceOutput(output, None if final_state is None else cp.final(final_state, documents, q.shape[1]))


def _fixed_decay_of(call: Call, q: Tensor, log_decay: Tensor | None) -> Tensor | None:
    """exp(log_decay) for one token after another, where layers and steps share a memo."""
    if call.memo is None or q.shape[1] > 1 or log_decay is None or log_decay.ndim > 1:
        return None
    return call.once(fixed_decay, log_decay, torch.promote_types(q.dtype, torch.float32))


def fixed_decay(log_decay: Tensor, dtype: torch.dtype) -> Tensor:
    """exp(log_decay) of [H], as a factor of states: [1 H 1 1]."""
    return log_decay.to(dtype).exp()[None, :, None, None]


def require_recurrence(x: Recurrence) -> None:
    """Refuse what no kernel takes: shapes and dtypes that do not fit, chunks without tokens.

    Raises:
        SeqmixError: what does not fit.
    """
    require_floats(x.q, x.k, x.v)
    fits = x.q.ndim == x.v.ndim == 4 and x.q.shape == x.k.shape and x.v.shape[:2] == x.q.shape[:2]
    if not fits or x.q.shape[1] < 1 or not 1 <= x.q.shape[2] <= x.v.shape[2] or x.v.shape[2] % x.q.shape[2]:
        shapes = ", ".join(str(list(tensor.shape)) for tensor in (x.q, x.k, x.v))
        wanted = "q and k must be [B T G K] and v [B T H V] with T >= 1 and H a multiple of G"
        raise SeqmixError(f"{wanted}; given are {shapes}")
    if x.shared > 1 and (x.beta is not None or x.a is not None):
        raise SeqmixError(f"the delta rule has q and k of each of v's {x.v.shape[2]} heads; given are {x.q.shape[2]}")
    batch, length, heads, key_width = per_head = (*x.v.shape[:3], x.k.shape[3])
    if x.beta is not None and (tuple(x.beta.shape) != (batch, length, heads) or not x.beta.is_floating_point()):
        raise SeqmixError(
            f"beta must be floats [B T H] with B, T, H = {batch}, {length}, {heads}; "
            f"given is {list(x.beta.shape)} of {str(x.beta.dtype).removeprefix('torch.')}"
        )
    for name, tensor in (("a", x.a), ("b", x.b)):
        if tensor is not None and (tensor.shape != x.k.shape or not tensor.is_floating_point()):
            raise SeqmixError(
                f"{name} must be floats [B T H K] like k, {list(x.k.shape)}; given is {list(tensor.shape)} of "
                f"{str(tensor.dtype).removeprefix('torch.')}"
            )
    if x.log_decay is not None and x.log_decay.shape not in ((heads,), per_head[:3], per_head):
        raise SeqmixError(
            f"log_decay must be None, [H], [B T H] or [B T H K] with B, T, H, K = {batch}, {length}, {heads}, "
            f"{key_width}; given is {list(x.log_decay.shape)}"
        )
    if x.cu_seqlens is not None:
        require_packing(x.q, x.cu_seqlens)
    if x.initial_state is not None and tuple(x.initial_state.shape) != (state := (x.rows, *x.matrix)):
        raise SeqmixError(f"the initial state must be {list(state)}, and is {list(x.initial_state.shape)}")
    require_chunk_size(x.chunk_size)


def require_packing(x: Tensor, cu_seqlens: Tensor | None) -> None:
    """Refuse packed documents in a batch of several rows."""
    if cu_seqlens is not None and x.shape[0] != 1:
        raise SeqmixError(f"packed documents are one row (B = 1), and the batch is {x.shape[0]}")


def require_chunk_size(chunk_size: int) -> None:
    """Refuse chunks without tokens."""
    if chunk_size < 1:
        raise SeqmixError(f"chunk_size must be at least 1, and is {chunk_size}")


def require_floats(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Refuse dtypes that no reference computes in: a product of integers would be rounded silently.

    Raises:
        SeqmixError: the three are not of one dtype, or it is none of float64, float32, bfloat16 and float16.
    """
    if not (q.dtype == k.dtype == v.dtype and q.dtype in FLOATS):
        taken, given = ([str(d).removeprefix("torch.") for d in ds] for ds in (FLOATS, (q.dtype, k.dtype, v.dtype)))
        raise SeqmixError(f"q, k and v must have one dtype of {', '.join(taken)}; given are {', '.join(given)}")
