"""Causal convolutions, a filter a channel: short ones (over a few tokens), and long ones (over all).

Notation: B batch, T tokens, D channels, W tokens of a short filter, L of a long one, P inputs kept, N packed documents.

    y_t = b + sum_{i<W} w[:, W-1-i] * x_{t-i}        short: the inputs before the segment are the state, [W-1 D]
    y_t = sum_{i<L} h[:, i] * x_{t-i}                long: they are, too, [P D]; what was before those is zero

The long one is computed by FFT (parallel), or as the sum it is (recurrent). It is a custom op with its own backward: a
compiler sees no length of a document and no complex number, and no spectra are kept for the backward pass.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from ...mixers.positions import document_of_token
from ...registry import SeqmixError
from ..autograd import refuse_tangents
from ..context_parallel import Context
from ..kernels import FLOATS
from ..packing import Stretch, require_borders, stretches
from ..paradigm import Paradigm


class ConvolutionOutput(NamedTuple):
    """What a convolution returns."""

    output: Float[Tensor, "B T D"]
    """In the dtype of the input."""
    final_state: Float[Tensor, "N _ D"] | None
    """None unless wanted."""


def short_convolution(
    x: Float[Tensor, "B T D"],
    weight: Float[Tensor, "D W"],
    bias: Float[Tensor, " D"] | None = None,
    *,
    initial_state: Float[Tensor, "N W-1 D"] | None = None,
    output_final_state: bool = False,
    cu_seqlens: Int[Tensor, "N+1"] | None = None,
    context: Context | None = None,
) -> ConvolutionOutput:
    """A causal convolution a channel over the last W tokens, the token itself included.

    It is a sum of W shifted products, which a compiler fuses with what surrounds it. That is also quicker than torch's
    `conv1d`: it takes less than half of its time, forward and backward, on a CPU at T = 2048, D = 512, W = 4. Sums are
    formed in float32 (float64 for float64 inputs).

    Args:
        x: inputs.
        weight: filters; weight[:, -1] is what the newest token is multiplied with, as `nn.Conv1d` has it.
        bias: added to every output.
        initial_state: the last W-1 inputs before the first token, oldest first; None means zeros.
        output_final_state: whether the last W-1 inputs are wanted, in the dtype of x. Of fewer tokens than that, what
            the initial state still has of them stays.
        cu_seqlens: borders of N documents packed into one row (B = 1); states then have N rows. Empty ones are legal.
        context: where x is this rank's part of a row; borders and states are the whole row's.

    Raises:
        SeqmixError: shapes or dtypes do not fit, said in one sentence.
    """
    if context is not None:
        return _short_in_context(x, weight, bias, initial_state, output_final_state, cu_seqlens, context)
    _check(x, weight, initial_state, cu_seqlens, short=True)
    (batch, length, width), past = x.shape, weight.shape[1] - 1
    if bias is not None and tuple(bias.shape) != (width,):
        raise SeqmixError(f"the bias must be [{width}], and is {list(bias.shape)}")
    rows = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state = x.new_zeros(rows, past, width) if initial_state is None else initial_state.to(x.dtype)
    if cu_seqlens is None:
        seen = torch.cat((state, x), dim=1)
        output = _shifted_products(seen, weight, bias)
        last = seen[:, length:].clone() if output_final_state else None  # a view would keep all that was seen alive
        return ConvolutionOutput(output, last)
    # one stretch of all documents, each behind its own state: what is read over a border belongs to no token
    document = document_of_token(cu_seqlens, length)
    token = torch.arange(length, device=x.device) + past * document
    place = past * torch.arange(rows, device=x.device)[:, None] + torch.arange(past, device=x.device)
    at = torch.cat(((cu_seqlens[:-1, None] + place).flatten(), token + past))
    source = torch.empty_like(at).index_copy(0, at, torch.arange(len(at), device=x.device))
    seen = torch.cat((state.flatten(0, 1), x[0])).index_select(0, source)
    output = _shifted_products(seen[None], weight, bias).index_select(1, token)
    return ConvolutionOutput(output, seen[cu_seqlens[1:, None] + place] if output_final_state else None)


def _short_in_context(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
    context: Context,
) -> ConvolutionOutput:
    """The short convolution of one rank's segment, behind the last inputs of the ranks before it."""
    (batch, length, width), past = x.shape, weight.shape[1] - 1
    borders = context.borders(cu_seqlens, length)
    state = x.new_zeros(batch if borders is None else len(borders) - 1, past, width)
    if initial_state is not None:
        state = initial_state.to(x.dtype)
    if past:
        # of segments shorter than that, several make it up
        tails = context.gather(x[:, -min(length, past) :])[: context.rank].transpose(0, 1).flatten(1, 2)
        read = F.pad(tails, (0, 0, past, 0))[:, -past:]
        start, slot = context.start(length), torch.arange(past, device=x.device)
        before = state
        if cu_seqlens is not None:
            document = context.first_document(cu_seqlens, length)
            start, before = start - cu_seqlens[document], state.index_select(0, document)
        left = past - torch.as_tensor(start, device=x.device).clamp(max=past)  # slots that the initial state still has
        old = before.index_select(1, (slot + past - left).clamp(max=past - 1))
        state = context.continued(torch.where((slot < left)[:, None], old, read), state, cu_seqlens, length)
    output, last = short_convolution(
        x, weight, bias, initial_state=state, output_final_state=output_final_state, cu_seqlens=borders
    )
    return ConvolutionOutput(output, None if last is None else context.final(last, cu_seqlens, length))


