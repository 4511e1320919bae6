"""A run on several processes matches a run on one: losses, gradients, samples, evaluations and checkpoints."""

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import rank_processes as on_ranks
import torch
import worker_processes
from hypothesis import settings
from nightly import NIGHTLY
from rank_processes import Ranks
from small_runs import steps_of, wait_for_steps
from torch.testing import assert_close

from seqmix import load_config, load_run
from seqmix.registry import ElsewhereError, SeqmixError
from seqmix.training import export_run, read_status
from seqmix.training.checkpoint.averaging import average_run
from seqmix.training.checkpoint.files import checkpoints, files_of, verify
from seqmix.training.config import DistributedConfig
from seqmix.training.distributed.process_groups import LostProcessError, join_processes
from seqmix.training.tensor_files import read_tensors

pytestmark = pytest.mark.slow

DELTA = "model.blocks.attn.mixer={kind: gated_delta_net, n_heads: 2}"
LINEAR = "model.blocks.attn.mixer={kind: linear_attention, n_heads: 2}"
TWENTY = ("training.steps=20", "training.evaluate_every=10")
PACKED = "data.packing=true"
# without feed-forward networks, for fewer kernels to build
COMPILED = ("training.compile=true", "model.blocks.ret.ffn=null", "model.blocks.attn.ffn=null")
CARRIED = ("model.blocks.attn.mixer={kind: delta_net, n_heads: 2}", "training.carry_state=true")
MQAR = ("data={kind: mqar, sequence_length: 64}", "training.evaluate_every=6")
CP = {"context_parallel": 2}
DROPOUT = ("model.dropout=0.1", "model.blocks.ret.dropout=0.1", "model.blocks.attn.dropout=0.1")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    words = random.Random(0).choices(["the", "mixer", "reads", "a", "token", "and", "writes", "its", "state"], k=900)
    file.write_text(" ".join(words))
    return file


@pytest.fixture(scope="module")
def documents(text, tmp_path_factory):
    """The same words in documents of 3 to 120 tokens."""
    folder, words, draw = tmp_path_factory.mktemp("documents"), text.read_text().split(), random.Random(1)
    for number in range(120):
        (folder / f"{number:03}.txt").write_text(" ".join(draw.choices(words, k=draw.randint(1, 30)))[:120] + ".")
    return folder


@pytest.fixture(scope="module")
def two(processes):
    yield from _pool(2)


@pytest.fixture(scope="module")
def four(processes):
    yield from _pool(4)


def _pool(size):
    pool = Ranks(size)
    yield pool
    pool.close()


