"""The engine of recurrences whose state is a vector, element by element: blocks of tokens, side by side.

Notation: B batch, T tokens, E the shape of a state, N packed documents; a = log_decay, all of it per element.

    h_t = exp(a_t) h_{t-1} + w_t                                                 state  [E]
    g_t = dh_t + exp(a_{t+1}) g_{t+1}         dw_t = g_t         da_t = g_t exp(a_t) h_{t-1}

A step of one token is often shorter than the call of an operation. So n blocks of m tokens are computed side by side:
what each makes of a zero state, then the n states before them, one after another, then every token from these. Each
token is read twice, whatever T is. Decays are only ever multiplied with, never divided by, and no gradient is a
difference of sums: factors below the smallest number are 0, as what they stand for is.

The forward pass saves the blocks' entry states; the backward pass recomputes the rest. Packed documents need no blocks
of their own: at a document's first token the decay is 0, and what is kept of the document's initial state is written.
A product with 0 would let NaN and infinity through, so states at first tokens are set, not only multiplied.
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
"""Of the states of a group's tokens at most on a CPU, where it is more than one block: what fits into its cache."""

I = TypeVar("I", bound=Any)  # noqa: E741 inputs
Outputs = tuple[Tensor, Tensor, Tensor]
Step = Callable[..., Tensor]


class Rule(ABC, Generic[I]):
    """A family: the terms of its recurrence, and what is read of its states.

    Its inputs are a NamedTuple with `x` [B T *], of which the output has shape and dtype, `initial_state` [N *E] (or
    None), `cu_seqlens`, `boundaries`, `chunk_size`, `output_final_state`, `needs_grad`, and `single`: whether blocks
    are computed one by one. Tensors of a group of blocks are [m n B *], a token's of all blocks and rows side by side.
    """

    is_complex = False
    """Whether states are complex: outside of the op they are pairs of real numbers, [N *E 2]."""

    @abstractmethod
    def shape(self, x: I) -> tuple[int, ...]:
        """E."""

    @abstractmethod
    def terms(self, x: I, group: Group) -> tuple[Tensor, Tensor]:
        """a and w of a group, [m n B *E], wide and of nobody else: both are overwritten. Or a of all tokens, [*E]."""

    @abstractmethod
    def read(self, x: I, group: Group, states: Tensor) -> Tensor:
        """The output of a group, [m n B *], from the states after its tokens."""

    @abstractmethod
    def d_states(self, x: I, group: Group, d_output: Tensor) -> Tensor:
        """dh_t, what the output alone makes of it: [m n B *E], overwritten; d_output is [m n B *]."""

    @abstractmethod
    def gradients(self, x: I, group: Group, of: "GroupGradients", out: dict[str, Tensor]) -> None:
        """Fills or adds the gradients of the family's own inputs, which `out` has by name, those wanted."""


class GroupGradients(NamedTuple):
    """What the backward pass knows of a group, [m n B *E] each, and the output's gradient, [m n B *]."""

    states: Tensor
    """h_t."""
    d_written: Tensor
    """dw_t."""
    d_log_decay: Tensor
    """da_t."""
    d_output: Tensor


def scan_op(name: str, inputs: type[I], rule: Rule[I]) -> Op[I]:
    """The op of a family: output, final state [N *E], and the blocks' entry states [blocks B *E]."""
    return Op(
        name,
        inputs,
        fake=lambda x: _allocate(x, rule),
        forward=lambda x: _forward(x, rule),
        backward=lambda x, gradients: _backward(x, gradients, rule),
        saves=1,
    )


def tokens_first(x: Tensor, group: Group) -> Tensor:
    """A group's tokens of [B T *] as [m n B *]; a view."""
    batch, _, *rest = x.shape
    row, token, *inner = x.stride()
    return x.as_strided(
        (group.length, group.chunks, batch, *rest),
        (token, group.length * token, row, *inner),
        x.storage_offset() + group.start * token,
    )


