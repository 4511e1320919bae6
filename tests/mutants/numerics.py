"""Wrong mixers: numerics, declarations and compilation."""

import torch
import torch.nn.functional as F
from torch import nn

from seqmix import Paradigm
from seqmix.ops.runtime.packing import Documents, document_of_token

from .registry import mutant
from .specimen import Cache, Cached, Specimen, SpecimenState


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
class HalvesGradientsInLowPrecision(Specimen):
    """In bfloat16 and float16 the gradient of the input is half of what it should be. After fla #863 and #875:
    gradients were wrong where outputs were right."""

    def heads(self, x):
        return super().heads(x if x.itemsize > 2 else (x + x.detach()) / 2)


@mutant(check="long_decoding_does_not_drift")
class RoundsTheStateItReads(Specimen):
    """A state is float32, and is rounded to the parameters' dtype where it is read. After sgl-project/sglang #38975:
    rounding a gate to bf16 accumulates in the recurrent state with the context."""

    def before(self, state, rows):
        memory, weight, position = super().before(state, rows)
        return SpecimenState(*(leaf.to(self.dtype).to(leaf.dtype) for leaf in (memory, weight)), position)


@mutant(check="long_decoding_does_not_drift")
class RoundsTheStateOfOneRow(Specimen):
    """A step of one row, which has a path of its own, keeps 12 bits of a float32 state."""

    def mix(self, x, call):
        y, after = super().mix(x, call)
        if x.shape[:2] != (1, 1) or after is None or after.memory.dtype != torch.float32:
            return y, after
        large = 4097 * after.memory
        return y, after._replace(memory=large - (large - after.memory))


@mutant(check="dtypes_are_kept")
class RoundsTheStateInPassing(Specimen):
    """A state is float32, and was rounded to the input's dtype. After sgl-project/sglang #38975."""

    def mix(self, x, call):
        y, after = super().mix(x, call)
        rounded = (leaf.to(x.dtype).to(leaf.dtype) for leaf in (after.memory, after.weight))
        return y, SpecimenState(*rounded, after.position)


@mutant(check="dtypes_are_kept")
class StartsAndStaysNarrow(Specimen):
    """The state has the parameters' dtype from its beginning, as only a cache may. After fla #1187: states in float16
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
    """A decay from token j to token i is a factor of i times one of j, of which one overflows. After fla's retention:
    gamma^T of its first head underflows float32 after 2,800 tokens."""

    def decays(self, a):
        passed = a.cumsum(-1)
        return (passed.exp()[..., None] * (-passed).exp()[..., None, :]).tril()


@mutant(check="modes_change_nothing")
class IgnoresTheStateInTraining(Specimen):
    """In training mode every segment starts from an empty state. After state-spaces/mamba #101 and #1013."""

    def mix(self, x, call):
        return super().mix(x, call._replace(state=None) if self.training else call)


@mutant(check="modes_change_nothing")
class IsAnotherWithoutGradients(Specimen):
    """Without gradients, a faster path scales by 1.01. After fla #47: the path of inference lacked the scale."""

    def divide(self, o, z):
        return super().divide(o, z) * (1 if torch.is_grad_enabled() else 1.01)


@mutant(check="results_are_deterministic")
class RemembersItsLastInput(Specimen):
    """The last input stays on the module, and with it the graph that made it. After fla #766: the count of tokens seen
    outlived a call."""

    def heads(self, x):
        self.last = x
        return super().heads(x)


@mutant(check="results_are_deterministic")
class DrawsWhatItDoesNotNeed(Specimen):
    """Evaluation draws a number from the global generator. After HazyResearch/zoology, whose data generator seeds
    it."""

    def heads(self, x):
        torch.rand(())
        return super().heads(x)


@mutant(check="what_is_not_declared_is_refused")
class TakesAnyBoundaries(Specimen):
    """Document boundaries are not validated. After fla #838: the boundaries that a user gave were overwritten where
    there was a mask."""

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
    """reset_parameters leaves out the bias. After state-spaces/mamba: it initialises by the names of parameters."""

    def reset_parameters(self):
        for projection in (self.in_proj, self.decay_proj, self.out_proj):
            nn.init.xavier_uniform_(projection.weight)


@mutant(check="every_parameter_is_initialised")
class SeedsItself(Specimen):
    """reset_parameters draws from a generator of its own, so that all layers start equal. After HazyResearch/zoology,
    whose data generator seeds the global one."""

    def reset_parameters(self):
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator, device="cpu") / 4)


@mutant(check="every_parameter_learns")
class HasAGateThatNothingReads(Specimen):
    """A parameter is built and never used. After fla #427: `conv_bias` was accepted and unused."""

    def reset_parameters(self):
        super().reset_parameters()
        self.gate = nn.Parameter(torch.ones_like(self.decay_proj.bias))


@mutant(check="flops_are_as_declared")
class CountsFlopsOfAttention(Specimen):
    """flops counts all pairs of tokens in every paradigm. After fla-org/flame: its MFU credits a quadratic attention
    term to linear mixers."""

    def flops(self, length, paradigm, context=0):
        return super().flops(length, Paradigm.PARALLEL, context)


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


@mutant(check="packing_compiles_into_one_graph")
class KeepsTheStateBeforeAnEmptyDocument(Specimen):
    """Compiled, where boundaries are no numbers, the memory after an empty document is that of the document before."""

    def mix(self, x, call):
        y, after = super().mix(x, call)
        if call.documents is None or not torch.compiler.is_compiling():
            return y, after
        empty = (call.cu_seqlens.diff() == 0)[:, None, None, None]
        return y, after._replace(memory=torch.where(empty, after.memory.roll(1, 0), after.memory))


BUFFERS = {"next": 0}


@mutant(check="decoding_compiles_once")
class NumbersItsBuffersInPython(Specimen):
    """Steps alternate between two buffers by a Python number. After pytorch/torchtitan PR #2823: more than ten
    compilations, as two arguments were numbers and not tensors."""

    def positions(self, state, x, call):
        if x.shape[1] == 1:
            BUFFERS["next"] = 1 - BUFFERS["next"]
        return super().positions(state, x, call) + 0 * BUFFERS["next"]
