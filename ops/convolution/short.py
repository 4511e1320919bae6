"""The short causal convolution, one filter per channel over the last few tokens.

Notation: B batch, T tokens, D channels, W tokens of a filter, N packed documents.

    y_t = b + sum_{i<W} w[:, W-1-i] * x_{t-i}       state: the inputs before the segment, [W-1 D]

An activation may follow. It is an argument here, because a kernel computes it in the same pass.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple, Unpack

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ...registry import SeqmixError
from ..recurrence.family import require_packing
from ..runtime.call import Call, CallOptions
from ..runtime.kernel import FLOATS, Probe, chosen, declare_references
from ..runtime.packing import Documents
from ..runtime.paradigm import Paradigm

Activation = Literal["silu", "none"]


class ShortConvolutionInputs(NamedTuple):
    """Inputs of a kernel of the short convolution."""

    x: Tensor
    """Inputs, [B T D]."""
    weight: Tensor
    """Filters, [D W]; weight[:, -1] multiplies the newest token."""
    bias: Tensor | None = None
    """Bias, [D]."""
    initial_state: Tensor | None = None
    """Inputs before the segment, [N W-1 D], oldest first; None means zeros."""
    documents: Documents | None = None
    """Documents of a packed row; None if the batch is not packed."""
    output_final_state: bool = False
    """True if the final state is requested."""
    silu: bool = False
    """True if silu is applied to the output."""

    def probe(self) -> Probe:
        """Return the properties of this call that a kernel must support."""
        channels, width = self.weight.shape
        return Probe(device=self.x.device, dtype=self.x.dtype, key_width=width, value_width=channels)


class ConvolutionOutput(NamedTuple):
    """Result of a convolution."""

    output: Float[Tensor, "B T D"]
    """Output, in the dtype of the input."""
    final_state: Float[Tensor, "N _ D"] | None
    """Past inputs that later outputs depend on, oldest first; None unless requested."""


def short_convolution(
    x: Float[Tensor, "B T D"],
    weight: Float[Tensor, "D W"],
    bias: Float[Tensor, " D"] | None = None,
    call: Call | None = None,
    *,
    activation: Activation = "none",
    **options: Unpack[CallOptions],
) -> ConvolutionOutput:
    """Convolve each channel causally with its filter over the last W tokens, the token itself included.

    The state is [N W-1 D]. The reference is a sum of W shifted products, which a compiler can fuse with its
    neighbours. It takes less than half the time of torch's `conv1d`, forward and backward, on a CPU at T = 2048,
    D = 512, W = 4. Sums are formed in float32 (float64 for float64 inputs). All paradigms compute the same way.

    Args:
        x: inputs.
        weight: filters; weight[:, -1] multiplies the newest token, as in `nn.Conv1d`.
        bias: added to every output.
        call: the mixer's call; None if you call the op directly, with `options`.
        activation: function that is applied to the output, "silu" or "none".
        options: `CallOptions`; the state is the last W-1 inputs, oldest first, in the dtype of x; None means zeros.
            After a segment shorter than W-1, the final state still has inputs of the initial one.

    Raises:
        SeqmixError: shapes or dtypes do not match.
    """
    call = Call.resolve(call, x.shape[1], options, op="short_convolution", paradigm=Paradigm.PARALLEL)
    require_convolution(x, weight, call, "weight [D W] with W >= 1")
    if bias is not None and tuple(bias.shape) != (x.shape[2],):
        raise SeqmixError(f"the bias must be [{x.shape[2]}], got {list(bias.shape)}")
    state = _require_state(x, weight.shape[1] - 1, call)
    silu = activation == "silu"
    if call.cp_group is None:
        inputs = ShortConvolutionInputs(x, weight, bias, state, call.documents, call.return_state, silu)
        kernel = chosen("short_convolution", Paradigm.PARALLEL, "reference" if _is_step(x, call) else call.backend, x)
        return ConvolutionOutput(*kernel.function(inputs))
    combine = partial(_sum_shifted_products, weight=weight, bias=bias, silu=silu)
    return _combine_windows(x, weight.shape[1] - 1, combine, call)


def _is_step(x: Tensor, call: Call) -> bool:
    """True if the call is one decoding step, computed by plain operations that a compiler can fuse with others."""
    return x.shape[1] == 1 and call.documents is None


def short_convolution_reference(x: ShortConvolutionInputs) -> ConvolutionOutput:
    """Sum shifted products, in plain torch."""
    combine = partial(_sum_shifted_products, weight=x.weight, bias=x.bias, silu=x.silu)
    state = x.initial_state
    if state is None:
        rows = x.x.shape[0] if x.documents is None else x.documents.number
        state = x.x.new_zeros(rows, x.weight.shape[1] - 1, x.x.shape[2])
    return _combine_segment(x.x, combine, state, x.documents, x.output_final_state)


def shift_tokens(x: Tensor, call: Call) -> ConvolutionOutput:
    """Return x_{t-1} for every token, as a convolution with the filter [1, 0] would; the state is [N 1 D].

    Raises:
        SeqmixError: shapes do not match.
    """
    if x.ndim != 3 or x.shape[1] < 1:
        raise SeqmixError(f"x must be [B T D] with T >= 1, got {list(x.shape)}")
    require_packing(x, call.cu_seqlens)
    return _combine_windows(x, 1, lambda inputs: inputs[:, :-1], call)


def _combine_windows(x: Tensor, past: int, combine: Callable[[Tensor], Tensor], call: Call) -> ConvolutionOutput:
    """Apply `combine` to the windows of all tokens, and return its outputs and the last inputs.

    A window is a token and the `past` tokens before it; `combine` maps all inputs [B past+T D] to outputs [B T D].
    """
    state = _require_state(x, past, call)
    if state is None:
        state = x.new_zeros(call.rows(x.shape[0]), past, x.shape[2])
    if call.cp_group is None:
        return _combine_segment(x, combine, state, call.documents, call.return_state)
    local = call.cp_group.local(call.documents, x.shape[1])
    output, final = _combine_segment(x, combine, _entry_state(x, state, call), local, call.return_state)
    if final is not None:
        final = call.cp_group.final(final, call.documents, x.shape[1])
    return ConvolutionOutput(output, final)


def _require_state(x: Tensor, past: int, call: Call) -> Tensor | None:
    """Return the call's initial state in the dtype of x, or None; raise a SeqmixError if its shape does not fit."""
    if call.state is None:
        return None
    expected = [call.rows(x.shape[0]), past, x.shape[2]]
    if list(call.state.shape) != expected:
        raise SeqmixError(f"the initial state must be {expected}, got {list(call.state.shape)}")
    return call.state.to(x.dtype)


