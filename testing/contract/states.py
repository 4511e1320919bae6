"""A state is a value: it can be saved, batched, split, reordered and used again."""

from functools import partial
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from ...mixers.state import clone, concatenate, from_dict, map_state, nbytes, select, to_dict
from ...ops.runtime.paradigm import Paradigm
from ...registry import SeqmixError
from ..check import check, constant, declares, differentiable, stateful
from ..compare import require
from ..mixer.case import Draw
from ..mixer.trial import Trial, as_leaves, float_leaves, learnable, leaves_of, named_results

STEPS = 3
"""Steps after which a state that a step gave has to be as it was."""

DEEP, GROWN = 12, 40
"""Layers of a model, and tokens after which a state has grown."""


@check(
    stateful,
    use="the start of a text: it depends on how the state was made",
    remedy="a learned beginning is what init_state returns, with its graph",
    share=0.04,
    draw=Draw(tokens=(1, 8), starts=("none",)),
)
def the_initial_state_is_nothing_read(trial: Trial) -> None:
    """No state, `init_state` and a state allocated for `max_length` tokens are the same beginning; where it is learned,
    gradients reach it from either."""
    x, following = trial.tokens(), trial.tokens(length=1)
    batch_size, length = trial.case.batch_size, trial.case.length
    for paradigm in trial.paradigms:
        nothing = trial.mix(x, None, paradigm=paradigm)
        initial = trial.mix(x, trial.mixer.init_state(batch_size), paradigm=paradigm)
        trial.compare(f"{paradigm}, init_state() against no state", initial, nothing)
        call = trial.call(paradigm)
        learned, unsaid = (
            trial.differentiate(lambda x, _, call=call, start=start: call(x, start()), x, None)
            for start in (partial(trial.mixer.init_state, batch_size), lambda: None)
        )
        trial.compare(f"{paradigm}, gradients from init_state() against no state", learned, unsaid)
        y, allocated = trial.mix(x, trial.mixer.init_state(batch_size, max_length=length + 1), paradigm=paradigm)
        with trial.differences(f"{paradigm}, init_state(max_length={length + 1}) against no state") as differences:
            differences.tensor("the output", y, nothing[0], "BTD")
            later = trial.mix(following, nothing[1], paradigm=paradigm)[0]
            differences.tensor("the output later", trial.mix(following, allocated, paradigm=paradigm)[0], later, "BTD")
        with torch.no_grad():
            unwanted = trial.mixer(x, paradigm=paradigm)
        trial.compare(f"{paradigm}, return_state=False", unwanted, (nothing[0], None))
        _more_than_there_is_room_for(trial, paradigm, x)


