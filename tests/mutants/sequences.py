"""Wrong mixers: the equations of the contract, packing, batches, states and positions."""

from dataclasses import replace

import torch
from torch import nn

from seqmix.mixers.state import detach, select
from seqmix.ops.runtime.packing import Documents
from seqmix.ops.runtime.paradigm import Paradigm

from .registry import mutant
from .specimen import Cache, Cached, CachedConfig, Specimen, SpecimenConfig, SpecimenState


@mutant(check="paradigms_agree")
class BackwardLeavesOutFarPairs(Specimen):
    """The parallel form's backward pass leaves out pairs of tokens far apart. After NX-AI/mlstm_kernels #16: on a new
    GPU the fused backward was wrong while the forward was right."""

    def scores(self, q, k):
        scores = super().scores(q, k)
        far = torch.ones_like(scores, dtype=torch.bool).tril(-99)
        return torch.where(far, scores.detach(), scores)


@mutant(check="paradigms_agree")
class TakesALengthForWholeBlocks(Specimen):
    """The parallel form takes 129 tokens for blocks of 128, and doubles the last. After fla #1143 and #907: masks of
    tails."""

    def parallel(self, tokens, memory, weight):
        o, *rest = super().parallel(tokens, memory, weight)
        return (torch.cat((o[:, :, :128], 2 * o[:, :, 128:]), dim=2) if o.shape[2] == 129 else o), *rest


@mutant(check="pieces_equal_the_whole")
class CacheCountsSegments(Cached):
    """The cache counts segments, not tokens. After fla #126: a cache's offset advanced by the number of heads."""

    def extended(self, state, k, v):
        cache = super().extended(state, k, v)
        return cache._replace(length=cache.length - k.shape[1] + 1)


@mutant(check="gradients_flow_through_states")
class CachesWithoutGrad(Cached):
    """In decoding, the cache is detached. After fla PRs #636, #1131 and #1181: recurrent kernels without a backward
    pass."""

    def extended(self, state, k, v):
        return super().extended(state if state is None or k.shape[1] > 1 else detach(state), k, v)


@mutant(check="steps_equal_the_whole")
class GivesOutOneStateTwice(Specimen):
    """init_state returns the same tensors again, and steps write in place: one sequence starts where another ended.
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
    """The causal mask is -28 in the exponent, so e^-28 of the future leaks: a comparison at 1e-9 lets it pass."""

    def decays(self, a):
        leak = torch.full((a.shape[-1],) * 2, -28.0, device=a.device, dtype=a.dtype).exp().triu(1)
        return super().decays(a) + leak


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
    """The chunk size is part of the map, in all paradigms. After microsoft/torchscale #77: the chunkwise form
    differed."""

    def heads(self, x):
        qk, v, a = super().heads(x)
        return qk, v * self.config.chunk_size**-0.5, a


@mutant(check="documents_are_sequences")
class FirstRowSpeaksForAll(Specimen):
    """All rows have the position of the first. After fla #515: RetNet did not run on sequences of different lengths in
    one batch, because of its rotary cache."""

    def positions(self, state, x, call):
        if call.documents is not None:
            return super().positions(state, x, call)
        return super().positions(state._replace(position=state.position[:1]), x, call)


@mutant(check="documents_are_sequences")
class TakesOneDocumentForChunks(Specimen):
    """Where one document is packed alone, each of its chunks begins as it does, as if chunks were documents."""

    alone = False

    def mix(self, x, call):
        self.alone = call.documents is not None and len(call.documents.cu_seqlens) == 2
        return super().mix(x, call)

    def chunkwise(self, tokens, memory, weight):
        if not self.alone:
            return super().chunkwise(tokens, memory, weight)
        chunks = zip(*(x.split(self.config.chunk_size, dim=2) for x in tokens), strict=True)
        outputs, weights, memories, normalisers = zip(*(self.parallel(c, memory, weight) for c in chunks), strict=True)
        return torch.cat(outputs, dim=2), torch.cat(weights, dim=2), memories[-1], normalisers[-1]


@mutant(check="documents_are_sequences")
class MovesBoundariesToBlocks(Specimen):
    """In rows of more than 32 tokens, document boundaries move to multiples of 16. After state-spaces/mamba #180:
    kernels know blocks and no documents."""

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


@mutant(check="rows_are_independent")
class StartsAtTheRowsNumber(Specimen):
    """The first token of row n has position n. After fla #126: the wrong dimension was counted."""

    def init_state(self, batch_size, *, max_length=None):
        return super().init_state(batch_size)._replace(position=torch.arange(batch_size, device=self.device))


