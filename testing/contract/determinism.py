"""Checks of determinism: a result is a function of its arguments, and no call leaves anything for the next."""

from collections import deque
from collections.abc import Mapping, Set
from functools import partial
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor

from ...mixers.base.contract import SequenceMixer
from ...mixers.base.state import clone
from ...ops.runtime.paradigm import Paradigm
from ..check import check
from ..compare import CheckFailure, require
from ..gradients import gradients
from ..mixer.case import Draw
from ..mixer.trial import SegmentCall, Trial, learnable, named_results

LOSS_SCALE = 2.0**16
"""Factor that multiplies the loss in float16 training."""

FRESH = 13
"""Length of a segment, and size of a chunk, in tokens, that no other check uses: nothing is cached for it yet."""

PLAIN = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, type(None))
"""Types of attributes that are compared by ==."""


LONGER_THAN_CHUNKS = Draw(tokens=(1, 9), lists=((17,),), uses=("evaluation", "training"))


@check(use="repeated calls: one call changes what the next one gives", share=0.03, draw=LONGER_THAN_CHUNKS)
def results_are_deterministic(trial: Trial) -> None:
    """The same arguments give the same bits, forward and backward, also in a second backward pass through the same
    graph. A call draws no random numbers, and leaves nothing of its input in parameters, buffers, attributes or
    upstream gradients."""
    x, state, other = trial.tokens(), trial.state(), trial.tokens()
    # build before the generator's state is saved: building draws random numbers
    mixer, sampled = trial.mixer_in_use, trial.rebuilt()
    if trial.case.options or trial.case.use == "training":
        _train_after_sampling(trial)
    generator_state = torch.random.get_rng_state()
    tensors = dict(mixer.named_parameters()) | dict(mixer.named_buffers())
    saved = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    with torch.inference_mode():  # as when text is sampled between training steps
        for paradigm in trial.paradigms:
            for start in (None, state)[: 1 if state is None else 2]:
                trial.call(paradigm, sampled)(x.clone(), None if start is None else clone(start))
    for paradigm in trial.paradigms:
        try:
            after_sampling = trial.differentiate(trial.call(paradigm, sampled), x, state, mixer=sampled)
        except RuntimeError as error:
            message = f"{paradigm}: cannot be trained after a call in inference mode: {error}"
            raise CheckFailure(message.partition(". ")[0]) from error
        call = trial.used(paradigm)
        plain = trial.differentiate(trial.call(paradigm), x, state)
        trial.compare(f"{paradigm}, after a call in inference mode against before", after_sampling, plain, 0)
        first = plain if trial.case.use == "evaluation" else trial.differentiate(call, x, state, used=True)
        # the first call may cache what depends on sizes alone, such as a table of angles; later calls change nothing
        attributes = _collect_attributes(mixer)
        trial.differentiate(call, other, state, used=True)
        attributes_later = _collect_attributes(mixer)
        second = trial.differentiate(call, x, state, used=True)
        trial.compare(f"{paradigm}, a second call against the first", second, first, 0)
        # two calls before one backward pass, as in a loss of pairs or a layer that is used twice
        both = trial.differentiate(partial(_call_also_on, other, call), x, state, used=True)
        trial.compare(f"{paradigm}, with a call on other tokens before backward against without", both, first, 0)
        _backward_twice(trial, paradigm, x, state)
        for name in sorted(attributes.keys() | attributes_later.keys()):
            same = _same(attributes.get(name), attributes_later.get(name))
            sentence = f"{paradigm}: a call on as many other tokens changed {name}"
            require(same, f"{sentence}: a call must leave nothing behind in the module")
    unused = torch.equal(generator_state, torch.random.get_rng_state())
    require(unused, "a call drew random numbers from the global generator")
    later = {name: tensor.detach() for name, tensor in tensors.items()}
    trial.compare("parameters and buffers after the calls against before", (later, None), (saved, None), 0)


