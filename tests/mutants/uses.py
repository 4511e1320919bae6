"""Wrong mixers: right where they are evaluated, wrong in a way of using them (packing, precision, layers, lengths)."""

from contextlib import contextmanager, nullcontext
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from seqmix import Paradigm

from .registry import mutant
from .specimen import Cached, Specimen, SpecimenConfig


@mutant(check="documents_are_sequences")
class CountsDocumentsInEightBits(Specimen):
    """Numbers of documents overflow after 255: the next ones are taken for the first."""

    def unpack(self, tokens, packed, rows):
        return super().unpack(tokens, packed % 256, rows)


@mutant(check="packing_keeps_precision")
class PacksInBFloat16(Specimen):
    """In float32, packed values are rounded to bfloat16. After fla #36: chunk and recurrent differed in precision."""

    def unpack(self, tokens, packed, rows):
        q, k, v, *rest = super().unpack(tokens, packed, rows)
        return [q, k, v if v.dtype == torch.float64 else v.to(torch.bfloat16).to(v.dtype), *rest]


@mutant(check="autocast_changes_only_precision")
class HalvesGradientsUnderAutocast(Specimen):
    """Under autocast a gradient is half of what it should be. After fla-org/flame #30 and
    fla #559: confusion of dtypes with and without autocast."""

    def heads(self, x):
        qk, v, a = super().heads(x)
        return qk, (v + v.detach()) / 2 if torch.is_autocast_enabled("cpu") else v, a


@mutant(check="long_segments_do_not_drift")
class SubtractsRunningSums(Specimen):
    """What is left of a token is the difference of two running sums of log-decays, which float32 rounds where they are
    large."""

    def decays(self, a):
        passed = a.cumsum(-1)
        future = torch.ones(a.shape[-1], a.shape[-1], dtype=torch.bool, device=a.device).triu(1)
        return (passed[..., None] - passed[..., None, :]).masked_fill(future, -torch.inf).exp()


@mutant(check="long_segments_do_not_drift")
class CountsInTheTokensDtype(Specimen):
    """Positions inside a segment are numbers of the tokens' dtype: bfloat16 counts to 256. After every rotary embedding
    that does so."""

    def positions(self, state, x, call):
        positions = super().positions(state, x, call)
        first = positions[:, :1]
        return first + (positions - first).to(x.dtype).to(torch.int64)


@mutant(check="the_future_changes_nothing")
class MasksScoresWithTenThousand(Cached):
    """The causal mask is -10,000, which large scores pass. After huggingface/transformers, whose early masks
    were of this size."""

    def masked(self, scores, unseen):
        return scores.masked_fill(unseen, -1e4)


@mutant(check="the_future_changes_nothing")
class MasksTrainingWithTenThousand(Cached):
    """Where text is trained from nothing and no cache is wanted, -10,000 is added to scores of later tokens."""

    def mix(self, x, call):
        if call.state is not None or call.return_state:
            return super().mix(x, call)
        q, k, v = self.heads(x)
        later = torch.full((x.shape[1], x.shape[1]), -1e4).triu(1)
        return self.out_proj(((q @ k.mT) * q.shape[-1] ** -0.5 + later).softmax(-1) @ v), None


@mutant(check="results_share_no_memory")
class CachesTheTokensThemselves(Cached):
    """The cache holds the tokens, in the caller's own memory: what is written there later becomes the past."""

    def mix(self, x, call):
        seen = x if call.state is None else torch.cat((call.state.keys, x), dim=1)
        y, after = super().mix(seen, call._replace(state=None))
        return y[:, -x.shape[1] :], after._replace(keys=seen)


@mutant(check="copies_are_as_good")
class ProjectsByAClosure(Specimen):
    """The projection is a function that closes over the module, so that a copy reads the original's parameters."""

    def reset_parameters(self):
        super().reset_parameters()
        self.project = lambda x: F.linear(x, self.in_proj.weight)

    def heads(self, x):
        qkv = self.project(x).unflatten(-1, (-1, self.width)).transpose(1, 2)
        qk, v = qkv.split((2 * self.config.n_heads, self.config.n_heads), dim=1)
        return qk, v, super().heads(x)[2]


