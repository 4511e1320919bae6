"""Mixers and states are values: copies are as good, nothing is shared, every option does something."""

import copy
import pickle
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...mixers.contract import SequenceMixer
from ...mixers.state import clone, concatenate, map_state, select, to_dict
from ...ops.runtime.paradigm import Paradigm
from ...registry import SeqmixError
from ..check import check, compilable, declares, optional, stateful
from ..compare import CheckFailure, require
from ..gradients import gradients
from ..mixer.case import LAYERS, LENGTHS, USES, Draw
from ..mixer.options import alternatives
from ..mixer.trial import Trial, learnable, leaves_of

ONCE = Draw(tokens=(4, 4), batch_size=(2, 2), starts=("none",))


@check(
    use="decoding with reused buffers: the past is overwritten; layers that are given the same tokens and boundaries",
    share=0.07,
    draw=Draw(tokens=(1, 6), batch_size=(1, 2), uses=USES),
)
def results_share_no_memory(trial: Trial) -> None:
    """Writing into the output, or into the tokens afterwards, changes neither the final state nor a parameter; and no
    call writes into tokens, boundaries, or a state that it may not consume."""
    x, state = trial.tokens(), trial.state()
    for paradigm in trial.paradigms:
        _arguments_are_kept(trial, paradigm, x, state)
        tokens = x.clone()
        y, after = trial.mix(tokens, state, paradigm=paradigm)
        before, parameters = clone(after), [p.detach().clone() for p in trial.mixer.parameters()]
        require(y.data_ptr() != tokens.data_ptr(), f"{paradigm}: the output is the tokens' own memory")
        y.fill_(torch.nan)
        tokens.fill_(torch.nan)
        with trial.differences(f"{paradigm}, after writing into tokens and output against before", 0) as differences:
            differences.state("the final state", after, before)
            for (name, parameter), saved in zip(trial.mixer.named_parameters(), parameters, strict=True):
                differences.tensor(name, parameter.detach(), saved)


def _arguments_are_kept(trial: Trial, paradigm: Paradigm, x: Tensor, state: Any) -> None:
    """In the case's use and without gradients, where a call that wants the final state may consume a growing one."""
    ways: list[tuple[Tensor, dict[str, Any]]] = [(x, {})]
    if trial.mixer.traits.packing:
        ends = torch.arange(len(x) + 1, device=x.device, dtype=torch.int32 if trial.case.seed % 2 else torch.int64)
        ways.append((x.flatten(0, 1)[None], {"cu_seqlens": ends * x.shape[1]}))
    scored = trial.case.seed % 4 < 2
    wanted = trial.mixer.traits.has_state and not scored
    consumes = wanted and trial.mixer.traits.state == "growing"
    for tokens, packed in ways:
        calls = {trial.use: (trial.used(paradigm, **packed), state)}
        without = torch.no_grad()(trial.call(paradigm, return_state=wanted, **packed))
        calls["without gradients"] = (without, clone(state) if state is not None and consumes else state)
        given = {"the tokens": tokens, **packed, **leaves_of(state or ())}
        kept = {name: tensor.detach().clone() for name, tensor in given.items()}
        for what, (call, before) in calls.items():
            call(tokens, before)
            said = f"{paradigm}, {what}{', packed' if packed else ''}: arguments after a call against before"
            trial.compare(said, (given, None), (kept, None), 0)


@check(use="averaged weights, multiprocessing and caches of modules: a copy is another mixer", share=0.04, draw=ONCE)
def copies_are_as_good(trial: Trial) -> None:
    """A deep copy of a mixer, and a pickled one, give the same bits and share nothing; a copied state is as
    good."""
    x, mixer = trial.tokens(), trial.mixer
    expected = trial.mix(x, None)
    ways: dict[str, Callable[[SequenceMixer], SequenceMixer]] = {"a deep copy": copy.deepcopy}
    cls = type(mixer)
    # a class inside a function cannot be pickled, which is not the mixer's fault
    if getattr(sys.modules.get(cls.__module__), cls.__qualname__, None) is cls:
        ways["a pickled mixer"] = lambda mixer: pickle.loads(pickle.dumps(mixer))
    for what, copied in ways.items():
        try:
            other = copied(mixer)
        except Exception as error:
            raise CheckFailure(f"{what} cannot be made: {type(error).__name__}: {error}") from error
        trial.compare(f"{what} against the mixer", trial.mix(x, None, other), expected, tolerance=0)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        trial.compare(f"the mixer after {what} was changed against before", trial.mix(x, None), expected, tolerance=0)
        # the first tokens of a text may be read by later ones alone
        texts = (x, trial.tokens(length=LENGTHS[-1]))
        changed = any(not torch.equal(trial.mix(text, None, other)[0], trial.mix(text, None)[0]) for text in texts)
        require(changed or not learnable(mixer), f"{what} does not read its own parameters")
        original = trial.rebuilt()
        other = copied(original)
        with torch.no_grad():
            for parameter in original.parameters():
                parameter.zero_()
        actual = trial.mix(x, None, other)
        trial.compare(f"{what} after the mixer was changed against before", actual, expected, tolerance=0)
    again, once = (trial.mix(x, state) for state in (copy.deepcopy(expected[1]), expected[1]))
    trial.compare("from a deep copy of a state against from the state", again, once, tolerance=0)


