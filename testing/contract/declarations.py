"""A mixer's declarations hold: refusals, round trips, initialisation, cost."""

import copy
import itertools
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ...mixers.contract import SequenceMixer
from ...mixers.state import clone, to_dict
from ...mixers.traits import ContractError
from ...ops.runtime.paradigm import Paradigm
from ...registry import SeqmixError, dump
from ...registry.yaml import parse
from ..check import check, declares
from ..compare import CheckFailure, require
from ..counting import count_flops
from ..memory_limit import limited_memory
from ..mixer.case import LAYERS, Draw
from ..mixer.trial import Trial

ONCE = Draw(tokens=(4, 4), batch_size=(2, 2), starts=("none",))


@check(
    declares("refusals", "A mixer of its own"),
    use="any call with a wrong argument: it computes something else instead of refusing",
    share=0.04,
    draw=ONCE,
)
def what_is_not_declared_is_refused(trial: Trial) -> None:
    """A paradigm, packing, dtype, shape or state that does not fit is refused by a ContractError, never computed."""
    mixer, x = trial.mixer, trial.tokens()
    state, boundaries = trial.initial_state(2) or (x[:, 0],), torch.tensor([0, 4, 8], device=x.device)
    for paradigm in sorted(set(Paradigm) - mixer.traits.paradigms):
        _refused(f"the undeclared paradigm {paradigm}", lambda p=paradigm: mixer(x, paradigm=p), str(paradigm))
    if Paradigm.RECURRENT not in mixer.traits.paradigms:
        _refused("a step without the recurrent paradigm", lambda: mixer.step(x[:, :1], state))
    _refused("a paradigm that does not exist", lambda: mixer(x, paradigm="paralel"), "paralel")
    for paradigm in sorted(p for p in mixer.traits.paradigms if not mixer.traits.takes_state(p)):
        _refused(f"a state in the {paradigm} paradigm", lambda p=paradigm: mixer(x, state, paradigm=p))
    packed = x.reshape(1, 8, -1)
    if mixer.traits.packing:
        for wrong in ([0, 4], [1, 8], [0, 5, 3, 8]):
            boundaries = torch.tensor(wrong, device=x.device)
            # elsewhere, looking at the boundaries would wait for the device
            if x.device.type == "cpu":
                _refused(f"cu_seqlens {wrong} for 8 tokens", lambda b=boundaries: mixer(packed, cu_seqlens=b))
        _refused("packed documents in a batch of two", lambda: mixer(x, cu_seqlens=torch.tensor([0, 4])))
    else:
        _refused("packed documents, which it does not declare", lambda: mixer(packed, cu_seqlens=boundaries), "packing")
    for width in (1, 7, 13):
        _built_or_refused(trial, width)
    _refused("integer tokens", lambda: mixer(x.long()), "int64")
    _refused("float32 tokens for float64 parameters", lambda: mixer(x.float()), "float32")
    _refused("an empty segment", lambda: mixer(x[:, :0]))
    _refused("tokens without a batch", lambda: mixer(x[0]))
    if mixer.traits.has_state:
        _refused("a state of 3 sequences for 2", lambda: mixer(x, mixer.init_state(3), paradigm=trial.reference), "3")
    else:
        _refused("a final state, which it has none of", lambda: mixer(x, return_state=True), "state")


@check(
    declares("yaml", "A configuration in YAML"),
    use="runs from YAML: another mixer is built than was written",
    share=0.04,
    draw=ONCE,
)
def configurations_round_trip(trial: Trial) -> None:
    """A configuration survives YAML; the mixer has its kind, traits and, at any length, its default paradigm."""
    config, mixer, x = trial.config, trial.mixer, trial.tokens()
    text = dump(config)
    read = parse(text, "YAML")
    same = read is not None and type(config).model_validate(read.plain()) == config
    require(same, f"YAML gives another configuration: {text}")
    for name in ("kind", "traits", "paradigm"):
        require(getattr(mixer, name) == getattr(config, name), f"the mixer's {name} is not its configuration's")
    for paradigm in trial.paradigms:
        other = trial.rebuilt(paradigm=paradigm)
        require(other.paradigm is paradigm, f"paradigm: {paradigm} builds a mixer of {other.paradigm}")
        for length in (1, 4):
            given, unsaid = (trial.mix(x[:, :length], None, other, **p) for p in ({"paradigm": paradigm}, {}))
            trial.compare(f"the default paradigm against {paradigm} at {length} tokens", unsaid, given, tolerance=0)


