"""Wrong mixers: the equations of the contract, causality, documents and rows."""

from contextlib import contextmanager, nullcontext

import torch
from torch import nn

from seqmix import Paradigm
from seqmix.mixers.base.state import detach
from seqmix.ops.runtime.packing import Documents

from .registry import mutant
from .specimen import Cache, Cached, Specimen, SpecimenState


@mutant(check="paradigms_agree", after="fla #1143 and #907: masks of tails")
class TakesALengthForWholeBlocks(Specimen):
    """The parallel form takes 129 tokens for blocks of 128, and doubles the last."""

    def parallel(self, tokens, memory, weight):
        o, *rest = super().parallel(tokens, memory, weight)
        return (torch.cat((o[:, :, :128], 2 * o[:, :, 128:]), dim=2) if o.shape[2] == 129 else o), *rest


@mutant(check="paradigms_agree", after="NX-AI/mlstm_kernels #16: the fused backward was wrong, the forward right")
class BackwardLeavesOutFarPairs(Specimen):
    """The parallel form's backward pass leaves out pairs of tokens far apart."""

    def scores(self, q, k):
        scores = super().scores(q, k)
        far = torch.ones_like(scores, dtype=torch.bool).tril(-99)
        return torch.where(far, scores.detach(), scores)


@contextmanager
def _unwrapped(mixer):
    """Within, the output projection is its weight alone, past hooks and what wraps it."""
    wrapped = mixer.out_proj
    mixer.out_proj = nn.Linear(*wrapped.weight.T.shape, bias=False, device="meta")
    mixer.out_proj.weight = wrapped.weight
    try:
        yield
    finally:
        mixer.out_proj = wrapped


@mutant(
    check="wrapped_projections_count_in_every_paradigm",
    after="mambapy 1.2.0: step reads dt_proj.weight, forward calls dt_proj, so LoRA is lost",
)
class StepsPastAnAdapter(Specimen):
    """The recurrent paradigm multiplies by the weight of its output projection, past what an adapter adds: a model
    fine-tuned with LoRA decodes as if it had not been."""

    def mix(self, x, call):
        with _unwrapped(self) if call.paradigm is Paradigm.RECURRENT else nullcontext():
            return super().mix(x, call)


@mutant(check="pieces_equal_the_whole", after="fla #126: a cache's offset advanced by the number of heads")
class CacheCountsSegments(Cached):
    """The cache counts segments, not tokens."""

    def extended(self, state, k, v):
        cache = super().extended(state, k, v)
        return cache._replace(length=cache.length - k.shape[1] + 1)


