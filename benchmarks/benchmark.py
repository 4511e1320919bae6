"""One benchmark: entries for every implementation and length, warm, interleaved, with what they are shares of.

What cannot run here, does not fit, or would take too long is a row that says why; nobody's failure ends the run.
Whether a call fits is predicted from the same implementation at shorter lengths.
"""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch

from ..models import ModelConfig
from ..registry import require_name
from .machine import Rates, available_memory, describe, synchronizer, with_peak_memory
from .measure import Spread, TimedCall, interleaved, lengthened, ratio
from .products import Product, in_pieces, recorded, timed_alone


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured, and where."""

    lengths: tuple[int, ...]
    """Tokens of a sequence; of what was read before, for decoding."""
    model: ModelConfig
    """The model, or that whose mixer's shapes an op has."""
    device: torch.device
    dtype: torch.dtype = torch.float32
    repeat: int = 5
    """Rounds."""
    only: tuple[str, ...] = ()
    """Names of implementations; all when empty."""
    compile: bool = False
    """Whether those that can be compiled also take part compiled."""
    activation_checkpointing: bool = False
    """Whether training recomputes activations in backward."""
    tokens: int = 2048
    """A training step has as many whole sequences as these are, and one at least."""
    batch: int = 1
    """Sequences that an op maps, that are read, or decoded, at once."""
    interleave_lengths: bool = False
    """Whether all lengths take turns in the same rounds; ratios are then to the same implementation's first length."""
    cpu_time: bool = False
    """Whether the processor's time is measured, which neighbours on a busy machine stretch least."""
    limit: float = 120.0
    """Seconds that one call may take at most, as predicted from shorter lengths."""
    shares: bool = True
    """Whether the machine's rates and the products alone are timed, which shares follow from."""
    rates: Rates | None = None
    """What the machine's rates are measured with; chosen for the device when None."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One implementation at one length, ready to run."""

    call: TimedCall
    tokens: int
    """Tokens a unit of the call."""
    parameters: int | None = None
    state_bytes: int | None = None
    """Of all sequences."""
    moved: int | None = None
    """Bytes that a unit must move, where memory is what limits it."""
    record: Callable[[], Any] | None = None
    """Runs the call's products once; None where they are those of another, or do not limit."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one implementation did at one length."""

    what: str
    length: int
    name: str
    skipped: str | None = None
    """Why there are no figures."""
    parameters: int | None = None
    tokens: int | None = None
    """Tokens per step."""
    seconds: Spread | None = None
    """Of a step."""
    ratio: Spread | None = None
    """Over the first implementation's seconds, in the same round."""
    share: Spread | None = None
    """Of the floor: the seconds that its own matrix products take alone, or that memory needs, over its seconds."""
    floor: float | None = None
    """Those seconds, median."""
    peak_bytes: int | None = None
    """Beyond what was held before the step."""
    state_bytes: int | None = None
    loss: float | None = None
    """Nats per token of the validation split, where something was learned."""

    @property
    def tokens_per_second(self) -> float | None:
        """By the median."""
        return None if self.seconds is None or self.tokens is None else self.tokens / self.seconds.median


@dataclass(frozen=True, kw_only=True)
class Report:
    """All that was measured in one run."""

    benchmark: str
    title: str
    machine: dict[str, Any]
    settings: dict[str, Any]
    rows: list[Row]
    notes: tuple[str, ...] = ()


class Skip(Exception):  # noqa: N818 it is no error
    """A implementation does not run at this length; the message says why."""


class Implementation(ABC):
    """One that takes part in a benchmark."""

    name: str
    base: str | None = None
    """Another that has its products and its growth, and is measured before it."""

    @abstractmethod
    def missing(self) -> str | None:
        """Why it cannot run here; None if it can."""

    @abstractmethod
    def entry(self, length: int) -> Entry:
        """Ready to run at a length, or a Skip."""

    def release(self) -> None:  # noqa: B027 most hold nothing
        """Give its memory back."""


