"""The long causal convolution, one filter per channel over all tokens.

Notation: B batch, T tokens, D channels, L tokens of a filter, P cached inputs, N packed documents.

    y_t = sum_{i<L} h[:, i] * x_{t-i}       the inputs before the segment are the state, [P D]; what was before is zero

It is computed by FFT (parallel), or as the sum it is (recurrent). It is a custom op with its own backward: a compiler
sees no length of a document and no complex number, and no spectra are saved for the backward pass.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Unpack

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ...registry import SeqmixError
from ..runtime.call import Call, CallOptions
from ..runtime.custom_op import Gradients, Op
from ..runtime.packing import Documents, Stretch, stretches
from ..runtime.paradigm import Paradigm
from .short import ConvolutionOutput, require_convolution


def long_convolution(
    x: Float[Tensor, "B T D"],
    filters: Float[Tensor, "D L"],
    call: Call | None = None,
    *,
    grows: bool = True,
    **options: Unpack[CallOptions],
) -> ConvolutionOutput:
    """Causal convolution per channel over all tokens so far; the state is [N P D], the inputs so far.

    In the parallel paradigm (the default) by FFT: its time is (P + T) log(P + T) in the number of tokens. In the
    recurrent one as a sum over the cached inputs, token by token: each costs P. Either way a packed document costs what
    it would alone. Sums are formed in float32 (float64 of float64 inputs). The FFT's rounding goes by the largest
    input of a row's channel, later ones included: outputs are independent of later inputs only up to it, and an inf or
    nan spoils earlier outputs of its channel too. The recurrent paradigm has neither. In a context-parallel group every
    rank gathers the row and convolves it up to its own last token.

    Args:
        x: inputs.
        filters: filters[:, i] is what the input i tokens ago is multiplied with; what is further away than L - 1 tokens
            counts as nothing.
        call: the call of a mixer; None for those who call the op by itself, with `options`.
        grows: True if the final state has P + T inputs of each row, packed documents too; otherwise the last P.
        options: `CallOptions`; the initial state is the inputs before the first token, oldest first, and zeros before
            those. The final state has its dtype, or that of x without one.

    Raises:
        SeqmixError: shapes or dtypes do not fit; the paradigm does not exist; an input has a tangent, as
            there is no forward-mode differentiation.
    """
    call = Call.given(call, x.shape[1], options, paradigm=Paradigm.PARALLEL)
    require_convolution(x, filters, call, "filters [D L] with L")
    rows = call.rows(x.shape[0])
    state = call.state
    if state is not None and (state.ndim != 3 or (state.shape[0], state.shape[2]) != (rows, x.shape[2])):
        raise SeqmixError(f"the initial state must be [{rows} P {x.shape[2]}], and is {list(state.shape)}")
    if call.paradigm is Paradigm.CHUNKWISE:
        raise SeqmixError("a long convolution is parallel or recurrent, not chunkwise")
    row = x
    documents = call.documents
    length = x.shape[1]
    if call.cp_group is not None:
        row = call.cp_group.gather_tokens(x)
        stop = call.cp_group.start(length) + length
        x = row[:, :stop]
        if documents is not None:
            boundaries = documents.boundaries and tuple(min(boundary, stop) for boundary in documents.boundaries)
            documents = Documents(documents.cu_seqlens.clamp(max=stop), documents.of_token, boundaries)
    if call.paradigm is Paradigm.RECURRENT and x.shape[1] == 1 and documents is None:
        # plain operations, which a compiler fuses with what surrounds them
        seen = _seen(x, state, Stretch(slice(None), 0, 1), filters.shape[1])
        output = _newest(seen, _reversed(filters, seen)).to(x.dtype)[:, None]
    else:
        packed = (None, None) if documents is None else (documents.cu_seqlens, documents.boundaries)
        (output,) = OP(_Long(x, filters, state, *packed, call.paradigm is Paradigm.RECURRENT))
    read = _inputs(row, state, grows, call.cu_seqlens) if call.return_state else None
    return ConvolutionOutput(output[:, x.shape[1] - length :], read)


def _inputs(x: Tensor, past: Tensor | None, grows: bool, cu_seqlens: Tensor | None) -> Tensor:
    """The inputs read, right-aligned: [N P+T D], or the last P of them."""
    length, width = x.shape[1:]
    rows = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    past = x.new_zeros(rows, 0, width) if past is None else past
    cached = past.shape[1]
    if cu_seqlens is None:
        seen = torch.cat((past, x.to(past.dtype)), dim=1)
        return seen if grows else seen[:, length:].clone()
    slots = cached + length if grows else cached
    back = torch.arange(slots - 1, -1, -1, device=x.device)  # tokens between a slot and the row's end
    older = back - cu_seqlens.diff()[:, None]  # below 0 where the document's own tokens are
    own = rows * cached + cu_seqlens[1:, None] - 1 - back
    old = cached * torch.arange(1, rows + 1, device=x.device)[:, None] - 1 - older
    # the pool is the old rows, the new tokens, and a zero for empty slots
    source = torch.where(older < 0, own, old.masked_fill(older >= cached, rows * cached + length))
    return torch.cat((past.flatten(0, 1), x[0].to(past.dtype), past.new_zeros(1, width)))[source]


class _Long(NamedTuple):
    x: Tensor
    filters: Tensor
    past: Tensor | None
    cu_seqlens: Tensor | None
    boundaries: Sequence[int] | None
    direct: bool
    """As sums, else by FFT."""

    @property
    def documents(self) -> Iterator[Stretch]:
        """The stretches that hold tokens."""
        found = stretches(self.x.shape[0], self.x.shape[1], self.cu_seqlens, self.boundaries)
        return (stretch for stretch in found if stretch.stop > stretch.start)

    def seen(self, stretch: Stretch) -> Tensor:
        """What a stretch's tokens see."""
        return _seen(self.x, self.past, stretch, self.filters.shape[1])


