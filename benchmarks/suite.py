"""One benchmark: entries for every contestant and length, warm, measured in turn, with what they are shares of.

What cannot run here, does not fit, or would take too long is a row that says why; nobody's failure ends the run.
Whether a call fits is told from the same contestant at shorter lengths.
"""

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import torch

from ..models import ModelConfig
from ..registry import SeqmixError, nearest
from .machine import Rates, available_memory, describe, peak_memory, synchronizer
from .measure import Call, Spread, interleaved, lengthened, ratio
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
    """Names of contestants; all when empty."""
    compile: bool = False
    """Whether those that can be compiled also take part compiled."""
    checkpoint: bool = False
    """Whether training computes layers anew in backward instead of keeping what they formed."""
    tokens: int = 2048
    """A training step has as many whole sequences as these are, and one at least."""
    batch: int = 1
    """Sequences that an op maps, that are read, or decoded, at once."""
    limit: float = 120.0
    """Seconds that one call may take at most, by what is told from shorter lengths."""
    rates: Rates | None = None
    """What the machine's rates are measured with; chosen for the device when None."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One contestant at one length, ready to run."""

    call: Call
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
    """What one contestant did at one length."""

    what: str
    length: int
    name: str
    skipped: str | None = None
    """Why there are no figures."""
    parameters: int | None = None
    tokens: int | None = None
    """Tokens a step."""
    seconds: Spread | None = None
    """Of a step."""
    ratio: Spread | None = None
    """Over the first contestant's seconds, in the same round."""
    share: Spread | None = None
    """Of the floor: the seconds that its own matrix products take alone, or that memory needs, over its seconds."""
    floor: float | None = None
    """Those seconds, median."""
    peak_bytes: int | None = None
    """Beyond what was held before the step."""
    state_bytes: int | None = None

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
    """A contestant does not run at this length; the message says why."""


class Contestant(ABC):
    """One that takes part in a benchmark."""

    name: str
    base: str | None = None
    """Another that has its products and its growth, and is measured before it."""

    @abstractmethod
    def missing(self) -> str | None:
        """Why it cannot run here; None if it can."""

    @abstractmethod
    def rows(self, length: int) -> int:
        """Sequences a call; its cost is in proportion to them."""

    @abstractmethod
    def entry(self, length: int) -> Entry:
        """Ready to run at a length.

        Raises:
            Skip: it cannot, for a reason.
        """

    def release(self) -> None:  # noqa: B027 most hold nothing
        """Give its memory back."""


