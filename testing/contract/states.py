"""Checks of states as values: they can be saved, batched, split, reordered and used again."""

from functools import partial
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from ...mixers.base.state import clone, concatenate, from_dict, map_state, nbytes, select, to_dict
from ...ops.runtime.paradigm import Paradigm
from ...registry import SeqmixError
from ..check import check, constant, declares, differentiable, stateful
from ..compare import require
from ..mixer.case import Draw
from ..mixer.trial import Trial, as_leaves, float_leaves, learnable, leaves_of, named_results

STEPS = 3
"""Number of further steps during which the state returned by an earlier step has to keep its values."""

DEEP, GROWN = 12, 40
"""Number of layers of a deep model, and of tokens after which a growing state has grown."""


@check(
    stateful,
    use="the start of a text: results depend on how the initial state was made",
    remedy="let init_state return a learned initial state with its graph",
    share=0.02,
    draw=Draw(tokens=(1, 8), starts=("none",)),
)
def the_initial_state_is_nothing_read(trial: Trial) -> None:
    """No state, `init_state` and a state allocated for `max_length` tokens start a text in the same way. If the initial
    state is learned, gradients reach it in each case."""
    x, following = trial.tokens(), trial.tokens(length=1)
    batch_size, length = trial.case.batch_size, trial.case.length
    for paradigm in trial.paradigms:
        y_none, after_none = trial.mix(x, None, paradigm=paradigm)
        from_initial = trial.mix(x, trial.mixer.init_state(batch_size), paradigm=paradigm)
        trial.compare(f"{paradigm}, init_state() against no state", from_initial, (y_none, after_none))
        call = trial.call(paradigm)
        gradients_initial, gradients_none = (
            trial.differentiate(lambda x, _, call=call, start=start: call(x, start()), x, None)
            for start in (partial(trial.mixer.init_state, batch_size), lambda: None)
        )
        what = f"{paradigm}, gradients from init_state() against no state"
        trial.compare(what, gradients_initial, gradients_none)
        y, allocated = trial.mix(x, trial.mixer.init_state(batch_size, max_length=length + 1), paradigm=paradigm)
        with trial.differences(f"{paradigm}, init_state(max_length={length + 1}) against no state") as differences:
            differences.tensor("the output", y, y_none, "BTD")
            later = trial.mix(following, after_none, paradigm=paradigm)[0]
            differences.tensor("the output later", trial.mix(following, allocated, paradigm=paradigm)[0], later, "BTD")
        with torch.no_grad():
            stateless = trial.mixer(x, paradigm=paradigm)
        trial.compare(f"{paradigm}, return_state=False", stateless, (y_none, None))
        _exceed_max_length(trial, paradigm, x)