@check(stateful, use="decoding on a GPU, and models built on meta", share=0.04, draw=ONCE)
def init_state_is_where_the_mixer_is(trial: Trial) -> None:
    """`init_state` is on the mixer's device, meta included, with the same shapes and dtypes; each call gives new
    memory."""
    like = {name: (leaf.shape, leaf.dtype) for name, leaf in to_dict(trial.mixer.init_state(2)).items()}
    for room in (None, 6):
        first, second = (trial.mixer.init_state(2, max_length=room) for _ in range(2))
        kept = clone(second)
        # a broadcast number cannot be written
        leaves = {name: leaf for name, leaf in leaves_of(first).items() if leaf.numel() and 0 not in leaf.stride()}
        with torch.no_grad():
            for number, leaf in enumerate(leaves.values()):
                leaf.fill_(number + 2)
        tied = [
            name for number, (name, leaf) in enumerate(leaves.items()) if (leaf != leaf.new_full((), number + 2)).any()
        ]
        require(not tied, f"init_state: writing into another leaf of the state writes into {' and '.join(tied)}")
        said = f"init_state(2, max_length={room}) after another was written against before"
        with trial.differences(said, 0) as differences:
            differences.state("the state", second, kept)
    with torch.device("meta"):
        mixer = trial.config.build(trial.d_model, layer_idx=trial.case.layer, n_layers=LAYERS)
    on_meta = to_dict(mixer.to(trial.case.dtype).init_state(2))
    found_there = {name: (leaf.shape, leaf.dtype) for name, leaf in on_meta.items()}
    require(found_there == like, f"init_state of a mixer on meta has {found_there}, and elsewhere {like}")
    elsewhere = [name for name, leaf in on_meta.items() if leaf.device.type != "meta"]
    require(not elsewhere, f"init_state of a mixer on meta makes {', '.join(elsewhere)} on another device")


@check(
    compilable,
    use="training on a GPU: a tensor is made on the CPU",
    share=0.03,
    draw=Draw(tokens=(1, 9), batch_size=(1, 2), starts=("none", "initial", "read"), uses=USES),
)
def calls_stay_on_the_device(trial: Trial) -> None:
    """On meta a call needs no other device: whatever it makes is made where the tokens are."""
    mixer = trial.config.build(trial.d_model, layer_idx=trial.case.layer, n_layers=LAYERS).to("meta", trial.case.dtype)
    mixer.train(trial.case.use != "evaluation")
    x, state = trial.tokens(), trial.state()
    elsewhere = None if state is None else map_state(lambda leaf: leaf.to("meta"), state)
    for paradigm in trial.paradigms:
        used = paradigm if state is None else trial.after(paradigm)
        try:
            y, after = mixer(x.to("meta"), elsewhere, paradigm=used, return_state=trial.final_state)
        except (RuntimeError, NotImplementedError) as error:
            # numbers cannot be looked at there, which is no mistake
            said = str(error).partition("\n")[0]
            require("device" not in said, f"{paradigm}: a call on meta raises {type(error).__name__}: {said}")
            continue
        leaves = {"the output": y, **{f"the state's {name}": leaf for name, leaf in to_dict(after or ()).items()}}
        wrong = [name for name, leaf in leaves.items() if leaf.device.type != "meta"]
        require(not wrong, f"{paradigm}: on meta {', '.join(wrong)} is on another device")


