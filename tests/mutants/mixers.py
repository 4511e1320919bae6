"""Deliberately wrong mixers: each is a specimen with one thing wrong, and is caught by the check named for it.

A docstring says what is wrong, then after which bug of which project.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import create_model
from torch import nn

from seqmix import MixerConfig, Paradigm, SequenceMixer
from seqmix.mixers.state import detach, select
from seqmix.ops.packing import Documents, document_of_token
from seqmix.testing import CHECKS, EXAMPLES, Outcome, check_mixer

from .specimen import Cache, Cached, CachedConfig, Specimen, SpecimenConfig, SpecimenState

FEW = 30
"""Examples asked for of the checks that a mutant is not made for."""


@dataclass(frozen=True)
class Mutant:
    """A wrong mixer, and how it is found out."""

    name: str
    wrong: str
    """What is wrong, and after which bug."""
    check: str
    """The check named for it."""
    config: MixerConfig


MUTANTS: dict[str, Mutant] = {}
"""All mutants by name."""


def mutant(*, check: str) -> Callable[[type], type]:
    """Register a layer that derives from a specimen, or a configuration that does."""

    def register(cls: type) -> type:
        base = cls if issubclass(cls, MixerConfig) else CachedConfig if issubclass(cls, Cached) else SpecimenConfig
        config = create_model(cls.__name__, __base__=base, kind=(Literal[cls.__name__], cls.__name__))
        if issubclass(cls, SequenceMixer):
            config.layer = cls
        MUTANTS[cls.__name__] = Mutant(cls.__name__, " ".join(cls.__doc__.split()), check, config())
        return cls

    return register


def fails(mutant: Mutant, check: str, examples: int = EXAMPLES) -> Outcome | None:
    """How a check catches a mutant, on the first case that does."""
    # a subject of its own for every check, as in pytest: some mutants remember
    report = check_mixer(mutant.config, checks=[check], examples=examples, shrink=False)
    return report.failures[0] if report.failures else None


def caught(mutant: Mutant) -> list[str]:
    """The checks that fail on it; of those that compile, its own alone is tried."""
    return [
        check.name
        for check in CHECKS.values()
        if (check.name == mutant.check and fails(mutant, check.name))
        or (not check.compiles and fails(mutant, check.name, FEW))
    ]


# ---- the two equations of the contract


@mutant(check="paradigms_agree")
class BackwardLeavesOutFarPairs(Specimen):
    """The parallel form's backward leaves out pairs of tokens far apart; its forward is right. After
    NX-AI/mlstm_kernels #16: on a new GPU the fused backward was wrong while the forward was right."""

    def scores(self, q, k):
        scores = super().scores(q, k)
        far = torch.ones_like(scores, dtype=torch.bool).tril(-99)
        return torch.where(far, scores.detach(), scores)


@mutant(check="paradigms_agree")
class ParallelIgnoresTheState(Specimen):
    """The parallel paradigm starts from nothing, whatever the state. After fla's MultiScaleRetention: its parallel op
    takes no initial state, and nothing says so."""

    def attend(self, paradigm, tokens, state):
        if paradigm is Paradigm.PARALLEL:
            state = state._replace(memory=0 * state.memory, weight=0 * state.weight)
        return super().attend(paradigm, tokens, state)


@mutant(check="paradigms_agree")
class RecurrentScalesOnceMore(Specimen):
    """The recurrent paradigm has a scale of its own. After microsoft/torchscale #47: the square root was missing from
    the scale in recurrent mode."""

    def recurrent(self, tokens, memory, weight):
        o, *rest = super().recurrent(tokens, memory, weight)
        return o * self.width**-0.5, *rest


@mutant(check="paradigms_agree")
class RecurrentReadsBeforeItWrites(Specimen):
    """A step reads the state before the token is in it; the other paradigms after. After open-lm-engine/lm-engine: the
    reference of its linear attention does, as a review of PR #496 noted."""

    def recurrent(self, tokens, memory, weight):
        q, k, v, _, one = tokens
        o, z, *after = super().recurrent(tokens, memory, weight)
        return o - (q * k).sum(-1, keepdim=True) * v, z - one, *after


