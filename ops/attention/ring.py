"""Softmax attention of one process's queries over the keys of all processes before it (notation of api.py).

Ring attention (arXiv 2310.01889): keys and values come block by block, one per process, and the softmax over all of
them is computed as they come (arXiv 1805.02867). With the maximum M of a query's scores so far, own keys first,

    M' = max(M, max_m s_nm)        r = e^(M - M')        l <- r l + sum_m e^(s_nm - M')
    o_n = a / l                    L_n = M + log l       a <- r a + sum_m e^(s_nm - M') v_m

Backward receives the blocks again, so that between the passes a process holds its own keys and values only:

    w_nm = e^(s_nm - L_n)          dv_m = sum_n w_nm do_n          ds_nm = w_nm (do_n . v_m - do_n . o_n + dL_n)

and sends a block's gradients to its process. Keys of later processes are in the future and are not sent. Under a window
of w, a process sends its last w - 1 keys, to the processes that see them.
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
from .inputs import AttentionInputs, factored, visible_keys
from .kv_cache import Offer
from .scores import by_group, by_head, product, products, scores


class Ring(NamedTuple):
    """What the op takes: tensors of this process's tokens."""

    q: Tensor
    k: Tensor
    v: Tensor
    sums: Tensor | None
    """Sums of log forget gates from the row's first token on, [B T H], float64."""
    documents: Tensor | None
    """The document of each token of the whole row."""
    log_decay: Tensor | None
    slopes: Tensor | None
    scale: float
    softcap: float | None
    window: int | None
    value_dims: int | None
    chunk_size: int
    group: str
    rank: int
    size: int


def can_ring(x: AttentionInputs) -> bool:
    """Whether keys and values need not be gathered: a state is the cache of the whole row, and so is its gradient."""
    return x.cache is None and not x.output_final_state and not needs_grad(x.log_decay, x.slopes)


def attend_in_ring(x: AttentionInputs, cp: ContextParallel) -> Float[Tensor, "B T H V"]:
    """What this rank's queries read; keys, values and gates are its own tokens' too, documents the whole row's."""
    sums = None
    if x.log_forget is not None:
        sums = x.log_forget.double().cumsum(dim=1)
        sums = sums + cp.gather(sums[:, -1:])[: cp.rank].sum(dim=0)
    documents = None if x.documents is None else x.documents.of_token
    call = Ring(
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
        # what has no numbers is only counted, at any length
        *(x.q.shape[1] if x.q.device.type == "meta" else x.chunk_size, cp.name, cp.rank, cp.size),
    )
    with no_autocast(x.q.device):
        # ranks that are not processes share one graph
        output, log_sum = RING(call) if type(cp) is ContextParallel else _attend(call, cp)
        if x.sinks is None:
            return output
        share = logsigmoid(log_sum - x.sinks[:, None].to(log_sum.dtype)).exp()
        return (output * share.transpose(1, 2)[..., None]).to(output.dtype)


class _Tile(NamedTuple):
    """A chunk of queries and the keys of one block that some of them see."""

    queries: slice
    keys: slice
    first: int
    """The place of the first query."""
    offer: Offer