def require_same(together, alone, batch_ranks, tolerance=1e-5):
    """All ranks together are one process, and every sample was read once, in the same order."""
    close = {"rtol": tolerance, "atol": tolerance}
    assert [found["error"] for found in together] == [None] * len(together)
    first = together[0]
    for name in ("loss", "norm"):
        assert_close(torch.tensor(first[name]), torch.tensor(alone[name]), **close)
    for name in ("validation", "gradients"):
        assert_close(first[name], alone[name], **close)
    assert first["saved"] == alone["saved"]
    per_rank = len(together) // batch_ranks  # those that share sequences read the same
    for step, rows in alone["rows"].items():
        assert [row for found in together[::per_rank] for row in found["rows"][step]] == rows
        assert all(found["rows"] == together[at // per_rank * per_rank]["rows"] for at, found in enumerate(together))
    for found in together[1:]:
        assert (found["loss"], found["validation"]) == (first["loss"], first["validation"])


def require_same_checkpoint(one, other, **tolerance):
    def read(run):
        folder = checkpoints(run)[-1]
        parts = {name.split("-")[0].split(".")[0] for name in verify(folder).files}
        return {part: read_tensors(files_of(folder, part))[0] for part in parts}

    assert_close(read(one), read(other), **tolerance)


@pytest.mark.parametrize(
    ("layout", "changes"),
    [
        ({}, (*TWENTY, "training.grad_accum_steps=2")),
        *(
            (layout, changes)
            for layout in ({"shard": 2}, CP)
            for changes in (
                *(("model.pattern=[ret]",), ("model.pattern=[attn]",), ("model.pattern=[attn]", LINEAR)),
                (*TWENTY, PACKED),
            )
        ),
        ({"gather_once": "true"}, ("training.grad_accum_steps=2",)),
        ({"shard": 2}, (DELTA, "training.optimizer=normuon")),
        (CP, ("training.activation_checkpointing=true",)),
        (CP, ("data.sequence_length=17", LINEAR)),
        (CP, (DELTA, PACKED)),
        *((layout, kind) for kind in (CARRIED, MQAR) for layout in ({}, CP)),
        pytest.param(CP, COMPILED, marks=NIGHTLY),
    ],
    ids=str,
)
def test_two_processes_train_like_one(two, text, documents, tmp_path, layout, changes):
    read = documents if PACKED in changes else text
    changes = [*([] if changes == MQAR else [f"data.paths=[{read}]"]), *DROPOUT, *changes]
    # alone it is not compiled: inductor computes the same
    alone = on_ranks.train_here([*changes, "training.compile=false"], str(tmp_path / "alone"))
    asked = [f"distributed.{key}={value}" for key, value in layout.items()]
    together = two("train_here", [*changes, *asked], str(tmp_path / "run"))
    require_same(together, alone, 1 if layout == CP else 2, 1e-5)
    require_same_checkpoint(tmp_path / "run", tmp_path / "alone", rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("once", ["false", "true"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_step_receives_about_the_planned_bytes(two, once, dtype):
    asked = [f"distributed.gather_once={once}", f"distributed.gather_dtype={dtype}", "training.grad_accum_steps=2"]
    for counted, planned in two("step_received", [*asked, f"training.precision={dtype}"]):
        # shards are padded to whole rows
        assert planned <= counted < 1.02 * planned


@pytest.mark.parametrize(
    ("size", "changes"),
    [
        (1, ("training.grad_accum_steps=2",)),
        (1, ("training.activation_checkpointing=true",)),
        (4, ()),
        (4, ("training.activation_checkpointing=true", "distributed.data=2")),
        (4, ("training.activation_checkpointing=matmuls", "distributed.context_parallel=4")),
        (4, ("distributed.gather_once=true",)),
    ],
    ids=str,
)
def test_step_memory_matches_the_plan(size, changes, four):
    wide = ["model.d_model=128", "model.n_layers=4", "model.vocab_size=2048", "data.sequence_length=128"]
    asked = [*wide, "training.precision=float32", *changes]
    for counted, planned in [on_ranks.step_memory(asked)] if size == 1 else four("step_memory", asked):
        assert 0.75 * planned < counted < 1.1 * planned


def test_gathering_parameters_in_bfloat16_changes_the_loss_slightly(two, text, tmp_path):
    changes = [f"data.paths=[{text}]", "training.precision=bfloat16"]
    alone = on_ranks.train_here(changes, str(tmp_path / "alone"))
    together = two("train_here", [*changes, "distributed.gather_dtype=bfloat16"], str(tmp_path / "run"))
    assert [found["error"] for found in together] == [None, None]
    print("ERR", together[0]["loss"], alone["loss"])
    losses = [torch.tensor(found["loss"]) for found in (together[0], alone)]
    assert 1e-5 < (losses[0] / losses[1] - 1).abs().max() < 2e-3


@pytest.mark.parametrize("packed", [(), (PACKED,)], ids=["", "packed"])
@pytest.mark.parametrize(
    "layout", [("data=2", "shard=2"), ("data=2", "context_parallel=2"), ("shard=2", "context_parallel=2")], ids=str
)
def test_four_processes_train_like_one(four, text, documents, tmp_path, layout, packed):
    changes = [f"data.paths=[{documents if packed else text}]", *DROPOUT, *packed]
    alone = on_ranks.train_here(changes, str(tmp_path / "alone"))
    together = four("train_here", [*changes, *(f"distributed.{part}" for part in layout)], str(tmp_path / "run"))
    require_same(together, alone, 2 if "context_parallel=2" in layout else 4)


def test_attention_on_four_processes_keeps_a_quarter_of_the_keys(four):
    for kept, forward, backward in four("keys_held", 256):
        assert 0.25 < kept < 0.26
        # two more blocks at once, and outputs; in backward what is owed for blocks too
        assert forward < 0.7
        assert backward < 1.4
    rows = ({"batch": 2, "length": 5}, {"batch": 1, "length": 5, "cu_seqlens": [0, 2, 11, 11, 20]})
    cases = [{"paradigm": "parallel", **case} for case in rows]
    for window in (None, 1, 7):  # keys of no other process, of one or two
        four("mixer_as_one", "attention", {"n_heads": 4, "n_kv_heads": 2, "window": window, "sinks": True}, cases)


@pytest.mark.parametrize("kind", [(), CARRIED], ids=["", "carried"])
@pytest.mark.parametrize("first", [1, 2])
def test_run_resumes_on_another_number_of_processes_and_back(two, text, tmp_path, kind, first):
    changes, run = [f"data.paths=[{text}]", *kind], str(tmp_path / "run")

    def trained(processes, **named):
        if processes == 1:
            return [on_ranks.train_here(changes, run, **named)]
        return two("train_here", changes, run, **named)

    uninterrupted = on_ranks.train_here(changes, str(tmp_path / "uninterrupted"))
    begun, other = trained(first, until=2), trained(3 - first, resume=True, until=4)
    back = trained(first, resume=True)
    losses = [loss for parts in (begun, other, back) for loss in parts[0]["loss"]]
    assert_close(torch.tensor(losses), torch.tensor(uninterrupted["loss"]), rtol=1e-5, atol=1e-5)
    # nothing is lost and nothing read twice
    for step in range(6):
        parts = (begun, other, back)[step // 2]
        assert [row for found in parts for row in found["rows"][step]] == uninterrupted["rows"][step]
    require_same_checkpoint(tmp_path / "run", tmp_path / "uninterrupted", rtol=1e-2, atol=1e-3)


@pytest.mark.slow
@NIGHTLY
def test_four_process_run_resumes_on_one_and_then_two(two, four, text, tmp_path):
    changes, run = [f"data.paths=[{text}]", *CARRIED], str(tmp_path / "run")
    uninterrupted = on_ranks.train_here(changes, str(tmp_path / "uninterrupted"))
    parts = [
        four("train_here", changes, run, until=2),
        [on_ranks.train_here(changes, run, resume=True, until=4)],
        two("train_here", changes, run, resume=True),
    ]
    losses = [loss for found in parts for loss in found[0]["loss"]]
    assert_close(torch.tensor(losses), torch.tensor(uninterrupted["loss"]), rtol=1e-5, atol=1e-5)
    for step in range(6):
        assert [row for found in parts[step // 2] for row in found["rows"][step]] == uninterrupted["rows"][step]
    require_same_checkpoint(tmp_path / "run", tmp_path / "uninterrupted", rtol=1e-2, atol=1e-3)


def test_two_processes_start_from_weights_like_one(two, text, tmp_path):
    paths, first = f"data.paths=[{text}]", tmp_path / "first"
    on_ranks.train_here([paths, "seed=3"], str(first))
    changes = [paths, f"training.start_from={first}", "training.steps=2"]
    alone = on_ranks.train_here(changes, str(tmp_path / "alone"))
    together = two("train_here", [*changes, "distributed.shard=2"], str(tmp_path / "run"))
    assert [found["error"] for found in together] == [None, None]
    assert_close(torch.tensor(together[0]["loss"]), torch.tensor(alone["loss"]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [(), ("model.init={kind: normal, std: 0.02}",), ("model.tie_embeddings=true", "distributed.data=2")],
    ids=str,
)
def test_no_process_holds_the_whole_initial_model(two, changes):
    for same, held, shards, whole in two("started_here", ["model.n_layers=8", *changes]):
        assert same
        assert shards < 0.6 * whole or "distributed.data=2" in changes
        assert held < shards + 0.4 * whole


def test_one_process_reads_shards_and_names_a_damaged_one(two, text, tmp_path):
    changes, run = (
        [f"data.paths=[{text}]", "training.checkpoint_every=2", "training.steps=4", "training.keep_best=false"],
        tmp_path / "run",
    )
    assert two("train_here", changes, str(run))[1]["saved"] == [2, 4]
    folder = checkpoints(run)[-1]
    names = {f"{part}-{rank}-of-2.safetensors" for part in ("model", "optimizer") for rank in (1, 2)}
    assert set(verify(folder).files) == names
    ours, written = dict(load_run(run).named_parameters()), read_tensors(files_of(folder, "model"))[0]
    assert_close(ours, dict(written), rtol=0, atol=0)
    assert export_run(run, tmp_path / "file.safetensors") == 4
    assert_close(dict(load_run(tmp_path / "file.safetensors").named_parameters()), ours, rtol=0, atol=0)
    assert average_run(run, tmp_path / "mean", checkpoints=2) == [2, 4]
    damaged = folder / "optimizer-2-of-2.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    resumed = two("train_here", changes, str(run), resume=True)
    assert [each["saved"] for each in resumed] == [[4], [4]]
    assert f"{damaged} is damaged" in resumed[0]["noted"]
    assert_close(dict(load_run(run).named_parameters()), ours, rtol=0, atol=0)


def test_full_disk_in_one_process_stops_all_without_partial_checkpoint(two, text, tmp_path):
    changes, run = [f"data.paths=[{text}]", "training.checkpoint_every=2"], tmp_path / "run"
    errors = [each["error"] for each in two("train_here", changes, str(run), full=1)]
    assert errors[0][0] == "CheckpointError"
    assert "step-000002 could not be written: process 1 of 2 failed: " in errors[0][1]
    assert errors[0][1].endswith("No space left on device")
    assert errors[1] == ("ElsewhereError", f"process 0 of 2 failed: {errors[0][1]}")
    assert not list((run / "checkpoints").iterdir())


def test_stop_request_in_one_process_stops_all_with_one_checkpoint(two, text, tmp_path):
    found = two("train_here", [f"data.paths=[{text}]"], str(tmp_path / "run"), until=2)
    assert [(len(each["loss"]), each["saved"]) for each in found] == [(2, [2])] * 2
    (folder,) = checkpoints(tmp_path / "run")
    manifest = verify(folder)
    assert (manifest.step, manifest.processes) == (2, 2)
    session = json.loads((tmp_path / "run" / "sessions.jsonl").read_text())
    assert (session["processes"], session["distributed"]) == (2, {"data": 1, "shard": 2, "context_parallel": 1})


@pytest.mark.parametrize(
    ("broken", "changes", "kind", "named"),
    [
        (0, (), "MissingDataError", "nowhere.txt"),
        (1, (), "MissingDataError", "nowhere.txt"),
        (-1, ("training.learning_rate=1e30", "training.warmup_steps=0"), "DivergenceError", "first in the "),
    ],
)
def test_error_in_one_process_stops_all(two, text, tmp_path, broken, changes, kind, named):
    found = two("train_here", [f"data.paths=[{text}]", *changes], str(tmp_path / "run"), broken=broken)
    at = max(broken, 0)
    (raised, said), (elsewhere, repeated) = found[at]["error"], found[1 - at]["error"]
    assert (raised, elsewhere) == (kind, "ElsewhereError")
    assert named in said
    assert f"{at} of 2" in repeated
    assert repeated.endswith(said)
    assert (tmp_path / "run").exists() == bool(changes)


def test_all_processes_name_a_token_that_is_nonfinite_in_one(two, text):
    found, again = two("not_finite", str(text), 3)
    assert found == again
    for said, where in zip(found, ("batch up to token 3", "evaluation from token 3 on"), strict=True):
        assert f", in sequence 4 of the {where} ({text}, token " in said


@pytest.mark.parametrize(
    ("library", "said"),
    [
        (
            "[gloo/unbound_buffer.cc:92] Timed out waiting 1800000ms for recv operation to complete",
            "timed out waiting for",
        ),
        ("[gloo/pair.cc:553] Connection closed by peer [127.0.0.1]:23424", "lost the connection to"),
    ],
    ids=["hung", "killed"],
)
def test_lost_process_error_names_the_step(two, text, tmp_path, library, said):
    found = two("train_here", [f"data.paths=[{text}]"], str(tmp_path / "run"), lost=(3, library))
    assert all(each["error"][0] == "LostProcessError" for each in found)
    assert all(each["error"][1].startswith(f"step 3: {said} another process") for each in found)
    status = read_status(tmp_path / "run")
    assert (status.state, status.reason) == ("failed", found[0]["error"][1])


def test_process_stops_waiting_after_the_timeout(two):
    ended, _ = two("waits", 1)
    assert ended.startswith("timed out waiting for another process")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (["distributed.shard=4"], ["1 x 4 x 1", "--nproc-per-node 4"]),
        (["distributed.context_parallel=3"], ["1 x any x 3", "--nproc-per-node 3"]),
        (["training.batch_size=6", "training.grad_accum_steps=2"], ["to be a multiple of 4 ", "got 6"]),
    ],
)
def test_invalid_layout_is_refused_on_two_processes(two, text, tmp_path, changes, named):
    found = two("train_here", [f"data.paths=[{text}]", *changes], str(tmp_path / "run"))
    assert all(part in found[0]["error"][1] for part in named)
    assert not (tmp_path / "run").exists()


def test_invalid_layout_is_refused_in_one_process(refused, tmp_path):
    with pytest.raises(SeqmixError, match=r"1 x any x 2 .*--nproc-per-node 2"):
        join_processes(DistributedConfig(context_parallel=2)).__enter__()
    # segments of a carried state are of one length
    with pytest.raises(SeqmixError, match=r"context_parallel = 2 .* data.sequence_length = 15"):
        load_config("hybrid-tiny", (*CARRIED, "data.sequence_length=15", "distributed.context_parallel=2"))
    with pytest.raises(SeqmixError, match=r"gather_dtype = bfloat16 .*set training.precision to bfloat16"):
        load_config("hybrid-tiny", ("distributed.gather_dtype=bfloat16",))
    # and other processes are all that a resumed run may change
    message = refused("train", "--resume", tmp_path, "distributed.context_parallel=1", "training.steps=3")
    assert "distributed.KEY=VALUE" in message


def start(processes, *arguments, size=2):
    """The command as several processes, as torchrun starts them."""
    port = free_port()
    command = [(rank, size, port, *map(str, arguments)) for rank in range(size)]
    started = [processes.Process(target=worker_processes.command_of_rank, args=args) for args in command]
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


@pytest.mark.parametrize("lost", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_process_that_loses_its_peer_exits_with_lost_process_status(processes, text, tmp_path, lost):
    changes = ("hybrid-tiny", *on_ranks.SMALL, f"data.paths=[{text}]", "training.steps=100000")
    started = start(processes, "train", *changes, "--out", tmp_path / "run")
    wait_for_steps(tmp_path / "run", 2, lambda: all(process.is_alive() for process in started))
    started[lost].kill()
    expected = [LostProcessError.exit_status] * 2
    expected[lost] = -signal.SIGKILL
    assert join(started) == expected
    status = read_status(tmp_path / "run")
    if lost == 1:
        assert status.state == "failed"
        assert re.match(r"step \d+: lost the connection to another process.* --resume$", status.reason)
    else:
        assert status.state == "killed"  # the first process writes the status


@pytest.mark.parametrize(
    ("size", "more"),
    [
        (2, ()),
        pytest.param(4, (), marks=[pytest.mark.slow, NIGHTLY]),
        pytest.param(2, COMPILED, marks=[pytest.mark.slow, NIGHTLY]),
    ],
    ids=["2", "4", "compiled"],
)
def test_repeatedly_killed_processes_resume_to_the_uninterrupted_result(processes, text, tmp_path, size, more):
    """Kills them three times, or 20 times with --hypothesis-profile nightly."""
    changes = ("hybrid-tiny", *on_ranks.SMALL, f"data.paths=[{text}]", "training.checkpoint_every=3", *more)
    changes = (*changes, "training.steps=20", "model.dropout=0.1", *CARRIED, "distributed.context_parallel=2")
    uninterrupted, run, moments = tmp_path / "uninterrupted", tmp_path / "run", random.Random(0)
    assert join(start(processes, "train", *changes, "--out", uninterrupted, size=size)) == [0] * size
    for target in (2, 9, 14) if settings().max_examples < 1000 else (*range(1, 19), 17, 18):
        begin = ("--resume", run) if (run / "config.yaml").exists() else (*changes, "--out", run)
        started = start(processes, "train", *begin, size=size)
        wait_for_steps(run, target, lambda started=started: all(process.is_alive() for process in started))
        time.sleep(moments.random() * 0.05)
        for process in started[:: moments.choice((1, -1))]:
            process.kill()
        assert join(started) == [-signal.SIGKILL] * size
    assert join(start(processes, "train", "--resume", run, size=size)) == [0] * size
    require_same_checkpoint(run, uninterrupted, rtol=0, atol=0)
    both = [[json.loads(line).get("loss") for line in (each / "metrics.jsonl").open()] for each in (run, uninterrupted)]
    assert both[0] == both[1]


@pytest.fixture
def torchrun(text, tmp_path):
    """Start a run of two processes under torchrun; what it prints goes to a file."""
    launched = []

    def call(run, *options, to=30):
        changes = ["hybrid-tiny", *on_ranks.SMALL, f"data.paths=[{text}]", "training.checkpoint_every=3"]
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *options]
        command += ["-m", "seqmix", "train", *changes, f"training.steps={to}", "--out", run]
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
        with (tmp_path / "output").open("w") as output:
            launched.append(subprocess.Popen(command, stdout=output, stderr=output, env=environment))
        return launched[-1]

    yield call
    for process in launched:
        process.kill()


def workers_of(process):
    found = subprocess.run(["pgrep", "-P", str(process.pid)], check=True, capture_output=True, text=True)
    return [int(number) for number in found.stdout.split()]


def steps_saved(run):
    return [json.loads((folder / "manifest.json").read_text())["step"] for folder in checkpoints(run)]


@pytest.mark.slow
@NIGHTLY
def test_torchrun_restarts_from_the_newest_checkpoint_after_losing_a_process(torchrun, tmp_path):
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert torchrun(whole).wait(120) == 0
    process = torchrun(run, "--max-restarts", "1")
    wait_for_steps(run, 8, lambda: process.poll() is None)
    os.kill(workers_of(process)[1], signal.SIGKILL)
    assert process.wait(120) == 0, (tmp_path / "output").read_text()
    said = re.findall(r"error: step \d+: lost the connection to another process", (tmp_path / "output").read_text())
    assert len(said) == 1
    assert len((run / "sessions.jsonl").read_text().splitlines()) == 2
    require_same_checkpoint(run, whole, rtol=0, atol=0)


@pytest.mark.slow
@NIGHTLY
def test_processes_save_a_checkpoint_when_torchrun_is_killed(torchrun, tmp_path):
    run = tmp_path / "run"
    process = torchrun(run, to=100_000)
    wait_for_steps(run, 8, lambda: process.poll() is None)
    numbers = workers_of(process)
    process.kill()
    waited = time.monotonic() + 60
    while any(Path(f"/proc/{number}").exists() for number in numbers):
        assert time.monotonic() < waited
        time.sleep(0.1)
    assert steps_saved(run)[-1] == steps_of(run)


@pytest.mark.slow
@NIGHTLY
def test_repeated_sigterm_to_all_processes_stops_with_a_checkpoint(torchrun, tmp_path):
    run = tmp_path / "run"
    process = torchrun(run, to=100_000)
    wait_for_steps(run, 8, lambda: process.poll() is None)
    numbers = [process.pid, *workers_of(process)]
    for number in (*numbers, *numbers[1:]):
        os.kill(number, signal.SIGTERM)
    process.wait(60)
    assert steps_saved(run)[-1] == steps_of(run)
    assert not any(Path(f"/proc/{number}").exists() for number in numbers[1:])


@pytest.mark.slow
def test_torchrun_starts_a_two_process_run(text, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1"]
    command += ["--master-port", str(free_port()), "-m", "seqmix", "train", "hybrid-tiny", *on_ranks.SMALL]

    def run(*changes):
        return subprocess.run([*command, *changes], check=False, capture_output=True, text=True)

    good = run(f"data.paths=[{text}]", "training.steps=2", "--out", tmp_path / "run")
    assert good.returncode == 0, good.stderr
    assert good.stdout.count(" 2 processes") == 1
    assert len(checkpoints(tmp_path / "run")) == 1
    bad = run("data.paths=[nowhere.txt]", "--out", tmp_path / "bad")
    assert bad.returncode != 0
    assert bad.stderr.count("corpus nowhere.txt") == 1
    assert ElsewhereError.__name__ not in bad.stderr
