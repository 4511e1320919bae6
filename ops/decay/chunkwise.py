"""The chunkwise kernel of the decay family, with its own backward pass.

Per chunk of m tokens with entry state S and exit state S' (notation of api.py; i, j count from 0 inside the chunk):

    p_i = exp(a_0 + .. + a_i)    s_j = exp(a_{j+1} + .. + a_{m-1})    g = p_{m-1}
    D_ij = exp(a_{j+1} + .. + a_i), i >= j
    A = scale (q k^T) * D        o = A v + scale (q * p) S            S' = g * S + (k * s)^T v

and in the backward pass, from dS' and do:

    dP = scale (do v^T) * D      dq = dP k + scale (do S^T) * p       dk = dP^T q + (v dS'^T) * s
    dv = A^T do + (k * s) dS'    dS = g * dS' + scale (q * p)^T do
    da_l = sum_{j < l <= i} (A * (do v^T))_ij + sum_{i >= l} q_i (scale (do S^T) * p)_i
         + sum_{j < l} k_j ((v dS'^T) * s)_j + <g * S, dS'>_V        per key dimension; summed over K for a scalar

Every term of da is added to the decays that it passes through, and none is subtracted again. Sums of q dq - k dk are
mathematically equal, but where decays are strong only rounding errors remain of them.

Queries that read values (Recurrence.reads_values) are what do is above, and their output is what dq is: with the
upstream gradient g in the place of q,

    o = (scale q v^T * D) k + scale (q S^T) * p
    dq = A v + scale (g * p) S,  A = scale (g k^T) * D           dk, dv, dS, da as above, with g for q and q for do

A, D and da are computed in recurrence/intra_chunk.py, for decays per head and for decays per key dimension (GLA);
recurrence/chunk_loop.py runs the chunks.
"""

from torch import Tensor

from ..recurrence.chunk_loop import Chunks, ChunkStates, GroupTokens, chunkwise_kernel
from ..recurrence.family import Recurrence
from ..recurrence.groups import Group, max_chunks
from ..recurrence.intra_chunk import ChunkDecays, StateGradients, make_decays, pad_rows, scale_tokens
from ..recurrence.products import add_product, product, product_dtype