def cut(x: Tensor, group: Group, dtype: torch.dtype) -> Tensor:
    """The same in a dtype; a view where it has it."""
    return tokens_first(x, group).to(dtype)


def own(x: Tensor, group: Group, dtype: torch.dtype) -> Tensor:
    """The same as a copy."""
    return tokens_first(x, group).to(dtype, copy=True, memory_format=torch.contiguous_format)


def wide(x: Tensor) -> torch.dtype:
    """The dtype of states and sums: float32, or float64 of float64 inputs."""
    return torch.promote_types(x.dtype, torch.float32)


# ---- packed documents


class Edges(NamedTuple):
    """The documents' first tokens in a group: where they are, and whose they are."""

    token: Tensor
    block: Tensor
    document: Tensor

    def of(self, x: Tensor) -> Tensor:
        """Of [m n 1 *], a copy of these tokens: [documents *]."""
        return x[self.token, self.block, 0]

    def put(self, x: Tensor, values: Tensor | float) -> None:
        """Write them."""
        x[self.token, self.block, 0] = torch.as_tensor(values, dtype=x.dtype, device=x.device)


class Layout(NamedTuple):
    """Where the documents of a packed row that hold tokens begin and end."""

    document: Tensor
    first: Tensor
    last: Tensor

    @classmethod
    def of(cls, cu_seqlens: Tensor | None, boundaries: Sequence[int] | None, length: int) -> "Layout | None":
        """None where nothing is packed; may read the boundaries from the device."""
        if cu_seqlens is None:
            return None
        found = torch.tensor(read_boundaries(cu_seqlens, length) if boundaries is None else boundaries)
        document = (found.diff() > 0).nonzero()[:, 0]
        return cls(document, found[document], found[document + 1] - 1)

    def firsts(self, group: Group) -> Edges:
        """The first tokens in a group."""
        return self._edges(self.first, group)

    def lasts(self, group: Group) -> Edges:
        """The last ones."""
        return self._edges(self.last, group)

    def _edges(self, tokens: Tensor, group: Group) -> Edges:
        inside = (tokens >= group.start) & (tokens < group.stop)
        at = tokens[inside] - group.start
        return Edges(at % group.length, at // group.length, self.document[inside])


# ---- blocks


Rows = dict[int, list[tuple[int, Tensor]]]
"""Values of some tokens of a group: by their place in a block, the block and the value, [1 ..]."""


def rows_of(edges: Edges | None, x: Tensor, before: int = 0) -> Rows:
    """The values of x [m n 1 ..] at documents' first tokens, or so many tokens before them in the same block."""
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
    entered: Tensor,
    firsts: Edges | None = None,
    step: Step = torch.addcmul,
) -> None:
    """The states after each token in place of what is written, [m n ..], and those before each block, [n ..], in
    `entered`.

    A state, [..] before the first block, is multiplied with `decay` at each token [m n ..], and with `total` in a whole
    block [n ..], needed where there are several. `step` makes the state after a token of what is written, the decay and
    the state before it; at the first token of a document, what is written is the state.
    """
    starts = rows_of(firsts, written)
    if len(entered) == 1 or total is None:
        entered[0] = state
    else:
        inside = _exits(decay, written, starts, step)
        _chain(state, total, inside, entered, range(len(entered)), firsts, step)
    run_tokens(decay, written, entered, starts, step)


def run_tokens(decay: Tensor, written: Tensor, entered: Tensor, starts: Rows, step: Step = torch.addcmul) -> None:
    """The same where the states before the blocks are known, and what first tokens write."""
    state = entered
    for t, (factor, h) in enumerate(zip(decay.unbind(), written.unbind(), strict=True)):
        state = step(h, factor, state, out=h)
        for block, first in starts.get(t, ()):
            state[block].copy_(first)


def _exits(decay: Tensor, written: Tensor, starts: Rows, step: Step) -> Tensor:
    """The states after the last tokens of blocks that start from zero: [m ..] -> [..]."""
    factors = decay.unbind()
    h = written.unbind()
    state = h[0].clone()
    for t in range(1, len(h)):
        step(h[t], factors[t], state, out=state)
        for block, first in starts.get(t, ()):
            state[block].copy_(first)
    return state