@check(use="checkpoints, averaged and swapped weights: a mixer that was given others is another", share=0.07, draw=ONCE)
def parameters_round_trip(trial: Trial) -> None:
    """A state_dict holds everything: loaded into a new mixer, in a process whose hashes are salted otherwise too, it
    gives the same bits, and so it does in one that was used with other parameters, however they are written."""
    x = trial.tokens()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        with patch("builtins.hash", partial(_salted, hash, trial.case.seed)):
            others = {"loaded parameters": trial.rebuilt()}
        others["parameters of a plain mapping"] = trial.rebuilt()
    # as a file of safetensors holds them: torch's own mapping has versions of modules beside
    others["parameters of a plain mapping"].load_state_dict({**trial.mixer.state_dict()})
    others["parameters of a model that it is part of"] = part = trial.rebuilt()
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.zero_()
    nn.ModuleList([part]).load_state_dict(nn.ModuleList([trial.mixer]).state_dict())
    for paradigm in trial.paradigms:
        expected = trial.mix(x, None, paradigm=paradigm)
        for what, other in others.items():
            trial.compare(f"{paradigm}, {what}", trial.mix(x, None, other, paradigm=paradigm), expected, 0)
    _written_after_use(trial, x)


def _salted(plain: Callable[[Any], int], salt: int, value: Any) -> int:
    """A hash as another process has it: of strings, Python salts it."""
    return plain((salt, value))


def _written_after_use(trial: Trial, x: Tensor) -> None:
    """Of one mixer, in evaluation or in training: what was kept of former parameters is not used for the new ones."""
    training, loaded = trial.case.seed % 2 == 1, trial.case.seed // 2 % 2 == 1
    used, fresh = (copy.deepcopy(trial.without_dropout()).train(training) for _ in range(2))
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.add_(0.1 * trial.like(parameter))

    def write(source: SequenceMixer) -> None:
        if loaded:
            used.load_state_dict(source.state_dict())
        else:  # which autograd does not count
            for old, new in zip(used.parameters(), source.parameters(), strict=True):
                old.data.copy_(new.data)

    def results(paradigm: Paradigm, mixer: SequenceMixer) -> tuple[Tensor, Any]:
        """Of a segment, and of a step after it, for which more may be kept."""
        y, state = trial.call(paradigm, mixer)(x, None)
        if training or not trial.mixer.traits.has_state:
            return y, state
        after, state = trial.call(paradigm, mixer)(x[:, :1], state)
        return torch.cat((y, after), dim=1), state

    for paradigm in trial.paradigms:
        with torch.set_grad_enabled(training):
            results(paradigm, used)
            write(fresh)
            actual, expected = (results(paradigm, mixer) for mixer in (used, fresh))
        write(trial.mixer)
        said = f"{paradigm}, in {'training' if training else 'evaluation'}, parameters "
        said += "loaded" if loaded else "written through .data"
        trial.compare(f"{said} after a call, against a mixer that has had no others", actual, expected, 0)


@check(
    declares("reset_parameters", "`reset_parameters`"),
    use="models built on meta, and sharded training: parameters are uninitialised",
    share=0.07,
    draw=ONCE,
)
def every_parameter_is_initialised(trial: Trial) -> None:
    """Built alone, every parameter and buffer is filled; built on meta, then given memory, `reset_parameters` fills
    them, from the global generator alone, in 16 bits too."""
    with torch.device(trial.subject.device), torch.random.fork_rng():
        alone = trial.config.build(trial.d_model, layer_idx=0, n_layers=1)
    # memory that nothing filled is NaN here
    _filled(alone, "built alone, {} is uninitialised: end __init__ with self.reset_parameters()")
    with torch.device("meta"):
        mixer = trial.config.build(trial.d_model, layer_idx=0, n_layers=1)
    mixer = mixer.to_empty(device=trial.subject.device)
    filled, draws, left = [], _Draws(), list[Tensor]()
    for seed in (0, 0, 1):
        with torch.no_grad(), torch.random.fork_rng():
            for tensor in (*mixer.parameters(), *mixer.buffers()):
                if tensor.is_floating_point():
                    tensor.fill_(torch.nan)
            torch.manual_seed(seed)
            before = {name: id(parameter) for name, parameter in mixer.named_parameters()}
            with draws:
                mixer.reset_parameters()
            left.append(torch.get_rng_state())
            after = {name: id(parameter) for name, parameter in mixer.named_parameters()}
            replaced = [name for name, one in after.items() if one != before.get(name, one)]
            require(
                not replaced, f"reset_parameters makes new parameters: {', '.join(replaced)}; an optimizer has the old"
            )
        filled.append({name: tensor.detach().clone() for name, tensor in mixer.named_parameters()})
        _filled(mixer, "reset_parameters leaves {} uninitialised")
    seeds = (
        "reset_parameters leaves the global generator in one state whatever the seed: the next layer's are those of all"
    )
    require(not torch.equal(left[0], left[2]), seeds)
    narrow = copy.deepcopy(mixer).to(torch.bfloat16)  # some decompositions have no 16 bits
    with torch.no_grad(), torch.random.fork_rng():
        narrow.reset_parameters()
    _filled(narrow, "in bfloat16 reset_parameters leaves {} uninitialised")
    trial.compare("reset_parameters with the same seed", (filled[1], None), (filled[0], None), 0)
    moved = any(not torch.equal(filled[0][name], filled[2][name]) for name in filled[0])
    require(moved or not draws.random, "reset_parameters gives the same parameters whatever the seed")


