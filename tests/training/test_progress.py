"""A run on the terminal: how to stop it, and what it prints."""

import io
import re
import signal
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from seqmix.cli.progress import SECONDS_BETWEEN_LINES, Steps, StopRequest, _describe_evaluation, run_with_progress
from seqmix.training.monitoring.events import Evaluated, Started, Stepped, StoppedEarly


def handlers() -> list:
    return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


def test_first_signal_requests_a_stop_and_second_acts_by_default():
    # SIGINT interrupts, however this process was started
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        installed = handlers()
        for number in (signal.SIGINT, signal.SIGTERM):
            with StopRequest() as stop:
                assert not stop.was_made()
                assert not set(map(id, handlers())) & set(map(id, installed))
                signal.raise_signal(number)
                assert stop.was_made()
                with pytest.raises(KeyboardInterrupt):
                    signal.raise_signal(signal.SIGINT)
            assert stop.was_made()
            assert handlers() == installed
        with pytest.raises(ZeroDivisionError), StopRequest():
            raise ZeroDivisionError
        assert handlers() == installed
    finally:
        signal.signal(signal.SIGINT, before)


BYTES = SimpleNamespace(bytes_per_token=1.0, unigram_entropy=2.0)


@pytest.mark.parametrize(
    ("fields", "shown"),
    [
        ({"loss": 1.3863}, ["step 100", "1.3863 nats/byte", "2.0000 bits/byte", "over 4,096 bytes"]),
        ({"loss": 1.5, "final": True}, ["2.0000 nats/byte", "2.8854 bits/byte", "25% below"]),
        ({"loss": 2.5, "final": True}, ["2.0000 nats/byte", "2.8854 bits/byte", "25% above"]),
        ({"loss": 1.3863, "by_length": {8: 1.5, 64: 1.25}}, ["1.5000 at 8", "1.2500 at 64"]),
    ],
    ids=str,
)
def test_evaluation_line_shows_nats_bits_and_the_unigram_baseline(fields, shown):
    line = _describe_evaluation(Evaluated(100, **{"final": False, "tokens": 4096} | fields), BYTES)
    assert all(part in line for part in shown)


def test_evaluation_line_handles_zero_unigram_entropy():
    line = _describe_evaluation(
        Evaluated(1, 0.5, True, tokens=8), SimpleNamespace(bytes_per_token=1.0, unigram_entropy=0.0)
    )
    assert line.endswith("frequencies alone: 0.0000 nats/byte, 0.0000 bits/byte")


def test_steps_are_printed_periodically_without_a_terminal(config_of, monkeypatch):
    clock, printed = [0.0], io.StringIO()  # steps take four seconds each
    monkeypatch.setattr("seqmix.cli.progress.time.monotonic", lambda: clock[0])
    shown = Steps(Console(file=printed, width=200), config_of("training.steps=20", "training.log_every=1").training)
    for step in range(1, 21):
        clock[0] += 4
        shown.step(Stepped(step, 2.5, 1e-3, 1.0, 1000.0, mfu=0.421 if step > 10 else None, memory_bytes=3 * 2**29))
    lines = printed.getvalue().splitlines()
    assert [int(re.match(r"step (\d+) of 20: ", line)[1]) for line in lines] == [1, 4, 7, 10, 13, 16, 19, 20]
    assert 2 * 4 < SECONDS_BETWEEN_LINES < 3 * 4
    assert all(part in lines[0] for part in ("loss 2.500", "1,000 tokens/s", "1.5 GiB", "0:01:16"))
    assert all(part in lines[4] for part in ("42%", "0:00:28"))


@pytest.fixture
def shown(config_of, tmp_path, capsys, monkeypatch):
    """Run with progress, and return what it printed, on a wide terminal."""

    def run(*overrides, **options) -> str:
        monkeypatch.setenv("COLUMNS", "1000")
        run_with_progress(config_of(*overrides), tmp_path / "run", **options)
        return capsys.readouterr().out

    return run


def test_run_shows_its_model_text_steps_and_generate_command(shown, tmp_path):
    out = shown()
    assert re.search(r"^([\d,]+) parameters on (cpu|cuda), torch\.", out)
    assert re.search(rf"{tmp_path / 'text.txt'}: 1 .*2,701 .*301 .*tail", out)
    assert re.search(r"^step 1 of 6: loss \d\.\d{3}, [\d,]+ tokens/s, \d+\.\d GiB, 0:0\d:\d\d", out, re.M)
    assert re.search(r"^step 6 of 6: .* 0:00:00", out, re.M)
    assert len(re.findall(r"^step [246]: .* \d\.\d{4} nats/byte, \d+\.\d{4} bits/byte", out, re.M)) == 3
    assert f"seqmix generate {tmp_path / 'run'} " in out
    assert "--resume" not in out
    assert "━" not in out


def test_stopped_run_shows_how_to_resume(shown, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(StopRequest, "was_made", lambda self: True)
        out = shown()
    assert f"seqmix train --resume {tmp_path / 'run'}" in out
    assert "seqmix generate" not in out
    again = shown(resume=True)
    assert re.search(r"resumed.* 1\b", again)
    assert "seqmix generate" in again


def test_terminal_shows_a_progress_bar(shown, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    out = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", shown())
    assert "━" in out
    assert re.search(r"6/6 .*loss \d\.\d{3}, [\d,]+ tokens/s, \d+\.\d GiB", out)


@pytest.mark.parametrize("compiled", ["true", "false"])
def test_compiling_step_is_announced(shown, monkeypatch, compiled):
    source = SimpleNamespace(name="text", summary="short", tokenizer=None)
    begun = Started(source, 9, torch.device("cpu"), torch.float32, 0)
    monkeypatch.setattr("seqmix.cli.progress.train", lambda *args, **options: iter([begun]))
    assert ("in the first step" in shown(f"training.compile={compiled}")) == (compiled == "true")


def test_early_stopping_is_shown_with_the_generate_command(shown, monkeypatch):
    end = StoppedEarly(4, best_step=2, best_loss=1.25)
    monkeypatch.setattr("seqmix.cli.progress.train", lambda *args, **options: iter([end]))
    out = shown()
    assert re.search(r"step 4: .*step 2.* 1\.2500 nats/token", out)
    assert "seqmix generate" in out
