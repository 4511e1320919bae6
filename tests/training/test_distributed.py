"""A run on several processes is the run of one: losses, gradients, samples, evaluations, checkpoints."""

import json
import multiprocessing
import random
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict

import pytest
import ranks as on_ranks
import torch
import workers
from hypothesis import settings
from ranks import Ranks
from safetensors.torch import load_file

from seqmix import load_config
from seqmix.registry import ElsewhereError, SeqmixError
from seqmix.training.checkpoint import checkpoints, verify
from seqmix.training.config import DistributedConfig
from seqmix.training.metrics import Score
from seqmix.training.process_groups import join_processes

if "forkserver" not in multiprocessing.get_all_start_methods():
    pytest.skip("needs processes that fork", allow_module_level=True)

DELTA = "model.blocks.attn.mixer={kind: gated_delta_net, n_heads: 2}"
LINEAR = "model.blocks.attn.mixer={kind: linear_attention, n_heads: 2}"
TWENTY = ("training.steps=20", "training.evaluate_every=10")
PACKED = "data.packing=true"
CARRIED = ("model.blocks.attn.mixer={kind: delta_net, n_heads: 2}", "training.carry_state=true")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    words = random.Random(0).choices(["the", "mixer", "reads", "a", "token", "and", "writes", "its", "state"], k=900)
    file.write_text(" ".join(words))
    return file


@pytest.fixture(scope="module")
def two():
    yield from _pool(2)


@pytest.fixture(scope="module")
def four():
    yield from _pool(4)


@pytest.fixture(scope="module")
def documents(text, tmp_path_factory):
    """The same words in documents of 3 to 120 tokens."""
    folder, words, draw = tmp_path_factory.mktemp("documents"), text.read_text().split(), random.Random(1)
    for number in range(120):
        (folder / f"{number:03}.txt").write_text(" ".join(draw.choices(words, k=draw.randint(1, 30)))[:120] + ".")
    return folder


def _pool(size):
    pool = Ranks(size)
    yield pool
    pool.close()