def _shifted_products(seen: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The outputs of the tokens whose whole window was seen: [B W-1+T D] -> [B T D], in the same dtype."""
    dtype, wide = seen.dtype, torch.promote_types(seen.dtype, torch.float32)
    seen, length = seen.to(wide), seen.shape[1] - weight.shape[1] + 1
    # weights that lie together make it four times as quick in 16 bits; multiplying and adding apart, a fifth backward
    oldest, *newer = weight.to(wide).T.contiguous().unbind()
    output = seen.narrow(1, 0, length) * oldest
    for i, w in enumerate(newer, 1):
        output = output + seen.narrow(1, i, length) * w
    if bias is not None:
        output = output + bias.to(wide)
    return output.to(dtype)


def long_convolution(
    paradigm: Paradigm,
    x: Float[Tensor, "B T D"],
    filters: Float[Tensor, "D L"],
    *,
    initial_state: Float[Tensor, "N P D"] | None = None,
    output_final_state: bool = False,
    grows: bool = True,
    cu_seqlens: Int[Tensor, "N+1"] | None = None,
    context: Context | None = None,
) -> ConvolutionOutput:
    """A causal convolution a channel over all that was read.

    In the parallel paradigm by FFT: its time is (P + T) log(P + T) in the number of tokens. In the recurrent one as a
    sum over the inputs kept, a token after the other: its time is P for each. Either way a packed document costs what
    it would alone. Sums are formed in float32 (float64 for float64 inputs). The FFT's rounding goes by the largest
    input of a row's channel, later ones included: outputs are independent of later inputs only up to it, and an inf or
    nan spoils earlier outputs of its channel too. The recurrent paradigm has neither.

    Args:
        paradigm: parallel or recurrent.
        x: inputs.
        filters: filters[:, i] is what the input i tokens ago is multiplied with; what is further away than L - 1 tokens
            counts as nothing.
        initial_state: the inputs before the first token, oldest first, and zeros before those; None means none.
        output_final_state: whether the inputs read are wanted, in the dtype of the initial state, or of x without one.
        grows: whether the final state has P + T inputs of each row, packed documents too; otherwise the last P.
        cu_seqlens: borders of N documents packed into one row (B = 1); states then have N rows. Empty ones are legal.
        context: where x is this rank's part of a row; borders and states are the whole row's. Every rank gathers the
            row and convolves it up to its own last token.

    Raises:
        SeqmixError: shapes or dtypes do not fit, said in one sentence; there is no such paradigm; an input has a
            tangent, as there is no forward-mode differentiation.
    """
    if context is not None:
        context.borders(cu_seqlens, x.shape[1])
        row, stop = context.gather_tokens(x), context.start(x.shape[1]) + x.shape[1]
        borders = None if cu_seqlens is None else cu_seqlens.clamp(max=stop)
        output, _ = long_convolution(paradigm, row[:, :stop], filters, initial_state=initial_state, cu_seqlens=borders)
        read = _inputs(row, initial_state, grows, cu_seqlens) if output_final_state else None
        return ConvolutionOutput(output[:, stop - x.shape[1] :], read)
    _check(x, filters, initial_state, cu_seqlens, short=False)
    if paradigm is Paradigm.CHUNKWISE:
        raise SeqmixError("a long convolution is parallel or recurrent, not chunkwise")
    if paradigm is Paradigm.RECURRENT and x.shape[1] == 1 and cu_seqlens is None:
        # plain operations, which a compiler fuses with what surrounds them
        seen = _seen(x, initial_state, Stretch(slice(None), 0, 1), filters.shape[1])
        output = _newest(seen, _reversed(filters, seen)).to(x.dtype)[:, None]
    else:
        if not torch.compiler.is_compiling():
            refuse_tangents("a long convolution", x, filters, initial_state)
        output = long_op(x, filters, initial_state, cu_seqlens, paradigm is Paradigm.RECURRENT)
    return ConvolutionOutput(output, _inputs(x, initial_state, grows, cu_seqlens) if output_final_state else None)


def _inputs(x: Tensor, past: Tensor | None, grows: bool, cu_seqlens: Tensor | None) -> Tensor:
    """The inputs read, right-aligned: [N P+T D], or the last P of them."""
    length, width = x.shape[1:]
    rows = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    past = x.new_zeros(rows, 0, width) if past is None else past
    kept = past.shape[1]
    if cu_seqlens is None:
        seen = torch.cat((past, x.to(past.dtype)), dim=1)
        return seen if grows else seen[:, length:].clone()
    slots = kept + length if grows else kept
    back = torch.arange(slots - 1, -1, -1, device=x.device)  # tokens between a slot and the row's end
    older = back - cu_seqlens.diff()[:, None]  # below 0 where the document's own tokens are
    own = rows * kept + cu_seqlens[1:, None] - 1 - back
    old = kept * torch.arange(1, rows + 1, device=x.device)[:, None] - 1 - older
    # the pool is the old rows, the new tokens, and a zero for empty slots
    source = torch.where(older < 0, own, old.masked_fill(older >= kept, rows * kept + length))
    return torch.cat((past.flatten(0, 1), x[0].to(past.dtype), past.new_zeros(1, width)))[source]


@torch.library.custom_op("seqmix::long_convolution", mutates_args=())
def long_op(x: Tensor, filters: Tensor, past: Tensor | None, cu_seqlens: Tensor | None, direct: bool) -> Tensor:
    """The outputs, [B T D]; as sums if `direct`, else by FFT."""
    output = x.new_empty(x.shape)
    for stretch in _documents(x, cu_seqlens):
        seen = _seen(x, past, stretch, filters.shape[1])
        convolve = _sums if direct else _by_fft
        output[:, stretch.start : stretch.stop] = convolve(seen, filters, stretch.stop - stretch.start)
    return output


@long_op.register_fake
def _(x: Tensor, filters: Tensor, past: Tensor | None, cu_seqlens: Tensor | None, direct: bool) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("seqmix::long_convolution_backward", mutates_args=())
def long_backward_op(
    d_output: Tensor, x: Tensor, filters: Tensor, past: Tensor | None, cu_seqlens: Tensor | None, direct: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, d filters and d past, which is empty where there is none."""
    dx, d_filters, d_past = _allocate_gradients(d_output, x, filters, past, cu_seqlens, direct)
    total = torch.zeros_like(filters, dtype=torch.promote_types(x.dtype, torch.float32))
    for stretch in _documents(x, cu_seqlens):
        seen, length = _seen(x, past, stretch, filters.shape[1]), stretch.stop - stretch.start
        differentiate = _sums_backward if direct else _by_fft_backward
        d_new = d_output[:, stretch.start : stretch.stop].to(seen.dtype)
        d_seen, d_taps = differentiate(d_new, seen, filters)
        total[:, : d_taps.shape[1]] += d_taps
        dx[:, stretch.start : stretch.stop] = d_seen[:, -length:]
        if kept := seen.shape[1] - length:
            d_past[stretch.rows, -kept:] = d_seen[:, :kept].to(d_past.dtype)
    return dx, d_filters.copy_(total), d_past


@long_backward_op.register_fake
def _allocate_gradients(
    d_output: Tensor, x: Tensor, filters: Tensor, past: Tensor | None, cu_seqlens: Tensor | None, direct: bool
) -> tuple[Tensor, Tensor, Tensor]:
    d_past = x.new_empty(0) if past is None else past.new_zeros(past.shape)
    return x.new_empty(x.shape), filters.new_empty(filters.shape), d_past


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.direct = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, d_output: Tensor) -> tuple[Tensor | None, ...]:
    x, filters, past, cu_seqlens = ctx.saved_tensors
    dx, d_filters, d_past = long_backward_op(d_output, x, filters, past, cu_seqlens, ctx.direct)
    return dx, d_filters, None if past is None else d_past, None, None


