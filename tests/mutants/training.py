"""Wrong mixers: right where they are evaluated, wrong where they are trained."""

import torch

from .registry import mutant
from .specimen import Cached, Specimen


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
    """Gradients of parameters are half where the tokens want none, as after a frozen embedding."""

    def heads(self, x):
        qk, v, a = super().heads(x)
        return (qk, v, a) if x.requires_grad or not v.requires_grad else (qk, (v + v.detach()) / 2, a)


@mutant(check="modes_change_nothing")
class IsAnotherInLongTraining(Specimen):
    """In training mode, segments of ten tokens and more are not divided. After fla 0.6.0: in training `attn_mode` has
    no effect."""

    def divide(self, o, z):
        return o if self.training and o.shape[2] > 9 else super().divide(o, z)


@mutant(check="gradients_flow_through_states")
class DetachesTheStateInTraining(Specimen):
    """In training mode the state given is detached, so that nothing learns through it. After fla PRs #636, #1131 and
    #1181: recurrent kernels without a backward pass."""

    def before(self, state, rows):
        state = super().before(state, rows)
        return state._replace(memory=state.memory.detach()) if self.training else state


@mutant(check="gradients_are_derivatives")
class ForgetsTheDenominatorInBackward(Specimen):
    """The backward pass takes the denominator for a constant, in all paradigms."""

    def divide(self, o, z):
        return super().divide(o, z.detach())


@mutant(check="gradients_are_derivatives")
class ScalesTheGradientOfAParameter(Cached):
    """A mixer with one paradigm doubles the gradient of its projection."""

    def heads(self, x):
        q, k, v = super().heads(x)
        return q, k, 2 * v - v.detach()


@mutant(check="results_are_deterministic")
class OverwritesTheGradientFromAbove(Specimen):
    """The backward pass is computed in the memory of the gradient that it is given."""

    def mix(self, x, call):
        y, after = super().mix(x, call)
        return _InPlace.apply(y), after


class _InPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        same = gradient.clone()
        gradient.zero_()
        return same


@mutant(check="frozen_parameters_change_no_gradient")
class NeedsTheProjectionToLearn(Specimen):
    """Where the projection is frozen, gates get no gradient, as of a fused backward that is skipped."""

    def heads(self, x):
        qk, v, a = super().heads(x)
        return qk, v, a if qk.requires_grad else a.detach()


@mutant(check="gradients_of_a_batch_are_sums_over_its_rows")
class LeavesOutTheLastTokens(Specimen):
    """The gradient of a bias is summed over blocks of 128 tokens of all rows, where there are many; the rest is left
    out. After grids of kernels whose last block was not launched."""

    def divide(self, o, z):
        return super().divide(o, z) * _Blocks.apply(self.decay_proj.bias[:1] / 6, o.shape[0] * o.shape[2])


@mutant(check="gradients_of_a_batch_are_sums_over_its_rows")
class LeavesRowsOutInEvaluation(Specimen):
    """Outside of training mode, rows after the fortieth give values no gradient."""

    def heads(self, x):
        qk, v, a = super().heads(x)
        return qk, v if self.training else torch.cat((v[:40], v[40:].detach())), a


@mutant(check="gradients_of_a_batch_are_sums_over_its_rows")
class LearnsGatesFromFewRows(Specimen):
    """Gates of more than 32 rows get no gradient: a fused backward pass that larger batches leave out."""

    def heads(self, x):
        qk, v, a = super().heads(x)
        return qk, v, a.detach() if len(x) > 32 else a


class _Blocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, count):
        ctx.share = 1 if count < 1024 else count // 128 * 128 / count
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.share, None


@mutant(check="results_are_deterministic")
class GathersAMeanInTraining(Specimen):
    """A running mean of the tokens is gathered in training, and read in evaluation alone, as batch norm's is."""

    def __init__(self, config, d_model):
        super().__init__(config, d_model)
        self.register_buffer("mean", torch.zeros(d_model))

    def heads(self, x):
        if self.training and not torch.compiler.is_compiling():
            self.mean.lerp_(x.detach().mean((0, 1)), 0.1)
        return super().heads(x if self.training else x - self.mean)


@mutant(check="results_are_deterministic")
class KeepsScoresOutsideOfTheGraph(Specimen):
    """What the backward pass needs is kept by the module, in a closure that nothing shows, of the latest call: of two
    calls before one backward pass, as in losses of pairs, the first gets the second's."""

    def mix(self, x, call):
        y, after = super().mix(x, call)
        return _Recalled.apply(y, self.__dict__.setdefault("latest", _closure())), after


def _closure():
    kept = []

    def latest(*new):
        kept[:] = new or kept
        return kept[0]

    return latest


class _Recalled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, latest):
        ctx.latest = latest
        latest(y.detach().clone())
        return y * y

    @staticmethod
    def backward(ctx, gradient):
        return 2 * ctx.latest() * gradient, None


@mutant(check="modes_change_nothing")
class ScoresFromTheStart(Specimen):
    """Where neither gradients nor a state are wanted, as text is scored, the state given is not read."""

    def before(self, state, rows):
        return super().before(state if torch.is_grad_enabled() or self.wanted else None, rows)

    wanted = True

    def mix(self, x, call):
        self.wanted = call.return_state
        try:
            return super().mix(x, call)
        finally:
            self.wanted = True


@mutant(check="results_are_deterministic")
class ClipsItsGradients(Specimen):
    """The backward pass clips gradients at 10, as recurrent cells once did: a scaled loss has others."""

    def mix(self, x, call):
        y, after = super().mix(x, call)
        if y.requires_grad:
            y.register_hook(lambda gradient: gradient.clamp(-10, 10))
        return y, after


@mutant(check="frozen_parameters_change_no_gradient")
class KeepsNothingOfAFrozenProjection(Specimen):
    """Where the projection is frozen it is computed without a graph, and the layers below learn nothing through it, as
    with adapters."""

    def heads(self, x):
        qk, v, a = super().heads(x)
        return (qk, v, a) if self.in_proj.weight.requires_grad else (qk.detach(), v.detach(), a)


@mutant(check="second_derivatives_are_right_or_refused")
class ForgetsSecondDerivatives(Specimen):
    """A backward pass of its own is computed without a graph and does not say so: gradients of gradients are wrong."""

    def divide(self, o, z):
        return _Quotient.apply(o, z[..., None]) if self.config.denominator else o


class _Quotient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, o, z):
        ctx.save_for_backward(o, z)
        return o / z

    @staticmethod
    def backward(ctx, above):
        o, z = (each.detach() for each in ctx.saved_tensors)
        return above / z, -(above * o).sum(-1, keepdim=True) / z**2


@mutant(check="gradients_are_derivatives")
class ForgetsItsClampInBackward(Specimen):
    """Log-decays are clamped, as so many kernels' are, and their gradient is as if they were not."""

    def heads(self, x):
        qk, v, a = super().heads(x)
        return qk, v, a + (a.clamp(min=-3.0) - a).detach()


@mutant(check="gradients_flow_through_states")
class LosesTheGradientOfAStateAlone(Specimen):
    """A backward pass of its own returns at once where the output has no gradient: a state's is lost with it."""

    def mix(self, x, call):
        y, after = super().mix(x, call)
        y, memory = _BothOrNone.apply(y, after.memory)
        return y, after._replace(memory=memory)


class _BothOrNone(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, memory):
        ctx.set_materialize_grads(False)
        return y.clone(), memory.clone()

    @staticmethod
    def backward(ctx, above, above_memory):
        return (None, None) if above is None else (above, above_memory)
