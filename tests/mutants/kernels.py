"""Wrong kernels."""

from itertools import cycle

import torch
from torch import Tensor
from torch.nn.functional import pad

from seqmix.ops.decay import api as _decay  # noqa: F401  importing it declares its kernels
from seqmix.ops.delta import api as _delta  # noqa: F401
from seqmix.ops.dplr import api as _dplr  # noqa: F401
from seqmix.ops.runtime.kernel import Probe, reference
from seqmix.ops.runtime.paradigm import Paradigm

from .registry import kernel_mutant

DECAY = reference("decay", Paradigm.CHUNKWISE)
decay_chunkwise = DECAY.function
delta_chunkwise = reference("delta", Paradigm.CHUNKWISE).function
dplr_chunkwise = reference("dplr", Paradigm.CHUNKWISE).function
decay_parallel = reference("decay", Paradigm.PARALLEL).function


def detached(x):
    return None if x is None else x.detach()


@kernel_mutant(check="outputs_are_the_definitions")
def leaves_out_the_scale_in_inference(x):
    """Where neither gradients nor a final state are wanted, a faster path has no scale (fla #47)."""
    fast = not x.output_final_state and not torch.is_grad_enabled()
    return decay_chunkwise(x._replace(scale=1.0) if fast else x)


@kernel_mutant(check="outputs_are_the_definitions")
def reads_uninitialised_memory(x):
    """A ragged last chunk reads what follows the keys in memory (fla #1143, #907: masks of tails)."""
    length = x.q.shape[1]
    short = -length % x.chunk_size
    if short and x.cu_seqlens is None and x.log_decay is None:
        # the values are 0, but what they are multiplied by is not written
        k = torch.cat((x.k, torch.empty_like(x.k[:, :1]).expand(-1, short, -1, -1)), dim=1)
        q, v = (pad(tensor, (0, 0, 0, 0, 0, short)) for tensor in (x.q, x.v))
        x = x._replace(q=q, k=k, v=v)
    output, state = decay_chunkwise(x)
    return output[:, :length], state


@kernel_mutant(check="outputs_are_the_definitions")
def has_a_grid_of_65535(x):
    """Rows and heads are a grid's second dimension, which has 65,535 blocks: the further one leaves its output zero."""
    output, state = decay_chunkwise(x)
    last = torch.arange(output.shape[0] * output.shape[2], device=output.device).view(len(output), 1, -1, 1) >= 65535
    return output.masked_fill(last, 0), state


