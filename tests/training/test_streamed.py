"""Runs on a mixture of streamed datasets and a text: stopped or killed, they resume bitwise."""

import json
import signal

import pytest
import worker_processes
from small_runs import require_same_run, run_of, stopped, wait_for_steps

from seqmix.data import sequences
from seqmix.training import trainer
from seqmix.training.checkpoint.files import checkpoints, read_manifest
from seqmix.training.loader import Loader

datasets = pytest.importorskip("datasets")
WEIGHTS = (0.5, 0.3, 0.2)
STEPS = 12


@pytest.fixture
def changes(tmp_path) -> tuple[str, ...]:
    """Of a run on a mixture of two streams and a text."""
    (tmp_path / "lines").mkdir()
    rows = [{"text": f"{n:03d}" * (1 + n % 7)} for n in range(60)]
    for number in range(3):
        lines = "".join(f"{json.dumps(row)}\n" for row in rows[20 * number : 20 * number + 20])
        (tmp_path / "lines" / f"{number}.jsonl").write_text(lines)
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"), num_shards=3)
    (tmp_path / "text.txt").write_text("what is read, and read again. " * 30)
    (tmp_path / "held.txt").write_text("the validation split " * 20)
    options = {"streaming": True, "shuffle_buffer": 8}
    streams = [{"dataset": {"path": str(tmp_path / name)} | options} for name in ("lines", "saved")]
    parts = [*streams, {"paths": [str(tmp_path / "text.txt")]}]
    sources = json.dumps([part | {"weight": weight} for part, weight in zip(parts, WEIGHTS, strict=True)])
    validation = json.dumps({"paths": [str(tmp_path / "held.txt")]})
    return ("data.paths=null", f"data.sources={sources}", f"data.validation={validation}", f"training.steps={STEPS}")


@pytest.mark.parametrize("ahead", [False, True], ids=["", "read ahead"])
def test_stopped_run_on_mixed_streams_resumes_bitwise(config_of, changes, tmp_path, monkeypatch, ahead):
    config = config_of(*changes, "training.checkpoint_every=3")
    run_of(config, tmp_path / "whole")
    monkeypatch.setattr(trainer, "Loader", lambda *arguments: Loader(*arguments, reads_ahead=ahead))
    stopped(config, tmp_path / "run", 4)
    state = read_manifest(checkpoints(tmp_path / "run")[-1]).data_state
    assert [place is not None for place in state["places"]] == [True, True, False]
    opened = []

    class Recorded(sequences.DatasetStream):
        def __init__(self, config, tokenizer, seed, place):
            opened.append(place)
            super().__init__(config, tokenizer, seed, place)

    monkeypatch.setattr(sequences, "DatasetStream", Recorded)
    run_of(config, tmp_path / "run", resume=True)
    assert opened == [place["dataset"] for place in state["places"][:2]]  # not read from the start
    require_same_run(tmp_path / "run", tmp_path / "whole")


def test_mixed_streams_and_text_follow_their_weights(config_of, changes):
    text = config_of(*changes).open_data()
    inputs = [text.training_batch(step, 8, seed=0).inputs for step in range(500)]
    of_text = sum(int(((batch >= 48) & (batch < 58)).any(1).logical_not().sum()) for batch in inputs)
    assert abs(of_text / 4000 - WEIGHTS[2]) < 0.002


@pytest.mark.slow
def test_killed_run_on_mixed_streams_resumes_bitwise(processes, changes, tmp_path):
    small = ("model.d_model=16", "model.n_layers=2", "data.sequence_length=16", "training.warmup_steps=5")
    small += ("training.batch_size=4", "training.checkpoint_every=2", "training.log_every=1")

    def start(name):
        run = tmp_path / name
        arguments = ("--resume", run) if run.exists() else ("retnet-tiny", *small, *changes, "--out", run)
        process = processes.Process(target=worker_processes.command, args=("train", *map(str, arguments)))
        process.start()
        return process

    whole = start("whole")
    whole.join(300)
    process = start("run")
    wait_for_steps(tmp_path / "run", 5, process.is_alive)
    process.kill()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    process = start("run")
    process.join(300)
    assert (whole.exitcode, process.exitcode) == (0, 0)
    require_same_run(tmp_path / "run", tmp_path / "whole")