def _more_than_there_is_room_for(trial: Trial, paradigm: Paradigm, x: Tensor) -> None:
    """Where no state is wanted, more tokens than one was allocated for give what they always do, or are refused."""
    batch_size, room = x.shape[:2]
    more = torch.cat((x, trial.tokens(length=3)), dim=1)
    whole = trial.mix(more, None, paradigm=paradigm)[0]
    for read in sorted({0, room // 2}):
        state = trial.mixer.init_state(batch_size, max_length=room)
        if read:
            _, state = trial.mix(more[:, :read], state, paradigm=paradigm)
        try:
            with torch.no_grad():
                y, _ = trial.mixer(more[:, read:], state, paradigm=trial.after(paradigm))
        except (SeqmixError, RuntimeError):  # asserted on the device
            continue
        what = f"{paradigm}, {more.shape[1]} tokens, {read} of them read before, with room for {room} in the state"
        trial.compare(what, (y, None), (whole[:, read:], None))


@check(
    stateful,
    use="beam search and batched decoding: rows of a state are mixed up",
    share=0.07,
    draw=Draw(tokens=(1, 6), batch_size=(1, 4), rows=True),
)
def rows_of_a_state_can_be_rearranged(trial: Trial) -> None:
    """A state's rows, chosen, repeated and reordered (beams), split or joined, go on as those sequences would; so do
    those that are written into the tensors of a state that was read (a slot of a server)."""
    x, state, rows = trial.tokens(), trial.state(), trial.case.rows
    # a row that is taken twice goes on in two ways, by one token as in a search, or seldom by several
    following = trial.tokens(len(rows), 1 + 2 * (trial.case.seed % (4 if len({*rows}) < len(rows) else 2) == 1))
    for paradigm in trial.paradigms:
        _, before = trial.mix(x, state, paradigm=paradigm)
        parts = [select(before, trial.index(row)) for row in rows]
        alone = [trial.mix(y, part, paradigm=paradigm) for y, part in zip(following.split(1), parts, strict=True)]
        expected = (torch.cat([y for y, _ in alone]), concatenate([after for _, after in alone]))
        chosen = trial.mix(following, select(before, trial.index(*rows)), paradigm=paradigm)
        trial.compare(f"{paradigm}, rows {list(rows)} of a state", chosen, expected)
        joined = trial.mix(following, concatenate(parts), paradigm=paradigm)
        trial.compare(f"{paradigm}, rows {list(rows)} split and joined", joined, expected)
        slots = clone(select(before, trial.index(*rows[::-1])))
        with torch.no_grad():
            trial.call(paradigm)(following, slots)
            for slot, leaf in zip(leaves_of(slots).values(), leaves_of(concatenate(parts)).values(), strict=True):
                slot.copy_(leaf)
            refilled = trial.call(paradigm)(following, slots)
        trial.compare(f"{paradigm}, rows {list(rows)} in the tensors of a state that was read", refilled, expected)


@check(
    stateful, use="saved prompts: text goes on in another way", share=0.04, draw=Draw(tokens=(1, 6), batch_size=(1, 2))
)
def a_state_survives_the_disk(trial: Trial) -> None:
    """A state saved as safetensors and loaded goes on bit for bit as it would have; so it does with other room."""
    x, following, state = trial.tokens(), trial.tokens(length=2), trial.state()
    for paradigm in trial.paradigms:
        _, before = trial.mix(x, state, paradigm=paradigm)
        leaves = {name: leaf.to(trial.subject.device) for name, leaf in load(save(to_dict(before))).items()}
        loaded = from_dict(trial.mixer.init_state(trial.case.batch_size), leaves)
        # as it lies in memory there: where strides of a single row are others, torch may round in another way
        placed = map_state(lambda leaf: leaf.new_empty(leaf.shape).copy_(leaf), before)
        expected = trial.mix(following, placed, paradigm=paradigm)
        actual = trial.mix(following, loaded, paradigm=paradigm)
        trial.compare(f"{paradigm}, from a loaded state", actual, expected, tolerance=0)
        _in_other_room(trial, paradigm, x, following)


def _in_other_room(trial: Trial, paradigm: Paradigm, x: Tensor, following: Tensor) -> None:
    """A state allocated for some tokens, without the room to spare, and with more of it."""
    (batch_size, length), more = x.shape[:2], following.shape[1]
    _, allocated = trial.mix(x, trial.mixer.init_state(batch_size, max_length=length + 1), paradigm=paradigm)
    expected = trial.mix(following, trial.mix(x, None, paradigm=paradigm)[1], paradigm=paradigm)[0]
    least = trial.mixer.resize_state(clone(allocated), None)
    for room, state in {"the least": least, f"{length + more}": trial.mixer.resize_state(least, length + more)}.items():
        output = trial.mix(following, state, paradigm=paradigm)[0]
        trial.compare(f"{paradigm}, from a state with room for {room} tokens", (output, None), (expected, None))
    with trial.differences(
        f"{paradigm}, a state without room to spare, and given some and none again", 0
    ) as differences:
        differences.state(
            "the state", trial.mixer.resize_state(trial.mixer.resize_state(least, length + more), None), least
        )


@check(
    differentiable,
    stateful,
    use="truncated backpropagation, and prompts that are used again",
    share=0.08,
    draw=Draw(tokens=(1, 5), batch_size=(1, 2), starts=("initial", "read", "moved")),
)
def a_state_is_never_written_under_grad(trial: Trial) -> None:
    """Under autograd a state given keeps its values; without, a clone of it gives the same again."""
    x, given = trial.tokens(), trial.state()
    states = [given, as_leaves(given)]
    if trial.mixer.traits.state == "growing":
        roomy = trial.mixer.init_state(trial.case.batch_size, max_length=2 * trial.case.length)
        states.append(trial.mix(trial.tokens(), roomy)[1])
    for paradigm in trial.paradigms:
        for state in states:
            before, versions = clone(state), [leaf._version for leaf in leaves_of(state).values()]
            y, after = trial.call(paradigm)(x, state)
            total = torch.stack([result.double().sum() for result in named_results(y, after).values()]).sum()
            roots = [*learnable(trial.mixer).values(), *(s for s in float_leaves(state).values() if s.requires_grad)]
            if roots and total.requires_grad:
                torch.autograd.grad(total, roots, allow_unused=True, retain_graph=True)  # of init_state
            with trial.differences(f"{paradigm}, a state after it was given, against before", 0) as differences:
                differences.state("the state", state, before)
            same = [leaf._version for leaf in leaves_of(state).values()] == versions
            require(same, f"{paradigm}: a state was written in place, if only with its own values")
        # consumed or not, its clone is as good as it was
        first, second = (trial.mix(x, given, paradigm=paradigm) for _ in range(2))
        trial.compare(f"{paradigm}, the second of two clones of a state", second, first, tolerance=0)


@check(
    constant,
    declares("size", "A state that grows or not"),
    use="prompts that are used again: the shared state is another after the first answer",
    share=0.04,
    draw=Draw(tokens=(1, 5), lists=((1,), (70,)), batch_size=(1, 2), starts=("initial", "read", "moved")),
)
def a_constant_state_is_never_written(trial: Trial) -> None:
    """A constant state keeps its values where no gradients are wanted, too: under `no_grad` and `inference_mode`, and
    after further steps."""
    x, given, token = trial.tokens(), trial.state(), trial.tokens(length=1)
    for mode in (torch.no_grad, torch.inference_mode):
        for paradigm in trial.paradigms:
            with mode():
                state = clone(given)
                steps = x.shape[1] == 1 and paradigm is Paradigm.RECURRENT
                call = trial.mixer.step if steps else trial.call(paradigm)
                call(x, state)
            what = f"{paradigm}, {mode.__name__}, a state after it was given, against before"
            with trial.differences(what, 0) as differences:
                differences.state("the state", state, given)
    # a segment of one token, where nothing steps
    step = trial.mixer.step if Paradigm.RECURRENT in trial.mixer.traits.paradigms else trial.call()
    with torch.no_grad():
        _, after = step(token, clone(given))
        before, later = clone(after), after
        for _ in range(STEPS):
            _, later = step(token, later)
    trial.compare(f"a state that a step gave, {STEPS} steps later against then", (None, after), (None, before), 0)


@check(
    stateful,
    use="everything that is done with states: beams, saving, moving between devices",
    share=0.04,
    draw=Draw(tokens=(1, 6), batch_size=(2, 5)),
)
def a_state_is_tensors_batch_first(trial: Trial) -> None:
    """A state is a NamedTuple of tensors, one row per sequence, on the parameters' device; no Python numbers."""
    rows = trial.case.batch_size
    states = {"init_state": trial.mixer.init_state(rows)}
    x, state = trial.tokens(), trial.state()
    for paradigm in trial.paradigms:
        states[str(paradigm)] = trial.mix(x, state, paradigm=paradigm)[1]
    for source, state in states.items():
        require(_is_state(state), f"{source} gives {type(state).__name__}, not a (nested) NamedTuple of tensors")
        require(bool(to_dict(state)), f"{source} gives a state without tensors")
        for name, leaf in to_dict(state).items():
            shape = list(leaf.shape)
            require(shape[:1] == [rows], f"{source}: {name} is {shape}, and {rows} sequences need {rows} rows")
            require(leaf.device.type == trial.subject.device.type, f"{source}: {name} is on {leaf.device}")
    wanted = list(to_dict(states["init_state"]))
    for source, leaves in ((source, list(to_dict(state))) for source, state in states.items()):
        require(leaves == wanted, f"{source} has the leaves {leaves}, init_state {wanted}")


@check(
    stateful,
    declares("size", "A state that grows or not"),
    use="memory in decoding: it grows where it should not",
    remedy="declare traits.state as it is: constant or growing",
    share=0.02,
    draw=Draw(tokens=(1, 1), batch_size=(1, 2), starts=("none",)),
)
def a_state_has_the_declared_size(trial: Trial) -> None:
    """A constant state never grows, in any layer; a growing one does."""
    declared = trial.mixer.traits.state
    for paradigm in trial.paradigms:
        sizes, state, ended = [], None, False
        for length in (16, 16, 32, 600):
            try:
                _, state = trial.mix(trial.tokens(length=length), state, paradigm=paradigm)
            except SeqmixError:  # a table of positions may end
                if length < 600:
                    raise
                ended = True
            sizes.append(_memory(state))
        # by pages of many tokens, perhaps
        grows = sizes == sorted(sizes) and (ended or sizes[-2] < sizes[-1])
        # a learned beginning may be a view of a parameter
        constant = len({nbytes(trial.mixer.init_state(trial.case.batch_size)), *sizes}) == 1
        text = f"{paradigm}: the state keeps {sizes} bytes alive after 16, 32, 64 and 664 tokens"
        require(constant if declared == "constant" else grows, f"{text}, and traits.state is {declared}")
    for layer in range(1, DEEP) if declared == "constant" else ():  # every sixth, perhaps, attends to everything
        mixer = trial.config.build(trial.d_model, layer_idx=layer, n_layers=DEEP).to(trial.subject.device)
        x = trial.tokens(1, GROWN).float()
        with torch.no_grad():
            few, many = (_memory(mixer(x[:, :length], return_state=True)[1]) for length in (1, GROWN))
        text = f"layer {layer} of {DEEP}: the state keeps {few} bytes alive after a token, and {many} after {GROWN}"
        require(few == many, f"{text}, and traits.state is {declared}")


def _memory(state: Any) -> int:
    """Bytes that a state keeps alive: a view holds all that it is a view of; expanded rows count one by one."""
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in leaves_of(state).values()}
    return max(sum(storages.values()), nbytes(state))


def _is_state(state: Any) -> bool:
    named = isinstance(state, tuple) and hasattr(state, "_fields")
    return isinstance(state, Tensor) or (named and all(map(_is_state, state)))
