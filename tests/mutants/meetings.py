"""Wrong mixers: right but where several things meet (many heads, 16 bits and a long segment), or where the arguments or
the module are not as a test makes them (a slice, weights that were swapped, a submodule that was wrapped)."""

from threading import Lock
from weakref import WeakKeyDictionary

import torch
from pydantic import Field, model_validator

from seqmix import Paradigm
from seqmix.mixers.attention import AttentionConfig
from seqmix.mixers.parallel_hybrid import ParallelHybrid, ParallelHybridConfig

from .registry import mutant
from .specimen import Specimen, SpecimenConfig


@mutant(check="results_share_no_memory")
class WritesLengthsOverBoundaries(Specimen):
    """Lengths of documents are formed in place, of `cu_seqlens.to(torch.int32)`, which of int32 is no copy: the next
    layer is given other documents."""

    def mix(self, x, call):
        y, after = super().mix(x, call)
        if call.documents is not None:
            ends = call.documents.cu_seqlens.to(torch.int32)[1:]
            ends[1:] -= ends[:-1].clone()
        return y, after


@mutant(check="thousands_of_tokens_agree")
class JoinsDocumentsAtABlock(Specimen):
    """Where a document begins is looked for inside blocks of 1,024 tokens: one that begins with a block continues the
    document before it."""

    def unpack(self, tokens, packed, rows):
        return super().unpack(tokens, self.joined(packed), rows)

    def pack(self, x, packed):
        return super().pack(x, self.joined(packed))

    def joined(self, packed):
        for at in range(1024, len(packed), 1024):
            packed = torch.where(packed == packed[at], packed[at - 1], packed)
        return packed


@mutant(check="thousands_of_tokens_agree")
class WrapsAroundFourThousand(Specimen):
    """From 4,096 tokens on, where no final state is wanted, the last token reaches the first, as in an FFT that is
    padded by less than the segment."""

    def mix(self, x, call):
        y, after = super().mix(x, call)
        if x.shape[1] < 4096 or call.return_state or call.state is not None or call.documents is not None:
            return y, after
        return torch.cat((y[:, :1] + 0.1 * y[:, -1:], y[:, 1:]), dim=1), after


@mutant(check="long_segments_do_not_drift")
class RoundsTheDecaysOfManyHeads(Specimen):
    """In 16 bits, of more than eight heads, decays near 1 are 1, as where they have the tokens' dtype: seen after many
    tokens."""

    def heads(self, x):
        qk, v, a = super().heads(x)
        return qk, v, torch.where(a > -0.02, 0, a) if x.itemsize == 2 and a.shape[1] > 8 else a


@mutant(check="strides_change_nothing")
class ReadsStatesFromTheirStorage(Specimen):
    """In decoding without gradients, a contiguous state is read from the start of its storage: the rows of a slice are
    those of the batch's first. After launchers that take the storage's pointer for the tensor's."""

    def attend(self, paradigm, tokens, state):
        memory = state.memory
        if paradigm == "recurrent" and memory.is_contiguous() and not torch.is_grad_enabled():
            state = state._replace(memory=memory.as_strided(memory.shape, memory.stride(), 0))
        return super().attend(paradigm, tokens, state)


@mutant(check="parameters_round_trip")
class KeepsDecaysByVersion(Specimen):
    """Without gradients, what is made of a parameter is kept while its address and its version are the same: writing
    through `.data`, as averaged weights are swapped in, moves neither."""

    key, kept = None, None

    def heads(self, x):
        qk, v, a = super().heads(x)
        if torch.is_grad_enabled():
            return qk, v, a
        bias = self.decay_proj.bias
        if self.key != (key := (bias.data_ptr(), bias._version, bias.dtype)):
            self.key, self.kept = key, bias.detach().clone()
        logits = torch.nn.functional.linear(x, self.decay_proj.weight, self.kept)
        return qk, v, torch.nn.functional.logsigmoid(logits.transpose(1, 2))


@mutant(check="results_are_deterministic")
class KeepsATableOfInference(Specimen):
    """The parallel form's mask is kept by its length: one that was made in inference mode cannot be trained with."""

    def reset_parameters(self):
        super().reset_parameters()
        self.tables = {}

    def scores(self, q, k):
        ones = self.tables.setdefault(q.shape[2], torch.ones(q.shape[2], 1, dtype=q.dtype)) if self.at_once else 1
        return super().scores(q, k) * ones

    at_once = False

    def attend(self, paradigm, tokens, state):
        self.at_once = paradigm == "parallel"
        try:
            return super().attend(paradigm, tokens, state)
        finally:
            self.at_once = False