@mutant(check="paradigms_agree")
class LosesTheStateAtABoundary(Specimen):
    """Chunkwise, the state is lost at the boundary of a block of 64 tokens. After no report: a dozen tokens have no
    such boundary."""

    def chunkwise(self, tokens, memory, weight):
        found = []
        for block in zip(*(x.split(64, dim=2) for x in tokens), strict=True):
            kept = 0 if found else 1
            found.append(super().chunkwise(block, kept * memory, kept * weight))
        return *(torch.cat(parts, dim=2) for parts in list(zip(*found, strict=True))[:2]), *found[-1][2:]


@mutant(check="paradigms_agree")
class TakesALengthForWholeBlocks(Specimen):
    """The parallel form takes 129 tokens for blocks of 128, and doubles the last. After fla #1143 and #907: masks of
    tails."""

    def parallel(self, tokens, memory, weight):
        o, *rest = super().parallel(tokens, memory, weight)
        return (torch.cat((o[:, :, :128], 2 * o[:, :, 128:]), dim=2) if o.shape[2] == 129 else o), *rest


@mutant(check="pieces_equal_the_whole")
class CacheCountsSegments(Cached):
    """The cache counts segments, not tokens. After fla #126: the offset of a cache advanced by the number of heads
    instead of tokens."""

    def extended(self, state, k, v):
        cache = super().extended(state, k, v)
        return cache._replace(length=cache.length - k.shape[1] + 1)


@mutant(check="pieces_equal_the_whole")
class ForgetsTheOffset(Specimen):
    """Every segment starts at position 0. After fla #766 and #477: a wrong count of the tokens seen shifted rotary
    offsets in decoding."""

    def positions(self, state, x, call):
        return super().positions(state._replace(position=0 * state.position), x, call)


@mutant(check="pieces_equal_the_whole")
class GuardsOnOneToken(Specimen):
    """The state is used for a segment of one token alone. After huggingface/transformers PR #45513: the guard
    seq_len == 1, copied through nine models, dropped the state where several tokens went on."""

    def mix(self, x, call):
        return super().mix(x, call if x.shape[1] == 1 else call._replace(state=None))


@mutant(check="pieces_equal_the_whole")
class AlignsTheMaskTopLeft(Cached):
    """With a cache, query n sees keys up to n of the cache. After state-spaces/mamba: without flash-attn, decoding
    calls torch's attention with is_causal, and a token sees the first key alone."""

    def seen(self, queries, keys, device):
        return torch.ones(queries, keys, dtype=torch.bool, device=device).tril()


@mutant(check="gradients_flow_through_states")
class DetachesTheState(Specimen):
    """The initial state has no gradient. After state-spaces/mamba #101 and #1013: states were for inference, and
    training through them had to be asked for."""

    def before(self, state, rows):
        return detach(super().before(state, rows))


@mutant(check="gradients_flow_through_states")
class CachesWithoutGrad(Cached):
    """In decoding, what is in the cache is detached. After fla PRs #636, #1131 and #1181: recurrent kernels without a
    backward, which nothing declares."""

    def extended(self, state, k, v):
        return super().extended(state if state is None or k.shape[1] > 1 else detach(state), k, v)


@mutant(check="gradients_flow_through_states")
class DetachesTheStateOfLongSegments(Specimen):
    """The initial state has no gradient where a segment is longer than 12 tokens. After fla PRs #636, #1131 and #1181:
    kernels without a backward, which nothing declares."""

    def mix(self, x, call):
        given = call.state if call.state is None or x.shape[1] <= 12 else detach(call.state)
        return super().mix(x, call._replace(state=given))


@mutant(check="steps_equal_the_whole")
class GivesOutOneStateTwice(Specimen):
    """init_state gives out the same tensors again, and steps write in place: one sequence starts where another ended.
    After athms/mad-lab: the recurrent form of its linear attention mutates its argument."""

    given = None

    def init_state(self, batch_size, *, max_length=None):
        if max_length is not None:
            return super().init_state(batch_size)
        if self.given is None or len(self.given.position) != batch_size:
            self.given = super().init_state(batch_size)
        return self.given

    def mix(self, x, call):
        y, after = super().mix(x, call)
        if call.state is None or x.shape[1] > 1 or torch.is_grad_enabled():
            return y, after
        return y, SpecimenState(*(old.copy_(new) for old, new in zip(call.state, after, strict=True)))


