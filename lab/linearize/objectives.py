"""Training objectives of the stages: how a student learns from its teacher."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ...data import Packed
from ...mixers.base.influence import record_calls
from ...mixers.base.layer_call import LayerCall
from ...models import IGNORED, LanguageModel, ModelOutput, ModelState
from ...models.loss import tokens_at_once
from ...registry import SeqmixError
from ...training.objective import Objective
from .plan import StageName


class Text(Objective):
    """Objective of the stage `text`: the cross-entropy of the student; base class of the other stages' objectives.

    Args:
        teacher: the teacher.
        layers: indices of the layers with new mixers.
        mixers_alone: True if only the new mixers are trained.
    """

    def __init__(self, teacher: LanguageModel, layers: Sequence[int], *, mixers_alone: bool) -> None:
        self.teacher = teacher
        self.layers = layers
        self.mixers_alone = mixers_alone

    def prepare(self, model: LanguageModel) -> None:
        """Freeze all parameters that are not trained, and move the teacher to the student's device."""
        self.teacher.to(model.device)
        if self.mixers_alone:
            model.requires_grad_(False)
            for layer in self.layers:
                model.blocks[layer].mixer.requires_grad_()


class MixerOutput(Text):
    """Objective of the stage `mixer_output`: the relative squared error of each new mixer's output.

    A new mixer receives the inputs of the teacher's mixer in the same layer, and its output is compared with the output
    of that mixer.
    """

    def __call__(self, model: LanguageModel, batch: Packed, state: ModelState | None) -> ModelOutput:  # noqa: ARG002
        """Return the errors, summed over layers and targets."""
        mixers = {layer: self.teacher.blocks[layer].mixer for layer in self.layers}
        with torch.no_grad(), record_calls(mixers) as teacher_calls:
            self.teacher.run_blocks(self.teacher.embed(batch.inputs), cu_seqlens=batch.cu_seqlens)
        loss = torch.zeros((), device=model.device)
        first_values: dict[str, Tensor] = {}
        for layer, (x, teacher_output, _) in teacher_calls.items():
            mixer = model.blocks[layer].mixer
            first = first_values.get(mixer.kind) if mixer.takes_first_values else None
            if mixer.takes_first_values and first is None:
                raise SeqmixError(
                    f"stage mixer_output: layer {layer} needs the values of an earlier layer that is not swapped: "
                    "swap that layer too"
                )
            residual = mixer.traits.value_residual
            call = LayerCall(cu_seqlens=batch.cu_seqlens, first_values=first, return_values=residual)
            result = mixer(x, call=call)
            if residual:
                first_values.setdefault(mixer.kind, result.values)
            loss = loss + relative_error(result.y, teacher_output, batch.targets)
        return ModelOutput(None, loss)


class Hidden(Text):
    """Objective of the stage `hidden`: the relative squared error of hidden states after each layer with a new mixer.

    Each layer of the student runs on the student's own hidden states.
    """

    def __call__(self, model: LanguageModel, batch: Packed, state: ModelState | None) -> ModelOutput:  # noqa: ARG002
        """Return the errors, summed over layers and targets."""
        outputs = []
        for network, learns in ((self.teacher, False), (model, True)):
            blocks = {layer: network.blocks[layer] for layer in self.layers}
            with torch.set_grad_enabled(learns), record_calls(blocks) as calls:
                network.run_blocks(network.embed(batch.inputs), cu_seqlens=batch.cu_seqlens)
            outputs.append([calls[layer].output for layer in self.layers])
        errors = [relative_error(y, expected, batch.targets) for expected, y in zip(*outputs, strict=True)]
        return ModelOutput(None, torch.stack(errors).sum())


class Logits(Text):
    """Objective of the stage `logits`: the divergence of the student's next-token distribution from the teacher's."""

    def __call__(self, model: LanguageModel, batch: Packed, state: ModelState | None) -> ModelOutput:  # noqa: ARG002
        """Return the divergence, summed over targets."""
        with torch.no_grad():
            teacher_stream = stream(self.teacher, batch)
        size = tokens_at_once(model.head.weight)
        parts = zip(stream(model, batch).split(size), teacher_stream.split(size), strict=True)
        sums = [checkpoint(divergence, model, self.teacher, *part, use_reentrant=False) for part in parts]
        return ModelOutput(None, torch.stack([x for x in sums if isinstance(x, Tensor)]).sum())


OBJECTIVES: dict[StageName, type[Text]] = {
    "mixer_output": MixerOutput,
    "hidden": Hidden,
    "logits": Logits,
    "text": Text,
}


def relative_error(y: Tensor, expected: Tensor, targets: Tensor) -> Tensor:
    """Return the mean of (y - expected)^2 divided by the mean of expected^2, times the number of targets.

    `IGNORED` targets are not counted.
    """
    y = y.float()
    expected = expected.float()
    return F.mse_loss(y, expected) / expected.square().mean().clamp(min=1e-12) * (targets != IGNORED).sum()


def stream(model: LanguageModel, batch: Packed) -> Tensor:
    """Return the residual stream after the last block at the M tokens that have a target, [M D]."""
    x, _ = model.run_blocks(model.embed(batch.inputs), cu_seqlens=batch.cu_seqlens)
    return x[batch.targets != IGNORED]


def divergence(model: LanguageModel, teacher: LanguageModel, x: Tensor, teacher_x: Tensor) -> Tensor:
    """Return KL(teacher, model) of the next-token distributions, in nats, summed over tokens; float32 or wider.

    `x` and `teacher_x` are the residual streams of the two models after the last block, [M D].
    """
    logits = model.logits(x), teacher.logits(teacher_x)
    with torch.autocast(x.device.type, enabled=False):
        log_p, teacher_log_p = (y.to(torch.promote_types(y.dtype, torch.float32)).log_softmax(-1) for y in logits)
        return F.kl_div(log_p, teacher_log_p, reduction="sum", log_target=True)