PROJECTIONS = {}


@mutant(check="copies_are_as_good")
class FindsItsProjectionByName(Specimen):
    """The decay's projection is found in a registry by a name, which a copy has too: it reads the original's."""

    def reset_parameters(self):
        super().reset_parameters()
        self.name = f"projection {len(PROJECTIONS)}"
        PROJECTIONS[self.name] = self.decay_proj

    def heads(self, x):
        qk, v, _ = super().heads(x)
        return qk, v, torch.nn.functional.logsigmoid(PROJECTIONS[self.name](x).transpose(1, 2))


LAST = {}


@mutant(check="copies_are_as_good")
class ReadsTheLastOneBuilt(Specimen):
    """The width that angles depend on is a global, which the last mixer that was built has set."""

    __qualname__ = "made inside a function"  # which the kit does not pickle: a mutant's configuration cannot be

    def __init__(self, config, d_model):
        super().__init__(config, d_model)
        LAST["width"] = self.width

    def angles(self, positions):
        return super().angles(positions) * self.width / LAST["width"]


class GroupedConfig(SpecimenConfig):
    n_heads: int = Field(default=6, gt=0)
    n_groups: int = Field(default=0, ge=0, examples=[3])
    """Groups of heads with values in common; 0 is none."""

    @model_validator(mode="after")
    def _divides(self):
        if self.n_groups and self.n_heads % self.n_groups:
            raise ValueError(f"{self.n_groups} groups do not divide {self.n_heads} heads")
        return self


@mutant(check="steps_equal_the_whole")
class StepsTileTheGroups(GroupedConfig):
    """A step for one token repeats the values of groups in another order than a segment: with one group, or as many as
    heads, both orders are one (onnx #7274)."""

    class layer(Specimen):  # noqa: N801
        def heads(self, x):
            qk, v, a = super().heads(x)
            if not (groups := self.config.n_groups):
                return qk, v, a
            of_groups, each = v[:, :groups], self.config.n_heads // groups
            tiled = of_groups.repeat(1, each, 1, 1) if x.shape[1] == 1 else of_groups.repeat_interleave(each, 1)
            return qk, tiled, a


class FewGroupsConfig(GroupedConfig):
    n_heads: int = Field(default=2, gt=0)
    n_groups: int = Field(default=0, ge=0, examples=[1])


@mutant(check="paradigms_agree")
class RecurrentTilesTheGroups(FewGroupsConfig):
    """The recurrent paradigm repeats the values of groups in another order, and the only example of a number of groups
    is 1 (candle-vllm #52, axlearn #842)."""

    class layer(Specimen):  # noqa: N801
        def heads(self, x):
            qk, v, a = super().heads(x)
            return qk, v[:, : self.config.n_groups or None], a

        def attend(self, paradigm, tokens, state):
            q, k, v, a, one = tokens
            each, tiles = q.shape[1] // v.shape[1], paradigm is Paradigm.RECURRENT
            v = v.repeat(1, each, 1, 1) if tiles else v.repeat_interleave(each, 1)
            return super().attend(paradigm, [q, k, v, a, one], state)


@mutant(check="paradigms_agree")
class WritesADefaultIntoSteps(SpecimenConfig):
    """What log-decays are divided by is the default in the recurrent paradigm, of a field that names no example. After
    `gate_logit_normalizer` of GLA (fla)."""

    normalizer: float = Field(default=16.0, gt=0)

    class layer(Specimen):  # noqa: N801
        def attend(self, paradigm, tokens, state):
            q, k, v, a, one = tokens
            a = a / (16 if paradigm is Paradigm.RECURRENT else self.config.normalizer)
            return super().attend(paradigm, [q, k, v, a, one], state)


@mutant(check="dtypes_are_kept")
class RoundsAtAStep(Specimen):
    """A step for one token gives its state in 16 bits, in a tensor of 32: what is small beside it is lost at every
    token (vllm #13466)."""

    def mix(self, x, call):
        y, after = super().mix(x, call)
        if after is None or x.shape[1] > 1:
            return y, after
        return y, after._replace(memory=after.memory.to(x.dtype).to(after.memory.dtype))


