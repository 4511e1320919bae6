"""Mixers and states are values: copies are as good, nothing is shared, every option does something."""

import copy
import pickle
import sys
from typing import Any

import torch
from torch import Tensor

from ...mixers.state import clone, concatenate, map_state, select, to_dict
from ...registry import SeqmixError
from ..check import check
from ..compare import require
from ..mixer_case import LAYERS, Draw
from ..mixer_options import alternatives, changed
from ..mixer_trial import Trial, learnable

ONCE = Draw(tokens=(4, 4), batch_size=(2, 2), starts=("none",))


@check(share=0.1, draw=Draw(tokens=(1, 6), batch_size=(1, 2)))
def results_share_no_memory(trial: Trial) -> None:
    """Writing into the output, or into the tokens afterwards, changes neither the final state nor a parameter."""
    x, state = trial.tokens(), trial.state()
    for paradigm in trial.paradigms:
        tokens = x.clone()
        y, after = trial.mix(tokens, state, paradigm=paradigm)
        before, parameters = clone(after), [p.detach().clone() for p in trial.mixer.parameters()]
        require(y.data_ptr() != tokens.data_ptr(), f"{paradigm}: the output is the tokens' own memory")
        y.fill_(torch.nan)
        tokens.fill_(torch.nan)
        with trial.differences(f"{paradigm}, after writing into tokens and output against before", 0) as found:
            found.state("the final state", after, before)
            for (name, parameter), saved in zip(trial.mixer.named_parameters(), parameters, strict=True):
                found.tensor(name, parameter.detach(), saved)


@check(share=0.06, draw=ONCE)
def copies_are_as_good(trial: Trial) -> None:
    """A deep copy of a mixer, and one that was pickled, give the same bits and share nothing; so does a copied state."""
    x, mixer = trial.tokens(), trial.mixer
    expected = trial.mix(x, None)
    copies = {"a deep copy": copy.deepcopy(mixer)}
    cls = type(mixer)
    # a class inside a function cannot be pickled, which is not the mixer's fault
    if getattr(sys.modules.get(cls.__module__), cls.__qualname__, None) is cls:
        copies["a pickled mixer"] = pickle.loads(pickle.dumps(mixer))
    for what, other in copies.items():
        trial.compare(f"{what} against the mixer", trial.mix(x, None, other), expected, tolerance=0)
        with torch.no_grad():
            for tensor in (*other.parameters(), *other.buffers()):
                tensor.zero_()
        trial.compare(f"the mixer after {what} was changed against before", trial.mix(x, None), expected, tolerance=0)
    if expected[1] is not None:
        y, after = (trial.mix(x, state) for state in (expected[1], copy.deepcopy(expected[1])))
        trial.compare("from a deep copy of a state against from the state", after, y, tolerance=0)


@check(share=0.06, draw=ONCE)
def init_state_is_where_the_mixer_is(trial: Trial) -> None:
    """`init_state` is on the mixer's device, meta included, with the same shapes and dtypes; each call gives new
    memory."""
    like = {name: (leaf.shape, leaf.dtype) for name, leaf in to_dict(trial.mixer.init_state(2)).items()}
    first, second = trial.mixer.init_state(2), trial.mixer.init_state(2)
    with torch.no_grad():
        for leaf in to_dict(first).values():
            leaf.zero_() if leaf.is_floating_point() else leaf.fill_(0)
        kept = clone(second)
        map_state(lambda leaf: leaf.copy_(torch.ones_like(leaf)) if _owned(leaf) else leaf, first)
    with trial.differences("one initial state after another was written against before", 0) as found:
        found.state("the state", second, kept)
    with torch.device("meta"):
        mixer = trial.config.build(trial.subject.d_model, layer_idx=trial.case.layer, n_layers=LAYERS)
    on_meta = to_dict(mixer.to(trial.case.dtype).init_state(2))
    found_there = {name: (leaf.shape, leaf.dtype) for name, leaf in on_meta.items()}
    require(found_there == like, f"init_state of a mixer on meta has {found_there}, and elsewhere {like}")
    elsewhere = [name for name, leaf in on_meta.items() if leaf.device.type != "meta"]
    require(not elsewhere, f"init_state of a mixer on meta makes {', '.join(elsewhere)} on another device")


def _owned(leaf: Tensor) -> bool:
    """Whether it can be written: not a broadcast number."""
    return leaf.numel() > 0 and 0 not in [s for s, n in zip(leaf.stride(), leaf.shape, strict=True) if n > 1]
