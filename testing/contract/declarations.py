"""Checks of what a mixer declares: refusals, round trips, initialisation, cost."""

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

from ...mixers.base.contract import SequenceMixer
from ...mixers.base.state import clone, to_dict
from ...mixers.base.traits import ContractError
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
    declares("refusals", "A mixer that validates its arguments"),
    use="any call with a wrong argument: the mixer computes something else instead of refusing",
    share=0.02,
    draw=ONCE,
)
def what_is_not_declared_is_refused(trial: Trial) -> None:
    """A paradigm, packing, dtype or number of rows that does not fit raises a `ContractError`."""
    mixer, x = trial.mixer, trial.tokens()
    state, boundaries = trial.initial_state(2) or (x[:, 0],), torch.tensor([0, 4, 8], device=x.device)
    for paradigm in sorted(set(Paradigm) - mixer.traits.paradigms):
        _require_refusal(f"the undeclared paradigm {paradigm}", lambda p=paradigm: mixer(x, paradigm=p), str(paradigm))
    if Paradigm.RECURRENT not in mixer.traits.paradigms:
        _require_refusal("a step without the recurrent paradigm", lambda: mixer.step(x[:, :1], state))
    _require_refusal("a paradigm that does not exist", lambda: mixer(x, paradigm="paralel"), "paralel")
    for paradigm in sorted(p for p in mixer.traits.paradigms if not mixer.traits.takes_state(p)):
        _require_refusal(f"a state in the {paradigm} paradigm", lambda p=paradigm: mixer(x, state, paradigm=p))
    packed = x.reshape(1, 8, -1)
    if mixer.traits.packing:
        for wrong in ([0, 4], [1, 8], [0, 5, 3, 8]):
            boundaries = torch.tensor(wrong, device=x.device)
            # mixers validate boundaries on the CPU alone: elsewhere, reading them would wait for the device
            if x.device.type == "cpu":
                _require_refusal(f"cu_seqlens {wrong} for 8 tokens", lambda b=boundaries: mixer(packed, cu_seqlens=b))
        _require_refusal("packed documents in a batch of two", lambda: mixer(x, cu_seqlens=torch.tensor([0, 4])))
    else:
        what = "packed documents for a mixer without packing"
        _require_refusal(what, lambda: mixer(packed, cu_seqlens=boundaries), "packing")
    for width in (1, 7, 13):
        _require_built_or_refused(trial, width)
    _require_refusal("integer tokens", lambda: mixer(x.long()), "int64")
    _require_refusal("float32 tokens for float64 parameters", lambda: mixer(x.float()), "float32")
    _require_refusal("an empty segment", lambda: mixer(x[:, :0]))
    _require_refusal("tokens without a batch dimension", lambda: mixer(x[0]))
    if mixer.traits.has_state:
        what = "a state of 3 sequences for 2 sequences of tokens"
        _require_refusal(what, lambda: mixer(x, mixer.init_state(3), paradigm=trial.reference), "3")
    else:
        what = "return_state=True for a mixer without a state"
        _require_refusal(what, lambda: mixer(x, return_state=True), "state")


@check(
    declares("yaml", "A configuration in YAML"),
    use="runs from YAML: a different mixer is built than the file says",
    share=0.02,
    draw=ONCE,
)
def configurations_round_trip(trial: Trial) -> None:
    """A configuration is the same after writing it to YAML and reading it. The mixer has the configuration's kind,
    traits and default paradigm, and computes in that paradigm at any length."""
    config, mixer, x = trial.config, trial.mixer, trial.tokens()
    text = dump(config)
    parsed = parse(text, "YAML")
    same = parsed is not None and type(config).model_validate(parsed.plain()) == config
    require(same, f"expected the same configuration from its YAML, got a different one from: {text}")
    for name in ("kind", "traits", "paradigm"):
        value, declared = getattr(mixer, name), getattr(config, name)
        require(value == declared, f"expected the mixer's {name} to be its configuration's, {declared}, got {value}")
    for paradigm in trial.paradigms:
        other = trial.rebuilt(paradigm=paradigm)
        built = f"expected paradigm={paradigm} to build a mixer with that default, got {other.paradigm}"
        require(other.paradigm is paradigm, built)
        for length in (1, 4):
            explicit = trial.mix(x[:, :length], None, other, paradigm=paradigm)
            default = trial.mix(x[:, :length], None, other)
            trial.compare(f"the default paradigm against {paradigm} at {length} tokens", default, explicit, tolerance=0)


