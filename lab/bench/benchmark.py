"""One benchmark: every implementation at every length, warmed up, timed interleaved, and compared with its floor.

An implementation that cannot run here, does not fit or would take too long becomes a row that gives the reason; no
failure ends the run. Time and memory of a call are predicted from the same implementation at shorter lengths.
"""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch

from ...models import ModelConfig
from ...registry import format_duration, require_name
from .machine import Rates, available_memory, describe, synchronizer, with_peak_memory
from .products import Product, calls_of, record_products, split_products
from .timing import Spread, TimedCall, lengthen, ratio, time_interleaved


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of a benchmark: model, device, lengths, and how to measure."""

    lengths: tuple[int, ...]
    """Sequence lengths in tokens; for decoding, lengths of the context."""
    model: ModelConfig
    """Configuration of the model; the op benchmark takes only the shapes of its mixer."""
    device: torch.device
    dtype: torch.dtype = torch.float32
    repeat: int = 5
    """Number of rounds; each round runs every call once."""
    only: tuple[str, ...] = ()
    """Names of the implementations to measure; all when empty."""
    compile: bool = False
    """True to also measure compiled variants of the implementations that have one."""
    activation_checkpointing: bool = False
    """True if training recomputes activations in the backward pass."""
    tokens: int = 2048
    """Maximum tokens of a training step, which has whole sequences, and at least one."""
    batch: int = 1
    """Sequences per call of an op, a prefill or a decoding step."""
    interleave_lengths: bool = False
    """True to interleave all lengths in the same rounds; ratios are then to the implementation's first length."""
    cpu_time: bool = False
    """True to measure CPU time, which other processes on a busy machine disturb least."""
    limit: float = 120.0
    """Time limit of one call, in seconds; a call that is predicted to take longer is skipped."""
    budget: float | None = None
    """Time budget in seconds; at its end the rounds end, and further lengths are skipped. None for no limit."""
    measures_rates: bool = True
    """True to also measure the machine's rates: times of a memory copy, and of each call's matrix products alone.
    `Row.floor` and `Row.share`, the share of the attainable speed that a call reaches, are computed from them."""
    rates: Rates | None = None
    """Sizes of the matrix product and the copy that measure the machine's rates; None chooses them for the device."""


@dataclass(frozen=True, kw_only=True)
class PreparedCall:
    """Call of one implementation at one length, ready to run and to be timed."""

    call: TimedCall
    tokens: int
    """Tokens that one step of the call processes."""
    parameters: int | None = None
    state_bytes: int | None = None
    """Bytes of the states of all sequences."""
    moved_bytes: int | None = None
    """Bytes that one step must read from and write to memory; None if memory bandwidth does not limit the call."""
    record: Callable[[], Any] | None = None
    """Function that runs the call once, so that its matrix products can be recorded; None if the `base` of the
    implementation has the same products, or if products do not limit the call."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """Measured values of one implementation at one length."""

    what: str
    """Part of the benchmark, such as "forward"."""
    length: int
    name: str
    """Name of the implementation."""
    skipped: str | None = None
    """Reason why nothing was measured; None if it was."""
    parameters: int | None = None
    tokens: int | None = None
    """Tokens that one step processes."""
    seconds: Spread | None = None
    """Seconds per step."""
    ratio: Spread | None = None
    """Seconds divided by those of the first implementation in the same round; with `interleave_lengths`, by the
    implementation's own at its first length."""
    share: Spread | None = None
    """Share of the attainable speed: floor divided by seconds, round by round; 1 is a call as fast as its floor."""
    floor: float | None = None
    """Lower bound of the seconds of a step: the time of its own matrix products alone, or of its memory traffic; median
    over rounds."""
    peak_bytes: int | None = None
    """Peak bytes beyond those allocated before the step."""
    state_bytes: int | None = None
    loss: float | None = None
    """Validation loss in nats per token; None if the benchmark trains nothing."""

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens per step divided by the median seconds."""
        return None if self.seconds is None or self.tokens is None else self.tokens / self.seconds.median


@dataclass(frozen=True, kw_only=True)
class Report:
    """Results of one run of a benchmark: rows, machine, settings and notes."""

    benchmark: str
    title: str
    machine: dict[str, Any]
    settings: dict[str, Any]
    rows: list[Row]
    notes: tuple[str, ...] = ()


class Skip(Exception):  # noqa: N818 not an error: the row is skipped
    """An implementation does not run at this length; the message gives the reason."""


class Implementation(ABC):
    """Implementation that a benchmark measures."""

    name: str
    base: str | None = None
    """Name of an implementation with the same matrix products and the same growth of cost, which must be measured
    first; None if there is none."""

    @abstractmethod
    def unavailable_reason(self) -> str | None:
        """Return the reason why the implementation cannot run here; None if it can."""

    @abstractmethod
    def prepared_call(self, length: int) -> PreparedCall:
        """Return the call to measure at a sequence length, ready to run.

        Raises:
            Skip: it does not run at this length.
        """

    def release(self) -> None:  # noqa: B027 most implementations keep no memory
        """Free the memory that the implementation holds."""


class Benchmark(ABC):
    """A benchmark: its implementations, grouped into parts such as forward and backward."""

    name: ClassVar[str]
    title: ClassVar[str]
    order: ClassVar[int] = 2
    """The cost of a sequence grows at most with this power of its length."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    @abstractmethod
    def parts(self) -> dict[str, list[Implementation]]:
        """Return the implementations by part, such as "forward" and "forward + backward"."""

    def rows(self, length: int) -> int:  # noqa: ARG002
        """Return the number of sequences per call; the cost of a call is proportional to it."""
        return self.settings.batch

    def notes(self) -> Iterable[str]:
        """Return sentences that a reader needs to interpret the figures."""
        return ()


