"""Interleaving, ratios, matmul counts and benchmark runs; no test depends on actual speed."""

import time
from collections import Counter

import pytest
import torch
import torch.nn.functional as F

from seqmix.lab.bench import benchmark
from seqmix.lab.bench.benchmark import Forecast, Implementation, PreparedCall, Skip, run
from seqmix.lab.bench.machine import available_memory, with_peak_memory
from seqmix.lab.bench.models import PrefillBenchmark
from seqmix.lab.bench.op import OpBenchmark
from seqmix.lab.bench.products import MAX_ELEMENTS, MAX_SIDE, Product, calls_of, record_products, split_products
from seqmix.lab.bench.timing import MIN_ROUNDS, Spread, TimedCall, lengthen, ratio, time_interleaved, turns
from seqmix.ops.decay import decay
from seqmix.ops.decay.api import decay_flops
from seqmix.ops.runtime.paradigm import Paradigm

CPU = torch.device("cpu")


# ---- turns and ratios


def test_calls_are_interleaved_and_preparation_is_not_timed():
    now, log = [0.0], []

    def call(name, seconds, units=1):
        def run():
            log.append(name)
            now[0] += seconds

        def prepare():
            log.append(f"prepare {name}")
            now[0] += 100.0

        return TimedCall(run, prepare, units=units)

    calls = {"a": call("a", 1.0), "b": call("b", 6.0, units=3)}
    samples = time_interleaved(calls, repeat=3, clock=lambda: now[0], synchronize=lambda: None)
    assert samples == {"a": [1.0] * 3, "b": [2.0] * 3}
    assert [name for name in log if " " not in name] == ["a", "b", "b", "a", "a", "b"]
    assert log[:4] == ["prepare a", "a", "prepare b", "b"]


def test_first_turn_rotates_between_calls():
    assert [round[0] for round in turns("abc", 6)] == list("abcabc")
    assert all(sorted(round) == list("abc") for round in turns("abc", 6))


def test_ratio_is_computed_within_each_round():
    # the machine is ten times slower in the last round; the ratio does not know
    assert ratio([2.0, 4.0, 30.0], [1.0, 2.0, 10.0]) == Spread(2.0, 2.0, 3.0)
    with pytest.raises(ValueError, match="longer"):
        ratio([1.0], [1.0, 2.0])


def test_device_is_synchronized_before_and_after_each_call():
    log = []
    time_interleaved({"a": TimedCall(lambda: log.append("run"))}, repeat=2, synchronize=lambda: log.append("wait"))
    assert log == ["wait", "run", "wait"] * 2


def test_short_calls_are_repeated():
    log = []
    call = TimedCall(lambda: log.append("run"), units=2)
    longer = lengthen(call, seconds=1e-3)  # of a unit
    longer.run()
    assert (len(log), longer.units) == (3, 6)
    assert lengthen(call, seconds=1.0) is call
    prepared = TimedCall(call.run, prepare=lambda: None)
    assert lengthen(prepared, seconds=1e-6) is prepared


# ---- products


def flops(products):
    return sum(product.flops * count for product, count in products.items())


def test_matmul_flops_are_counted_forward_and_backward():
    x, w = torch.randn(3, 5, 8, requires_grad=True), torch.randn(7, 8, requires_grad=True)
    assert flops(record_products(lambda: F.linear(x, w))) == 2 * 15 * 8 * 7
    assert flops(record_products(lambda: F.linear(x, w).sum().backward())) == 3 * 2 * 15 * 8 * 7
    assert flops(record_products(lambda: x @ x.transpose(1, 2))) == 2 * 3 * 5 * 8 * 5
    assert flops(record_products(lambda: torch.addmm(w, w @ w.T, w))) == 2 * 7 * 8 * 7 + 2 * 7 * 7 * 8


def test_matmuls_inside_an_op_are_counted():
    q, k, v = torch.randn(1, 64, 2, 8), torch.randn(1, 64, 2, 8), torch.randn(1, 64, 2, 12)
    log_decay = torch.tensor([-0.1, -0.2])
    counted = flops(record_products(lambda: decay(q, k, v, log_decay, paradigm=Paradigm.CHUNKWISE, chunk_size=16)))
    declared = 2 * decay_flops(Paradigm.CHUNKWISE, 64, 8, 12, chunk_size=16)
    assert counted == declared