def _combine_segment(
    x: Tensor, combine: Callable[[Tensor], Tensor], state: Tensor, documents: Documents | None, return_state: bool
) -> ConvolutionOutput:
    """Apply `combine` to the windows of this process's tokens, from the state before them."""
    length, (rows, past, _) = x.shape[1], state.shape
    if documents is None:
        inputs = torch.cat((state, x), dim=1)
        # a view would keep the whole input alive
        return ConvolutionOutput(combine(inputs), inputs[:, length:].clone() if return_state else None)
    # lay all documents in one row, each after its own state; outputs whose window crosses a boundary are not selected
    cu_seqlens = documents.cu_seqlens
    token = torch.arange(length, device=x.device) + past * documents.of_token
    slot = past * torch.arange(rows, device=x.device)[:, None] + torch.arange(past, device=x.device)
    target = torch.cat(((cu_seqlens[:-1, None] + slot).flatten(), token + past))
    source = torch.empty_like(target).index_copy(0, target, torch.arange(len(target), device=x.device))
    inputs = torch.cat((state.flatten(0, 1), x[0])).index_select(0, source)
    output = combine(inputs[None]).index_select(1, token)
    return ConvolutionOutput(output, inputs[cu_seqlens[1:, None] + slot] if return_state else None)


def _entry_state(x: Tensor, state: Tensor, call: Call) -> Tensor:
    """Return the state before this rank's segment: the last inputs of the ranks before it."""
    cp = call.cp_group
    documents = call.documents
    length = x.shape[1]
    past = state.shape[1]
    assert cp is not None
    if not past:
        return state
    # if segments are shorter than the state, it spans several of them
    tails = cp.gather(x[:, -min(length, past) :])[: cp.rank].transpose(0, 1).flatten(1, 2)
    last_inputs = F.pad(tails, (0, 0, past, 0))[:, -past:]
    start = cp.start(length)
    slot = torch.arange(past, device=x.device)
    before = state
    if documents is not None:
        document = documents.of_token[:1]
        start = start - documents.cu_seqlens[document]
        before = state.index_select(0, document)
    # number of slots that the initial state still fills
    n_initial = past - torch.as_tensor(start, device=x.device).clamp(max=past)
    initial = before.index_select(1, (slot + past - n_initial).clamp(max=past - 1))
    return cp.continued(torch.where((slot < n_initial)[:, None], initial, last_inputs), state, documents)


def _sum_shifted_products(inputs: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """Return the outputs of all tokens with a whole window: [B W-1+T D] -> [B T D], in the dtype of the inputs."""
    dtype = inputs.dtype
    wide = torch.promote_types(inputs.dtype, torch.float32)
    length = inputs.shape[1] - weight.shape[1] + 1
    inputs = inputs.to(wide)
    # contiguous weights: 4x faster in 16 bits; separate multiply and add instead of addcmul: 20% faster backward
    oldest, *newer = weight.to(wide).T.contiguous().unbind()
    output = inputs.narrow(1, 0, length) * oldest
    for i, w in enumerate(newer, 1):
        output = output + inputs.narrow(1, i, length) * w
    if bias is not None:
        output = output + bias.to(wide)
    output = output.to(dtype)
    return F.silu(output) if silu else output


def require_convolution(x: Tensor, filters: Tensor, call: Call, expected: str) -> None:
    """Raise a SeqmixError for shapes or dtypes that do not match; `expected` describes the filters for the message."""
    if x.dtype not in FLOATS or filters.dtype not in FLOATS:
        raise SeqmixError(f"a convolution expects floating-point tensors, got {x.dtype} and {filters.dtype}")
    if x.ndim != 3 or x.shape[1] < 1 or filters.ndim != 2 or filters.shape[0] != x.shape[2] or filters.shape[1] < 1:
        raise SeqmixError(
            f"a convolution expects x [B T D] with T >= 1 and {expected}, got {list(x.shape)}, {list(filters.shape)}"
        )
    require_packing(x, call.cu_seqlens)


declare_references(
    "short_convolution",
    {
        Paradigm.PARALLEL: (
            short_convolution_reference,
            {torch.float64: 2e-15, torch.float32: 1e-6, torch.bfloat16: 1.2e-2, torch.float16: 1.5e-3},
        )
    },
)