@mutant(check="the_future_changes_nothing")
class MasksTheFutureWithANumber(Specimen):
    """The mask of the future is -28 in the exponent, so e^-28 of it leaks. After no report: a comparison at 1e-9 lets
    it pass."""

    def decays(self, a):
        leak = torch.full((a.shape[-1],) * 2, -28.0, device=a.device, dtype=a.dtype).exp().triu(1)
        return super().decays(a) + leak


@mutant(check="the_future_changes_nothing")
class SumsGlobally(Specimen):
    """The normaliser of the parallel form is the sum over the whole segment, not up to the token. After fla #850: the
    reference of its linear attention summed along the wrong dimension."""

    def parallel(self, tokens, memory, weight):
        o, z, *after = super().parallel(tokens, memory, weight)
        return o, z[..., -1:].expand_as(z), *after


@mutant(check="the_future_changes_nothing")
class ForgetsTheMask(Cached):
    """Every query sees every key. After huggingface/transformers PR #36889 and #45811: an attention function registered
    without its mask drops causality in silence."""

    def seen(self, queries, keys, device):
        return torch.ones(queries, keys, dtype=torch.bool, device=device)


@mutant(check="the_future_changes_nothing")
class SeesPastTheEndOfABlock(Specimen):
    """The last token of the first 16 reads the one after it, in every paradigm. After fla #1143 and #907: masks of
    tails."""

    def heads(self, x):
        qk, v, a = super().heads(x)
        if x.shape[1] > 16:
            v = torch.cat((v[:, :, :15], v[:, :, 15:16] + 0.1 * v[:, :, 16:17], v[:, :, 16:]), dim=2)
        return qk, v, a


@mutant(check="chunk_size_changes_nothing")
class ScalesByTheChunk(Specimen):
    """The chunk's size is part of the map, in all paradigms alike. After microsoft/torchscale #77: the chunkwise form
    gave other results."""

    def heads(self, x):
        qk, v, a = super().heads(x)
        return qk, v * self.config.chunk_size**-0.5, a


@mutant(check="chunk_size_changes_nothing")
class NormalisesByTheChunk(Specimen):
    """The normaliser sums over the chunk alone. After microsoft/torchscale #40: the normalisation of decays was another
    one in each mode."""

    def chunkwise(self, tokens, memory, weight):
        o, _, *after = super().chunkwise(tokens, memory, weight)
        chunks = zip(*(x.split(self.config.chunk_size, dim=2) for x in tokens), strict=True)
        local = [self.parallel(chunk, 0 * memory, 0 * weight)[1] for chunk in chunks]
        return o, torch.cat(local, dim=2), *after


@mutant(check="chunk_size_changes_nothing")
class PadsWithDecay(Specimen):
    """The last chunk is padded with tokens that write nothing, and decay. After huggingface/transformers #46190:
    padding the last chunk changed the state."""

    def chunkwise(self, tokens, memory, weight):
        o, z, memory, weight = super().chunkwise(tokens, memory, weight)
        a = tokens[3]
        left = (-a.shape[-1] % self.config.chunk_size * a[..., -1]).exp()
        return o, z, memory * left[..., None, None], weight * left


# ---- packed documents


@mutant(check="documents_are_sequences")
class BoundariesGiveTheDtype(Specimen):
    """Packed, the positions of a state have the dtype of the boundaries. After fla #1082 and #964: int32 where int64
    was needed."""

    def advanced(self, state, x, call):
        advanced = super().advanced(state, x, call)
        return advanced if call.cu_seqlens is None else advanced.to(call.cu_seqlens.dtype)


@mutant(check="documents_are_sequences")
class LeaksAcrossDocuments(Specimen):
    """A packed document sees those before it. After state-spaces/mamba #180, NovaSky-AI/SkyRL PR #2056 and lingua's
    fastRNN: the state runs over the boundaries of documents."""

    def unpack(self, tokens, packed, rows):
        return [x.expand(rows, *x.shape[1:]) for x in tokens]


