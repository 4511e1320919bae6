"""Gradients are the derivatives of what is computed, in every way that training calls a mixer."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor
from torch.func import functional_call

from ...mixers.state import from_dict, select, to_dict
from ...ops.paradigm import Paradigm
from ...registry import SeqmixError
from ..check import check, differentiable, exact_gradients
from ..compare import require
from ..gradients import gradients
from ..mixer.case import USES, Draw
from ..mixer.trial import Trial, as_leaves, learnable, named_leaves, named_results

STEPS = (1e-4, 1e-5, 1e-6, 1e-7, 1e-8)
"""Steps of the differences: a smaller one where a larger one crosses a kink, as of a maximum."""

ALLOWED = 1e-6
"""Between a derivative and differences, relative to the sum of the absolute values of its terms."""

LARGER = 6.0
"""A scale at which gates and decays are what they may be clamped to."""

MANY_ROWS = 5
"""So many times the rows of a case: with its tokens more than 4,096, above the blocks that sums are made of."""


@check(
    use="training: it computes another function than evaluation, or other gradients",
    share=0.06,
    draw=Draw(tokens=(1, 11), long=4, lists=((65,), (130,), (300,)), batch_size=(1, 2), crowded=6, uses=USES, wide=6),
)
def modes_change_nothing(trial: Trial) -> None:
    """Training mode (without dropout), a call that wants no final state, tokens that want no gradient, and grad mode
    switched off give what evaluation with gradients gives."""
    x, state = trial.tokens(), trial.state()
    for paradigm in trial.paradigms:
        expected, after = trial.differentiate(trial.call(paradigm), x, state)
        with torch.no_grad():  # as text is scored
            unwanted = trial.mixer(x, state, paradigm=paradigm if state is None else trial.after(paradigm))
        trial.compare(f"{paradigm}, neither gradients nor a state wanted", unwanted, (expected["the output"], None))
        if trial.case.use == "evaluation":
            without = trial.mix(x, state, paradigm=paradigm)
            trial.compare(f"{paradigm}, without gradients against with", without, (expected["the output"], after))
        else:
            used = trial.differentiate(trial.used(paradigm), x, state, used=True)
            trial.compare(f"{paradigm}, as {trial.use} against evaluation", used, (expected, after))


@check(
    use="fine-tuning: with other parameters frozen, those that learn get other gradients",
    share=0.02,
    draw=Draw(tokens=(5, 9), batch_size=(2, 2), starts=("none", "read")),
)
def frozen_parameters_change_no_gradient(trial: Trial) -> None:
    """A parameter, or a state, that learns alone, while all else is frozen, has the gradient that it has among all."""
    x, state, parameters = trial.tokens(), trial.state(), learnable(trial.mixer)
    for paradigm in trial.paradigms:
        given = paradigm if state is None else trial.after(paradigm)
        y, _ = trial.mixer(x.detach().requires_grad_(), state, paradigm=given)
        above = {"y": trial.like(y)}
        expected = gradients({"y": y}, above, parameters)
        with trial.differences(f"{paradigm}, parameters that learn alone against all together") as found:
            for name, parameter in parameters.items():
                with _frozen([other for other in parameters.values() if other is not parameter]):
                    y, _ = trial.mixer(x, state, paradigm=given)
                    alone = gradients({"y": y}, above, {name: parameter})
                found.tensor(f"the gradient of {name}", alone[name], expected[name])
            learned = x.detach().requires_grad_()  # as where the layers below have adapters
            y, _ = trial.mixer(learned, state, paradigm=given)
            among = gradients({"y": y}, above, {"the tokens": learned})
            with _frozen([*parameters.values()]):
                y, _ = trial.mixer(learned, state, paradigm=given)
                found.tensors(gradients({"y": y}, above, {"the tokens": learned}), among)
            if state is not None and (leaves := named_leaves("the state's", before := as_leaves(state))):
                y, _ = trial.mixer(x, before, paradigm=given)
                among = gradients({"y": y}, above, leaves)
                with _frozen([*parameters.values()]):
                    y, _ = trial.mixer(x, before, paradigm=given)
                    alone = gradients({"y": y}, above, leaves)
                found.tensors(alone, among)


@check(
    differentiable,
    use="training with large batches: the gradients of parameters leave tokens out",
    share=0,
    long=True,
    # of the uses, two that differ in mode and final state
    draw=Draw(tokens=(61, 61), batch_size=(14, 14), starts=("none", "read"), uses=("evaluation", "training")),
)
def gradients_of_a_batch_are_sums_over_its_rows(trial: Trial) -> None:
    """The gradients of parameters over thousands of tokens are the sums of those over some of the rows at a time."""
    rows = MANY_ROWS * trial.case.batch_size
    x, state, parameters = trial.tokens(rows), trial.state(rows), learnable(trial.mixer)
    for paradigm in trial.paradigms:
        call = trial.used(paradigm)
        y, _ = call(x, state)
        above = trial.like(y)
        whole = gradients({"y": y}, {"y": above}, parameters)
        sums = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
        for some in torch.arange(rows, device=x.device).tensor_split([trial.case.batch_size]):
            y, _ = call(x[some], None if state is None else select(state, some))
            for name, gradient in gradients({"y": y}, {"y": above[some]}, parameters).items():
                sums[name] += gradient
        what = f"{paradigm}, as {trial.use}, {rows} rows of {x.shape[1]} tokens against some and the others"
        actual, expected = ({f"the gradient of {n}": g for n, g in each.items()} for each in (whole, sums))
        trial.compare(what, (actual, None), (expected, None))


@contextmanager
def _frozen(parameters: list[Tensor]) -> Iterator[None]:
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


@check(
    differentiable,
    exact_gradients,
    use="training: gradients are wrong",
    share=0.06,
    draw=Draw(pieces=(1, 3), tokens=(1, 8), batch_size=(1, 2), uses=USES, scales=(1.0, 1.0, LARGER)),
)
def gradients_are_derivatives(trial: Trial) -> None:
    """Gradients of tokens, state and parameters are the derivatives: central differences in float64 agree, packed
    documents included."""
    boundaries = trial.boundaries()
    x, state = trial.tokens(), trial.state(trial.case.batch_size if boundaries is None else len(trial.case.lengths))
    packed = {} if boundaries is None else {"cu_seqlens": boundaries}
    leaves = {"the tokens": x, **{f"the state's {name}": leaf for name, leaf in to_dict(state or ()).items()}}
    leaves |= {f"the parameter {name}": parameter.detach() for name, parameter in learnable(trial.mixer).items()}
    # an empty slot of a cache stays empty
    along = {name: trial.like(leaf) * (leaf != 0) for name, leaf in leaves.items() if leaf.is_floating_point()}
    if state is not None:  # towards another state: one where its leaves depend on each other
        for name, other in to_dict(trial.mixer.perturb_state(state, trial.generator)).items():
            leaf = leaves[f"the state's {name}"]
            if leaf.is_floating_point():
                along[f"the state's {name}"] = torch.where(leaf.isfinite(), other - leaf, 0).detach()
    above: dict[str, Tensor] = {}

    def loss(moved: Mapping[str, Tensor], paradigm: Paradigm, mixer: torch.nn.Module) -> Tensor:
        own = {name: moved.get(f"the parameter {name}", p) for name, p in mixer.named_parameters()}
        before = state and from_dict(state, {name: moved[f"the state's {name}"] for name in to_dict(state)})
        options = {"paradigm": paradigm if state is None else trial.after(paradigm), **packed}
        options["return_state"] = trial.final_state
        y, after = functional_call(mixer, own, (moved["the tokens"], before), options)
        results = named_results(y, after)
        if not above:
            above.update({name: trial.like(result) * (result.detach() != 0) for name, result in results.items()})
        return torch.stack([(above[name] * result).sum() for name, result in results.items()]).sum()

    def rate(names: list[str], step: float) -> float:
        def at(steps: float) -> float:
            moved = {n: leaf + steps * step * along[n] if n in names else leaf for n, leaf in leaves.items()}
            with torch.no_grad():
                return loss(moved, trial.reference, trial.mixer).item()

        return (8 * (at(1) - at(-1)) - (at(2) - at(-2))) / (12 * step)

    for paradigm in trial.paradigms:
        wanted = {name: leaves[name].detach().clone().requires_grad_() for name in along}
        if trial.case.use == "frozen":
            wanted["the tokens"] = leaves["the tokens"]
        total = loss({**leaves, **wanted}, paradigm, trial.mixer_in_use)
        roots = {name: leaf for name, leaf in wanted.items() if leaf.requires_grad}
        # the output of a first token may depend on nothing
        found = gradients({"loss": total}, {"loss": torch.ones_like(total)}, roots).values()
        slopes = {name: (along[name] * g).sum().item() for name, g in zip(roots, found, strict=True)}
        size = sum((along[name] * g).abs().sum().item() for name, g in zip(roots, found, strict=True))
        if not _agrees([*slopes], slopes, size, rate):
            wrong = [name for name in slopes if not _agrees([name], slopes, size, rate)] or [*slopes]
            off = {name: rate([name], STEPS[1]) for name in wrong}
            text = ", ".join(f"{name} ({slopes[name]:.6g}, and differences give {off[name]:.6g})" for name in wrong)
            use = "" if trial.case.use == "evaluation" else f", as {trial.use}"
            require(False, f"{paradigm}{use}: the gradient is not the derivative of {text}")


@check(
    differentiable,
    exact_gradients,
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
        right = _agrees(["all"], {"all": total}, max(size, 1e-9), rate)
        off = f"the gradient of a gradient is {total:.6g}, and differences give {rate(['all'], STEPS[1]):.6g}"
        require(right, f"{paradigm}: {off}: it has to be right, or refused")


def _agrees(
    names: list[str], slopes: Mapping[str, float], size: float, rate: Callable[[list[str], float], float]
) -> bool:
    slope = sum(slopes[name] for name in names)
    return any(abs(rate(names, step) - slope) <= ALLOWED * size for step in STEPS)
