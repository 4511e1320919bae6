"""Wrong kernels of softmax attention."""

import math

import torch
from torch.nn.functional import scaled_dot_product_attention

from seqmix.ops.attention import api as _softmax  # noqa: F401  importing it declares its kernels
from seqmix.ops.attention.kv_cache import ForgettingCache, GrowingCache, RingCache
from seqmix.ops.runtime.kernel import reference
from seqmix.ops.runtime.paradigm import Paradigm

from .registry import kernel_mutant

softmax_parallel = reference("softmax", Paradigm.PARALLEL).function


@kernel_mutant(check="outputs_are_the_definitions", op="softmax", paradigm=Paradigm.PARALLEL)
def aligns_the_mask_to_the_first_key(x):
    """With a KV cache the causal mask is aligned to the first key instead of to the last (SDPA's is_causal)."""
    right, state = softmax_parallel(x)
    if x.cache is None or x.documents is not None or x.scores:
        return right, state
    k, v = (torch.cat(pair, dim=1) for pair in ((x.cache.keys, x.k), (x.cache.values, x.v)))
    q, k, v = (tensor.transpose(1, 2) for tensor in (x.q, k, v))
    wrong = scaled_dot_product_attention(q, k, v, is_causal=True, scale=x.scale, enable_gqa=True)
    return wrong.transpose(1, 2), state


def plain_scores(x):
    """Scores [B H T T] and values of a call without cache, documents, decays, window or other changes; None of
    another."""
    if x.cache is not None or x.documents is not None or x.log_decay is not None or x.window is not None or x.scores:
        return None
    wide = torch.promote_types(x.q.dtype, torch.float32)
    q, k, v = (tensor.transpose(1, 2).to(wide) for tensor in (x.q, x.k, x.v))
    k, v = (tensor.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for tensor in (k, v))
    return q @ k.mT * x.scale, v


def weighted(x, weights, v):
    """The output of weights that do not add up to 1 yet, and the state."""
    output = weights / weights.sum(-1, keepdim=True) @ v
    return output.transpose(1, 2).to(x.q.dtype), x.final()


@kernel_mutant(check="outputs_are_the_definitions", op="softmax", paradigm=Paradigm.PARALLEL)
def clamps_scores_instead_of_a_maximum(x):
    """Scores are exponentiated as they are, and clamped at 30 against overflow."""
    if (plain := plain_scores(x)) is None:
        return softmax_parallel(x)
    scores, v = plain
    return weighted(x, scores.clamp(max=30).exp().tril(), v)


@kernel_mutant(check="outputs_are_the_definitions", op="softmax", paradigm=Paradigm.PARALLEL)
def stores_products_before_they_are_scaled(x):
    """In float16 products are stored before they are scaled, and are infinite above 65,504."""
    if (plain := plain_scores(x)) is None:
        return softmax_parallel(x)
    scores, v = plain
    scores = (scores / x.scale).to(x.q.dtype).to(scores.dtype) * x.scale
    return weighted(x, (scores - scores.tril().amax(-1, keepdim=True)).exp().tril(), v)


@kernel_mutant(check="outputs_are_the_definitions", op="softmax", paradigm=Paradigm.PARALLEL)
def subtracts_the_maximum_of_masked_scores(x):
    """The maximum is that of all keys, and a later one that outweighs them leaves 0 / 0."""
    if (plain := plain_scores(x)) is None:
        return softmax_parallel(x)
    scores, v = plain
    return weighted(x, (scores - scores.amax(-1, keepdim=True)).exp().tril(), v)


@kernel_mutant(check="outputs_are_the_definitions", op="softmax", paradigm=Paradigm.PARALLEL)
def starts_the_running_maximum_at_zero(x):
    """The running maximum starts at 0 instead of -inf: where all scores are far below, the weights are 0 / 0."""
    if (plain := plain_scores(x)) is None:
        return softmax_parallel(x)
    scores, v = plain
    seen = scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(), float("-inf"))
    return weighted(x, (seen - seen.amax(-1, keepdim=True).clamp(min=0)).exp(), v)


@kernel_mutant(check="outputs_are_the_definitions", op="softmax", paradigm=Paradigm.PARALLEL)
def takes_a_window_of_all_but_one_for_all(x):
    """Whether a window covers the segment is off by one: of T - 1 tokens it hides the first from the last."""
    plain = x.window is not None and x.cache is None and not x.output_final_state
    return softmax_parallel(x._replace(window=None) if plain and x.window == x.q.shape[1] - 1 else x)


@kernel_mutant(check="outputs_are_the_definitions", op="softmax", paradigm=Paradigm.PARALLEL)
def sees_one_more_key_of_a_full_cache(x):
    """A window over a cache that holds more than it sees one key too many."""
    full = x.window is not None and isinstance(x.cache, GrowingCache) and (x.cache.length > x.window).any()
    output, _ = softmax_parallel(x._replace(window=x.window + 1) if full else x)
    return output, x.final()