@mutant(check="init_state_is_where_the_mixer_is")
class StartsOnTheDefaultDevice(Specimen):
    """Positions of the initial state are on the default device, wherever the mixer is."""

    def init_state(self, batch_size, *, max_length=None):
        return super().init_state(batch_size)._replace(position=torch.zeros(batch_size, dtype=torch.int64))


@mutant(check="rows_may_differ_in_length")
class AllRowsAreAtTheLongest(Specimen):
    """All rows of a batch have the position of the longest. After huggingface/transformers: `cache_position` is one
    number for all rows."""

    def positions(self, state, x, call):
        if call.documents is not None:
            return super().positions(state, x, call)
        return super().positions(state._replace(position=state.position.amax().expand(len(x))), x, call)


@mutant(check="tokens_are_counted_by_integers")
class CountsInItsDenominator(Specimen):
    """Nothing decays, and the denominator counts tokens in floating point: after 2^24 float32 counts no further."""

    def heads(self, x):
        qk, v, a = super().heads(x)
        return qk, v, 0 * a


@mutant(check="every_option_changes_something")
class HasAnOptionThatNothingReads(SpecimenConfig):
    """An option is accepted and read by nothing. After fla #427: `conv_bias` was."""

    normalize: bool = True


@mutant(check="segments_compile_into_one_graph")
class LooksWhetherTheStateIsEmpty(Specimen):
    """A state that was given is looked at: an empty one takes another path."""

    def before(self, state, rows):
        return super().before(state if state is None or state.memory.any() else None, rows)


@mutant(check="graphs_follow_sizes")
class IsAnotherWhereCompiledForMore(Specimen):
    """Compiled, segments of more than ten tokens are not divided."""

    def divide(self, o, z):
        return o if torch.compiler.is_compiling() and o.shape[2] > 10 else super().divide(o, z)


CALLS = {"next": 0}


@mutant(check="graphs_follow_sizes")
class NumbersItsPackedCallsInPython(Specimen):
    """Packed calls of which no final state is wanted take turns with three buffers by a Python number: every one
    compiles. After pytorch/torchtitan PR #2823."""

    def mix(self, x, call):
        if call.documents is not None and not call.return_state:
            CALLS["next"] = (CALLS["next"] + 1) % 3
        return super().mix(x + 0 * CALLS["next"], call)


@mutant(check="flops_are_as_declared")
class CountsTwiceInDecoding(SpecimenConfig):
    """flops counts multiply and add of the recurrent form twice."""

    def build(self, d_model, *, layer_idx, n_layers):
        mixer = super().build(d_model, layer_idx=layer_idx, n_layers=n_layers)
        once = mixer.flops
        mixer.flops = lambda length, paradigm, context=0: (1 + (paradigm == "recurrent")) * once(length, paradigm)
        return mixer


@mutant(check="flops_are_as_declared")
class CountsInThirtyTwoBits(Specimen):
    """Products of tokens and weights overflow at 2^31."""

    def flops(self, length, paradigm, context=0):
        return torch.tensor(super().flops(length, paradigm, context)).to(torch.int32).item()


@mutant(check="a_state_has_the_declared_size")
class GrowsAfterAHundredTokens(Specimen):
    """The state gets a second copy after a hundred tokens, whose size nobody looks at."""

    def mix(self, x, call):
        y, after = super().mix(x, call)
        return y, after._replace(weight=after.weight.repeat(1, 2)[:, : after.weight.shape[1]]) if x.shape[
            1
        ] > 99 else after


@mutant(check="segments_of_ranks_are_the_whole")
class SaysThatItSplits(Specimen):
    """Declares its own context parallelism, and takes every rank's segment for the first."""

    supports_context_parallel = True

    def mix(self, x, call):
        return super().mix(x, call._replace(documents=None, cp_group=None) if call.cp_group else call)