def _run_back(decay: Tensor, d_states: Tensor, ends: Rows) -> None:
    """g of dh in place: [m ..], the last token's already has what comes from later blocks."""
    factors = decay.unbind()
    g = d_states.unbind()
    for t in range(len(g) - 2, -1, -1):
        g[t].addcmul_(factors[t + 1], g[t + 1])
        for block, last in ends.get(t, ()):
            g[t][block].copy_(last)


def _exits_back(decay: Tensor, d_states: Tensor, ends: Rows, firsts: Edges | None) -> Tensor:
    """The gradient of the states before the first tokens, of what is inside alone: [m ..] -> [..]."""
    factors = decay.unbind()
    above = d_states.unbind()
    state = above[-1].clone()
    for t in range(len(above) - 2, -1, -1):
        torch.addcmul(above[t], factors[t + 1], state, out=state)
        for block, last in ends.get(t, ()):
            state[block].copy_(last)
    state.mul_(factors[0])
    if firsts is not None:
        state[firsts.block[firsts.token == 0]] = 0
    return state


def _chain(
    first: Tensor,
    total: Tensor,
    inside: Tensor,
    out: Tensor,
    order: Sequence[int],
    firsts: Edges | None,
    step: Step = torch.addcmul,
) -> None:
    """States [n ..] between blocks, in an order: `first`, then of each block but the last what it makes of its own."""
    state = first
    cut = set() if firsts is None else set(firsts.block.tolist())  # a document starts in these
    for at, i in enumerate(order):
        if at:
            passed = order[at - 1]
            state = inside[passed] if passed in cut else step(inside[passed], total[passed], state)
        out[i] = state


def cuts(x: Any, output: Tensor, elements: int) -> list[Group]:
    """The tokens of a call in groups of blocks, where a state has so many elements."""
    most = group_elements(output.device, ELEMENTS) // max(output.shape[0] * elements * x.chunk_size, 1)
    most = 1 if x.single else max(most, 1)
    return groups(Stretch(slice(None), 0, output.shape[1]), x.chunk_size, most)


class _Terms(NamedTuple):
    """A group's recurrence, ready to run; of complex decays, all but the first two are conjugated in backward."""

    decay: Tensor
    written: Tensor
    total: Tensor | None
    """The decay of whole blocks, [n B *E], where there are several."""
    kept: Tensor | None
    """The decays of the documents' first tokens, in whose place zeros stand."""


def _terms(x: Any, rule: Rule[Any], group: Group, firsts: Edges | None, initial: Tensor | None) -> _Terms:
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
    kept = None
    if firsts is not None:
        kept = firsts.of(decay)
        firsts.put(decay, 0)
        total[firsts.block, 0] = 0
        if initial is not None:
            firsts.put(written, firsts.of(written) + kept * initial[firsts.document])
    return _Terms(decay, written, total if group.chunks > 1 else None, kept)


def _conjugated(terms: _Terms) -> _Terms:
    """What the backward pass multiplies with."""
    if not terms.decay.is_complex():
        return terms
    # of fixed decays one is as good as all
    one = terms.decay[0, 0, 0].conj_physical().expand_as(terms.decay)
    decay = one if terms.decay.stride(0) == 0 else terms.decay.conj_physical()
    total, kept = (None if y is None else y.conj_physical() for y in (terms.total, terms.kept))
    return _Terms(decay, terms.written, total, kept)


def _as_states(x: Tensor, rule: Rule[Any]) -> Tensor:
    """What passes for states outside of the op, as states: [.. *E]; a view."""
    return torch.view_as_complex(x) if rule.is_complex and x.numel() else x


def _initial(x: Any, rule: Rule[Any], dtype: torch.dtype) -> Tensor | None:
    """The states before all tokens, [N *E]."""
    return None if x.initial_state is None else _as_states(x.initial_state.to(dtype).contiguous(), rule)