def _allocate(call: _Long) -> tuple[Tensor]:
    return (call.x.new_empty(call.x.shape),)


def _forward(call: _Long) -> tuple[Tensor]:
    """The outputs, [B T D]."""
    (output,) = _allocate(call)
    for stretch in call.documents:
        convolve = _sums if call.direct else _by_fft
        length = stretch.stop - stretch.start
        output[:, stretch.start : stretch.stop] = convolve(call.seen(stretch), call.filters, length)
    return (output,)


def _backward(call: _Long, gradients: Gradients) -> dict[str, Tensor]:
    (d_output,), (x, filters, past, *_) = gradients.outputs, call
    assert d_output is not None
    wide = torch.promote_types(x.dtype, torch.float32)
    out = {"x": x.new_empty(x.shape), "filters": filters.new_zeros(filters.shape, dtype=wide)}
    if past is not None:
        out["past"] = past.new_zeros(past.shape)
    for stretch in call.documents:
        seen = call.seen(stretch)
        length = stretch.stop - stretch.start
        differentiate = _sums_backward if call.direct else _by_fft_backward
        d_new = d_output[:, stretch.start : stretch.stop].to(seen.dtype)
        d_seen, d_taps = differentiate(d_new, seen, filters)
        out["filters"][:, : d_taps.shape[1]] += d_taps
        out["x"][:, stretch.start : stretch.stop] = d_seen[:, -length:]
        if cached := seen.shape[1] - length:
            out["past"][stretch.rows, -cached:] = d_seen[:, :cached].to(out["past"].dtype)
    return out


OP = Op("long_convolution", _Long, fake=_allocate, forward=_forward, backward=_backward, outputs=1)


def _seen(x: Tensor, past: Tensor | None, stretch: Stretch, reach: int) -> Tensor:
    """What the tokens of a stretch see with filters of `reach` tokens: some of the past, and themselves; widened."""
    new = x[:, stretch.start : stretch.stop].to(torch.promote_types(x.dtype, torch.float32))
    if past is None:
        return new
    cached = min(past.shape[1], reach - 1)
    return torch.cat((past[stretch.rows, past.shape[1] - cached :].to(new.dtype), new), dim=1)


def _by_fft(seen: Tensor, filters: Tensor, length: int) -> Tensor:
    """The outputs of the last `length` tokens of those seen."""
    seen, taps = seen.transpose(1, 2), filters[:, : seen.shape[1]].to(seen.dtype)
    size = _fast_size(taps.shape[1] + length - 1)
    product = torch.fft.rfft(seen, n=size) * torch.fft.rfft(taps, n=size)
    # what wraps around lands on tokens before the last ones
    return torch.fft.irfft(product, n=size)[..., seen.shape[2] - length : seen.shape[2]].transpose(1, 2)


def _by_fft_backward(d_new: Tensor, seen: Tensor, filters: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of what was seen and of the taps that it met: correlations, where `_by_fft` has convolutions."""
    length = d_new.shape[1]
    width = seen.shape[1]
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
    taps = _reversed(filters, seen)
    first = seen.shape[1] - length
    return torch.stack([_newest(seen[:, : t + 1], taps) for t in range(first, seen.shape[1])], dim=1)


def _sums_backward(d_new: Tensor, seen: Tensor, filters: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of what was seen and of the taps that it met, by the definition."""
    taps = _reversed(filters, seen)
    first = seen.shape[1] - d_new.shape[1]
    d_seen = torch.zeros_like(seen)
    d_taps = torch.zeros_like(taps)
    for t in range(first, seen.shape[1]):
        met = min(t + 1, len(taps))
        above = d_new[:, t - first, None]
        d_seen[:, t + 1 - met : t + 1] += above * taps[-met:]
        d_taps[-met:] += (above * seen[:, t + 1 - met : t + 1]).sum(0)
    return d_seen, d_taps.flip(0).T


def _reversed(filters: Tensor, seen: Tensor) -> Tensor:
    """The taps that what was seen can meet, in its order: that of the newest last, [L D]."""
    return filters[:, : seen.shape[1]].T.to(seen.dtype).flip(0).contiguous()  # a module's lie as [L D]


def _newest(seen: Tensor, taps: Tensor) -> Tensor:
    """The output of the last token seen, [B D]."""
    met = min(seen.shape[1], taps.shape[0])
    return (seen[:, seen.shape[1] - met :] * taps[taps.shape[0] - met :]).sum(1)