@mutant(check="documents_are_sequences")
class FirstRowSpeaksForAll(Specimen):
    """All rows have the position of the first. After fla #515: RetNet did not run on sequences of different lengths
    in one batch, for its rotary cache."""

    def positions(self, state, x, call):
        if call.documents is not None:
            return super().positions(state, x, call)
        return super().positions(state._replace(position=state.position[:1]), x, call)


@mutant(check="documents_are_sequences")
class MovesBoundariesToBlocks(Specimen):
    """In rows of more than 32 tokens, documents end where blocks of 16 do. After state-spaces/mamba #180: kernels know
    blocks and no documents."""

    def mix(self, x, call):
        if call.cu_seqlens is not None and x.shape[1] > 32:
            cuts = call.cu_seqlens
            ends = ((cuts[1:-1] + 15) // 16 * 16).clamp(max=x.shape[1])
            call = call._replace(documents=Documents.of(torch.cat((cuts[:1], ends, cuts[-1:])), x.shape[1]))
        return super().mix(x, call)


@mutant(check="gradients_of_documents_are_those_of_sequences")
class PackingDetachesTheState(Specimen):
    """Packed, the initial states have no gradient. After NovaSky-AI/SkyRL PR #2056 and fla #837: packing, and gradients
    silently wrong."""

    def mix(self, x, call):
        given = call.state if call.state is None or call.documents is None else detach(call.state)
        return super().mix(x, call._replace(state=given))


# ---- rows and strides


@mutant(check="rows_are_independent")
class StartsAtTheRowsNumber(Specimen):
    """The first token of row n has position n. After fla #126: layouts were confused, and the wrong dimension was
    counted."""

    def init_state(self, batch_size, *, max_length=None):
        return super().init_state(batch_size)._replace(position=torch.arange(batch_size, device=self.device))


@mutant(check="rows_are_independent")
class MixesTheRowsOfLargeBatches(Specimen):
    """In batches of more than five, every row sees the mean of all. After no report: batches of two or three do not
    show it."""

    def heads(self, x):
        return super().heads(x + x.mean(0, keepdim=True) if len(x) > 5 else x)


@mutant(check="rows_are_independent")
class ReversesTheRows(Specimen):
    """A state holds the rows of the batch in reverse, and is read so. After the order of a batch in fla's cache, which
    beam search needs and which had no `reorder_cache` before 0.6.0."""

    def mix(self, x, call):
        given = None if call.state is None else self.reversed(call.state)
        y, after = super().mix(x, call._replace(state=given))
        return y, self.reversed(after)

    def reversed(self, state):
        return SpecimenState(*(leaf.flip(0) for leaf in state))


@mutant(check="strides_change_nothing")
class ReadsMemoryAsItLies(Specimen):
    """Channels are read from memory as neighbours, whatever the strides. After fla #871: a gradient from above that was
    not contiguous."""

    def heads(self, x):
        return super().heads(x.as_strided(x.shape, (*x.stride()[:-1], 1), x.storage_offset()))


# ---- states


@mutant(check="the_initial_state_is_nothing_read")
class AnswersDifferentlyWithoutACache(Specimen):
    """Where no state is wanted, inputs are rounded on a faster path. After lucidrains/x-transformers #219, #311 and
    #322: text differed with the cache on and off."""

    def mix(self, x, call):
        return super().mix(x if call.return_state else x.to(torch.bfloat16).to(x.dtype), call)


@mutant(check="the_initial_state_is_nothing_read")
class AllocatesWithoutFilling(Specimen):
    """A state that is allocated for a number of tokens is not filled. After fla PR #967: rotary read uninitialised
    memory."""

    def init_state(self, batch_size, *, max_length=None):
        state = super().init_state(batch_size)
        # memory that holds whatever stood there, here the same each time
        return state if max_length is None else state._replace(memory=torch.full_like(state.memory, 7.0))


@mutant(check="rows_of_a_state_can_be_rearranged")
class TakesEqualStatesForOneSequence(Specimen):
    """In decoding, rows that come with equal states are answered as the first of them, as are beams that part. After
    fla's tensor_cache: a memo whose key is not all that the result depends on."""

    def mix(self, x, call):
        y, after = super().mix(x, call)
        if call.state is None or call.documents is not None or x.shape[1] > 1:
            return y, after
        memory = call.state.memory.flatten(1)
        equal = (memory[:, None] == memory).all(-1) & memory.any(-1) | torch.eye(len(x), dtype=torch.bool)
        first = equal.to(torch.uint8).argmax(-1)
        return y[first], select(after, first)


class Unread(Cache):
    """A cache of nothing read, recognised by its class."""


@mutant(check="a_state_survives_the_disk")
class TellsAnEmptyCacheByItsClass(Cached):
    """A cache of nothing read is recognised by its class, so a loaded one, which is built like init_state's, counts as
    empty. After fla #571, #582 and #601: caches as classes of another library broke whenever those changed."""

    def init_state(self, batch_size, *, max_length=None):
        return Unread(*super().init_state(batch_size))

    def extended(self, state, k, v):
        if isinstance(state, Unread):
            state = super().init_state(len(k))._replace(length=state.length)
        return super().extended(state, k, v)


@mutant(check="a_state_is_never_written_under_grad")
class WritesWhatStoodThere(Specimen):
    """Positions are clamped in place, which changes no number and breaks whoever saved them for backward. After
    huggingface/transformers PR #47046: xLSTM's state, updated in place, failed under autograd."""

    def before(self, state, rows):
        state = super().before(state, rows)
        state.position.clamp_(min=0)
        return state


@mutant(check="a_state_is_never_written_under_grad")
class AdvancesInPlace(Specimen):
    """The position of the state given is advanced in place, training or not. After NX-AI/xlstm: xlstm_large writes its
    state where it lies."""

    def advanced(self, state, x, call):
        return state.position.copy_(super().advanced(state, x, call))


@mutant(check="a_state_is_tensors_batch_first")
class ReturnsAPlainTuple(Specimen):
    """A state is a tuple without names. After fla's linear attention: with `normalize` its state becomes a tuple."""

    def init_state(self, batch_size, *, max_length=None):
        return tuple(super().init_state(batch_size))

    def before(self, state, rows):
        return SpecimenState(*super().before(state, rows))

    def mix(self, x, call):
        y, after = super().mix(x, call)
        return y, tuple(after)


@mutant(check="a_state_is_tensors_batch_first")
class OnePositionForTheBatch(Specimen):
    """The position has one row for the whole batch. After fla #747: one count of the tokens seen for everything."""

    def init_state(self, batch_size, *, max_length=None):
        state = super().init_state(batch_size)
        return state._replace(position=state.position[:1])

    def advanced(self, state, x, call):
        return super().advanced(state, x[:1], call)


@mutant(check="a_state_has_the_declared_size")
class KeepsAllAliveBehindAView(Specimen):
    """A leaf is a view of what the whole segment needed, and keeps all of it. After the specimen itself, in which the
    check found it."""

    def mix(self, x, call):
        y, after = super().mix(x, call)
        every = after.weight[..., None].expand(*after.weight.shape, x.shape[1]).contiguous()
        return y, after._replace(weight=every[..., -1])


@mutant(check="a_state_has_the_declared_size")
class SaysConstantAndGrows(CachedConfig):
    """Declares a constant state, and has a cache of everything. After HazyResearch/zoology: by a slip of if and elif,
    its state size of a Mamba block is None."""

    @property
    def traits(self):
        return replace(super().traits, state="constant")


# ---- positions


@mutant(check="position_matters_only_where_declared")
class TurnsKeysAlone(Specimen):
    """Keys turn with their position and queries do not: products see where a token stands, not how far away. After fla
    #766 and #477: rotations that do not fit those in the cache."""

    def turn(self, x, positions):
        q, _ = x.chunk(2, dim=1)
        return torch.cat((q, super().turn(x, positions)[:, q.shape[1] :]), dim=1)


@mutant(check="position_matters_only_where_declared")
class SaysPositionMatters(SpecimenConfig):
    """Declares that positions matter, and they do not. After the flags of xformers' factory, set by hand and checked
    by nothing but asserts of a caller."""

    @property
    def traits(self):
        return replace(super().traits, shift_invariant=False)


@mutant(check="late_positions_are_exact")
class HasAnglesInFloat32(Specimen):
    """Angles are float32 where inputs are: off by 2e-2 at position 1e6. After every rotary embedding that computes
    them in float32."""

    def turn(self, x, positions):
        angles = self.angles(positions).to(self.wide(x))
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)


