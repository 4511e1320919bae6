"""Check that every parameter learns."""

from torch import Tensor

from ...mixers.base.layer_call import LayerCall
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
    """Every parameter that is not frozen has a finite, non-zero gradient in every paradigm, of the output or of the
    mixer's auxiliary loss."""
    parameters = learnable(trial.mixer)

    def nonzero_gradients(x: Tensor, paradigm: Paradigm) -> dict[str, bool]:
        return_loss = trial.mixer.traits.auxiliary_loss
        result = trial.mixer(x, call=LayerCall(paradigm=paradigm, return_loss=return_loss))
        results = {"y": result.y} | ({"loss": result.loss} if return_loss else {})
        computed = gradients(results, {name: trial.like(result) for name, result in results.items()}, parameters)
        for name, gradient in computed.items():
            require(gradient.isfinite().all(), f"{paradigm}: the gradient of {name} is not finite")
        return {name: bool(gradient.any()) for name, gradient in computed.items()}

    for paradigm in trial.paradigms if parameters else ():
        learns = nonzero_gradients(trial.tokens(), paradigm)
        if not all(learns.values()):  # experts see few tokens, and some parameters act only after many
            learns_later = nonzero_gradients(trial.tokens(8, 130), paradigm)
            learns |= {name: True for name, nonzero in learns_later.items() if nonzero}
        for name, nonzero in learns.items():
            require(nonzero, f"{paradigm}: the gradient of {name} is zero: the output does not depend on it")