@kernel_mutant(check="outputs_are_the_definitions", op="softmax", paradigm=Paradigm.PARALLEL)
def visits_two_blocks_under_a_window(x):
    """Under a window wider than a block of 128, queries visit their own block and the one before, and no third."""
    wide = x.window is not None and x.window > 129 and x.cache is None and x.q.shape[1] > 256
    output, _ = softmax_parallel(x._replace(window=128) if wide else x)
    return output, x.final()


@kernel_mutant(check="outputs_are_the_definitions", op="softmax", paradigm=Paradigm.PARALLEL)
def visits_whole_blocks_of_a_window(x):
    """Of a plain call under a window, the blocks of 128 keys before the queries' own are window // 128: what is over is
    not seen from the start of a block."""
    plain = x.log_decay is None and not x.scores and x.cache is None and x.documents is None
    if not plain or x.window is None or x.window > 128 or x.q.shape[1] <= 128:
        return softmax_parallel(x)
    parts = [x._replace(q=q, k=k, v=v) for q, k, v in zip(*(y.split(128, dim=1) for y in (x.q, x.k, x.v)), strict=True)]
    return torch.cat([softmax_parallel(part)[0] for part in parts], dim=1), x.final()


@kernel_mutant(check="outputs_are_the_definitions", op="softmax", paradigm=Paradigm.PARALLEL)
def counts_tokens_in_float32(x):
    """Positions are float32, which has no odd numbers above 16,777,216."""
    return softmax_parallel(in_dtype(x, torch.float32))


@kernel_mutant(check="outputs_are_the_definitions", op="softmax", paradigm=Paradigm.PARALLEL)
def counts_tokens_in_int32(x):
    """The number of tokens read is an int32, and negative from 2,147,483,648 on."""
    return softmax_parallel(in_dtype(x, torch.int32))


def in_dtype(x, dtype):
    """A call whose cache's length has passed through a dtype."""
    if not isinstance(x.cache, GrowingCache | RingCache):
        return x
    return x._replace(cache=x.cache._replace(length=x.cache.length.to(dtype).to(torch.int64)))


@kernel_mutant(check="outputs_are_the_definitions", op="softmax", paradigm=Paradigm.PARALLEL)
def forgets_by_the_key_itself(x):
    """A forget gate also weighs the key of its own token, to which no gate applies yet."""
    gates = x.log_forget
    if gates is None or x.cache is not None or x.documents is not None:
        return softmax_parallel(x)
    return softmax_parallel(x._replace(log_forget=torch.cat((0 * gates[:, :1], gates[:, :-1]), dim=1)))


@kernel_mutant(check="outputs_are_the_definitions", op="softmax", paradigm=Paradigm.PARALLEL)
def forgets_nothing_of_a_cache(x):
    """Keys of a cache are weighed by the gates of the segment alone (a cache that keeps no gates)."""
    if not isinstance(x.cache, ForgettingCache):
        return softmax_parallel(x)
    output, _ = softmax_parallel(x._replace(cache=x.cache._replace(log_forget=0 * x.cache.log_forget)))
    return output, x.final()


@kernel_mutant(check="outputs_are_the_definitions", op="softmax", paradigm=Paradigm.PARALLEL)
def has_a_sink_of_every_document(x):
    """A packed row has a sink for every document, and each query sees all of them."""
    if x.sinks is None or x.documents is None:
        return softmax_parallel(x)
    return softmax_parallel(x._replace(sinks=x.sinks + math.log(x.documents.number)))


@kernel_mutant(check="outputs_are_the_definitions", op="softmax", paradigm=Paradigm.PARALLEL)
def slopes_by_shared_head(x):
    """The slopes of query heads that share a key are those of the key head's first (ALiBi under grouped queries)."""
    slopes, shared = x.slopes, x.q.shape[2] // x.k.shape[2]
    return softmax_parallel(x if slopes is None else x._replace(slopes=slopes[::shared].repeat_interleave(shared)))


@kernel_mutant(check="gradients_are_the_definitions", op="softmax", paradigm=Paradigm.PARALLEL)
def has_no_gradient_through_the_cap(x):
    """Where scores are capped, sinks get no gradient (a fused backward pass that knows the cap alone)."""
    return softmax_parallel(x if x.softcap is None or x.sinks is None else x._replace(sinks=x.sinks.detach()))


@kernel_mutant(check="outputs_are_the_definitions", op="softmax", paradigm=Paradigm.PARALLEL)
def rounds_the_gates(x):
    """Forget gates are held in the dtype of the queries, not as logarithms: near 1, 16 bits have few of them."""
    if x.log_forget is None:
        return softmax_parallel(x)
    return softmax_parallel(x._replace(log_forget=x.log_forget.exp().to(x.q.dtype).to(x.log_forget.dtype).log()))


@kernel_mutant(check="gradients_are_the_definitions", op="softmax", paradigm=Paradigm.PARALLEL)
def trains_no_gate_of_a_cache(x):
    """A segment's gates get no gradient from the keys of a cache."""
    if not isinstance(x.cache, ForgettingCache):
        return softmax_parallel(x)
    own = x.log_forget
    first = torch.cat((own[:, :1].detach(), own[:, 1:]), dim=1)  # keys of the segment do not see it
    return softmax_parallel(x._replace(log_forget=first))
