"""A result is a function of its arguments: no call leaves anything for the next."""

from collections import deque
from collections.abc import Mapping, Set
from functools import partial
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor

from ...mixers.contract import SequenceMixer
from ...mixers.state import clone
from ...ops.runtime.paradigm import Paradigm
from ..check import check
from ..compare import CheckFailure, require
from ..gradients import gradients
from ..mixer.case import Draw
from ..mixer.trial import SegmentCall, Trial, learnable, named_results

LOSS_SCALE = 2.0**16
"""What losses are multiplied by in float16."""

FRESH = 13
"""Tokens, and of a chunk, that no other check has."""

PLAIN = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, type(None))
"""Values that are compared by ==."""


LONGER_THAN_CHUNKS = Draw(tokens=(1, 9), lists=((17,),), uses=("evaluation", "training"))


@check(use="repeated calls: one call changes what the next one gives", share=0.03, draw=LONGER_THAN_CHUNKS)
def results_are_deterministic(trial: Trial) -> None:
    """Twice the same arguments give the same bits, forward and backward, through the same graph too; no random number
    is drawn, and no gradient from above, parameter, buffer or attribute of a module holds anything of a call."""
    x, state, other = trial.tokens(), trial.state(), trial.tokens()
    mixer, sampled = trial.mixer_in_use, trial.rebuilt()  # built first, which draws numbers
    if trial.case.options or trial.case.use == "training":
        _trained_after_sampling(trial)
    before = torch.random.get_rng_state()
    tensors = dict(mixer.named_parameters()) | dict(mixer.named_buffers())
    saved = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    with torch.inference_mode():  # text is sampled between steps of training, from nothing and from a state
        for paradigm in trial.paradigms:
            for given in (None, state)[: 1 if state is None else 2]:
                trial.call(paradigm, sampled)(x.clone(), None if given is None else clone(given))
    for paradigm in trial.paradigms:
        try:
            after_sampling = trial.differentiate(trial.call(paradigm, sampled), x, state, mixer=sampled)
        except RuntimeError as error:
            said = f"{paradigm}: after a call in inference mode it cannot be trained: {error}"
            raise CheckFailure(said.partition(". ")[0]) from error
        call = trial.used(paradigm)
        plain = trial.differentiate(trial.call(paradigm), x, state)
        trial.compare(f"{paradigm}, after a call in inference mode against before", after_sampling, plain, 0)
        first = plain if trial.case.use == "evaluation" else trial.differentiate(call, x, state, used=True)
        # what is made at a first call and depends on sizes alone, as a table of angles, is there now and stays
        attributes = _held(mixer)
        trial.differentiate(call, other, state, used=True)
        attributes_later = _held(mixer)
        second = trial.differentiate(call, x, state, used=True)
        trial.compare(f"{paradigm}, a second call against the first", second, first, 0)
        # as losses of pairs have it, and layers that are used twice
        both = trial.differentiate(partial(_and_then, call, other), x, state, used=True)
        trial.compare(f"{paradigm}, with a call on other tokens before backward against without", both, first, 0)
        _backward_twice(trial, paradigm, x, state)
        for name in sorted(attributes.keys() | attributes_later.keys()):
            same = _same(attributes.get(name), attributes_later.get(name))
            sentence = f"{paradigm}: {name} is another after a call on other tokens, as many as before"
            require(same, f"{sentence}: a call may leave nothing on the module")
    require(torch.equal(before, torch.random.get_rng_state()), "mixing drew numbers from the global generator")
    now = {name: tensor.detach() for name, tensor in tensors.items()}
    trial.compare("parameters and buffers after mixing against before", (now, None), (saved, None), 0)


def _and_then(call: SegmentCall, other: Tensor, x: Tensor, state: Any) -> tuple[Tensor, Any]:
    again = None if state is None else clone(state)  # a cache with room may be consumed
    result = call(x, state)
    call(other, again)
    return result