long_op.register_autograd(_backward, setup_context=_save_for_backward)


def _documents(x: Tensor, cu_seqlens: Tensor | None) -> Iterator[Stretch]:
    """The stretches that hold tokens."""
    return (s for s in stretches(x.shape[0], x.shape[1], cu_seqlens) if s.stop > s.start)


def _seen(x: Tensor, past: Tensor | None, stretch: Stretch, reach: int) -> Tensor:
    """What the tokens of a stretch see with filters of `reach` tokens: some of the past, and themselves; widened."""
    new = x[:, stretch.start : stretch.stop].to(torch.promote_types(x.dtype, torch.float32))
    if past is None:
        return new
    kept = min(past.shape[1], reach - 1)
    return torch.cat((past[stretch.rows, past.shape[1] - kept :].to(new.dtype), new), dim=1)


def _by_fft(seen: Tensor, filters: Tensor, length: int) -> Tensor:
    """The outputs of the last `length` tokens of those seen."""
    seen, taps = seen.transpose(1, 2), filters[:, : seen.shape[1]].to(seen.dtype)
    size = _fast_size(taps.shape[1] + length - 1)
    product = torch.fft.rfft(seen, n=size) * torch.fft.rfft(taps, n=size)
    # what wraps around lands on tokens before the last ones
    return torch.fft.irfft(product, n=size)[..., seen.shape[2] - length : seen.shape[2]].transpose(1, 2)