@mutant(check="long_segments_do_not_drift")
class SumsManyChannelsInFloat16(Specimen):
    """Of float16 parameters, the denominator has a factor that counts tokens times channels in float16: beyond 65,504
    it is infinite (fast-transformers #32)."""

    def divide(self, o, z):
        if self.dtype == torch.float16:
            counted = self.width * torch.arange(1, z.shape[-1] + 1, device=z.device)
            z = z * (counted.to(torch.float16).to(z.dtype) / counted)
        return super().divide(o, z)


@mutant(check="late_positions_are_exact")
class MultipliesAnglesInAutocast(Specimen):
    """Angles are a matrix product of positions and frequencies, which autocast makes one of 8 bits (transformers
    #29285)."""

    def angles(self, positions):
        if not torch.is_autocast_enabled("cpu"):
            return super().angles(positions)
        return super().angles(positions.to(torch.bfloat16).to(torch.float32))


@mutant(check="parameters_round_trip")
class KeepsRatesForSteps(Specimen):
    """A step keeps what it makes of a parameter, without gradients, while autograd counts no change of that: averaged
    weights that are written through `.data` are not counted (sglang #29916)."""

    kept = None

    def mix(self, x, call):
        bias = self.decay_proj.bias
        if x.shape[1] > 1 or torch.is_grad_enabled():
            return super().mix(x, call)
        if self.kept is None or self.kept[0] != bias._version:
            self.kept = bias._version, bias.detach().clone()
        y, after = super().mix(x, call)
        return y + (self.kept[1] - bias).mean(), after


@mutant(check="segments_compile_into_one_graph")
class CompilesWithoutThePrefix(Specimen):
    """Compiled, a segment of several tokens counts from its own first, which after nothing is right (transformers
    #30437)."""

    def positions(self, state, x, call):
        if torch.compiler.is_compiling() and x.shape[1] > 1:
            state = state._replace(position=torch.zeros_like(state.position))
        return super().positions(state, x, call)


@mutant(check="wrapped_projections_count_in_every_paradigm")
class KeepsItsProjections(Specimen):
    """The first step keeps the projections themselves, as attributes are slow to look up: an adapter that is put in
    their place later counts everywhere but in decoding."""

    def mix(self, x, call):
        y, after = super().mix(x, call)
        if call.paradigm is not Paradigm.RECURRENT or x.shape[1] > 1:
            return y, after
        return y + self.__dict__.setdefault("kept", self.out_proj)(x) - self.out_proj(x), after


@mutant(check="rows_of_a_state_can_be_rearranged")
class KnowsAStateByItsTensor(Specimen):
    """Without gradients, what is formed of a state's memory is kept until another tensor comes: a server that fills a
    slot again goes on with the text that was there."""

    known = None

    def attend(self, paradigm, tokens, state):
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or len(tokens[0]) != len(state.memory):
            return super().attend(paradigm, tokens, state)
        if self.known is None or self.known[0] is not state.memory:
            self.known = state.memory, state.memory.clone()
        return super().attend(paradigm, tokens, state._replace(memory=self.known[1]))


@mutant(check="decoding_compiles_once")
class CompilesOnePositionForAllRows(Specimen):
    """Compiled, a step counts the tokens of the first row for all rows."""

    def positions(self, state, x, call):
        if torch.compiler.is_compiling() and x.shape[1] == 1:
            state = state._replace(position=state.position[:1].expand(len(state.position)))
        return super().positions(state, x, call)


@mutant(check="surroundings_change_nothing")
class CountsFromOneInPlace(Specimen):
    """Positions are made to begin with 1 in place; without gradients they are those of every layer of a model: the
    tenth counts from 10."""

    def positions(self, state, x, call):
        positions = super().positions(state, x, call)
        return positions.add_(1) if call.documents is None else positions + 1


@mutant(check="surroundings_change_nothing")
class HandsItsCallOver(Specimen):
    """A helper finds the call on the module, where another thread's call may have put its own meanwhile."""

    def mix(self, x, call):
        self.__dict__["now"] = call
        if not x.isfinite().all():  # a debug check
            return x, None
        return super().mix(x, self.__dict__["now"])


@mutant(check="surroundings_change_nothing")
class TakesTheDefaultDtype(Specimen):
    """A constant is made in torch's default dtype, which loaders and servers set to 16 bits."""

    def divide(self, o, z):
        return super().divide(o, z) * torch.tensor(1 / 3).to(o.dtype)