def run(benchmark: Benchmark, progress: Callable[[str], Any] = lambda text: None) -> Report:  # noqa: ARG005
    """Run a benchmark; `progress` is called with a line for each call.

    Raises:
        SeqmixError: no implementation has a name given in `only`.
    """
    settings = benchmark.settings
    parts = {}
    for what, implementations in benchmark.parts().items():
        names = chosen_names([implementation.name for implementation in implementations], settings.only)
        parts[what] = [implementation for implementation in implementations if implementation.name in names]
    lengths = sorted(settings.lengths)
    machine = describe(settings.device)
    rates = settings.rates or Rates.for_device(settings.device)
    end = math.inf if settings.budget is None else time.monotonic() + settings.budget
    seconds: dict[str, list[float]] = {"product": [], "copy": []}
    rows: list[Row] = []
    notes = list(benchmark.notes())
    try:
        for what, implementations in parts.items():
            forecast = Forecast(benchmark.order, settings)
            for group in [lengths] if settings.interleave_lengths else [[length] for length in lengths]:
                rows += _Rounds(benchmark, rates, what, group, forecast, progress, end).measure(
                    implementations, seconds
                )
            for implementation in implementations:
                implementation.release()
    except KeyboardInterrupt:
        if not rows:
            raise
        notes.append("Stopped before the end.")  # the rows measured so far are kept
    if seconds["product"]:
        machine["product_flops_per_second"] = rates.flops / Spread.of(seconds["product"]).median
        machine["copy_bytes_per_second"] = rates.moved_bytes / Spread.of(seconds["copy"]).median
    reported_elsewhere = {"model", "device", "dtype", "rates", "only"}
    return Report(
        benchmark=benchmark.name,
        title=benchmark.title,
        machine=machine,
        settings={
            "dtype": str(settings.dtype).removeprefix("torch."),
            "d_model": settings.model.d_model,
            "n_layers": settings.model.n_layers,
            **{
                name: getattr(settings, name)
                for name in Settings.__dataclass_fields__
                if name not in reported_elsewhere
            },
        },
        rows=rows,
        notes=tuple(notes),
    )


def chosen_names(names: Sequence[str], only: Sequence[str]) -> list[str]:
    """Return the names listed in `only`, in the order of `names`; all of them if `only` is empty.

    Raises:
        SeqmixError: `only` lists a name that does not exist.
    """
    for name in only:
        require_name("implementation", name, names)
    return [name for name in names if not only or name in only]


