"""What a run minimises: the cross-entropy of its data, unless a caller of `train` gives another objective."""

from ..data import Packed
from ..models import LanguageModel, ModelOutput, ModelState


class Objective:
    """The cross-entropy; a subclass changes the loss, or what the model begins with."""

    def prepare(self, model: LanguageModel) -> None:
        """Change a model that was built, before it has an optimizer: its parameters, and which of them train."""

    def __call__(self, model: LanguageModel, batch: Packed, state: ModelState | None) -> ModelOutput:
        """The loss of a micro-batch, summed over its targets; and the state after it, if one is given."""
        return model(
            batch.inputs,
            state,
            targets=batch.targets,
            reduction="sum",
            cu_seqlens=batch.cu_seqlens,
            return_state=state is not None,
        )
