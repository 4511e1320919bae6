"""Wrong mixers: right in usual circumstances, wrong in some layers, sizes, devices and dtypes, or where they are cast,
wrapped, loaded as a part of a model, or given a state that they may write."""

import threading
from functools import cache

import torch
from torch import nn

from .registry import mutant
from .specimen import Cached, Specimen, SpecimenConfig


@mutant(check="an_unseen_prefix_changes_nothing")
class StopsTurningAt4096(Specimen):
    """The table of angles has 4,096 rows, and later tokens take the last; that a shift changes nothing is copied from a
    mixer that does not turn. After max_position_embeddings, clamped."""

    def positions(self, state, x, call):
        return super().positions(state, x, call).clamp(max=4095)

    def shift_state(self, state, tokens):
        return state

    def divide(self, o, z):
        return o


@mutant(check="long_segments_do_not_drift")
class KeepsDecaysInABuffer(Specimen):
    """Fixed decays just below 1 are a buffer, which a cast of the mixer to 16 bits makes 1. After inverse frequencies
    of transformers."""

    def __init__(self, config, d_model):
        super().__init__(config, d_model)
        self.register_buffer("gamma", torch.empty(config.n_heads))
        self.reset_parameters()

    def reset_parameters(self):
        super().reset_parameters()
        if hasattr(self, "gamma"):
            self.gamma.fill_(1 - 2**-10)

    def heads(self, x):
        qk, v, a = super().heads(x)
        return qk, v, (a + self.gamma.to(a.dtype).log()[:, None]).to(a.dtype)


@mutant(check="strides_change_nothing")
class WritesIntoTheRowThatAllShare(Cached):
    """A step writes keys in place, where rows are one row's memory, as of a prompt that is expanded over its samples:
    all have the last one's. After static caches of transformers."""

    def extended(self, state, k, v):
        shared = state is not None and state.keys.numel() and state.keys.stride(0) == 0 and len(k) > 1
        return super().extended(state, k[-1:].expand_as(k) if shared else k, v)


@mutant(check="a_donated_state_may_be_written")
class BeginsInAParameter(Specimen):
    """The learned beginning of one row is the parameter itself, and a step writes into a state that is donated: text by
    text the weights change. After `expand(1, ...).contiguous()`, which copies nothing."""

    def reset_parameters(self):
        super().reset_parameters()
        self.beginning = nn.Parameter(torch.ones(self.config.n_heads, self.width, self.width))

    def init_state(self, batch_size, *, max_length=None):
        memory = self.beginning.to(self.state_dtype).expand(batch_size, -1, -1, -1).contiguous()
        return super().init_state(batch_size)._replace(memory=memory)

    def mix(self, x, call):
        y, after = super().mix(x, call)
        if call.state is None or x.shape[1] > 1 or not call.donated:
            return y, after
        return y, after._replace(memory=call.state.memory.copy_(after.memory))


@mutant(check="every_parameter_is_initialised")
class SeedsTheGenerator(Specimen):
    """reset_parameters ends with the global generator seeded, for features that are the same in every run: all later
    layers of a model begin as one another. After ports of Performer."""

    def reset_parameters(self):
        super().reset_parameters()
        torch.manual_seed(1234)


@mutant(check="wrapped_projections_count_in_every_paradigm")
class CastsToTheWeightsDtype(Specimen):
    """What is projected has the dtype of the projection's weight, which of a quantised layer is int8. After T5's output
    layer in 8 bits (transformers)."""

    def divide(self, o, z):
        return super().divide(o, z).to(self.out_proj.weight.dtype)


@mutant(check="thousands_of_tokens_agree")
class LosesDecaysBetweenGroups(Specimen):
    """A scan of two levels over chunks, in groups of 5,000 tokens, hands on a state without the decays of a group."""

    def chunkwise(self, tokens, memory, weight):
        o, z, after, weight_after = super().chunkwise([x[:, :, :5000] for x in tokens], memory, weight)
        if tokens[0].shape[2] <= 5000:
            return o, z, after, weight_after
        rest = super().chunkwise([x[:, :, 5000:] for x in tokens], after + memory + 1, weight_after)
        return torch.cat((o, rest[0]), dim=2), torch.cat((z, rest[1]), dim=2), *rest[2:]


@cache
def future(length):
    return torch.ones(length, length, dtype=torch.bool).triu(1)