@check(
    stateful,
    declares("rows", "Rows of their own lengths"),
    use="batched decoding of prompts of different lengths",
    share=0.05,
    draw=Draw(tokens=(1, 7), pieces=(2, 3), batch_size=(1, 1), starts=("none",)),
)
def rows_may_differ_in_length(trial: Trial) -> None:
    """States of sequences of different lengths, each begun with the same `max_length`, go on together in one batch as
    each would alone, and can be split again, if a growing one leaves room."""
    lengths, rows = trial.case.lengths, range(len(trial.case.lengths))
    parts = [trial.tokens(1, length) for length in lengths]
    following = trial.tokens(len(lengths), 3)
    room = max(lengths) + 2 * following.shape[1]
    for paradigm in trial.paradigms:
        states = [trial.mix(part, trial.mixer.init_state(1, max_length=room), paradigm=paradigm)[1] for part in parts]
        try:
            together = concatenate(states)
        except SeqmixError:  # caches without room to spare, of as many tokens as each has read
            require(trial.mixer.traits.state == "growing", f"{paradigm}: states of {lengths} tokens differ in shape")
            continue
        y, after = trial.mix(following, together, paradigm=paradigm)
        growing = trial.mixer.traits.state == "growing"  # another is resized by doing nothing
        steps = {"": together}
        if growing:
            steps[" without spare room"] = trial.mixer.resize_state(clone(together), None)
        steps = {
            name: trial.decode(following[:, :1], clone(before), trial.call(trial.reference))[0]
            for name, before in steps.items()
        }
        z, _ = trial.mix(following, after, paradigm=paradigm)
        what = f"{paradigm}, rows of {', '.join(map(str, lengths))} tokens together against each alone"
        with trial.differences(what) as differences:
            for row in rows:
                expected, alone = trial.mix(following[row : row + 1], states[row], paradigm=paradigm)
                differences.tensor(f"row {row}'s output", y[row : row + 1], expected, "BTD")
                for name, step in steps.items():
                    differences.tensor(
                        f"row {row}'s output of a step{name}", step[row : row + 1], expected[:, :1], "BTD"
                    )
                later = trial.mix(following[row : row + 1], alone, paradigm=paradigm)[0]
                differences.tensor(f"row {row}'s output later", z[row : row + 1], later, "BTD")
                split = trial.mix(following[row : row + 1], select(after, trial.index(row)), paradigm=paradigm)[0]
                differences.tensor(f"row {row}'s output after the split", split, later, "BTD")
            if not growing:
                continue
            trimmed = trial.mixer.resize_state(clone(after), None)
            w, _ = trial.mix(following, trimmed, paradigm=paradigm)
            differences.tensor("the output from the state without spare room", w, z, "BTD")
            if len(set(lengths)) > 1:
                tight = trial.mixer.resize_state(concatenate([clone(state) for state in states]), max(lengths) + 1)
                try:
                    v, _ = trial.mix(following, tight, paradigm=paradigm)
                except (SeqmixError, RuntimeError):  # the longest does not fit
                    continue
                differences.tensor("the output from a state with room for one more", v, y, "BTD")


@check(
    optional,
    use="ablations: an option is accepted and does nothing",
    remedy="name the field in the configuration's `not_varied`",
    share=0.01,
    draw=ONCE,
)
def every_option_changes_something(trial: Trial) -> None:
    """Every value of an option that a check varies changes parameters, results, gradients, costs, or what is refused,
    beside some values of the others."""
    config, others = trial.subject.config, alternatives(trial.subject.config)
    if not trial.subject.vary:
        return
    beside = [{}] + [{name: value} for name, values in others.items() for value in values[:2]]
    x = trial.tokens(2, 9)
    known: dict[str, object] = {}

    def described(options: dict[str, Any]) -> Any:
        key = repr(sorted(options.items()))
        if key not in known:
            known[key] = _describe(trial, options, x)
        return known[key]

    for name, values in others.items():
        for value in values:
            pairs = (({name: value, **options}, options) for options in beside if name not in options)
            changes = any(described(with_value) != described(without) for with_value, without in pairs)
            own = getattr(config, name)
            require(changes, f"option {name}: {value!r} gives what {own!r} gives, beside any other option tried")


def _describe(trial: Trial, options: dict[str, Any], x: Tensor) -> Any:
    """What options make, in numbers that can be compared; None where they do not go together."""
    mixer = trial.subject.mixer(options)
    if mixer is None:
        return None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        mixer.train()
        try:
            y, after = mixer(x, return_state=mixer.traits.has_state)
        finally:
            mixer.eval()
    # a layer that reads the first one's values has parameters for them
    later = copy.deepcopy(mixer) if mixer.traits.value_residual else None
    if later is not None:
        later.accept_first_values()
    parameters = learnable(mixer)
    slopes = gradients({"y": y}, {"y": torch.ones_like(y)}, parameters)
    with torch.no_grad():
        numbers = [y, *slopes.values(), *mixer.parameters(), *mixer.buffers(), *to_dict(after).values()]
    return (
        mixer.traits,
        None if "flops" in getattr(mixer, "undeclared", {}) else mixer.flops(9, mixer.paradigm),
        [] if later is None else [p.shape for p in later.parameters()],
        [(n.shape, n.detach().double().sum().item()) for n in numbers],
    )
