"""The objective that training minimises: cross-entropy, unless `train` is called with another one."""

import torch
from torch import Tensor

from ..data import Packed
from ..models import LanguageModel, ModelOutput, ModelState


class Objective:
    """Training objective: cross-entropy. A subclass may change the loss, or prepare the model before training."""

    def prepare(self, model: LanguageModel) -> None:
        """Prepare a new model before its optimizer is built: initialise parameters, or freeze some of them."""

    def __call__(self, model: LanguageModel, batch: Packed, state: ModelState | None) -> ModelOutput:
        """Return the loss of a micro-batch, summed over its targets, and the final state if `state` is given.

        Auxiliary losses of mixers are summed over its tokens.
        """
        losses: list[Tensor] | None = [] if model.has_auxiliary_loss else None
        output = model(
            batch.inputs,
            state,
            targets=batch.targets,
            reduction="sum",
            cu_seqlens=batch.cu_seqlens,
            return_state=state is not None,
            losses=losses,
        )
        return output._replace(auxiliary_loss=torch.stack(losses).sum()) if losses else output