@mutant(check="position_matters_only_where_declared")
class CountsInInt32(Specimen):
    """Positions overflow at 2^31. After fla #1082, #964, #965, #803, #783 and #769: pointers that overflow in int32."""

    def positions(self, state, x, call):
        return super().positions(state, x, call).to(torch.int32)


# ---- numerics


@mutant(check="low_precision_is_near_float64")
class ReadsTheStateInTF32(Specimen):
    """In float32, segments of several tokens read the state with the 10 bits of TF32. After fla #36: chunk and
    recurrent differed in precision."""

    def attend(self, paradigm, tokens, state):
        memory = state.memory
        if memory.dtype == torch.float32 and tokens[0].shape[2] > 1:
            memory = memory.to(torch.float16).to(torch.float32)
        return super().attend(paradigm, tokens, state._replace(memory=memory))


@mutant(check="low_precision_is_near_float64")
class OverflowsNowAndThen(Specimen):
    """In float16, the square of a hundred times the input overflows for some tokens, which become NaN. After fla #1187:
    states in fp16 became NaN."""

    def heads(self, x):
        return super().heads(x + 0 * (100 * x).square().mean(-1, keepdim=True))


@mutant(check="low_precision_is_near_float64")
class HalvesGradientsInLowPrecision(Specimen):
    """In bfloat16 and float16 the gradient of the input is half of what it is. After fla #863 and #875: gradients were
    wrong where outputs were right."""

    def heads(self, x):
        return super().heads(x if x.itemsize > 2 else (x + x.detach()) / 2)