def _trained_after_sampling(trial: Trial) -> None:
    """Sizes that are met in inference mode before anywhere else: what a process keeps of them, as masks, must learn."""
    chunked = trial.subject.accepts({**trial.case.options, "chunk_size": FRESH})
    mixer = trial.rebuilt(chunk_size=FRESH) if chunked else trial.rebuilt()
    x = trial.tokens(1, FRESH)
    for paradigm in trial.paradigms:
        call = trial.call(paradigm, mixer)
        with torch.inference_mode():
            call(x.clone(), None)
        try:
            trial.differentiate(call, x, None, mixer=mixer)
        except RuntimeError as error:
            said = f"{paradigm}: {FRESH} tokens that are first read in inference mode cannot be trained: {error}"
            raise CheckFailure(said.partition(". ")[0]) from error


def _backward_twice(trial: Trial, paradigm: Paradigm, x: Tensor, state: Any) -> None:
    """Through the same graph, with gradients from above that are as they were afterwards."""
    parameters = {f"the gradient of {name}": parameter for name, parameter in learnable(trial.mixer).items()}
    leaves = {"the gradient of the input": x.detach().requires_grad_(), **parameters}
    results = named_results(*trial.call(paradigm)(leaves["the gradient of the input"], state))
    above = {f"the gradient from above of {name}": trial.like(y).contiguous() for name, y in results.items()}
    given, saved = dict(zip(results, above.values(), strict=True)), {name: g.clone() for name, g in above.items()}
    once, twice = (gradients(results, given, leaves, retain_graph=True) for _ in range(2))
    what = f"{paradigm}, backward through the same graph again against the first time"
    trial.compare(what, (twice, None), (once, None), 0)
    large = {name: LOSS_SCALE * gradient for name, gradient in given.items()}
    scaled = gradients(results, large, leaves, retain_graph=True)
    rescaled = {name: gradient / LOSS_SCALE for name, gradient in scaled.items()}
    trial.compare(f"{paradigm}, gradients of a scaled loss against the loss's", (rescaled, None), (once, None))
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    roots = [name for name, result in results.items() if result.requires_grad]
    wanted = [given[name] for name in roots]
    torch.autograd.backward([results[name] for name in roots], wanted, retain_graph=True)  # of init_state
    added = {name: parameter.grad for name, parameter in parameters.items() if parameter.grad is not None}
    for parameter in parameters.values():
        parameter.grad = None
    expected = {name: 1 + once[name] for name in added}
    what = f"{paradigm}, gradients added to ones against ones and gradients"
    trial.compare(what, (added, None), (expected, None), 1e-12)
    trial.compare(f"{paradigm}, after backward against before", (above, None), (saved, None), 0)


def _held(mixer: SequenceMixer[Any]) -> dict[str, object]:
    """What the attributes of a mixer's modules hold, by name, in containers and plain objects too."""
    values: dict[str, object] = {}
    seen: set[int] = set()

    def visit(name: str, value: object) -> None:
        if isinstance(value, Tensor | torch.Generator):
            values[name] = value.detach().clone() if isinstance(value, Tensor) else value.get_state()
        elif isinstance(value, PLAIN):
            values[name] = value
        elif id(value) not in seen:
            seen.add(id(value))
            children = _children(value)
            values[f"the length of {name}"] = len(children)
            for child, held in children.items():
                visit(f"{name}{child}", held)

    visit("the mixer", mixer)
    return values


def _children(value: object) -> dict[str, object]:
    if isinstance(value, Mapping):
        return {f"[{key!r}]": held for key, held in value.items()}
    if isinstance(value, list | tuple | deque):
        return {f"[{index}]": held for index, held in enumerate(value)}
    if isinstance(value, Set):
        return {f" has {key!r}": True for key in value}
    if isinstance(value, type | ModuleType | FunctionType):
        return {}
    return {f".{name}": held for name, held in getattr(value, "__dict__", {}).items()}


def _same(one: object, other: object) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        comparable = one.shape == other.shape and one.dtype == other.dtype
        return comparable and torch.equal(one.nan_to_num(), other.nan_to_num())
    return type(one) is type(other) and (one == other or repr(one) == repr(other) == "nan")
