"""What training may ask for beside first derivatives of a segment."""

import math
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor
from torch.func import functional_call

from ...ops.paradigm import Paradigm
from ...registry import SeqmixError
from ..check import check, differentiable, exact_gradients
from ..compare import require
from ..gradients import gradients
from ..mixer.case import Draw
from ..mixer.derivatives import STEPS, agrees
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


@check(
    differentiable,
    exact_gradients,
    stress=True,
    use="penalties of gradients, and meta-learning: the gradient of a gradient is wrong, and nothing says so",
    share=0.02,
    draw=Draw(tokens=(3, 6), batch_size=(1, 1), starts=("none", "read")),
)
def second_derivatives_are_right_or_refused(trial: Trial) -> None:
    """The gradient of a gradient is its derivative, as central differences in float64 give it, or it is refused, or not
    finite."""
    x, state, parameters = trial.tokens(), trial.state(), learnable(trial.mixer)
    above, along = trial.like(x), {"x": trial.like(x)} | {name: trial.like(p) for name, p in parameters.items()}
    across, given = trial.like(x), x.detach().requires_grad_()

    def slope(paradigm: Paradigm, own: Mapping[str, Tensor], tokens: Tensor, create_graph: bool) -> Tensor:
        """The derivative of the loss along other tokens."""
        options = {"paradigm": paradigm if state is None else trial.after(paradigm)}
        y, _ = functional_call(trial.mixer, dict(own), (tokens, state), options)
        (gradient,) = torch.autograd.grad((above * y).sum(), tokens, create_graph=create_graph)
        return (across * gradient).sum()

    def moved(names: list[str], steps: float) -> float:  # noqa: ARG001
        tokens = (x + steps * along["x"]).requires_grad_()
        own = {name: (p + steps * along[name]).detach() for name, p in parameters.items()}
        return slope(trial.reference, own, tokens, False).item()

    def rate(names: list[str], step: float) -> float:
        at = partial(moved, names)
        return (8 * (at(step) - at(-step)) - (at(2 * step) - at(-2 * step))) / (12 * step)

    for paradigm in trial.paradigms:
        leaves = {"x": given, **parameters}
        try:
            twice = slope(paradigm, parameters, given, True)
            found = torch.autograd.grad(twice, [*leaves.values()], allow_unused=True) if twice.requires_grad else ()
        except (SeqmixError, RuntimeError):  # refused
            continue
        terms = [along[name] * g for name, g in zip(leaves, found, strict=bool(found)) if g is not None]
        total, size = (sum(term.sum().item() for term in each) for each in (terms, [term.abs() for term in terms]))
        if not math.isfinite(total):  # as torch's logaddexp from minus infinity, which nobody overlooks
            continue
        right = agrees(["all"], {"all": total}, max(size, 1e-9), rate)
        off = f"the gradient of a gradient is {total:.6g}, and differences give {rate(['all'], STEPS[1]):.6g}"
        require(right, f"{paradigm}: {off}: it has to be right, or refused")