@mutant(check="long_decoding_does_not_drift")
class RoundsTheStateItReads(Specimen):
    """A state is float32, and is rounded to the parameters' dtype where it is read. After sgl-project/sglang #38975:
    rounding a gate to bf16 accumulates in the recurrent state with the context."""

    def before(self, state, rows):
        memory, weight, position = super().before(state, rows)
        return SpecimenState(*(leaf.to(self.dtype).to(leaf.dtype) for leaf in (memory, weight)), position)


@mutant(check="dtypes_are_kept")
class RoundsTheStateInPassing(Specimen):
    """A state is float32, and was rounded to the input's dtype. After sgl-project/sglang #38975: rounding a gate to
    bf16 accumulates in the recurrent state with the context."""

    def mix(self, x, call):
        y, after = super().mix(x, call)
        rounded = (leaf.to(x.dtype).to(leaf.dtype) for leaf in (after.memory, after.weight))
        return y, SpecimenState(*rounded, after.position)


@mutant(check="dtypes_are_kept")
class AnswersInFloat32(Specimen):
    """The output is float32 for inputs of lower precision. After fla PR #676: the dtype of RMSNorm, put right in 29
    files."""

    def mix(self, x, call):
        y, after = super().mix(x, call)
        return y.to(self.wide(x)), after


@mutant(check="dtypes_are_kept")
class KeepsItsStateInBf16(Specimen):
    """The state has the dtype of the inputs. After fla #1187: states in fp16 became NaN."""

    def mix(self, x, call):
        y, after = super().mix(x, call)
        return y, after._replace(memory=after.memory.to(x.dtype))


@mutant(check="dtypes_are_kept")
class StartsAndStaysNarrow(Specimen):
    """The state has the parameters' dtype from its beginning, as only a cache may. After fla #1187: states in fp16
    became NaN."""

    def init_state(self, batch_size, *, max_length=None):
        state = super().init_state(batch_size)
        return state._replace(memory=state.memory.to(self.dtype))

    def before(self, state, rows):
        state = super().before(state, rows)
        return state._replace(memory=state.memory.to(self.state_dtype))

    def mix(self, x, call):
        y, after = super().mix(x, call)
        return y, after._replace(memory=after.memory.to(self.dtype))


