"""Parameters that never learn."""

from torch import Tensor

from ...ops.runtime.paradigm import Paradigm
from ..check import check, differentiable
from ..compare import require
from ..gradients import gradients
from ..mixer.case import Draw
from ..mixer.trial import Trial, learnable


@check(
    differentiable,
    stress=True,
    use="training: a parameter never changes",
    share=0.07,
    draw=Draw(tokens=(9, 9), batch_size=(2, 2), starts=("none",)),
)
def every_parameter_learns(trial: Trial) -> None:
    """Every parameter that is not frozen has a finite gradient that is not zero, in every paradigm."""
    parameters = learnable(trial.mixer)

    def learning(x: Tensor, paradigm: Paradigm) -> dict[str, bool]:
        y, _ = trial.mixer(x, paradigm=paradigm)
        found = gradients({"y": y}, {"y": trial.like(y)}, parameters)
        for name, gradient in found.items():
            require(gradient.isfinite().all(), f"{paradigm}: the gradient of {name} is not finite")
        return {name: bool(gradient.any()) for name, gradient in found.items()}

    for paradigm in trial.paradigms if parameters else ():
        found = learning(trial.tokens(), paradigm)
        if not all(found.values()):  # an expert may be chosen for few tokens, a scale read after many
            found |= {name: learns for name, learns in learning(trial.tokens(8, 130), paradigm).items() if learns}
        for name, learns in found.items():
            require(learns, f"{paradigm}: {name} has no gradient: nothing depends on it")