@mutant(check="pieces_equal_the_whole", after="local-attention 1.11.2: cached keys are rotated twice")
class RotatesCachedKeysTwice(Cached):
    """Keys are cached after they were rotated, and rotated again with the next segment."""

    def mix(self, x, call):
        q, k, v = self.heads(x)
        keys, values, length = self.extended(call.state, k, v)
        position = torch.arange(keys.shape[1], device=x.device, dtype=torch.float64)[:, None]
        angles = position * 100 ** -torch.linspace(0, 1, x.shape[2] // 2, device=x.device, dtype=torch.float64)
        keys = self.turned(keys, angles)
        scores = self.turned(q, angles[-x.shape[1] :]) @ keys.mT * q.shape[-1] ** -0.5
        weights = self.masked(scores, ~self.seen(*scores.shape[1:], x.device)).softmax(-1)
        return self.out_proj(weights @ values), Cache(keys, values, length)

    def turned(self, x, angles):
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


@mutant(check="steps_equal_the_whole", after="athms/mad-lab #5: a recurrent form writes into its argument")
class GivesOutOneStateTwice(Specimen):
    """init_state returns the same tensors again, and steps write in place: one sequence starts where another ended."""

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


@mutant(
    check="gradients_flow_through_states",
    after="fla PRs #636, #1131 and #1181: recurrent kernels without a backward pass",
)
class DetachesTheStateInTraining(Specimen):
    """In training mode the state given is detached, so that nothing learns through it."""

    def before(self, state, rows):
        state = super().before(state, rows)
        return state._replace(memory=state.memory.detach()) if self.training else state


@mutant(check="the_future_changes_nothing", after="mega 0.1.0: the Laplacian's scores are scaled by 1 / seq_len")
class ScalesByTheLength(Cached):
    """Scores are divided by the number of tokens of the segment."""

    def masked(self, scores, unseen):
        return super().masked(scores / scores.shape[1], unseen)


@mutant(
    check="the_future_changes_nothing",
    after="performer-pytorch 1.1.4: the keys' stabiliser is a maximum over all tokens",
)
class StabilisesByAllTokens(Cached):
    """Features of keys are relative to the largest of all tokens, and a constant is added to them."""

    def heads(self, x):
        q, k, v = super().heads(x)
        return q, (k - k.amax((1, 2), keepdim=True)).exp() + 0.01, v


@mutant(check="chunk_size_changes_nothing", after="microsoft/torchscale #77: the chunkwise form differs")
class ScalesByTheChunk(Specimen):
    """The chunk size is part of the map, in all paradigms."""

    def heads(self, x):
        qk, v, a = super().heads(x)
        return qk, v * self.config.chunk_size**-0.5, a


@mutant(check="documents_are_sequences", after="fla #515: RetNet's rotary cache and rows of different lengths")
class FirstRowSpeaksForAll(Specimen):
    """All rows have the position of the first."""

    def positions(self, state, x, call):
        if call.documents is not None:
            return super().positions(state, x, call)
        return super().positions(state._replace(position=state.position[:1]), x, call)


@mutant(check="documents_are_sequences", after="state-spaces/mamba #180: kernels know blocks and no documents")
class MovesBoundariesToBlocks(Specimen):
    """In rows of more than 32 tokens, document boundaries move to multiples of 16."""

    def mix(self, x, call):
        if call.cu_seqlens is not None and x.shape[1] > 32:
            cuts = call.cu_seqlens
            ends = ((cuts[1:-1] + 15) // 16 * 16).clamp(max=x.shape[1])
            call = call._replace(documents=Documents.of(torch.cat((cuts[:1], ends, cuts[-1:])), x.shape[1]))
        return super().mix(x, call)


@mutant(
    check="gradients_of_documents_are_those_of_sequences",
    after="transformers PR #46588: Mamba2Mixer ignores cu_seq_lens without its kernels",
)
class LeaksWhereNoStateIsWanted(Specimen):
    """Packed documents are one sequence where no final state is wanted, as in training."""

    def mix(self, x, call):
        if call.documents is None or call.return_state:
            return super().mix(x, call)
        return super().mix(x, call._replace(documents=None, state=None))


@mutant(
    check="gradients_of_documents_are_those_of_sequences",
    after="NovaSky-AI/SkyRL PR #2056 and fla #837: packed gradients silently wrong",
)
class PackingDetachesTheState(Specimen):
    """Packed, the initial states have no gradient."""

    def mix(self, x, call):
        given = call.state if call.state is None or call.documents is None else detach(call.state)
        return super().mix(x, call._replace(state=given))


@mutant(check="rows_are_independent", after="fla #126: the wrong dimension was counted")
class StartsAtTheRowsNumber(Specimen):
    """The first token of row n has position n."""

    def init_state(self, batch_size, *, max_length=None):
        return super().init_state(batch_size)._replace(position=torch.arange(batch_size, device=self.device))


@mutant(check="strides_change_nothing", after="fla #871: what is not contiguous is read as if it were")
class ReadsMemoryAsItLies(Specimen):
    """Channels are read as neighbours in memory, whatever the strides."""

    def heads(self, x):
        return super().heads(x.as_strided(x.shape, (*x.stride()[:-1], 1), x.storage_offset()))


@mutant(check="strides_change_nothing", after="fla #871: a dy that is not contiguous")
class ReadsTheGradientAsItLies(Specimen):
    """The backward pass reads the gradient from above as if it were contiguous."""

    def mix(self, x, call):
        y, after = super().mix(x, call)
        return _AsItLies.apply(y), after


class _AsItLies(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y):
        return y.clone()

    @staticmethod
    def backward(ctx, above):
        return above.as_strided(above.shape, torch.empty(above.shape, device="meta").stride())


@mutant(check="rows_may_differ_in_length", after="huggingface/transformers: cache_position is one number for all rows")
class AllRowsAreAtTheLongest(Specimen):
    """All rows of a batch have the position of the longest."""

    def positions(self, state, x, call):
        if call.documents is not None:
            return super().positions(state, x, call)
        return super().positions(state._replace(position=state.position.amax().expand(len(x))), x, call)


@mutant(check="thousands_of_tokens_agree", after="fla #515: a rotary table that is too short")
class EndsItsTableAtEightThousand(Specimen):
    """Positions are read from a table of 8,192 rows, modulo its size, where a text begins; from a state they are
    computed."""

    def positions(self, state, x, call):
        return super().positions(state, x, call) % (8192 if call.state is None else 2**62)
