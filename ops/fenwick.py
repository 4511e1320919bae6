"""Log-linear attention: states of the past that double in length with their age (arXiv 2506.04761).

Notation: B batch, T tokens, H heads, G groups of heads, L levels, K key width, V value width, C chunk, N rows of the
state; t and j are positions from 0, a = log_decay, lambda = level_scales.

    o_t = scale * sum_{j <= t} lambda_{t, l(t, j)} exp(a_{j+1} + .. + a_t) (q_t k_j) v_j
    l(t, j) = number of bits of (t xor j)            0 for the token itself

Level l >= 1 is one state matrix with 2^(l-1) tokens; there is one for every bit of t that is 1 (a Fenwick tree), so
that t has a state per bit, and the oldest tokens share the longest. When a token is added, the levels of the trailing
ones of t and the new token join into the next level, as digits do when 1 is added.

The same holds for segments. With S^l the levels at position p, a token t >= p reads S^l with lambda at level
max(l(t, p), l), and after the segment, at position n, S^l is part of level max(l(n, p), l), and token j of level
l(n, j). A chunk is such a segment, computed as one T x T matrix and one product with the L states: the chunkwise
paradigm has C tokens per chunk, the recurrent one, and the parallel T. Packed documents are computed one after another;
where their boundaries are not known, on a GPU and in compiled code, they are one segment, which is quadratic in T.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .recurrence.token_loop import no_autocast
from .runtime.call import Call
from .runtime.packing import Documents
from .runtime.paradigm import Paradigm


class LogLinearOutput(NamedTuple):
    """Result of `log_linear`."""

    output: Float[Tensor, "B T H V"]
    """Output in the dtype of the values."""
    final_state: Float[Tensor, "N H L K V"] | None
    """State matrix of each level from 1 to L, float32 or float64; None unless requested."""


def log_linear(
    q: Float[Tensor, "B T G K"],
    k: Float[Tensor, "B T G K"],
    v: Float[Tensor, "B T H V"],
    log_decay: Float[Tensor, "B T H"],
    level_scales: Float[Tensor, "B T H L"],
    position: Int[Tensor, " N"] | None,
    call: Call,
    *,
    scale: float = 1.0,
) -> LogLinearOutput:
    """Log-linear attention with decays; the state has the matrices of levels 1 to L, [N H L K V].

    Args:
        q: queries; each is shared by H / G heads.
        k: keys; each is shared by H / G heads.
        v: values.
        log_decay: natural log of the decays, <= 0.
        level_scales: lambda, the factors of levels 0 to L - 1; positions must be below 2^(L-1).
        position: number of tokens before the segment, per row or document; None means 0.
        call: the call; its state is that before the first token.
        scale: factor of the output.
    """
    dtype = v.dtype
    wide = torch.promote_types(dtype, torch.float32)
    heads = v.shape[2]
    with no_autocast(q.device):
        q, k = (y.to(wide).repeat_interleave(heads // y.shape[2], dim=2).transpose(1, 2) for y in (q, k))
        v, a = (y.to(wide).transpose(1, 2) for y in (v, log_decay))
        tokens = Tokens(scale * q, k, v, a, level_scales.to(wide))
        state = None if call.state is None else call.state.to(wide)
        if call.documents is None:
            output, state = _in_chunks(tokens, state, position, call)
        elif call.documents.boundaries is not None:
            output, state = _one_by_one(tokens, state, position, call.documents.boundaries, call)
        else:
            output, state = _packed(tokens, state, position, call.documents, call.return_state)
    return LogLinearOutput(output.transpose(1, 2).to(dtype), state)


class Tokens(NamedTuple):
    """Inputs of a segment in the dtype of states, by head except for the factors of levels."""

    q: Tensor
    """Queries times scale [B H T K]."""
    k: Tensor
    """Keys [B H T K]."""
    v: Tensor
    """Values [B H T V]."""
    a: Tensor
    """Natural log of the decays [B H T]."""
    scales: Tensor
    """Factors of the levels [B T H L]."""

    def split(self, size: int | list[int]) -> "list[Tokens]":
        """Return the inputs of segments of `size` tokens, of which the last may be shorter, or of these sizes."""
        by_head = (y.split(size, dim=2) for y in self[:4])
        return [Tokens(*parts) for parts in zip(*by_head, self.scales.split(size, dim=1), strict=True)]

    def scale_of(self, level: Tensor) -> Tensor:
        """Return the factor of a token [B H T X] at levels [B|1 T X]."""
        batch, _, heads, levels = self.scales.shape
        level = level.clamp(max=levels - 1)  # higher ones are those of positions that are refused
        return self.scales.gather(-1, level[:, :, None].expand(batch, -1, heads, -1)).transpose(1, 2)


def bit_length(x: Int[Tensor, "*batch"], most: int) -> Int[Tensor, "*batch"]:
    """Return the number of bits of integers that have at most `most`."""
    length = torch.zeros_like(x)
    for bit in range(most):
        length = length + (x >= 1 << bit)
    return length


def log_linear_flops(
    paradigm: Paradigm,
    length: int,
    key_width: int,
    value_width: int,
    levels: int,
    *,
    chunk_size: int,
    context: int = 0,
) -> int:
    """Count the operations (FLOPs) of one head's matrix products in a forward pass.

    Args:
        paradigm: parallel, recurrent or chunkwise.
        length: tokens of the segment.
        key_width: K.
        value_width: V.
        levels: L.
        chunk_size: chunk length in tokens.
        context: tokens before the segment; if there are any, the product with the initial state is counted.
    """
    chunk = _chunk_length(paradigm, length, chunk_size)
    whole, ragged = divmod(length, chunk)
    last = ragged or min(chunk, length)
    pairs = whole * chunk**2 + ragged**2
    # every chunk but the first reads the states, every chunk but the last writes them
    read = length if context else length - min(chunk, length)
    per_token = 2 * levels * key_width * value_width
    return 2 * pairs * (key_width + value_width) + (read + length - last) * per_token


def _chunk_length(paradigm: Paradigm, length: int, chunk_size: int) -> int:
    if torch.compiler.is_exporting():  # the length is symbolic: one segment in place of a loop
        return length
    return {Paradigm.RECURRENT: 1, Paradigm.PARALLEL: length}.get(paradigm, chunk_size)


def _in_chunks(x: Tokens, state: Tensor | None, position: Tensor | None, call: Call) -> tuple[Tensor, Tensor | None]:
    """Return output [B H T V] and final state of a batch, chunk by chunk."""
    length = x.q.shape[2]
    chunk = _chunk_length(call.paradigm, length, call.chunk_size)
    levels = x.scales.shape[-1]
    level = torch.arange(1, levels + 1, device=x.q.device)
    start = torch.zeros(1, dtype=torch.int64, device=x.q.device) if position is None else position
    outputs = []
    done = 0
    # split, so that the backward pass joins the chunks' gradients once
    for c in [x] if chunk >= length else x.split(chunk):
        size = c.q.shape[2]
        done += size
        t = start[:, None] + torch.arange(size, device=start.device)
        scores = (c.q @ c.k.mT) * _pair_decays(c.a) * c.scale_of(bit_length(t[:, :, None] ^ t[:, None], levels))
        output = scores @ c.v
        if state is not None:
            read = torch.maximum(bit_length(t ^ start[:, None], levels)[..., None], level)
            reads = (c.a.cumsum(-1).exp()[..., None] * c.q)[..., None, :] * c.scale_of(read)[..., None]
            output = output + reads.flatten(3) @ state.flatten(2, 3)
        outputs.append(output)
        if done < length or call.return_state:
            end = start + size
            later = c.a.flip(-1).cumsum(-1).flip(-1)  # of this token and those after it
            later = torch.cat((later[..., 1:], torch.zeros_like(later[..., :1])), dim=-1)
            written = bit_length(end[:, None] ^ t, levels)[..., None] == level
            writes = (later.exp()[..., None] * c.k)[..., None, :] * written[:, None, ..., None]
            new = (writes.flatten(3).mT @ c.v).unflatten(2, (levels, -1))
            if state is not None:
                total = c.a.sum(-1).exp()[..., None, None, None]
                new = new + total * _joined(state, bit_length(end ^ start, levels))
            state = new
            start = end
    return torch.cat(outputs, dim=2), state if call.return_state else None


def _one_by_one(
    x: Tokens, state: Tensor | None, position: Tensor | None, boundaries: Sequence[int], call: Call
) -> tuple[Tensor, Tensor | None]:
    """Return output [1 H T V] and final states of packed documents, one after another."""
    sizes = [stop - start for start, stop in pairwise(boundaries)]
    levels = x.scales.shape[-1]
    if state is None:
        state = x.k.new_zeros(len(sizes), x.k.shape[1], levels, x.k.shape[3], x.v.shape[3])
    outputs = []
    finals = []
    for n, (document, before) in enumerate(zip(x.split(sizes), state.split(1), strict=True)):
        after = before
        if sizes[n]:
            first = None if position is None else position[n : n + 1]
            output, after = _in_chunks(document, before, first, call)
            outputs.append(output)
        finals.append(after)
    return torch.cat(outputs, dim=2), torch.cat(finals) if call.return_state else None


def _packed(
    x: Tokens, state: Tensor | None, position: Tensor | None, documents: Documents, return_state: bool
) -> tuple[Tensor, Tensor | None]:
    """Return output [1 H T V] and final states of packed documents whose boundaries are not known, as one segment."""
    levels = x.scales.shape[-1]
    level = torch.arange(1, levels + 1, device=x.q.device)
    boundaries = documents.cu_seqlens.to(torch.int64)
    first = torch.zeros_like(boundaries[1:]) if position is None else position
    of_token = documents.of_token
    same = of_token[:, None] == of_token
    t = (torch.arange(len(of_token), device=of_token.device) - boundaries[of_token] + first[of_token])[None]
    in_document = (of_token == torch.arange(len(first), device=of_token.device)[:, None]).to(x.q.dtype)
    pair_level = bit_length(t[:, :, None] ^ t[:, None], levels)
    scores = torch.where(same, (x.q @ x.k.mT) * _pair_decays(x.a) * x.scale_of(pair_level), 0)
    output = scores @ x.v
    if state is not None:
        read = torch.maximum(bit_length(t ^ first[of_token], levels)[..., None], level)
        prefix = torch.where(same.tril(), x.a[..., None, :], 0).sum(-1).exp()
        reads = ((prefix[..., None] * x.q)[..., None, :] * x.scale_of(read)[..., None]).flatten(3)[0]
        output = output + torch.einsum("nt,htm,nhmv->htv", in_document, reads, state.flatten(2, 3))
    if not return_state:
        return output, None
    end = first + boundaries.diff()
    later = torch.where(same.triu(1), x.a[..., None, :], 0).sum(-1).exp()
    written = bit_length(end[of_token] ^ t, levels)[..., None] == level
    writes = ((later[..., None] * x.k)[..., None, :] * written[:, None, ..., None]).flatten(3)[0]
    final = torch.einsum("nt,htm,htv->nhmv", in_document, writes, x.v[0]).unflatten(2, (levels, -1))
    if state is not None:
        total = torch.where(in_document[:, None] > 0, x.a[0], 0).sum(-1).exp()
        final = final + total[..., None, None, None] * _joined(state, bit_length(end ^ first, levels))
    return output, final


def _pair_decays(a: Tensor) -> Tensor:
    """Return exp(a_{j+1} + .. + a_i) of pairs of tokens i >= j, [B H T T], else 0; sums, never differences of sums."""
    return a[..., None].expand(*a.shape, a.shape[-1]).tril(-1).cumsum(-2).exp().tril()


def _joined(state: Tensor, level: Tensor) -> Tensor:
    """Return states [N H L K V] of which the levels up to `level` [N|1] are joined into that level; 0 joins none."""
    numbers = torch.arange(1, state.shape[2] + 1, device=state.device)
    lower, equal, higher = (
        mask[:, None, :, None, None].to(state.dtype)
        for mask in (numbers <= level[:, None], numbers == level[:, None], numbers > level[:, None])
    )
    return higher * state + equal * (lower * state).sum(2, keepdim=True)