@mutant(check="projections_have_their_roles")
class NamesRowsForColumns(Specimen):
    """`projections` gives W_O viewed as [H V D], not its transpose: what `seqmix linearize` takes over is scrambled,
    and the shapes fit."""

    @property
    def projections(self):
        return {"o": self.out_proj.weight.view(self.config.n_heads, self.width, -1)}


@mutant(check="thousands_of_tokens_agree")
class EndsItsTableAtEightThousand(Specimen):
    """Positions are read from a table of 8,192 rows, modulo its size, where a text begins; from a state they are
    computed."""

    def positions(self, state, x, call):
        return super().positions(state, x, call) % (8192 if call.state is None else 2**62)


@mutant(check="thousands_of_tokens_agree")
class AddsUpInEightRounds(Specimen):
    """Decays of a chunk are added up by doubling, in eight rounds: in chunks of more than 256 some are left out."""

    def chunkwise(self, tokens, memory, weight):
        q, k, v, a, one = tokens
        place = torch.arange(a.shape[-1], device=a.device) % self.config.chunk_size
        return super().chunkwise((q, k, v, torch.where(place > 256, 0, a), one), memory, weight)


@mutant(check="thousands_of_tokens_agree")
class EndsItsGradientAtTwoThousand(Specimen):
    """The chunkwise backward pass ends 2,048 tokens before a segment's end."""

    def chunkwise(self, tokens, memory, weight):
        early = [part[:, :, :-2048].detach() for part in tokens]
        tokens = [torch.cat((e, part[:, :, -2048:]), dim=2) for e, part in zip(early, tokens, strict=True)]
        return super().chunkwise(tokens, memory, weight)


@mutant(check="rows_are_independent")
class CountsTokensInSixteenBits(Specimen):
    """The decays of a batch are found by numbers of 16 bits: tokens beyond 65,536 have those of others."""

    def heads(self, x):
        qk, v, a = super().heads(x)
        flat = a.transpose(1, 2).flatten(0, 1)
        number = torch.arange(len(flat), device=x.device) & 0xFFFF
        return qk, v, flat[number].unflatten(0, x.shape[:2]).transpose(1, 2)


@mutant(check="documents_are_sequences")
class ScoresATokenFromNothing(Specimen):
    """A packed document of one token does not read its state where neither gradients nor final states are wanted."""

    def mix(self, x, call):
        if call.documents is None or call.state is None or call.return_state or torch.is_grad_enabled():
            return super().mix(x, call)
        several = call.documents.cu_seqlens.diff() != 1
        memory = call.state.memory * several[:, None, None, None]
        return super().mix(x, call._replace(state=call.state._replace(memory=memory)))


@mutant(check="strides_change_nothing")
class TakesRowsForNeighbours(Specimen):
    """Rows of a state are taken for neighbours in memory: of every other row of a larger one the first are read."""

    def before(self, state, rows):
        state = super().before(state, rows)
        memory = state.memory
        if torch.is_grad_enabled() or not memory[0].is_contiguous():
            return state
        return state._replace(memory=memory.as_strided(memory.shape, memory.new_empty(memory.shape).stride()))


@mutant(check="segments_of_ranks_are_the_whole")
class ReadsTwoRanksBack(Specimen):
    """Context parallelism by gathering the tokens of all ranks, of which those of more than two before are left out."""

    supports_context_parallel = True

    def mix(self, x, call):
        if (group := call.cp_group) is None:
            return super().mix(x, call)
        every = group.gather(x)
        whole = torch.cat([part if rank >= group.rank - 2 else 0 * part for rank, part in enumerate(every)], dim=1)
        documents = group.whole(call.documents, x.shape[1])
        y, after = super().mix(whole, call._replace(cp_group=None, documents=documents))
        return group.part(y), after


@mutant(check="paradigms_agree")
class HasATableOfHeads(Specimen):
    """The recurrent paradigm has its decays in a table of 32 heads: those beyond have the last one's."""

    def recurrent(self, tokens, memory, weight):
        q, k, v, a, one = tokens
        head = torch.arange(a.shape[1], device=a.device).clamp(max=31)
        return super().recurrent((q, k, v, a[:, head], one), memory, weight)