@mutant(check="paradigms_agree")
class ScoresByOneTile(Specimen):
    """The parallel form's scores are of the first 32 channels of a head: a second tile is never read."""

    def scores(self, q, k):
        return super().scores(q[..., :32], k[..., :32])


@mutant(check="paradigms_agree")
class LearnsOneTileOfChannels(Specimen):
    """Of more than 64 tokens, channels of a head after the 64th get no gradient of scores: the parallel form's backward
    pass reads one tile of keys."""

    def scores(self, q, k):
        rest = q[..., 64:]
        return super().scores(torch.cat((q[..., :64], rest.detach() if q.shape[2] > 64 else rest), dim=-1), k)


@mutant(check="paradigms_agree")
class StepsByWholeTilesOfValues(Specimen):
    """The recurrent form goes over tiles of 128 value columns, whose number a division rounds down: of a head of 192
    the last 64 are never written."""

    def recurrent(self, tokens, memory, weight):
        q, k, v, *rest = tokens
        known = v.shape[-1] // 128 * 128 or v.shape[-1]
        return super().recurrent([q, k, F.pad(v[..., :known], (0, v.shape[-1] - known)), *rest], memory, weight)


@mutant(check="rows_are_independent")
class MixesTheRowsBeyondABlock(Specimen):
    """Rows from the 33rd on read the tokens of the first."""

    def heads(self, x):
        return super().heads(torch.cat((x[:32], x[:1].expand(len(x) - 32, -1, -1))) if len(x) > 32 else x)


@mutant(check="documents_are_sequences")
class RemembersTheDocumentsOfASize(Specimen):
    """The document of every token is cached by the numbers of tokens and documents."""

    def reset_parameters(self):
        super().reset_parameters()
        self.known = {}

    def unpack(self, tokens, packed, rows):
        return super().unpack(tokens, self.known.setdefault((len(packed), rows), packed), rows)


@mutant(check="init_state_is_where_the_mixer_is")
class BeginsInOnePlace(Specimen):
    """States that are allocated for decoding share their memory: two texts at once overwrite each other."""

    def init_state(self, batch_size, *, max_length=None):
        if max_length is None:
            return super().init_state(batch_size)
        if getattr(self, "room", None) is None or len(self.room.position) != batch_size:
            self.room = super().init_state(batch_size)
        return self.room


@mutant(check="paradigms_agree")
class HasTwoOptionsThatDoNotGoTogether(SpecimenConfig):
    """With two options together, and only then, the parallel form is another."""

    first: Literal["a", "b", "c"] = "a"
    second: Literal["a", "b", "c"] = "a"

    def build(self, d_model, *, layer_idx, n_layers):
        mixer = super().build(d_model, layer_idx=layer_idx, n_layers=n_layers)
        if self.first == self.second == "c":
            mixer.scores = lambda q, k: 2 * q @ k.mT
        return mixer


@mutant(check="exported_graphs_are_the_mixer")
class IsAnotherWhereExported(Specimen):
    """Exported, outputs are not divided."""

    def divide(self, o, z):
        return o if torch.compiler.is_exporting() else super().divide(o, z)


@mutant(check="paradigms_agree")
class IsAnotherInLaterLayers(SpecimenConfig):
    """In all layers but the first, the parallel form's scores are scaled."""

    def build(self, d_model, *, layer_idx, n_layers):
        mixer = super().build(d_model, layer_idx=layer_idx, n_layers=n_layers)
        if layer_idx:
            mixer.scores = lambda q, k: 1.01 * q @ k.mT
        return mixer


@mutant(check="a_constant_state_is_never_written")
class RollsTheMemoryInPlace(Specimen):
    """In inference mode one token's state is written over the state given, as decoding kernels do."""

    def mix(self, x, call):
        y, after = super().mix(x, call)
        if call.state is None or x.shape[1] > 1 or not torch.is_inference_mode_enabled():
            return y, after
        return y, after._replace(memory=call.state.memory.copy_(after.memory))