@pytest.mark.parametrize(("causal", "squares"), [(False, 1.0), (True, 0.5 * 1025 / 1024)])
def test_attention_flops_follow_the_number_of_scores(causal, squares):
    q, k, v = (torch.randn(2, 3, 1024, 16, requires_grad=True) for _ in range(3))
    forward = 2 * 2 * (2 * 3 * 1024 * 1024 * 16) * squares

    def attend():
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    assert flops(record_products(attend)) == pytest.approx(forward)
    assert flops(record_products(lambda: attend().sum().backward())) == pytest.approx(3.5 * forward)


def test_large_matmuls_are_split_without_changing_flops():
    products = Counter({Product(1, 3 * MAX_SIDE, 64, 4, torch.float32): 2, Product(300, 512, 8, 512, torch.float32): 1})
    pieces = split_products(products)
    assert flops(pieces) == pytest.approx(flops(products))
    assert all(max(p.m, p.k, p.n) <= MAX_SIDE and p.batch * p.m * p.n <= MAX_ELEMENTS for p in pieces)


def test_timed_matmul_call_runs_no_other_product():
    product = Product(2, 3, 4, 5, torch.float32)
    (call,) = calls_of([product], CPU).values()
    counted = record_products(call.run)
    # an `out=` is seen as the product that it is
    assert set(counted) <= {product}
    assert call.units == 100