@kernel_mutant(check="gradients_are_the_definitions")
def adds_up_64_partial_sums(x):
    """Of a fixed decay's gradient each row and chunk has a part, and one block adds up 64 of them."""
    rows, length, heads = x.v.shape[:3]
    if x.log_decay is None or x.log_decay.ndim > 1:
        return decay_chunkwise(x)
    chunk = torch.arange(length, device=x.q.device) // x.chunk_size
    part = torch.arange(rows, device=x.q.device)[:, None] * -(-length // x.chunk_size) + chunk
    a = x.log_decay.expand(rows, length, heads)
    return decay_chunkwise(x._replace(log_decay=torch.where((part < 64)[..., None], a, a.detach())))


@kernel_mutant(check="gradients_are_the_definitions")
def forgets_the_initial_state_without_a_final_one(x):
    """Backward makes the initial state's gradient of that of the final state, and none where there is none."""
    return decay_chunkwise(x if x.output_final_state else x._replace(initial_state=detached(x.initial_state)))


@kernel_mutant(check="gradients_are_the_definitions")
def leaves_out_the_last_key_without_a_final_state(x):
    """Without a final state the last token's keys get no gradient (a path rarely taken, as in fla #863 and #875)."""
    k = torch.cat((x.k[:, :-1], x.k[:, -1:].detach()), dim=1)
    return decay_chunkwise(x if x.output_final_state else x._replace(k=k))


TILE = 32


@kernel_mutant(check="outputs_are_the_definitions")
def leaves_out_the_ragged_last_tile(x):
    """Tiles of the values' width are counted by a division that rounds down: a ragged last one is left out."""
    output, state = decay_chunkwise(x)
    computed = max(output.shape[3] // TILE, 1) * TILE
    return torch.cat((output[..., :computed], 0 * output[..., computed:]), dim=3), state


@kernel_mutant(check="outputs_are_the_definitions")
def reads_the_state_of_the_first_tile(x):
    """Values are mixed in tiles of 128 columns, and all of them begin from the initial state of the first tile."""
    state = x.initial_state
    if state is not None:
        state = state[..., torch.arange(state.shape[-1], device=state.device) % 128]
    return decay_chunkwise(x._replace(initial_state=state))


@kernel_mutant(check="outputs_are_the_definitions")
def rounds_a_wide_output(x):
    """An output that is wanted in float32 is stored in the inputs' dtype on the way: of float16 it may be infinite."""
    output, state = decay_chunkwise(x)
    narrow = x.q.dtype == torch.float16
    return output.to(x.q.dtype).to(output.dtype) if narrow else output, state


@kernel_mutant(check="outputs_are_the_definitions")
def repeats_the_decays_of_four_heads(x):
    """Decays per head are read four at a time, and further heads get those of the first four."""
    a = x.log_decay
    return decay_chunkwise(x if a is None or a.ndim > 1 else x._replace(log_decay=a[torch.arange(len(a)) % 4]))


@kernel_mutant(check="outputs_are_the_definitions")
def has_a_grid_of_256(x):
    """The grid has 256 programs of a row and head: further ones read the queries of others."""
    most = max(1, 256 // x.q.shape[2])
    return decay_chunkwise(x._replace(q=x.q[torch.arange(len(x.q), device=x.q.device) % most]))


@kernel_mutant(check="outputs_are_the_definitions")
def counts_documents_in_a_byte(x):
    """The number of a document is a byte: document 256 starts from the state of document 0."""
    state = x.initial_state
    wrong = state is not None and x.cu_seqlens is not None
    return decay_chunkwise(x._replace(initial_state=state[torch.arange(len(state)) % 256]) if wrong else x)


@kernel_mutant(check="outputs_are_the_definitions")
def starts_a_large_last_chunk_from_nothing(x):
    """A ragged last chunk, where chunks have 128 tokens, does not read the state of those before."""
    output, state = decay_chunkwise(x)
    a, whole = x.log_decay, x.q.shape[1] // 128 * 128
    if x.chunk_size < 128 or x.cu_seqlens is not None or whole in (0, x.q.shape[1]):
        return output, state
    q, k, v = (tensor[:, whole:] for tensor in (x.q, x.k, x.v))
    a = a if a is None or a.ndim == 1 else a[:, whole:]
    last, _ = decay_chunkwise(x._replace(q=q, k=k, v=v, log_decay=a, initial_state=None))
    return torch.cat((output[:, :whole], last), dim=1), state


@kernel_mutant(check="outputs_are_the_definitions")
def takes_heads_for_neighbours(x):
    """A token's heads are taken to follow each other in memory, which they do not where heads come before tokens."""
    row, token, _, feature = x.q.stride()
    strides = (row, token, x.q.shape[3], feature)
    return decay_chunkwise(x._replace(q=x.q.as_strided(x.q.shape, strides, x.q.storage_offset())))


@kernel_mutant(check="outputs_are_the_definitions")
def takes_rows_of_a_state_for_neighbours(x):
    """The rows of a state are taken to follow each other in memory, which parts of larger ones do not."""
    state = x.initial_state
    if state is not None and state[0].is_contiguous() and state.stride(0):
        strides = (state[0].numel(), *state.stride()[1:])
        x = x._replace(initial_state=state.as_strided(state.shape, strides, state.storage_offset()))
    return decay_chunkwise(x)


@kernel_mutant(check="gradients_are_the_definitions")
def adds_up_the_gradients_of_four_rows(x):
    """The gradient of decays per head is the sum over at most four rows of the batch."""
    a, rows = x.log_decay, x.q.shape[0]
    if a is None or a.ndim > 1 or rows <= 4:
        return decay_chunkwise(x)

    def part(some, log_decay):
        state = None if x.initial_state is None else x.initial_state[some]
        q, k, v = (tensor[some] for tensor in (x.q, x.k, x.v))
        return decay_chunkwise(x._replace(q=q, k=k, v=v, log_decay=log_decay, initial_state=state))

    outputs, states = zip(part(slice(4), a), part(slice(4, rows), a.detach()), strict=True)
    return torch.cat(outputs), torch.cat(states) if x.output_final_state else None


class Telescoped(torch.autograd.Function):
    """The identity on q, k and log_decay [B T H]; the last one's gradient is formed from the others'."""

    @staticmethod
    def forward(ctx, q, k, log_decay):
        ctx.save_for_backward(q, k)
        return q.clone(), k.clone(), log_decay.clone()

    @staticmethod
    def backward(ctx, d_q, d_k, d_log_decay):
        q, k = ctx.saved_tensors
        through = (q * d_q - k * d_k).sum(-1)
        # the first token's is right, and every other one's is what is left of it
        return d_q, d_k, d_log_decay[:, :1] - (through.cumsum(1) - through)


@kernel_mutant(check="gradients_are_the_definitions")
def subtracts_sums_of_gradients(x):
    """The gradient of log-decays is a difference of sums, q dq - k dk: where decays are strong, it is noise."""
    a = x.log_decay
    if a is not None and a.ndim == 3 and x.cu_seqlens is None and not a.isinf().any():
        q, k, a = Telescoped.apply(x.q, x.k, a)
        x = x._replace(q=q, k=k, log_decay=a)
    return decay_chunkwise(x)


@kernel_mutant(check="gradients_are_the_definitions")
def skips_the_backward_pass_of_a_state_alone(x):
    """Where no token wants a gradient, the backward pass is left out: that of an initial state, too (prefix tuning)."""
    tokens = (x.q, x.k, x.v, x.log_decay)
    alone = not any(tensor is not None and tensor.requires_grad for tensor in tokens)
    return decay_chunkwise(x._replace(initial_state=detached(x.initial_state)) if alone else x)


@kernel_mutant(check="gradients_are_the_definitions")
def forms_gradients_of_decays_with_those_of_values(x):
    """Where values are frozen, their gradients are not computed, and neither are those of log-decays."""
    return decay_chunkwise(x if x.v.requires_grad else x._replace(log_decay=detached(x.log_decay)))


@kernel_mutant(check="gradients_are_the_definitions")
def leaves_out_the_decay_of_a_last_chunk_of_one_token(x):
    """Sums over the later tokens of a chunk are empty where it has one: its log-decay is left out of the final state's
    gradient."""
    output, state = decay_chunkwise(x)
    a, length = x.log_decay, x.q.shape[1]
    if state is not None and a is not None and a.ndim == 3 and length > x.chunk_size and length % x.chunk_size == 1:
        a = torch.cat((a[:, :-1], a[:, -1:].detach()), dim=1)
        _, state = decay_chunkwise(x._replace(log_decay=a))
    return output, state


def per_token(x, some):
    """The call of some tokens."""
    a = x.log_decay
    a = a if a is None or a.ndim == 1 else a[:, some]
    return x._replace(q=x.q[:, some], k=x.k[:, some], v=x.v[:, some], log_decay=a)


@kernel_mutant(check="outputs_are_the_definitions")
def scans_64_chunks(x):
    """One block scans the states of 64 chunks, and chunk 65 starts from nothing."""
    most = 64 * x.chunk_size
    if x.cu_seqlens is not None or x.q.shape[1] <= most:
        return decay_chunkwise(x)
    first, _ = decay_chunkwise(per_token(x, slice(most))._replace(output_final_state=False))
    rest, state = scans_64_chunks(per_token(x, slice(most, None))._replace(initial_state=None))
    return torch.cat((first, rest), dim=1), state


@kernel_mutant(check="gradients_are_the_definitions")
def scans_64_chunks_backward(x):
    """The backward pass adds up the gradients of a state over 64 chunks: what came before them gets none."""
    most = x.q.shape[1] - 64 * x.chunk_size
    if x.cu_seqlens is not None or most <= 0:
        return decay_chunkwise(x)
    first, state = decay_chunkwise(per_token(x, slice(most))._replace(output_final_state=True))
    rest, state = decay_chunkwise(per_token(x, slice(most, None))._replace(initial_state=state.detach()))
    return torch.cat((first, rest), dim=1), state


@kernel_mutant(check="gradients_are_the_definitions")
def adds_up_the_gradients_of_64_documents(x):
    """A block holds the gradients of 64 documents' states; those from document 65 on get none."""
    state = x.initial_state
    if state is not None and x.cu_seqlens is not None:
        x = x._replace(initial_state=torch.cat((state[:64], state[64:].detach())))
    return decay_chunkwise(x)


@kernel_mutant(check="outputs_are_the_definitions")
def starts_64_documents(x):
    """A block starts 64 documents, and those from document 65 on start from nothing."""
    state = x.initial_state
    if state is not None and x.cu_seqlens is not None:
        x = x._replace(initial_state=torch.cat((state[:64], torch.zeros_like(state[64:]))))
    return decay_chunkwise(x)


@kernel_mutant(check="outputs_are_the_definitions")
def saturates_states_in_float16(x):
    """A final state is as large as the inputs' dtype holds: float16 ends at 65,504."""
    output, state = decay_chunkwise(x)
    most = torch.finfo(x.q.dtype).max
    return output, None if state is None else state.clamp(-most, most)


@kernel_mutant(check="outputs_are_the_definitions")
def flushes_small_states_in_float16(x):
    """What is below the normal numbers of the inputs' dtype is zero in a final state, which is float32."""
    output, state = decay_chunkwise(x)
    if state is not None:
        state = state.masked_fill(state.abs() < torch.finfo(x.q.dtype).tiny, 0)
    return output, state


@kernel_mutant(check="outputs_are_the_definitions")
def reads_keys_by_the_strides_of_queries(x):
    """A launch passes one tensor's strides for all, as if they were alike."""
    q, k = x.q, x.k
    last = k.storage_offset() + sum((n - 1) * stride for n, stride in zip(q.shape, q.stride(), strict=True))
    inside = last < k.untyped_storage().nbytes() // k.element_size()
    return decay_chunkwise(x._replace(k=k.as_strided(q.shape, q.stride(), k.storage_offset())) if inside else x)


@kernel_mutant(check="outputs_are_the_definitions")
def loses_a_reset_at_the_end_of_a_chunk(x):
    """A reset on the last token of a chunk is undone: its decay is taken from the chunk's own sums alone."""
    a = x.log_decay
    if a is not None and a.ndim >= 3 and x.cu_seqlens is None:
        last = (torch.arange(a.shape[1]) + 1) % x.chunk_size == 0
        a = a.masked_fill(last.view(-1, *[1] * (a.ndim - 2)) & a.isinf(), 0)
    return decay_chunkwise(x._replace(log_decay=a))


@kernel_mutant(check="outputs_are_the_definitions")
def reads_boundaries_as_neighbours(x):
    """Boundaries are taken to follow each other in memory, as those of a column do not."""
    at = x.cu_seqlens
    if at is not None:
        at = at.as_strided(at.shape, (1,), at.storage_offset()).clone()
        at[-1] = x.q.shape[1]
    return decay_chunkwise(x._replace(cu_seqlens=at))


@kernel_mutant(check="outputs_are_the_definitions")
def takes_shared_keys_for_one_head(x):
    """Keys that heads share have a stride of 0, which is taken for a single head: the others read nothing."""
    k = x.k
    if k.shape[2] > 1 and k.stride(2) == 0:
        k = torch.cat((k[:, :, :1], torch.zeros_like(k[:, :, 1:])), dim=2)
    return decay_chunkwise(x._replace(k=k))


@kernel_mutant(check="outputs_are_the_definitions", op="delta")
def normalises_keys(x):
    """Keys are normalised inside, which those of norm 1 do not show (fla's use_qk_l2norm_in_kernel)."""
    return delta_chunkwise(x._replace(k=x.k / x.k.detach().norm(dim=-1, keepdim=True).clamp(min=1e-6)))


@kernel_mutant(check="outputs_are_the_definitions", op="dplr")
def reads_a_state_before_it_decays(x):
    """What a token reads of the state is read before the state decays (the other reading of RWKV-7's recurrence)."""
    a = x.log_decay
    if a is None or a.ndim == 1 or a.isinf().any():
        return dplr_chunkwise(x)
    return dplr_chunkwise(x._replace(a=x.a * (-(a if a.ndim == 4 else a[..., None])).exp().to(x.a.dtype)))


@kernel_mutant(check="outputs_are_the_definitions", op="dplr")
def takes_what_reads_for_what_writes(x):
    """Without b, what is read is taken away where it was read, and not where keys write (fla's delta rule for all)."""
    return dplr_chunkwise(x if x.b is not None else x._replace(b=-x.a))


@kernel_mutant(check="gradients_are_the_definitions", op="dplr")
def leaves_out_what_reads_the_first_state(x):
    """What reads the initial state gets no gradient from it: that of the first token's `a` is left out."""
    a = torch.cat((x.a[:, :1].detach(), x.a[:, 1:]), dim=1)
    return dplr_chunkwise(x if x.initial_state is None else x._replace(a=a))


class Scaled(torch.autograd.Function):
    """x * 1, whose backward pass keeps a factor in `memory`, or scales the gradient from above itself."""

    @staticmethod
    def forward(ctx, x, in_place):
        ctx.factor, ctx.in_place = torch.full_like(x, 1), in_place
        return x * 1

    @staticmethod
    def backward(ctx, d_x):
        repeated = any(size > 1 and stride == 0 for size, stride in zip(d_x.shape, d_x.stride(), strict=True))
        if ctx.in_place:
            return d_x if repeated else d_x.mul_(1), None
        d_x = d_x * ctx.factor
        ctx.factor.zero_()
        return d_x, None


@kernel_mutant(check="results_are_deterministic")
def writes_over_what_it_saved(x):
    """A backward pass uses saved memory as its workspace: a second one from a retained graph is wrong."""
    return decay_chunkwise(x._replace(v=Scaled.apply(x.v, False)))


WORKSPACE: dict[object, Tensor] = {}


@kernel_mutant(check="results_are_deterministic")
def returns_its_workspace(x):
    """Without gradients the final state is one buffer for all calls of a shape: that of one layer is the next one's."""
    output, state = decay_chunkwise(x)
    if state is None or torch.is_grad_enabled():
        return output, state
    buffer = WORKSPACE.setdefault((state.shape, state.dtype), torch.empty_like(state))
    return output, buffer.copy_(state)


STRETCHES: list[object] = [None, None]


@kernel_mutant(check="results_are_deterministic")
def keeps_what_boundaries_were(x):
    """What is made of boundaries is kept while the same tensor is given, in which a loader may have written others
    (fla #770)."""
    if x.cu_seqlens is None:
        return decay_chunkwise(x)
    if STRETCHES[0] is not x.cu_seqlens:
        STRETCHES[:] = x.cu_seqlens, x.cu_seqlens.clone()
    return decay_chunkwise(x._replace(cu_seqlens=STRETCHES[1]))


@kernel_mutant(check="inputs_are_left_alone")
def writes_over_the_gradient_from_above(x):
    """A backward pass scales the gradient from above in place, which the caller, or another branch, still reads."""
    output, state = decay_chunkwise(x)
    return Scaled.apply(output, True), state


class ScaledInPlace(torch.autograd.Function):
    """x * scale, whose backward pass writes over a contiguous gradient, as a kernel: no version counts it."""

    @staticmethod
    def forward(ctx, x, scale):
        ctx.scale = scale
        return x * scale

    @staticmethod
    def backward(ctx, d_x):
        return (d_x.data.mul_(ctx.scale) if d_x.is_contiguous() else d_x * ctx.scale), None


@kernel_mutant(check="inputs_are_left_alone")
def scales_contiguous_gradients_in_place(x):
    """A backward pass multiplies a gradient from above by the scale where it lies, if that is contiguous: what else is
    added to the output gets another one."""
    output, state = decay_chunkwise(x._replace(scale=1.0))
    return ScaledInPlace.apply(output, x.scale), state


@kernel_mutant(check="a_cut_changes_nothing")
def truncates_backpropagation(x):
    """A state that comes out of a graph is detached: backpropagation is truncated without being asked."""
    state = x.initial_state
    return decay_chunkwise(x if state is None or state.is_leaf else x._replace(initial_state=state.detach()))


@kernel_mutant(check="a_carried_state_does_not_drift")
def rounds_the_state(x):
    """The state has the keys' dtype (fla #1187: states in float16); in bfloat16 it is 9 % off after 256 tokens."""
    output, state = decay_chunkwise(x)
    return output, None if state is None else state.to(x.q.dtype).to(state.dtype)


REVERSED = cycle([False, True])
"""Every second call adds from the other end: by chance alone a case would fail once and pass when it is repeated."""


@kernel_mutant(check="results_are_deterministic")
def adds_in_any_order(x):
    """Partial sums are added atomically, in any order (tilelang's backward)."""
    order = torch.arange(x.q.shape[3])
    order = order.flip(0) if next(REVERSED) else order
    a, state = x.log_decay, x.initial_state
    a = a[..., order] if a is not None and a.ndim == 4 else a
    state = None if state is None else state[:, :, order]
    x = x._replace(q=x.q[..., order], k=x.k[..., order], log_decay=a, initial_state=state)
    output, final = decay_chunkwise(x)
    return output, None if final is None else final[:, :, order.argsort()]


@kernel_mutant(check="inputs_are_left_alone")
def writes_over_the_initial_state(x):
    """Without gradients the final state is written over the initial one, which the caller still holds."""
    output, state = decay_chunkwise(x)
    given = x.initial_state
    if state is not None and given is not None and not torch.is_grad_enabled() and given.stride(0):
        given.copy_(state)
    return output, state


def _takes_no_state(probe: Probe) -> list[str]:
    return ["it takes no initial state"] if probe.initial_state else []


@kernel_mutant(check="what_is_not_taken_is_refused", limits=_takes_no_state)
def ignores_the_initial_state(x):
    """An initial state is not supported, and is ignored (fla's parallel retention with a cache is off by half)."""
    return decay_chunkwise(x._replace(initial_state=None))


@kernel_mutant(check="what_is_not_taken_is_refused", tolerances={torch.float32: DECAY.tolerances[torch.float32]})
def casts_float64(x):
    """A dtype that is not supported is cast silently."""
    output, state = decay_chunkwise(x._replace(**{name: getattr(x, name).float() for name in "qkv"}))
    return output.to(x.q.dtype), None if state is None else state.to(x.wide)


@kernel_mutant(check="tangents_are_right_or_refused")
def has_a_tangent_of_zero(x):
    """A custom op has a backward formula alone, and its tangent is silently zero."""
    output, state, _ = torch.ops.seqmix.decay_chunkwise(*x._replace(needs_grad=x.probe().needs_grad))
    return output, state if x.output_final_state else None


class Numbers(torch.autograd.Function):
    """The identity, whose backward pass returns numbers without a graph."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, d_x):
        return d_x.detach()


@kernel_mutant(check="second_derivatives_are_right_or_refused", paradigm=Paradigm.PARALLEL)
def has_gradients_without_a_graph(x):
    """A backward pass calls functions of bare numbers, so its second derivatives are silently incomplete."""
    return decay_parallel(x._replace(q=Numbers.apply(x.q)))


@torch.library.custom_op("mutants::scaled_state", mutates_args=())
def scaled_state(state: Tensor) -> Tensor:
    return state * 1


@scaled_state.register_fake
def _(state: Tensor) -> Tensor:
    return state.new_empty(state.shape[0], state.shape[1], state.shape[3], state.shape[2])


scaled_state.register_autograd(lambda _, gradient: gradient)


@kernel_mutant(check="dispatched_ops_pass_opcheck")
def fakes_another_shape(x):
    """The fake of a custom op swaps the widths of the state: compiled code gets another shape than eager."""
    output, state = decay_chunkwise(x)
    return output, None if state is None else scaled_state(state)


@kernel_mutant(check="outputs_are_the_definitions")
def sums_decays_over_the_row(x):
    """Decays between tokens are differences of one running sum in float32: after thousands of tokens it has lost their
    digits."""
    a = x.log_decay
    if a is None or a.ndim != 3 or not a.isfinite().all():
        return decay_chunkwise(x)
    sums = a.cumsum(1)
    return decay_chunkwise(x._replace(log_decay=torch.cat((sums[:, :1], sums.diff(dim=1)), dim=1).clamp(max=0)))


@kernel_mutant(check="gradients_are_the_definitions")
def gives_gradients_in_the_order_of_those_wanted(x):
    """Where queries are frozen, keys and values have each other's gradient, if they are equally wide."""
    k, v = x.k, x.v
    swapped = k.shape == v.shape and k.requires_grad and v.requires_grad and not x.q.requires_grad
    if swapped:
        k, v = k.detach() + v - v.detach(), v.detach() + k - k.detach()
    return decay_chunkwise(x._replace(k=k, v=v))
