"""Checks of mixers and states as values: copies work, no memory is shared, every option has an effect."""

import copy
import pickle
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...mixers.base.contract import SequenceMixer
from ...mixers.base.state import clone, concatenate, map_state, select, to_dict
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
    use="decoding with reused buffers, and layers that share tokens or boundaries: a call overwrites what others read",
    share=0.04,
    draw=Draw(tokens=(1, 6), batch_size=(1, 2), uses=USES),
)
def results_share_no_memory(trial: Trial) -> None:
    """Writing into the output, or into the tokens after a call, changes neither the final state nor a parameter. A call
    never writes into tokens, boundaries, or a state that it may not consume."""
    x, state = trial.tokens(), trial.state()
    for paradigm in trial.paradigms:
        _require_arguments_unchanged(trial, paradigm, x, state)
        tokens = x.clone()
        y, after = trial.mix(tokens, state, paradigm=paradigm)
        before, parameters = clone(after), [p.detach().clone() for p in trial.mixer.parameters()]
        require(y.data_ptr() != tokens.data_ptr(), f"{paradigm}: the output shares the memory of the tokens")
        y.fill_(torch.nan)
        tokens.fill_(torch.nan)
        with trial.differences(f"{paradigm}, after writing into tokens and output against before", 0) as differences:
            differences.state("the final state", after, before)
            for (name, parameter), saved in zip(trial.mixer.named_parameters(), parameters, strict=True):
                differences.tensor(name, parameter.detach(), saved)


def _require_arguments_unchanged(trial: Trial, paradigm: Paradigm, x: Tensor, state: Any) -> None:
    """Fail if a call changes its arguments: a call in the mode of the case (`trial.use`), or one without gradients.

    A call without gradients that returns the final state may consume a growing state, so it gets a clone.
    """
    inputs: list[tuple[Tensor, dict[str, Any]]] = [(x, {})]
    if trial.mixer.traits.packing:
        ends = torch.arange(len(x) + 1, device=x.device, dtype=torch.int32 if trial.case.seed % 2 else torch.int64)
        inputs.append((x.flatten(0, 1)[None], {"cu_seqlens": ends * x.shape[1]}))
    return_state = trial.mixer.traits.has_state and trial.case.seed % 4 >= 2
    consumes = return_state and trial.mixer.traits.state == "growing"
    for tokens, packed in inputs:
        calls = {trial.use: (trial.used(paradigm, **packed), state)}
        without = torch.no_grad()(trial.call(paradigm, return_state=return_state, **packed))
        calls["without gradients"] = (without, clone(state) if state is not None and consumes else state)
        arguments = {"the tokens": tokens, **packed, **leaves_of(state or ())}
        saved = {name: tensor.detach().clone() for name, tensor in arguments.items()}
        for description, (call, before) in calls.items():
            call(tokens, before)
            what = f"{paradigm}, {description}{', packed' if packed else ''}: arguments after a call against before"
            trial.compare(what, (arguments, None), (saved, None), 0)