class _Blocks:
    """The blocks of keys, values and sums that a rank reads."""

    def __init__(self, x: Ring, cp: ContextParallel) -> None:
        self.x = x
        self.cp = cp
        self.length = x.q.shape[1]
        self.own = [tensor for tensor in (x.k, x.v, x.sums) if tensor is not None]
        seen = self.length * cp.size if x.window is None else x.window - 1
        self.kept = min(seen, self.length)
        self.reach = min(-(-seen // self.length), cp.size - 1)

    def sent(self) -> list[Tensor]:
        """What ranks after this one see of its own."""
        return [tensor[:, self.length - self.kept :].contiguous() for tensor in self.own]

    def __iter__(self) -> Iterator[tuple[int, Sequence[Tensor]]]:
        """This rank's, then those of the ranks before and how many ranks before; empty where there is no such rank.

        The next is on its way while one is computed with.
        """
        sent = self.sent()
        coming = None
        for distance in range(self.reach + 1):
            block, works = (self.own, []) if coming is None else coming
            for work in works:
                work.wait()
            coming = self.cp.exchange(sent, sent, distance + 1) if distance < self.reach else None
            yield distance, block

    def give_back(self, owed: Sequence[Tensor], distance: int, totals: Sequence[Tensor]) -> None:
        """Send gradients of the block of the rank so far before, and add what ranks after this one send to `totals`."""
        received, works = self.cp.exchange(owed, self.sent(), -distance)
        for work in works:
            work.wait()
        for total, part in zip(totals, received, strict=False):
            total[:, self.length - self.kept :] += part

    def tiles(self, distance: int, block: Sequence[Tensor]) -> Iterator[tuple[int, _Tile]]:
        """The tiles of a block, by the number of their chunk."""
        if not block:
            return
        x = self.x
        start = self.cp.start(self.length)
        k, v, *more = block
        origin = start + self.length - k.shape[1] - distance * self.length
        for number, at in enumerate(range(0, self.length, x.chunk_size)):
            stop = min(at + x.chunk_size, self.length)
            first = start + at
            last = start + stop
            begin = 0 if x.window is None else max(0, first - x.window + 1 - origin)
            queries = slice(at, stop)
            keys = slice(begin, min(k.shape[1], last - origin))
            if keys.start >= keys.stop:
                continue
            values = v[:, keys] if x.value_dims is None else k[:, keys, :, : x.value_dims]
            places = torch.arange(origin + keys.start, origin + keys.stop, device=k.device)
            documents = None
            if x.documents is not None:
                documents = x.documents[origin + keys.start : origin + keys.stop], x.documents[first:last]
            sums = (more[0][:, keys], x.sums[:, queries]) if x.sums is not None else None
            yield number, _Tile(queries, keys, first, Offer(k[:, keys], values, places[None], documents, 0, sums))


def _scores(x: Ring, tile: _Tile) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries and keys with their factors, products (or their tanh), and scores [B H C M]."""
    offer = tile.offer
    call = AttentionInputs(x.q[:, tile.queries], x.k, x.v, x.scale, None, None, False, x.chunk_size)
    call = call._replace(softcap=x.softcap, slopes=x.slopes)
    q, keys = factored(call.q, tile.first, offer, x.log_decay)
    places = torch.arange(tile.first, tile.first + q.shape[1], device=q.device)
    bounded = products(call, q, keys)
    return q, keys, bounded, scores(call, bounded, visible_keys(places, offer, x.window), call.bias(places, offer))


_Reads: TypeAlias = dict[int, tuple[Tensor, Tensor, Tensor]]
"""By the number of a chunk, of each query: the greatest score, the sum of weights, and the weighted sum of values."""


def _attend(x: Ring, cp: ContextParallel) -> tuple[Tensor, Tensor]:
    """The output, and the log of the sum of each query's weights."""
    blocks = _Blocks(x, cp)
    reads = _Reads()
    for distance, block in blocks:
        _read(x, blocks.tiles(distance, block), reads)
        del block  # the next are there before it is bound again
    output, log_sum = _empty(x)
    for number, (top, total, read) in reads.items():
        chunk = slice(number * x.chunk_size, (number + 1) * x.chunk_size)
        output[:, chunk] = (read / total[..., None]).transpose(1, 2)
        log_sum[:, :, chunk] = top + total.log()
    return output, log_sum


def _read(x: Ring, tiles: Iterable[tuple[int, _Tile]], reads: _Reads) -> None:
    """Add what queries read in a block."""
    for number, tile in tiles:
        *_, found = _scores(x, tile)
        top = found.detach().amax(-1)
        if number in reads:  # own keys come first, of which a query sees one: the maximum is finite
            top = torch.maximum(top, reads[number][0])
        weights = (found - top[..., None]).exp()
        total = weights.sum(-1)
        values = tile.offer.values.transpose(1, 2).to(weights.dtype)
        read = by_head(product(by_group(weights, x.k.shape[2]), values), x.q.shape[2])
        if number in reads:
            before, total_before, read_before = reads[number]
            shrunk = (before - top).exp()
            total = total + total_before * shrunk
            read = read + read_before * shrunk[..., None]
        reads[number] = top, total, read


class _Backward:
    """What the tiles of a backward pass have in common, and the gradients that stay here."""

    def __init__(self, x: Ring, gradients: Gradients) -> None:
        (d_output, d_log_sum), (output, self.log_sum) = gradients.outputs, gradients.saved
        self.x = x
        self.wide = self.log_sum.dtype
        d_output = torch.zeros_like(output) if d_output is None else d_output
        self.d_output = d_output.to(self.wide).transpose(1, 2)
        taken = (self.d_output * output.to(self.wide).transpose(1, 2)).sum(-1)
        self.taken = taken if d_log_sum is None else taken - d_log_sum
        self.d_q = torch.zeros_like(x.q, dtype=self.wide)
        self.d_sums = None if x.sums is None else torch.zeros_like(x.sums)

    def owed(self, block: Sequence[Tensor], tiles: Iterator[_Tile]) -> list[Tensor]:
        """The gradients of a block."""
        owed = [torch.zeros_like(x, dtype=torch.promote_types(x.dtype, self.wide)) for x in block]
        for tile in tiles:
            self._add(tile, owed)
        return owed

    def _add(self, tile: _Tile, owed: list[Tensor]) -> None:
        x = self.x
        groups = self.x.k.shape[2]
        n_heads = self.x.q.shape[2]
        q, keys, bounded, found = _scores(x, tile)
        weights = (found - self.log_sum[:, :, tile.queries, None]).exp()
        d_read = by_group(self.d_output[:, :, tile.queries], groups)
        d_scores = by_head(product(d_read, tile.offer.values.permute(0, 2, 3, 1).to(self.wide)), n_heads)
        d_scores = weights * (d_scores - self.taken[:, :, tile.queries, None])
        if self.d_sums is not None:
            self.d_sums[:, tile.queries] += d_scores.sum(-1).transpose(1, 2)
            owed[2][:, tile.keys] -= d_scores.sum(-2).transpose(1, 2)
        d_values = product(by_group(weights, groups).mT, d_read).transpose(1, 2)
        owed[0 if x.value_dims else 1][:, tile.keys, :, : d_values.shape[3]] += d_values
        if x.softcap is not None:
            d_scores = d_scores * (1 - bounded.square())
        d_scores = by_group(d_scores * x.scale, groups)
        d_q = by_head(product(d_scores, keys.transpose(1, 2).to(self.wide)), n_heads).transpose(1, 2)
        d_keys = product(d_scores.mT, by_group(q.transpose(1, 2).to(self.wide), groups)).transpose(1, 2)
        # factors are the same for a gradient
        d_q, d_keys = factored(d_q, tile.first, tile.offer._replace(keys=d_keys), x.log_decay)
        self.d_q[:, tile.queries] += d_q
        owed[0][:, tile.keys] += d_keys


def _differentiate(x: Ring, cp: ContextParallel, gradients: Gradients) -> dict[str, Tensor]:
    blocks = _Blocks(x, cp)
    backward = _Backward(x, gradients)
    totals: list[Tensor] = []
    for distance, block in blocks:
        owed = backward.owed(block, (tile for _, tile in blocks.tiles(distance, block)))
        if distance == 0:
            totals = owed
        else:
            blocks.give_back([d.to(t.dtype) for d, t in zip(owed, block, strict=True)], distance, totals)
        del block, owed  # the next are there before these are bound again
    d_sums = {} if backward.d_sums is None else {"sums": backward.d_sums + totals[2]}
    return {"q": backward.d_q, "k": totals[0], "v": totals[1], **d_sums}


def _empty(x: Ring) -> tuple[Tensor, Tensor]:
    batch_size, length, n_heads, _ = x.q.shape
    output = x.q.new_empty(batch_size, length, n_heads, x.value_dims or x.v.shape[3])
    return output, x.q.new_empty(batch_size, n_heads, length, dtype=torch.promote_types(x.q.dtype, torch.float32))


def _group(x: Ring) -> ContextParallel:
    return ContextParallel(x.group, x.rank, x.size)


RING = Op(
    "softmax_ring",
    Ring,
    fake=_empty,
    forward=lambda x: _attend(x, _group(x)),
    backward=lambda x, gradients: _differentiate(x, _group(x), gradients),
    outputs=2,
    reads=2,
)