@mutant(check="a_converted_mixer_is_of_its_dtype")
class KeepsItsAnglesInItsFirstDtype(Specimen):
    """A table of angles is made at the first call, in the dtype that the mixer has then."""

    table = None

    def angles(self, positions):
        if self.table is None or self.table.shape != (*positions[:, None].shape, self.width // 2):
            self.table = super().angles(positions).to(self.dtype)
        return self.table.to(torch.float64)


@mutant(check="steps_equal_the_whole")
class CutsAScaleInDecoding(SpecimenConfig):
    """A scale that a field allows up to 8 is cut at 2 where one token comes alone; no example is above 1."""

    scale: int = Field(default=1, ge=1, le=8)

    def build(self, d_model, *, layer_idx, n_layers):
        mixer, divide = super().build(d_model, layer_idx=layer_idx, n_layers=n_layers), Specimen.divide
        mixer.divide = lambda o, z: (self.scale if o.shape[2] > 1 else min(self.scale, 2)) * divide(mixer, o, z)
        return mixer


@mutant(check="thousands_of_tokens_agree")
class ReadsTheNewestTwoThousand(Cached):
    """Decoding reads the newest 2,048 keys: as many as its programs have. After split-KV kernels with a fixed grid."""

    def seen(self, queries, keys, device):
        seen = super().seen(queries, keys, device)
        return seen & (torch.arange(keys, device=device) >= keys - 2048) if queries == 1 else seen


@mutant(check="calls_stay_on_the_device")
class CountsOnTheProcessor(Specimen):
    """Angles are made of positions on the CPU, wherever the tokens are."""

    def angles(self, positions):
        pairs = torch.arange(self.width // 2, dtype=torch.float64)
        return positions[:, None, :, None].to(torch.float64) * 100 ** -(2 * pairs / self.width)


@mutant(check="documents_are_sequences")
class TakesZerosForPadding(Specimen):
    """In a packed row a token of zeros is taken for padding, at which nothing decays."""

    def heads(self, x):
        qk, v, a = super().heads(x)
        padding = (x == 0).all(-1)[:, None]
        return qk, v, torch.where(padding, 0, a) if self.packed else a

    packed = False

    def mix(self, x, call):
        self.packed = call.documents is not None
        try:
            return super().mix(x, call)
        finally:
            self.packed = False


@mutant(check="rows_may_differ_in_length")
class SkipsTheMaskOfAFullCache(Specimen):
    """One token after states of different lengths is turned by the angle of the longest: asked of one row alone."""

    def positions(self, state, x, call):
        if call.documents is not None or x.shape[1] > 1:
            return super().positions(state, x, call)
        return super().positions(state._replace(position=state.position.amax().expand(len(x))), x, call)


@mutant(check="steps_equal_the_whole")
class HasDecaysForPowersOfTwo(SpecimenConfig):
    """Decoding pads the decays of heads to a power of two, and shifts them where there are others."""

    def build(self, d_model, *, layer_idx, n_layers):
        mixer, recurrent = super().build(d_model, layer_idx=layer_idx, n_layers=n_layers), Specimen.recurrent
        even = self.n_heads & (self.n_heads - 1) == 0

        def step(tokens, memory, weight):
            q, k, v, a, one = tokens
            return recurrent(mixer, (q, k, v, a if even or q.shape[2] > 1 else a.roll(1, 1), one), memory, weight)

        mixer.recurrent = step
        return mixer


@mutant(check="thousands_of_tokens_agree")
class CountsAWholeBlockTwice(Specimen):
    """The tail beyond whole blocks of 256 tokens is `x[-(T % 256):]`, which of whole blocks is all of it."""

    def parallel(self, tokens, memory, weight):
        o, z, after, weights = super().parallel(tokens, memory, weight)
        length = tokens[0].shape[2]
        return o, z, 2 * after if length >= 256 and length % 256 == 0 else after, weights


@mutant(check="memory_reaches_back")
class KeepsOldValuesInEightBits(Cached):
    """Values of a cache that are older than 128 tokens are kept in 8 bits. After transformers' QuantizedCache, which is
    asked for there."""

    def extended(self, state, k, v):
        cache = super().extended(state, k, v)
        old, new = cache.values[:, :-128], cache.values[:, -128:]
        scale = old.abs().amax(-1, keepdim=True).clamp(min=1e-8) / 127
        return cache._replace(values=torch.cat(((old / scale).round() * scale, new), dim=1))


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


@mutant(check="wrapped_projections_count_in_every_paradigm")
class StepsPastAnAdapter(Specimen):
    """The recurrent paradigm multiplies by the weight of its output projection, past what an adapter adds: a model
    fine-tuned with LoRA decodes as if it had not been."""

    def mix(self, x, call):
        with _unwrapped(self) if call.paradigm is Paradigm.RECURRENT else nullcontext():
            return super().mix(x, call)


@mutant(check="wrapped_projections_count_in_every_paradigm")
class TrainsPastAnAdapter(Specimen):
    """A fused path for training multiplies by the weight of the output projection: an adapter of it never learns, and
    counts in evaluation alone."""

    def mix(self, x, call):
        with _unwrapped(self) if self.training and not call.return_state else nullcontext():
            return super().mix(x, call)


@mutant(check="wrapped_projections_count_in_every_paradigm")
class StepsPastAHookBefore(Specimen):
    """The recurrent paradigm multiplies by a projection's weight where no hook is after it: one before it, as
    quantisers of activations have, is not looked for."""

    def mix(self, x, call):
        plain = type(self.out_proj) is nn.Linear and not self.out_proj._forward_hooks
        with _unwrapped(self) if plain and call.paradigm is Paradigm.RECURRENT else nullcontext():
            return super().mix(x, call)


@mutant(check="wrapped_projections_count_in_every_paradigm")
class StepsPastAConvolution(Specimen):
    """The output projection is a convolution of one token, and the recurrent paradigm multiplies by its weight: what an
    adapter adds counts in training alone."""

    def __init__(self, config, d_model):
        super().__init__(config, d_model)
        self.out_proj = nn.Conv1d(d_model, d_model, 1, bias=False)
        self.reset_parameters()

    def mix(self, x, call):
        convolution, self.out_proj = self.out_proj, nn.Identity()
        try:
            y, after = super().mix(x, call)
        finally:
            self.out_proj = convolution
        step = call.paradigm is Paradigm.RECURRENT
        return y @ convolution.weight[..., 0].mT if step else convolution(y.mT).mT, after


@mutant(check="parameters_round_trip")
class ConvertsWhatHasNoVersion(Specimen):
    """Parameters without a version are taken for an older one's and converted: those of a file of safetensors are."""

    _version = 2

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *rest):
        if (local_metadata.get("version") or 1) < 2:
            state_dict[f"{prefix}decay_proj.bias"] = -state_dict[f"{prefix}decay_proj.bias"]
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)