@mutant(check="results_are_deterministic")
class SharesAMaskOfTheProcess(Specimen):
    """The mask of a length is made once in a process: where it is first needed in inference mode, training cannot save
    it. After cached masks and tables of angles of transformers and xformers."""

    def decays(self, a):
        between = a[..., None].expand(*a.shape, a.shape[-1]).tril(-1).cumsum(-2)
        return between.masked_fill(future(a.shape[-1]), -torch.inf).exp()


@mutant(check="wrapped_projections_count_in_every_paradigm")
class StepsPastItsProjection(Specimen):
    """A step without gradients multiplies by the output projection's weight itself, past what wraps it. After decoding
    of mamba_ssm, which LoRA did not reach."""

    def mix(self, x, call):
        if x.shape[1] > 1 or call.state is None or torch.is_grad_enabled():
            return super().mix(x, call)
        own, self.out_proj = self.out_proj, nn.Linear(self.out_proj.in_features, self.out_proj.out_features, bias=False)
        self.out_proj.weight = own.weight
        try:
            return super().mix(x, call)
        finally:
            self.out_proj = own


@mutant(check="thousands_of_tokens_agree")
class WrapsWholeBlocksAround(Specimen):
    """In parallel, of a power of two of tokens the last reaches the first, as in an FFT that is not padded then."""

    def parallel(self, tokens, memory, weight):
        o, *rest = super().parallel(tokens, memory, weight)
        if o.shape[2] < 512 or o.shape[2] & (o.shape[2] - 1):
            return o, *rest
        return torch.cat((o[:, :, :1] + o[:, :, -1:], o[:, :, 1:]), dim=2), *rest


@mutant(check="documents_are_sequences")
class ForgetsStatesOnTheDevice(Specimen):
    """Where boundaries are on the device alone, packed documents start from nothing. After causal_conv1d of fla, with
    initial states."""

    def mix(self, x, call):
        unread = call.documents is not None and call.documents.boundaries is None
        return super().mix(x, call._replace(state=None) if unread else call)


class Hoarding(Specimen):
    def mix(self, x, call):
        y, after = super().mix(x, call)
        room = after.memory.new_zeros(len(after.memory), x.shape[1], *after.memory.shape[2:])
        return y, after._replace(memory=torch.cat((after.memory, room), dim=1)[:, : self.config.n_heads])


@mutant(check="a_state_has_the_declared_size")
class KeepsAllInTheSixthLayer(SpecimenConfig):
    """The state of every sixth layer grows, and is declared constant. After patterns of layers as Gemma 3 has them."""

    def build(self, d_model, *, layer_idx, n_layers):
        return (Hoarding if layer_idx % 6 == 5 else Specimen)(self, d_model)


@mutant(check="parameters_round_trip")
class LoadsByItsOwnNames(Specimen):
    """A hook on loading takes parameters by their names in the mixer, where a model's begin with the layer's. After
    hooks that pack projections again."""

    def __init__(self, config, d_model):
        super().__init__(config, d_model)
        self.register_load_state_dict_pre_hook(self.unpacked)

    @staticmethod
    def unpacked(module, state_dict, prefix, *_):
        name = "decay_proj.bias"
        state_dict[prefix + name] = state_dict.get(name, torch.zeros_like(module.decay_proj.bias))


@mutant(check="documents_are_sequences")
class CountsPackedTokensInAByte(Specimen):
    """Which document a token of many belongs to is looked up by the token's number in 8 bits."""

    def unpack(self, tokens, packed, rows):
        return super().unpack(tokens, packed[torch.arange(len(packed)) % 256] if rows > 9 else packed, rows)


@mutant(check="long_decoding_does_not_drift")
class ForgetsInStepsOf16Bits(Specimen):
    """In 16 bits a step of one row, which has a path of its own, decays the state once more."""

    def mix(self, x, call):
        y, after = super().mix(x, call)
        if x.shape[:2] != (1, 1) or call.state is None or x.itemsize > 2:
            return y, after
        return y, after._replace(memory=0.9 * after.memory)


@mutant(check="surroundings_change_nothing")
class OwnsItsScratchUntilDisturbed(Specimen):
    """Outputs go through a buffer of all layers, unless another thread's call has begun since: what comes between
    early is noticed, and what comes later is not."""

    owner = buffer = None

    def heads(self, x):
        OwnsItsScratchUntilDisturbed.owner = threading.get_ident()
        return super().heads(x)

    def divide(self, o, z):
        shared = OwnsItsScratchUntilDisturbed
        if torch.compiler.is_compiling() or shared.owner != threading.get_ident() or torch.is_grad_enabled():
            return super().divide(o, z)
        shared.buffer, z = o.clone(), z.clone().clone()
        return super().divide(shared.buffer if shared.buffer.shape == o.shape else o, z)
