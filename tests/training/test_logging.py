"""Loggers: TensorBoard, W&B and user-defined ones."""

import struct
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_runs import contents, metrics, refusal, require_same_run, run_of, stopped

from seqmix.lab.study.plan import plan
from seqmix.lab.study.runner import Observer, make_runs
from seqmix.lab.study.study import load_study
from seqmix.training import TrainingConfig, read_status
from seqmix.training.monitoring.events import Stepped
from seqmix.training.monitoring.loggers import WANDB_ID


def test_training_works_without_tensorboard_installed(config_of, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    assert run_of(config_of("training.steps=2"), tmp_path / "run")
    assert not (tmp_path / "run" / "tensorboard").exists()
    message = refusal(lambda: run_of(config_of("training.loggers=[tensorboard]"), tmp_path / "other"))
    assert "pip install tensorboard" in message
    assert not (tmp_path / "other").exists()


def test_tensorboard_scalars_match_the_metrics_file(config_of, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = config_of("training.loggers=[tensorboard]", "training.evaluation_lengths=[8]", "training.steps=2")
    run_of(config, tmp_path / "run")
    board, written = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload(), metrics(tmp_path / "run")
    losses = [(line["step"], pytest.approx(line["loss"])) for line in written if "loss" in line]
    assert [(x.step, x.value) for x in board.Scalars("loss")] == losses
    (last,) = board.Scalars("validation_loss_by_length/8")
    assert last.value == pytest.approx(written[-1]["validation_loss_by_length"]["8"])
    assert {"learning_rate", "gradient_norm", "tokens_per_second", "validation_loss"} <= set(board.Tags()["scalars"])


LOGGER = """
from pathlib import Path


class Lines:
    def begin(self, run, config, step):
        self.file = run / "lines.txt"
        self.file.open("a").write(f"begin {step} of {config.training.steps}\\n")

    def record(self, step, values):
        self.file.open("a").write(f"{step} {','.join(sorted(values))}\\n")

    def close(self):
        self.file.open("a").write("close\\n")
"""


def test_user_defined_logger_receives_steps_and_evaluations(config_of, tmp_path, monkeypatch):
    (tmp_path / "own_logger.py").write_text(LOGGER)
    monkeypatch.syspath_prepend(tmp_path)
    config = config_of("training.loggers=[own_logger:Lines]", "training.evaluate_every=4", "training.steps=4")
    stopped(config, tmp_path / "run", 2, Stepped)
    run_of(config, tmp_path / "run", resume=True)
    *lines, last = (tmp_path / "run" / "lines.txt").read_text().splitlines()
    steps = "gradient_norm,learning_rate,loss,memory_bytes,tokens_per_second"
    assert lines == [
        *("begin 0 of 4", f"1 {steps}", f"2 {steps}", "close"),
        *("begin 2 of 4", f"3 {steps}", f"4 {steps}", "4 validation_loss,validation_tokens"),
    ]
    assert last == "close"
    for name, reason in (("own_logger:Line", 'did you mean "Lines"'), ("no_such:Lines", "No module named 'no_such'")):
        assert reason in refusal(lambda name=name: run_of(config_of(f"training.loggers=[{name}]"), tmp_path / "other"))
    assert 'did you mean "wandb"' in refusal(lambda: config_of("training.loggers=[wandbb]"))


def test_logger_that_fails_to_start_leaves_no_run(config_of, tmp_path, monkeypatch):
    refusing = "class Made:\n    def __init__(self): raise ValueError('no\\nway')\n"
    refusing += "class Begun(__import__('own_logger').Lines):\n    def begin(self, *_): raise KeyError('a key')\n"
    (tmp_path / "own_logger.py").write_text(LOGGER)
    (tmp_path / "refusing.py").write_text(refusing)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "empty").mkdir()
    for names, reason in (
        ("refusing:Made", "ValueError: no way"),
        ("own_logger:Lines, refusing:Begun", "KeyError: 'a"),
    ):
        for run in ("empty", "run"):
            config = config_of(f"training.loggers=[{names}]")
            assert reason in refusal(lambda config=config, run=run: run_of(config, tmp_path / run))
            assert not (tmp_path / "run").exists()
            assert not list((tmp_path / "empty").iterdir())
    # a run that is there is not touched
    run_of(config_of("training.steps=2"), tmp_path / "run")
    before = contents(tmp_path / "run")
    config = config_of("training.loggers=[refusing:Begun]", "training.steps=2")
    assert "KeyError" in refusal(lambda: run_of(config, tmp_path / "run", resume=True))
    assert contents(tmp_path / "run") == before


FAILING = """
from own_logger import Lines


class Unprintable(Exception):
    def __str__(self):
        raise ValueError


class Record(Lines):
    def record(self, step, values):
        super().record(step, values)
        raise ConnectionError("no\\nnetwork")


class Close(Lines):
    def close(self):
        super().close()
        raise Unprintable


class Both(Record, Close):
    pass
"""


@pytest.mark.parametrize(
    ("kind", "reason", "logged"),
    [
        ("Record", "ConnectionError: no network", ["begin", "1", "close"]),
        ("Close", "Unprintable: its message cannot be shown", ["begin", "1", "2", "2", "close"]),
        ("Both", "ConnectionError: no network", ["begin", "1", "close"]),
    ],
)
def test_run_continues_with_one_warning_when_a_logger_fails(config_of, tmp_path, monkeypatch, kind, reason, logged):
    (tmp_path / "own_logger.py").write_text(LOGGER)
    (tmp_path / "failing_logger.py").write_text(FAILING)
    monkeypatch.syspath_prepend(tmp_path)
    run_of(config_of("training.steps=2"), tmp_path / "other")
    name = f"failing_logger:{kind}"
    with pytest.warns(UserWarning, match=rf"{name} .* metrics\.jsonl: {reason}$") as warned:
        run_of(config_of("training.steps=2", f"training.loggers=[{name}]"), tmp_path / "run")
    assert sum(name in str(warning.message) for warning in warned) == 1
    require_same_run(tmp_path / "run", tmp_path / "other")
    assert read_status(tmp_path / "run").state == "finished"
    assert [line.split()[0] for line in (tmp_path / "run" / "lines.txt").read_text().splitlines()] == logged


def test_deprecated_tensorboard_option_adds_the_logger():
    needed = {"steps": 1, "batch_size": 1, "learning_rate": 1.0}
    with pytest.warns(FutureWarning, match="tensorboard is deprecated, use loggers"):
        assert TrainingConfig.model_validate(needed | {"tensorboard": True}).loggers == ("tensorboard",)
    with warnings.catch_warnings(action="error"):  # as every run of before has it
        assert TrainingConfig.model_validate(needed | {"tensorboard": False}).loggers == ()


@pytest.fixture
def wandb(monkeypatch):
    """W&B without network."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    wandb.teardown()  # it reads its variables once in a process
    yield wandb
    wandb.teardown()


def test_wandb_start_failure_is_reported_with_a_remedy(wandb, config_of, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "ofline")
    message = refusal(lambda: run_of(config_of("training.loggers=[wandb]"), tmp_path / "run"))
    assert message.startswith("W&B cannot start: ")
    assert "'offline'" in message  # what is allowed
    assert message.endswith("set WANDB_MODE=offline to log without a network")
    assert not (tmp_path / "run").exists()


def records(file: Path) -> Iterator[bytes]:
    """The records of W&B's file: LevelDB's log format, after a header of 7 bytes."""
    content, position, parts = file.read_bytes(), 7, []
    while position + 7 <= len(content):
        if (left := -position % 2**15) < 7 and left:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, position)
        parts.append(content[position + 7 : position + 7 + length])
        position += 7 + length
        if kind in (1, 4):  # whole, or its last part
            yield b"".join(parts)
            parts = []


def offline(run: Path) -> list[tuple[str, str, str, dict[int, set[str]]]]:
    """Of each session that W&B has written: the run's id, name and group, and what was logged by step."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = []
    for file in sorted((run / "wandb").glob("offline-run-*/*.wandb")):
        about, logged = (), {}
        for record in map(Record.FromString, records(file)):
            if record.HasField("run"):
                about = record.run.run_id, record.run.display_name, record.run.run_group
            if record.HasField("history"):
                names = {item.key or "/".join(item.nested_key) for item in record.history.item}
                logged.setdefault(record.history.step.num, set()).update(names)
        found.append((*about, logged))
    return found


def test_resumed_run_continues_its_wandb_run(config_of, tmp_path, monkeypatch, wandb):
    monkeypatch.setenv("WANDB_RUN_GROUP", "a study")
    config = config_of("training.loggers=[wandb]", "training.steps=4", "training.checkpoint_every=4")
    stopped(config, tmp_path / "run", 2, Stepped)
    run_of(config, tmp_path / "run", resume=True)
    wandb.teardown()  # its process writes what is left
    first, second = offline(tmp_path / "run")
    assert first[:3] == second[:3] == ((tmp_path / "run" / WANDB_ID).read_text().strip(), "run", "a study")
    assert [step for step in first[3] if "loss" in first[3][step]] == [1, 2]
    assert [step for step in second[3] if "loss" in second[3][step]] == [3, 4]
    assert {"loss", "learning_rate", "validation_loss"} <= second[3][4]


STUDY = """
base: retnet-tiny
model: {d_model: 16, n_layers: 1}
mixers: [retention]
data: {sequence_length: 16, paths: [text.txt]}
training: {steps: 2, batch_size: 2, loggers: [wandb]}
"""


def test_runs_of_a_study_share_a_wandb_group(text, tmp_path, monkeypatch):
    class Started(Exception):  # noqa: N818
        pass

    def popen(*_, env, **__):
        raise Started(env["WANDB_RUN_GROUP"])

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("subprocess.Popen", popen)
    file = tmp_path / "small.yaml"
    file.write_text(STUDY)
    study = plan(load_study(file), file)
    with pytest.raises(Started, match=r"^small$"):
        make_runs(study, tmp_path / "study", jobs=1, observer=Observer(lambda _: None))
