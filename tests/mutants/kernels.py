"""Kernels that are wrong on purpose, each in one way that a real one was, and the check that must catch it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import cycle, pairwise

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from seqmix.ops.decay.api import DecayOutput, decay_chunkwise, decay_parallel
from seqmix.ops.decay.chunkwise import chunkwise_op
from seqmix.ops.kernels import Kernel, Probe, reference, require_floats
from seqmix.ops.paradigm import Paradigm
from seqmix.ops.softmax.api import softmax_parallel
from seqmix.testing import KERNEL_CHECKS, Outcome, Status, check_kernel

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


def in_chunks(q, k, v, log_decay, *, initial_state, output_final_state, cu_seqlens, chunk_size, scale, between=None):
    """Chunk by chunk, document by document; `between` is what a mutant does to a state at a chunk's end."""
    borders = [0, q.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    outputs, states = [], []
    for n, (start, stop) in enumerate(pairwise(borders)):
        rows = slice(None) if cu_seqlens is None else slice(n, n + 1)
        state = None if initial_state is None else initial_state[rows]
        for at in range(start, stop, chunk_size):
            chunk = slice(at, min(at + chunk_size, stop))
            a = log_decay if log_decay is None or log_decay.ndim == 1 else log_decay[:, chunk]
            tokens = (x[:, chunk] for x in (q, k, v))
            output, state = decay_parallel(*tokens, a, scale=scale, initial_state=state, output_final_state=True)
            outputs.append(output)
            if between is not None:
                state = between(state, a, chunk, last=chunk.stop == stop)
        empty = torch.zeros(q.shape[0], *q.shape[2:], v.shape[3], device=q.device, dtype=_wide(q))
        states.append(empty if state is None else state.to(_wide(q)) + 0)  # no result is an input
    return DecayOutput(torch.cat(outputs, dim=1), torch.cat(states) if output_final_state else None)


HEALTHY = replace(reference("decay", Paradigm.CHUNKWISE), backend="healthy", function=in_chunks, reference=False)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


# ---- outputs_are_the_definitions


@decays(
    "outputs_are_the_definitions",
    "The decay is applied once too often at every chunk's border, as if one more token followed.",
    says="the output differs",
)
def decays_twice_at_chunk_borders(q, k, v, log_decay, **options):
    def between(state, a, chunk, last):
        if a is None or last:
            return state
        a = a[None] if a.ndim == 1 else a[:, -1]
        return state * a.to(state.dtype).exp()[(...,) + (None,) * (4 - a.ndim)]

    return in_chunks(q, k, v, log_decay, **options, between=between)


@decays(
    "outputs_are_the_definitions",
    "A ragged last chunk is padded with the head's decay, which shrinks the final state (transformers #46190).",
    says="the final state differs",
)
def pads_with_the_heads_decay(q, k, v, log_decay, *, chunk_size, **options):
    def between(state, a, chunk, last):
        padding = chunk_size - (chunk.stop - chunk.start)
        if not last or a is None or a.ndim > 1 or not padding:
            return state
        return state * (a * padding).exp()[:, None, None].to(state.dtype)

    return in_chunks(q, k, v, log_decay, chunk_size=chunk_size, **options, between=between)


@decays(
    "outputs_are_the_definitions",
    "A ragged last chunk reads what lies behind the keys and values in memory (fla #1143, #907: masks of tails).",
    says="values that are not finite",
)
def reads_uninitialised_memory(q, k, v, log_decay, **options):
    length = q.shape[1]
    short = -length % options["chunk_size"]
    if short and options["cu_seqlens"] is None and (log_decay is None or log_decay.ndim > 1):
        # the values are 0, but what they are multiplied by is not written
        k = torch.cat((k, torch.empty_like(k[:, :1]).expand(-1, short, -1, -1)), dim=1)
        q, v = (pad(x, (0, 0, 0, 0, 0, short)) for x in (q, v))
        log_decay = None if log_decay is None else pad(log_decay, (0, 0) * (log_decay.ndim - 2) + (0, short))
    output, state = decay_chunkwise(q, k, v, log_decay, **options)
    return DecayOutput(output[:, :length], state)


@decays(
    "outputs_are_the_definitions",
    "Inside a packed row the borders lie one token late, so a document's first token reads the one before.",
    says="differs in",
)
def leaks_a_token_over_the_border(q, k, v, log_decay, *, cu_seqlens, **options):
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.clone()
        cu_seqlens[1:-1] = (cu_seqlens[1:-1] + 1).clamp(max=q.shape[1])
    return decay_chunkwise(q, k, v, log_decay, cu_seqlens=cu_seqlens, **options)


@decays(
    "outputs_are_the_definitions",
    "Borders in int32, which flash-attention's callers pass, are read as int64.",
    says="raised",
)
def takes_int64_borders_only(q, k, v, log_decay, *, cu_seqlens, **options):
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.contiguous().view(torch.int64)
    return decay_chunkwise(q, k, v, log_decay, cu_seqlens=cu_seqlens, **options)


@decays(
    "outputs_are_the_definitions",
    "The output is as wide as the accumulator, float32 for bfloat16 inputs (fla compares no dtypes).",
    says="the output is float32",
)
def widens_the_output(q, k, v, log_decay, **options):
    output, state = decay_chunkwise(q, k, v, log_decay, **options)
    return DecayOutput(output.to(_wide(output)), state)


@decays(
    "outputs_are_the_definitions",
    "Where neither gradients nor a final state are wanted, a quicker way forgets the scale (fla #47).",
    says="the output differs",
)
def forgets_the_scale_in_inference(q, k, v, log_decay, *, scale, output_final_state, **options):
    if not output_final_state and not torch.is_grad_enabled():
        scale = 1.0
    return decay_chunkwise(q, k, v, log_decay, scale=scale, output_final_state=output_final_state, **options)


@decays(
    "outputs_are_the_definitions",
    "Slices of one fused projection are read as if they were contiguous (as fla #871 reads dy).",
    says="the output differs",
)
def assumes_contiguity(q, k, v, log_decay, **options):
    if not q.is_contiguous():
        q = q.as_strided(q.shape, q.new_empty(q.shape, device="meta").stride())
    return decay_chunkwise(q, k, v, log_decay, **options)


@attends(
    "outputs_are_the_definitions",
    "Grouped keys go to the wrong heads: they are repeated as a whole instead of one by one.",
    says="the output differs",
)
def repeats_key_heads_in_the_wrong_order(q, k, v, *, initial_state, output_final_state, **options):
    given = {"initial_state": initial_state, "output_final_state": output_final_state, **options}
    right, state = softmax_parallel(q, k, v, **given)
    if initial_state is not None:
        return right, state
    k, v = (x.repeat(1, 1, q.shape[2] // x.shape[2], 1) for x in (k, v))
    return softmax_parallel(q, k, v, **options)[0], state


@attends(
    "outputs_are_the_definitions",
    "With a cache the causal mask is aligned to the first key instead of to the last (SDPA's is_causal).",
    says="the output differs",
)
def aligns_the_mask_to_the_first_key(q, k, v, *, initial_state, cu_seqlens, **options):
    right, state = softmax_parallel(q, k, v, initial_state=initial_state, cu_seqlens=cu_seqlens, **options)
    if initial_state is None or cu_seqlens is not None:
        return right, state
    k, v = (torch.cat(pair, dim=1) for pair in ((initial_state.keys, k), (initial_state.values, v)))
    return scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, scale=options["scale"], enable_gqa=True
    ).transpose(1, 2), state


@attends(
    "outputs_are_the_definitions",
    "A window of w lets a query see w keys beside its own (flash-attention's convention).",
    says="the output differs",
)
def sees_one_key_more(q, k, v, *, window, **options):
    _, state = softmax_parallel(q, k, v, window=window, **options)
    more = None if window is None else window + 1
    options |= {"output_final_state": False}
    return softmax_parallel(q, k, v, window=more, **options)[0], state


# ---- gradients_are_the_definitions


@decays(
    "gradients_are_the_definitions",
    "The initial state gets no gradient: helion returns none, and fla's tests do not compare it for dense batches.",
    says="the gradient of state differs",
)
def forgets_the_initial_states_gradient(q, k, v, log_decay, *, initial_state, **options):
    state = None if initial_state is None else initial_state.detach()
    return decay_chunkwise(q, k, v, log_decay, initial_state=state, **options)


@decays(
    "gradients_are_the_definitions",
    "The final state's gradient is ignored (helion).",
    says="the gradient of",
)
def ignores_the_final_states_gradient(q, k, v, log_decay, **options):
    output, state = decay_chunkwise(q, k, v, log_decay, **options)
    return DecayOutput(output, None if state is None else state.detach())


@decays(
    "gradients_are_the_definitions",
    "The gradient of the log-decay lacks the final state's term: the reverse sum starts from 0, not from <S, dS>.",
    says="the gradient of log_decay differs",
)
def forgets_the_final_states_part_of_the_decays_gradient(q, k, v, log_decay, **options):
    output, _ = decay_chunkwise(q, k, v, log_decay, **options)
    _, state = decay_chunkwise(q, k, v, None if log_decay is None else log_decay.detach(), **options)
    return DecayOutput(output, state)


@decays(
    "gradients_are_the_definitions",
    "Without a final state the last token's keys get no gradient (a way rarely taken, as in fla #863 and #875).",
    says="the gradient of k differs",
)
def forgets_the_last_key_without_a_final_state(q, k, v, log_decay, *, output_final_state, **options):
    if not output_final_state:
        k = torch.cat((k[:, :-1], k[:, -1:].detach()), dim=1)
    return decay_chunkwise(q, k, v, log_decay, output_final_state=output_final_state, **options)


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
def subtracts_sums_of_gradients(q, k, v, log_decay, *, cu_seqlens, **options):
    if log_decay is not None and log_decay.ndim == 3 and cu_seqlens is None and not log_decay.isinf().any():
        q, k, log_decay = Telescoped.apply(q, k, log_decay)
    return decay_chunkwise(q, k, v, log_decay, cu_seqlens=cu_seqlens, **options)


# ---- a check of its own each


@decays(
    "a_cut_changes_nothing",
    "A state that comes out of a graph is detached: backpropagation is truncated without being asked.",
    says="the gradient of",
)
def truncates_backpropagation(q, k, v, log_decay, *, initial_state, **options):
    if initial_state is not None and not initial_state.is_leaf:
        initial_state = initial_state.detach()
    return decay_chunkwise(q, k, v, log_decay, initial_state=initial_state, **options)


@decays(
    "a_carried_state_does_not_drift",
    "The state is kept in the keys' dtype (fla #1187: states in float16); in bfloat16 it is 9 % off after 256 tokens.",
    says="one by one, against the definition of the whole",
)
def rounds_the_state(q, k, v, log_decay, **options):
    output, state = decay_chunkwise(q, k, v, log_decay, **options)
    return DecayOutput(output, None if state is None else state.to(q.dtype).to(state.dtype))


BACKWARDS = cycle([False, True])
"""Every second call adds from the other end: by chance alone a case would fail once and pass when it is made again."""


@decays(
    "results_are_deterministic",
    "Partial sums are added atomically, in any order (tilelang's backward).",
    says="a second call against the first",
)
def adds_in_any_order(q, k, v, log_decay, **options):
    order = torch.arange(q.shape[3])
    order = order.flip(0) if next(BACKWARDS) else order
    log_decay = log_decay[..., order] if log_decay is not None and log_decay.ndim == 4 else log_decay
    state = options.pop("initial_state")
    output, final = decay_chunkwise(
        q[..., order],
        k[..., order],
        v,
        log_decay,
        initial_state=None if state is None else state[:, :, order],
        **options,
    )
    return DecayOutput(output, None if final is None else final[:, :, order.argsort()])


@decays(
    "inputs_are_left_alone",
    "Without gradients the final state is written over the initial one, which the caller still holds.",
    says="state was written in place",
)
def writes_over_the_initial_state(q, k, v, log_decay, *, initial_state, **options):
    output, state = decay_chunkwise(q, k, v, log_decay, initial_state=initial_state, **options)
    if state is not None and initial_state is not None and not torch.is_grad_enabled() and initial_state.stride(0):
        initial_state.copy_(state)
    return DecayOutput(output, state)


@decays(
    "what_is_not_taken_is_refused",
    "A dtype that is not supported is cast without a word.",
    says="it gave numbers (the output is torch.int64)",
)
def computes_integers(q, k, v, log_decay, **options):
    given = q.dtype
    if not given.is_floating_point and not given.is_complex:
        q, k, v = q.float(), k.float(), v.float()
    output, state = decay_chunkwise(q, k, v, log_decay, **options)
    return DecayOutput(output.to(given), state)


def _takes_no_state(probe: Probe) -> list[str]:
    return ["it takes no initial state"] if probe.initial_state else []


@decays(
    "what_is_not_taken_is_refused",
    "An initial state is not supported, and is ignored: fla's parallel retention with a cache is off by half.",
    says="it takes no initial state",
    limits=_takes_no_state,
)
def ignores_the_initial_state(q, k, v, log_decay, *, initial_state, **options):
    return decay_chunkwise(q, k, v, log_decay, **options)


def _has_no_backward(probe: Probe) -> list[str]:
    return ["it has no backward pass"] if probe.needs_grad else []


@decays(
    "what_is_not_taken_is_refused",
    "There is no backward pass, and training goes on without gradients (fla #636, #1131, #1181).",
    says="it has no backward pass",
    limits=_has_no_backward,
)
def detaches_without_a_word(q, k, v, log_decay, **options):
    with torch.no_grad():
        return decay_chunkwise(q, k, v, log_decay, **options)


@decays(
    "tangents_are_right_or_refused",
    "A custom op has a backward formula alone, and its tangent is silently zero.",
    says="the tangent of",
)
def has_a_tangent_of_zero(q, k, v, log_decay, *, scale, initial_state, output_final_state, cu_seqlens, chunk_size):
    require_floats(q, k, v)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    inputs = (q, k, v, log_decay, initial_state)
    saves = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    output, state, _ = chunkwise_op(*inputs, cu_seqlens, scale, chunk_size, output_final_state, saves)
    return DecayOutput(output, state if output_final_state else None)


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
def fakes_another_shape(q, k, v, log_decay, **options):
    output, state = decay_chunkwise(q, k, v, log_decay, **options)
    return DecayOutput(output, None if state is None else scaled_state(state))