def _allocate(x: Any, rule: Rule[Any]) -> Outputs:
    output = x.x.new_empty(x.x.shape)
    shape = rule.shape(x)
    batch, length = output.shape[:2]
    rows = batch if x.cu_seqlens is None else x.cu_seqlens.shape[0] - 1
    blocks = -(-length // x.chunk_size) if x.needs_grad else 0
    dtype = wide(output)
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
    else:  # of packed documents, it is the first token that continues one
        kind = torch.complex64 if rule.is_complex else results[1].dtype
        state = torch.zeros(
            (output.shape[0], *rule.shape(x)), device=output.device, dtype=torch.promote_types(kind, results[1].dtype)
        )
    if layout is not None and x.output_final_state:
        final.zero_() if initial is None else final.copy_(initial)  # of documents without tokens
    for group in cuts(x, output, state[0].numel()):
        firsts = None if layout is None else layout.firsts(group)
        terms = _terms(x, rule, group, firsts, initial)
        entered = (
            entries[index : index + group.chunks]
            if x.needs_grad
            else terms.written.new_empty((group.chunks, *state.shape))
        )
        index += group.chunks
        run_blocks(terms.decay, terms.written, terms.total, state, entered, firsts)
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
    d_final = None if d_final is None or not d_final.numel() else _as_states(d_final.to(saved.dtype).contiguous(), rule)
    layout = Layout.of(x.cu_seqlens, x.boundaries, output.shape[1])
    given = {name: getattr(x, name) for name in gradients.wanted}
    out = {name: y.new_zeros(y.shape, dtype=saved.dtype) for name, y in given.items()}
    d_initial = _as_states(out["initial_state"], rule) if "initial_state" in out else None
    initial = _initial(x, rule, saved.dtype)
    if layout is not None and d_initial is not None and d_final is not None:
        d_initial.copy_(d_final)  # of documents without tokens
    # the gradient of the state after the group
    above = entries.new_zeros(entries.shape[1:]) if d_final is None or layout is not None else d_final
    groups_of = cuts(x, output, above[0].numel())
    index = len(entries)
    for group in reversed(groups_of):
        index -= group.chunks
        entered = entries[index : index + group.chunks]
        firsts = None if layout is None else layout.firsts(group)
        terms = _terms(x, rule, group, firsts, initial)
        run_tokens(terms.decay, terms.written, entered, rows_of(firsts, terms.written))
        terms = _conjugated(terms)
        d_above = tokens_first(d_output, group)
        d_states = rule.d_states(x, group, d_above)
        if layout is not None and d_final is not None:
            lasts = layout.lasts(group)
            lasts.put(d_states, lasts.of(d_states) + d_final[lasts.document])
        ends = rows_of(firsts, d_states, before=1)
        if terms.total is None:
            d_states[-1, 0] += above
        else:
            inside = _exits_back(terms.decay, d_states, ends, firsts)
            after = torch.empty_like(entered)
            _chain(above, terms.total, inside, after, range(group.chunks - 1, -1, -1), firsts)
            d_states[-1] += after
        _run_back(terms.decay, d_states, ends)
        starts = layout is not None and group.start in layout.first
        above = torch.zeros_like(above) if starts else terms.decay[0, 0] * d_states[0, 0]
        before = torch.cat((entered[None], terms.written[:-1]))
        if firsts is not None and terms.kept is not None:
            firsts.put(terms.decay, terms.kept)
            before[firsts.token, firsts.block, 0] = 0 if initial is None else initial[firsts.document]
            if d_initial is not None:
                d_initial[firsts.document] = terms.kept * firsts.of(d_states)
        d_log_decay = before.conj_physical_().mul_(terms.decay).mul_(d_states)
        rule.gradients(x, group, GroupGradients(terms.written, d_states, d_log_decay, d_above), out)
    if d_initial is not None and layout is None:
        d_initial.copy_(above)
    return out
