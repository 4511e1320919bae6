"""A run on the terminal: stopping it, and what it says."""

import os
import re
import signal

import pytest

from seqmix.training.loop import Evaluated
from seqmix.training.progress import StopRequest, _evaluation, run_with_progress


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_a_request(number):
    with StopRequest() as stop:
        assert not stop.made()
        os.kill(os.getpid(), number)
        assert stop.made()
    assert stop.made()


def test_the_second_signal_acts_as_ever():
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert stop.made()


def test_handlers_are_put_back():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with StopRequest():
        assert signal.getsignal(signal.SIGINT) != before[0]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    with pytest.raises(ZeroDivisionError), StopRequest():
        raise ZeroDivisionError
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_an_evaluation_is_in_nats_and_bits():
    line = _evaluation(Evaluated(100, 1.3863, final=False), entropy=2.0)
    assert line == "step 100: validation 1.3863 nats/byte, 2.0000 bits/byte"


@pytest.mark.parametrize(("loss", "beside"), [(1.5, "25% below"), (2.5, "25% above")])
def test_the_last_evaluation_stands_beside_the_byte_frequencies(loss, beside):
    line = _evaluation(Evaluated(100, loss, final=True), entropy=2.0)
    assert "byte frequencies alone: 2.0000 nats/byte, 2.8854 bits/byte" in line
    assert beside in line


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
    assert f"{tmp_path / 'text.txt'}: 1 documents, 2,701 tokens to learn, 301 held out (tail)" in out
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
    assert "resumed behind step 1" in again
    assert "seqmix generate" in again
