"""Wrong mixers: declarations, and compilation."""

import torch

from seqmix import Paradigm
from seqmix.ops.runtime.packing import Documents, document_of_token

from .registry import mutant
from .specimen import Specimen, SpecimenConfig


@mutant(check="what_is_not_declared_is_refused", after="fla #838: boundaries that a user gave were overwritten")
class TakesAnyBoundaries(Specimen):
    """Document boundaries are not validated."""

    def _require_shapes(self, x, state, cu_seqlens):
        super()._require_shapes(x, state if cu_seqlens is None else None, None)

    def _documents(self, x, cu_seqlens):
        known = cu_seqlens is not None
        return Documents(cu_seqlens, document_of_token(cu_seqlens, x.shape[1]), None) if known else None


@mutant(check="configurations_round_trip", after="fla 0.6.0: in training attn_mode has no effect")
class IgnoresTheConfiguredParadigm(Specimen):
    """The configured paradigm has no effect."""

    def __init__(self, config, d_model):
        super().__init__(config, d_model)
        self.paradigm = Paradigm.CHUNKWISE


@mutant(check="every_option_changes_something", after="fla #427: conv_bias was accepted and unused")
class HasAnOptionThatNothingReads(SpecimenConfig):
    """An option is accepted and read by nothing."""

    normalize: bool = True


@mutant(check="flops_are_as_declared", after="fla-org/flame: its MFU credits linear mixers with attention's products")
class CountsFlopsOfAttention(Specimen):
    """flops counts all pairs of tokens in every paradigm."""

    def flops(self, length, paradigm, context=0):
        return super().flops(length, Paradigm.PARALLEL, context)


@mutant(check="calls_stay_on_the_device", after="our own review: positions made on the CPU")
class CountsOnTheProcessor(Specimen):
    """Angles are made of positions on the CPU, wherever the tokens are."""

    def angles(self, positions):
        pairs = torch.arange(self.width // 2, dtype=torch.float64)
        return positions[:, None, :, None].to(torch.float64) * 100 ** -(2 * pairs / self.width)


@mutant(check="training_compiles_into_one_graph", after="fla's retention: seqlen_offset.max().item() in every layer")
class AsksTheDeviceForAnOffset(Specimen):
    """A number is read back from the device while mixing several tokens."""

    def positions(self, state, x, call):
        if call.documents is None and x.shape[1] > 1 and state.position.max().item() < 0:
            raise ValueError("a position is negative")
        return super().positions(state, x, call)


@mutant(check="segments_compile_into_one_graph", after="facebookresearch/xformers #765: a graph break")
class LooksWhetherTheStateIsEmpty(Specimen):
    """A state that was given is looked at: an empty one takes another path."""

    def before(self, state, rows):
        return super().before(state if state is None or state.memory.any() else None, rows)


@mutant(check="packing_compiles_into_one_graph", after="fla #752: the indices of chunks wait for the device")
class LoopsOverDocuments(Specimen):
    """Positions of packed documents come from a loop over their lengths."""

    def positions(self, state, x, call):
        if call.cu_seqlens is None:
            return super().positions(state, x, call)
        lengths = call.cu_seqlens.diff().tolist()
        return torch.cat([at + torch.arange(n) for at, n in zip(state.position, lengths, strict=True) if n])[None]


CALLS = {"next": 0}


@mutant(check="graphs_follow_sizes", after="pytorch/torchtitan PR #2823: arguments that are Python numbers")
class NumbersItsPackedCallsInPython(Specimen):
    """Packed calls of which no final state is wanted take turns with three buffers by a Python number: every one
    compiles."""

    def mix(self, x, call):
        if call.documents is not None and not call.return_state:
            CALLS["next"] = (CALLS["next"] + 1) % 3
        return super().mix(x + 0 * CALLS["next"], call)


BUFFERS = {"next": 0}


@mutant(check="decoding_compiles_once", after="pytorch/torchtitan PR #2823: arguments that are Python numbers")
class NumbersItsBuffersInPython(Specimen):
    """Steps alternate between two buffers by a Python number."""

    def positions(self, state, x, call):
        if x.shape[1] == 1:
            BUFFERS["next"] = 1 - BUFFERS["next"]
        return super().positions(state, x, call) + 0 * BUFFERS["next"]
