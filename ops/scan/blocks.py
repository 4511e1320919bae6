"""Engine of elementwise recurrences: blocks of tokens are computed side by side.

Notation: B batch, T tokens, E shape of a state, N packed documents; w = written input, a = log_decay, per element.

    h_t = exp(a_t) h_{t-1} + w_t                                                 state  [E]
    g_t = dh_t + exp(a_{t+1}) g_{t+1}         dw_t = g_t         da_t = g_t exp(a_t) h_{t-1}

One token's arithmetic often takes less time than launching an operation. So n blocks of m tokens are computed side by
side, in three passes: the final state of every block from a zero state; the n entry states, one after another; every
token's state from its block's entry state. Each token is read twice, whatever T is. Decays are multiplied and never
divided by, and no gradient is a difference of sums, so factors that underflow to 0 are harmless.

The forward pass saves the blocks' entry states; the backward pass recomputes the rest. Packed documents may begin
anywhere in a block: at a document's first token the decay is set to 0, and the decayed initial state of the document is
added to w. A product with 0 would let NaN and infinity through, so states at first tokens are set, not only multiplied.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..recurrence.groups import Group, group_elements, groups
from ..runtime.custom_op import Gradients, Op
from ..runtime.packing import Stretch, read_boundaries

ELEMENTS = 2**18
"""Maximum number of elements of the states of several blocks computed together on a CPU, so that they fit its cache."""

I = TypeVar("I", bound=Any)  # noqa: E741 inputs
Outputs = tuple[Tensor, Tensor, Tensor]
Step = Callable[..., Tensor]


class Rule(ABC, Generic[I]):
    """One recurrence: it computes decays and written inputs from the op's inputs, and the output from the states.

    The inputs `I` are a NamedTuple with `x` [B T *] (the output has its shape and dtype), `initial_state` [N *E] or
    None, `cu_seqlens`, `boundaries`, `chunk_size`, `output_final_state`, `needs_grad`, and
    `one_block_at_a_time`. Tensors of a group of n blocks of m tokens are [m n B *].
    """

    is_complex = False
    """True if states are complex; outside of the op they are pairs of real numbers, [N *E 2]."""

    @abstractmethod
    def shape(self, x: I) -> tuple[int, ...]:
        """Return E, the shape of a state."""

    @abstractmethod
    def terms(self, x: I, group: Group) -> tuple[Tensor, Tensor]:
        """Return a and w of a group, [m n B *E], in the dtype of states; or a as [*E] if all tokens share it.

        Both must be new tensors: the engine overwrites them.
        """

    @abstractmethod
    def read(self, x: I, group: Group, states: Tensor) -> Tensor:
        """Return the output of a group, [m n B *], from the states after its tokens."""

    @abstractmethod
    def d_states(self, x: I, group: Group, d_output: Tensor) -> Tensor:
        """Return dh_t, the gradient of h_t through its own token's output, as a new tensor [m n B *E].

        `d_output` is [m n B *].
        """

    @abstractmethod
    def gradients(self, x: I, group: Group, grads: "GroupGradients", out: dict[str, Tensor]) -> None:
        """Write (or add) the gradients of the rule's own inputs to `out`, which has a tensor per requested name."""


class GroupGradients(NamedTuple):
    """States and gradients of a group in the backward pass, [m n B *E] each unless stated otherwise."""

    states: Tensor
    """State after each token, h_t."""
    d_written: Tensor
    """Gradient of the written input, dw_t."""
    d_log_decay: Tensor
    """Gradient of the log-decay, da_t."""
    d_output: Tensor
    """Gradient of the output, [m n B *]."""


def scan_op(name: str, inputs: type[I], rule: Rule[I]) -> Op[I]:
    """Return the op of a recurrence.

    Its outputs are the output, the final state [N *E], and the blocks' entry states [blocks B *E], saved for backward.
    """
    return Op(
        name,
        inputs,
        fake=lambda x: _allocate(x, rule),
        forward=lambda x: _forward(x, rule),
        backward=lambda x, gradients: _backward(x, gradients, rule),
        saves=1,
    )


