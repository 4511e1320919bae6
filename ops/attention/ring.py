"""Ring attention: one process's queries attend to the keys of all processes before it (notation of api.py).

Keys and values arrive in blocks, one per process (arXiv 2310.01889), and the softmax is accumulated online (arXiv
1805.02867). M is the maximum of a query's scores so far, beginning with the process's own keys:

    M' = max(M, max_m s_nm)        r = e^(M - M')        l <- r l + sum_m e^(s_nm - M')
    o_n = a / l                    L_n = M + log l       a <- r a + sum_m e^(s_nm - M') v_m

The backward pass receives the blocks again, so that a process stores only its own keys and values between the passes:

    w_nm = e^(s_nm - L_n)          dv_m = sum_n w_nm do_n          ds_nm = w_nm (do_n . v_m - do_n . o_n + dL_n)

It sends a block's gradients back to the block's process. Keys of later processes are in the future and are never
received. With a window of w, a process sends its last w - 1 keys, and only to the processes that see them.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..recurrence.token_loop import no_autocast
from ..runtime.context_parallel import ContextParallel
from ..runtime.custom_op import Gradients, Op, needs_grad
from .inputs import AttentionInputs, apply_decay, visible_keys
from .kv_cache import KeyValues
from .scores import group_heads, mask_scores, matmul, query_key_products, ungroup_heads


class RingInputs(NamedTuple):
    """Inputs of ring attention on one process: tensors of its tokens, options, and its place in the group."""

    q: Tensor
    k: Tensor
    v: Tensor
    sums: Tensor | None
    """Sums of log forget gates from the row's first token on, [B T H], float64."""
    documents: Tensor | None
    """Document index of each token of the whole row; None if the batch is not packed."""
    log_decay: Tensor | None
    slopes: Tensor | None
    scale: float
    softcap: float | None
    window: int | None
    value_dims: int | None
    chunk_size: int
    group: str
    """Name of the context-parallel process group."""
    rank: int
    """Rank of this process in the group."""
    size: int
    """Number of processes in the group."""


def can_attend_in_ring(x: AttentionInputs) -> bool:
    """Return True if ring attention can compute a call.

    It cannot if the call has a cache or returns one, because a cache holds keys of the whole row, or if log_decay or
    slopes need gradients.
    """
    return x.cache is None and not x.output_final_state and not needs_grad(x.log_decay, x.slopes)


def attend_in_ring(x: AttentionInputs, cp: ContextParallel) -> Float[Tensor, "B T H V"]:
    """Compute the attention of this rank's queries to the keys of its own and all earlier ranks.

    Queries, keys, values and gates in `x` are those of this rank's tokens; documents are those of the whole row.
    """
    sums = None
    if x.log_forget is not None:
        sums = x.log_forget.double().cumsum(dim=1)
        sums = sums + cp.gather(sums[:, -1:])[: cp.rank].sum(dim=0)
    documents = None if x.documents is None else x.documents.of_token
    call = RingInputs(
        x.q,
        x.k,
        x.v,
        sums,
        documents,
        x.log_decay,
        x.slopes,
        x.scale,
        x.softcap,
        x.window,
        x.value_dims,
        # meta tensors are only used to count operations: one block, whatever the length
        x.q.shape[1] if x.q.device.type == "meta" else x.chunk_size,
        cp.name,
        cp.rank,
        cp.size,
    )
    with no_autocast(x.q.device):
        # simulated ranks share one process and one autograd graph, so they bypass the op
        output, log_sum = RING(call) if type(cp) is ContextParallel else _attend(call, cp)
        if x.sinks is None:
            return output
        share = logsigmoid(log_sum - x.sinks[:, None].to(log_sum.dtype)).exp()
        return (output * share.transpose(1, 2)[..., None]).to(output.dtype)


class _Tile(NamedTuple):
    """A chunk of queries and the keys of one block that some of them see."""

    queries: slice
    """Indices of the chunk's queries among those of this rank."""
    keys: slice
    """Indices of the tile's keys among those of the block."""
    first: int
    """Index of the first query in the whole row."""
    kv: KeyValues
    """Keys and values of the tile."""