@check(use="averaged weights, multiprocessing, caches of modules: a copy behaves differently", share=0.04, draw=ONCE)
def copies_are_as_good(trial: Trial) -> None:
    """A deep copy of a mixer and a pickled mixer give the same bits as the original, and share no memory with it. A
    copied state gives the same bits too."""
    x, mixer = trial.tokens(), trial.mixer
    expected = trial.mix(x, None)
    copiers: dict[str, Callable[[SequenceMixer], SequenceMixer]] = {"a deep copy": copy.deepcopy}
    cls = type(mixer)
    # a class defined inside a function cannot be pickled, which is not the mixer's fault
    if getattr(sys.modules.get(cls.__module__), cls.__qualname__, None) is cls:
        copiers["a pickled mixer"] = lambda mixer: pickle.loads(pickle.dumps(mixer))
    for what, make_copy in copiers.items():
        try:
            other = make_copy(mixer)
        except Exception as error:
            raise CheckFailure(f"{what} cannot be made: {type(error).__name__}: {error}") from error
        trial.compare(f"{what} against the mixer", trial.mix(x, None, other), expected, tolerance=0)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        trial.compare(f"the mixer after {what} was changed against before", trial.mix(x, None), expected, tolerance=0)
        # in a short segment, parameters may have no effect yet: try a long one too
        segments = (x, trial.tokens(length=LENGTHS[-1]))
        changed = any(not torch.equal(trial.mix(s, None, other)[0], trial.mix(s, None)[0]) for s in segments)
        require(changed or not learnable(mixer), f"{what} does not use its own parameters")
        original = trial.rebuilt()
        other = make_copy(original)
        with torch.no_grad():
            for parameter in original.parameters():
                parameter.zero_()
        actual = trial.mix(x, None, other)
        trial.compare(f"{what} after the mixer was changed against before", actual, expected, tolerance=0)
    again, once = (trial.mix(x, state) for state in (copy.deepcopy(expected[1]), expected[1]))
    trial.compare("a call from a deep copy of a state against a call from the state", again, once, tolerance=0)


@check(
    stateful,
    use="decoding on a GPU, and models built on meta: the state is on another device",
    share=0.02,
    draw=ONCE,
)
def init_state_is_where_the_mixer_is(trial: Trial) -> None:
    """`init_state` returns tensors on the mixer's device, also on meta, with the same shapes and dtypes everywhere.
    Each call allocates new memory."""
    like = {name: (leaf.shape, leaf.dtype) for name, leaf in to_dict(trial.mixer.init_state(2)).items()}
    for room in (None, 6):
        first, second = (trial.mixer.init_state(2, max_length=room) for _ in range(2))
        saved = clone(second)
        # skip a broadcast leaf, which cannot be written
        leaves = {name: leaf for name, leaf in leaves_of(first).items() if leaf.numel() and 0 not in leaf.stride()}
        with torch.no_grad():
            for number, leaf in enumerate(leaves.values()):
                leaf.fill_(number + 2)
        tied = [
            name for number, (name, leaf) in enumerate(leaves.items()) if (leaf != leaf.new_full((), number + 2)).any()
        ]
        require(
            not tied, f"init_state: expected every leaf to have its own memory, got shared memory in {', '.join(tied)}"
        )
        what = f"init_state(2, max_length={room}), a state after another one was written against before"
        with trial.differences(what, 0) as differences:
            differences.state("the state", second, saved)
    with torch.device("meta"):
        mixer = trial.config.build(trial.d_model, layer_idx=trial.case.layer, n_layers=LAYERS)
    on_meta = to_dict(mixer.to(trial.case.dtype).init_state(2))
    meta_like = {name: (leaf.shape, leaf.dtype) for name, leaf in on_meta.items()}
    require(meta_like == like, f"expected init_state on meta to give shapes and dtypes {like}, got {meta_like}")
    elsewhere = [name for name, leaf in on_meta.items() if leaf.device.type != "meta"]
    require(not elsewhere, f"init_state of a mixer on meta creates {', '.join(elsewhere)} on another device")


