"""Kernels that are wrong on purpose, each in one way that a real one was, and the check that must catch it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import cycle

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from seqmix.ops.decay import api as _decay  # noqa: F401  importing it declares its kernels
from seqmix.ops.kernels import Kernel, Probe, reference
from seqmix.ops.paradigm import Paradigm
from seqmix.ops.softmax import api as _softmax  # noqa: F401
from seqmix.testing import KERNEL_CHECKS, Outcome, Status, check_kernel

decay_chunkwise = reference("decay", Paradigm.CHUNKWISE).function
decay_parallel = reference("decay", Paradigm.PARALLEL).function
softmax_parallel = reference("softmax", Paradigm.PARALLEL).function

FEW = 40
"""Examples asked for of the checks that a mutant is not made for."""


@dataclass(frozen=True, eq=False)
class KernelMutant:
    """A wrong kernel."""

    kernel: Kernel
    check: str
    """The check that must catch it."""
    wrong: str
    """What is wrong, and where it was seen."""
    says: str
    """Part of what the failure must say."""

    @property
    def name(self) -> str:
        """As the function that computes it wrongly."""
        return self.kernel.backend


KERNEL_MUTANTS: list[KernelMutant] = []


def mutant(op: str, paradigm: Paradigm, check: str, wrong: str, *, says: str, **declared: object) -> Callable:
    """Register a function as a mutant of the reference; `declared` differs from what the reference declares."""

    def register(function: Callable) -> Callable:
        wrong_in = {"backend": function.__name__, "function": function, "reference": False, **declared}
        kernel = replace(reference(op, paradigm), **wrong_in)
        KERNEL_MUTANTS.append(KernelMutant(kernel, check, wrong, says))
        return function

    return register


decays = partial(mutant, "decay", Paradigm.CHUNKWISE)
attends = partial(mutant, "softmax", Paradigm.PARALLEL)


@cache
def own_outcome(mutant: KernelMutant) -> Outcome:
    """How the check ends that must catch it."""
    (outcome,) = check_kernel(mutant.kernel, checks=[mutant.check], examples=300, shrink=False).outcomes
    return outcome


@cache
def caught(mutant: KernelMutant) -> frozenset[str]:
    """The names of the checks that fail on it."""
    others = [name for name in KERNEL_CHECKS if name != mutant.check]
    outcomes = [own_outcome(mutant), *check_kernel(mutant.kernel, checks=others, examples=FEW, shrink=False).outcomes]
    return frozenset(outcome.check.name for outcome in outcomes if outcome.status is Status.FAILED)


# ---- the healthy one: chunks of the parallel form, a state handed on


def in_chunks(x, between=None):
    """Chunk by chunk, document by document; `between` is what a mutant does to a state at a chunk's end."""
    outputs, states = [], []
    for rows, start, stop in x.stretches:
        state = None if x.initial_state is None else x.initial_state[rows]
        for at in range(start, stop, x.chunk_size):
            chunk = slice(at, min(at + x.chunk_size, stop))
            part = given_per_token(x, lambda tensor, chunk=chunk: tensor[:, chunk])
            part = part._replace(initial_state=state, cu_seqlens=None, output_final_state=True)
            output, state = decay_parallel(part)
            outputs.append(output)
            if between is not None:
                state = between(state, part.log_decay, chunk, last=chunk.stop == stop)
        empty = torch.zeros(x.q.shape[0], *x.matrix, device=x.q.device, dtype=x.wide)
        states.append(empty if state is None else state.to(x.wide) + 0)  # no result is an input
    return torch.cat(outputs, dim=1), torch.cat(states) if x.output_final_state else None


def given_per_token(x, change):
    """The call with another tensor for each that has one row per token."""
    log_decay = x.log_decay if x.log_decay is None or x.log_decay.ndim == 1 else change(x.log_decay)
    return x._replace(q=change(x.q), k=change(x.k), v=change(x.v), log_decay=log_decay)