def tokens_first(x: Tensor, group: Group) -> Tensor:
    """Return a group's tokens of x [B T *] as [m n B *]; a view."""
    batch, _, *rest = x.shape
    row, token, *inner = x.stride()
    return x.as_strided(
        (group.length, group.chunks, batch, *rest),
        (token, group.length * token, row, *inner),
        x.storage_offset() + group.start * token,
    )


def group_tokens(x: Tensor, group: Group, dtype: torch.dtype) -> Tensor:
    """Return a group's tokens of x [B T *] as [m n B *] in a dtype; a view if x has that dtype."""
    return tokens_first(x, group).to(dtype)


def copy_group_tokens(x: Tensor, group: Group, dtype: torch.dtype) -> Tensor:
    """Return a group's tokens of x [B T *] as [m n B *] in a dtype; always a contiguous copy."""
    return tokens_first(x, group).to(dtype, copy=True, memory_format=torch.contiguous_format)


def state_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of states and sums: float32, or float64 if x is float64."""
    return torch.promote_types(x.dtype, torch.float32)


# ---- packed documents


class Edges(NamedTuple):
    """First (or last) tokens of the documents that lie in a group, one per document."""

    token: Tensor
    """Index of each token in its block."""
    block: Tensor
    """Index of each token's block in the group."""
    document: Tensor
    """Index of the document that each token belongs to."""

    def of(self, x: Tensor) -> Tensor:
        """Return a copy of the values of x [m n 1 *] at these tokens: [documents *]."""
        return x[self.token, self.block, 0]

    def put(self, x: Tensor, values: Tensor | float) -> None:
        """Write values into x [m n 1 *] at these tokens."""
        x[self.token, self.block, 0] = torch.as_tensor(values, dtype=x.dtype, device=x.device)