class Forecast:
    """Prediction of a call's time and memory from shorter lengths, by the power law between the last two measured."""

    def __init__(self, order: int, settings: Settings) -> None:
        self.order = order
        self.settings = settings
        self.costs: dict[str, list[tuple[int, float, float]]] = {}
        """Measurements by implementation: length, seconds per sequence, and bytes per sequence, in the order taken."""

    def probes(self, implementation: str, length: int) -> list[int]:
        """Return the shorter lengths at which to try the call first, ascending; each is a quarter of the next."""
        known = max((measured for measured, _, _ in self.costs.get(implementation, [])), default=0)
        lengths = []
        while self.order > 1 and (length := length // 4) > max(known, 128):
            lengths.append(length)
        return lengths[::-1]

    def add(self, implementation: str, length: int, seconds: float, peak: float) -> None:
        """Record the seconds and bytes of one sequence at a length."""
        self.costs.setdefault(implementation, []).append((length, seconds, peak))

    def require(self, implementation: str, length: int, rows: int) -> None:
        """Check that a call of `rows` sequences is predicted to fit into the memory and the time limit.

        Raises:
            Skip: it is not; the message has the predicted cost.
        """
        if not (costs := self.costs.get(implementation)):
            return
        seconds, peak = (rows * self._extrapolate([(cost[0], cost[i]) for cost in costs], length) for i in (1, 2))
        if seconds > self.settings.limit:
            raise Skip(f"would take about {seconds:,.2g} s per call, above the limit of {self.settings.limit:,g} s")
        available = available_memory(self.settings.device)
        gib = 2**30
        if peak > 0.9 * available:
            raise Skip(f"would need about {peak / gib:,.0f} GiB, but only {available / gib:,.0f} GiB are free")

    def _extrapolate(self, costs: Sequence[tuple[int, float]], length: int) -> float:
        last_length, last = costs[-1]
        power = float(self.order)
        if len(costs) > 1 and costs[-2][1] > 0 and last > 0 and costs[-2][0] < last_length:
            # at least linear: fixed costs hide the growth at short lengths
            power = min(power, max(1.0, math.log(last / costs[-2][1]) / math.log(last_length / costs[-2][0])))
        return last * (length / last_length) ** power


class _Ready(NamedTuple):
    """An implementation warmed up at one length."""

    prepared: PreparedCall
    peak: int | None
    products: dict[Product, float] | None
    """Number of times that a step computes each matrix product, for the lower bound of its time; None if unknown, or
    if products do not limit the step."""


@dataclass(frozen=True)
class _Rounds:
    """Interleaved rounds of one part's implementations, at one length or at all lengths."""

    benchmark: Benchmark
    rates: Rates
    what: str
    lengths: Sequence[int]
    forecast: Forecast
    progress: Callable[[str], Any]
    end: float = math.inf
    """Time of `time.monotonic` at which the time budget is spent."""

    def measure(self, implementations: Sequence[Implementation], rate_seconds: dict[str, list[float]]) -> Iterator[Row]:
        """Yield a row per implementation and length; append the seconds of the machine's product and copy to
        `rate_seconds`."""
        settings = self.benchmark.settings
        ready: dict[tuple[str, int], _Ready] = {}
        skipped: dict[tuple[str, int], str] = {}
        places = [(implementation, length) for length in self.lengths for implementation in implementations]
        for implementation, length in places:
            try:
                if time.monotonic() >= self.end:
                    raise Skip(f"not started: the time budget of {format_duration(settings.budget or 0)} is spent")
                ready[implementation.name, length] = self._prepare(implementation, length)
            except Skip as reason:
                skipped[implementation.name, length] = str(reason)
        calls = {place: warm.prepared.call for place, warm in ready.items()}
        rate_calls = self.rates.calls(settings.device, settings.dtype) if ready and settings.measures_rates else {}
        product_calls = calls_of({p for warm in ready.values() for p in warm.products or ()}, settings.device)
        all_calls: dict[Any, TimedCall] = {**calls, **rate_calls, **product_calls}
        samples = time_interleaved(
            all_calls,
            repeat=settings.repeat,
            end=self.end,
            clock=time.process_time if settings.cpu_time else time.perf_counter,
            synchronize=synchronizer(settings.device),
            on_call=lambda key: self._report(key[0], key[1]) if key in calls else self._report("the machine's rates"),
        )
        for name in rate_calls:
            rate_seconds[name] += samples[name]
        # ratios are to the first implementation; with interleaved lengths, to the implementation's own first length
        group_by = 0 if settings.interleave_lengths else 1
        for implementation, length in places:
            place = implementation.name, length
            if place in skipped:
                yield Row(what=self.what, length=length, name=implementation.name, skipped=skipped[place])
                continue
            warm = ready[place]
            seconds = samples[place]
            reference = next(other for other in ready if other[group_by] == place[group_by])
            base = ready.get((implementation.base or "", length))
            products = warm.products or (base and base.products)
            floors = None
            if products:
                floors = [sum(n * samples[p][i] for p, n in products.items()) for i in range(len(seconds))]
            elif warm.prepared.moved_bytes is not None and settings.measures_rates:
                floors = [warm.prepared.moved_bytes / self.rates.moved_bytes * copy for copy in samples["copy"]]
            yield Row(
                what=self.what,
                length=length,
                name=implementation.name,
                parameters=warm.prepared.parameters,
                tokens=warm.prepared.tokens,
                seconds=Spread.of(seconds),
                ratio=ratio(seconds, samples[reference]),
                share=None if floors is None else ratio(floors, seconds),
                floor=None if floors is None else Spread.of(floors).median,
                peak_bytes=warm.peak,
                state_bytes=warm.prepared.state_bytes,
            )

    def _report(self, text: str, length: int | None = None) -> None:
        where = ", ".join(f"{each:,}" for each in (self.lengths if length is None else [length]))
        self.progress(f"{self.what} at {where}: {text}")

    def _prepare(self, implementation: Implementation, length: int) -> _Ready:
        """Warm up an implementation and record its memory and matrix products.

        Raises:
            Skip: it cannot run, for whatever reason.
        """
        if reason := implementation.unavailable_reason():
            raise Skip(reason)
        # a compiled variant is predicted by its base: compiling every shorter length would take long
        probes = [] if implementation.base else self.forecast.probes(implementation.name, length)
        try:
            for probe in probes:
                self._report(f"{implementation.name} (trying {probe:,} to predict {length:,})", length)
                self._warm(implementation, probe)
            self._report(f"{implementation.name} (warming up)", length)
            prepared, peak = self._warm(implementation, length)
            products = None
            if prepared.record is not None and self.benchmark.settings.measures_rates:
                products = record_products(prepared.record)
            return _Ready(prepared, peak, None if products is None else split_products(products))
        except torch.OutOfMemoryError:
            implementation.release()
            torch.cuda.empty_cache()
            raise Skip("does not fit into the GPU's memory") from None
        except Skip:
            raise
        except Exception as error:  # other projects' code may raise anything; the rest is still measured
            first = (str(error).splitlines() or [""])[0]
            raise Skip(f"failed with {type(error).__name__}: {first}") from error

    def _warm(self, implementation: Implementation, length: int) -> tuple[PreparedCall, int | None]:
        """Return a prepared call that has run once, and its peak bytes in a second run; the forecast records that run's
        time."""
        device = self.benchmark.settings.device
        rows = self.benchmark.rows(length)
        self.forecast.require(implementation.base or implementation.name, length, rows)
        prepared = implementation.prepared_call(length)
        prepared.call.prepare()
        prepared.call.run()
        prepared.call.prepare()  # outside of the measurement: its memory does not count
        once = partial(time_interleaved, {"": TimedCall(prepared.call.run)}, repeat=1, synchronize=synchronizer(device))
        samples, peak = with_peak_memory(once, device)
        (seconds,) = samples[""]
        self.forecast.add(implementation.name, length, seconds / rows, (peak or 0) / rows)
        return replace(prepared, call=lengthen(prepared.call, seconds)), peak