def require_same(together, alone, batch_ranks, tolerance=1e-5):
    """What all ranks found is what one process finds, and every sample was read once, in the same order."""
    close = {"rtol": tolerance, "atol": tolerance}
    assert [found["error"] for found in together] == [None] * len(together)
    first = together[0]
    for name in ("loss", "norm"):
        torch.testing.assert_close(torch.tensor(first[name]), torch.tensor(alone[name]), **close)
    for ours, theirs in zip(first["validation"], alone["validation"], strict=True):
        torch.testing.assert_close(ours, theirs, **close)
    assert first["saved"] == alone["saved"]
    per_rank = len(together) // batch_ranks  # those that share sequences read the same
    for step, rows in alone["rows"].items():
        assert [row for found in together[::per_rank] for row in found["rows"][step]] == rows
        assert all(found["rows"] == together[at // per_rank * per_rank]["rows"] for at, found in enumerate(together))
    for ours, theirs in zip(first["gradients"], alone["gradients"], strict=True):
        torch.testing.assert_close(ours, theirs, **close)
    for found in together[1:]:
        assert (found["loss"], found["validation"]) == (first["loss"], first["validation"])


def require_same_checkpoint(one, other, **tolerance):
    for name in ("model.safetensors", "optimizer.safetensors", "state.safetensors"):
        files = [checkpoints(run)[-1] / name for run in (one, other)]
        assert files[0].exists() == files[1].exists()
        if files[0].exists():
            torch.testing.assert_close(*map(load_file, files), **tolerance)


@pytest.mark.parametrize(
    ("layout", "changes"),
    [
        ({}, (*TWENTY, "training.grad_accum_steps=2")),
        *(
            (layout, (*TWENTY, *mixers))
            for layout in ({"shard": 2}, {"context_parallel": 2})
            for mixers in (("model.pattern=[ret]",), ("model.pattern=[attn]",), ("model.pattern=[attn]", LINEAR))
        ),
        ({"shard": 2}, (*TWENTY, PACKED)),
        ({"context_parallel": 2}, (*TWENTY, PACKED)),
        ({"data": 2}, ("training.optimizer=muon",)),
        ({"context_parallel": 2}, (*TWENTY, "training.activation_checkpointing=true")),
        ({"context_parallel": 2}, (*TWENTY, "data.sequence_length=17", LINEAR)),
        ({"context_parallel": 2}, (DELTA, PACKED)),
        ({}, CARRIED),
        ({"context_parallel": 2}, CARRIED),
        ({}, ("data={kind: mqar, sequence_length: 64}", "training.evaluate_every=6")),
        ({"context_parallel": 2}, ("data={kind: mqar, sequence_length: 64}", "training.evaluate_every=6")),
        pytest.param({}, ("training.compile=true",), marks=pytest.mark.slow),
        pytest.param({"context_parallel": 2}, ("training.compile=true",), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_two_processes_train_as_one(two, text, documents, tmp_path, layout, changes):
    read = documents if PACKED in changes else text
    changes = [*([] if "mqar" in changes[0] else [f"data.paths=[{read}]"]), *changes]
    alone = on_ranks.train_here(changes, str(tmp_path / "alone"))
    asked = [f"distributed.{key}={value}" for key, value in layout.items()]
    together = two("train_here", [*changes, *asked], str(tmp_path / "run"))
    # Muon orthogonalises in bfloat16, where the last bits of float32 decide which way a number is rounded
    tolerance = 1e-3 if "training.optimizer=muon" in changes else 1e-5
    require_same(together, alone, 1 if "context_parallel" in layout else 2, tolerance)
    require_same_checkpoint(tmp_path / "run", tmp_path / "alone", rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("packed", [(), (PACKED,)], ids=["", "packed"])
@pytest.mark.parametrize("layout", [("data=2", "shard=2"), ("data=2", "context=2"), ("shard=2", "context=2")], ids=str)
def test_four_processes_train_as_one(four, text, documents, tmp_path, layout, packed):
    changes = [f"data.paths=[{documents if packed else text}]", *TWENTY, *packed]
    alone = on_ranks.train_here(changes, str(tmp_path / "alone"))
    together = four("train_here", [*changes, *(f"distributed.{part}" for part in layout)], str(tmp_path / "run"))
    require_same(together, alone, 2 if "context=2" in layout else 4)


@pytest.mark.parametrize("kind", [(), CARRIED], ids=["", "carried"])
@pytest.mark.parametrize("first", [1, 2])
def test_a_run_goes_on_on_another_number_of_processes(two, text, tmp_path, kind, first):
    changes = [f"data.paths=[{text}]", *kind]

    def alone(*arguments, **named):
        return [on_ranks.train_here(*arguments, **named)]

    def together(*arguments, **named):
        return two("train_here", *arguments, **named)

    before, after = (alone, together) if first == 1 else (together, alone)
    undisturbed = on_ranks.train_here(changes, str(tmp_path / "undisturbed"))
    begun = before(changes, str(tmp_path / "run"), until=2)
    gone_on = after(changes, str(tmp_path / "run"), resume=True)
    losses = begun[0]["loss"] + gone_on[0]["loss"]
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(undisturbed["loss"]), rtol=1e-5, atol=1e-5)
    # nothing is lost and nothing read twice
    read = {}
    for steps, part in ((range(2), begun), (range(2, 6), gone_on)):
        read |= {step: [row for found in part for row in found["rows"][step]] for step in steps}
    assert read == {step: undisturbed["rows"][step] for step in range(6)}
    require_same_checkpoint(tmp_path / "run", tmp_path / "undisturbed", rtol=1e-2, atol=1e-3)


def test_one_process_that_is_asked_to_stop_stops_all_with_one_checkpoint(two, text, tmp_path):
    found = two("train_here", [f"data.paths=[{text}]"], str(tmp_path / "run"), until=2)
    assert [len(each["loss"]) for each in found] == [2, 2]
    assert [each["saved"] for each in found] == [[2], [2]]
    (folder,) = checkpoints(tmp_path / "run")
    manifest = verify(folder)
    assert (manifest.step, manifest.processes) == (2, 2)
    session = json.loads((tmp_path / "run" / "sessions.jsonl").read_text())
    assert (session["processes"], session["distributed"]) == (2, {"data": 1, "shard": 2, "context_parallel": 1})


@pytest.mark.parametrize("broken", [0, 1])
def test_an_error_of_one_process_ends_all(two, text, tmp_path, broken):
    found = two("train_here", [f"data.paths=[{text}]"], str(tmp_path / "run"), broken=broken)
    kind, sentence = found[broken]["error"]
    assert sentence == "the corpus nowhere.txt does not exist"
    assert kind != "ElsewhereError"
    assert found[1 - broken]["error"] == ("ElsewhereError", f"process {broken} of 2 has failed: {sentence}")
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_ends_all_with_one_sentence(two, text, tmp_path):
    changes = [f"data.paths=[{text}]", "training.learning_rate=1e30", "training.warmup_steps=0"]
    first, second = two("train_here", changes, str(tmp_path / "run"))
    assert first["error"][0] == "TrainingError"
    assert "first in the output of" in first["error"][1] or "first in the gradient of" in first["error"][1]
    assert second["error"] == ("ElsewhereError", f"process 0 of 2 has failed: {first['error'][1]}")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            ["distributed.shard=4"],
            "distributed lays out data x shard x context_parallel = 1 x 4 x 1 processes, 4, and there are 2: start as "
            "many with `torchrun --nproc-per-node 4 -m seqmix train ...`, or change `distributed`",
        ),
        (
            ["distributed.context_parallel=3"],
            "distributed lays out data x shard x context_parallel = 1 x any x 3 processes, a multiple of 3, and there "
            "are 2: start as many with `torchrun --nproc-per-node 3 -m seqmix train ...`, or change `distributed`",
        ),
        (
            ["training.batch_size=6", "training.grad_accum_steps=2"],
            "training.batch_size = 6 is read by 2 processes (data x shard) in training.grad_accum_steps = 2 parts "
            "each: it must be a multiple of 4",
        ),
    ],
)
def test_a_layout_that_does_not_fit_is_refused(two, text, tmp_path, changes, sentence):
    found = two("train_here", [f"data.paths=[{text}]", *changes], str(tmp_path / "run"))
    assert found[0]["error"][1] == sentence
    assert not (tmp_path / "run").exists()


def test_a_layout_of_several_processes_needs_them():
    with pytest.raises(SeqmixError, match=r"1 x any x 2 processes, a multiple of 2, and there is one: start as many"):
        join_processes(DistributedConfig(context_parallel=2)).__enter__()


def test_segments_of_a_carried_state_are_of_one_length():
    changes = (*CARRIED, "data.sequence_length=15", "distributed.context_parallel=2")
    with pytest.raises(
        SeqmixError, match=r"distributed.context_parallel = 2 does not divide data.sequence_length = 15"
    ):
        load_config("hybrid-tiny", changes)


def test_what_processes_count_adds_up():
    targets = torch.tensor([[1, -100], [2, 3]])
    whole, parts = Score(), [Score(), Score()]
    whole.add(3.0, targets, torch.tensor([1, 0, 3]), {"pairs": ["4", "8"]})
    parts[0].add(1.0, targets[:1], torch.tensor([1]), {"pairs": ["4"]})
    parts[1].add(2.0, targets[1:], torch.tensor([0, 3]), {"pairs": ["8"]})
    merged = Score()
    for part in parts:
        merged.merge(json.loads(json.dumps(asdict(part))))
    assert merged.measured == whole.measured


def test_other_processes_are_all_that_a_resumed_run_may_change(refused, tmp_path):
    sentence = refused("train", "--resume", tmp_path, "distributed.context_parallel=1", "training.steps=3")
    assert sentence.endswith("except distributed.KEY=VALUE for other processes")


# ---- processes of their own


def start(processes, port, *arguments):
    started = [
        processes.Process(target=workers.command_of_rank, args=(rank, 2, port, *map(str, arguments)))
        for rank in range(2)
    ]
    for process in started:
        process.start()
    return started


def join(started):
    for process in started:
        process.join(120)
    return [process.exitcode for process in started]


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def test_two_processes_killed_again_and_again_end_as_if_nothing_had_been(text, tmp_path):
    """Three times; 20 times with --hypothesis-profile nightly."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["seqmix.cli", "seqmix.commands.progress", "torch._dynamo"])
    changes = (
        "hybrid-tiny",
        *on_ranks.SMALL,
        f"data.paths=[{text}]",
        "training.checkpoint_every=3",
        "training.steps=20",
    )
    changes = (*changes, "model.dropout=0.1", *CARRIED, "distributed.context_parallel=2")
    undisturbed, run, moments = tmp_path / "undisturbed", tmp_path / "run", random.Random(0)
    assert join(start(processes, free_port(), "train", *changes, "--out", undisturbed)) == [0, 0]
    for target in (2, 9, 14) if settings().max_examples < 1000 else (*range(1, 19), 17, 18):
        begin = ("--resume", run) if (run / "config.yaml").exists() else (*changes, "--out", run)
        started = start(processes, free_port(), "train", *begin)
        waited, metrics = time.monotonic() + 120, run / "metrics.jsonl"
        while not metrics.exists() or metrics.read_text().count('"loss"') < target:
            assert time.monotonic() < waited
            assert all(process.is_alive() for process in started)
            time.sleep(0.01)
        time.sleep(moments.random() * 0.05)
        for process in started[:: moments.choice((1, -1))]:
            process.kill()
        assert join(started) == [-signal.SIGKILL] * 2
    assert join(start(processes, free_port(), "train", "--resume", run)) == [0, 0]
    require_same_checkpoint(run, undisturbed, rtol=0, atol=0)
    losses = [[json.loads(line).get("loss") for line in (each / "metrics.jsonl").open()] for each in (run, undisturbed)]
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_torchrun_starts_it(text, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1"]
    command += ["--master-port", str(free_port()), "-m", "seqmix", "train", "hybrid-tiny", *on_ranks.SMALL]

    def run(*changes):
        return subprocess.run([*command, *changes], check=False, capture_output=True, text=True)

    good = run(f"data.paths=[{text}]", "training.steps=2", "--out", tmp_path / "run")
    assert good.returncode == 0, good.stderr
    assert good.stdout.count("parameters on 2 processes (cpu)") == 1
    assert len(checkpoints(tmp_path / "run")) == 1
    bad = run("data.paths=[nowhere.txt]", "--out", tmp_path / "bad")
    assert bad.returncode != 0
    assert bad.stderr.count("error: the corpus nowhere.txt does not exist") == 1
    assert ElsewhereError.__name__ not in bad.stderr