@mutant(check="autocast_changes_only_precision")
class AutocastNarrowsTheCache(Cached):
    """A cache that starts under autocast has autocast's dtype. After fla-org/flame #30 and fla #559: confusion of
    dtypes with and without autocast."""

    def extended(self, state, k, v):
        if state is None:
            return Cache(k.clone(), v.clone(), torch.full((len(k),), k.shape[1], device=k.device))
        return super().extended(state, k, v)


@mutant(check="extremes_are_finite")
class DividesByTheNormOfZero(Specimen):
    """A vector of zeros is divided by its norm. After fla #77, #99 and #122: gradients and outputs of NaN."""

    def unit(self, x):
        return x / x.norm(dim=-1, keepdim=True)


@mutant(check="extremes_are_finite")
class FactorisesDecays(Specimen):
    """What is left of token j at token i is a factor of i times one of j, of which one overflows. After fla's
    retention: gamma^T of its first head underflows float32 after 2,800 tokens."""

    def decays(self, a):
        passed = a.cumsum(-1)
        return (passed.exp()[..., None] * (-passed).exp()[..., None, :]).tril()


@mutant(check="extremes_are_finite")
class DividesByWhatUnderflows(Specimen):
    """A vector is divided by its norm and 1e-8, which is 0 in float16. After fla #77, #99 and #122: gradients and
    outputs of NaN."""

    def unit(self, x):
        return x / (x.norm(dim=-1, keepdim=True) + torch.tensor(1e-8, dtype=x.dtype, device=x.device))


@mutant(check="modes_change_nothing")
class IgnoresTheStateInTraining(Specimen):
    """In training mode every segment starts from nothing. After state-spaces/mamba #101 and #1013: states were for
    inference, and training through them had to be asked for."""

    def mix(self, x, call):
        return super().mix(x, call._replace(state=None) if self.training else call)


@mutant(check="modes_change_nothing")
class IsAnotherWithoutGradients(Specimen):
    """Where no gradient is wanted, a quicker way scales by a hundredth more. After fla #47: the path of inference
    forgot the scale."""

    def divide(self, o, z):
        return super().divide(o, z) * (1 if torch.is_grad_enabled() else 1.01)


@mutant(check="results_are_deterministic")
class RemembersItsLastInput(Specimen):
    """The last input stays on the module, and with it the graph that made it. After fla #766: the count of tokens seen
    was kept where it outlived a call."""

    def heads(self, x):
        self.last = x
        return super().heads(x)


@mutant(check="results_are_deterministic")
class DrawsWhatItDoesNotNeed(Specimen):
    """Evaluation draws a number from the global generator. After HazyResearch/zoology, whose data generator seeds the
    global one."""

    def heads(self, x):
        torch.rand(())
        return super().heads(x)


@mutant(check="results_are_deterministic")
class CountsTokensOnTheModule(Specimen):
    """Tokens read are counted on the module, not in the state. After fla #766: the count of tokens seen was committed
    too early, and moved the positions of later layers."""

    read = 0

    def positions(self, state, x, call):
        positions = super().positions(state._replace(position=0 * state.position + self.read), x, call)
        self.read += x.shape[1]
        return positions


# ---- declarations


@mutant(check="what_is_not_declared_is_refused")
class TakesAnyBoundaries(Specimen):
    """Boundaries of documents are not looked at. After fla #838: the boundaries that a user gave were overwritten where
    there was a mask, and nothing said so."""

    def _require_shapes(self, x, state, cu_seqlens):
        super()._require_shapes(x, state if cu_seqlens is None else None, None)

    def _documents(self, x, cu_seqlens):
        known = cu_seqlens is not None
        return Documents(cu_seqlens, document_of_token(cu_seqlens, x.shape[1]), None) if known else None


@mutant(check="configurations_round_trip")
class IgnoresTheConfiguredParadigm(Specimen):
    """The configured paradigm has no effect. After fla 0.6.0: in training `attn_mode` has none."""

    def __init__(self, config, d_model):
        super().__init__(config, d_model)
        self.paradigm = Paradigm.CHUNKWISE


