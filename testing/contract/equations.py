"""The two equations of the contract, and causality.

f_p(x, s) = f_q(x, s)        f(x1 ++ x2, s) = y1 ++ f(x2, s1)   where (y1, s1) = f(x1, s)
"""

import copy
from functools import partial
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from ...mixers.base.contract import SequenceMixer
from ...mixers.base.state import clone, detach, select
from ...ops.runtime.paradigm import Paradigm
from ..check import check, chunked, differentiable, recurrent, several_paradigms, stateful
from ..compare import EXACT, require
from ..mixer.case import LENGTHS, USES, Draw
from ..mixer.options import chunk_sizes
from ..mixer.trial import Trial, named_results

RAGGED = 24
"""A chunk size that is not a power of two: code that splits chunks into blocks of 16 has a ragged last block."""

CANDIDATES = (*(2**n for n in range(12)), RAGGED)
"""Chunk sizes to try. Of those that the configuration accepts, the smallest, the largest and `RAGGED` are compared."""

MANY = 64
"""Number of other tokens to try if one seems to be ignored."""

AMPLIFIED = 8.0
"""Factor that enlarges every other one of the `MANY` tokens: a running maximum seldom notices small tokens."""

CUT_EVERYWHERE = 70
"""Length up to which a segment is cut at every token; a longer one is cut at `LENGTHS` alone."""

LARGE = 200.0
"""Scale of tokens at which scores reach tens of thousands: a mask of -10,000 hides nothing, and clamps take effect."""


@check(
    several_paradigms,
    use="training in one paradigm and decoding in another, which then compute different functions",
    remedy="leave the paradigm out of traits.paradigms, or declare traits.parallel_from_state=False",
    share=0.15,
    draw=Draw(tokens=(1, 11), long=8, uses=USES, scales=(1.0, 1.0, 1.0, LARGE), wide=10, options=True),
)
def paradigms_agree(trial: Trial) -> None:
    """Every paradigm gives the same output, final state and gradients (of input, state, parameters), from any state,
    also at lengths around the boundaries of blocks of up to 128 tokens."""
    x, state = trial.tokens(), trial.state()
    expected = trial.differentiate(trial.call(trial.reference), x, state)
    slack = None
    if trial.case.scale > 1:
        slack = trial.sensitivity(trial.call(trial.reference), x, state, expected)
        # if a softmax is saturated nothing moves, and large numbers still cancel
        slack = {name: distance + EXACT * trial.case.scale for name, distance in slack.items()}
    # if only the reference is under test, compare it with all other paradigms
    others = {*trial.paradigms} - {trial.reference} or trial.mixer.traits.paradigms - {trial.reference}
    for paradigm in sorted(others):
        actual = trial.differentiate(trial.used(paradigm), x, state, used=True)
        trial.compare(f"{paradigm} against {trial.reference}", actual, expected, slack=slack)
        # test every boundary within the longest segment: a prefix has the outputs that it has in the whole
        for length in sorted(LENGTHS)[:-1] if trial.case.length == max(LENGTHS) else ():
            part, _ = trial.mix(x[:, :length], state, paradigm=paradigm)
            what = f"{paradigm} on {length} tokens against {trial.reference} on more"
            trial.compare(what, (part, None), (expected[0]["the output"][:, :length], None))