def _call_also_on(other: Tensor, call: SegmentCall, x: Tensor, state: Any) -> tuple[Tensor, Any]:
    """Call with x, then with other tokens; return the result of the first call."""
    state_for_other = None if state is None else clone(state)  # the first call may consume the state
    result = call(x, state)
    call(other, state_for_other)
    return result


def _train_after_sampling(trial: Trial) -> None:
    """Differentiate a call whose sizes were first met in inference mode: caches made there must work with autograd."""
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
            message = f"{paradigm}: {FRESH} tokens, first processed in inference mode, cannot be trained on: {error}"
            raise CheckFailure(message.partition(". ")[0]) from error


def _backward_twice(trial: Trial, paradigm: Paradigm, x: Tensor, state: Any) -> None:
    """Compare several backward passes through the same graph.

    All have to give the same gradients, also with a scaled loss and when they are added to existing ones. None may
    write into the upstream gradients.
    """
    parameters = {f"the gradient of {name}": parameter for name, parameter in learnable(trial.mixer).items()}
    leaves = {"the gradient of the input": x.detach().requires_grad_(), **parameters}
    results = named_results(*trial.call(paradigm)(leaves["the gradient of the input"], state))
    upstream = {name: trial.like(y).contiguous() for name, y in results.items()}
    saved = {f"the upstream gradient of {name}": gradient.clone() for name, gradient in upstream.items()}
    once, twice = (gradients(results, upstream, leaves, retain_graph=True) for _ in range(2))
    what = f"{paradigm}, backward through the same graph again against the first time"
    trial.compare(what, (twice, None), (once, None), 0)
    large = {name: LOSS_SCALE * gradient for name, gradient in upstream.items()}
    scaled = gradients(results, large, leaves, retain_graph=True)
    rescaled = {name: gradient / LOSS_SCALE for name, gradient in scaled.items()}
    trial.compare(f"{paradigm}, gradients of a scaled loss against those of the loss", (rescaled, None), (once, None))
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    roots = [name for name, result in results.items() if result.requires_grad]
    # retain the graph: that of a learned initial state is used again
    torch.autograd.backward([results[name] for name in roots], [upstream[name] for name in roots], retain_graph=True)
    accumulated = {name: parameter.grad for name, parameter in parameters.items() if parameter.grad is not None}
    for parameter in parameters.values():
        parameter.grad = None
    expected = {name: 1 + once[name] for name in accumulated}
    what = f"{paradigm}, gradients accumulated on ones against ones plus gradients"
    trial.compare(what, (accumulated, None), (expected, None), 1e-12)
    after = {f"the upstream gradient of {name}": gradient for name, gradient in upstream.items()}
    trial.compare(f"{paradigm}, after backward against before", (after, None), (saved, None), 0)


def _collect_attributes(mixer: SequenceMixer[Any]) -> dict[str, object]:
    """Return the values of all attributes of a mixer's modules by name, also within containers and plain objects."""
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
            for suffix, child in children.items():
                visit(f"{name}{suffix}", child)

    visit("the mixer", mixer)
    return values


def _children(value: object) -> dict[str, object]:
    """Return the items or attributes of an object by the Python that reads them, such as `[0]` or `.cache`."""
    if isinstance(value, Mapping):
        return {f"[{key!r}]": item for key, item in value.items()}
    if isinstance(value, list | tuple | deque):
        return {f"[{index}]": item for index, item in enumerate(value)}
    if isinstance(value, Set):
        return {f" has {key!r}": True for key in value}
    if isinstance(value, type | ModuleType | FunctionType):
        return {}
    return {f".{name}": attribute for name, attribute in getattr(value, "__dict__", {}).items()}


def _same(value: object, other: object) -> bool:
    """Return True if two values are equal; NaN equals NaN."""
    if isinstance(value, Tensor) and isinstance(other, Tensor):
        comparable = value.shape == other.shape and value.dtype == other.dtype
        return comparable and torch.equal(value.nan_to_num(), other.nan_to_num())
    return type(value) is type(other) and (value == other or repr(value) == repr(other) == "nan")
