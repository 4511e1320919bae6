"""Models of equal cost: one field of a configuration (the knob) is changed until a model has a wanted number of
parameters, FLOPs or state bytes.

Costs are exact: they are counted on the model built on the `meta` device. A cost is a step function of most fields
(widths are whole numbers, heads must divide them), so the search keeps the value that comes nearest.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import getitem
from typing import Any, Literal, NamedTuple, Self, get_args

from pydantic import Field, ValidationError, model_validator

from ...mixers.base.state import nbytes
from ...models import ModelConfig, build_meta, flops_per_token
from ...registry import Config, SeqmixError, choices_hint

Metric = Literal["parameters", "flops", "state"]
UNITS: dict[Metric, str] = {"parameters": "parameters", "flops": "FLOPs per token", "state": "bytes of state"}
DOUBLINGS = 20
"""Maximum number of doublings, and of halvings, of the knob's present value in the search for a bracket."""
HALVINGS = 20
"""Maximum number of bisection steps within the bracket."""
MAX_DISTANCE = 64
"""If no model can be built with an integer, those at a distance below this one are tried in its place."""


class MatchError(SeqmixError):
    """No value of the knob gives the model the wanted cost."""


class Match(Config):
    """Matching of the entries: the cost that is made equal, the target, and the field that is changed for it.

    Exactly one of parameters, flops and state is set.
    """

    parameters: int | float | str | None = None
    """Number of parameters, or the name of an entry, a preset or a file whose model has that number."""
    flops: int | float | str | None = None
    """FLOPs of the forward pass's matrix products, per token at data.sequence_length, or a name as for `parameters`."""
    state: int | float | str | None = None
    """Bytes of one sequence's state after data.sequence_length tokens, or a name as for `parameters`."""
    knob: str = Field(min_length=1)
    """Field of the model that is changed, such as blocks.ret.ffn.expansion, n_layers or d_model; `*` stands for every
    block that is used by a layer and has the field (blocks.*.ffn.expansion)."""
    tolerance: float = Field(default=0.01, gt=0, lt=1)
    """Largest relative deviation of the cost from the target."""

    @model_validator(mode="after")
    def _one_metric(self) -> Self:
        metrics = self._metrics
        if len(metrics) != 1:
            raise ValueError(
                f"expected exactly one of parameters, flops and state, got {' and '.join(metrics) or 'none'}"
            )
        if not isinstance(self.wanted, str) and self.wanted <= 0:
            raise ValueError(f"match expects {self.metric} above 0, got {self.wanted}")
        return self

    @property
    def _metrics(self) -> list[Metric]:
        return [metric for metric in UNITS if getattr(self, metric) is not None]

    @property
    def metric(self) -> Metric:
        """Cost that is made equal."""
        return self._metrics[0]

    @property
    def wanted(self) -> int | float | str:
        """Wanted cost, or the name of a model that has it."""
        return getattr(self, self.metric)


@dataclass(frozen=True)
class Matched:
    """Result of matching: the changed model, the knob's value in it, its cost, and the wanted cost."""

    model: ModelConfig
    knob: str
    value: int | float
    metric: Metric
    cost: int
    wanted: float

    def __str__(self) -> str:
        deviation = f"{100 * (self.cost / self.wanted - 1):+.2g} %" if self.cost != self.wanted else "exact"
        return (
            f"{self.metric} {self.cost:,} by {self.knob} = {self.value:.16g} (wanted {self.wanted:,.0f}; {deviation})"
        )


class Cost(NamedTuple):
    """The costs of a model by which it can be matched: parameters, FLOPs and state."""

    parameters: int
    flops_per_token: int
    """FLOPs of the forward pass's matrix products, per token at the training length."""
    state_bytes: int
    """State bytes of one sequence at the training length."""


def whole_cost(model: ModelConfig, length: int) -> Cost:
    """Return all costs of a model at a length; see `cost_of`.

    Raises:
        SeqmixError: the model cannot be built.
    """
    return Cost(*(cost_of(model, metric, length) for metric in UNITS))


def cost_of(model: ModelConfig, metric: Metric, length: int) -> int:
    """Return one cost of a model at a length: parameters, forward FLOPs per token, or state bytes per sequence.

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
    """Find the value of a model's knob at which the model has the wanted cost at a length, within the tolerance.

    Raises:
        MatchError: the knob does not exist or is not a number; or no value comes within the tolerance (the message has
            the nearest).
    """
    search = _Search(_Knob.of(model, match.knob), match.metric, wanted, length)
    if (best := search.run()) is None:
        raise MatchError(f"no value of {match.knob} gives a valid model ({search.last_error}): choose another knob")
    matched = Matched(search.knob.with_value(best), match.knob, best, match.metric, search.costs[best] or 0, wanted)
    if abs(matched.cost / wanted - 1) > match.tolerance:
        raise MatchError(
            f"no {match.knob} gives {wanted:,.0f} {UNITS[match.metric]} within {100 * match.tolerance:g} %: {best:g} "
            f"comes nearest, with {matched.cost:,} ({100 * (matched.cost / wanted - 1):+.1f} %); "
            "choose another knob, or raise tolerance"
        )
    return matched


# ---- the field


@dataclass(frozen=True)
class _Knob:
    """Numeric field of a model's configuration, at one or several places."""

    model: ModelConfig
    places: Sequence[tuple[str, ...]]
    """Paths of the places that hold the field, as keys from the model down."""
    integers_only: bool
    """True if the field must be an integer at every place."""
    value: int | float | None
    """Present value, from the first place at which it is set; None if it is null at all places."""

    @classmethod
    def of(cls, model: ModelConfig, path: str) -> "_Knob":
        """Find the field at a dotted path, in which `*` stands for every key under which the rest of the path exists.

        Raises:
            MatchError: the field does not exist, or is not a number.
        """
        # blocks that no layer uses are left out: they do not change the cost
        used = model.model_copy(update={"blocks": {name: model.blocks[name] for name in dict.fromkeys(model.layers)}})
        try:
            fields = _fields(used, path.split("."), ())
            kinds = {_number_type(owner, place) for place, owner in fields}
        except MatchError as error:
            raise MatchError(f"knob {path}: {error}") from None
        values = (getattr(owner, place[-1]) for place, owner in fields)
        start = next((value for value in values if value is not None), None)
        return cls(model, [place for place, _ in fields], kinds == {int}, start)

    def with_value(self, value: int | float) -> ModelConfig:
        """Return the model with another value at all places.

        Raises:
            ValidationError: the configuration does not allow the value.
        """
        model = self.model.model_dump()
        for *parents, key in self.places:
            reduce(getitem, parents, model)[key] = value
        return ModelConfig.model_validate(model)