class Layout(NamedTuple):
    """First and last tokens of the non-empty documents in a packed row."""

    document: Tensor
    """Indices of the non-empty documents."""
    first: Tensor
    """Index of each document's first token in the row."""
    last: Tensor
    """Index of each document's last token in the row."""

    @classmethod
    def of(cls, cu_seqlens: Tensor | None, boundaries: Sequence[int] | None, length: int) -> "Layout | None":
        """Return the layout of a packed row; None if the batch is not packed.

        Without `boundaries` it reads cu_seqlens, which waits for the device.
        """
        if cu_seqlens is None:
            return None
        edges = torch.tensor(read_boundaries(cu_seqlens, length) if boundaries is None else boundaries)
        document = (edges.diff() > 0).nonzero()[:, 0]
        return cls(document, edges[document], edges[document + 1] - 1)

    def firsts(self, group: Group) -> Edges:
        """Return the documents' first tokens that lie in a group."""
        return self._edges(self.first, group)

    def lasts(self, group: Group) -> Edges:
        """Return the documents' last tokens that lie in a group."""
        return self._edges(self.last, group)

    def _edges(self, tokens: Tensor, group: Group) -> Edges:
        inside = (tokens >= group.start) & (tokens < group.stop)
        offset = tokens[inside] - group.start
        return Edges(offset % group.length, offset // group.length, self.document[inside])


# ---- blocks


Rows = dict[int, list[tuple[int, Tensor]]]
"""Values of some tokens of a group: a list of (block, value [1 ..]) for each place in a block."""


def rows_of(edges: Edges | None, x: Tensor, before: int = 0) -> Rows:
    """Return the values of x [m n 1 ..] at `edges`, or `before` tokens earlier where that lies in the same block."""
    rows: Rows = {}
    if edges is not None:
        inside = edges.token >= before
        token = edges.token[inside] - before
        block = edges.block[inside]
        for t, n, value in zip(token.tolist(), block.tolist(), x[token, block].unbind(), strict=True):
            rows.setdefault(t, []).append((n, value))
    return rows


def run_blocks(
    decay: Tensor,
    written: Tensor,
    total: Tensor | None,
    state: Tensor,
    entries: Tensor,
    firsts: Edges | None = None,
    step: Step = torch.addcmul,
) -> None:
    """Compute the states of a group: those after each token replace `written`, the blocks' entry states fill `entries`.

    Args:
        decay: factor of the state at each token, [m n ..].
        written: w at each token, [m n ..], overwritten.
        total: factor of the state over a whole block, [n ..]; required if there are several blocks.
        state: state before the first block, [..].
        entries: receives the entry states, [n ..].
        firsts: first tokens of documents, where the state is set to w.
        step: step(w, decay, state) is the state after a token.
    """
    starts = rows_of(firsts, written)
    if len(entries) == 1 or total is None:
        entries[0] = state
    else:
        exits = _exits(decay, written, starts, step)
        _chain(state, total, exits, entries, range(len(entries)), firsts, step)
    run_tokens(decay, written, entries, starts, step)


def run_tokens(decay: Tensor, written: Tensor, entries: Tensor, starts: Rows, step: Step = torch.addcmul) -> None:
    """Compute the states after each token, in place of `written`, from the entry states of the blocks.

    `starts` has the states at the first tokens of documents.
    """
    state = entries
    for t, (factor, h) in enumerate(zip(decay.unbind(), written.unbind(), strict=True)):
        state = step(h, factor, state, out=h)
        for block, first in starts.get(t, ()):
            state[block].copy_(first)


def _exits(decay: Tensor, written: Tensor, starts: Rows, step: Step) -> Tensor:
    """Return the states after the blocks' last tokens if every block starts from zero: [m ..] -> [..]."""
    factors = decay.unbind()
    h = written.unbind()
    state = h[0].clone()
    for t in range(1, len(h)):
        step(h[t], factors[t], state, out=state)
        for block, first in starts.get(t, ()):
            state[block].copy_(first)
    return state


def _run_back(decay: Tensor, d_states: Tensor, ends: Rows) -> None:
    """Replace dh, the gradient of a state through its own token's output, by g, its whole gradient, in place: [m ..].

    dh of a block's last token already includes the gradient from later blocks.
    """
    factors = decay.unbind()
    g = d_states.unbind()
    for t in range(len(g) - 2, -1, -1):
        g[t].addcmul_(factors[t + 1], g[t + 1])
        for block, last in ends.get(t, ()):
            g[t][block].copy_(last)


def _exits_back(decay: Tensor, d_states: Tensor, ends: Rows, firsts: Edges | None) -> Tensor:
    """Return the gradients of the blocks' entry states through the tokens of their own block alone: [m ..] -> [..]."""
    factors = decay.unbind()
    d_h = d_states.unbind()
    g = d_h[-1].clone()
    for t in range(len(d_h) - 2, -1, -1):
        torch.addcmul(d_h[t], factors[t + 1], g, out=g)
        for block, last in ends.get(t, ()):
            g[block].copy_(last)
    g.mul_(factors[0])
    if firsts is not None:
        g[firsts.block[firsts.token == 0]] = 0
    return g


def _chain(
    first: Tensor,
    total: Tensor,
    exits: Tensor,
    out: Tensor,
    order: Sequence[int],
    firsts: Edges | None,
    step: Step = torch.addcmul,
) -> None:
    """Pass a state through the blocks in `order`, and store the state before each block in `out` [n ..].

    The state before the first block is `first`. The state after a block is its exit from zero, in `exits`, plus `total`
    times its entry state; in a block where a document starts, it is the exit alone.
    """
    state = first
    blocks_with_start = set() if firsts is None else set(firsts.block.tolist())
    for i, block in enumerate(order):
        if i:
            previous = order[i - 1]
            alone = previous in blocks_with_start
            state = exits[previous] if alone else step(exits[previous], total[previous], state)
        out[block] = state


def token_groups(x: Any, output: Tensor, elements: int) -> list[Group]:
    """Split the tokens of a call into groups of blocks; `elements` is the size of one state."""
    most = group_elements(output.device, ELEMENTS) // max(output.shape[0] * elements * x.chunk_size, 1)
    most = 1 if x.one_block_at_a_time else max(most, 1)
    return groups(Stretch(slice(None), 0, output.shape[1]), x.chunk_size, most)


class _Terms(NamedTuple):
    """Terms of a group's recurrence, as the engine runs it."""

    decay: Tensor
    """exp(a), [m n B *E], 0 at the documents' first tokens."""
    written: Tensor
    """w, [m n B *E], overwritten with the states."""
    total: Tensor | None
    """Decay over each whole block, [n B *E]; None if the group is one block."""
    first_decay: Tensor | None
    """Decays at the documents' first tokens, where `decay` has zeros; None if the batch is not packed."""


def _terms(x: Any, rule: Rule[Any], group: Group, firsts: Edges | None, initial: Tensor | None) -> _Terms:
    """Evaluate a rule's terms for a group, and fold the documents' initial states into `written`."""
    log_decay, written = rule.terms(x, group)
    if log_decay.ndim < written.ndim:
        decay = log_decay.exp().to(written.dtype).expand_as(written)
        total = (group.length * log_decay).exp().to(written.dtype).expand(written.shape[1:])
        if firsts is not None:
            decay = decay.clone()
            total = total.clone()
    else:
        total = log_decay.sum(0).exp_()
        decay = log_decay.exp_()
    first_decay = None
    if firsts is not None:
        first_decay = firsts.of(decay)
        firsts.put(decay, 0)
        total[firsts.block, 0] = 0
        if initial is not None:
            firsts.put(written, firsts.of(written) + first_decay * initial[firsts.document])
    return _Terms(decay, written, total if group.chunks > 1 else None, first_decay)


def _conjugate(terms: _Terms) -> _Terms:
    """Return the terms with complex factors conjugated, as the backward pass needs them."""
    if not terms.decay.is_complex():
        return terms
    # a fixed decay is one matrix, expanded over tokens
    fixed = terms.decay[0, 0, 0].conj_physical().expand_as(terms.decay)
    decay = fixed if terms.decay.stride(0) == 0 else terms.decay.conj_physical()
    total, first_decay = (None if y is None else y.conj_physical() for y in (terms.total, terms.first_decay))
    return _Terms(decay, terms.written, total, first_decay)


def _as_states(x: Tensor, rule: Rule[Any]) -> Tensor:
    """Return states [.. *E] from the op's inputs or outputs: pairs of real numbers become complex; a view."""
    return torch.view_as_complex(x) if rule.is_complex and x.numel() else x


def _copy_states(x: Tensor, dtype: torch.dtype, rule: Rule[Any]) -> Tensor:
    """Return states in a dtype, [N *E]; a copy, as a view of complex numbers must begin at an even offset."""
    return _as_states(x.to(dtype, copy=True, memory_format=torch.contiguous_format), rule)


def _initial(x: Any, rule: Rule[Any], dtype: torch.dtype) -> Tensor | None:
    """Return the initial states, [N *E]; None if there are none."""
    return None if x.initial_state is None else _copy_states(x.initial_state, dtype, rule)


def _allocate(x: Any, rule: Rule[Any]) -> Outputs:
    """Allocate the output, the final state and the entry states."""
    output = x.x.new_empty(x.x.shape)
    shape = rule.shape(x)
    batch, length = output.shape[:2]
    rows = batch if x.cu_seqlens is None else x.cu_seqlens.shape[0] - 1
    blocks = -(-length // x.chunk_size) if x.needs_grad else 0
    dtype = state_dtype(output)
    shape = (*shape, 2) if rule.is_complex else shape
    final = output.new_empty((rows, *shape) if x.output_final_state else (0,), dtype=dtype)
    return output, final, output.new_empty((blocks, batch, *shape), dtype=dtype)


def _forward(x: Any, rule: Rule[Any]) -> Outputs:
    results = _allocate(x, rule)
    output, (final, entries) = results[0], (_as_states(y, rule) for y in results[1:])
    layout = Layout.of(x.cu_seqlens, x.boundaries, output.shape[1])
    index = 0
    initial = _initial(x, rule, results[1].dtype)
    if layout is None and initial is not None:
        state = initial
    else:  # initial states of packed documents enter at their first tokens
        kind = torch.complex64 if rule.is_complex else results[1].dtype
        state = torch.zeros(
            (output.shape[0], *rule.shape(x)), device=output.device, dtype=torch.promote_types(kind, results[1].dtype)
        )
    if layout is not None and x.output_final_state:
        final.zero_() if initial is None else final.copy_(initial)  # empty documents keep their initial state
    for group in token_groups(x, output, state[0].numel()):
        firsts = None if layout is None else layout.firsts(group)
        terms = _terms(x, rule, group, firsts, initial)
        group_entries = (
            entries[index : index + group.chunks]
            if x.needs_grad
            else terms.written.new_empty((group.chunks, *state.shape))
        )
        index += group.chunks
        run_blocks(terms.decay, terms.written, terms.total, state, group_entries, firsts)
        tokens_first(output, group).copy_(rule.read(x, group, terms.written))
        state = terms.written[-1, -1]
        if layout is not None and x.output_final_state:
            lasts = layout.lasts(group)
            final[lasts.document] = lasts.of(terms.written)
    if layout is None and x.output_final_state:
        final.copy_(state)
    return results


def _backward(x: Any, gradients: Gradients, rule: Rule[Any]) -> dict[str, Tensor]:
    (d_output, d_final), (saved,) = gradients.outputs, gradients.saved
    output = x.x.new_empty(x.x.shape)
    entries = _as_states(saved, rule)
    d_output = torch.zeros_like(output) if d_output is None else d_output
    d_final = None if d_final is None or not d_final.numel() else _copy_states(d_final, saved.dtype, rule)
    layout = Layout.of(x.cu_seqlens, x.boundaries, output.shape[1])
    inputs = {name: getattr(x, name) for name in gradients.wanted}
    out = {name: y.new_zeros(y.shape, dtype=saved.dtype) for name, y in inputs.items()}
    d_initial = _as_states(out["initial_state"], rule) if "initial_state" in out else None
    initial = _initial(x, rule, saved.dtype)
    if layout is not None and d_initial is not None and d_final is not None:
        d_initial.copy_(d_final)  # empty documents: the final state is the initial one
    # gradient of the state after the current group
    d_after = entries.new_zeros(entries.shape[1:]) if d_final is None or layout is not None else d_final
    index = len(entries)
    for group in reversed(token_groups(x, output, d_after[0].numel())):
        index -= group.chunks
        group_entries = entries[index : index + group.chunks]
        firsts = None if layout is None else layout.firsts(group)
        terms = _terms(x, rule, group, firsts, initial)
        run_tokens(terms.decay, terms.written, group_entries, rows_of(firsts, terms.written))
        terms = _conjugate(terms)
        d_group_output = tokens_first(d_output, group)
        d_states = rule.d_states(x, group, d_group_output)
        if layout is not None and d_final is not None:
            lasts = layout.lasts(group)
            lasts.put(d_states, lasts.of(d_states) + d_final[lasts.document])
        ends = rows_of(firsts, d_states, before=1)
        if terms.total is None:
            d_states[-1, 0] += d_after
        else:
            d_entries = _exits_back(terms.decay, d_states, ends, firsts)
            d_exits = torch.empty_like(group_entries)
            _chain(d_after, terms.total, d_entries, d_exits, range(group.chunks - 1, -1, -1), firsts)
            d_states[-1] += d_exits
        _run_back(terms.decay, d_states, ends)
        starts_document = layout is not None and group.start in layout.first
        d_after = torch.zeros_like(d_after) if starts_document else terms.decay[0, 0] * d_states[0, 0]
        before = torch.cat((group_entries[None], terms.written[:-1]))
        if firsts is not None and terms.first_decay is not None:
            firsts.put(terms.decay, terms.first_decay)
            before[firsts.token, firsts.block, 0] = 0 if initial is None else initial[firsts.document]
            if d_initial is not None:
                d_initial[firsts.document] = terms.first_decay * firsts.of(d_states)
        d_log_decay = before.conj_physical_().mul_(terms.decay).mul_(d_states)
        rule.gradients(x, group, GroupGradients(terms.written, d_states, d_log_decay, d_group_output), out)
    if d_initial is not None and layout is None:
        d_initial.copy_(d_after)
    return out
