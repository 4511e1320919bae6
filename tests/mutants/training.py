"""Wrong mixers: right where they are evaluated, wrong where they are trained; and what they leave behind."""

import torch
import torch.nn.functional as F
from torch import nn

from .registry import mutant
from .specimen import Specimen


@mutant(check="modes_change_nothing", after="state-spaces/mamba #101 and #1013: no initial states in training")
class IgnoresTheStateInTraining(Specimen):
    """In training mode every segment starts from an empty state."""

    def mix(self, x, call):
        return super().mix(x, call._replace(state=None) if self.training else call)


@mutant(check="modes_change_nothing", after="fla #47: the path of inference lacked the scale")
class IsAnotherWithoutGradients(Specimen):
    """Without gradients, a faster path scales by 1.01."""

    def divide(self, o, z):
        return super().divide(o, z) * (1 if torch.is_grad_enabled() else 1.01)


@mutant(check="gradients_are_derivatives", after="fla #875: dk with normalisation")
class ForgetsTheDenominatorInBackward(Specimen):
    """The backward pass takes the denominator for a constant, in all paradigms."""

    def divide(self, o, z):
        return super().divide(o, z.detach())


@mutant(check="results_are_deterministic", after="fla #766: the count of tokens seen outlived a call")
class RemembersItsLastInput(Specimen):
    """The last input stays on the module, and with it the graph that made it."""

    def heads(self, x):
        self.last = x
        return super().heads(x)


@mutant(check="results_are_deterministic", after="HazyResearch/zoology: its generator seeds the global one")
class DrawsWhatItDoesNotNeed(Specimen):
    """Evaluation draws a number from the global generator."""

    def heads(self, x):
        torch.rand(())
        return super().heads(x)


@mutant(check="every_parameter_learns", after="fla #427: conv_bias was built and unused")
class HasAGateThatNothingReads(Specimen):
    """A parameter is built and never used."""

    def reset_parameters(self):
        super().reset_parameters()
        self.gate = nn.Parameter(torch.ones_like(self.decay_proj.bias))


@mutant(check="copies_are_as_good", after="our own review: a copy that reads the original's weights")
class ProjectsByAClosure(Specimen):
    """The projection is a function that closes over the module, so that a copy reads the original's parameters."""

    def reset_parameters(self):
        super().reset_parameters()
        self.project = lambda x: F.linear(x, self.in_proj.weight)

    def heads(self, x):
        qkv = self.project(x).unflatten(-1, (-1, self.width)).transpose(1, 2)
        qk, v = qkv.split((2 * self.config.n_heads, self.config.n_heads), dim=1)
        return qk, v, super().heads(x)[2]


@mutant(check="parameters_round_trip", after="rotary-embedding-torch 0.9.1: a stale table after load_state_dict")
class KeepsATableOfItsWeights(Specimen):
    """Without gradients a table that is made of a parameter is kept, also after others were loaded."""

    kept = None

    def heads(self, x):
        qk, v, a = super().heads(x)
        if torch.is_grad_enabled():
            return qk, v, a
        if self.kept is None:
            self.kept = self.decay_proj.bias.detach().clone()
        logits = torch.nn.functional.linear(x, self.decay_proj.weight, self.kept)
        return qk, v, torch.nn.functional.logsigmoid(logits.transpose(1, 2))


@mutant(check="every_parameter_is_initialised", after="fla-org/flame #42: A_log and dt_bias stay zero on several GPUs")
class LeavesTheBias(Specimen):
    """reset_parameters leaves out the bias."""

    def reset_parameters(self):
        for projection in (self.in_proj, self.decay_proj, self.out_proj):
            nn.init.xavier_uniform_(projection.weight)


@mutant(check="surroundings_change_nothing", after="our own review: a constant in torch's default dtype")
class TakesTheDefaultDtype(Specimen):
    """A constant is made in torch's default dtype, which loaders and servers set to 16 bits."""

    def divide(self, o, z):
        return super().divide(o, z) * torch.tensor(1 / 3).to(o.dtype)