class _Blocks:
    """The blocks of keys, values and gate sums that a rank reads: its own, and those of earlier ranks."""

    def __init__(self, x: RingInputs, cp: ContextParallel) -> None:
        self.x = x
        self.cp = cp
        self.length = x.q.shape[1]
        self.own_block = [tensor for tensor in (x.k, x.v, x.sums) if tensor is not None]
        keys_before = self.length * cp.size if x.window is None else x.window - 1
        self.shared_tokens = min(keys_before, self.length)
        self.reach = min(-(-keys_before // self.length), cp.size - 1)

    def outgoing(self) -> list[Tensor]:
        """Return the part of this rank's block that later ranks see: its last `shared_tokens` tokens."""
        return [tensor[:, self.length - self.shared_tokens :].contiguous() for tensor in self.own_block]

    def __iter__(self) -> Iterator[tuple[int, Sequence[Tensor]]]:
        """Yield (distance, block): this rank's block, then that of each rank `distance` ranks before it.

        A block is empty if there is no such rank. The next block is received while one is in use.
        """
        outgoing = self.outgoing()
        incoming = None
        for distance in range(self.reach + 1):
            block, works = (self.own_block, []) if incoming is None else incoming
            for work in works:
                work.wait()
            incoming = self.cp.exchange(outgoing, outgoing, distance + 1) if distance < self.reach else None
            yield distance, block

    def return_gradients(self, gradients: Sequence[Tensor], distance: int, totals: Sequence[Tensor]) -> None:
        """Send a block's gradients to the rank that owns the block, `distance` ranks before this one.

        The gradients that this rank receives for its own block are added to `totals`.
        """
        received, works = self.cp.exchange(gradients, self.outgoing(), -distance)
        for work in works:
            work.wait()
        for total, part in zip(totals, received, strict=False):
            total[:, self.length - self.shared_tokens :] += part

    def tiles(self, distance: int, block: Sequence[Tensor]) -> Iterator[tuple[int, _Tile]]:
        """Yield (chunk number, tile) for the tiles of a block."""
        if not block:
            return
        x = self.x
        start = self.cp.start(self.length)
        k, v, *sums_of_keys = block
        origin = start + self.length - k.shape[1] - distance * self.length
        for number, offset in enumerate(range(0, self.length, x.chunk_size)):
            stop = min(offset + x.chunk_size, self.length)
            first = start + offset
            end = start + stop
            begin = 0 if x.window is None else max(0, first - x.window + 1 - origin)
            queries = slice(offset, stop)
            keys = slice(begin, min(k.shape[1], end - origin))
            if keys.start >= keys.stop:
                continue
            values = v[:, keys] if x.value_dims is None else k[:, keys, :, : x.value_dims]
            places = torch.arange(origin + keys.start, origin + keys.stop, device=k.device)
            documents = None
            if x.documents is not None:
                documents = x.documents[origin + keys.start : origin + keys.stop], x.documents[first:end]
            sums = (sums_of_keys[0][:, keys], x.sums[:, queries]) if x.sums is not None else None
            yield number, _Tile(queries, keys, first, KeyValues(k[:, keys], values, places[None], documents, 0, sums))


def _tile_scores(x: RingInputs, tile: _Tile) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return a tile's queries and keys with their decay factors, their products, and the scores [B H C M].

    With a softcap the products are bounded by tanh, as in `query_key_products`.
    """
    kv = tile.kv
    call = AttentionInputs(x.q[:, tile.queries], x.k, x.v, x.scale, None, None, False, x.chunk_size)
    call = call._replace(softcap=x.softcap, slopes=x.slopes)
    q, keys = apply_decay(call.q, tile.first, kv, x.log_decay)
    places = torch.arange(tile.first, tile.first + q.shape[1], device=q.device)
    products = query_key_products(call, q, keys)
    return q, keys, products, mask_scores(call, products, visible_keys(places, kv, x.window), call.bias(places, kv))


_Accumulators: TypeAlias = dict[int, tuple[Tensor, Tensor, Tensor]]
"""For each chunk number, per query: the maximum score, the sum of weights, and the weighted sum of values."""


def _attend(x: RingInputs, cp: ContextParallel) -> tuple[Tensor, Tensor]:
    """Compute the output, and the logsumexp of each query's scores."""
    blocks = _Blocks(x, cp)
    accumulators = _Accumulators()
    for distance, block in blocks:
        _accumulate(x, blocks.tiles(distance, block), accumulators)
        del block  # free it before the next one arrives
    output, log_sum = _allocate(x)
    for number, (maximum, total, weighted) in accumulators.items():
        chunk = slice(number * x.chunk_size, (number + 1) * x.chunk_size)
        output[:, chunk] = (weighted / total[..., None]).transpose(1, 2)
        log_sum[:, :, chunk] = maximum + total.log()
    return output, log_sum


def _accumulate(x: RingInputs, tiles: Iterable[tuple[int, _Tile]], accumulators: _Accumulators) -> None:
    """Add the tiles of a block to the accumulators of their chunks."""
    for number, tile in tiles:
        *_, scores = _tile_scores(x, tile)
        maximum = scores.detach().amax(-1)
        if number in accumulators:  # a query's own key came first, so its maximum is finite
            maximum = torch.maximum(maximum, accumulators[number][0])
        weights = (scores - maximum[..., None]).exp()
        total = weights.sum(-1)
        values = tile.kv.values.transpose(1, 2).to(weights.dtype)
        weighted = ungroup_heads(matmul(group_heads(weights, x.k.shape[2]), values), x.q.shape[2])
        if number in accumulators:
            old_maximum, old_total, old_weighted = accumulators[number]
            rescale = (old_maximum - maximum).exp()
            total = total + old_total * rescale
            weighted = weighted + old_weighted * rescale[..., None]
        accumulators[number] = maximum, total, weighted


class _Backward:
    """A backward pass: values that all tiles need, and the gradients of this rank's queries and gate sums."""

    def __init__(self, x: RingInputs, gradients: Gradients) -> None:
        (d_output, d_log_sum), (output, self.log_sum) = gradients.outputs, gradients.saved
        self.x = x
        self.wide = self.log_sum.dtype
        d_output = torch.zeros_like(output) if d_output is None else d_output
        self.d_output = d_output.to(self.wide).transpose(1, 2)
        d_output_dot_output = (self.d_output * output.to(self.wide).transpose(1, 2)).sum(-1)
        self.offset = d_output_dot_output if d_log_sum is None else d_output_dot_output - d_log_sum
        self.d_q = torch.zeros_like(x.q, dtype=self.wide)
        self.d_sums = None if x.sums is None else torch.zeros_like(x.sums)

    def block_gradients(self, block: Sequence[Tensor], tiles: Iterator[_Tile]) -> list[Tensor]:
        """Return the gradients of a block's tensors, and add those of the queries and gate sums to this object."""
        gradients = [torch.zeros_like(x, dtype=torch.promote_types(x.dtype, self.wide)) for x in block]
        for tile in tiles:
            self._add_tile(tile, gradients)
        return gradients

    def _add_tile(self, tile: _Tile, gradients: list[Tensor]) -> None:
        """Add the gradients of a tile: the backward equations in the module's docstring."""
        x = self.x
        groups = self.x.k.shape[2]
        n_heads = self.x.q.shape[2]
        q, keys, products, scores = _tile_scores(x, tile)
        weights = (scores - self.log_sum[:, :, tile.queries, None]).exp()
        d_output = group_heads(self.d_output[:, :, tile.queries], groups)
        d_scores = ungroup_heads(matmul(d_output, tile.kv.values.permute(0, 2, 3, 1).to(self.wide)), n_heads)
        d_scores = weights * (d_scores - self.offset[:, :, tile.queries, None])
        if self.d_sums is not None:
            self.d_sums[:, tile.queries] += d_scores.sum(-1).transpose(1, 2)
            gradients[2][:, tile.keys] -= d_scores.sum(-2).transpose(1, 2)
        d_values = matmul(group_heads(weights, groups).mT, d_output).transpose(1, 2)
        gradients[0 if x.value_dims else 1][:, tile.keys, :, : d_values.shape[3]] += d_values
        if x.softcap is not None:
            d_scores = d_scores * (1 - products.square())
        d_scores = group_heads(d_scores * x.scale, groups)
        d_q = ungroup_heads(matmul(d_scores, keys.transpose(1, 2).to(self.wide)), n_heads).transpose(1, 2)
        d_keys = matmul(d_scores.mT, group_heads(q.transpose(1, 2).to(self.wide), groups)).transpose(1, 2)
        # a gradient has the same decay factors as its tensor
        d_q, d_keys = apply_decay(d_q, tile.first, tile.kv._replace(keys=d_keys), x.log_decay)
        self.d_q[:, tile.queries] += d_q
        gradients[0][:, tile.keys] += d_keys


def _differentiate(x: RingInputs, cp: ContextParallel, gradients: Gradients) -> dict[str, Tensor]:
    """Compute the gradients of this rank's tensors, and exchange those of other ranks' blocks."""
    blocks = _Blocks(x, cp)
    backward = _Backward(x, gradients)
    totals: list[Tensor] = []
    for distance, block in blocks:
        d_block = backward.block_gradients(block, (tile for _, tile in blocks.tiles(distance, block)))
        if distance == 0:
            totals = d_block
        else:
            blocks.return_gradients([d.to(y.dtype) for d, y in zip(d_block, block, strict=True)], distance, totals)
        del block, d_block  # free them before the next block arrives
    d_sums = {} if backward.d_sums is None else {"sums": backward.d_sums + totals[2]}
    return {"q": backward.d_q, "k": totals[0], "v": totals[1], **d_sums}


def _allocate(x: RingInputs) -> tuple[Tensor, Tensor]:
    """Allocate the output and the logsumexp of the scores."""
    batch_size, length, n_heads, _ = x.q.shape
    output = x.q.new_empty(batch_size, length, n_heads, x.value_dims or x.v.shape[3])
    return output, x.q.new_empty(batch_size, n_heads, length, dtype=torch.promote_types(x.q.dtype, torch.float32))


def _group(x: RingInputs) -> ContextParallel:
    return ContextParallel(x.group, x.rank, x.size)


RING = Op(
    "softmax_ring",
    RingInputs,
    fake=_allocate,
    forward=lambda x: _attend(x, _group(x)),
    backward=lambda x, gradients: _differentiate(x, _group(x), gradients),
    outputs=2,
    reads=2,
)