HEALTHY = replace(reference("decay", Paradigm.CHUNKWISE), backend="healthy", function=in_chunks, reference=False)


def detached(x):
    return None if x is None else x.detach()


# ---- outputs_are_the_definitions


@decays(
    "outputs_are_the_definitions",
    "The decay is applied once too often at every chunk's boundary, as if one more token followed.",
    says="the output differs",
)
def decays_twice_at_chunk_boundaries(x):
    def between(state, a, chunk, last):
        if a is None or last:
            return state
        a = a[None] if a.ndim == 1 else a[:, -1]
        return state * a.to(state.dtype).exp()[(...,) + (None,) * (4 - a.ndim)]

    return in_chunks(x, between)


@decays(
    "outputs_are_the_definitions",
    "A ragged last chunk is padded with the head's decay, which shrinks the final state (transformers #46190).",
    says="the final state differs",
)
def pads_with_the_heads_decay(x):
    def between(state, a, chunk, last):
        padding = x.chunk_size - (chunk.stop - chunk.start)
        if not last or a is None or a.ndim > 1 or not padding:
            return state
        return state * (a * padding).exp()[:, None, None].to(state.dtype)

    return in_chunks(x, between)


@decays(
    "outputs_are_the_definitions",
    "A ragged last chunk reads what lies behind the keys and values in memory (fla #1143, #907: masks of tails).",
    says="values that are not finite",
)
def reads_uninitialised_memory(x):
    length = x.q.shape[1]
    short = -length % x.chunk_size
    if short and x.cu_seqlens is None and (x.log_decay is None or x.log_decay.ndim > 1):
        # the values are 0, but what they are multiplied by is not written
        k = torch.cat((x.k, torch.empty_like(x.k[:, :1]).expand(-1, short, -1, -1)), dim=1)
        x = given_per_token(x, lambda tensor: pad(tensor, (0, 0) * (tensor.ndim - 2) + (0, short)))._replace(k=k)
    output, state = decay_chunkwise(x)
    return output[:, :length], state


@decays(
    "outputs_are_the_definitions",
    "Inside a packed row the boundaries lie one token late, so a document's first token reads the one before.",
    says="differs in",
)
def leaks_a_token_over_the_boundary(x):
    if x.cu_seqlens is None:
        return decay_chunkwise(x)
    cu_seqlens = x.cu_seqlens.clone()
    cu_seqlens[1:-1] = (cu_seqlens[1:-1] + 1).clamp(max=x.q.shape[1])
    return decay_chunkwise(x._replace(cu_seqlens=cu_seqlens))


@decays(
    "outputs_are_the_definitions",
    "Boundaries in int32, which flash-attention's callers pass, are read as int64.",
    says="raised",
)
def takes_int64_boundaries_only(x):
    if x.cu_seqlens is not None:
        x = x._replace(cu_seqlens=x.cu_seqlens.contiguous().view(torch.int64))
    return decay_chunkwise(x)


@decays(
    "outputs_are_the_definitions",
    "The output is as wide as the accumulator, float32 for bfloat16 inputs (fla compares no dtypes).",
    says="the output is float32",
)
def widens_the_output(x):
    output, state = decay_chunkwise(x)
    return output.to(x.wide), state


@decays(
    "outputs_are_the_definitions",
    "Where neither gradients nor a final state are wanted, a quicker way forgets the scale (fla #47).",
    says="the output differs",
)
def forgets_the_scale_in_inference(x):
    forgets = not x.output_final_state and not torch.is_grad_enabled()
    return decay_chunkwise(x._replace(scale=1.0) if forgets else x)


@decays(
    "outputs_are_the_definitions",
    "Slices of one fused projection are read as if they were contiguous (as fla #871 reads dy).",
    says="the output differs",
)
def assumes_contiguity(x):
    strides = x.q.new_empty(x.q.shape, device="meta").stride()
    return decay_chunkwise(x if x.q.is_contiguous() else x._replace(q=x.q.as_strided(x.q.shape, strides)))


