"""The decay family's chunkwise op, with its own backward.

Per chunk of m tokens with entry state S and exit state S' (notation of api.py; i, j count from 0 inside the chunk):

    p_i = exp(a_0 + .. + a_i)    s_j = exp(a_{j+1} + .. + a_{m-1})    g = p_{m-1}
    D_ij = exp(a_{j+1} + .. + a_i), i >= j
    A = scale (q k^T) * D        o = A v + scale (q * p) S            S' = g * S + (k * s)^T v

and backward, from dS' and do:

    dP = scale (do v^T) * D      dq = dP k + scale (do S^T) * p       dk = dP^T q + (v dS'^T) * s
    dv = A^T do + (k * s) dS'    dS = g * dS' + scale (q * p)^T do
    da_l = sum_{j < l <= i} (A * (do v^T))_ij + sum_{i >= l} q_i (scale (do S^T) * p)_i
         + sum_{j < l} k_j ((v dS'^T) * s)_j + <g * S, dS'>_V        per key dimension; summed over K for a scalar

Every term of da is added to the decays that it went through, and none is taken away again: sums of q dq - k dk are as
much, but where decays are strong they are all rounding errors.

A, D and da are formed in recurrence/intra_chunk.py: for decays per head, and for decays per key dimension (GLA).

The forward saves the chunks' entry states only; the backward recomputes the rest. Only states wait for each other: what
is inside chunks is formed for a group of n of them together (recurrence/groups.py). A ragged last chunk is simply
shorter: nothing is padded.
"""

from torch import Tensor

from ..recurrence.chunk_loop import Chunks, ChunkStates, GroupTokens, chunkwise_kernel
from ..recurrence.family import Recurrence
from ..recurrence.groups import Group, most_chunks
from ..recurrence.intra_chunk import Outer, among, decays_of, scaled
from ..recurrence.products import add_product, product, product_dtype


class _DecayChunks(Chunks):
    def __init__(self, x: Recurrence, needs_log_decay: bool) -> None:
        self.most = most_chunks(x.v, x.chunk_size, sum(x.matrix[1:]))
        self.needs_log_decay = needs_log_decay
        self.decays = decays_of(x, x.scale)
        self.dtype = product_dtype(x) if x.log_decay is None or x.log_decay.ndim < 4 else x.wide

    def forward(self, group: Group, x: GroupTokens, states: ChunkStates, exits: list[Tensor]) -> Tensor:
        chunks = self.decays.chunks(group)
        entries = states.entries
        tile = product(chunks.scores(x.q, x.k), x.v)
        left = len(exits) * entries[0].shape[:2].numel()
        if left:
            changes = product(scaled(x.k, chunks.suffix)[:left].mT, x.v[:left]).view(-1, *entries.shape[1:])
            state = entries[0]
            for number, (change, place) in enumerate(zip(changes, exits, strict=True)):
                chunks.next_state(number, state, change, place)
                state = place
        if states.reading.start < tile.shape[0]:
            query = scaled(x.q, chunks.prefix)[states.reading]
            add_product(tile[states.reading], query, entries.flatten(0, 2)[states.reading])
        return tile

    def backward(
        self, group: Group, x: GroupTokens, d_out: Tensor, states: ChunkStates, d_states: Tensor, leaving: slice
    ) -> dict[str, Tensor]:
        chunks = self.decays.chunks(group)
        entries = states.entries
        reading = states.reading
        total = x.q.shape[0]
        before = reading.start
        after = x.q.shape[0] - leaving.stop
        d_exits = d_states[1:]
        d_read = None
        d_left = None
        decayed = None
        if before < total:
            changes = product(scaled(x.q, chunks.prefix)[reading].mT, d_out[reading]).view(-1, *entries.shape[1:])
            numbers = range(entries.shape[0])[-changes.shape[0] :]
            for number, change in zip(reversed(numbers), reversed(changes.unbind()), strict=True):
                chunks.next_state(number, d_exits[number], change, d_states[number])
            d_read = product(d_out[reading], entries.flatten(0, 2)[reading].mT)
            d_read = scaled(among(d_read, before, 0), chunks.prefix)
        scores = chunks.scores(x.q, x.k)
        d_scores = product(d_out, x.v.mT)
        d_value = product(scores.mT, d_out)
        if after < total:
            exits = d_exits.flatten(0, 2)[leaving]
            d_left = scaled(among(product(x.v[leaving], exits.mT), 0, after), chunks.suffix)
            add_product(d_value[leaving], scaled(x.k, chunks.suffix)[leaving], exits)
        if self.needs_log_decay and d_read is not None and d_left is not None:
            decayed = (chunks.decayed(entries) * d_exits).sum(4).flatten(0, 2)
        outer = Outer(d_read, d_left, decayed) if self.needs_log_decay else None
        d_query, d_key, d_a = chunks.scores_backward(x.q, x.k, scores, d_scores, outer)
        if d_read is not None:
            d_query += d_read
        if d_left is not None:
            d_key += d_left
        found = {"q": d_query, "k": d_key, "v": d_value}
        return found if d_a is None else found | {"log_decay": d_a}


decay_chunkwise = chunkwise_kernel("decay_chunkwise", _DecayChunks)