def _fields(node: Any, keys: Sequence[str], place: tuple[str, ...]) -> list[tuple[tuple[str, ...], Config]]:
    """Follow keys from a node of a configuration; return each field's full path and the configuration that owns it.

    Raises:
        MatchError: the keys lead to no field.
    """
    key, *rest = keys
    children = dict(node) if isinstance(node, Config | Mapping) else {}
    if not children:
        raise MatchError(f"{'.'.join(place)} {'is null' if node is None else 'has no fields'}")
    if key == "*":
        fields = []
        problems = []
        for name in children:
            try:
                fields += _fields(node, [name, *rest], place)
            except MatchError as error:
                problems.append(error)
        if not fields:
            raise problems[0]
        return fields
    if key not in children:
        raise MatchError(f"{'.'.join(place) or 'the model'} has no {key!r}{choices_hint(key, children)}")
    if rest:
        return _fields(children[key], rest, (*place, key))
    if not isinstance(node, Config):
        raise MatchError(f"{'.'.join((*place, key))} is not a field: choose a numeric field")
    return [((*place, key), node)]


def _number_type(owner: Config, place: tuple[str, ...]) -> type:
    """Return the type of a numeric field: float, or int if it allows only integers.

    Raises:
        MatchError: the field is not numeric.
    """
    annotation = type(owner).model_fields[place[-1]].annotation
    for kind in (float, int):
        if kind in (annotation, *get_args(annotation)):
            return kind
    raise MatchError(f"{'.'.join(place)} is not a number: choose a numeric field")


# ---- the search


@dataclass
class _Search:
    """Search for the knob's value whose cost is nearest to the wanted one: a bracket, then bisection."""

    knob: _Knob
    metric: Metric
    wanted: float
    length: int
    costs: dict[int | float, int | None] = field(default_factory=dict)
    """Costs of the values tried so far; None if no model can be built with a value."""
    last_error: str = ""
    """Reason why no model could be built with the last such value."""

    def run(self) -> int | float | None:
        """Return the value with the nearest cost, in as few digits as keep that cost; None if no value is valid."""
        if (bracket := self._bracket()) is not None:
            self._bisect(*bracket)
        built = [value for value, cost in self.costs.items() if cost is not None]
        best = min(built, key=lambda value: abs(self._excess(value)), default=None)
        if best is None or self.knob.integers_only:
            return best
        rounded = (float(f"{best:.{digits}g}") for digits in range(1, 17))
        return next((value for value in rounded if self._cost(value) == self.costs[best]), best)

    def _bracket(self) -> tuple[int | float, int | float] | None:
        """Return two values whose costs enclose the wanted one, by doubling or halving the present value; or None."""
        start = self.knob.value or 1
        first = self._nearest_valid(start, 0, math.inf)
        if first is None:
            return None
        ends = {2.0: first, 0.5: first}
        for doubling in range(1, DOUBLINGS + 1):
            for factor, end in list(ends.items()):
                bounds = (end, math.inf) if factor > 1 else (0, end)
                value = self._nearest_valid(start * factor**doubling, *bounds)
                if value is not None and (self._excess(value) > 0) != (self._excess(end) > 0):
                    return end, value
                if value is None or abs(self._excess(value)) > abs(self._excess(end)):
                    del ends[factor]  # this direction leads away from the wanted cost
                else:
                    ends[factor] = value
        return None

    def _bisect(self, one: int | float, other: int | float) -> None:
        for _ in range(HALVINGS):
            middle = self._nearest_valid((one + other) / 2, min(one, other), max(one, other))
            if middle is None or self._excess(middle) == 0:
                return
            if (self._excess(middle) > 0) == (self._excess(one) > 0):
                one = middle
            else:
                other = middle

    def _nearest_valid(self, value: float, low: float, high: float) -> int | float | None:
        """Return the value, or for an integer knob its nearest integer with a valid model; None outside the bounds."""
        if not self.knob.integers_only:
            return value if low < value < high and self._cost(value) is not None else None
        middle = max(1, round(value))
        for distance in range(MAX_DISTANCE):
            for number in (middle + distance, middle - distance):
                if low < number < high and self._cost(number) is not None:
                    return number
        return None

    def _cost(self, value: int | float) -> int | None:
        if value not in self.costs:
            try:
                self.costs[value] = cost_of(self.knob.with_value(value), self.metric, self.length)
            except (ValidationError, SeqmixError) as error:
                self.costs[value] = None
                self.last_error = str(error).splitlines()[-1].strip()
        return self.costs[value]

    def _excess(self, value: int | float) -> float:
        """Return the value's cost minus the wanted cost."""
        return (self._cost(value) or 0) - self.wanted