@mutant(check="rows_are_independent")
class MixesTheRowsOfLargeBatches(Specimen):
    """In batches of more than five, every row sees the mean of all: batches of two or three do not show it."""

    def heads(self, x):
        return super().heads(x + x.mean(0, keepdim=True) if len(x) > 5 else x)


@mutant(check="rows_are_independent")
class StepsOverAGridOf128Rows(Specimen):
    """Token by token, of a batch of more than 128 rows those beyond go on from the states of the first."""

    def recurrent(self, tokens, memory, weight):
        row = torch.arange(len(memory), device=memory.device) % 128
        return super().recurrent(tokens, memory[row], weight[row])


@mutant(check="rows_are_independent")
class CountsTokensOfABatchInSixteenBits(Specimen):
    """Values of a batch of more than 65,536 tokens are looked up modulo as many; outputs are small, as of a layer that
    a model of many begins with."""

    def heads(self, x):
        qk, v, a = super().heads(x)
        token = torch.arange(v.shape[0] * v.shape[2], device=v.device) % 65_536
        rows = v.transpose(1, 2).flatten(0, 1)[token].unflatten(0, (len(v), -1))
        return qk, 0.005 * rows.transpose(1, 2), a


@mutant(check="strides_change_nothing")
class ReadsMemoryAsItLies(Specimen):
    """Channels are read as neighbours in memory, whatever the strides. After fla #871: a gradient that was not
    contiguous."""

    def heads(self, x):
        return super().heads(x.as_strided(x.shape, (*x.stride()[:-1], 1), x.storage_offset()))


@mutant(check="the_initial_state_is_nothing_read")
class AnswersDifferentlyWithoutACache(Specimen):
    """Where no state is wanted, inputs are rounded on a faster path. After lucidrains/x-transformers #219, #311 and
    #322: text differed with the cache on and off."""

    def mix(self, x, call):
        return super().mix(x if call.return_state else x.to(torch.bfloat16).to(x.dtype), call)


@mutant(check="the_initial_state_is_nothing_read")
class DetachesItsBeginning(Specimen):
    """The initial memory is learned, but not from a state that init_state makes. After fla PRs #636, #1131 and #1181:
    gradients of initial states were lost."""

    def reset_parameters(self):
        super().reset_parameters()
        heads = self.config.n_heads
        self.start = nn.Parameter(torch.ones(heads, self.width, self.width, device=self.in_proj.weight.device))

    def init_state(self, batch_size, *, max_length=None):
        state = super().init_state(batch_size)
        return state._replace(memory=state.memory + self.start.detach().to(self.state_dtype))

    def before(self, state, rows):
        if state is not None:
            return state
        state = super().before(state, rows)
        return state._replace(memory=state.memory + (self.start - self.start.detach()).to(self.state_dtype))


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
    """An empty cache, recognised by its class."""


@mutant(check="a_state_survives_the_disk")
class TellsAnEmptyCacheByItsClass(Cached):
    """An empty cache is recognised by its class, so a loaded one counts as empty. After fla #571, #582 and #601: caches
    as classes of another library broke whenever those changed."""

    def init_state(self, batch_size, *, max_length=None):
        return Unread(*super().init_state(batch_size))

    def extended(self, state, k, v):
        if isinstance(state, Unread):
            state = super().init_state(len(k))._replace(length=state.length)
        return super().extended(state, k, v)