def _by_fft_backward(d_new: Tensor, seen: Tensor, filters: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of what was seen and of the taps that it met: correlations, where `_by_fft` has convolutions."""
    length, width = d_new.shape[1], seen.shape[1]
    seen, taps = seen.transpose(1, 2), filters[:, :width].to(seen.dtype)
    size = _fast_size(taps.shape[1] + length - 1)
    d_new = torch.fft.rfft(F.pad(d_new.transpose(1, 2), (width - length, 0)), n=size)
    d_seen = torch.fft.irfft(d_new * torch.fft.rfft(taps, n=size).conj(), n=size)[..., :width]
    d_taps = torch.fft.irfft((d_new * torch.fft.rfft(seen, n=size).conj()).sum(0), n=size)[:, : taps.shape[1]]
    return d_seen.transpose(1, 2), d_taps


def _fast_size(at_least: int) -> int:
    """The smallest size of an FFT that is a power of two, or one times 3, 5, 9 or 15."""
    return min(odd << (-(-at_least // odd) - 1).bit_length() for odd in (1, 3, 5, 9, 15))


def _sums(seen: Tensor, filters: Tensor, length: int) -> Tensor:
    """The outputs of the last `length` tokens of those seen, by the definition."""
    taps, first = _reversed(filters, seen), seen.shape[1] - length
    return torch.stack([_newest(seen[:, : t + 1], taps) for t in range(first, seen.shape[1])], dim=1)


def _sums_backward(d_new: Tensor, seen: Tensor, filters: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of what was seen and of the taps that it met, by the definition."""
    taps, first = _reversed(filters, seen), seen.shape[1] - d_new.shape[1]
    d_seen, d_taps = torch.zeros_like(seen), torch.zeros_like(taps)
    for t in range(first, seen.shape[1]):
        met, above = min(t + 1, len(taps)), d_new[:, t - first, None]
        d_seen[:, t + 1 - met : t + 1] += above * taps[-met:]
        d_taps[-met:] += (above * seen[:, t + 1 - met : t + 1]).sum(0)
    return d_seen, d_taps.flip(0).T


def _reversed(filters: Tensor, seen: Tensor) -> Tensor:
    """The taps that what was seen can meet, in its order: that of the newest last, [L D]."""
    return filters[:, : seen.shape[1]].to(seen.dtype).flip(1).T.contiguous()


def _newest(seen: Tensor, taps: Tensor) -> Tensor:
    """The output of the last token seen, [B D]."""
    met = min(seen.shape[1], taps.shape[0])
    return (seen[:, seen.shape[1] - met :] * taps[taps.shape[0] - met :]).sum(1)


def _check(x: Tensor, filters: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None, *, short: bool) -> None:
    """Refuse shapes and dtypes that do not fit; a short filter has a state of its own length."""
    if x.dtype not in FLOATS or filters.dtype not in FLOATS:
        raise SeqmixError(f"a convolution is of floating-point numbers, and was given {x.dtype} and {filters.dtype}")
    if x.ndim != 3 or x.shape[1] < 1 or filters.ndim != 2 or filters.shape[0] != x.shape[2] or filters.shape[1] < 1:
        name = "weight [D W] with W" if short else "filters [D L] with L"
        raise SeqmixError(
            f"x must be [B T D] with T >= 1, and the {name} >= 1; given are {list(x.shape)}, {list(filters.shape)}"
        )
    batch, length, width = x.shape
    if cu_seqlens is not None:
        if batch != 1:
            raise SeqmixError(f"packed documents are one row (B = 1), and the batch is {batch}")
        require_borders(cu_seqlens, length)
    if initial_state is None:
        return
    rows = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if short and tuple(initial_state.shape) != (rows, filters.shape[1] - 1, width):
        needed = [rows, filters.shape[1] - 1, width]
        raise SeqmixError(f"the initial state must be {needed}, and is {list(initial_state.shape)}")
    if initial_state.ndim != 3 or (initial_state.shape[0], initial_state.shape[2]) != (rows, width):
        raise SeqmixError(f"the initial state must be [{rows} P {width}], and is {list(initial_state.shape)}")