@check(
    use="checkpoints, averaged and swapped weights: a mixer with loaded parameters differs from the saved one",
    share=0.04,
    draw=ONCE,
)
def parameters_round_trip(trial: Trial) -> None:
    """A `state_dict` holds everything: a new mixer that loads it gives the same bits, also in a process with another
    hash seed. So does a mixer that was called with other parameters before, whether the new parameters are loaded or
    written through `.data`."""
    x = trial.tokens()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        with patch("builtins.hash", partial(_salt_hash, hash, trial.case.seed)):
            others = {"loaded parameters": trial.rebuilt()}
        others["parameters of a plain mapping"] = trial.rebuilt()
    # a plain mapping, as from safetensors: torch's own holds versions of modules too
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
    _overwrite_after_use(trial, x)


def _salt_hash(plain: Callable[[Any], int], salt: int, value: Any) -> int:
    """Return a hash as another process might: Python salts the hashes of strings."""
    return plain((salt, value))


def _overwrite_after_use(trial: Trial, x: Tensor) -> None:
    """Overwrite the parameters of a mixer after a call, in evaluation or training mode: the next call must use them."""
    training, loaded = trial.case.seed % 2 == 1, trial.case.seed // 2 % 2 == 1
    used, fresh = (copy.deepcopy(trial.without_dropout()).train(training) for _ in range(2))
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.add_(0.1 * trial.like(parameter))

    def write(source: SequenceMixer) -> None:
        if loaded:
            used.load_state_dict(source.state_dict())
        else:  # through .data, which autograd's version counters do not notice
            for old, new in zip(used.parameters(), source.parameters(), strict=True):
                old.data.copy_(new.data)

    def results(paradigm: Paradigm, mixer: SequenceMixer) -> tuple[Tensor, Any]:
        """Return output and state of a segment and, in evaluation, of a step after it, which may use other caches."""
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
        what = f"{paradigm}, in {'training' if training else 'evaluation'}, parameters "
        what += "loaded" if loaded else "written through .data"
        trial.compare(f"{what} after a call, against a mixer with these parameters from the start", actual, expected, 0)


@check(
    declares("reset_parameters", "`reset_parameters`"),
    use="models built on meta, and sharded training: parameters are uninitialised",
    share=0.04,
    draw=ONCE,
)
def every_parameter_is_initialised(trial: Trial) -> None:
    """`build` fills every parameter and buffer. For a mixer that is built on meta and then given memory,
    `reset_parameters` fills them, from the global generator alone, also in 16 bits."""
    with torch.device(trial.subject.device), torch.random.fork_rng():
        built = trial.config.build(trial.d_model, layer_idx=0, n_layers=1)
    # strict_numerics fills uninitialised memory with NaN
    _require_filled(built, "after build, {} is uninitialised: end __init__ with self.reset_parameters()")
    with torch.device("meta"):
        mixer = trial.config.build(trial.d_model, layer_idx=0, n_layers=1)
    mixer = mixer.to_empty(device=trial.subject.device)
    filled, draws, generator_states = [], _RandomDraws(), list[Tensor]()
    for seed in (0, 0, 1):
        with torch.no_grad(), torch.random.fork_rng():
            for tensor in (*mixer.parameters(), *mixer.buffers()):
                if tensor.is_floating_point():
                    tensor.fill_(torch.nan)
            torch.manual_seed(seed)
            before = {name: id(parameter) for name, parameter in mixer.named_parameters()}
            with draws:
                mixer.reset_parameters()
            generator_states.append(torch.get_rng_state())
            after = {name: id(parameter) for name, parameter in mixer.named_parameters()}
            replaced = ", ".join(name for name, address in after.items() if address != before.get(name, address))
            refilled = "expected reset_parameters to fill the existing parameters"
            require(not replaced, f"{refilled}, got new ones, which an optimizer does not know: {replaced}")
        filled.append({name: tensor.detach().clone() for name, tensor in mixer.named_parameters()})
        _require_filled(mixer, "reset_parameters leaves {} uninitialised")
    reseeded = "reset_parameters leaves the global generator in the same state for every seed"
    require(
        not torch.equal(generator_states[0], generator_states[2]),
        f"{reseeded}: do not seed it, or further layers get the same parameters in every model",
    )
    narrow = copy.deepcopy(mixer).to(torch.bfloat16)  # some matrix decompositions have no 16-bit kernel
    with torch.no_grad(), torch.random.fork_rng():
        narrow.reset_parameters()
    _require_filled(narrow, "in bfloat16 reset_parameters leaves {} uninitialised")
    trial.compare("reset_parameters with the same seed", (filled[1], None), (filled[0], None), 0)
    differ = any(not torch.equal(filled[0][name], filled[2][name]) for name in filled[0])
    require(differ or not draws.random, "reset_parameters gives the same parameters for different seeds")


