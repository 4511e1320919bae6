"""The objective that training minimises: cross-entropy, unless `train` is called with another one."""

from ..data import Packed
from ..models import LanguageModel, ModelOutput, ModelState


class Objective:
    """Training objective: cross-entropy. A subclass may change the loss, or prepare the model before training."""

    def prepare(self, model: LanguageModel) -> None:
        """Prepare a new model before its optimizer is built: initialise parameters, or freeze some of them."""

    def __call__(self, model: LanguageModel, batch: Packed, state: ModelState | None) -> ModelOutput:
        """Return the loss of a micro-batch, summed over its targets, and the final state if `state` is given."""
        return model(
            batch.inputs,
            state,
            targets=batch.targets,
            reduction="sum",
            cu_seqlens=batch.cu_seqlens,
            return_state=state is not None,
        )
