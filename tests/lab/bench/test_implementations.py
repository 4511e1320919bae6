"""Implementations that are timed: the call, its warm-up and its preparation."""

from dataclasses import replace

import pytest
import torch

from seqmix.lab.bench import benchmark
from seqmix.lab.bench.models import STEPS, DecodeBenchmark, TrainBenchmark
from seqmix.lab.bench.op import OpBenchmark
from seqmix.lab.bench.peers import Seqmix
from seqmix.lab.bench.timing import TimedCall


def implementation(benchmark, name):
    return next(c for found in benchmark.parts().values() for c in found if c.name == name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_op_benchmark_adds_bfloat16_variant_to_float32(settings, dtype):
    names = {c.name: c for c in OpBenchmark(settings(dtype=dtype)).parts()["forward + backward"]}
    assert ("chunkwise-bfloat16" in names) == (dtype == torch.float32)
    if dtype == torch.float32:
        seen = []
        for name in ("chunkwise", "chunkwise-bfloat16"):
            names[name].function = lambda q, k, v: seen.append((q.dtype, k.dtype, v.dtype)) or v * 1
            names[name].prepared_call(32).call.run()
        assert seen == [(torch.float32,) * 3, (torch.bfloat16,) * 3]


def test_decoding_warmup_runs_the_same_steps_as_the_timed_call(settings, monkeypatch):
    steps, step = [], Seqmix.step

    def counted(self, tokens, state):
        # positions are the only whole numbers of a state
        steps.append({leaf.item() for leaf in self.tensors(state) if not leaf.is_floating_point()})
        return step(self, tokens, state)

    monkeypatch.setattr(Seqmix, "step", counted)
    call = implementation(DecodeBenchmark(settings()), "seqmix").prepared_call(32).call
    call.prepare()
    assert steps == [{32 + i} for i in range(STEPS)]
    call.run()
    assert steps[STEPS:] == steps[:STEPS]


def test_cpu_training_step_is_timed_after_a_warmup_step(settings, monkeypatch):
    losses, loss = [], Seqmix.loss
    monkeypatch.setattr(Seqmix, "loss", lambda self, *tokens: losses.append(1) or loss(self, *tokens))
    call = implementation(TrainBenchmark(settings()), "seqmix").prepared_call(32).call
    call.prepare()
    assert len(losses) == 1
    call.run()
    assert len(losses) == 2


def test_peak_memory_excludes_preparation(settings, monkeypatch):
    held, inside = [], []

    def watched(call, device):
        inside.append(True)
        result = call()
        inside.clear()
        return result, None

    monkeypatch.setattr(benchmark, "with_peak_memory", watched)
    found = implementation(TrainBenchmark(settings()), "seqmix")
    prepared = found.prepared_call(32)
    call = TimedCall(lambda: held.append(("run", bool(inside))), lambda: held.append(("prepare", bool(inside))))
    monkeypatch.setattr(found, "prepared_call", lambda length: replace(prepared, call=call))
    forecast = benchmark.Forecast(1, settings())
    benchmark._Rounds(found.benchmark, settings().rates, "train", [32], forecast, str)._warm(found, 32)
    assert held == [("prepare", False), ("run", False), ("prepare", False), ("run", True)]
