"""A case of a kernel check: a reproducible description of one call, and its definition in float64.

Tensors are functions of the case's seed and are passed by name. The leaves of a state have the same names among inputs,
where they are the initial state, and among outputs, where they are the final state. Each op family has its own class of
cases: families.py, softmax.py.
"""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
from hypothesis import strategies as st
from torch import Tensor

from ...ops.runtime.kernel import Kernel, Probe
from ..compare import require
from ..engine.shrink import fewer
from ..engine.source import WrittenCase
from ..gradients import gradients
from .fixed import FIXED, Fields, endings
from .layout import LAYOUTS, Layout, laid_out, laid_out_heads, spread
from .sizes import CHUNK_SIZES, DTYPES, HEADS, LARGE, LENGTHS, LONG, MANY, RARE, WIDTHS, Rare, lengths_by_chunks

Tensors = dict[str, Tensor]

SEGMENT = {"output": "BTHV", "q": "BTHK", "k": "BTHK", "v": "BTHV"}
"""Dimensions of the tensors that every op has: B batch, T tokens, H heads, K key width, V value width."""

PROBED = ("dtype", "key_width", "value_width", "log_decay", "wide_output", "packed", "initial_state", "final_state")
"""Names of the fields that cases and probes have in common."""


class Exact(NamedTuple):
    """Exact results of a case, by the definition in float64.

    The `_terms` are error scales: an element is a sum of terms, and its scale is the sum of their absolute values.
    """

    outputs: Tensors
    gradients: Tensors
    outputs_terms: Tensors
    gradients_terms: Tensors


def supports(kernel: Kernel, probe: Probe) -> bool:
    """Return True if the kernel supports the calls that the probe describes."""
    return not kernel.unsupported(probe)


class Drawn(NamedTuple):
    """First draws for a case of any op; `KernelCase.details` then draws the fields that only one op has."""

    draw: Callable[..., Any]
    """Function that draws from a strategy of hypothesis."""
    probe: Probe
    """Features that a kernel needs to run the case."""
    common: Mapping[str, Any]
    """Drawn values of the fields that cases of all ops have."""
    heads: st.SearchStrategy[int]
    """Strategy for the number of heads."""


@dataclass(frozen=True, kw_only=True)
class KernelDraw:
    """Settings for the cases that a kernel check draws."""

    runs_on: Callable[[Kernel, Probe], bool] = supports
    """Returns True if the check runs a kernel on the calls that a probe describes."""
    tokens: st.SearchStrategy[int] = LENGTHS
    """Strategy for the lengths of rows and documents."""
    cut: bool = False
    """True if the check cuts rows and documents in two."""
    rare: bool = False
    """True if a few cases have unusual sizes (see `Rare`)."""
    fixed: bool = False
    """True if the fixed cases run after the drawn ones."""


