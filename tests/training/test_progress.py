"""A run on the terminal: stopping it, and what it says."""

import io
import re
import signal
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from seqmix.commands.progress import SECONDS_BETWEEN_LINES, Steps, StopRequest, _evaluation, run_with_progress
from seqmix.training.events import Evaluated, Started, Stepped, StoppedEarly


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_a_request(number):
    with StopRequest() as stop:
        assert not stop.made()
        signal.raise_signal(number)
        assert stop.made()
    assert stop.made()


@pytest.fixture
def interruptible():
    """SIGINT interrupts, whatever started this process may have said."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_the_second_signal_acts_as_ever():
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert stop.made()


def test_handlers_are_put_back():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with StopRequest():
        assert signal.getsignal(signal.SIGINT) != before[0]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    with pytest.raises(ZeroDivisionError), StopRequest():
        raise ZeroDivisionError
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


BYTES = SimpleNamespace(bytes_per_token=1.0, unigram_entropy=2.0)
"""What is learned: a text."""


def test_an_evaluation_is_in_nats_and_bits():
    line = _evaluation(Evaluated(100, 1.3863, final=False), BYTES)
    assert line == "step 100: validation 1.3863 nats/byte, 2.0000 bits/byte"


@pytest.mark.parametrize(("loss", "beside"), [(1.5, "25% below"), (2.5, "25% above")])
def test_the_last_evaluation_stands_beside_the_byte_frequencies(loss, beside):
    line = _evaluation(Evaluated(100, loss, final=True), BYTES)
    assert "byte frequencies alone: 2.0000 nats/byte, 2.8854 bits/byte" in line
    assert beside in line


def test_further_lengths_stand_beside_the_loss():
    line = _evaluation(Evaluated(100, 1.3863, final=False, by_length={8: 1.5, 64: 1.25}), BYTES)
    assert line.endswith("2.0000 bits/byte, 1.5000 at 8 tokens, 1.2500 at 64 tokens")


# ---- without a terminal


@pytest.fixture
def lines(config_of, monkeypatch):
    """Steps that take four seconds each, and what is printed of them."""
    clock, printed = [0.0], io.StringIO()
    monkeypatch.setattr("seqmix.commands.progress.time.monotonic", lambda: clock[0])

    settings = config_of("training.steps=20", "training.log_every=1").training
    shown = Steps(Console(file=printed, width=200), settings)
    for step in range(1, 21):
        clock[0] += 4
        shown.step(Stepped(step, 2.5, 1e-3, 1.0, 1000.0, mfu=0.421 if step > 10 else None, memory_bytes=3 * 2**29))
    return printed.getvalue().splitlines()


def test_lines_come_now_and_then_and_at_the_end(lines):
    steps = [int(re.match(r"step (\d+) of 20: ", line)[1]) for line in lines]
    assert steps == [1, 4, 7, 10, 13, 16, 19, 20]
    assert 2 * 4 < SECONDS_BETWEEN_LINES < 3 * 4


def test_a_line_says_what_is_reached_and_what_it_takes(lines):
    assert lines[0] == "step 1 of 20: loss 2.500, 1,000 tokens/s, 1.5 GiB, 0:01:16 left"
    assert lines[4] == "step 13 of 20: loss 2.500, 1,000 tokens/s, 42% of peak, 1.5 GiB, 0:00:28 left"


@pytest.fixture
def shown(config_of, tmp_path, capsys, monkeypatch):
    """Run with progress, and return what it printed, on a wide terminal."""
    monkeypatch.setenv("COLUMNS", "1000")

    def run(*overrides, **options) -> str:
        run_with_progress(config_of(*overrides), tmp_path / "run", **options)
        return capsys.readouterr().out

    return run


def test_a_run_shows_its_model_its_text_and_how_to_try_it(shown, tmp_path):
    out = shown()
    parameters = re.search(r"^([\d,]+) parameters on (cpu|cuda), torch\.", out)
    assert parameters
    assert f"{tmp_path / 'text.txt'}: 1 documents, 2,701 training tokens, 301 validation tokens (tail)" in out
    assert len(re.findall(r"^step [246]: validation \d\.\d{4} nats/byte, \d+\.\d{4} bits/byte", out, re.M)) == 3
    assert "byte frequencies alone" in out
    assert f'seqmix generate {tmp_path / "run"} --prompt "def "' in out
    assert "--resume" not in out


def test_a_stopped_run_shows_how_to_go_on(shown, tmp_path, monkeypatch):
    monkeypatch.setattr(StopRequest, "made", lambda self: True)
    out = shown()
    assert f"go on with: seqmix train --resume {tmp_path / 'run'}" in out
    assert "seqmix generate" not in out
    monkeypatch.undo()
    monkeypatch.setenv("COLUMNS", "1000")
    again = shown(resume=True)
    assert "resumed after step 1" in again
    assert "seqmix generate" in again


def test_without_a_terminal_steps_are_lines(shown):
    out = shown()
    assert re.search(r"^step 1 of 6: loss \d\.\d{3}, [\d,]+ tokens/s, \d\.\d GiB, 0:0\d:\d\d left$", out, re.M)
    assert re.search(r"^step 6 of 6: .* 0:00:00 left$", out, re.M)
    assert "━" not in out


def test_on_a_terminal_they_are_a_bar(shown, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    out = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", shown())
    assert "━" in out
    assert re.search(r"6/6 .*loss \d\.\d{3}, [\d,]+ tokens/s, \d\.\d GiB elapsed", out)


@pytest.mark.parametrize("compiled", ["true", "false"])
def test_what_is_waited_for_is_said(config_of, tmp_path, monkeypatch, capsys, compiled):
    source = SimpleNamespace(name="text", summary="short", tokenizer=None)
    begun = Started(source, 9, torch.device("cpu"), torch.float32, 0)
    monkeypatch.setattr("seqmix.commands.progress.train", lambda *args, **options: iter([begun]))
    run_with_progress(config_of(f"training.compile={compiled}"), tmp_path / "run")
    assert ("the first step compiles" in capsys.readouterr().out) == (compiled == "true")


def test_a_run_that_stopped_early_has_ended(config_of, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("COLUMNS", raising=False)
    end = StoppedEarly(4, best_step=2, best_loss=1.25)
    monkeypatch.setattr("seqmix.commands.progress.train", lambda *args, **options: iter([end]))
    assert run_with_progress(config_of(), tmp_path / "run")
    out = capsys.readouterr().out
    assert "step 4: stopped, for no evaluation has been better than that of step 2: 1.2500 nats/token" in out
    assert "seqmix generate" in out