@check(
    use="adapters (LoRA), quantised layers, hooks: a wrapped projection is bypassed in one paradigm or in training",
    share=0.02,
    draw=Draw(tokens=(4, 9)),
)
def wrapped_projections_count_in_every_paradigm(trial: Trial) -> None:
    """A change to each projection (`nn.Linear`, or `nn.Conv1d` of size 1) takes effect in all paradigms or in none: a
    forward hook, a forward pre-hook, or a module in its place, as adapters are. It also takes effect after calls
    without it, and in training mode without a final state. A projection whose weight attribute has 8 bits changes no
    dtype."""
    x, state = trial.tokens(), trial.state()
    with_hooks, with_pre_hooks = (copy.deepcopy(trial.without_dropout()) for _ in range(2))
    for hooked, pre_hooked in zip(with_hooks.modules(), with_pre_hooks.modules(), strict=True):
        if _is_projection(hooked):
            hooked.register_forward_hook(partial(_add_product, 0.3 * trial.like(hooked.weight)))
            pre_hooked.register_forward_pre_hook(lambda _, inputs: 2 * inputs[0])
    segments = {"": x, ", one token": x[:, :1]}
    for suffix, tokens in segments.items():
        what = f"with hooks before projections{suffix}"
        _require_same_in_every_paradigm(trial, with_pre_hooks, tokens, state, what)
    for suffix, tokens in segments.items():
        _require_same_in_every_paradigm(trial, with_hooks, tokens, state, f"with hooks on projections{suffix}")
    whole, _ = trial.mix(x, None, with_hooks, paradigm=trial.reference)
    for paradigm in trial.paradigms:
        y, _ = trial.call(paradigm, with_hooks.train(), return_state=False)(x, None)
        what = f"with hooks on projections, {paradigm} in training mode against {trial.reference} in evaluation"
        trial.compare(what, (y.detach(), None), (whole, None))
    replaced = with_hooks.eval()
    for name, module in [*replaced.named_modules()]:
        if _is_projection(module):
            parent, _, leaf = name.rpartition(".")
            setattr(replaced.get_submodule(parent), leaf, _Adapter(module, 0.3 * trial.like(module.weight)))
    for suffix, tokens in segments.items():
        _require_same_in_every_paradigm(trial, replaced, tokens, state, f"with projections replaced{suffix}")
    quantised = copy.deepcopy(trial.mixer)
    called = [name for name, module in replaced.named_modules() if isinstance(module, _Adapter) and module.called]
    for name, module in [*quantised.named_modules()]:
        if name in called and _is_projection(module):  # of the projections that it does not call, it reads the weight
            parent, _, leaf = name.rpartition(".")
            setattr(quantised.get_submodule(parent), leaf, _Quantised(module))
    for paradigm in trial.paradigms:
        expected, actual = (trial.mix(x, state, mixer, paradigm=paradigm) for mixer in (None, quantised))
        trial.compare(f"{paradigm}, with projections whose weight attribute is int8 against without", actual, expected)


def _is_projection(module: nn.Module) -> TypeGuard[nn.Linear | nn.Conv1d]:
    """Return True for a linear layer, or a convolution that is one: kernel size 1 and one group."""
    pointwise = isinstance(module, nn.Conv1d) and module.kernel_size == (1,) and module.groups == 1
    return pointwise or isinstance(module, nn.Linear)


def _require_same_in_every_paradigm(trial: Trial, mixer: SequenceMixer, x: Tensor, state: Any, what: str) -> None:
    """Fail unless all paradigms of a mixer, and steps, give the same output and final state."""
    expected = trial.mix(x, state, mixer, paradigm=trial.reference)
    for paradigm in sorted(trial.mixer.traits.paradigms - {trial.reference}):
        actual = trial.mix(x, state, mixer, paradigm=paradigm)
        trial.compare(f"{what}, {paradigm} against {trial.reference}", actual, expected)
    if trial.mixer.traits.has_state and Paradigm.RECURRENT in trial.mixer.traits.paradigms:
        start = trial.mixer.init_state(len(x)) if state is None else clone(state)
        stepped = trial.decode(x, start, mixer.step)
        trial.compare(f"{what}, steps against {trial.reference}", stepped, expected)


class _Adapter(nn.Module):
    """A module in the place of a projection, as LoRA's: it adds to the output and forwards attributes."""

    def __init__(self, base: nn.Module, weight: Tensor) -> None:
        super().__init__()
        self.base, self.hook, self.called = base, partial(_add_product, weight), False

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    def forward(self, x: Tensor) -> Tensor:
        self.called = True
        return self.hook(self, (x,), self.base(x))


class _Quantised(_Adapter):
    """A module in the place of a projection that computes the same, and whose `weight` attribute has 8 bits."""

    def __init__(self, base: nn.Linear | nn.Conv1d) -> None:
        super().__init__(base, base.weight)
        self.weight, self.dtype = base.weight.detach().to(torch.int8), base.weight.dtype

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x.to(self.dtype))


