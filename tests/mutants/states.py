"""Wrong mixers: states as values, and positions."""

from dataclasses import replace

import torch
from unusual_mixers import Memory, NegativeDecays

from .registry import mutant
from .specimen import Cache, Cached, CachedConfig, Specimen, SpecimenConfig, SpecimenState


@mutant(
    check="the_initial_state_is_nothing_read",
    after="lucidrains/x-transformers #219, #311 and #322: another text with the cache on",
)
class AnswersDifferentlyWithoutACache(Specimen):
    """Where no state is wanted, inputs are rounded on a faster path."""

    def mix(self, x, call):
        return super().mix(x if call.return_state else x.to(torch.bfloat16).to(x.dtype), call)


@mutant(check="rows_of_a_state_can_be_rearranged", after="fla's tensor_cache: a memo by the identity of a tensor")
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


class Unread(Cache):
    """An empty cache, recognised by its class."""


@mutant(check="a_state_goes_back", after="vLLM PR #50146: rejected tokens stayed in the window of a short convolution")
class PutsBackTheMemoryAlone(Specimen):
    """Going back restores the sums, and the position stays where the rejected tokens ended."""

    def rollback(self, x, before, after, tokens, **options):
        return super().rollback(x, before, after, tokens, **options)._replace(position=after.position)


@mutant(check="a_state_goes_back", after="vLLM issue #39273: text with drafts of n-grams differs from text without")
class GoesBackByLengthAlone(Cached):
    """Going back lowers the length of a cache whose slots are counted from its end."""

    def rollback(self, x, before, after, tokens, **options):
        return after._replace(length=after.length - tokens)


@mutant(check="a_state_survives_the_disk", after="fla #571, #582 and #601: caches as classes of another library")
class TellsAnEmptyCacheByItsClass(Cached):
    """An empty cache is recognised by its class, so a loaded one counts as empty."""

    def init_state(self, batch_size, *, max_length=None):
        return Unread(*super().init_state(batch_size))

    def extended(self, state, k, v):
        if isinstance(state, Unread):
            state = super().init_state(len(k))._replace(length=state.length)
        return super().extended(state, k, v)


@mutant(
    check="a_state_is_never_written_under_grad",
    after="transformers PR #47046: xLSTM's state, updated in place, failed under autograd",
)
class WritesWhatStoodThere(Specimen):
    """Positions are clamped in place, which changes no number and breaks whoever saved them for the backward pass."""

    def before(self, state, rows):
        state = super().before(state, rows)
        state.position.clamp_(min=0)
        return state


@mutant(check="a_constant_state_is_never_written", after="xlstm 2.0.6: conv1d_step writes into the state it is given")
class WritesTheGivenState(Specimen):
    """Without gradients a step writes the new memory over the one that was given."""

    def mix(self, x, call):
        y, after = super().mix(x, call)
        if call.state is None or x.shape[1] > 1 or torch.is_grad_enabled():
            return y, after
        return y, after._replace(memory=call.state.memory.copy_(after.memory))


@mutant(
    check="a_state_is_tensors_batch_first", after="fla's linear attention: with normalize its state becomes a tuple"
)
class ReturnsAPlainTuple(Specimen):
    """A state is a tuple without names."""

    def init_state(self, batch_size, *, max_length=None):
        return tuple(super().init_state(batch_size))

    def before(self, state, rows):
        return SpecimenState(*super().before(state, rows))

    def mix(self, x, call):
        y, after = super().mix(x, call)
        return y, tuple(after)


@mutant(
    check="a_state_has_the_declared_size",
    after="HazyResearch/zoology: by a slip of if and elif a Mamba's state size is None",
)
class SaysConstantAndGrows(CachedConfig):
    """Declares a constant state, and has a growing cache."""

    @property
    def traits(self):
        return replace(super().traits, state="constant")


@mutant(check="results_share_no_memory", after="minGRU-pytorch 0.2.1: output and state share memory")
class ReturnsItsState(NegativeDecays, right=False):
    """The state is a view of the output's last token."""

    def parallel(self, u, state):
        y, after = super().parallel(u, state)
        every = torch.cat((y[:, 1:], after.memory[:, None]), dim=1)
        return every, Memory(every[:, -1])

    def token(self, u, state):
        h = self.decay.to(u.dtype).tanh() * state.memory + u
        return h, Memory(h)


@mutant(check="init_state_is_where_the_mixer_is", after="our own review: a state on the CPU for a model elsewhere")
class StartsOnTheDefaultDevice(Specimen):
    """Positions of the initial state are on the default device, wherever the mixer is."""

    def init_state(self, batch_size, *, max_length=None):
        return super().init_state(batch_size)._replace(position=torch.zeros(batch_size, dtype=torch.int64))


@mutant(check="position_matters_only_where_declared", after="xformers' factory: flags set by hand and tested by nobody")
class SaysPositionMatters(SpecimenConfig):
    """Declares that positions matter, and they do not."""

    @property
    def traits(self):
        return replace(super().traits, shift_invariant=False)


class ScaledConfig(SpecimenConfig):
    scaled: bool = False
    """Whether the channels of rotated queries have weights of their own."""


@mutant(
    check="position_matters_only_where_declared", after="a user's mixer: rotation, inherited, beside decays per channel"
)
class RotatesWhatIsScaled(ScaledConfig):
    """With an option that is off by default, scores of rotated queries and keys have weights per channel, so that they
    depend on more than the distance; shift invariance is declared."""

    class layer(Specimen):  # noqa: N801
        def attend(self, paradigm, tokens, state):
            q, *rest = tokens
            weights = torch.linspace(0.5, 1.5, self.width, dtype=q.dtype, device=q.device)
            return super().attend(paradigm, [q * weights if self.config.scaled else q, *rest], state)


@mutant(
    check="an_unseen_prefix_changes_nothing",
    after="huggingface/transformers #37351: blocks that begin with the sequence",
)
class SeesBlocksOfThree(Cached):
    """A query sees the keys of its own block of three, and blocks begin with the sequence, not with what is seen."""

    def seen(self, queries, keys, device):
        key = torch.arange(keys, device=device)
        return super().seen(queries, keys, device) & (key // 3 == key[keys - queries :, None] // 3)