@mutant(check="parameters_round_trip")
class DrawsSignsThatAreNotSaved(Cached):
    """Queries and keys have random signs, which the state_dict lacks: a cache fits no mixer that was loaded. After fla
    #754 and #820: loaded weights were initialised again."""

    def reset_parameters(self):
        super().reset_parameters()
        weight = self.out_proj.weight
        self.register_buffer("signs", torch.randn(len(weight), device=weight.device).sign(), persistent=False)

    def heads(self, x):
        q, k, v = super().heads(x)
        return q * self.signs, k * self.signs, v


@mutant(check="parameters_round_trip")
class SumsInAnOrderThatIsNotSaved(Cached):
    """Channels are summed in a random order, which the state_dict lacks: loaded, the mixer gives other bits. After fla
    #754 and #820: loaded weights were initialised again."""

    def reset_parameters(self):
        super().reset_parameters()
        weight = self.out_proj.weight
        self.register_buffer("order", torch.randperm(len(weight), device=weight.device), persistent=False)

    def heads(self, x):
        q, k, v = F.linear(x[..., self.order], self.in_proj.weight[:, self.order]).chunk(3, dim=-1)
        return q, k, v


@mutant(check="every_parameter_is_initialised")
class LeavesTheBias(Specimen):
    """reset_parameters forgets the bias. After state-spaces/mamba: it initialises by the names of
    parameters."""

    def reset_parameters(self):
        for projection in (self.in_proj, self.decay_proj, self.out_proj):
            nn.init.xavier_uniform_(projection.weight)


@mutant(check="every_parameter_learns")
class HasAGateThatNothingReads(Specimen):
    """A parameter is built and never used. After fla #427: `conv_bias` was accepted and unused; so are RetNet's
    `use_short_conv` and `conv_size`."""

    def reset_parameters(self):
        super().reset_parameters()
        self.gate = nn.Parameter(torch.ones_like(self.decay_proj.bias))


@mutant(check="flops_are_as_declared")
class CountsFlopsOfAttention(Specimen):
    """flops counts all pairs of tokens in every paradigm. After fla-org/flame: its MFU credits a quadratic attention
    term to linear mixers."""

    def flops(self, length, paradigm, context=0):
        return super().flops(length, Paradigm.PARALLEL, context)


@mutant(check="flops_are_as_declared")
class PicksTheParadigmByLength(Specimen):
    """Short segments are recurrent, whatever was asked for. After fla's layers: up to 64 tokens they take the fused
    recurrent kernel in silence."""

    def mix(self, x, call):
        return super().mix(x, call._replace(paradigm=Paradigm.RECURRENT) if x.shape[1] <= 64 else call)


# ---- torch.compile


@mutant(check="training_compiles_into_one_graph")
class AsksTheDeviceForAnOffset(Specimen):
    """A number is read back from the device while mixing several tokens. After fla's retention:
    `seqlen_offset.max().item()` in every layer."""

    def positions(self, state, x, call):
        if call.documents is None and x.shape[1] > 1 and state.position.max().item() < 0:
            raise ValueError("a position is negative")
        return super().positions(state, x, call)


@mutant(check="packing_compiles_into_one_graph")
class LoopsOverDocuments(Specimen):
    """Positions of packed documents come from a loop over their lengths. After fla #752: the indices of chunks wait for
    the device."""

    def positions(self, state, x, call):
        if call.cu_seqlens is None:
            return super().positions(state, x, call)
        lengths = call.cu_seqlens.diff().tolist()
        return torch.cat([at + torch.arange(n) for at, n in zip(state.position, lengths, strict=True) if n])[None]


BUFFERS = {"next": 0}


@mutant(check="decoding_compiles_once")
class NumbersItsBuffersInPython(Specimen):
    """Steps take two buffers in turn, told apart by a Python number. After pytorch/torchtitan PR #2823: more than ten
    compilations, as two arguments were numbers and not tensors."""

    def positions(self, state, x, call):
        if x.shape[1] == 1:
            BUFFERS["next"] = 1 - BUFFERS["next"]
        return super().positions(state, x, call) + 0 * BUFFERS["next"]
