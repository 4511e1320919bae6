"""The two equations of the contract, and causality.

f_p(x, s) = f_q(x, s)        f(x1 ++ x2, s) = y1 ++ f(x2, s1)   where (y1, s1) = f(x1, s)
"""

import copy
from functools import partial
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from ...mixers.contract import SequenceMixer
from ...mixers.state import clone, detach, select
from ...ops.runtime.paradigm import Paradigm
from ..check import check, chunked, differentiable, recurrent, several_paradigms, stateful
from ..compare import EXACT, require
from ..mixer.case import LENGTHS, USES, Draw
from ..mixer.options import chunk_sizes
from ..mixer.trial import Trial, named_results

RAGGED = 24
"""A chunk that is no power of two: what handles it in blocks of 16 has a ragged one."""

CANDIDATES = (*(2**n for n in range(12)), RAGGED)
"""Chunk sizes that a configuration may take; the smallest, the largest and this one are compared."""

MANY = 64
"""Tokens tried where one seems to be ignored."""

LOUD = 8.0
"""How much larger half of those are: what keeps the largest it has read notes others rarely."""

EVERY = 70
"""Tokens up to which a segment is cut at every one."""

LARGE = 200.0
"""A scale at which scores are tens of thousands: a mask of -10,000 hides nothing, and what is clamped is clamped."""


@check(
    several_paradigms,
    use="training in one paradigm and decoding in another: the model is another",
    remedy="leave the paradigm out of traits.paradigms, or declare traits.parallel_from_state=False",
    share=0.25,
    draw=Draw(tokens=(1, 11), long=8, uses=USES, scales=(1.0, 1.0, 1.0, LARGE), wide=10, options=True),
)
def paradigms_agree(trial: Trial) -> None:
    """Every paradigm gives the same output, final state and gradients (of input, state, parameters), from any state, at
    lengths around the boundaries of blocks of up to 128 tokens too."""
    x, state = trial.tokens(), trial.state()
    expected = trial.differentiate(trial.call(trial.reference), x, state)
    slack = None
    if trial.case.scale > 1:
        slack = trial.sensitivity(trial.call(trial.reference), x, state, expected)
        # where a softmax is saturated nothing moves, and large numbers still cancel
        slack = {name: far + EXACT * trial.case.scale for name, far in slack.items()}
    # where the reference alone is asked for, it is compared with all others
    others = {*trial.paradigms} - {trial.reference} or trial.mixer.traits.paradigms - {trial.reference}
    for paradigm in sorted(others):
        actual = trial.differentiate(trial.used(paradigm), x, state, used=True)
        trial.compare(f"{paradigm} against {trial.reference}", actual, expected, slack=slack)
        # every boundary in the longest segment counts: an output depends on no later token, so a part gives the whole's
        for length in sorted(LENGTHS)[:-1] if trial.case.length == max(LENGTHS) else ():
            part, _ = trial.mix(x[:, :length], state, paradigm=paradigm)
            what = f"{paradigm} on {length} tokens against {trial.reference} on more"
            trial.compare(what, (part, None), (expected[0]["the output"][:, :length], None))


