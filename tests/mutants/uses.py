"""Wrong mixers: right where they are evaluated, wrong in a way of using them (training, packing, precision, layers)."""

import torch
import torch.nn.functional as F

from .registry import mutant
from .specimen import Cached, Specimen, SpecimenConfig


@mutant(check="gradients_of_documents_are_those_of_sequences")
class LeaksWhereNoStateIsWanted(Specimen):
    """Packed documents are one sequence where no final state is wanted, as in training. After huggingface/transformers:
    Mamba2Mixer ignores `cu_seq_lens` where its kernels are missing."""

    def mix(self, x, call):
        if call.documents is None or call.return_state:
            return super().mix(x, call)
        return super().mix(x, call._replace(documents=None, state=None))


@mutant(check="modes_change_nothing")
class HalvesGradientsOfFrozenTokens(Specimen):
    """Gradients of parameters are half where the tokens want none, as after a frozen embedding. After fla #875: a
    backward pass that counts on every input to want a gradient."""

    def heads(self, x):
        qk, v, a = super().heads(x)
        return (qk, v, a) if x.requires_grad or not v.requires_grad else (qk, (v + v.detach()) / 2, a)


@mutant(check="modes_change_nothing")
class IsAnotherInLongTraining(Specimen):
    """In training mode, segments of ten tokens and more are not divided. After fla 0.6.0: `attn_mode` is replaced by
    the length."""

    def divide(self, o, z):
        return o if self.training and o.shape[2] > 9 else super().divide(o, z)


@mutant(check="gradients_flow_through_states")
class DetachesTheStateInTraining(Specimen):
    """In training mode the state given is detached, so that nothing learns through it. After fla PR #1181: no gradient
    of the initial state."""

    def before(self, state, rows):
        state = super().before(state, rows)
        return state._replace(memory=state.memory.detach()) if self.training else state


@mutant(check="gradients_are_derivatives")
class ForgetsTheDenominatorInBackward(Specimen):
    """The backward pass takes the denominator for a constant, in all paradigms. After NX-AI/mlstm_kernels #16: a
    gradient that is wrong in code that all forms share."""

    def divide(self, o, z):
        return super().divide(o, z.detach())


@mutant(check="gradients_are_derivatives")
class ScalesTheGradientOfAParameter(Cached):
    """A mixer with one paradigm doubles the gradient of its projection."""

    def heads(self, x):
        q, k, v = super().heads(x)
        return q, k, 2 * v - v.detach()


@mutant(check="documents_are_sequences")
class CountsDocumentsInEightBits(Specimen):
    """Numbers of documents overflow after 255: the next ones are taken for the first. After fla #752: indices of
    documents in a narrow type."""

    def unpack(self, tokens, packed, rows):
        return super().unpack(tokens, packed % 256, rows)


@mutant(check="packing_keeps_precision")
class PacksInBFloat16(Specimen):
    """In float32, packed values are rounded to bfloat16. After fla #36: one path was computed in another precision."""

    def unpack(self, tokens, packed, rows):
        q, k, v, *rest = super().unpack(tokens, packed, rows)
        return [q, k, v if v.dtype == torch.float64 else v.to(torch.bfloat16).to(v.dtype), *rest]


@mutant(check="autocast_changes_only_precision")
class HalvesGradientsUnderAutocast(Specimen):
    """Under autocast a gradient is half of what it should be. After fla #559: custom functions without autocast's
    decorators."""

    def heads(self, x):
        qk, v, a = super().heads(x)
        return qk, (v + v.detach()) / 2 if torch.is_autocast_enabled("cpu") else v, a


@mutant(check="long_segments_do_not_drift")
class SubtractsRunningSums(Specimen):
    """What is left of a token is the difference of two running sums of log-decays, which float32 rounds where they are
    large. After fla: `g.cumsum` over a whole segment instead of a chunk."""

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
    """The causal mask is -10,000, which large scores pass. After huggingface/transformers, whose early masks were."""

    def masked(self, scores, unseen):
        return scores.masked_fill(unseen, -1e4)


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