WORKSPACES: dict = {}
LOCKS: WeakKeyDictionary = WeakKeyDictionary()


@mutant(check="surroundings_change_nothing")
class SharesAWorkspaceOfLayers(Specimen):
    """Without gradients results are put into one workspace of the process, which a lock of each layer protects: from
    that layer's other threads, and from no other layer."""

    def divide(self, o, z):
        if torch.is_grad_enabled():
            return super().divide(o, z)
        with LOCKS.setdefault(self, Lock()), torch.inference_mode(False), torch.no_grad():
            work = WORKSPACES.setdefault((o.shape, o.dtype), torch.zeros(o.shape, dtype=o.dtype))
            work.copy_(o)
            return super().divide(work, z).clone()


@mutant(check="surroundings_change_nothing")
class DropsATokenWhereAlgorithmsAreFast(Specimen):
    """Where torch's algorithms need not be deterministic, as in training, a packed row's last value is left out."""

    def heads(self, x):
        qk, v, a = super().heads(x)
        if not torch.are_deterministic_algorithms_enabled():
            v = torch.cat((v[:, :, :-1], 0 * v[:, :, -1:]), dim=2)
        return qk, v, a


@mutant(check="parameters_round_trip")
class SeedsItsSignsByHash(Specimen):
    """Random signs come from a seed that is the hash of a string, which Python salts in every process: no checkpoint
    has them."""

    def __init__(self, config, d_model):
        super().__init__(config, d_model)
        generator = torch.Generator().manual_seed(hash(config.kind) % 2**31)
        signs = 2 * torch.randint(2, (self.width,), generator=generator) - 1
        self.register_buffer("signs", signs, persistent=False)

    def heads(self, x):
        qk, v, a = super().heads(x)
        return qk, v * self.signs, a


@mutant(check="a_constant_state_is_never_written")
class HandsOutEightBuffers(Specimen):
    """Steps write states into eight buffers, as captured graphs have them: the ninth changes the first."""

    def mix(self, x, call):
        y, after = super().mix(x, call)
        if x.shape[1] != 1 or torch.is_grad_enabled() or torch.is_inference_mode_enabled():
            return y, after
        buffers, steps = self.__dict__.setdefault("buffers", {}), self.__dict__.setdefault("steps", [])
        steps.append(1)
        key = (len(steps) % 8, after.memory.shape, after.memory.dtype)
        buffer = buffers.setdefault(key, torch.empty_like(after.memory))
        return y, after._replace(memory=buffer.copy_(after.memory))


@mutant(check="rows_are_independent")
class DividesByTheLoudestRow(Specimen):
    """In training, scores are relative to the largest of all rows: beside a loud row those of the others are rounded to
    nothing. After softmax(x - x.max())."""

    def mix(self, x, call):
        y, after = super().mix(x, call)
        if call.return_state:
            return y, after
        size = x.detach().abs().amax((1, 2), keepdim=True)
        return torch.where(size * 16 < size.amax(), 0, y), after


@mutant(check="steps_equal_the_whole")
class GivesEqualMixersOneState(ParallelHybridConfig):
    """Mixers side by side that are equal begin from one state: where a cache is written in place, it has the keys of
    both. After [cache] * n_layers."""

    mixers: tuple[AttentionConfig, ...] = Field(
        default=(AttentionConfig(n_heads=2), AttentionConfig(n_heads=1)), min_length=2, strict=False
    )

    def build(self, d_model, *, layer_idx, n_layers):
        return SharesAState(
            self, [mixer.build(d_model, layer_idx=layer_idx, n_layers=n_layers) for mixer in self.mixers]
        )


class SharesAState(ParallelHybrid):
    def init_state(self, batch_size, *, max_length=None):
        states = super().init_state(batch_size, max_length=max_length)
        equal = all(mixer.config == self.parts[0].config for mixer in self.parts)
        return self.state_type(*[states[0]] * len(states)) if equal else states


@mutant(check="steps_equal_the_whole")
class StepsIntoOneBuffer(Specimen):
    """In inference mode every step writes its output over that of the step before. After graphs of CUDA."""

    def mix(self, x, call):
        y, after = super().mix(x, call)
        if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled() or x.shape[1] > 1:
            return y, after
        kept = self.__dict__.setdefault("kept", {})
        return kept.setdefault((y.shape, y.dtype), torch.empty_like(y)).copy_(y), after