@check(
    use="adapters (LoRA), quantised layers and hooks: a wrapped projection is bypassed in one paradigm, or in training",
    share=0.04,
    draw=Draw(tokens=(4, 9)),
)
def wrapped_projections_count_in_every_paradigm(trial: Trial) -> None:
    """What is added to the outputs of each `nn.Linear`, or `nn.Conv1d` of size 1, by a hook or by a module in its place
    as adapters are, counts in every paradigm, or in none, after calls without it too, and so does what a hook before it
    makes of its inputs; and so it does where training mode wants no state. A weight of 8 bits changes no dtype."""
    x, state = trial.tokens(), trial.state()
    mixer, before = (copy.deepcopy(trial.without_dropout()) for _ in range(2))
    for module, other in zip(mixer.modules(), before.modules(), strict=True):
        if _is_projection(module):
            module.register_forward_hook(partial(_added, 0.3 * trial.like(module.weight)))
            other.register_forward_pre_hook(lambda _, given: 2 * given[0])
    reads = {"": x, ", one token": x[:, :1]}
    for read, tokens in reads.items():
        _same_in_every_paradigm(trial, before, tokens, state, f"with hooks before projections{read}")
    for read, tokens in reads.items():
        _same_in_every_paradigm(trial, mixer, tokens, state, f"with hooks on projections{read}")
    whole, _ = trial.mix(x, None, mixer, paradigm=trial.reference)
    for paradigm in trial.paradigms:
        y, _ = trial.call(paradigm, mixer.train(), return_state=False)(x, None)
        what = f"with hooks on projections, {paradigm} in training mode against {trial.reference} in evaluation"
        trial.compare(what, (y.detach(), None), (whole, None))
    for name, module in [*mixer.eval().named_modules()]:
        if _is_projection(module):
            parent, _, leaf = name.rpartition(".")
            setattr(mixer.get_submodule(parent), leaf, _Replaced(module, 0.3 * trial.like(module.weight)))
    for read, tokens in reads.items():
        _same_in_every_paradigm(trial, mixer, tokens, state, f"with projections replaced{read}")
    quantised = copy.deepcopy(trial.mixer)
    called = [name for name, module in mixer.named_modules() if isinstance(module, _Replaced) and module.called]
    for name, module in [*quantised.named_modules()]:
        if name in called and _is_projection(module):  # others are read and not called
            parent, _, leaf = name.rpartition(".")
            setattr(quantised.get_submodule(parent), leaf, _Quantised(module))
    for paradigm in trial.paradigms:
        expected, actual = (trial.mix(x, state, each, paradigm=paradigm) for each in (None, quantised))
        trial.compare(f"{paradigm}, with projections whose weight attribute is int8 against without", actual, expected)


def _is_projection(module: nn.Module) -> TypeGuard[nn.Linear | nn.Conv1d]:
    of_one = isinstance(module, nn.Conv1d) and module.kernel_size == (1,) and module.groups == 1
    return of_one or isinstance(module, nn.Linear)


def _same_in_every_paradigm(trial: Trial, mixer: SequenceMixer, x: Tensor, state: Any, what: str) -> None:
    expected = trial.mix(x, state, mixer, paradigm=trial.reference)
    for paradigm in sorted(trial.mixer.traits.paradigms - {trial.reference}):
        actual = trial.mix(x, state, mixer, paradigm=paradigm)
        trial.compare(f"{what}, {paradigm} against {trial.reference}", actual, expected)
    if trial.mixer.traits.has_state and Paradigm.RECURRENT in trial.mixer.traits.paradigms:
        given = trial.mixer.init_state(len(x)) if state is None else clone(state)
        stepped = trial.decode(x, given, mixer.step)
        trial.compare(f"{what}, steps against {trial.reference}", stepped, expected)


class _Replaced(nn.Module):
    """A module in a projection's place that adds to its outputs, and has its attributes."""

    def __init__(self, base: nn.Module, weight: Tensor) -> None:
        super().__init__()
        self.base, self.added, self.called = base, partial(_added, weight), False

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    def forward(self, x: Tensor) -> Tensor:
        self.called = True
        return self.added(self, (x,), self.base(x))


class _Quantised(_Replaced):
    """One that computes what the projection does, of any dtype, and whose weight has 8 bits."""

    def __init__(self, base: nn.Linear | nn.Conv1d) -> None:
        super().__init__(base, base.weight)
        self.weight, self.dtype = base.weight.detach().to(torch.int8), base.weight.dtype

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x.to(self.dtype))


def _added(weight: Tensor, module: nn.Module, given: tuple[Tensor, ...], y: Tensor) -> Tensor:  # noqa: ARG001
    """What an adapter makes of a projection's output: torch's signature of a hook, after its own weight."""
    product = nn.functional.linear if weight.ndim == 2 else nn.functional.conv1d
    return y + product(given[0], weight.to(y))