@check(
    compilable,
    use="training on a GPU: a tensor is created on the CPU",
    share=0.02,
    draw=Draw(tokens=(1, 9), batch_size=(1, 2), starts=("none", "initial", "read"), uses=USES),
)
def calls_stay_on_the_device(trial: Trial) -> None:
    """A call on meta uses no other device: every new tensor is created on the device of the tokens."""
    mixer = trial.config.build(trial.d_model, layer_idx=trial.case.layer, n_layers=LAYERS).to("meta", trial.case.dtype)
    mixer.train(trial.case.use != "evaluation")
    x, state = trial.tokens(), trial.state()
    meta_state = None if state is None else map_state(lambda leaf: leaf.to("meta"), state)
    for paradigm in trial.paradigms:
        used = paradigm if state is None else trial.after(paradigm)
        try:
            y, after = mixer(x.to("meta"), meta_state, paradigm=used, return_state=trial.final_state)
        except (RuntimeError, NotImplementedError) as error:
            # an error about reading numbers on meta is not a failure, an error about devices is
            message = str(error).partition("\n")[0]
            require("device" not in message, f"{paradigm}: a call on meta raises {type(error).__name__}: {message}")
            continue
        leaves = {"the output": y, **{f"the state's {name}": leaf for name, leaf in to_dict(after or ()).items()}}
        wrong = [name for name, leaf in leaves.items() if leaf.device.type != "meta"]
        require(
            not wrong,
            f"{paradigm}: expected a call on meta to give results on meta, got {', '.join(wrong)} on another device",
        )


@check(
    stateful,
    declares("rows", "Rows of different lengths"),
    use="batched decoding of prompts of different lengths",
    share=0.03,
    draw=Draw(tokens=(1, 7), pieces=(2, 3), batch_size=(1, 1), starts=("none",)),
)
def rows_may_differ_in_length(trial: Trial) -> None:
    """States of sequences of different lengths, all allocated for the same `max_length`, can continue in one batch.
    Each row gives the same as alone, and the batch can be split again."""
    lengths, rows = trial.case.lengths, range(len(trial.case.lengths))
    parts = [trial.tokens(1, length) for length in lengths]
    following = trial.tokens(len(lengths), 3)
    room = max(lengths) + 2 * following.shape[1]
    for paradigm in trial.paradigms:
        states = [trial.mix(part, trial.mixer.init_state(1, max_length=room), paradigm=paradigm)[1] for part in parts]
        try:
            joined = concatenate(states)
        except SeqmixError:  # caches that ignore `max_length` have as many slots as processed tokens
            require(trial.mixer.traits.state == "growing", f"{paradigm}: states of {lengths} tokens differ in shape")
            continue
        y, after = trial.mix(following, joined, paradigm=paradigm)
        growing = trial.mixer.traits.state == "growing"  # resizing a constant state does nothing
        starts = {"": joined}
        if growing:
            starts[" without spare room"] = trial.mixer.resize_state(clone(joined), None)
        steps = {
            name: trial.decode(following[:, :1], clone(before), trial.call(trial.reference))[0]
            for name, before in starts.items()
        }
        z, _ = trial.mix(following, after, paradigm=paradigm)
        what = f"{paradigm}, rows of {', '.join(map(str, lengths))} tokens in one batch against each alone"
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
                except (SeqmixError, RuntimeError):  # the longest row has no room for all tokens
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
    """Every value of an option has an effect, alone or together with another option: on parameters, results, gradients
    or costs, or on which options are refused."""
    config, options_to_vary = trial.subject.config, alternatives(trial.subject.config)
    if not trial.subject.vary:
        return
    other_options = [{}] + [{name: value} for name, values in options_to_vary.items() for value in values[:2]]
    x = trial.tokens(2, 9)
    fingerprints: dict[str, object] = {}

    def fingerprint(options: dict[str, Any]) -> Any:
        key = repr(sorted(options.items()))
        if key not in fingerprints:
            fingerprints[key] = _compute_fingerprint(trial, options, x)
        return fingerprints[key]

    for name, values in options_to_vary.items():
        for value in values:
            pairs = (({name: value, **options}, options) for options in other_options if name not in options)
            changes = any(fingerprint(with_value) != fingerprint(without) for with_value, without in pairs)
            current = getattr(config, name)
            same = f"option {name}: {value!r} and {current!r} give the same"
            require(changes, f"{same}, alone and together with each other option that was tried")


def _compute_fingerprint(trial: Trial, options: dict[str, Any], x: Tensor) -> Any:
    """Return everything that options may affect, in a form that can be compared; None if they are refused."""
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
    # a later layer has further parameters if it reads the first layer's values
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