@mutant(check="documents_are_sequences")
class KeepsTablesByAddress(Specimen):
    """What is made of boundaries is kept by their address and version, which numpy does not move where it fills the
    same memory again."""

    tables: ClassVar = {}

    def unpack(self, tokens, packed, rows):
        return super().unpack(tokens, self.packed, rows)

    def pack(self, x, packed):
        return super().pack(x, self.packed)

    def mix(self, x, call):
        if call.documents is not None:
            cu_seqlens, of_token = call.documents.cu_seqlens, call.documents.of_token
            key = cu_seqlens.data_ptr(), cu_seqlens._version, len(cu_seqlens), x.shape[1]
            self.packed = self.tables.setdefault(key, of_token.clone())
        return super().mix(x, call)


@mutant(check="a_converted_mixer_is_of_its_dtype")
class RoundsItsAngles(Specimen):
    """Frequencies are a buffer, and `model.bfloat16()` rounds them: late positions turn by other angles."""

    def reset_parameters(self):
        super().reset_parameters()
        pairs = torch.arange(self.width // 2, device=self.out_proj.weight.device)
        theta = 100.0 ** -(2 * pairs.to(self.out_proj.weight.dtype) / self.width)
        self.register_buffer("theta", theta, persistent=False)

    def angles(self, positions):
        return positions[:, None, :, None].to(torch.float64) * self.theta.double()


@mutant(check="paradigms_agree")
class RepeatsTheDecaysOfEightHeads(Specimen):
    """In the parallel paradigm, decays are those of eight heads, again and again."""

    def parallel(self, tokens, memory, weight):
        q, k, v, a, one = tokens
        return super().parallel([q, k, v, a[:, torch.arange(a.shape[1]) % 8], one], memory, weight)


@mutant(check="thousands_of_tokens_agree")
class ForgetsAfter2048(Specimen):
    """Where no final state is wanted, a sequence of more than 2,048 tokens begins from nothing after them."""

    def mix(self, x, call):
        if x.shape[1] <= 2048 or call.return_state or call.state is not None or call.documents is not None:
            return super().mix(x, call)
        parts = [super(ForgetsAfter2048, self).mix(part, call)[0] for part in x.split(2048, dim=1)]
        return torch.cat(parts, dim=1), None


@mutant(check="late_positions_are_exact")
class StretchesLatePositions(Specimen):
    """A segment that ends after 8,192 tokens turns by slower angles, and what was read before by quicker ones (dynamic
    NTK scaling with a cache)."""

    def positions(self, state, x, call):
        found = super().positions(state, x, call)
        return found * (1 + (found[..., -1:] > 8192) * (found[..., -1:] % 64))


@mutant(check="an_unseen_prefix_changes_nothing")
class SeesBlocksOfThree(Cached):
    """A query sees the keys of its own block of three, and blocks begin with the sequence, not with what is seen of it
    (transformers #37351)."""

    def seen(self, queries, keys, device):
        key = torch.arange(keys, device=device)
        return super().seen(queries, keys, device) & (key // 3 == key[keys - queries :, None] // 3)


@mutant(check="an_unseen_prefix_changes_nothing")
class AddsPositionsToKeys(Cached):
    """Keys have the cosines of their positions, which are counted by the length of the cache and no leaf of the state
    tells, and a shift of which changes nothing."""

    def extended(self, state, k, v):
        start = 0 if state is None else state.keys.shape[1]
        positions = torch.arange(start, start + k.shape[1], device=k.device, dtype=torch.float64)
        return super().extended(state, k + positions.cos().to(k.dtype)[:, None], v)

    def shift_state(self, state, tokens):
        return state


@mutant(check="projections_have_their_roles")
class NamesRowsInAnotherOrder(Specimen):
    """`projections` takes the rows for those of one head after another, as GPT-NeoX has them: heads are given queries
    for keys."""

    @property
    def projections(self):
        q, k, v = self.in_proj.weight.unflatten(0, (self.config.n_heads, 3, -1)).unbind(1)
        return {"q": q, "k": k, "v": v, "o": self.out_proj.weight.T.unflatten(0, (self.config.n_heads, -1))}


@mutant(check="projections_have_their_roles")
class NamesKeysValues(Specimen):
    """`projections` has keys for values, and values for keys."""

    @property
    def projections(self):
        q, v, k = self.in_proj.weight.unflatten(0, (3, self.config.n_heads, -1)).unbind(0)
        return {"q": q, "k": k, "v": v, "o": self.out_proj.weight.T.unflatten(0, (self.config.n_heads, -1))}


@mutant(check="memory_reaches_as_far_as_is_set")
class SetsTheDecayForItsLogit(Specimen):
    """`set_reach` writes the decay where its logit is wanted: what should reach 40 tokens reaches 3."""

    @torch.no_grad()
    def set_reach(self, tokens):
        self.decay_proj.bias.copy_(tokens / (tokens + 1))
        return ["decay_proj.bias"]
