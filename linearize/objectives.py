"""The objectives of the stages: what a student learns of its teacher."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..data import Packed
from ..mixers.influence import captured
from ..models import IGNORED, LanguageModel, ModelOutput, ModelState
from ..models.loss import tokens_at_once
from ..registry import SeqmixError
from ..training.objective import Objective
from .plan import StageName


class Text(Objective):
    """The cross-entropy of a student, which may train its new mixers alone.

    `layers` have new mixers; with `mixers_alone`, nothing else trains.
    """

    def __init__(self, teacher: LanguageModel, layers: Sequence[int], *, mixers_alone: bool) -> None:
        self.teacher = teacher
        self.layers = layers
        self.mixers_alone = mixers_alone

    def prepare(self, model: LanguageModel) -> None:
        """Freeze what does not train."""
        self.teacher.to(model.device)
        if self.mixers_alone:
            model.requires_grad_(False)
            for layer in self.layers:
                model.blocks[layer].mixer.requires_grad_()


class MixerOutput(Text):
    """Each new mixer's squared error to its teacher's output, on the teacher's inputs."""

    def __call__(self, model: LanguageModel, batch: Packed, state: ModelState | None) -> ModelOutput:  # noqa: ARG002
        """The errors, summed over layers and targets."""
        mixers = {layer: self.teacher.blocks[layer].mixer for layer in self.layers}
        with torch.no_grad(), captured(mixers) as found:
            self.teacher.run_blocks(self.teacher.embed(batch.inputs), cu_seqlens=batch.cu_seqlens)
        loss = torch.zeros((), device=model.device)
        first = None
        for layer, (x, wanted, _) in found.items():
            mixer = model.blocks[layer].mixer
            options = {"return_values": True, "first_values": first}
            if mixer.takes_first_values and first is None:
                raise SeqmixError(f"stage mixer_output: layer {layer} takes the values of a layer that is not swapped")
            residual = mixer.traits.value_residual
            y, _, *values = mixer(x, cu_seqlens=batch.cu_seqlens, **(options if residual else {}))
            first = values[0] if values and first is None else first
            loss = loss + relative_error(y, wanted, batch.targets)
        return ModelOutput(None, loss)


class Hidden(Text):
    """The squared errors of the hidden states after the new layers, of a student that runs by itself."""

    def __call__(self, model: LanguageModel, batch: Packed, state: ModelState | None) -> ModelOutput:  # noqa: ARG002
        """The errors, summed over layers and targets."""
        found = []
        for each, learns in ((self.teacher, False), (model, True)):
            blocks = {layer: each.blocks[layer] for layer in self.layers}
            with torch.set_grad_enabled(learns), captured(blocks) as states:
                each.run_blocks(each.embed(batch.inputs), cu_seqlens=batch.cu_seqlens)
            found.append([states[layer].output for layer in self.layers])
        errors = [relative_error(y, wanted, batch.targets) for wanted, y in zip(*found, strict=True)]
        return ModelOutput(None, torch.stack(errors).sum())


class Logits(Text):
    """The divergence of the student's distribution from the teacher's."""

    def __call__(self, model: LanguageModel, batch: Packed, state: ModelState | None) -> ModelOutput:  # noqa: ARG002
        """The divergence, summed over targets."""
        with torch.no_grad():
            wanted = stream(self.teacher, batch)
        size = tokens_at_once(model.head.weight)
        parts = zip(stream(model, batch).split(size), wanted.split(size), strict=True)
        sums = [checkpoint(divergence, model, self.teacher, *part, use_reentrant=False) for part in parts]
        return ModelOutput(None, torch.stack([x for x in sums if isinstance(x, Tensor)]).sum())


OBJECTIVES: dict[StageName, type[Text]] = {
    "mixer_output": MixerOutput,
    "hidden": Hidden,
    "logits": Logits,
    "text": Text,
}


def relative_error(y: Tensor, wanted: Tensor, targets: Tensor) -> Tensor:
    """The mean over tokens of |y - wanted|^2, over that of |wanted|^2, times the number of targets."""
    y = y.float()
    wanted = wanted.float()
    return F.mse_loss(y, wanted) / wanted.square().mean().clamp(min=1e-12) * (targets != IGNORED).sum()


def stream(model: LanguageModel, batch: Packed) -> Tensor:
    """The residual stream [M D] after the last block, at the tokens that have a target."""
    x, _ = model.run_blocks(model.embed(batch.inputs), cu_seqlens=batch.cu_seqlens)
    return x[batch.targets != IGNORED]


def divergence(model: LanguageModel, teacher: LanguageModel, x: Tensor, wanted: Tensor) -> Tensor:
    """KL(teacher, model) after the residual streams [M D], in nats, summed; float32 or wider."""
    logits = model.logits(x), teacher.logits(wanted)
    with torch.autocast(x.device.type, enabled=False):
        own, theirs = (y.to(torch.promote_types(y.dtype, torch.float32)).log_softmax(-1) for y in logits)
        return F.kl_div(own, theirs, reduction="sum", log_target=True)