class _DecayChunks(Chunks):
    def __init__(self, x: Recurrence, needs_log_decay: bool) -> None:
        self.max_chunks = max_chunks(x.v, x.chunk_size, sum(x.state_shape[1:]))
        self.needs_log_decay = needs_log_decay
        self.decays = make_decays(x, x.scale)
        self.dtype = product_dtype(x) if x.log_decay is None or x.log_decay.ndim < 4 else x.wide_dtype

    def forward(self, group: Group, x: GroupTokens, states: ChunkStates, exits: list[Tensor]) -> Tensor:
        chunks = self.decays.chunks(group)
        self._write_exits(chunks, x, states.entries, exits)
        return self._output(chunks, x, states)

    def _write_exits(self, chunks: ChunkDecays, x: GroupTokens, entries: Tensor, exits: list[Tensor]) -> None:
        rows = len(exits) * entries[0].shape[:2].numel()
        if rows:
            changes = product(scale_tokens(x.k, chunks.suffix)[:rows].mT, x.v[:rows]).view(-1, *entries.shape[1:])
            state = entries[0]
            for number, (change, exit_state) in enumerate(zip(changes, exits, strict=True)):
                chunks.next_state(number, state, change, exit_state)
                state = exit_state

    def _output(self, chunks: ChunkDecays, x: GroupTokens, states: ChunkStates) -> Tensor:
        output = product(chunks.scores(x.q, x.k), x.v)
        nonzero = states.nonzero
        if nonzero.start < output.shape[0]:
            query = scale_tokens(x.q, chunks.prefix)[nonzero]
            add_product(output[nonzero], query, states.entries.flatten(0, 2)[nonzero])
        return output

    def _read_entries(self, chunks: ChunkDecays, rows: Tensor, states: ChunkStates) -> Tensor | None:
        """Return scale (rows S^T) * p of rows along the values, [G m K]; None if all entry states are zero."""
        nonzero = states.nonzero
        if nonzero.start == rows.shape[0]:
            return None
        read = product(rows[nonzero], states.entries.flatten(0, 2)[nonzero].mT)
        return scale_tokens(pad_rows(read, nonzero.start, 0), chunks.prefix)

    def backward(
        self, group: Group, x: GroupTokens, d_out: Tensor, states: ChunkStates, d_states: Tensor, used: slice
    ) -> dict[str, Tensor]:
        return self._gradients(self.decays.chunks(group), x, d_out, states, d_states, used)

    def _gradients(
        self, chunks: ChunkDecays, x: GroupTokens, d_out: Tensor, states: ChunkStates, d_states: Tensor, used: slice
    ) -> dict[str, Tensor]:
        entries = states.entries
        nonzero = states.nonzero
        rows = x.q.shape[0]
        unused_rows = rows - used.stop
        d_exits = d_states[1:]
        # gradients through the states
        d_query_state = self._read_entries(chunks, d_out, states)
        d_key_state = None
        d_total = None
        if d_query_state is not None:
            changes = product(scale_tokens(x.q, chunks.prefix)[nonzero].mT, d_out[nonzero]).view(-1, *entries.shape[1:])
            numbers = range(entries.shape[0])[-changes.shape[0] :]
            for number, change in zip(reversed(numbers), reversed(changes.unbind()), strict=True):
                chunks.next_state(number, d_exits[number], change, d_states[number])
        scores = chunks.scores(x.q, x.k)
        d_scores = product(d_out, x.v.mT)
        d_value = product(scores.mT, d_out)
        if unused_rows < rows:
            d_used_exits = d_exits.flatten(0, 2)[used]
            d_key_state = pad_rows(product(x.v[used], d_used_exits.mT), 0, unused_rows)
            d_key_state = scale_tokens(d_key_state, chunks.suffix)
            add_product(d_value[used], scale_tokens(x.k, chunks.suffix)[used], d_used_exits)
        if self.needs_log_decay and d_query_state is not None and d_key_state is not None:
            d_total = (chunks.apply_total(entries) * d_exits).sum(4).flatten(0, 2)
        through_states = StateGradients(d_query_state, d_key_state, d_total) if self.needs_log_decay else None
        d_query, d_key, d_a = chunks.scores_backward(x.q, x.k, scores, d_scores, through_states)
        if d_query_state is not None:
            d_query += d_query_state
        if d_key_state is not None:
            d_key += d_key_state
        gradients = {"q": d_query, "k": d_key, "v": d_value}
        return gradients if d_a is None else gradients | {"log_decay": d_a}


class _ValueReads(_DecayChunks):
    """Chunks whose queries [G m V] read the state along its values."""

    def _output(self, chunks: ChunkDecays, x: GroupTokens, states: ChunkStates) -> Tensor:
        output = chunks.sum_keys(product(x.q, x.v.mT), x.k)
        before = self._read_entries(chunks, x.q, states)
        return output if before is None else output.add_(before)

    def backward(
        self, group: Group, x: GroupTokens, d_out: Tensor, states: ChunkStates, d_states: Tensor, used: slice
    ) -> dict[str, Tensor]:
        chunks = self.decays.chunks(group)
        swapped = x._replace(q=d_out)
        gradients = self._gradients(chunks, swapped, x.q, states, d_states, used)
        return gradients | {"q": super()._output(chunks, swapped, states)}


def _make_chunks(x: Recurrence, needs_log_decay: bool) -> _DecayChunks:
    return (_ValueReads if x.reads_values else _DecayChunks)(x, needs_log_decay)


decay_chunkwise = chunkwise_kernel("decay_chunkwise", _make_chunks)
