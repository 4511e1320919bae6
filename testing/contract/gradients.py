"""Checks of gradients: they are the derivatives of the results, in every way that training calls a mixer."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.func import functional_call

from ...mixers.base.state import from_dict, to_dict
from ...ops.runtime.paradigm import Paradigm
from ..check import check, differentiable, exact_gradients
from ..compare import require
from ..gradients import gradients
from ..mixer.case import USES, Draw
from ..mixer.derivatives import STEPS, agrees
from ..mixer.trial import Trial, learnable, named_results

LARGER = 6.0
"""Scale of tokens at which gates and decays reach the values that they may be clamped to."""


@check(
    use="training: it computes a different function than evaluation, or wrong gradients",
    remedy="use nn.Dropout, or a field with `dropout` in its name, which the check sets to 0",
    share=0.04,
    draw=Draw(tokens=(1, 11), long=4, lists=((130,),), batch_size=(1, 2), crowded=6, uses=USES),
)
def modes_change_nothing(trial: Trial) -> None:
    """Results are the same in evaluation and training mode (without dropout), with and without a final state, with
    tokens that need no gradient, and with autograd switched off."""
    x, state = trial.tokens(), trial.state()
    for paradigm in trial.paradigms:
        expected, after = trial.differentiate(trial.call(paradigm), x, state)
        with torch.no_grad():  # the call that scores a text
            scored = trial.mixer(x, state, paradigm=paradigm if state is None else trial.after(paradigm))
        what = f"{paradigm}, without gradients and return_state=False"
        trial.compare(what, scored, (expected["the output"], None))
        if trial.case.use == "evaluation":
            without = trial.mix(x, state, paradigm=paradigm)
            trial.compare(f"{paradigm}, without gradients against with", without, (expected["the output"], after))
        else:
            used = trial.differentiate(trial.used(paradigm), x, state, used=True)
            trial.compare(f"{paradigm}, {trial.use} against evaluation", used, (expected, after))


@check(
    differentiable,
    exact_gradients,
    use="training: gradients are wrong",
    remedy="declare traits.surrogate_gradients=True, or differentiable=False",
    share=0.04,
    draw=Draw(pieces=(1, 3), tokens=(1, 8), batch_size=(1, 2), uses=USES, scales=(1.0, 1.0, LARGER)),
)
def gradients_are_derivatives(trial: Trial) -> None:
    """Gradients with respect to tokens, state and parameters are the derivatives: they equal central differences in
    float64, also for packed documents."""
    boundaries = trial.boundaries()
    x, state = trial.tokens(), trial.state(trial.case.batch_size if boundaries is None else len(trial.case.lengths))
    packed = {} if boundaries is None else {"cu_seqlens": boundaries}
    leaves = {"the tokens": x, **{f"the state's {name}": leaf for name, leaf in to_dict(state or ()).items()}}
    leaves |= {f"the parameter {name}": parameter.detach() for name, parameter in learnable(trial.mixer).items()}
    # directions; an empty slot of a cache stays empty
    along = {name: trial.like(leaf) * (leaf != 0) for name, leaf in leaves.items() if leaf.is_floating_point()}
    if state is not None:  # towards the state after other tokens, because the leaves may depend on each other
        length = trial.prefix if trial.mixer.traits.state == "growing" else max(trial.prefix, 3)
        others = to_dict(trial.state_after(length, len(next(iter(to_dict(state).values())))) if length else state)
        for name, other in others.items():
            leaf = leaves[f"the state's {name}"]
            if leaf.is_floating_point():
                along[f"the state's {name}"] = torch.where(leaf.isfinite() & other.isfinite(), other - leaf, 0).detach()
    upstream: dict[str, Tensor] = {}

    def loss(moved: Mapping[str, Tensor], paradigm: Paradigm, mixer: torch.nn.Module) -> Tensor:
        parameters = {name: moved.get(f"the parameter {name}", p) for name, p in mixer.named_parameters()}
        before = state and from_dict(state, {name: moved[f"the state's {name}"] for name in to_dict(state)})
        options = {"paradigm": paradigm if state is None else trial.after(paradigm), **packed}
        options["return_state"] = trial.final_state
        y, after = functional_call(mixer, parameters, (moved["the tokens"], before), options)
        results = named_results(y, after)
        if not upstream:
            upstream.update({name: trial.like(result) * (result.detach() != 0) for name, result in results.items()})
        return torch.stack([(upstream[name] * result).sum() for name, result in results.items()]).sum()

    def rate(names: list[str], step: float) -> float:
        def at(steps: float) -> float:
            moved = {n: leaf + steps * step * along[n] if n in names else leaf for n, leaf in leaves.items()}
            with torch.no_grad():
                return loss(moved, trial.reference, trial.mixer).item()

        return (8 * (at(1) - at(-1)) - (at(2) - at(-2))) / (12 * step)

    for paradigm in trial.paradigms:
        copies = {name: leaves[name].detach().clone().requires_grad_() for name in along}
        if trial.case.use == "frozen":
            copies["the tokens"] = leaves["the tokens"]
        total = loss({**leaves, **copies}, paradigm, trial.mixer_in_use)
        inputs = {name: leaf for name, leaf in copies.items() if leaf.requires_grad}
        # `gradients` rather than autograd: the output of a first token may depend on no input
        computed = gradients({"loss": total}, {"loss": torch.ones_like(total)}, inputs)
        slopes = {name: (along[name] * gradient).sum().item() for name, gradient in computed.items()}
        size = sum((along[name] * gradient).abs().sum().item() for name, gradient in computed.items())
        if not agrees([*slopes], slopes, size, rate):
            wrong = [name for name in slopes if not agrees([name], slopes, size, rate)] or [*slopes]
            rates = {name: rate([name], STEPS[1]) for name in wrong}
            text = ", ".join(
                f"{name} (expected a slope of {rates[name]:.6g}, got {slopes[name]:.6g})" for name in wrong
            )
            use = "" if trial.case.use == "evaluation" else f", {trial.use}"
            require(False, f"{paradigm}{use}: the gradient differs from central differences: {text}")