class Benchmark(ABC):
    """What is measured of whom."""

    name: ClassVar[str]
    title: ClassVar[str]
    order: ClassVar[int] = 2
    """The power of the length that a sequence's cost grows with at most."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    @abstractmethod
    def parts(self) -> dict[str, list[Contestant]]:
        """Contestants, by what they do (forward, forward + backward)."""

    def notes(self) -> Iterable[str]:
        """What a reader must know to compare."""
        return ()


Progress = Callable[[str], Any]


def run(benchmark: Benchmark, progress: Progress = lambda text: None) -> Report:  # noqa: ARG005
    """Measure; `progress` is told what is being done.

    Raises:
        SeqmixError: a name of `only` is nobody's.
    """
    settings = benchmark.settings
    kinds = settings.rates or Rates.for_device(settings.device)
    parts = {what: _chosen(contestants, settings.only) for what, contestants in benchmark.parts().items()}
    rates: dict[str, list[float]] = {"product": [], "copy": []}
    rows: list[Row] = []
    notes = list(benchmark.notes())
    try:
        for what, contestants in parts.items():
            forecast = Forecast(benchmark.order, settings)
            for length in sorted(settings.lengths):
                rows += _Round(settings, kinds, what, length, forecast, progress).measured(contestants, rates)
            for contestant in contestants:
                contestant.release()
    except KeyboardInterrupt:
        if not rows:
            raise
        notes.append("Stopped before the end.")  # what has been measured is not lost
    machine = describe(settings.device)
    if rates["product"]:
        machine["product_flops_per_second"] = kinds.flops / Spread.of(rates["product"]).median
        machine["copy_bytes_per_second"] = kinds.moved / Spread.of(rates["copy"]).median
    told = {"model", "device", "dtype", "rates", "only"}
    return Report(
        benchmark=benchmark.name,
        title=benchmark.title,
        machine=machine,
        settings={
            "dtype": str(settings.dtype).removeprefix("torch."),
            "d_model": settings.model.d_model,
            "n_layers": settings.model.n_layers,
            **{name: getattr(settings, name) for name in Settings.__dataclass_fields__ if name not in told},
        },
        rows=rows,
        notes=tuple(notes),
    )


def _chosen(contestants: Sequence[Contestant], only: Sequence[str]) -> list[Contestant]:
    names = [contestant.name for contestant in contestants]
    for name in only:
        if name not in names:
            raise SeqmixError(f"nobody is called {name!r}; who takes part: {', '.join(names)}{nearest(name, names)}")
    return [contestant for contestant in contestants if not only or contestant.name in only]


class Forecast:
    """What a call will take, by what it took at shorter lengths: a sequence's cost grows at most as last seen."""

    def __init__(self, order: int, settings: Settings) -> None:
        self.order, self.settings = order, settings
        self.seen: dict[str, list[tuple[int, float, float]]] = {}
        """Length, seconds and bytes, both of one sequence."""

    def probes(self, contestant: str, length: int) -> list[int]:
        """Shorter lengths to be tried first, a quarter of the next each."""
        known = max((seen[0] for seen in self.seen.get(contestant, [])), default=0)
        lengths = []
        while self.order > 1 and (length := length // 4) > max(known, 128):
            lengths.append(length)
        return lengths[::-1]

    def add(self, contestant: str, length: int, seconds: float, peak: float) -> None:
        """Remember what one sequence took: seconds and bytes."""
        self.seen.setdefault(contestant, []).append((length, seconds, peak))

    def require(self, contestant: str, length: int, rows: int) -> None:
        """Refuse what does not fit.

        Raises:
            Skip: with what it would take.
        """
        if not (seen := self.seen.get(contestant)):
            return
        seconds, peak = (rows * self._grown([(row[0], row[i]) for row in seen], length) for i in (1, 2))
        if seconds > self.settings.limit:
            raise Skip(f"would take about {seconds:,.2g} s a call, above the limit of {self.settings.limit:,g} s")
        available, gib = available_memory(self.settings.device), 2**30
        if peak > 0.9 * available:
            raise Skip(f"would need about {peak / gib:,.0f} GiB, and {available / gib:,.0f} GiB are free")

    def _grown(self, seen: Sequence[tuple[int, float]], length: int) -> float:
        last_length, last = seen[-1]
        power = float(self.order)
        if len(seen) > 1 and seen[-2][1] > 0 and last > 0 and seen[-2][0] < last_length:
            # at least in proportion; a little of a quadratic part will grow to be much
            power = min(power, max(1.0, math.log(last / seen[-2][1]) / math.log(last_length / seen[-2][0])))
        return last * (length / last_length) ** power


@dataclass(frozen=True)
class _Round:
    """All contestants at one length."""

    settings: Settings
    kinds: Rates
    what: str
    length: int
    forecast: Forecast
    progress: Progress

    def measured(self, contestants: Sequence[Contestant], rates: dict[str, list[float]]) -> Iterator[Row]:
        """A row each; the machine's rates are added to `rates`."""
        device, repeat = self.settings.device, self.settings.repeat
        entries: dict[str, Entry] = {}
        peaks: dict[str, int | None] = {}
        pieces: dict[str, dict[Product, float]] = {}
        skipped: dict[str, str] = {}
        for contestant in contestants:
            name = contestant.name
            try:
                entries[name], peaks[name], products = self._ready(contestant)
                if products is not None:
                    pieces[name] = in_pieces(products)
            except Skip as reason:
                skipped[name] = str(reason)
        calls = {name: entry.call for name, entry in entries.items()}
        own = self.kinds.calls(device, self.settings.dtype) if entries else {}
        alone = timed_alone({product for counted in pieces.values() for product in counted}, device)
        samples = interleaved(
            # no contestant's name begins with a blank
            calls | {f" {name}": call for name, call in own.items()} | {f" {p}": call for p, call in alone.items()},
            repeat=repeat,
            synchronize=synchronizer(device),
            on_call=lambda name: self._tell(name if name in calls else "what the machine can do"),
        )
        for name in own:
            rates[name] += samples[f" {name}"]
        for contestant in contestants:
            name = contestant.name
            if name not in entries:
                yield Row(what=self.what, length=self.length, name=name, skipped=skipped[name])
                continue
            entry, seconds, floors = entries[name], samples[name], None
            if (counted := pieces.get(name, pieces.get(contestant.base or ""))) is not None:
                floors = [sum(n * samples[f" {product}"][i] for product, n in counted.items()) for i in range(repeat)]
            elif entry.moved is not None:
                floors = [entry.moved / self.kinds.moved * copy for copy in samples[" copy"]]
            yield Row(
                what=self.what,
                length=self.length,
                name=name,
                parameters=entry.parameters,
                tokens=entry.tokens,
                seconds=Spread.of(seconds),
                ratio=ratio(seconds, samples[next(iter(entries))]),
                share=None if floors is None else ratio(floors, seconds),
                floor=None if floors is None else Spread.of(floors).median,
                peak_bytes=peaks[name],
                state_bytes=entry.state_bytes,
            )

    def _tell(self, text: str) -> None:
        self.progress(f"{self.what} at {self.length:,}: {text}")

    def _ready(self, contestant: Contestant) -> tuple[Entry, int | None, Counter[Product] | None]:
        """A warm entry, its memory and its products.

        Raises:
            Skip: it cannot run, for whatever reason.
        """
        if reason := contestant.missing():
            raise Skip(reason)
        # a variant is foretold by its base: every length that is compiled takes its time
        probes = [] if contestant.base else self.forecast.probes(contestant.name, self.length)
        try:
            for probe in probes:
                self._tell(f"{contestant.name} (at {probe:,}, to tell what {self.length:,} takes)")
                self._warm(contestant, probe)
            self._tell(f"{contestant.name} (warming up)")
            entry, peak = self._warm(contestant, self.length)
            return entry, peak, None if entry.record is None else recorded(entry.record)
        except torch.OutOfMemoryError:
            contestant.release()
            torch.cuda.empty_cache()
            raise Skip("does not fit into the GPU's memory") from None
        except Skip:
            raise
        except Exception as error:  # whatever another project's code raises: the others are measured
            first = (str(error).splitlines() or [""])[0]
            raise Skip(f"failed with {type(error).__name__}: {first}") from error

    def _warm(self, contestant: Contestant, length: int) -> tuple[Entry, int | None]:
        """Make an entry, run it to be warm, and once more to see its memory and remember its time."""
        device, rows = self.settings.device, contestant.rows(length)
        self.forecast.require(contestant.base or contestant.name, length, rows)
        entry = contestant.entry(length)
        entry.call.prepare()
        entry.call.run()
        entry.call.prepare()  # whose memory is not the call's
        with peak_memory(device) as peak:
            (seconds,) = interleaved({"": Call(entry.call.run)}, repeat=1, synchronize=synchronizer(device))[""]
        self.forecast.add(contestant.name, length, seconds / rows, (peak.bytes or 0) / rows)
        return replace(entry, call=lengthened(entry.call, seconds)), peak.bytes


def as_dict(report: Report) -> dict[str, Any]:
    """For JSON, with what follows from the figures."""
    rows = [asdict(row) | {"tokens_per_second": row.tokens_per_second} for row in report.rows]
    return asdict(report) | {"rows": rows}


def from_dict(values: dict[str, Any]) -> Report:
    """A report that `as_dict` gave."""
    rows = []
    for row in values["rows"]:
        fields: dict[str, Any] = {name: row[name] for name in Row.__dataclass_fields__}
        for name in ("seconds", "ratio", "share"):
            fields[name] = None if row[name] is None else Spread(**row[name])
        rows.append(Row(**fields))
    return Report(**values | {"rows": rows, "notes": tuple(values["notes"])})
