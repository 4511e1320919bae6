"""A case of a kernel check: one call in a form that shrinks and can be written down, and its definition.

Tensors are functions of the case's seed and go by name. Those of a state have one name before and after: `state` is the
initial one among inputs, the final one among outputs. Each op family has its kind of case: families.py, softmax.py.
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
"""The dimensions of what every op has."""

PROBED = ("dtype", "key_width", "value_width", "log_decay", "wide_output", "packed", "initial_state", "final_state")
"""What a case and a probe both hold."""


class Exact(NamedTuple):
    """What the definition makes of a case, in float64; each `_terms` are the sums of the absolute values of terms."""

    outputs: Tensors
    gradients: Tensors
    outputs_terms: Tensors
    gradients_terms: Tensors


def takes(kernel: Kernel, probe: Probe) -> bool:
    """What the kernel takes."""
    return not kernel.unsupported(probe)


class Drawn(NamedTuple):
    """What an op draws the rest of a case with."""

    draw: Callable[..., Any]
    """Draws from a strategy of hypothesis."""
    probe: Probe
    """What the case asks of a kernel."""
    common: Mapping[str, Any]
    """What cases of all ops hold, drawn."""
    heads: st.SearchStrategy[int]
    """Numbers of heads."""


@dataclass(frozen=True, kw_only=True)
class KernelDraw:
    """What a check of kernels wants drawn."""

    asks: Callable[[Kernel, Probe], bool] = takes
    """True if it asks a kernel for this."""
    tokens: st.SearchStrategy[int] = LENGTHS
    """Lengths of rows and documents."""
    cut: bool = False
    """True if rows and documents are cut."""
    rare: bool = False
    """True if a few cases have more of something than usual."""
    fixed: bool = False
    """True if the cases that are not left to chance run."""


@dataclass(frozen=True, kw_only=True, repr=False)
class KernelCase(WrittenCase, ABC):
    """One call of a kernel."""

    dtype: torch.dtype = torch.float64
    """Of queries, keys and values."""
    lengths: tuple[int, ...] = (1,)
    """Tokens of each row of the batch, all the same; or of each packed document, which may be empty."""
    packed: bool = False
    n_heads: int = 1
    key_width: int = 1
    value_width: int = 1
    log_decay: str | None = None
    """Its dimensions; None where there is none."""
    wide_output: bool = False
    initial_state: bool = False
    final_state: bool = False
    """True if one is wanted."""
    grad: tuple[str, ...] = ()
    """Inputs that a gradient is taken of; without any, grad mode is off."""
    upstream: Literal["both", "output", "state"] = "both"
    """What has a gradient from above: the output, the final state, or both."""
    layout: Layout = "contiguous"
    sizes: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """What queries, keys and values are multiplied by."""
    scale: float | None = None
    chunk_size: int = 4
    cu_seqlens_dtype: torch.dtype = torch.int64
    """Of the boundaries of packed documents."""
    cuts: tuple[int, ...] = ()
    """Tokens of each row or document before the cut, where a check cuts them."""
    seed: int = 0

    decays: ClassVar[tuple[str | None, ...]]
    """Kinds of log-decays that the op has."""
    widens: ClassVar[tuple[bool, ...]] = (False,)  # whether outputs of 16-bit inputs may be wide
    windows: ClassVar[tuple[bool, ...]] = (False,)
    """True if a call has a window."""
    changes: ClassVar[tuple[tuple[str, ...], ...]] = ((),)
    """What may change scores, by the names of the op's arguments."""
    extras: ClassVar[tuple[str, ...]] = ()
    """The inputs with gradients beside queries, keys, values, log-decays and states."""
    axes: ClassVar[Mapping[str, str]]
    """The dimensions of each float tensor; the first of a state are its rows."""
    state: ClassVar[tuple[str, ...]]
    """The leaves of a state."""
    per_row: ClassVar[tuple[str, ...]] = ("lengths", "cuts")
    """The fields that have an item for each row or document."""
    at_once: ClassVar[tuple[tuple[str, ...], ...]] = (("final_state", "upstream"),)
    """Fields that go together: a simpler case has the defaults of all."""
    fixed: ClassVar[tuple[Fields, ...]] = FIXED
    """What cases that are not left to chance hold."""
    adds_up: ClassVar[bool]
    """True if a state is a sum over tokens, which rounding can wear away, and not the tokens themselves."""

    # ---- what is drawn

    @classmethod
    def probes(cls, device: torch.device, widths: Sequence[tuple[int, int]] = WIDTHS) -> Iterator[Probe]:
        """Everything that a kernel of the op can be asked to run, the simplest first."""
        names = (*PROBED, "window", "scores", "needs_grad")
        flags = itertools.product((False, True), repeat=3)
        asks = itertools.product(DTYPES, widths, cls.decays, cls.widens, flags, cls.windows, cls.changes, (False, True))
        for dtype, pair, log_decay, wider, states, window, scores, needs_grad in asks:
            if not (needs_grad and dtype == torch.int64) and not (wider and dtype.itemsize > 2):
                values: tuple[Any, ...] = (dtype, *pair, log_decay, wider, *states, window, scores, needs_grad)
                yield Probe(device=device, **dict(zip(names, values, strict=True)))

    @classmethod
    def cases(cls, probes: Sequence[Probe], wide: Sequence[Probe], wanted: KernelDraw) -> st.SearchStrategy[Self]:
        """Cases of what is probed, in usual and in wide sizes, as a check wants them."""
        probes = probes or wide
        carried = [probe for probe in probes if probe.initial_state and probe.final_state] or probes
        # every other case has both states: most of what is wrong is wrong there
        usual = st.sampled_from(probes) | st.sampled_from(carried)
        rarely, widely = st.sampled_from(RARE if wanted.rare else [None]), st.sampled_from(wide or probes)
        few = wanted.tokens.map(lambda length: min(length, 9))
        tokens: dict[Rare | None, st.SearchStrategy[int]] = {None: wanted.tokens, "heads": few, "rows": few}
        tokens |= {"wide": wanted.tokens.map(lambda length: min(length, 33)), "chunks": LONG}
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
            if rare is None and wanted.tokens is LENGTHS:
                length = lengths_by_chunks(chunk_size)
                several = st.lists(st.just(0) | length, min_size=1, max_size=4)
            lengths = draw(several.filter(sum)) if probe.packed else [draw(length)] * draw(rows[rare])
            cuts = [draw(st.integers(0, length)) for length in (lengths if probe.packed else lengths[:1]) if wanted.cut]
            leaves = cls.leaves_of_probe(probe)
            one = st.sampled_from(leaves)
            some = st.lists(one, min_size=1, unique=True)
            others = one.map(lambda name: [other for other in leaves if other != name])
            common: dict[str, Any] = {
                **{name: getattr(probe, name) for name in PROBED},
                "lengths": tuple(lengths),
                "grad": tuple(draw(st.just(leaves) | some | one.map(lambda name: [name]) | others))
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
        cls, probes: Sequence[Probe], asks: Callable[[Probe], bool], wanted: KernelDraw
    ) -> "list[KernelCase]":
        """The fixed cases that a check wants, each with other options, in the first dtype of what is probed."""
        found: list[KernelCase] = []
        kinds = {
            kind: cls.leaves_of_probe(replace(probes[0], log_decay=kind, initial_state=True)) for kind in cls.decays
        }
        fixed = [*cls.fixed, *endings(cls.decays, kinds.__getitem__)] if wanted.fixed else []
        narrow = dict.fromkeys(replace(probe, key_width=1, value_width=1) for probe in probes)
        for number, fields in enumerate(fixed):
            asked = {"packed": False, "dtype": probes[0].dtype, **fields}
            of_grad = asked.pop("needs_grad", None)
            if of_grad is not None and wanted.cut:
                continue
            given = {name: asked[name] for name in PROBED if name in asked and "width" not in name}
            given |= {"window": asked["window"] is not None} if "window" in asked else {}
            given |= {"scores": asked["scores"]} if "scores" in asked else {}
            given |= {} if of_grad is None else {"needs_grad": of_grad}
            sizes = {name: fields[name] for name in ("key_width", "value_width")}
            fitting = (p for p in narrow if all(getattr(p, name) == value for name, value in given.items()))
            possible = [probe for p in fitting if asks(probe := replace(p, **sizes))]
            possible = [probe for probe in possible if probe.initial_state and probe.final_state] or possible
            if possible:
                probe = possible[-1 - number % len(possible)]
                asked |= {name: getattr(probe, name) for name in PROBED}
                asked["cuts"] = tuple(length - length // 2 for length in fields["lengths"]) if wanted.cut else ()
                asked["grad"] = tuple(asked.get("grad", cls.leaves_of_probe(probe))) if probe.needs_grad else ()
                found.append(cls(**asked).with_details(probe))
        return found

    def with_details(self, probe: Probe) -> "KernelCase":
        """A fixed case with what cases of this op hold beside what all do."""
        del probe
        return self

    @classmethod
    def leaves_of_probe(cls, probe: Probe) -> list[str]:
        """The inputs that have gradients."""
        state = cls.float_state() if probe.initial_state else ()
        return [*"qkv", *cls.extras, *(["log_decay"] if probe.log_decay else []), *state]

    @classmethod
    @abstractmethod
    def details(cls, drawn: Drawn) -> dict[str, Any]:
        """What cases of this op hold beside what all do; it may replace some of that."""

    def simpler(self) -> Iterator[Self]:
        """Cases that are simpler in one respect, of the same dtype; a kernel may not take what some ask."""
        rows, defaults = range(len(self.lengths)), vars(type(self)())
        size = len(rows) // 2
        while size:  # halves first, or many documents would take as many attempts
            for i in rows[::size]:
                per_row = {name: value for name in self.per_row if (value := getattr(self, name))}
                rest = {name: value[:i] + value[i + size :] for name, value in per_row.items()}
                if any(rest["lengths"]):
                    yield replace(self, **rest)
            size //= 2
        for some in ([i] for i in rows) if self.packed else [rows]:
            for short in fewer(self.lengths[some[0]], 0 if self.packed else 1):
                lengths = tuple(short if i in some else length for i, length in enumerate(self.lengths))
                if any(lengths):
                    yield replace(self, lengths=lengths, cuts=tuple(map(min, self.cuts, lengths)))
        if len(rows) == 1:
            yield replace(self, packed=False)
        for most in fewer(max(self.cuts, default=0), 0):
            yield replace(self, cuts=tuple(min(cut, most) for cut in self.cuts))
        fixed = {"dtype", "packed", "grad", *self.per_row, *itertools.chain(*self.at_once)}
        for names in (*self.at_once, *((name,) for name in defaults if name not in fixed)):
            case = replace(self, **{name: defaults[name] for name in names})
            there = self.leaves_of_probe(case.probe(torch.device("cpu")))
            yield replace(case, grad=tuple(name for name in self.grad if name in there))
        yield from (replace(self, grad=grad) for grad in ((), *((name,) for name in self.grad)))

    def probe(self, device: torch.device) -> Probe:
        """What this case asks of a kernel."""
        return Probe(device=device, needs_grad=bool(self.grad), **{name: getattr(self, name) for name in PROBED})

    # ---- sizes

    @classmethod
    def float_state(cls) -> tuple[str, ...]:
        """The leaves of a state that have gradients."""
        return tuple(name for name in cls.state if name in cls.axes)

    @property
    def differentiated(self) -> tuple[str, ...]:
        """The outputs that have a gradient from above."""
        state = self.float_state() if self.final_state else ()
        return {"both": ("output", *state), "output": ("output",), "state": state}[self.upstream]

    @property
    def length(self) -> int:
        """T, the tokens of one row of the input."""
        return sum(self.lengths) if self.packed else self.lengths[0]

    @property
    def rows(self) -> int:
        """B, rows of the input."""
        return 1 if self.packed else len(self.lengths)

    @property
    def wide(self) -> torch.dtype:
        """Of decays and recurrent states."""
        return torch.promote_types(self.dtype, torch.float32)

    @property
    def factor(self) -> float:
        """Of the output: the scale, or what the ops take where none is given."""
        return self.key_width**-0.5 if self.scale is None else self.scale

    @property
    def undefined(self) -> tuple[str, ...]:
        """The outputs that are not defined, as what float16 does not hold."""
        return ()

    @abstractmethod
    def dtype_of(self, name: str) -> torch.dtype:
        """The dtype that an input has (and its gradient), and that an output must have."""

    def lost(self, name: str) -> float:
        """What an output's elements may be off by, however small they are."""
        return torch.finfo(self.dtype_of(name)).tiny

    @property
    def consumed(self) -> tuple[str, ...]:
        """The inputs that may be written: none, but for states that grow, without grad."""
        return ()

    def axes_of(self, name: str) -> str:
        """The dimensions of an input or output."""
        return (self.log_decay or "").replace(" ", "") if name == "log_decay" else self.axes.get(name, "N")

    # ---- tensors

    @abstractmethod
    def inputs(self, device: torch.device) -> Tensors:
        """The tensors of the call; those that are None are left out."""

    def run(self, kernel: Kernel, inputs: Tensors) -> Tensors:
        """What the kernel makes of them: `output`, and the leaves of the final state if it is wanted."""
        output, state = kernel.function(self.call(inputs))
        given, wanted = ("None" if x else "given" for x in (state is None, not self.final_state))
        require(given == wanted, f"the final state is {given}, and is wanted: {self.final_state}")
        return {"output": output} | ({} if state is None else self.leaves_of(state))

    @abstractmethod
    def call(self, inputs: Tensors) -> Any:
        """What the kernel is given, checked."""

    def leaves_of(self, state: Any) -> Tensors:
        """The leaves of a final state."""
        return {"state": state}

    @abstractmethod
    def define(self, inputs: Tensors) -> Tensors:
        """The same by the definition, from inputs in float64."""

    @abstractmethod
    def terms(self, inputs: Tensors, absolute: Tensors) -> Tensors:
        """The same with every term of every sum in its absolute value; differentiable in `absolute`, which are the
        inputs' own but for log-decays."""

    def cancelled(self, kernel: Kernel, absolute: Tensors, of_terms: Tensors) -> Tensors:
        """Gradients of `terms`, with the terms added that a kernel may add and subtract again."""
        del kernel, absolute
        return of_terms

    def exact(self, kernel: Kernel) -> Exact:
        """The definition's outputs and gradients, and their terms as the kernel may form them."""
        cpu = torch.device("cpu")
        given = {name: wide(x) for name, x in self.inputs(cpu).items()}
        inputs = leaves(given, self.grad)
        absolute = {name: x if name == "log_decay" else x.abs() for name, x in given.items()}
        absolute = leaves(absolute, [name for name in given if given[name].is_floating_point()] if self.grad else [])
        outputs, terms = self.define(inputs), self.terms(given, absolute)
        values = {name: x.detach() for name, x in outputs.items()}
        sizes = {name: x.detach() for name, x in terms.items()}
        if not self.grad:
            return Exact(values, {}, sizes, {})
        above = {name: wide(self.cotangent(name, values[name], cpu)) for name in self.differentiated}
        varied = {name: x for name, x in absolute.items() if x.requires_grad}
        of_terms = gradients(terms, {name: x.abs() for name, x in above.items()}, varied)
        exact = gradients(outputs, above, {name: inputs[name] for name in self.grad})
        return Exact(values, exact, sizes, self.cancelled(kernel, absolute, of_terms))

    def randn(self) -> Callable[..., Tensor]:
        """Normal numbers, in float64 on the CPU: the same on every device."""
        return partial(torch.randn, generator=torch.Generator().manual_seed(self.seed), dtype=torch.float64)

    def cotangent(self, name: str, output: Tensor, device: torch.device) -> Tensor:
        """The gradient from above of an output."""
        generator = torch.Generator().manual_seed(self.seed + 1 + len(name))
        noise = torch.randn(output.shape, generator=generator, dtype=torch.float64)
        return self.laid_out(name, noise.to(device, self.dtype_of(name)), dim=-1)

    def laid_out(self, name: str, x: Tensor, dim: int = 0) -> Tensor:
        """A tensor in the case's layout; the dimension is that along which it may be one number repeated."""
        return laid_out(self.layout, name, x, dim, per_token=self.axes_of(name)[:2] == "BT")

    def heads(self, randn: Callable[..., Tensor], heads: tuple[int, int, int], device: torch.device) -> Tensors:
        """Queries, keys and values. Their mean is 1: sums grow with T, as they must to show what is lost on the way."""
        widths = (self.key_width, self.key_width, self.value_width)
        sizes = [n * width for n, width in zip(heads, widths, strict=True)]
        numbers = 1 + randn(self.rows, self.length, sum(sizes))
        numbers *= torch.tensor(self.sizes, dtype=numbers.dtype).repeat_interleave(torch.tensor(sizes))
        return laid_out_heads(self.layout, numbers.to(device, self.dtype), heads, widths)

    def cu_seqlens(self, inputs: Tensors) -> Tensor | None:
        """The boundaries of packed documents."""
        if not self.packed:
            return None
        boundaries = inputs["q"].new_tensor([0, *itertools.accumulate(self.lengths)], dtype=self.cu_seqlens_dtype)
        return spread(boundaries) if self.layout in ("mixed", "sliced") else boundaries

    # ---- rows and documents

    def sequences(self, x: Tensor) -> list[Tensor]:
        """A segment's tensor [B T ...] as one tensor [t ...] a row or document."""
        return list(x[0].split(self.lengths)) if self.packed else list(x)

    def segment(self, sequences: Sequence[Tensor]) -> Tensor:
        """The inverse of `sequences`."""
        return torch.cat(list(sequences))[None] if self.packed else torch.stack(list(sequences))

    def parts(self, inputs: Tensors, pieces: Sequence[tuple[int, ...]]) -> "list[tuple[Self, Tensors]]":
        """Consecutive pieces (each piece's tokens of every row or document) as calls of their own, each with its
        per-token inputs; all but the last want a state."""
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
        """The same call from the final state of the one before."""
        del before
        return replace(self, initial_state=True)


def leaves(tensors: Tensors, names: Collection[str]) -> Tensors:
    """The tensors as a graph's leaves, those named with grad."""
    return {name: x.detach().requires_grad_(name in names) for name, x in tensors.items()}


def wide(x: Tensor) -> Tensor:
    """In float64, if it is a float."""
    return x.to(torch.float64) if x.is_floating_point() else x