@attends(
    "outputs_are_the_definitions",
    "Grouped keys go to the wrong heads: they are repeated as a whole instead of one by one.",
    says="the output differs",
)
def repeats_key_heads_in_the_wrong_order(x):
    right, state = softmax_parallel(x)
    if x.cache is not None:
        return right, state
    k, v = (tensor.repeat(1, 1, x.q.shape[2] // tensor.shape[2], 1) for tensor in (x.k, x.v))
    return softmax_parallel(x._replace(k=k, v=v, output_final_state=False))[0], state


@attends(
    "outputs_are_the_definitions",
    "With a cache the causal mask is aligned to the first key instead of to the last (SDPA's is_causal).",
    says="the output differs",
)
def aligns_the_mask_to_the_first_key(x):
    right, state = softmax_parallel(x)
    if x.cache is None or x.documents is not None:
        return right, state
    k, v = (torch.cat(pair, dim=1) for pair in ((x.cache.keys, x.k), (x.cache.values, x.v)))
    q, k, v = (tensor.transpose(1, 2) for tensor in (x.q, k, v))
    wrong = scaled_dot_product_attention(q, k, v, is_causal=True, scale=x.scale, enable_gqa=True)
    return wrong.transpose(1, 2), state


@attends(
    "outputs_are_the_definitions",
    "A window of w lets a query see w keys beside its own (flash-attention's convention).",
    says="the output differs",
)
def sees_one_key_more(x):
    _, state = softmax_parallel(x)
    more = None if x.window is None else x.window + 1
    return softmax_parallel(x._replace(window=more, output_final_state=False))[0], state


# ---- gradients_are_the_definitions


@decays(
    "gradients_are_the_definitions",
    "The initial state gets no gradient: helion returns none, and fla's tests do not compare it for dense batches.",
    says="the gradient of state differs",
)
def forgets_the_initial_states_gradient(x):
    return decay_chunkwise(x._replace(initial_state=detached(x.initial_state)))


@decays(
    "gradients_are_the_definitions",
    "The final state's gradient is ignored (helion).",
    says="the gradient of",
)
def ignores_the_final_states_gradient(x):
    output, state = decay_chunkwise(x)
    return output, detached(state)


@decays(
    "gradients_are_the_definitions",
    "The gradient of the log-decay lacks the final state's term: the reverse sum starts from 0, not from <S, dS>.",
    says="the gradient of log_decay differs",
)
def forgets_the_final_states_part_of_the_decays_gradient(x):
    return decay_chunkwise(x)[0], decay_chunkwise(x._replace(log_decay=detached(x.log_decay)))[1]


@decays(
    "gradients_are_the_definitions",
    "Without a final state the last token's keys get no gradient (a way rarely taken, as in fla #863 and #875).",
    says="the gradient of k differs",
)
def forgets_the_last_key_without_a_final_state(x):
    k = torch.cat((x.k[:, :-1], x.k[:, -1:].detach()), dim=1)
    return decay_chunkwise(x if x.output_final_state else x._replace(k=k))


class Telescoped(torch.autograd.Function):
    """The identity on q, k and log_decay [B T H], of which the last one's gradient is formed from the others'."""

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


@decays(
    "gradients_are_the_definitions",
    "The gradient of given log-decays is a difference of sums, q dq - k dk: where decays are strong, it is noise.",
    says="the gradient of log_decay differs",
)
def subtracts_sums_of_gradients(x):
    a = x.log_decay
    if a is not None and a.ndim == 3 and x.cu_seqlens is None and not a.isinf().any():
        q, k, a = Telescoped.apply(x.q, x.k, a)
        x = x._replace(q=q, k=k, log_decay=a)
    return decay_chunkwise(x)


# ---- a check of its own each


@decays(
    "a_cut_changes_nothing",
    "A state that comes out of a graph is detached: backpropagation is truncated without being asked.",
    says="the gradient of",
)
def truncates_backpropagation(x):
    state = x.initial_state
    return decay_chunkwise(x if state is None or state.is_leaf else x._replace(initial_state=state.detach()))


@decays(
    "a_carried_state_does_not_drift",
    "The state is kept in the keys' dtype (fla #1187: states in float16); in bfloat16 it is 9 % off after 256 tokens.",
    says="one by one, against the definition of the whole",
)
def rounds_the_state(x):
    output, state = decay_chunkwise(x)
    return output, None if state is None else state.to(x.q.dtype).to(state.dtype)


BACKWARDS = cycle([False, True])
"""Every second call adds from the other end: by chance alone a case would fail once and pass when it is made again."""


@decays(
    "results_are_deterministic",
    "Partial sums are added atomically, in any order (tilelang's backward).",
    says="a second call against the first",
)
def adds_in_any_order(x):
    order = torch.arange(x.q.shape[3])
    order = order.flip(0) if next(BACKWARDS) else order
    a, state = x.log_decay, x.initial_state
    a = a[..., order] if a is not None and a.ndim == 4 else a
    state = None if state is None else state[:, :, order]
    x = x._replace(q=x.q[..., order], k=x.k[..., order], log_decay=a, initial_state=state)
    output, final = decay_chunkwise(x)
    return output, None if final is None else final[:, :, order.argsort()]


@decays(
    "inputs_are_left_alone",
    "Without gradients the final state is written over the initial one, which the caller still holds.",
    says="state was written in place",
)
def writes_over_the_initial_state(x):
    output, state = decay_chunkwise(x)
    given = x.initial_state
    if state is not None and given is not None and not torch.is_grad_enabled() and given.stride(0):
        given.copy_(state)
    return output, state


@decays(
    "what_is_not_taken_is_refused",
    "A dtype that is not supported is cast without a word.",
    says="it gave numbers (the output is torch.float64)",
    tolerances={torch.float32: reference("decay", Paradigm.CHUNKWISE).tolerances[torch.float32]},
)
def casts_float64(x):
    output, state = decay_chunkwise(x._replace(**{name: getattr(x, name).float() for name in "qkv"}))
    return output.to(x.q.dtype), None if state is None else state.to(x.wide)


def _takes_no_state(probe: Probe) -> list[str]:
    return ["it takes no initial state"] if probe.initial_state else []


@decays(
    "what_is_not_taken_is_refused",
    "An initial state is not supported, and is ignored: fla's parallel retention with a cache is off by half.",
    says="it takes no initial state",
    limits=_takes_no_state,
)
def ignores_the_initial_state(x):
    return decay_chunkwise(x._replace(initial_state=None))


def _has_no_backward(probe: Probe) -> list[str]:
    return ["it has no backward pass"] if probe.needs_grad else []


@decays(
    "what_is_not_taken_is_refused",
    "There is no backward pass, and training goes on without gradients (fla #636, #1131, #1181).",
    says="it has no backward pass",
    limits=_has_no_backward,
)
def detaches_without_a_word(x):
    with torch.no_grad():
        return decay_chunkwise(x)


@decays(
    "tangents_are_right_or_refused",
    "A custom op has a backward formula alone, and its tangent is silently zero.",
    says="the tangent of",
)
def has_a_tangent_of_zero(x):
    output, state, _ = torch.ops.seqmix.decay_chunkwise(*x._replace(needs_grad=x.probe().needs_grad))
    return output, state if x.output_final_state else None


@torch.library.custom_op("mutants::scaled_state", mutates_args=())
def scaled_state(state: Tensor) -> Tensor:
    return state * 1


@scaled_state.register_fake
def _(state: Tensor) -> Tensor:
    return state.new_empty(state.shape[0], state.shape[1], state.shape[3], state.shape[2])


scaled_state.register_autograd(lambda _, gradient: gradient)


@decays(
    "dispatched_ops_pass_opcheck",
    "The fake of a custom op has the state's widths the wrong way round: compiled code gets another shape than eager.",
    says="fails opcheck's test_faketensor",
)
def fakes_another_shape(x):
    output, state = decay_chunkwise(x)
    return output, None if state is None else scaled_state(state)
