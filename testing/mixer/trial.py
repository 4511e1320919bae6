"""What a check does with a mixer on one case."""

from collections.abc import Callable, Mapping
from functools import cached_property, partial
from itertools import accumulate
from typing import Any

import torch
from hypothesis.errors import UnsatisfiedAssumption
from torch import Tensor
from torch.nn.modules.dropout import _DropoutNd

from ...mixers.contract import MixerConfig, SequenceMixer
from ...mixers.state import as_real, clone, is_inexact, map_state, to_dict
from ...ops.runtime.paradigm import Paradigm
from ..compare import EXACT, CheckFailure, Differences
from ..gradients import gradients
from .case import IN_WORDS, Case, Start
from .options import changed
from .subject import Subject, build, reference_paradigm

SegmentCall = Callable[[Tensor, Any], tuple[Tensor, Any]]
"""Gives output and final state of a segment and a state: the mixer, or something that calls it."""

LONGER = 9
"""Tokens by which the prefix of a "moved" constant state is longer."""

SegmentResult = tuple[Tensor | Mapping[str, Tensor] | None, Any]
"""Output, or output and gradients by name, and the final state."""


class Trial:
    """One case of a check: the mixer, and tensors drawn from the case's seed.

    Where the case's options do not go together, the case is not one (hypothesis draws another).
    """

    def __init__(self, subject: Subject, case: Case) -> None:
        self.subject, self.case = subject, case
        self.d_model = subject.wide if case.wide else subject.d_model
        config, mixer = (
            changed(subject.config, dict(case.options)),
            subject.mixer(case.options, case.dtype, case.layer, self.d_model),
        )
        if config is None or mixer is None:
            raise UnsatisfiedAssumption
        self.config: MixerConfig = config
        self.mixer: SequenceMixer = mixer
        self.generator = torch.Generator().manual_seed(case.seed)
        self.prefix = 0
        """Tokens that the latest of `state` has read."""
        self.notes: list[str] = []
        """What a report says of the case that is no failure."""

    @property
    def paradigms(self) -> list[Paradigm]:
        """The paradigms under test, the configured default first."""
        declared = self.mixer.traits.paradigms
        chosen = declared if self.subject.paradigms is None else declared & frozenset(self.subject.paradigms)
        return sorted(chosen, key=lambda p: (p is not self.mixer.paradigm, p))

    @property
    def reference(self) -> Paradigm:
        """The paradigm that others are compared with."""
        return reference_paradigm(self.config)

    def randn(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Normal numbers, drawn in float64 on the CPU: the same on every device."""
        x = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return x.to(self.subject.device, dtype or self.case.dtype)

    def tokens(self, batch_size: int | None = None, length: int | None = None, *, blank: bool = False) -> Tensor:
        """A segment; of the case's size by default. `blank`: about every third token is all zeros."""
        batch_size = self.case.batch_size if batch_size is None else batch_size
        length = self.case.length if length is None else length
        x = self.randn(batch_size, length, self.d_model) * self.case.scale
        if blank:
            x = x * (torch.rand(batch_size, length, 1, generator=self.generator) > 1 / 3).to(x.device)
        return x

    def like(self, x: Tensor) -> Tensor:
        """Normal numbers of this shape and dtype."""
        return self.randn(*x.shape, dtype=x.dtype)

    def state(self, rows: int | None = None, start: Start | None = None) -> Any:
        """What comes before; of the case's kind by default."""
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
        """A state after so many tokens of the case's own scale, or of many `sizes`."""
        x = self.tokens(rows, length)
        if sizes:
            x = x * self.randn(rows, length, 1).exp()
        with torch.no_grad():
            _, state = self.mixer(x, return_state=True)
        return state

    def initial_state(self, rows: int) -> Any:
        """The initial state; None where the mixer has none."""
        return self.mixer.init_state(rows) if self.mixer.traits.has_state else None

    @property
    def use(self) -> str:
        """How the case calls the mixer, in words."""
        return IN_WORDS[self.case.use]

    def boundaries(self, dtype: torch.dtype = torch.int64) -> Tensor | None:
        """`cu_seqlens` of the case's lengths; None of several rows, or without packing."""
        lengths = self.case.lengths
        if self.case.batch_size > 1 or not self.mixer.traits.packing:
            return None
        return torch.tensor([0, *accumulate(lengths)], dtype=dtype, device=self.subject.device)

    def index(self, *rows: int) -> Tensor:
        """Rows of a state, as `select` takes them."""
        return torch.tensor(rows, device=self.subject.device)

    def after(self, paradigm: Paradigm | None) -> Paradigm:
        """This paradigm (None: the default), or the reference where it takes no state."""
        paradigm = paradigm or self.mixer.paradigm
        return paradigm if self.mixer.traits.takes_state(paradigm) else self.reference

    def call(
        self, paradigm: Paradigm | None = None, mixer: Callable[..., Any] | None = None, **options: Any
    ) -> SegmentCall:
        """The mixer as a function of a segment and a state, which a paradigm `after` this one takes."""
        mixed = partial(mixer or self.mixer, **{"return_state": self.mixer.traits.has_state, **options})
        return lambda x, state: mixed(x, state, paradigm=paradigm if state is None else self.after(paradigm))

    def used(self, paradigm: Paradigm | None = None, **options: Any) -> SegmentCall:
        """The mixer as the case uses it, without dropout: see `Use`."""
        return self.call(paradigm, self.mixer_in_use, return_state=self.final_state, **options)

    @property
    def final_state(self) -> bool:
        """True if the case's use wants a final state, and there is one."""
        return self.case.final_state and self.mixer.traits.has_state

    @cached_property
    def mixer_in_use(self) -> SequenceMixer:
        """The mixer in the case's mode, without dropout in training."""
        return self.mixer if self.case.use == "evaluation" else self.without_dropout().train()

    def without_dropout(self) -> SequenceMixer:
        """The mixer with the same parameters, with no dropout in training."""
        none: dict[str, Any] = {n: 0.0 for n, v in self.config if "dropout" in n and isinstance(v, float) and v}
        other = self.rebuilt(**(none if changed(self.config, none) is not None else {}))
        for name, parameter in self.mixer.named_parameters():  # gradients are of the same
            module, _, leaf = name.rpartition(".")
            # as an assignment: modules such as nn.GRU keep lists of their parameters
            setattr(other.get_submodule(module), leaf, parameter)
        for module in other.modules():
            if isinstance(module, _DropoutNd):
                module.p = 0.0
        return other

    def kept(self, call: SegmentCall) -> SegmentCall:
        """A call whose final state is left out where states grow: they may hold a row's tokens in more room than it
        needs alone."""

        def mixed(x: Tensor, state: Any) -> tuple[Tensor, Any]:
            y, after = call(x, state)
            return y, after if self.mixer.traits.state == "constant" else None

        return mixed

    def mix(self, x: Tensor, state: Any, mixer: Callable[..., Any] | None = None, **options: Any) -> tuple[Tensor, Any]:
        """Output and final state without grad, where a state given may be consumed."""
        with torch.no_grad():
            return self.call(mixer=mixer, **options)(x, None if state is None else clone(state))

    def in_pieces(self, *calls: SegmentCall) -> SegmentCall:
        """Consecutive pieces of a segment, as long as the case's lengths: each by its own call, or all by one."""

        def call(x: Tensor, state: Any) -> tuple[Tensor, Any]:
            outputs, each = [], calls * len(self.case.lengths) if len(calls) == 1 else calls
            for piece, mixer in zip(x.split(self.case.lengths, dim=1), each, strict=True):
                y, state = mixer(piece, state)
                outputs.append(y)
            return torch.cat(outputs, dim=1), state

        return call

    def decode(self, x: Tensor, state: Any, step: SegmentCall | None = None) -> tuple[Tensor, Any]:
        """Output and final state token by token, without grad; the state given may be consumed."""
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
        """Output and gradients by name, and the final state: of these, what the case's use gives.

        Args:
            call: what is differentiated.
            x: the segment.
            state: what comes before.
            mixer: whose parameters; the case's by default.
            zeros: by name of a result, where the gradient from above is zero as well; the result itself by default.
            used: whether the call is one that the case's use makes, whose tokens may want no gradient.
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
        found = gradients(results, self._above(zeros or results), leaves)
        named = {f"the gradient of {name}": as_real(gradient) for name, gradient in found.items()}
        return {"the output": y.detach(), **named}, None if after is None else map_state(Tensor.detach, after)

    def _above(self, results: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Gradients from above, the same in every dtype; zero where a result is, as in the empty slots of a cache."""
        generator, above = torch.Generator().manual_seed(self.case.seed + 1), {}
        for name, result in results.items():
            noise = torch.randn(result.shape, generator=generator, dtype=torch.float64).to(self.case.dtype)
            above[name] = noise.to(result.device) * (result.detach() != 0)
        return above

    def sensitivity(
        self, call: SegmentCall, x: Tensor, state: Any, results: tuple[dict[str, Tensor], Any]
    ) -> dict[str, float]:
        """How far outputs, gradients and state move, by name, where tokens move by 1e-10 of themselves: large numbers
        cancel, and what is left is as far off in any order of computing it."""
        moved, after = self.differentiate(call, x * (1 + 1e-10 * self.like(x)), state)
        pairs = {name: (moved[name], result) for name, result in results[0].items()}
        leaves = float_leaves(after)
        pairs |= {f"the final state's {n}": (leaves[n], leaf) for n, leaf in float_leaves(results[1]).items()}
        return {name: 10 * (one - other).abs().max().item() for name, (one, other) in pairs.items() if one.numel()}

    def rebuilt(self, dtype: torch.dtype | None = None, **options: Any) -> SequenceMixer:
        """The same parameters in a mixer of other options or dtype."""
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
        """What a cast has rounded in buffers (decays, say, which every dtype has in float32) is a mixer's error."""
        unrounded = self.subject.mixer(self.case.options, torch.float64, self.case.layer, self.d_model)
        cast, given = dict(self.mixer.named_buffers()), dict(unrounded.named_buffers() if unrounded is not None else ())
        # a call may register some
        for name, buffer in exact.named_buffers():
            rounded, wide = cast.get(name), given.get(name)
            if rounded is not None and wide is not None and buffer.is_floating_point() and wide.shape == buffer.shape:
                buffer.copy_(wide if torch.equal(wide.to(rounded.dtype), rounded) else buffer)

    def differences(self, what: str, tolerance: float = EXACT, slack: Mapping[str, float] | None = None) -> Differences:
        """A comparison: a context manager that fails at its end if something differed."""
        return Differences(what, tolerance, slack)

    def compare(
        self,
        what: str,
        actual: SegmentResult,
        expected: SegmentResult,
        tolerance: float = EXACT,
        slack: Mapping[str, float] | None = None,
    ) -> None:
        """Outputs and final state of the one against the other's: as `mix` gives them, or `differentiate`."""
        with self.differences(what, tolerance, slack) as differences:
            if actual[0] is not None and expected[0] is not None:
                differences.tensors(
                    *({"the output": y} if isinstance(y, Tensor) else y for y in (actual[0], expected[0]))
                )
            differences.state("the final state", actual[1], expected[1])


def leaves_of(state: Any) -> dict[str, Tensor]:
    """The leaves of a state by name, themselves: those of `to_dict` may be copies, which have no gradient."""
    leaves: list[Tensor] = []
    map_state(lambda leaf: leaves.append(leaf) or leaf, state)
    return dict(zip(to_dict(state), leaves, strict=True))


def float_leaves(state: Any) -> dict[str, Tensor]:
    """The leaves of a state that have gradients."""
    return {name: leaf for name, leaf in leaves_of(state or ()).items() if is_inexact(leaf)}


def named_leaves(whose: str, state: Any) -> dict[str, Tensor]:
    """The same, by name in a report."""
    return {f"{whose} {name}": leaf for name, leaf in float_leaves(state).items()}


def named_results(y: Tensor, after: Any) -> dict[str, Tensor]:
    """Output and float leaves of the final state, by name in a report."""
    return {"the output": y} | {name: as_real(leaf) for name, leaf in named_leaves("the final state's", after).items()}


def as_leaves(state: Any) -> Any:
    """The state as leaves of a new graph."""
    return None if state is None else map_state(lambda x: x.detach().requires_grad_(is_inexact(x)), state)


def learnable(mixer: SequenceMixer) -> dict[str, Tensor]:
    """The parameters that are not frozen."""
    return {name: parameter for name, parameter in mixer.named_parameters() if parameter.requires_grad}


def late_start(mixer: SequenceMixer, rows: int, start: int) -> Any:
    """The initial state, at a later position."""
    return mixer.shift_state(mixer.init_state(rows), start)