@mutant(check="a_state_is_never_written_under_grad")
class WritesWhatStoodThere(Specimen):
    """Positions are clamped in place, which changes no number and breaks whoever saved them for the backward pass.
    After huggingface/transformers PR #47046: xLSTM's state, updated in place, failed under autograd."""

    def before(self, state, rows):
        state = super().before(state, rows)
        state.position.clamp_(min=0)
        return state


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


@mutant(check="a_state_has_the_declared_size")
class KeepsAllAliveBehindAView(Specimen):
    """A leaf is a view of what the whole segment needed, and keeps all of it in memory."""

    def mix(self, x, call):
        y, after = super().mix(x, call)
        every = after.weight[..., None].expand(*after.weight.shape, x.shape[1]).contiguous()
        return y, after._replace(weight=every[..., -1])


@mutant(check="a_state_has_the_declared_size")
class SaysConstantAndGrows(CachedConfig):
    """Declares a constant state, and has a growing cache. After HazyResearch/zoology: by a slip of if and elif, the
    state size of a Mamba block is None."""

    @property
    def traits(self):
        return replace(super().traits, state="constant")


@mutant(check="position_matters_only_where_declared")
class SaysPositionMatters(SpecimenConfig):
    """Declares that positions matter, and they do not. After the flags of xformers' factory, set by hand and not
    tested."""

    @property
    def traits(self):
        return replace(super().traits, shift_invariant=False)


@mutant(check="late_positions_are_exact")
class HasAnglesInFloat32(Specimen):
    """Angles are float32 where inputs are: off by 2e-2 at position 1e6. After every rotary embedding that does so."""

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


class Residual(Specimen):
    """A healthy layer that mixes the first one's values into its own."""

    first = None

    def accept_first_values(self):
        self.takes_first_values = True
        self.share = nn.Parameter(torch.zeros(self.config.n_heads * self.width, device=self.device, dtype=self.dtype))

    def mix(self, x, call):
        self.first = self.given(call)
        y, after = super().mix(x, call)
        return y, after, super().heads(x)[1].transpose(1, 2).flatten(2)

    def given(self, call):
        return call.first_values

    def heads(self, x):
        qk, v, a = super().heads(x)
        if self.first is not None:
            mixed = self.mixed(v.transpose(1, 2).flatten(2), self.first, self.share.sigmoid())
            v = mixed.unflatten(-1, (-1, self.width)).transpose(1, 2)
        return qk, v, a

    def mixed(self, own, first, share):
        return own.lerp(first.to(own), share.to(own))


class ResidualConfig(SpecimenConfig):
    layer = Residual

    @property
    def traits(self):
        return replace(super().traits, value_residual=True)


class Detaching(Residual):
    def given(self, call):
        first = super().given(call)
        return first if first is None or call.paradigm is not Paradigm.RECURRENT else first.detach()


@mutant(check="first_values_are_read_with_their_tokens")
class DetachesFirstValues(ResidualConfig):
    """In the recurrent form, the first layer's values have no gradient. After fla PR #145: they were written in place,
    and recomputed layers did not pass them on."""

    layer = Detaching


class Lerping(Residual):
    def mixed(self, own, first, share):
        return own.lerp(first, share)


@mutant(check="first_values_are_read_with_their_tokens")
class MixesDtypesUnderAutocast(ResidualConfig):
    """Values of the first layer are mixed in by a product that takes one dtype, and under autocast there are two."""

    layer = Lerping


@mutant(check="thousands_of_tokens_agree")
class WrapsAround(Specimen):
    """Where no state is wanted, tokens are read by a transform of the next power of two: the last of just as many come
    round to the first. After convolutions by FFT that are not padded by their filter."""

    def mix(self, x, call):
        size = x.shape[1]
        whole = call.state is None and not call.return_state and call.documents is None and size > 512
        if whole and size & (size - 1) == 0:
            x = torch.cat((x[:, :1] + 0.1 * x[:, -1:], x[:, 1:]), dim=1)
        return super().mix(x, call)
