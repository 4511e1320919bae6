"""Wrong kernels."""

from itertools import cycle

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from seqmix.ops.decay import api as _decay  # noqa: F401  importing it declares its kernels
from seqmix.ops.runtime.kernel import Probe, reference
from seqmix.ops.runtime.paradigm import Paradigm

from .registry import kernel_mutant

decay_chunkwise = reference("decay", Paradigm.CHUNKWISE).function
decay_parallel = reference("decay", Paradigm.PARALLEL).function
softmax_parallel = reference("softmax", Paradigm.PARALLEL).function


def detached(x):
    return None if x is None else x.detach()


@kernel_mutant(check="outputs_are_the_definitions", after="fla #47: the path of inference lacked the scale")
def leaves_out_the_scale_in_inference(x):
    """Where neither gradients nor a final state are wanted, a faster path has no scale."""
    fast = not x.output_final_state and not torch.is_grad_enabled()
    return decay_chunkwise(x._replace(scale=1.0) if fast else x)


@kernel_mutant(check="outputs_are_the_definitions", after="fla #1143 and #907: masks of tails")
def reads_uninitialised_memory(x):
    """A ragged last chunk reads what follows the keys in memory."""
    length = x.q.shape[1]
    short = -length % x.chunk_size
    if short and x.cu_seqlens is None and x.log_decay is None:
        # the values are 0, but what they are multiplied by is not written
        k = torch.cat((x.k, torch.empty_like(x.k[:, :1]).expand(-1, short, -1, -1)), dim=1)
        q, v = (pad(tensor, (0, 0, 0, 0, 0, short)) for tensor in (x.q, x.v))
        x = x._replace(q=q, k=k, v=v)
    output, state = decay_chunkwise(x)
    return output[:, :length], state


@kernel_mutant(check="gradients_are_the_definitions", after="fla: dh0 is compared by no test, and was wrong")
def forgets_the_initial_state_without_a_final_one(x):
    """Backward makes the initial state's gradient of that of the final state, and none where there is none."""
    return decay_chunkwise(x if x.output_final_state else x._replace(initial_state=detached(x.initial_state)))


@kernel_mutant(check="gradients_are_the_definitions", after="fla #863 and #875: a gradient of a path rarely taken")
def leaves_out_the_last_key_without_a_final_state(x):
    """Without a final state the last token's keys get no gradient (a path rarely taken, as in fla #863 and #875)."""
    k = torch.cat((x.k[:, :-1], x.k[:, -1:].detach()), dim=1)
    return decay_chunkwise(x if x.output_final_state else x._replace(k=k))


@kernel_mutant(
    check="a_cut_changes_nothing", after="fla PRs #636, #1131 and #1181: recurrent kernels without a backward pass"
)
def truncates_backpropagation(x):
    """A state that comes out of a graph is detached: backpropagation is truncated without being asked."""
    state = x.initial_state
    return decay_chunkwise(x if state is None or state.is_leaf else x._replace(initial_state=state.detach()))


@kernel_mutant(check="a_carried_state_does_not_drift", after="fla #1187: states in float16")
def rounds_the_state(x):
    """The state has the keys' dtype (fla #1187: states in float16); in bfloat16 it is 9 % off after 256 tokens."""
    output, state = decay_chunkwise(x)
    return output, None if state is None else state.to(x.q.dtype).to(state.dtype)


REVERSED = cycle([False, True])
"""Every second call adds from the other end: by chance alone a case would fail once and pass when it is repeated."""


@kernel_mutant(check="results_are_deterministic", after="tilelang's backward: partial sums are added atomically")
def adds_in_any_order(x):
    """Partial sums are added atomically, in any order."""
    order = torch.arange(x.q.shape[3])
    order = order.flip(0) if next(REVERSED) else order
    a, state = x.log_decay, x.initial_state
    a = a[..., order] if a is not None and a.ndim == 4 else a
    state = None if state is None else state[:, :, order]
    x = x._replace(q=x.q[..., order], k=x.k[..., order], log_decay=a, initial_state=state)
    output, final = decay_chunkwise(x)
    return output, None if final is None else final[:, :, order.argsort()]


@kernel_mutant(check="inputs_are_left_alone", after="athms/mad-lab #5: a recurrent form writes into its argument")
def writes_over_the_initial_state(x):
    """Without gradients the final state is written over the initial one, which the caller still holds."""
    output, state = decay_chunkwise(x)
    given = x.initial_state
    if state is not None and given is not None and not torch.is_grad_enabled() and given.stride(0):
        given.copy_(state)
    return output, state


def _takes_no_state(probe: Probe) -> list[str]:
    return ["it takes no initial state"] if probe.initial_state else []


@kernel_mutant(
    check="what_is_not_taken_is_refused",
    after="fla's parallel retention: with a cache it is off by half",
    limits=_takes_no_state,
)
def ignores_the_initial_state(x):
    """An initial state is not supported, and is ignored."""
    return decay_chunkwise(x._replace(initial_state=None))


@kernel_mutant(check="tangents_are_right_or_refused", after="our own history: a custom op has a backward formula alone")
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


@kernel_mutant(
    check="second_derivatives_are_right_or_refused",
    after="our own history: a backward pass of bare numbers",
    paradigm=Paradigm.PARALLEL,
)
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


@kernel_mutant(check="dispatched_ops_pass_opcheck", after="fla #52: wrong values under torch.compile")
def fakes_another_shape(x):
    """The fake of a custom op swaps the widths of the state: compiled code gets another shape than eager."""
    output, state = decay_chunkwise(x)
    return output, None if state is None else scaled_state(state)


@kernel_mutant(
    check="outputs_are_the_definitions",
    after="PyTorch: SDPA's is_causal with a cache",
    op="softmax",
    paradigm=Paradigm.PARALLEL,
)
def aligns_the_mask_to_the_first_key(x):
    """With a KV cache the causal mask is aligned to the first key instead of to the last."""
    right, state = softmax_parallel(x)
    if x.cache is None or x.documents is not None or x.scores:
        return right, state
    k, v = (torch.cat(pair, dim=1) for pair in ((x.cache.keys, x.k), (x.cache.values, x.v)))
    q, k, v = (tensor.transpose(1, 2) for tensor in (x.q, k, v))
    wrong = scaled_dot_product_attention(q, k, v, is_causal=True, scale=x.scale, enable_gqa=True)
    return wrong.transpose(1, 2), state