class Benchmark(ABC):
    """What is measured."""

    name: ClassVar[str]
    title: ClassVar[str]
    order: ClassVar[int] = 2
    """The power of the length that a sequence's cost grows with at most."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    @abstractmethod
    def parts(self) -> dict[str, list[Implementation]]:
        """Implementations, by what they do (forward, forward + backward)."""

    def rows(self, length: int) -> int:  # noqa: ARG002
        """Sequences a call; its cost is in proportion to them."""
        return self.settings.batch

    def notes(self) -> Iterable[str]:
        """What a reader must know to compare."""
        return ()


def run(benchmark: Benchmark, progress: Callable[[str], Any] = lambda text: None) -> Report:  # noqa: ARG005
    """Measure; `progress` is called with what is being done.

    Raises:
        SeqmixError: there is no implementation of a name of `only`.
    """
    settings = benchmark.settings
    parts = {}
    for what, found in benchmark.parts().items():
        names = chosen_names([implementation.name for implementation in found], settings.only)
        parts[what] = [implementation for implementation in found if implementation.name in names]
    lengths = sorted(settings.lengths)
    machine = describe(settings.device)
    rates = settings.rates or Rates.for_device(settings.device)
    seconds: dict[str, list[float]] = {"product": [], "copy": []}
    rows: list[Row] = []
    notes = list(benchmark.notes())
    try:
        for what, found in parts.items():
            forecast = Forecast(benchmark.order, settings)
            for together in [lengths] if settings.interleave_lengths else [[length] for length in lengths]:
                rows += _Rounds(benchmark, rates, what, together, forecast, progress).measured(found, seconds)
            for implementation in found:
                implementation.release()
    except KeyboardInterrupt:
        if not rows:
            raise
        notes.append("Stopped before the end.")  # what has been measured is not lost
    if seconds["product"]:
        machine["product_flops_per_second"] = rates.flops / Spread.of(seconds["product"]).median
        machine["copy_bytes_per_second"] = rates.moved / Spread.of(seconds["copy"]).median
    reported = {"model", "device", "dtype", "rates", "only"}
    return Report(
        benchmark=benchmark.name,
        title=benchmark.title,
        machine=machine,
        settings={
            "dtype": str(settings.dtype).removeprefix("torch."),
            "d_model": settings.model.d_model,
            "n_layers": settings.model.n_layers,
            **{name: getattr(settings, name) for name in Settings.__dataclass_fields__ if name not in reported},
        },
        rows=rows,
        notes=tuple(notes),
    )


def chosen_names(names: Sequence[str], only: Sequence[str]) -> list[str]:
    """Those that are asked for, all where none is; a SeqmixError where one is not there."""
    for name in only:
        require_name("implementation", name, names)
    return [name for name in names if not only or name in only]


class Forecast:
    """What a call will take, by what it took at shorter lengths: a sequence's cost grows at most as last seen."""

    def __init__(self, order: int, settings: Settings) -> None:
        self.order = order
        self.settings = settings
        self.seen: dict[str, list[tuple[int, float, float]]] = {}
        """Length, seconds and bytes, both of one sequence."""

    def probes(self, implementation: str, length: int) -> list[int]:
        """Shorter lengths to be tried first, a quarter of the next each."""
        known = max((seen[0] for seen in self.seen.get(implementation, [])), default=0)
        lengths = []
        while self.order > 1 and (length := length // 4) > max(known, 128):
            lengths.append(length)
        return lengths[::-1]

    def add(self, implementation: str, length: int, seconds: float, peak: float) -> None:
        """Remember what one sequence took: seconds and bytes."""
        self.seen.setdefault(implementation, []).append((length, seconds, peak))

    def require(self, implementation: str, length: int, rows: int) -> None:
        """Refuse what does not fit, by a Skip that says what it would take."""
        if not (seen := self.seen.get(implementation)):
            return
        seconds, peak = (rows * self._grown([(row[0], row[i]) for row in seen], length) for i in (1, 2))
        if seconds > self.settings.limit:
            raise Skip(f"would take about {seconds:,.2g} s a call, above the limit of {self.settings.limit:,g} s")
        available = available_memory(self.settings.device)
        gib = 2**30
        if peak > 0.9 * available:
            raise Skip(f"would need about {peak / gib:,.0f} GiB, and {available / gib:,.0f} GiB are free")

    def _grown(self, seen: Sequence[tuple[int, float]], length: int) -> float:
        last_length, last = seen[-1]
        power = float(self.order)
        if len(seen) > 1 and seen[-2][1] > 0 and last > 0 and seen[-2][0] < last_length:
            # at least in proportion; a little of a quadratic part will grow to be much
            power = min(power, max(1.0, math.log(last / seen[-2][1]) / math.log(last_length / seen[-2][0])))
        return last * (length / last_length) ** power


class _Ready(NamedTuple):
    """A warm implementation at one length."""

    entry: Entry
    peak: int | None
    products: dict[Product, float] | None
    """What its floor is made of; None where they cannot be seen, or do not limit."""


@dataclass(frozen=True)
class _Rounds:
    """All implementations at lengths that are interleaved: one, or all."""

    benchmark: Benchmark
    rates: Rates
    what: str
    lengths: Sequence[int]
    forecast: Forecast
    progress: Callable[[str], Any]

    def measured(self, implementations: Sequence[Implementation], rates: dict[str, list[float]]) -> Iterator[Row]:
        """A row each; the seconds of the machine's two calls are added to `rates`."""
        settings = self.benchmark.settings
        ready: dict[tuple[str, int], _Ready] = {}
        skipped: dict[tuple[str, int], str] = {}
        places = [(implementation, length) for length in self.lengths for implementation in implementations]
        for implementation, length in places:
            try:
                ready[implementation.name, length] = self._ready(implementation, length)
            except Skip as reason:
                skipped[implementation.name, length] = str(reason)
        calls = {place: found.entry.call for place, found in ready.items()}
        own = self.rates.calls(settings.device, settings.dtype) if ready and settings.shares else {}
        alone = timed_alone({p for found in ready.values() for p in found.products or ()}, settings.device)
        together: dict[Any, TimedCall] = {**calls, **own, **alone}
        samples = interleaved(
            together,
            repeat=settings.repeat,
            clock=time.process_time if settings.cpu_time else time.perf_counter,
            synchronize=synchronizer(settings.device),
            on_call=lambda key: self._tell(key[0], key[1]) if key in calls else self._tell("the machine's rates"),
        )
        for name in own:
            rates[name] += samples[name]
        # a ratio is to the first implementation, or to the same one at the first length where all take turns
        like = 0 if settings.interleave_lengths else 1
        for implementation, length in places:
            place = implementation.name, length
            if place in skipped:
                yield Row(what=self.what, length=length, name=implementation.name, skipped=skipped[place])
                continue
            found = ready[place]
            seconds = samples[place]
            reference = next(other for other in ready if other[like] == place[like])
            base = ready.get((implementation.base or "", length))
            products = found.products or (base and base.products)
            floors = None
            if products:
                floors = [sum(n * samples[p][i] for p, n in products.items()) for i in range(settings.repeat)]
            elif found.entry.moved is not None and settings.shares:
                floors = [found.entry.moved / self.rates.moved * copy for copy in samples["copy"]]
            yield Row(
                what=self.what,
                length=length,
                name=implementation.name,
                parameters=found.entry.parameters,
                tokens=found.entry.tokens,
                seconds=Spread.of(seconds),
                ratio=ratio(seconds, samples[reference]),
                share=None if floors is None else ratio(floors, seconds),
                floor=None if floors is None else Spread.of(floors).median,
                peak_bytes=found.peak,
                state_bytes=found.entry.state_bytes,
            )

    def _tell(self, text: str, length: int | None = None) -> None:
        where = ", ".join(f"{each:,}" for each in (self.lengths if length is None else [length]))
        self.progress(f"{self.what} at {where}: {text}")

    def _ready(self, implementation: Implementation, length: int) -> _Ready:
        """A warm entry, its memory and its products; a Skip where it cannot run, for whatever reason."""
        if reason := implementation.missing():
            raise Skip(reason)
        # a variant is foretold by its base: every length that is compiled takes its time
        probes = [] if implementation.base else self.forecast.probes(implementation.name, length)
        try:
            for probe in probes:
                self._tell(f"{implementation.name} (at {probe:,}, to tell what {length:,} takes)", length)
                self._warm(implementation, probe)
            self._tell(f"{implementation.name} (warming up)", length)
            entry, peak = self._warm(implementation, length)
            products = recorded(entry.record) if entry.record is not None and self.benchmark.settings.shares else None
            return _Ready(entry, peak, None if products is None else in_pieces(products))
        except torch.OutOfMemoryError:
            implementation.release()
            torch.cuda.empty_cache()
            raise Skip("does not fit into the GPU's memory") from None
        except Skip:
            raise
        except Exception as error:  # whatever another project's code raises: the others are measured
            first = (str(error).splitlines() or [""])[0]
            raise Skip(f"failed with {type(error).__name__}: {first}") from error

    def _warm(self, implementation: Implementation, length: int) -> tuple[Entry, int | None]:
        """Make an entry, run it to be warm, and once more to see its memory and remember its time."""
        device = self.benchmark.settings.device
        rows = self.benchmark.rows(length)
        self.forecast.require(implementation.base or implementation.name, length, rows)
        entry = implementation.entry(length)
        entry.call.prepare()
        entry.call.run()
        entry.call.prepare()  # whose memory is not the call's
        once = partial(interleaved, {"": TimedCall(entry.call.run)}, repeat=1, synchronize=synchronizer(device))
        samples, peak = with_peak_memory(once, device)
        (seconds,) = samples[""]
        self.forecast.add(implementation.name, length, seconds / rows, (peak or 0) / rows)
        return replace(entry, call=lengthened(entry.call, seconds)), peak
