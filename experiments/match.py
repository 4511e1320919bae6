"""Models of equal cost: one field of a configuration is turned until a model has as many parameters, needs as many
operations, or keeps as large a state as wanted.

The cost is that of the model built on `meta`, nothing is estimated. It is a step function of most fields (widths are
whole numbers, heads must divide them), so the search keeps the value that comes nearest.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import getitem
from typing import Any, Literal, NamedTuple, Self, get_args

from pydantic import Field, ValidationError, model_validator

from ..mixers.state import nbytes
from ..models import ModelConfig, build_meta, flops_per_token
from ..registry import Config, SeqmixError, nearest

Metric = Literal["parameters", "flops", "state"]
UNITS: dict[Metric, str] = {"parameters": "parameters", "flops": "FLOPs per token", "state": "bytes of state"}
DOUBLINGS = 20
HALVINGS = 20
"""How often a field is doubled and halved at most, from the value it has; and how often what is between is halved."""
HOLES = 64
"""Neighbours of a whole number that are tried where a model cannot be built with it."""


class MatchError(SeqmixError):
    """No value of the field makes the model cost what is wanted."""


class Match(Config):
    """What is made equal, to what, and by which field."""

    parameters: int | float | str | None = None
    """A number of parameters; or the name of an entry, a preset or a file, whose model has as many."""
    flops: int | float | str | None = None
    """The same for operations per token of matrix products, forward, at data.sequence_length."""
    state: int | float | str | None = None
    """The same for bytes of one sequence's state after data.sequence_length tokens."""
    knob: str = Field(min_length=1)
    """The field of the model that is turned, such as blocks.ret.ffn.expansion, n_layers or d_model; `*` stands for
    every block that layers are of, and has the field (blocks.*.ffn.expansion)."""
    tolerance: float = Field(default=0.01, gt=0, lt=1)
    """How far from what is wanted the cost may be, as a share of it."""

    @model_validator(mode="after")
    def _one_metric(self) -> Self:
        given = self._given
        if len(given) != 1:
            raise ValueError(
                f"a match is of one of parameters, flops and state, and this is of {' and '.join(given) or 'none'}"
            )
        if not isinstance(self.wanted, str) and self.wanted <= 0:
            raise ValueError(f"{self.metric} to match must be above 0, and are {self.wanted}")
        return self

    @property
    def _given(self) -> list[Metric]:
        return [metric for metric in UNITS if getattr(self, metric) is not None]

    @property
    def metric(self) -> Metric:
        """What is made equal."""
        return self._given[0]

    @property
    def wanted(self) -> int | float | str:
        """How much it is to be, or the name of what has as much."""
        return getattr(self, self.metric)


@dataclass(frozen=True)
class Matched:
    """A model that costs what was wanted."""

    model: ModelConfig
    knob: str
    value: int | float
    metric: Metric
    cost: int
    wanted: float

    def __str__(self) -> str:
        off = f"{100 * (self.cost / self.wanted - 1):+.2g} %" if self.cost != self.wanted else "exact"
        return f"{self.metric} {self.cost:,} by {self.knob} = {self.value:.16g} (wanted {self.wanted:,.0f}; {off})"


class Cost(NamedTuple):
    """All that a model costs."""

    parameters: int
    flops_per_token: int
    """Operations per token of matrix products, forward, at the training length."""
    state_bytes: int
    """Of one sequence, after as many tokens as it has in training."""


def whole_cost(model: ModelConfig, length: int) -> Cost:
    """What a model costs in all that can be matched; see `cost_of`.

    Raises:
        SeqmixError: the model cannot be built.
    """
    return Cost(*(cost_of(model, metric, length) for metric in UNITS))


def cost_of(model: ModelConfig, metric: Metric, length: int) -> int:
    """What a model costs at a length: parameters; operations per token, forward; or bytes of one sequence's state.

    Raises:
        SeqmixError: the model cannot be built.
    """
    built = build_meta(model)
    if metric == "parameters":
        return sum(parameter.numel() for parameter in built.parameters())
    if metric == "flops":
        return flops_per_token(built, length)
    return nbytes(built.init_state(1, max_length=length))


def solve(model: ModelConfig, match: Match, wanted: float, *, length: int) -> Matched:
    """The model with the match's field turned until it costs what is wanted at a length.

    Raises:
        MatchError: the field does not exist or is not a number; or no value comes near enough: the one that comes
            nearest, and how near.
    """
    search = _Search(_Knob.of(model, match.knob), match.metric, wanted, length)
    if (best := search.run()) is None:
        raise MatchError(f"{match.knob} cannot be turned: no value of it makes a model; {search.refused}")
    found = Matched(search.knob.turned(best), match.knob, best, match.metric, search.costs[best] or 0, wanted)
    if abs(found.cost / wanted - 1) > match.tolerance:
        raise MatchError(
            f"no {match.knob} gives {wanted:,.0f} {UNITS[match.metric]} within {100 * match.tolerance:g} %: {best:g} "
            f"comes nearest, with {found.cost:,} ({100 * (found.cost / wanted - 1):+.1f} %); "
            "turn another knob, or allow more by tolerance"
        )
    return found


# ---- the field