@dataclass(frozen=True, kw_only=True, repr=False)
class KernelCase(WrittenCase, ABC):
    """Description of one call of a kernel."""

    dtype: torch.dtype = torch.float64
    """Dtype of queries, keys and values."""
    lengths: tuple[int, ...] = (1,)
    """Number of tokens of each row of the batch, all equal; or of each packed document, which may be empty."""
    packed: bool = False
    """True if documents are packed into one row."""
    n_heads: int = 1
    """Number of query heads."""
    key_width: int = 1
    """Width K of queries and keys."""
    value_width: int = 1
    """Width V of values."""
    log_decay: str | None = None
    """Dimensions of the log-decays, such as "B T H"; None without log-decays."""
    wide_output: bool = False
    """True if the output of 16-bit inputs is float32."""
    initial_state: bool = False
    """True if the call starts from a state."""
    final_state: bool = False
    """True if the call returns the final state."""
    grad: tuple[str, ...] = ()
    """Inputs whose gradients are computed; if empty, grad mode is off."""
    upstream: Literal["both", "output", "state"] = "both"
    """Results that receive an upstream gradient: the output, the final state, or both."""
    layout: Layout = "contiguous"
    """Memory layout of the tensors."""
    sizes: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """Numbers by which the random queries, keys and values are multiplied."""
    scale: float | None = None
    """Scale of the output (softmax: of the scores); None for the op's default, K^-0.5."""
    chunk_size: int = 4
    """Chunk length in tokens."""
    cu_seqlens_dtype: torch.dtype = torch.int64
    """Dtype of the document boundaries."""
    cuts: tuple[int, ...] = ()
    """Number of tokens of each row or document before the cut, for a check that cuts in two."""
    seed: int = 0
    """Seed of the tensors."""

    decays: ClassVar[tuple[str | None, ...]]
    """Kinds of log-decays that the op supports, by their dimensions; None for no log-decays."""
    wide_outputs: ClassVar[tuple[bool, ...]] = (False,)
    """Values of `wide_output` that the op supports."""
    windows: ClassVar[tuple[bool, ...]] = (False,)
    """(False, True) if the op has calls with a window and without; (False,) if it has no windows."""
    score_options: ClassVar[tuple[tuple[str, ...], ...]] = ((),)
    """Arguments that change attention scores: the combinations to try, by name; an empty one is a call without any."""
    extras: ClassVar[tuple[str, ...]] = ()
    """Inputs with gradients other than queries, keys, values, log-decays and states."""
    axes: ClassVar[Mapping[str, str]]
    """Dimensions of each float tensor; the first dimension of a state's leaf is N, its rows."""
    state: ClassVar[tuple[str, ...]]
    """Names of the leaves of a state."""
    per_row: ClassVar[tuple[str, ...]] = ("lengths", "cuts")
    """Fields with one item per row or document."""
    reset_together: ClassVar[tuple[tuple[str, ...], ...]] = (("final_state", "upstream"),)
    """Groups of fields that have to be reset to their defaults together when a failing case is simplified."""
    fixed: ClassVar[tuple[Fields, ...]] = FIXED
    """Fixed cases of the op, each as a mapping of its fields."""
    state_is_sum: ClassVar[bool]
    """True if a state is a sum over tokens, in which rounding errors accumulate; False if it stores the tokens."""

    # ---- drawing cases

    @classmethod
    def probes(cls, device: torch.device, widths: Sequence[tuple[int, int]] = WIDTHS) -> Iterator[Probe]:
        """Yield one probe for each kind of call that the op has, the simplest first."""
        names = (*PROBED, "window", "scores", "needs_grad")
        flags = itertools.product((False, True), repeat=3)
        kinds = itertools.product(
            DTYPES, widths, cls.decays, cls.wide_outputs, flags, cls.windows, cls.score_options, (False, True)
        )
        for dtype, pair, log_decay, wider, states, window, scores, needs_grad in kinds:
            if not (needs_grad and dtype == torch.int64) and not (wider and dtype.itemsize > 2):
                values: tuple[Any, ...] = (dtype, *pair, log_decay, wider, *states, window, scores, needs_grad)
                yield Probe(device=device, **dict(zip(names, values, strict=True)))

    @classmethod
    def cases(cls, probes: Sequence[Probe], wide: Sequence[Probe], settings: KernelDraw) -> st.SearchStrategy[Self]:
        """Return a strategy that draws cases for a check.

        Args:
            probes: kinds of calls in usual sizes.
            wide: kinds of calls with wide keys or values.
            settings: what the check wants to draw.
        """
        probes = probes or wide
        with_both_states = [probe for probe in probes if probe.initial_state and probe.final_state] or probes
        # every other case has both states: most bugs are there
        usual = st.sampled_from(probes) | st.sampled_from(with_both_states)
        rarely, widely = st.sampled_from(RARE if settings.rare else [None]), st.sampled_from(wide or probes)
        few = settings.tokens.map(lambda length: min(length, 9))
        tokens: dict[Rare | None, st.SearchStrategy[int]] = {None: settings.tokens, "heads": few, "rows": few}
        tokens |= {"wide": settings.tokens.map(lambda length: min(length, 33)), "chunks": LONG}
        documents = {rare: st.lists(st.just(0) | length, min_size=1, max_size=4) for rare, length in tokens.items()}
        documents |= {"rows": st.lists(st.just(0) | few, min_size=5, max_size=20)}
        documents |= {"chunks": st.lists(st.just(0) | LONG, min_size=1, max_size=3)}
        rows = {rare: MANY if rare == "rows" else st.integers(1, 2) for rare in tokens}
        heads = dict.fromkeys(tokens, HEADS) | {"heads": MANY, "wide": st.integers(1, 2)}

        @st.composite
        def case(draw: Callable[..., Any]) -> Self:
            rare: Rare | None = draw(rarely)
            probe = draw(widely if rare == "wide" else usual)
            chunk_size = LARGE if rare == "chunks" else draw(CHUNK_SIZES)
            length, several = tokens[rare], documents[rare]
            if rare is None and settings.tokens is LENGTHS:
                length = lengths_by_chunks(chunk_size)
                several = st.lists(st.just(0) | length, min_size=1, max_size=4)
            lengths = draw(several.filter(sum)) if probe.packed else [draw(length)] * draw(rows[rare])
            cuts = [
                draw(st.integers(0, length)) for length in (lengths if probe.packed else lengths[:1]) if settings.cut
            ]
            leaves = cls.leaves_of_probe(probe)
            one = st.sampled_from(leaves)
            some = st.lists(one, min_size=1, unique=True)
            all_but_one = one.map(lambda name: [other for other in leaves if other != name])
            common: dict[str, Any] = {
                **{name: getattr(probe, name) for name in PROBED},
                "lengths": tuple(lengths),
                "grad": tuple(draw(st.just(leaves) | some | one.map(lambda name: [name]) | all_but_one))
                if probe.needs_grad
                else (),
                "upstream": draw(st.sampled_from(["both", "output", "state"])) if probe.final_state else "both",
                "layout": draw(st.sampled_from(LAYOUTS)),
                "scale": draw(st.sampled_from([None, 0.7])),
                "chunk_size": chunk_size,
                "cu_seqlens_dtype": draw(st.sampled_from([torch.int64, torch.int32])),
                "cuts": tuple(cuts if probe.packed else cuts * len(lengths)),
                "seed": draw(st.integers(0, 2**16)),
            }
            return cls(**(common | cls.details(Drawn(draw, probe, common, heads[rare]))))

        return case()

    @classmethod
    def fixed_cases(
        cls, probes: Sequence[Probe], runs_on: Callable[[Probe], bool], settings: KernelDraw
    ) -> "list[KernelCase]":
        """Return the fixed cases of a check, in the dtype of the first probe unless a case has its own.

        Fields that a fixed case does not set come from the probes; successive cases use different probes.
        """
        cases: list[KernelCase] = []
        leaves_by_decay = {
            kind: cls.leaves_of_probe(replace(probes[0], log_decay=kind, initial_state=True)) for kind in cls.decays
        }
        fixed = [*cls.fixed, *endings(cls.decays, leaves_by_decay.__getitem__)] if settings.fixed else []
        narrow = dict.fromkeys(replace(probe, key_width=1, value_width=1) for probe in probes)
        for number, fields in enumerate(fixed):
            values = {"packed": False, "dtype": probes[0].dtype, **fields}
            needs_grad = values.pop("needs_grad", None)
            if needs_grad is not None and settings.cut:
                continue
            required = {name: values[name] for name in PROBED if name in values and "width" not in name}
            if "window" in values:
                required["window"] = values["window"] is not None
            if "scores" in values:
                required["scores"] = values["scores"]
            if needs_grad is not None:
                required["needs_grad"] = needs_grad
            sizes = {name: fields[name] for name in ("key_width", "value_width")}
            fitting = (p for p in narrow if all(getattr(p, name) == value for name, value in required.items()))
            possible = [probe for p in fitting if runs_on(probe := replace(p, **sizes))]
            possible = [probe for probe in possible if probe.initial_state and probe.final_state] or possible
            if possible:
                probe = possible[-1 - number % len(possible)]
                values |= {name: getattr(probe, name) for name in PROBED}
                values["cuts"] = tuple(length - length // 2 for length in fields["lengths"]) if settings.cut else ()
                values["grad"] = tuple(values.get("grad", cls.leaves_of_probe(probe))) if probe.needs_grad else ()
                cases.append(cls(**values).with_details(probe))
        return cases

    def with_details(self, probe: Probe) -> "KernelCase":
        """Return this fixed case with values for the fields that only its op has."""
        del probe
        return self

    @classmethod
    def leaves_of_probe(cls, probe: Probe) -> list[str]:
        """Return the names of the inputs that can have gradients."""
        state = cls.float_state() if probe.initial_state else ()
        return [*"qkv", *cls.extras, *(["log_decay"] if probe.log_decay else []), *state]

    @classmethod
    @abstractmethod
    def details(cls, drawn: Drawn) -> dict[str, Any]:
        """Draw the fields that only this op has; the result may also replace common fields."""

    def simpler(self) -> Iterator[Self]:
        """Yield cases that are simpler in one respect, of the same dtype; a kernel may not support all of them."""
        rows, defaults = range(len(self.lengths)), vars(type(self)())
        size = len(rows) // 2
        while size:  # drop halves first: dropping documents one by one would take too many attempts
            for i in rows[::size]:
                per_row = {name: value for name in self.per_row if (value := getattr(self, name))}
                rest = {name: value[:i] + value[i + size :] for name, value in per_row.items()}
                if any(rest["lengths"]):
                    yield replace(self, **rest)
            size //= 2
        for shortened in ([i] for i in rows) if self.packed else [rows]:
            for short in fewer(self.lengths[shortened[0]], 0 if self.packed else 1):
                lengths = tuple(short if i in shortened else length for i, length in enumerate(self.lengths))
                if any(lengths):
                    yield replace(self, lengths=lengths, cuts=tuple(map(min, self.cuts, lengths)))
        if len(rows) == 1:
            yield replace(self, packed=False)
        for most in fewer(max(self.cuts, default=0), 0):
            yield replace(self, cuts=tuple(min(cut, most) for cut in self.cuts))
        fixed = {"dtype", "packed", "grad", *self.per_row, *itertools.chain(*self.reset_together)}
        for names in (*self.reset_together, *((name,) for name in defaults if name not in fixed)):
            case = replace(self, **{name: defaults[name] for name in names})
            remaining = self.leaves_of_probe(case.probe(torch.device("cpu")))
            yield replace(case, grad=tuple(name for name in self.grad if name in remaining))
        yield from (replace(self, grad=grad) for grad in ((), *((name,) for name in self.grad)))

    def probe(self, device: torch.device) -> Probe:
        """Return the features that a kernel needs to run this case."""
        return Probe(device=device, needs_grad=bool(self.grad), **{name: getattr(self, name) for name in PROBED})

    # ---- sizes

    @classmethod
    def float_state(cls) -> tuple[str, ...]:
        """Return the names of a state's floating-point leaves, which can have gradients."""
        return tuple(name for name in cls.state if name in cls.axes)

    @property
    def differentiated(self) -> tuple[str, ...]:
        """Names of the outputs that receive an upstream gradient."""
        state = self.float_state() if self.final_state else ()
        return {"both": ("output", *state), "output": ("output",), "state": state}[self.upstream]

    @property
    def length(self) -> int:
        """T, the number of tokens in a row of the input."""
        return sum(self.lengths) if self.packed else self.lengths[0]

    @property
    def rows(self) -> int:
        """B, the number of rows of the input."""
        return 1 if self.packed else len(self.lengths)

    @property
    def wide_dtype(self) -> torch.dtype:
        """Dtype of decays and recurrent states."""
        return torch.promote_types(self.dtype, torch.float32)

    @property
    def factor(self) -> float:
        """Scale of the output: `scale`, or the ops' default."""
        return self.key_width**-0.5 if self.scale is None else self.scale

    @property
    def undefined(self) -> tuple[str, ...]:
        """Outputs that are not compared, because float16 cannot represent them or their intermediate results."""
        return ()

    @abstractmethod
    def dtype_of(self, name: str) -> torch.dtype:
        """Return the dtype of an input and its gradient, or the dtype that an output must have."""

    def underflow(self, name: str) -> float:
        """Return the absolute error that is always allowed for the elements of an output, because numbers underflow."""
        return torch.finfo(self.dtype_of(name)).tiny

    @property
    def overwritable(self) -> tuple[str, ...]:
        """Inputs that the kernel may overwrite: the leaves of growing states, without gradients."""
        return ()

    def axes_of(self, name: str) -> str:
        """Return the dimensions of an input or output, one letter each."""
        return (self.log_decay or "").replace(" ", "") if name == "log_decay" else self.axes.get(name, "N")

    # ---- tensors

    @abstractmethod
    def inputs(self, device: torch.device) -> Tensors:
        """Return the tensors of the call by name; optional tensors that are None are left out."""

    def run(self, kernel: Kernel, inputs: Tensors) -> Tensors:
        """Run the kernel; return `output`, and the leaves of the final state if the case wants it.

        Raises:
            CheckFailure: the kernel returns a final state though the case wants none, or none though it wants one.
        """
        output, state = kernel.function(self.call(inputs))
        expected, actual = ("a final state" if x else "no final state" for x in (self.final_state, state is not None))
        require(expected == actual, f"expected {expected}, got {actual}")
        return {"output": output} | ({} if state is None else self.leaves_of(state))

    @abstractmethod
    def call(self, inputs: Tensors) -> Any:
        """Return the kernel's argument: the validated description of the call."""

    def leaves_of(self, state: Any) -> Tensors:
        """Return the leaves of a final state by name."""
        return {"state": state}

    @abstractmethod
    def define(self, inputs: Tensors) -> Tensors:
        """Return the results of `run` by the op's definition, from inputs in float64."""

    @abstractmethod
    def terms(self, inputs: Tensors, absolute: Tensors) -> Tensors:
        """Return the results of `define` with every term of every sum replaced by its absolute value.

        The result is differentiable in `absolute`, the absolute values of the inputs (log-decays keep their sign).
        """

    def cancelled(self, kernel: Kernel, absolute: Tensors, of_terms: Tensors) -> Tensors:
        """Return the gradients' error scales, `of_terms`, plus terms that the kernel may add and later subtract."""
        del kernel, absolute
        return of_terms

    def exact(self, kernel: Kernel) -> Exact:
        """Return the definition's outputs and gradients, each with its error scale for this kernel."""
        cpu = torch.device("cpu")
        inputs = {name: to_float64(x) for name, x in self.inputs(cpu).items()}
        variables = leaves(inputs, self.grad)
        absolute = {name: x if name == "log_decay" else x.abs() for name, x in inputs.items()}
        absolute = leaves(absolute, [name for name in inputs if inputs[name].is_floating_point()] if self.grad else [])
        outputs, terms = self.define(variables), self.terms(inputs, absolute)
        values = {name: x.detach() for name, x in outputs.items()}
        sizes = {name: x.detach() for name, x in terms.items()}
        if not self.grad:
            return Exact(values, {}, sizes, {})
        upstream = {name: to_float64(self.cotangent(name, values[name], cpu)) for name in self.differentiated}
        varied = {name: x for name, x in absolute.items() if x.requires_grad}
        of_terms = gradients(terms, {name: x.abs() for name, x in upstream.items()}, varied)
        exact = gradients(outputs, upstream, {name: variables[name] for name in self.grad})
        return Exact(values, exact, sizes, self.cancelled(kernel, absolute, of_terms))

    def randn(self) -> Callable[..., Tensor]:
        """Return a function that draws normal numbers, in float64 on the CPU, so that every device gets the same."""
        return partial(torch.randn, generator=torch.Generator().manual_seed(self.seed), dtype=torch.float64)

    def cotangent(self, name: str, output: Tensor, device: torch.device) -> Tensor:
        """Return the upstream gradient of an output: random numbers."""
        generator = torch.Generator().manual_seed(self.seed + 1 + len(name))
        noise = torch.randn(output.shape, generator=generator, dtype=torch.float64)
        return self.laid_out(name, noise.to(device, self.dtype_of(name)), dim=-1)

    def laid_out(self, name: str, x: Tensor, dim: int = 0) -> Tensor:
        """Return a tensor in the case's layout; `expanded` repeats its first entry along `dim`."""
        return laid_out(self.layout, name, x, dim, per_token=self.axes_of(name)[:2] == "BT")

    def heads(self, randn: Callable[..., Tensor], heads: tuple[int, int, int], device: torch.device) -> Tensors:
        """Return random queries, keys and values; `heads` has the number of heads of each.

        Their mean is 1, so that sums over tokens grow with T: a kernel that loses terms becomes visible.
        """
        widths = (self.key_width, self.key_width, self.value_width)
        sizes = [n * width for n, width in zip(heads, widths, strict=True)]
        numbers = 1 + randn(self.rows, self.length, sum(sizes))
        numbers *= torch.tensor(self.sizes, dtype=numbers.dtype).repeat_interleave(torch.tensor(sizes))
        return laid_out_heads(self.layout, numbers.to(device, self.dtype), heads, widths)

    def cu_seqlens(self, inputs: Tensors) -> Tensor | None:
        """Return the document boundaries, [N+1]; None if documents are not packed."""
        if not self.packed:
            return None
        boundaries = inputs["q"].new_tensor([0, *itertools.accumulate(self.lengths)], dtype=self.cu_seqlens_dtype)
        return spread(boundaries) if self.layout in ("mixed", "sliced") else boundaries

    # ---- rows and documents

    def sequences(self, x: Tensor) -> list[Tensor]:
        """Split a segment's tensor [B T ...] into one tensor [t ...] per row or document."""
        return list(x[0].split(self.lengths)) if self.packed else list(x)

    def segment(self, sequences: Sequence[Tensor]) -> Tensor:
        """Join one tensor [t ...] per row or document into a segment's tensor [B T ...]: the inverse of `sequences`."""
        return torch.cat(list(sequences))[None] if self.packed else torch.stack(list(sequences))

    def parts(self, inputs: Tensors, pieces: Sequence[tuple[int, ...]]) -> "list[tuple[Self, Tensors]]":
        """Split the case into consecutive calls, each with its per-token inputs; all but the last return a final state.

        A piece is given by its number of tokens of each row or document.
        """
        per_token = [name for name in inputs if self.axes_of(name)[:2] == "BT"]
        rest = {name: self.sequences(inputs[name]) for name in per_token}
        parts = []
        for lengths in pieces:
            part = replace(self, lengths=lengths, cuts=(), final_state=self.final_state or len(parts) < len(pieces) - 1)
            split = {name: [x.tensor_split([n]) for x, n in zip(xs, lengths, strict=True)] for name, xs in rest.items()}
            parts.append((part, {name: part.segment([head for head, _ in xs]) for name, xs in split.items()}))
            rest = {name: [tail for _, tail in xs] for name, xs in split.items()}
        return parts

    def continued(self, before: "KernelCase") -> Self:
        """Return the same call, starting from the final state of the call `before`."""
        del before
        return replace(self, initial_state=True)


def leaves(tensors: Tensors, names: Collection[str]) -> Tensors:
    """Return the tensors as leaves of a new graph; those in `names` require gradients."""
    return {name: x.detach().requires_grad_(name in names) for name, x in tensors.items()}


def to_float64(x: Tensor) -> Tensor:
    """Return a floating-point tensor in float64, any other tensor unchanged."""
    return x.to(torch.float64) if x.is_floating_point() else x
