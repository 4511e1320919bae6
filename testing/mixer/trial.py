"""Operations that a check uses on one case: draw tensors, call the mixer, differentiate, compare."""

import warnings
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from itertools import accumulate
from typing import Any

import torch
from hypothesis.errors import UnsatisfiedAssumption
from torch import Tensor
from torch.nn.modules.dropout import _DropoutNd

from ...mixers.base.contract import MixerConfig, SequenceMixer
from ...mixers.base.state import as_real, clone, is_inexact, map_state, to_dict
from ...ops.runtime.paradigm import Paradigm
from ..compare import EXACT, CheckFailure, Differences
from ..gradients import gradients
from .case import USES_IN_WORDS, Case, Start
from .options import changed
from .subject import Subject, build, reference_paradigm

SegmentCall = Callable[[Tensor, Any], tuple[Tensor, Any]]
"""Function of a segment and a state that returns output and final state: the mixer, or one that calls it."""

LONGER = 9
"""Number of additional tokens in the prefix of a "moved" state, if the state is constant."""

SegmentResult = tuple[Tensor | Mapping[str, Tensor] | None, Any]
"""Pair of output (or output and gradients by name) and final state."""


class Trial:
    """A case of a check: the mixer, and tensors drawn from the case's seed.

    If the configuration refuses the case's options, hypothesis draws another case.
    """

    def __init__(self, subject: Subject, case: Case) -> None:
        self.subject, self.case = subject, case
        self.d_model = subject.wide_d_model if case.wide else subject.d_model
        config = changed(subject.config, dict(case.options))
        mixer = subject.mixer(case.options, case.dtype, case.layer, self.d_model)
        if config is None or mixer is None:
            raise UnsatisfiedAssumption
        self.config: MixerConfig = config
        self.mixer: SequenceMixer = mixer
        self.generator = torch.Generator().manual_seed(case.seed)
        self.prefix = 0
        """Number of tokens before the state that `state` returned last."""
        self.notes: list[str] = []
        """Warnings about the case for the report; they are not failures."""

    @property
    def paradigms(self) -> list[Paradigm]:
        """Paradigms under test, the configured default first."""
        declared = self.mixer.traits.paradigms
        chosen = declared if self.subject.paradigms is None else declared & frozenset(self.subject.paradigms)
        return sorted(chosen, key=lambda p: (p is not self.mixer.paradigm, p))

    @property
    def reference(self) -> Paradigm:
        """Paradigm that others are compared with."""
        return reference_paradigm(self.config)

    def randn(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Return normal numbers, drawn in float64 on the CPU, so that they are the same on every device."""
        x = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return x.to(self.subject.device, dtype or self.case.dtype)

    def tokens(self, batch_size: int | None = None, length: int | None = None, *, blank: bool = False) -> Tensor:
        """Return a segment [B T D] of random tokens.

        Args:
            batch_size: number of sequences; by default the case's.
            length: number of tokens; by default the case's.
            blank: True to make about every third token all zeros.
        """
        batch_size = self.case.batch_size if batch_size is None else batch_size
        length = self.case.length if length is None else length
        x = self.randn(batch_size, length, self.d_model) * self.case.scale
        if blank:
            x = x * (torch.rand(batch_size, length, 1, generator=self.generator) > 1 / 3).to(x.device)
        return x

    def like(self, x: Tensor) -> Tensor:
        """Return normal numbers of a tensor's shape and dtype."""
        return self.randn(*x.shape, dtype=x.dtype)

    def state(self, rows: int | None = None, start: Start | None = None) -> Any:
        """Return a state before the segment.

        Args:
            rows: number of sequences; by default the case's batch size.
            start: kind of the state; by default the case's.
        """
        rows = self.case.batch_size if rows is None else rows
        start = self.case.start if start is None else start
        if start == "none":
            return None
        if start == "initial":
            return self.mixer.init_state(rows)
        self.prefix = int(torch.randint(1, 8, (), generator=self.generator))
        if start == "moved" and self.mixer.traits.state == "constant":
            self.prefix += LONGER
        return self.state_after(self.prefix, rows, sizes=start == "moved")

    def state_after(self, length: int, rows: int, *, sizes: bool = False) -> Any:
        """Return the state after random tokens.

        Args:
            length: number of tokens.
            rows: number of sequences.
            sizes: True to multiply every token by a random factor.
        """
        x = self.tokens(rows, length)
        if sizes:
            x = x * self.randn(rows, length, 1).exp()
        with torch.no_grad():
            _, state = self.mixer(x, return_state=True)
        return state

    def initial_state(self, rows: int) -> Any:
        """Return the initial state; None if the mixer has no state."""
        return self.mixer.init_state(rows) if self.mixer.traits.has_state else None

    @property
    def use(self) -> str:
        """Way in which the case calls the mixer, in words, such as "training without a final state"."""
        return USES_IN_WORDS[self.case.use]

    def boundaries(self, dtype: torch.dtype = torch.int64) -> Tensor | None:
        """Return `cu_seqlens` for the case's lengths; None if the batch has several rows, or the mixer cannot pack."""
        lengths = self.case.lengths
        if self.case.batch_size > 1 or not self.mixer.traits.packing:
            return None
        return torch.tensor([0, *accumulate(lengths)], dtype=dtype, device=self.subject.device)

    def index(self, *rows: int) -> Tensor:
        """Return row numbers as an index tensor for `select`."""
        return torch.tensor(rows, device=self.subject.device)

    def after(self, paradigm: Paradigm | None) -> Paradigm:
        """Return the paradigm for a call from a state: `paradigm`, or the reference if `paradigm` takes no state.

        None stands for the mixer's default paradigm.
        """
        paradigm = paradigm or self.mixer.paradigm
        return paradigm if self.mixer.traits.takes_state(paradigm) else self.reference

    def call(
        self, paradigm: Paradigm | None = None, mixer: Callable[..., Any] | None = None, **options: Any
    ) -> SegmentCall:
        """Return the mixer as a function of a segment and a state.

        Args:
            paradigm: paradigm to compute in; if it takes no state, a segment after a state uses the reference.
            mixer: mixer to call; by default the case's.
            options: further arguments of the mixer; by default the final state is returned if there is one.
        """
        mixed = partial(mixer or self.mixer, **{"return_state": self.mixer.traits.has_state, **options})
        return lambda x, state: mixed(x, state, paradigm=paradigm if state is None else self.after(paradigm))

    def used(self, paradigm: Paradigm | None = None, **options: Any) -> SegmentCall:
        """Return the mixer as a function of a segment and a state, called as the case's use says, without dropout."""
        return self.call(paradigm, self.mixer_in_use, return_state=self.final_state, **options)

    @property
    def final_state(self) -> bool:
        """True if the case's use asks for a final state and the mixer has one."""
        return self.case.final_state and self.mixer.traits.has_state

    @cached_property
    def mixer_in_use(self) -> SequenceMixer:
        """Mixer in the mode of the case's use, training or evaluation, without dropout."""
        return self.mixer if self.case.use == "evaluation" else self.without_dropout().train()

    def without_dropout(self) -> SequenceMixer:
        """Return a mixer that shares the parameters and has no dropout in training."""
        zeros: dict[str, Any] = {n: 0.0 for n, v in self.config if "dropout" in n and isinstance(v, float) and v}
        other = self.rebuilt(**(zeros if changed(self.config, zeros) is not None else {}))
        for name, parameter in self.mixer.named_parameters():  # share them, so that gradients can be compared
            module, _, leaf = name.rpartition(".")
            # set the attribute, so that modules such as nn.GRU also update their own list of parameters
            setattr(other.get_submodule(module), leaf, parameter)
        for module in other.modules():
            if isinstance(module, _DropoutNd):
                module.p = 0.0
        return other

    def without_growing_state(self, call: SegmentCall) -> SegmentCall:
        """Return a call like `call` that gives None as its final state if the state grows.

        Growing states cannot be compared here: that of several rows may have more room than that of one row.
        """

        def mixed(x: Tensor, state: Any) -> tuple[Tensor, Any]:
            y, after = call(x, state)
            return y, after if self.mixer.traits.state == "constant" else None

        return mixed

    def kept(self, call: SegmentCall) -> SegmentCall:
        """Deprecated name of `without_growing_state`; it will be removed in 0.4."""
        warnings.warn("Trial.kept is now Trial.without_growing_state", DeprecationWarning, stacklevel=2)
        return self.without_growing_state(call)

    def mix(self, x: Tensor, state: Any, mixer: Callable[..., Any] | None = None, **options: Any) -> tuple[Tensor, Any]:
        """Return output and final state without gradients.

        The state is cloned first, because the call may write into it.
        """
        with torch.no_grad():
            return self.call(mixer=mixer, **options)(x, None if state is None else clone(state))

    def in_pieces(self, *calls: SegmentCall) -> SegmentCall:
        """Return a call that processes a segment as consecutive pieces of the case's lengths.

        Args:
            calls: the call of each piece, or one call for all of them.
        """

        def call(x: Tensor, state: Any) -> tuple[Tensor, Any]:
            outputs = []
            piece_calls = calls * len(self.case.lengths) if len(calls) == 1 else calls
            for piece, piece_call in zip(x.split(self.case.lengths, dim=1), piece_calls, strict=True):
                y, state = piece_call(piece, state)
                outputs.append(y)
            return torch.cat(outputs, dim=1), state

        return call

    def decode(self, x: Tensor, state: Any, step: SegmentCall | None = None) -> tuple[Tensor, Any]:
        """Return output and final state, computed token by token without gradients.

        Args:
            x: tokens.
            state: state before them, which the first step may write into.
            step: call for one token; by default the mixer's `step`.
        """
        outputs = []
        with torch.no_grad():
            for token in x.split(1, dim=1):
                y, state = (step or self.mixer.step)(token, state)
                outputs.append(y)
        return torch.cat(outputs, dim=1), state

    def differentiate(
        self,
        call: SegmentCall,
        x: Tensor,
        state: Any,
        *,
        mixer: SequenceMixer | None = None,
        zeros: Mapping[str, Tensor] | None = None,
        used: bool = False,
    ) -> tuple[dict[str, Tensor], Any]:
        """Return output and gradients by name, and the final state if the case's use asks for one.

        Upstream gradients are random, and the same for every call of a case.

        Args:
            call: the function to differentiate.
            x: the segment.
            state: state before the segment.
            mixer: mixer that has the parameters to compute gradients of; by default the case's.
            zeros: tensors by name of a result; where a tensor is zero, the upstream gradient of that result is zero
                too. By default the results themselves.
            used: True if the call is made as the case's use says, so that the tokens may need no gradient.
        """
        if not self.mixer.traits.differentiable:
            with torch.no_grad():
                y, after = call(x, state if state is None else clone(state))
            return {"the output": y}, after if self.final_state else None
        frozen = self.case.use == "frozen"
        x, state = x.detach().requires_grad_(not (used and frozen)), as_leaves(state)
        y, after = call(x, state)
        after = after if self.final_state else None
        results = named_results(y, after)
        leaves = {} if frozen else {"the input": x}
        leaves |= {**named_leaves("the state's", state), **learnable(mixer or self.mixer)}
        computed = gradients(results, self._upstream(zeros or results), leaves)
        named = {f"the gradient of {name}": as_real(gradient) for name, gradient in computed.items()}
        return {"the output": y.detach(), **named}, None if after is None else map_state(Tensor.detach, after)

    def _upstream(self, results: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return random upstream gradients, zero where a result is zero, as in the empty slots of a cache."""
        generator, upstream = torch.Generator().manual_seed(self.case.seed + 1), {}
        for name, result in results.items():
            noise = torch.randn(result.shape, generator=generator, dtype=torch.float64).to(self.case.dtype)
            upstream[name] = noise.to(result.device) * (result.detach() != 0)
        return upstream

    def sensitivity(
        self, call: SegmentCall, x: Tensor, state: Any, results: tuple[dict[str, Tensor], Any]
    ) -> dict[str, float]:
        """Return the error to allow where large numbers cancel, by name of the result.

        It is 10 times the change of the result that a small perturbation causes.

        The perturbation changes each number of the tokens by about 1e-10 of itself. Another order of computation may
        change results as much.

        Args:
            call: the function that gave the results.
            x: the segment.
            state: state before the segment.
            results: output and gradients by name, and final state, without the perturbation.
        """
        perturbed, after = self.differentiate(call, x * (1 + 1e-10 * self.like(x)), state)
        pairs = {name: (perturbed[name], result) for name, result in results[0].items()}
        leaves = float_leaves(after)
        pairs |= {f"the final state's {n}": (leaves[n], leaf) for n, leaf in float_leaves(results[1]).items()}
        return {name: 10 * (x - y).abs().max().item() for name, (x, y) in pairs.items() if x.numel()}

    def rebuilt(self, dtype: torch.dtype | None = None, **options: Any) -> SequenceMixer:
        """Return a new mixer with the same parameters and other options or dtype.

        Raises:
            CheckFailure: the configuration refuses the options.
        """
        config = changed(self.config, options)
        if config is None:
            refused = ", ".join(f"{name}={value}" for name, value in options.items())
            declared = ", which its traits declare" if options.keys() == {"paradigm"} else ""
            raise CheckFailure(f"the configuration refuses {refused}{declared}")
        other = build(config, self.d_model, self.case.layer)
        other = other.to(self.subject.device, dtype or self.case.dtype).eval()
        other.load_state_dict(self.mixer.state_dict())
        if dtype == torch.float64 and self.case.dtype != dtype and not options:
            self._restore_constants(other)
        return other

    def _restore_constants(self, exact: SequenceMixer) -> None:
        """Give the exact mixer the float64 values of its buffers.

        A buffer, such as a decay, should stay float32 in a mixer of any dtype. If a cast rounds it, the comparison with
        the exact values fails.
        """
        unrounded = self.subject.mixer(self.case.options, torch.float64, self.case.layer, self.d_model)
        cast_buffers = dict(self.mixer.named_buffers())
        wide_buffers = dict(unrounded.named_buffers() if unrounded is not None else ())
        for name, buffer in exact.named_buffers():
            # a buffer may be missing here: a call may have registered it
            rounded, wide = cast_buffers.get(name), wide_buffers.get(name)
            if rounded is not None and wide is not None and buffer.is_floating_point() and wide.shape == buffer.shape:
                buffer.copy_(wide if torch.equal(wide.to(rounded.dtype), rounded) else buffer)

    def differences(self, what: str, tolerance: float = EXACT, slack: Mapping[str, float] | None = None) -> Differences:
        """Return a context manager that collects comparisons, and fails at its end if anything differs.

        Args:
            what: the comparison in words.
            tolerance: allowed difference, both relative and absolute; 0 requires equal bits.
            slack: further absolute difference allowed, by name of a tensor.
        """
        return Differences(what, tolerance, slack)

    def compare(
        self,
        what: str,
        actual: SegmentResult,
        expected: SegmentResult,
        tolerance: float = EXACT,
        slack: Mapping[str, float] | None = None,
    ) -> None:
        """Compare two results of `mix` or `differentiate`: outputs, gradients, and final state.

        Args:
            what: the comparison in words.
            actual: the result under test.
            expected: the result that it should equal; an output of None is not compared.
            tolerance: allowed difference, both relative and absolute; 0 requires equal bits.
            slack: further absolute difference allowed, by name of a tensor.

        Raises:
            CheckFailure: something differs.
        """
        with self.differences(what, tolerance, slack) as differences:
            if actual[0] is not None and expected[0] is not None:
                differences.tensors(
                    *({"the output": y} if isinstance(y, Tensor) else y for y in (actual[0], expected[0]))
                )
            differences.state("the final state", actual[1], expected[1])


def leaves_of(state: Any) -> dict[str, Tensor]:
    """Return the leaves of a state by name: the tensors themselves, whereas `to_dict` may return copies."""
    leaves: list[Tensor] = []
    map_state(lambda leaf: leaves.append(leaf) or leaf, state)
    return dict(zip(to_dict(state), leaves, strict=True))


def float_leaves(state: Any) -> dict[str, Tensor]:
    """Return the float and complex leaves of a state by name: those that can have gradients."""
    return {name: leaf for name, leaf in leaves_of(state or ()).items() if is_inexact(leaf)}


def named_leaves(whose: str, state: Any) -> dict[str, Tensor]:
    """Return the float and complex leaves of a state, named as in a report: "the state's memory".

    Args:
        whose: the beginning of the names, such as "the state's".
        state: the state, or None.
    """
    return {f"{whose} {name}": leaf for name, leaf in float_leaves(state).items()}


def named_results(y: Tensor, after: Any) -> dict[str, Tensor]:
    """Return the output and the float leaves of the final state, named as in a report."""
    return {"the output": y} | {name: as_real(leaf) for name, leaf in named_leaves("the final state's", after).items()}


def as_leaves(state: Any) -> Any:
    """Return the state as leaves of a new graph; None for None."""
    return None if state is None else map_state(lambda x: x.detach().requires_grad_(is_inexact(x)), state)


def learnable(mixer: SequenceMixer) -> dict[str, Tensor]:
    """Return the parameters that are not frozen, by name."""
    return {name: parameter for name, parameter in mixer.named_parameters() if parameter.requires_grad}


def late_start(mixer: SequenceMixer, rows: int, start: int) -> Any:
    """Return the initial state of `rows` sequences, shifted to the position `start`."""
    return mixer.shift_state(mixer.init_state(rows), start)