def _exceed_max_length(trial: Trial, paradigm: Paradigm, x: Tensor) -> None:
    """Fail if a call with more tokens than the state was allocated for gives a wrong output instead of an error."""
    batch_size, room = x.shape[:2]
    longer = torch.cat((x, trial.tokens(length=3)), dim=1)
    whole = trial.mix(longer, None, paradigm=paradigm)[0]
    for processed in sorted({0, room // 2}):
        state = trial.mixer.init_state(batch_size, max_length=room)
        if processed:
            _, state = trial.mix(longer[:, :processed], state, paradigm=paradigm)
        try:
            with torch.no_grad():
                y, _ = trial.mixer(longer[:, processed:], state, paradigm=trial.after(paradigm))
        except (SeqmixError, RuntimeError):  # a RuntimeError comes from an assertion on the device
            continue
        what = f"{paradigm}, {longer.shape[1]} tokens, {processed} of them processed before, in a state for {room}"
        trial.compare(what, (y, None), (whole[:, processed:], None))


@check(
    stateful,
    use="beam search and batched decoding: rows of a state are mixed up",
    share=0.04,
    draw=Draw(tokens=(1, 6), batch_size=(1, 4), rows=True),
)
def rows_of_a_state_can_be_rearranged(trial: Trial) -> None:
    """Rows of a state can be selected, repeated and reordered (beam search), split and joined, and written into the
    tensors of a state in use (the slots of a server). Each row continues as its sequence would."""
    x, state, rows = trial.tokens(), trial.state(), trial.case.rows
    # a repeated row continues in two ways, mostly by one token as in beam search
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
        trial.compare(f"{paradigm}, rows {list(rows)} written into the tensors of a state in use", refilled, expected)


@check(
    stateful,
    use="speculative decoding, edited prompts: rejected tokens stay (vLLM issue 39273, pull request 50146)",
    remedy="override rollback so that every leaf goes back, or leave it out: the default mixes the kept tokens again",
    share=0.02,
    draw=Draw(tokens=(1, 6), batch_size=(1, 3)),
)
def a_state_goes_back(trial: Trial) -> None:
    """`rollback` gives the state before the last tokens of a segment, for each row its own number of them, also packed:
    going on from it equals never having read them. A call leaves the state before its segment valid, even if it writes
    into it."""
    x, following, state = trial.tokens(), trial.tokens(length=2), trial.state()
    rows, length = x.shape[:2]
    states = {"a state": state}
    if trial.mixer.traits.state == "growing":
        prefix = trial.tokens(length=3)
        roomy = trial.mixer.init_state(rows, max_length=3 + length + 2)
        states["a state with room"] = trial.mix(prefix, roomy)[1]
    boundaries = torch.arange(rows + 1, device=x.device) * length
    # rows go back by different numbers of tokens, one of them by the whole segment
    counts = [(length + row * (1 + trial.case.seed)) % (length + 1) for row in range(rows)]
    if trial.mixer.traits.state == "growing" and not trial.mixer.traits.packing:
        counts = [(1 + trial.case.seed) % (length + 1)] * rows  # rows of such a state may have to be of one length
    for paradigm in trial.paradigms:
        for name, before in states.items():
            expected, unread = [], trial.mix(following, before, paradigm=paradigm)[0]
            for row, count in enumerate(counts):
                kept = None if before is None else select(before, trial.index(row))
                if count < length:
                    _, kept = trial.mix(x[row : row + 1, : length - count], kept, paradigm=paradigm)
                expected.append(trial.mix(following[row : row + 1], kept, paradigm=paradigm)[0])
            packed: dict[str, tuple[Tensor, Tensor | None]] = {"": (x, None)}
            if trial.mixer.traits.packing:
                packed[", packed"] = (x.flatten(0, 1)[None], boundaries)
            for how, (segment, cu_seqlens) in packed.items():
                start = None if before is None else clone(before)
                with torch.no_grad():
                    call = trial.call(paradigm, cu_seqlens=cu_seqlens)
                    _, after = call(segment, start)
                    if start is not None:  # the state itself, not a clone
                        what = f"{paradigm}, {name}{how} that a call has read on from, against before"
                        trial.compare(what, (trial.call(paradigm)(following, start)[0], None), (unread, None))
                        _, after = call(segment, start)
                    options = {"paradigm": paradigm, "cu_seqlens": cu_seqlens}
                    back = trial.mixer.rollback(segment, start, after, trial.index(*counts), **options)
                y = trial.mix(following, back, paradigm=paradigm)[0]
                trial.compare(f"{paradigm}, {name}{how}, {counts} tokens back", (y, None), (torch.cat(expected), None))


@check(
    stateful,
    use="saved prompts: the text continues differently",
    share=0.02,
    draw=Draw(tokens=(1, 6), batch_size=(1, 2)),
)
def a_state_survives_the_disk(trial: Trial) -> None:
    """A state saved as safetensors and loaded continues bit for bit as the original. Resizing a state changes no
    result."""
    x, following, state = trial.tokens(), trial.tokens(length=2), trial.state()
    for paradigm in trial.paradigms:
        _, before = trial.mix(x, state, paradigm=paradigm)
        leaves = {name: leaf.to(trial.subject.device) for name, leaf in load(save(to_dict(before))).items()}
        loaded = from_dict(trial.mixer.init_state(trial.case.batch_size), leaves)
        # give the original the strides of the loaded one: with other strides, torch may round differently
        contiguous = map_state(lambda leaf: leaf.new_empty(leaf.shape).copy_(leaf), before)
        expected = trial.mix(following, contiguous, paradigm=paradigm)
        actual = trial.mix(following, loaded, paradigm=paradigm)
        trial.compare(f"{paradigm}, from a loaded state", actual, expected, tolerance=0)
        _compare_resized(trial, paradigm, x, following)


def _compare_resized(trial: Trial, paradigm: Paradigm, x: Tensor, following: Tensor) -> None:
    """Compare outputs from a state without spare room, and with more room, with those from an unchanged state."""
    batch_size, length = x.shape[:2]
    room = length + following.shape[1]
    _, allocated = trial.mix(x, trial.mixer.init_state(batch_size, max_length=length + 1), paradigm=paradigm)
    expected = trial.mix(following, trial.mix(x, None, paradigm=paradigm)[1], paradigm=paradigm)[0]
    trimmed = trial.mixer.resize_state(clone(allocated), None)
    resized = trial.mixer.resize_state(trimmed, room)
    for description, state in {"no spare room": trimmed, f"room for {room} tokens": resized}.items():
        output = trial.mix(following, state, paradigm=paradigm)[0]
        trial.compare(f"{paradigm}, from a state with {description}", (output, None), (expected, None))
    what = f"{paradigm}, a state that was given room and trimmed again against before"
    with trial.differences(what, 0) as differences:
        differences.state("the state", trial.mixer.resize_state(trial.mixer.resize_state(trimmed, room), None), trimmed)


@check(
    differentiable,
    stateful,
    use="truncated backpropagation, and reused prompts: the state changes under the caller",
    share=0.05,
    draw=Draw(tokens=(1, 5), batch_size=(1, 2), starts=("initial", "read", "moved")),
)
def a_state_is_never_written_under_grad(trial: Trial) -> None:
    """With autograd, a call never writes into the state that it is given. Without autograd, a clone of the state gives
    the same result again."""
    x, original = trial.tokens(), trial.state()
    states = [original, as_leaves(original)]
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
                # the graph of init_state is used again in the next round
                torch.autograd.grad(total, roots, allow_unused=True, retain_graph=True)
            with trial.differences(f"{paradigm}, a state after a call against before", 0) as differences:
                differences.state("the state", state, before)
            unwritten = [leaf._version for leaf in leaves_of(state).values()] == versions
            require(unwritten, f"{paradigm}: the call wrote into the state in place, although with the same values")
        # a call may consume its state, so each gets a clone
        first, second = (trial.mix(x, original, paradigm=paradigm) for _ in range(2))
        trial.compare(f"{paradigm}, the second of two clones of a state", second, first, tolerance=0)


@check(
    constant,
    declares("size", "A declared state size"),
    use="reused prompts: the first answer changes the shared state",
    share=0.02,
    draw=Draw(tokens=(1, 5), lists=((1,), (70,)), batch_size=(1, 2), starts=("initial", "read", "moved")),
)
def a_constant_state_is_never_written(trial: Trial) -> None:
    """Without autograd too, a call never writes into a constant state: neither under `no_grad` nor `inference_mode`,
    and not during later steps."""
    x, original, token = trial.tokens(), trial.state(), trial.tokens(length=1)
    for mode in (torch.no_grad, torch.inference_mode):
        for paradigm in trial.paradigms:
            with mode():
                state = clone(original)
                steps = x.shape[1] == 1 and paradigm is Paradigm.RECURRENT
                call = trial.mixer.step if steps else trial.call(paradigm)
                call(x, state)
            what = f"{paradigm}, {mode.__name__}, a state after a call against before"
            with trial.differences(what, 0) as differences:
                differences.state("the state", state, original)
    # a mixer without the recurrent paradigm has no step: use a segment of one token
    step = trial.mixer.step if Paradigm.RECURRENT in trial.mixer.traits.paradigms else trial.call()
    with torch.no_grad():
        _, after = step(token, clone(original))
        saved, later = clone(after), after
        for _ in range(STEPS):
            _, later = step(token, later)
    what = f"the state returned by a step, {STEPS} steps later against before them"
    trial.compare(what, (None, after), (None, saved), 0)


@check(
    stateful,
    use="every use of states: beam search, saving, moving between devices",
    share=0.02,
    draw=Draw(tokens=(1, 6), batch_size=(2, 5)),
)
def a_state_is_tensors_batch_first(trial: Trial) -> None:
    """A state is a NamedTuple of tensors with one row per sequence, on the device of the parameters. It holds no Python
    numbers."""
    rows = trial.case.batch_size
    states = {"init_state": trial.mixer.init_state(rows)}
    x, state = trial.tokens(), trial.state()
    for paradigm in trial.paradigms:
        states[str(paradigm)] = trial.mix(x, state, paradigm=paradigm)[1]
    device = trial.subject.device.type
    for source, state in states.items():
        state_class = type(state).__name__
        require(
            _is_state(state), f"{source}: expected a (nested) NamedTuple of tensors as the state, got {state_class}"
        )
        require(bool(to_dict(state)), f"{source}: expected a state with tensors, got one without any")
        for name, leaf in to_dict(state).items():
            shape = list(leaf.shape)
            require(shape[:1] == [rows], f"{source}: expected {name} to have {rows} rows, got the shape {shape}")
            require(leaf.device.type == device, f"{source}: expected {name} on {device}, got it on {leaf.device}")
    expected = list(to_dict(states["init_state"]))
    for source, leaves in ((source, list(to_dict(state))) for source, state in states.items()):
        require(leaves == expected, f"{source}: expected the leaves of init_state, {expected}, got {leaves}")


@check(
    stateful,
    declares("size", "A declared state size"),
    use="decoding: the state's memory grows although it is declared constant",
    remedy="declare traits.state as constant or growing, whichever the state is",
    share=0.01,
    draw=Draw(tokens=(1, 1), batch_size=(1, 2), starts=("none",)),
)
def a_state_has_the_declared_size(trial: Trial) -> None:
    """A state that is declared constant has the same size after any number of tokens, in every layer. One that is
    declared growing grows."""
    declared = trial.mixer.traits.state
    for paradigm in trial.paradigms:
        sizes, state, reached_limit = [], None, False
        for length in (16, 16, 32, 600):
            try:
                _, state = trial.mix(trial.tokens(length=length), state, paradigm=paradigm)
            except SeqmixError:  # the mixer may have a table of fewer positions
                if length < 600:
                    raise
                reached_limit = True
            sizes.append(_bytes_kept_alive(state))
        # a state may grow by pages of many tokens, so only the last and longest segment has to add to it
        grows = sizes == sorted(sizes) and (reached_limit or sizes[-2] < sizes[-1])
        # nbytes of the initial state, whose storage may be larger: it may be a view of a parameter
        constant = len({nbytes(trial.mixer.init_state(trial.case.batch_size)), *sizes}) == 1
        text = f"{paradigm}: the state takes {sizes} bytes after 16, 32, 64 and 664 tokens"
        require(constant if declared == "constant" else grows, f"{text}, but traits.state is {declared}")
    for layer in range(1, DEEP) if declared == "constant" else ():  # some layers may differ: global attention, say
        mixer = trial.config.build(trial.d_model, layer_idx=layer, n_layers=DEEP).to(trial.subject.device)
        x = trial.tokens(1, GROWN).float()
        with torch.no_grad():
            few, many = (_bytes_kept_alive(mixer(x[:, :length], return_state=True)[1]) for length in (1, GROWN))
        text = f"layer {layer} of {DEEP}: the state takes {few} bytes after 1 token and {many} after {GROWN}"
        require(few == many, f"{text}, but traits.state is {declared}")


def _bytes_kept_alive(state: Any) -> int:
    """Return the bytes that a state keeps alive: a view counts its whole storage, expanded rows count one by one."""
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in leaves_of(state).values()}
    return max(sum(storages.values()), nbytes(state))


def _is_state(state: Any) -> bool:
    """Return True for a tensor or a (nested) NamedTuple of tensors."""
    named = isinstance(state, tuple) and hasattr(state, "_fields")
    return isinstance(state, Tensor) or (named and all(map(_is_state, state)))