@dataclass(frozen=True)
class _Knob:
    """A number of a model's configuration, in one place or in several."""

    model: ModelConfig
    places: Sequence[tuple[str, ...]]
    whole: bool
    """Whether it is an integer."""
    value: int | float | None

    @classmethod
    def of(cls, model: ModelConfig, path: str) -> "_Knob":
        """The field at a dotted path, where `*` stands for all keys of a mapping that have it.

        Raises:
            MatchError: the field does not exist, or is not a number.
        """
        # a block that no layer is of costs nothing
        used = model.model_copy(update={"blocks": {name: model.blocks[name] for name in dict.fromkeys(model.layers)}})
        try:
            found = _fields(used, path.split("."), ())
            kinds = {_number_of(owner, place) for place, owner in found}
        except MatchError as error:
            raise MatchError(f"knob {path}: {error}") from None
        values = (getattr(owner, place[-1]) for place, owner in found)
        start = next((value for value in values if value is not None), None)
        return cls(model, [place for place, _ in found], kinds == {int}, start)

    def turned(self, value: int | float) -> ModelConfig:
        """The model with another value in all places.

        Raises:
            ValidationError: the configuration allows no such value.
        """
        model = self.model.model_dump()
        for *way, key in self.places:
            reduce(getitem, way, model)[key] = value
        return ModelConfig.model_validate(model)


def _fields(node: Any, keys: Sequence[str], place: tuple[str, ...]) -> list[tuple[tuple[str, ...], Config]]:
    """Where keys lead: places, and the configurations that own the field; a MatchError says why nowhere."""
    (key, *rest), children = keys, dict(node) if isinstance(node, Config | Mapping) else {}
    if not children:
        raise MatchError(f"{'.'.join(place)} {'is null' if node is None else 'has no fields'}")
    if key == "*":
        found = []
        problems = []
        for name in children:
            try:
                found += _fields(node, [name, *rest], place)
            except MatchError as error:
                problems.append(error)
        if not found:
            raise problems[0]
        return found
    if key not in children:
        allowed = f"allowed: {', '.join(children)}{nearest(key, children)}"
        raise MatchError(f"{'.'.join(place) or 'a model'} has no {key!r}; {allowed}")
    if rest:
        return _fields(children[key], rest, (*place, key))
    if not isinstance(node, Config):
        raise MatchError(f"{'.'.join((*place, key))} is no field")
    return [((*place, key), node)]


def _number_of(owner: Config, place: tuple[str, ...]) -> type:
    """Whether a field takes whole numbers (int) or all (float)."""
    annotation = type(owner).model_fields[place[-1]].annotation
    for kind in (float, int):
        if kind in (annotation, *get_args(annotation)):
            return kind
    raise MatchError(f"{'.'.join(place)} is not a number that could be changed")


# ---- the search


@dataclass
class _Search:
    """Bisection of a cost that rises or falls with the field, between two values on either side of what is wanted."""

    knob: _Knob
    metric: Metric
    wanted: float
    length: int
    costs: dict[int | float, int | None] = field(default_factory=dict)
    """What was tried; None where no model can be built."""
    refused: str = ""
    """Why the last of those cannot."""

    def run(self) -> int | float | None:
        """The value whose cost comes nearest, of those that cost the same the shortest to write; or None."""
        if (bracket := self._bracket()) is not None:
            self._bisect(*bracket)
        built = [value for value, cost in self.costs.items() if cost is not None]
        best = min(built, key=lambda value: abs(self._excess(value)), default=None)
        if best is None or self.knob.whole:
            return best
        short = (float(f"{best:.{digits}g}") for digits in range(1, 17))
        return next((value for value in short if self._cost(value) == self.costs[best]), best)

    def _bracket(self) -> tuple[int | float, int | float] | None:
        """Two neighbours of a geometric grid around the present value whose costs lie on either side."""
        start = self.knob.value or 1
        first = self._near(start, 0, math.inf)
        if first is None:
            return None
        ends = {2.0: first, 0.5: first}
        for doubling in range(1, DOUBLINGS + 1):
            for factor, end in list(ends.items()):
                bounds = (end, math.inf) if factor > 1 else (0, end)
                value = self._near(start * factor**doubling, *bounds)
                if value is not None and (self._excess(value) > 0) != (self._excess(end) > 0):
                    return end, value
                if value is None or abs(self._excess(value)) > abs(self._excess(end)):
                    del ends[factor]  # it leads away
                else:
                    ends[factor] = value
        return None

    def _bisect(self, one: int | float, other: int | float) -> None:
        for _ in range(HALVINGS):
            middle = self._near((one + other) / 2, min(one, other), max(one, other))
            if middle is None or self._excess(middle) == 0:
                return
            if (self._excess(middle) > 0) == (self._excess(one) > 0):
                one = middle
            else:
                other = middle

    def _near(self, value: float, low: float, high: float) -> int | float | None:
        """The value, or where a whole one makes no model its nearest neighbour that does; between two bounds."""
        if not self.knob.whole:
            return value if low < value < high and self._cost(value) is not None else None
        middle = max(1, round(value))
        for distance in range(HOLES):
            for number in (middle + distance, middle - distance):
                if low < number < high and self._cost(number) is not None:
                    return number
        return None

    def _cost(self, value: int | float) -> int | None:
        if value not in self.costs:
            try:
                self.costs[value] = cost_of(self.knob.turned(value), self.metric, self.length)
            except (ValidationError, SeqmixError) as error:
                self.costs[value] = None
                self.refused = str(error).splitlines()[-1].strip()
        return self.costs[value]

    def _excess(self, value: int | float) -> float:
        """How far its cost is above what is wanted."""
        return (self._cost(value) or 0) - self.wanted