@check(
    stateful,
    use="prefill in pieces, and decoding after a prompt",
    share=0.32,
    draw=Draw(pieces=(2, 4), tokens=(1, 6), long=12, batch_size=(1, 2), paradigms=True),
)
def pieces_equal_the_whole(trial: Trial) -> None:
    """A segment at once equals its pieces in order, each in any paradigm, from any state; tokens of zeros count."""
    x, state = trial.tokens(blank=trial.case.seed % 3 == 2), trial.state()
    whole = trial.mix(x, state, paradigm=trial.reference)
    pieces = [partial(trial.mix, paradigm=paradigm) for paradigm in trial.case.paradigms]
    trial.compare("pieces against the whole", trial.in_pieces(*pieces)(x, state), whole)


@check(
    differentiable,
    stateful,
    use="training on long sequences piece by piece",
    share=0.06,
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
    """Backpropagation through a chain of states equals that through the whole, from the last piece alone too, and a
    detached state ends it."""
    x, state, lengths = trial.tokens(), trial.state(), trial.case.lengths
    calls, whole = [*map(trial.used, trial.case.paradigms)], trial.call(trial.reference)

    actual = trial.differentiate(trial.in_pieces(*calls), x, state, used=True)
    expected = trial.differentiate(whole, x, state)
    trial.compare("backpropagation through pieces against the whole", actual, expected)

    def last_piece(x: Tensor, given: Any) -> tuple[Tensor, Any]:
        """No output of the first ones is read: a state alone has gradients from above."""
        *before, last = zip(x.split(lengths, dim=1), calls, strict=True)
        for piece, call in before:
            _, given = call(piece, given)
        return last[1](last[0], given)[0], None

    actual = trial.differentiate(last_piece, x, state, used=True)
    expected = trial.differentiate(lambda x, given: (whole(x, given)[0][:, -lengths[-1] :], None), x, state)
    trial.compare("backpropagation from the last piece alone against the whole", actual, expected)

    # truncated: the last piece, from the state that the first ones left
    first, last = trial.used(), trial.used(trial.case.paradigms[-1])
    head, tail = x.split([trial.case.length - lengths[-1], lengths[-1]], dim=1)

    def truncated(x, given):
        _, between = first(head, given)
        return last(x, detach(between))

    _, between = trial.mix(head, state)
    actual = trial.differentiate(truncated, tail, state, used=True)
    expected = trial.differentiate(lambda x, _: whole(x, between), tail, state)
    trial.compare("truncated backpropagation against the last piece alone", actual, expected)


@check(
    stateful,
    recurrent,
    use="decoding: it gives another text than the model was trained for",
    share=0.08,
    draw=Draw(tokens=(1, 8), long=4, batch_size=(1, 2), wide=10, options=True),
)
def steps_equal_the_whole(trial: Trial) -> None:
    """Decoding token by token, in place where a state allows it, gives what the whole segment gives."""
    x, state = trial.tokens(blank=trial.case.seed % 3 == 2), trial.state()
    # a step needs a state
    given = trial.mixer.init_state(trial.case.batch_size) if state is None else clone(state)
    with torch.inference_mode(trial.case.seed % 2 == 1):
        stepped = trial.decode(x, given)
    for paradigm in trial.paradigms:
        trial.compare(f"steps against {paradigm}", stepped, trial.mix(x, state, paradigm=paradigm))
    if trial.mixer.traits.state == "growing":  # with room, what is written in place
        y, _ = trial.decode(x, trial.mixer.init_state(trial.case.batch_size, max_length=trial.case.length))
        trial.compare("steps from a state with room against the whole", (y, None), (trial.mix(x, None)[0], None))


@check(
    use="training: tokens see the future, so that the loss is too low",
    share=0.1,
    draw=Draw(tokens=(2, 12), long=3, batch_size=(1, 2), scales=(1.0, 2 * LARGE)),
)
def the_future_changes_nothing(trial: Trial) -> None:
    """The output at a token depends on no later token, nor on how many there are, and the token is read, there or
    later."""
    x, state, other, wanted = trial.tokens(), trial.state(), trial.tokens(), trial.case.seed % 2 == 0
    options: dict[str, Any] = {"return_state": wanted and trial.mixer.traits.has_state}
    # of every token but the first, and of a long segment around the boundaries of blocks
    cuts = [cut for cut in range(1, trial.case.length) if trial.case.length <= EVERY or cut in LENGTHS]
    copies = trial.index(*range(len(x))).repeat(len(cuts))
    given = None if state is None else select(state, copies)
    for paradigm in trial.paradigms:
        later = torch.arange(trial.case.length, device=x.device) >= torch.tensor(cuts, device=x.device)[:, None]
        mixed = torch.where(later[:, None, :, None], other, x).flatten(0, 1)
        if trial.case.scale == 1:
            whole, _ = trial.mix(x, state, paradigm=paradigm, **options)
            for cut in {cuts[0], cuts[-1]}:
                alone, _ = trial.mix(x[:, :cut], state, paradigm=paradigm, **options)
                what = f"{paradigm}, {cut} tokens by themselves against the first {cut} of {x.shape[1]}"
                trial.compare(what, (alone, None), (whole[:, :cut], None))
        # batches of one size: another number of rows may be rounded in another way
        y, _ = trial.mix(x[copies], given, paradigm=paradigm, **options)
        y_other, _ = trial.mix(mixed, given, paradigm=paradigm, **options)
        for cut, as_given, changed_later in zip(cuts, y.split(len(x)), y_other.split(len(x)), strict=True):
            what = f"{paradigm}, other tokens from step {cut} on"
            # of large numbers blocks are rounded as those are
            slack = {"the output before them": 1e-9 * as_given.abs().max().item()} if trial.case.scale > 1 else None
            with trial.differences(what, 1e-12, slack) as differences:
                differences.tensor("the output before them", changed_later[:, :cut], as_given[:, :cut], "BTD")
            reads = (as_given[:, cut] != changed_later[:, cut]).any() or _is_read(trial, x, state, cut, paradigm)
            reads = reads or trial.case.scale > 1  # of large numbers, a softmax may see one token alone
            require(reads, f"{paradigm}: the token at step {cut} is ignored, there and later")


def _is_read(trial: Trial, x: Tensor, state: Any, cut: int, paradigm: Paradigm) -> bool:
    """True if any of many tokens at a step, as a gate may be shut for most, changes an output or the final state."""
    copies = trial.index(*[0] * MANY)
    others = x[copies].clone()
    others[:, cut] = trial.tokens(MANY, 1)[:, 0]
    others[::2, cut] *= LOUD
    y, after = trial.mix(others, None if state is None else select(state, copies), paradigm=paradigm)
    return any(((leaf - leaf[:1]).abs() > EXACT).any() for leaf in named_results(y, after).values())


@check(
    chunked,
    use="chunk_size: it changes the model, not its cost",
    share=0.09,
    draw=Draw(tokens=(1, 12), long=4, batch_size=(1, 2)),
)
def chunk_size_changes_nothing(trial: Trial) -> None:
    """Output and final state do not depend on chunk_size."""
    x, state, own = trial.tokens(), trial.state(), trial.config.model_dump()["chunk_size"]
    accepted = chunk_sizes(
        trial.config, lambda size: trial.subject.accepts({**trial.case.options, **size}), candidates=CANDIDATES
    )
    others = sorted(size for size in accepted if size != own)
    # small ones have boundaries in a short segment, and the largest has none in most
    rebuilt = {size: trial.rebuilt(chunk_size=size) for size in {*others[:1], *others[-1:], *({RAGGED} & {*others})}}
    for paradigm in trial.paradigms:
        expected = trial.mix(x, state, paradigm=paradigm)
        for size, mixer in rebuilt.items():
            actual = trial.mix(x, state, mixer, paradigm=paradigm)
            trial.compare(f"{paradigm}, chunk_size {size} against {own}", actual, expected)
