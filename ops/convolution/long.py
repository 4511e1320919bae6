"""The long causal convolution, one filter per channel over all tokens.

Notation: B batch, T tokens, D channels, L tokens of a filter, P cached inputs, N packed documents.

    y_t = sum_{i<L} h[:, i] * x_{t-i}       state: the inputs before the segment, [P D]; earlier inputs count as zero

The parallel paradigm uses FFTs; the recurrent one evaluates the sum. Both are in one custom op with its own backward
pass, so that a compiler need not trace complex numbers or documents' lengths, and spectra are not saved for backward.
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
    """Convolve each channel causally with its filter, over all tokens so far; the state [N P D] is the past inputs.

    The parallel paradigm (the default) uses FFTs and takes (P + T) log(P + T) time. The recurrent paradigm sums over
    the cached inputs, P operations per token. In both, a packed document costs what it would cost alone. Sums are
    formed in float32 (float64 for float64 inputs).

    The rounding error of an FFT grows with the largest input of its row and channel, later inputs included. So outputs
    are independent of later inputs only up to rounding, and an inf or nan spoils earlier outputs of its channel. The
    recurrent paradigm has neither defect. In a context-parallel group every rank gathers the row and convolves it up to
    its own last token.

    Args:
        x: inputs.
        filters: filters[:, i] multiplies the input i tokens ago; inputs more than L - 1 tokens ago are ignored.
        call: the mixer's call; None if you call the op directly, with `options`.
        grows: True if the final state keeps P + T inputs of each row (or packed document); otherwise the last P.
        options: `CallOptions`; the initial state has the inputs before the first token, oldest first. The final state
            has the dtype of the initial one, or that of x if there is none.

    Raises:
        SeqmixError: shapes or dtypes do not match; the paradigm does not exist; an input has a tangent (forward-mode
            differentiation is supported for a single recurrent token only).
    """
    call = Call.resolve(call, x.shape[1], options, op="long_convolution", paradigm=Paradigm.PARALLEL)
    require_convolution(x, filters, call, "filters [D L] with L >= 1")
    rows = call.rows(x.shape[0])
    state = call.state
    if state is not None and (state.ndim != 3 or (state.shape[0], state.shape[2]) != (rows, x.shape[2])):
        raise SeqmixError(f"the initial state must be [{rows}, P, {x.shape[2]}] with any P, got {list(state.shape)}")
    if call.paradigm is Paradigm.CHUNKWISE:
        raise SeqmixError(
            "a long convolution expects the parallel or recurrent paradigm, got chunkwise: set paradigm=parallel"
        )
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
        # plain operations: a compiler can fuse them with their neighbours
        window = _inputs_in_reach(x, state, Stretch(slice(None), 0, 1), filters.shape[1])
        output = _last_output(window, _reversed_taps(filters, window)).to(x.dtype)[:, None]
    else:
        cu_seqlens = None if documents is None else documents.cu_seqlens
        boundaries = None if documents is None else documents.boundaries
        (output,) = OP(_LongInputs(x, filters, state, cu_seqlens, boundaries, call.paradigm is Paradigm.RECURRENT))
    final = _final_state(row, state, grows, call.cu_seqlens) if call.return_state else None
    return ConvolutionOutput(output[:, x.shape[1] - length :], final)


def _final_state(x: Tensor, past: Tensor | None, grows: bool, cu_seqlens: Tensor | None) -> Tensor:
    """Return all inputs read so far, right-aligned: [N P+T D], or the last P of them."""
    length, width = x.shape[1:]
    rows = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    past = x.new_zeros(rows, 0, width) if past is None else past
    cached = past.shape[1]
    if cu_seqlens is None:
        inputs = torch.cat((past, x.to(past.dtype)), dim=1)
        return inputs if grows else inputs[:, length:].clone()
    slots = cached + length if grows else cached
    back = torch.arange(slots - 1, -1, -1, device=x.device)  # tokens between a slot and the row's end
    back_in_past = back - cu_seqlens.diff()[:, None]  # negative where the slot holds a token of this segment
    new = rows * cached + cu_seqlens[1:, None] - 1 - back
    old = cached * torch.arange(1, rows + 1, device=x.device)[:, None] - 1 - back_in_past
    # gather from: the old rows, the new tokens, and one zero for empty slots
    source = torch.where(back_in_past < 0, new, old.masked_fill(back_in_past >= cached, rows * cached + length))
    return torch.cat((past.flatten(0, 1), x[0].to(past.dtype), past.new_zeros(1, width)))[source]


class _LongInputs(NamedTuple):
    """Inputs of the op; `past` is the initial state, [N P D]."""

    x: Tensor
    filters: Tensor
    past: Tensor | None
    cu_seqlens: Tensor | None
    boundaries: Sequence[int] | None
    sums_directly: bool
    """True to evaluate the sum over inputs directly, False to use FFTs."""

    @property
    def documents(self) -> Iterator[Stretch]:
        """Non-empty documents; the whole batch if it is not packed."""
        documents = stretches(self.x.shape[0], self.x.shape[1], self.cu_seqlens, self.boundaries)
        return (document for document in documents if document.stop > document.start)

    def inputs_in_reach(self, document: Stretch) -> Tensor:
        """Return the inputs that the outputs of a document depend on, [B|1 P'+T' D]: cached ones, then its own."""
        return _inputs_in_reach(self.x, self.past, document, self.filters.shape[1])


def _allocate(call: _LongInputs) -> tuple[Tensor]:
    return (call.x.new_empty(call.x.shape),)


def _forward(call: _LongInputs) -> tuple[Tensor]:
    """Compute the outputs, [B T D]."""
    (output,) = _allocate(call)
    for document in call.documents:
        convolve = _convolve_by_sums if call.sums_directly else _convolve_by_fft
        length = document.stop - document.start
        output[:, document.start : document.stop] = convolve(call.inputs_in_reach(document), call.filters, length)
    return (output,)


def _backward(call: _LongInputs, gradients: Gradients) -> dict[str, Tensor]:
    (d_output,), (x, filters, past, *_) = gradients.outputs, call
    assert d_output is not None
    wide = torch.promote_types(x.dtype, torch.float32)
    out = {"x": x.new_empty(x.shape), "filters": filters.new_zeros(filters.shape, dtype=wide)}
    if past is not None:
        out["past"] = past.new_zeros(past.shape)
    for document in call.documents:
        inputs = call.inputs_in_reach(document)
        length = document.stop - document.start
        differentiate = _sums_backward if call.sums_directly else _fft_backward
        d_new = d_output[:, document.start : document.stop].to(inputs.dtype)
        d_inputs, d_taps = differentiate(d_new, inputs, filters)
        out["filters"][:, : d_taps.shape[1]] += d_taps
        out["x"][:, document.start : document.stop] = d_inputs[:, -length:]
        if cached := inputs.shape[1] - length:
            out["past"][document.rows, -cached:] = d_inputs[:, :cached].to(out["past"].dtype)
    return out


OP = Op("long_convolution", _LongInputs, fake=_allocate, forward=_forward, backward=_backward, outputs=1)


def _inputs_in_reach(x: Tensor, past: Tensor | None, document: Stretch, reach: int) -> Tensor:
    """Return the inputs that a document's outputs depend on, float32 or wider: cached ones, then the document's own.

    `reach` is the number of tokens of a filter.
    """
    new = x[:, document.start : document.stop].to(torch.promote_types(x.dtype, torch.float32))
    if past is None:
        return new
    cached = min(past.shape[1], reach - 1)
    return torch.cat((past[document.rows, past.shape[1] - cached :].to(new.dtype), new), dim=1)


def _convolve_by_fft(inputs: Tensor, filters: Tensor, length: int) -> Tensor:
    """Return the outputs of the last `length` inputs, computed by FFT."""
    inputs, taps = inputs.transpose(1, 2), filters[:, : inputs.shape[1]].to(inputs.dtype)
    size = _fast_size(taps.shape[1] + length - 1)
    product = torch.fft.rfft(inputs, n=size) * torch.fft.rfft(taps, n=size)
    # the circular convolution wraps around onto earlier tokens only
    return torch.fft.irfft(product, n=size)[..., inputs.shape[2] - length : inputs.shape[2]].transpose(1, 2)


def _fft_backward(d_new: Tensor, inputs: Tensor, filters: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of the inputs and of the filter taps that multiply them: correlations, computed by FFT."""
    length = d_new.shape[1]
    width = inputs.shape[1]
    inputs, taps = inputs.transpose(1, 2), filters[:, :width].to(inputs.dtype)
    size = _fast_size(taps.shape[1] + length - 1)
    d_new = torch.fft.rfft(F.pad(d_new.transpose(1, 2), (width - length, 0)), n=size)
    d_inputs = torch.fft.irfft(d_new * torch.fft.rfft(taps, n=size).conj(), n=size)[..., :width]
    d_taps = torch.fft.irfft((d_new * torch.fft.rfft(inputs, n=size).conj()).sum(0), n=size)[:, : taps.shape[1]]
    return d_inputs.transpose(1, 2), d_taps