def _add_product(weight: Tensor, module: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> Tensor:  # noqa: ARG001
    """Add another weight's product to a projection's output; with `weight` bound by `partial`, it is a forward hook."""
    product = nn.functional.linear if weight.ndim == 2 else nn.functional.conv1d
    return y + product(inputs[0], weight.to(y))


@check(
    stateful,
    use="prefill in pieces, and decoding after a prompt",
    share=0.32,
    draw=Draw(pieces=(2, 4), tokens=(1, 6), long=12, batch_size=(1, 2), paradigms=True),
)
def pieces_equal_the_whole(trial: Trial) -> None:
    """A segment processed at once equals its pieces in order, each in any paradigm, from any state. Tokens that are
    all zeros count like others."""
    x, state = trial.tokens(blank=trial.case.seed % 3 == 2), trial.state()
    whole = trial.mix(x, state, paradigm=trial.reference)
    pieces = [partial(trial.mix, paradigm=paradigm) for paradigm in trial.case.paradigms]
    trial.compare("pieces against the whole", trial.in_pieces(*pieces)(x, state), whole)


@check(
    differentiable,
    stateful,
    use="training on long sequences piece by piece",
    share=0.04,
    draw=Draw(
        pieces=(2, 3),
        tokens=(1, 5),
        long=7,
        longest=33,
        batch_size=(1, 2),
        paradigms=True,
        uses=("evaluation", "truncated"),
    ),
)
def gradients_flow_through_states(trial: Trial) -> None:
    """Backpropagation through a chain of states equals backpropagation through the whole segment, also from the last
    piece alone. A detached state stops it."""
    x, state, lengths = trial.tokens(), trial.state(), trial.case.lengths
    calls, whole = [*map(trial.used, trial.case.paradigms)], trial.call(trial.reference)

    actual = trial.differentiate(trial.in_pieces(*calls), x, state, used=True)
    expected = trial.differentiate(whole, x, state)
    trial.compare("backpropagation through pieces against the whole", actual, expected)

    def last_piece(x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Return the output of the last piece: earlier pieces get gradients through their final state alone."""
        *before, last = zip(x.split(lengths, dim=1), calls, strict=True)
        for piece, call in before:
            _, state = call(piece, state)
        return last[1](last[0], state)[0], None

    actual = trial.differentiate(last_piece, x, state, used=True)
    expected = trial.differentiate(lambda x, state: (whole(x, state)[0][:, -lengths[-1] :], None), x, state)
    trial.compare("backpropagation from the last piece alone against the whole", actual, expected)

    # truncated backpropagation: the last piece, from the detached state after the first ones
    first, last = trial.used(), trial.used(trial.case.paradigms[-1])
    head, tail = x.split([trial.case.length - lengths[-1], lengths[-1]], dim=1)

    def truncated(x, state):
        _, between = first(head, state)
        return last(x, detach(between))

    _, between = trial.mix(head, state)
    actual = trial.differentiate(truncated, tail, state, used=True)
    expected = trial.differentiate(lambda x, _: whole(x, between), tail, state)
    trial.compare("truncated backpropagation against the last piece alone", actual, expected)


@check(
    stateful,
    recurrent,
    use="decoding: the model generates other text than it was trained for",
    share=0.08,
    draw=Draw(tokens=(1, 8), long=4, batch_size=(1, 2), wide=10, options=True),
)
def steps_equal_the_whole(trial: Trial) -> None:
    """Decoding token by token, in place if the state allows it, gives the same as the whole segment."""
    x, state = trial.tokens(blank=trial.case.seed % 3 == 2), trial.state()
    # a step requires a state, so None becomes the initial one
    start = trial.mixer.init_state(trial.case.batch_size) if state is None else clone(state)
    with torch.inference_mode(trial.case.seed % 2 == 1):
        stepped = trial.decode(x, start)
    for paradigm in trial.paradigms:
        trial.compare(f"steps against {paradigm}", stepped, trial.mix(x, state, paradigm=paradigm))
    if trial.mixer.traits.state == "growing":  # with room to spare, steps write in place
        y, _ = trial.decode(x, trial.mixer.init_state(trial.case.batch_size, max_length=trial.case.length))
        trial.compare("steps from a state with room against the whole", (y, None), (trial.mix(x, None)[0], None))


@check(
    use="training: tokens see the future, so the loss is too low",
    share=0.06,
    draw=Draw(tokens=(2, 12), long=3, batch_size=(1, 2), scales=(1.0, 2 * LARGE)),
)
def the_future_changes_nothing(trial: Trial) -> None:
    """The output at a token depends neither on later tokens nor on their number. Every token has an effect, on its own
    output or later."""
    x, state, other = trial.tokens(), trial.state(), trial.tokens()
    options: dict[str, Any] = {"return_state": trial.case.seed % 2 == 0 and trial.mixer.traits.has_state}
    # cut before every token but the first; in a long segment, only around the boundaries of blocks
    cuts = [cut for cut in range(1, trial.case.length) if trial.case.length <= CUT_EVERYWHERE or cut in LENGTHS]
    indices = trial.index(*range(len(x))).repeat(len(cuts))
    states = None if state is None else select(state, indices)
    for paradigm in trial.paradigms:
        later = torch.arange(trial.case.length, device=x.device) >= torch.tensor(cuts, device=x.device)[:, None]
        mixed = torch.where(later[:, None, :, None], other, x).flatten(0, 1)
        if trial.case.scale == 1:
            whole, _ = trial.mix(x, state, paradigm=paradigm, **options)
            for cut in {cuts[0], cuts[-1]}:
                alone, _ = trial.mix(x[:, :cut], state, paradigm=paradigm, **options)
                what = f"{paradigm}, a segment of {cut} tokens against the first {cut} of {x.shape[1]}"
                trial.compare(what, (alone, None), (whole[:, :cut], None))
        # both batches have the same size: with another number of rows, results may be rounded differently
        y, _ = trial.mix(x[indices], states, paradigm=paradigm, **options)
        y_mixed, _ = trial.mix(mixed, states, paradigm=paradigm, **options)
        for cut, unchanged, changed in zip(cuts, y.split(len(x)), y_mixed.split(len(x)), strict=True):
            what = f"{paradigm}, other tokens from step {cut} on"
            # the rounding of a block is relative to its largest numbers
            slack = {"the output before them": 1e-9 * unchanged.abs().max().item()} if trial.case.scale > 1 else None
            with trial.differences(what, 1e-12, slack) as differences:
                differences.tensor("the output before them", changed[:, :cut], unchanged[:, :cut], "BTD")
            has_effect = (unchanged[:, cut] != changed[:, cut]).any() or _has_effect(trial, x, state, cut, paradigm)
            has_effect = has_effect or trial.case.scale > 1  # with large scores, a softmax may attend to one token
            require(has_effect, f"{paradigm}: the token at step {cut} has no effect, there or later")


def _has_effect(trial: Trial, x: Tensor, state: Any, cut: int, paradigm: Paradigm) -> bool:
    """Return True if one of many other tokens at a step changes an output or the final state.

    A single token may change nothing, because a gate is closed for it.
    """
    indices = trial.index(*[0] * MANY)
    others = x[indices].clone()
    others[:, cut] = trial.tokens(MANY, 1)[:, 0]
    others[::2, cut] *= AMPLIFIED
    y, after = trial.mix(others, None if state is None else select(state, indices), paradigm=paradigm)
    return any(((leaf - leaf[:1]).abs() > EXACT).any() for leaf in named_results(y, after).values())


@check(
    chunked,
    use="chunk_size: it changes the model, not only its cost",
    share=0.05,
    draw=Draw(tokens=(1, 12), long=4, batch_size=(1, 2)),
)
def chunk_size_changes_nothing(trial: Trial) -> None:
    """Output and final state do not depend on `chunk_size`."""
    x, state, current = trial.tokens(), trial.state(), trial.config.model_dump()["chunk_size"]
    accepted = chunk_sizes(
        trial.config, lambda size: trial.subject.accepts({**trial.case.options, **size}), candidates=CANDIDATES
    )
    others = sorted(size for size in accepted if size != current)
    # small chunks have boundaries within a short segment; the largest chunk has none in most segments
    rebuilt = {size: trial.rebuilt(chunk_size=size) for size in {*others[:1], *others[-1:], *({RAGGED} & {*others})}}
    for paradigm in trial.paradigms:
        expected = trial.mix(x, state, paradigm=paradigm)
        for size, mixer in rebuilt.items():
            actual = trial.mix(x, state, mixer, paradigm=paradigm)
            trial.compare(f"{paradigm}, chunk_size {size} against {current}", actual, expected)