@check(
    declares("flops", "Declared FLOPs"),
    use="reported FLOPs and MFU: they are wrong",
    remedy="override flops",
    share=0.03,
    draw=Draw(tokens=(1, 20), lists=((64,), (130,)), batch_size=(1, 1), starts=("none", "initial", "read")),
)
def flops_are_as_declared(trial: Trial) -> None:
    """`flops` equals the counted operations, with or without a final state, for a few tokens and for hundreds. It may
    exceed them by the outer products of single tokens, which are elementwise and not counted. Up to millions of tokens
    it grows at least linearly and at most quadratically."""
    x, context = trial.tokens(), 1 + trial.case.seed % 7 if trial.case.start == "read" else 0
    state = trial.mix(trial.tokens(length=context), None)[1] if context else None
    for paradigm in trial.paradigms if state is None else filter(trial.mixer.traits.takes_state, trial.paradigms):
        counted = []
        for return_state in (False, trial.mixer.traits.has_state):
            before = None if state is None else clone(state)
            with torch.no_grad():
                call = partial(trial.mixer, x, before, paradigm=paradigm, return_state=return_state)
                counted.append(count_flops(call))
        state_size = sum(leaf.numel() for leaf in to_dict(trial.initial_state(1)).values())
        declared = trial.mixer.flops(trial.case.length, paradigm, context)
        # a sum over one token, as in a ragged chunk or a new cache, is elementwise in torch.einsum and not counted
        size = {Paradigm.RECURRENT: 1, Paradigm.CHUNKWISE: trial.mixer.chunk_size}.get(paradigm, trial.case.length)
        single_tokens = trial.case.length if size == 1 else trial.case.length % size == 1
        new_cache = 4 * trial.d_model * (single_tokens > 0 and trial.mixer.traits.state == "growing" and not context)
        sentence = f"{paradigm}: flops({trial.case.length}, context={context}) returns {declared:,}, but a call takes"
        sentence += f" {counted[0]:,} operations ({counted[1]:,} with a final state)"
        require(min(counted) <= declared <= max(counted) + max(4 * single_tokens * state_size, new_cache), sentence)
        if trial.case.length == 1 and not trial.case.options:  # once, because flops may loop over millions of chunks
            _require_flops_grow(trial.mixer, paradigm)


def _require_flops_grow(mixer: SequenceMixer, paradigm: Paradigm) -> None:
    """Fail unless twice the tokens take about two to four times the operations, up to 2^22 tokens.

    Such segments are too long to be run and counted. A formula in 32-bit integers overflows there.
    """
    with suppress(SeqmixError), limited_memory():  # the mixer refuses such lengths, or counts pairs with a mask
        counts = [mixer.flops(2**n, paradigm) for n in range(18, 23)]
        for n, (once, twice) in enumerate(itertools.pairwise(counts), start=18):
            sentence = f"{paradigm}: expected flops to be 2 to 4 times as large for twice the tokens"
            require(
                1.9 * once <= twice <= 4.1 * once, f"{sentence}, got {once!r} for 2^{n} and {twice!r} for 2^{n + 1}"
            )


class _RandomDraws(TorchDispatchMode):
    """A dispatch mode whose `random` becomes True if an op draws random numbers, from any generator."""

    random = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.random |= torch.Tag.nondeterministic_seeded in func.tags
        return func(*args, **(kwargs or {}))


def _require_filled(mixer: SequenceMixer, sentence: str) -> None:
    """Fail if a parameter or buffer is not finite; `{}` in the sentence stands for its name."""
    for name, tensor in (*mixer.named_parameters(), *mixer.named_buffers()):
        require(not tensor.is_floating_point() or tensor.isfinite().all(), sentence.format(name))


def _require_built_or_refused(trial: Trial, d_model: int) -> None:
    """Fail if building a mixer of this width raises anything but a `SeqmixError`."""
    try:
        trial.config.build(d_model, layer_idx=0, n_layers=LAYERS)
    except SeqmixError:
        pass
    except Exception as error:
        sentence = f"expected build(d_model={d_model}) to raise a SeqmixError, got {type(error).__name__}: {error}"
        raise CheckFailure(sentence.splitlines()[0]) from error


def _require_refusal(what: str, call: Callable[[], object], word: str = "") -> None:
    """Fail unless a call raises a `ContractError` whose message contains `word`."""
    try:
        call()
    except ContractError as error:
        require(word in str(error), f"{what}: expected an error message with {word!r}, got: {error}")
    except Exception as error:
        text = f"{what}: expected a ContractError, got {type(error).__name__}: {error}"
        raise CheckFailure(text.splitlines()[0]) from error
    else:
        raise CheckFailure(f"{what}: expected a ContractError, got a result")