def _fast_size(at_least: int) -> int:
    """Return the smallest fast FFT size that is at least `at_least`: a power of two times 1, 3, 5, 9 or 15."""
    return min(odd << (-(-at_least // odd) - 1).bit_length() for odd in (1, 3, 5, 9, 15))


def _convolve_by_sums(inputs: Tensor, filters: Tensor, length: int) -> Tensor:
    """Return the outputs of the last `length` inputs, by the definition."""
    taps = _reversed_taps(filters, inputs)
    first = inputs.shape[1] - length
    return torch.stack([_last_output(inputs[:, : t + 1], taps) for t in range(first, inputs.shape[1])], dim=1)


def _sums_backward(d_new: Tensor, inputs: Tensor, filters: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of the inputs and of the filter taps that multiply them, by the definition."""
    taps = _reversed_taps(filters, inputs)
    first = inputs.shape[1] - d_new.shape[1]
    d_inputs = torch.zeros_like(inputs)
    d_taps = torch.zeros_like(taps)
    for t in range(first, inputs.shape[1]):
        reach = min(t + 1, len(taps))
        d_t = d_new[:, t - first, None]
        d_inputs[:, t + 1 - reach : t + 1] += d_t * taps[-reach:]
        d_taps[-reach:] += (d_t * inputs[:, t + 1 - reach : t + 1]).sum(0)
    return d_inputs, d_taps.flip(0).T


def _reversed_taps(filters: Tensor, inputs: Tensor) -> Tensor:
    """Return the taps within reach of the inputs in the inputs' order, the newest input's tap last: [L D]."""
    return filters[:, : inputs.shape[1]].T.to(inputs.dtype).flip(0).contiguous()  # a module's filters lie as [L D]


def _last_output(inputs: Tensor, taps: Tensor) -> Tensor:
    """Return the output of the last input, [B D]."""
    reach = min(inputs.shape[1], taps.shape[0])
    return (inputs[:, inputs.shape[1] - reach :] * taps[taps.shape[0] - reach :]).sum(1)