def test_opaque_custom_op_makes_flop_count_unknown():
    @torch.library.custom_op("seqmix::opaque_for_a_test", mutates_args=())
    def opaque(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    assert record_products(lambda: opaque(torch.ones(2))) is None


# ---- memory


def test_peak_memory_covers_memory_allocated_by_the_call():
    made, peak = with_peak_memory(lambda: torch.ones(2**24), CPU)
    assert len(made) == 2**24
    if peak is None:
        pytest.skip("this system does not tell")
    assert 2**26 * 0.8 < peak < 2**26 * 3
    assert available_memory(CPU) > 0


# ---- the suite


class Fake(Implementation):
    def __init__(self, name, *, reason=None, error=None, seconds=0.0):
        self.name, self.reason, self.error, self.lengths = name, reason, error, []

    def unavailable_reason(self):
        return self.reason

    def prepared_call(self, length):
        self.lengths.append(length)
        if self.error is not None and length >= 64:
            raise self.error
        return PreparedCall(call=TimedCall(lambda: None), tokens=length)


class FakeBenchmark(benchmark.Benchmark):
    name = title = "fake"

    def __init__(self, settings, *implementations):
        super().__init__(settings)
        self.implementations = implementations

    def parts(self):
        return {"fake": list(self.implementations)}


def test_failed_implementation_is_reported_and_others_are_measured(settings):
    implementations = (
        Fake("good"),
        Fake("absent", reason="it is not installed"),
        Fake("broken", error=RuntimeError("no such thing\nand more")),
        Fake("refusing", error=Skip("takes whole chunks")),
        Fake("large", error=torch.OutOfMemoryError("x")),
    )
    report = run(FakeBenchmark(settings(lengths=(64, 32)), *implementations))
    assert [row.length for row in report.rows] == [32] * 5 + [64] * 5
    assert {row.name: row.skipped for row in report.rows if row.length == 64} == {
        "good": None,
        "absent": "it is not installed",
        "broken": "failed with RuntimeError: no such thing",
        "refusing": "takes whole chunks",
        "large": "does not fit into the GPU's memory",
    }
    good = next(row for row in report.rows if row.name == "good")
    assert good.ratio == Spread(1.0, 1.0, 1.0)
    assert good.tokens_per_second > 0


def test_interrupted_run_keeps_finished_measurements(settings):
    stopped = Fake("stopped", error=KeyboardInterrupt())
    report = run(FakeBenchmark(settings(lengths=(32, 64)), stopped))
    assert [row.length for row in report.rows] == [32]
    assert report.notes == ("Stopped before the end.",)
    with pytest.raises(KeyboardInterrupt):
        run(FakeBenchmark(settings(lengths=(64,)), stopped))


def test_slow_calls_are_predicted_from_shorter_lengths(settings):
    forecast = Forecast(2, settings(limit=10.0))
    assert forecast.probes("a", 16_384) == [256, 1024, 4096]
    forecast.add("a", 1024, 0.5, 2.0**20)
    assert forecast.probes("a", 16_384) == [4096]
    forecast.require("a", 4096, rows=1)  # 8 s, if it is quadratic
    with pytest.raises(Skip, match=r"would take about 16 s per call, above the limit of 10 s"):
        forecast.require("a", 4096, rows=2)
    forecast.add("a", 2048, 1.0, 2.0**21)
    forecast.require("a", 16_384, rows=1)  # it is linear
    forecast.require("unknown", 16_384, rows=1)


def test_out_of_memory_is_predicted(settings):
    forecast = Forecast(2, settings(limit=1e9))
    forecast.add("a", 1024, 1e-6, 2.0**30)
    with pytest.raises(Skip, match=r"would need about [\d,]+ GiB, but only [\d,]+ GiB are free"):
        forecast.require("a", 2**20, rows=1)


def test_implementations_are_selected_by_the_only_option(settings):
    benchmark = FakeBenchmark(settings(only=("b",)), Fake("a"), Fake("b"))
    assert [row.name for row in run(benchmark).rows] == ["b"]


def test_op_and_model_rows_report_shares_and_sizes(settings):
    report = run(OpBenchmark(settings(only=("chunkwise", "eager"))))
    assert {row.what for row in report.rows} == {"forward", "forward + backward"}
    assert all(row.share.median > 0 and row.floor > 0 for row in report.rows)
    assert report.machine["product_flops_per_second"] > 0
    assert report.machine["copy_bytes_per_second"] > 0
    prefill = run(PrefillBenchmark(settings(only=("seqmix", "gpt-sdpa"))))
    assert [row.name for row in prefill.rows] == ["seqmix", "gpt-sdpa"]
    assert all(row.skipped is None and row.parameters > 0 and row.share.median > 0 for row in prefill.rows)


def test_row_with_moved_bytes_has_a_time_floor_and_share(settings):
    class Mover(Fake):
        def prepared_call(self, length):
            return PreparedCall(call=TimedCall(lambda: None), tokens=1, moved_bytes=1000)

    (row,) = run(FakeBenchmark(settings(), Mover("mover"))).rows
    assert row.floor > 0
    assert row.share is not None


def test_interleave_lengths_option_alternates_lengths(settings):
    order = []

    class Logged(Fake):
        def prepared_call(self, length):
            return PreparedCall(call=TimedCall(lambda: order.append((self.name, length)), units=10**9), tokens=length)

    def places(**options):
        order.clear()
        report = run(FakeBenchmark(settings(lengths=(64, 32), **options), Logged("a"), Logged("b")))
        return {(row.name, row.length): row for row in report.rows}

    alone = places()
    assert [length for _, length in order] == sorted(length for _, length in order)
    assert alone["a", 64].ratio == alone["a", 32].ratio == Spread(1.0, 1.0, 1.0)
    together = places(interleave_lengths=True)
    assert len(set(order[-4:])) == len(set(order[-8:-4])) == 4
    assert {place for place, row in together.items() if row.ratio == Spread(1.0, 1.0, 1.0)} == {("a", 32), ("b", 32)}


def test_cpu_time_option_uses_process_clock(settings, monkeypatch):
    clocks = []

    def watched(*arguments, clock=None, **options):
        clocks.append(clock)
        return time_interleaved(*arguments, **options)

    monkeypatch.setattr(benchmark, "time_interleaved", watched)
    run(FakeBenchmark(settings(cpu_time=True), Fake("a")))
    run(FakeBenchmark(settings(), Fake("a")))
    assert [clock for clock in clocks if clock] == [time.process_time, time.perf_counter]


def test_report_omits_machine_rates_and_shares_when_disabled(settings):
    report = run(PrefillBenchmark(settings(only=("seqmix",), measures_rates=False)))
    assert "product_flops_per_second" not in report.machine
    assert [(row.share, row.skipped) for row in report.rows] == [(None, None)]


def test_timing_stops_after_the_minimum_rounds_when_time_is_up():
    rounds = time_interleaved({"a": TimedCall(lambda: None), "b": TimedCall(lambda: None)}, repeat=50, end=0.0)
    assert {name: len(samples) for name, samples in rounds.items()} == {"a": MIN_ROUNDS, "b": MIN_ROUNDS}