@check(
    declares("flops", "A declared cost"),
    use="reported FLOPs and MFU",
    remedy="override flops",
    share=0.05,
    draw=Draw(tokens=(1, 20), lists=((64,), (130,)), batch_size=(1, 1), starts=("none", "initial", "read")),
)
def flops_are_as_declared(trial: Trial) -> None:
    """`flops` is what a counter counts, with or without a final state, of a few tokens and of hundreds (more by what
    tokens alone write into a state, as in the recurrent paradigm: outer products are elementwise), and of a million
    tokens and more it grows as they do."""
    x, context = trial.tokens(), 1 + trial.case.seed % 7 if trial.case.start == "read" else 0
    state = trial.mix(trial.tokens(length=context), None)[1] if context else None
    for paradigm in trial.paradigms if state is None else filter(trial.mixer.traits.takes_state, trial.paradigms):
        counted = []
        for wanted in (False, trial.mixer.traits.has_state):
            given = None if state is None else clone(state)
            with torch.no_grad():
                call = partial(trial.mixer, x, given, paradigm=paradigm, return_state=wanted)
                counted.append(count_flops(call))
        numbers = sum(leaf.numel() for leaf in to_dict(trial.initial_state(1)).values())
        declared = trial.mixer.flops(trial.case.length, paradigm, context)
        # torch.einsum multiplies elementwise where it would sum over one token, as in a ragged chunk or a new cache
        size = {Paradigm.RECURRENT: 1, Paradigm.CHUNKWISE: trial.mixer.chunk_size}.get(paradigm, trial.case.length)
        lone = trial.case.length if size == 1 else trial.case.length % size == 1
        first = 4 * trial.d_model * (lone > 0 and trial.mixer.traits.state == "growing" and not context)
        sentence = f"{paradigm}: flops({trial.case.length}, context={context}) is {declared:,}, and counted are"
        sentence += f" {counted[0]:,} ({counted[1]:,} with a final state)"
        require(min(counted) <= declared <= max(counted) + max(4 * lone * numbers, first), sentence)
        if trial.case.length == 1 and not trial.case.options:  # once: a sum may go over all chunks, which may be small
            _flops_grow(trial.mixer, paradigm)


def _flops_grow(mixer: SequenceMixer, paradigm: Paradigm) -> None:
    """Of texts too long to be counted: of twice the tokens about twice to four times as many; 32 bits overflow."""
    with suppress(SeqmixError), limited_memory():  # no such texts, or pairs are counted by a mask
        counts = [mixer.flops(2**n, paradigm) for n in range(18, 23)]
        for n, (once, twice) in enumerate(itertools.pairwise(counts), start=18):
            said = f"{paradigm}: flops is {once!r} for 2^{n} tokens, and {twice!r} for twice as many"
            require(1.9 * once <= twice <= 4.1 * once, said)


class _Draws(TorchDispatchMode):
    """True if a random number is drawn, from any generator."""

    random = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.random |= torch.Tag.nondeterministic_seeded in func.tags
        return func(*args, **(kwargs or {}))


def _filled(mixer: SequenceMixer, sentence: str) -> None:
    for name, tensor in (*mixer.named_parameters(), *mixer.named_buffers()):
        require(not tensor.is_floating_point() or tensor.isfinite().all(), sentence.format(name))


def _built_or_refused(trial: Trial, d_model: int) -> None:
    try:
        trial.config.build(d_model, layer_idx=0, n_layers=LAYERS)
    except SeqmixError:
        pass
    except Exception as error:
        sentence = f"build with d_model = {d_model} raised {type(error).__name__} instead of a SeqmixError: {error}"
        raise CheckFailure(sentence.splitlines()[0]) from error


def _refused(what: str, call: Callable[[], object], word: str = "") -> None:
    try:
        call()
    except ContractError as error:
        require(word in str(error), f"{what}: the refusal does not name {word!r}: {error}")
    except Exception as error:
        text = f"{what} raised {type(error).__name__} instead of ContractError: {error}"
        raise CheckFailure(text.splitlines()[0]) from error
    else:
        raise CheckFailure(f"{what} was computed, not refused")
