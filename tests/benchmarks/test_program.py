"""Modules of benchmarks/ as programs: bad input is one sentence and exit status 2, never a traceback."""

import pytest

from seqmix.benchmarks import kernels, lengths, small_budget
from seqmix.benchmarks.program import run_program


@pytest.mark.parametrize(
    ("main", "arguments", "sentence"),
    [
        (kernels.main, ["decay/nothing/reference"], "error: there is no kernel 'decay/nothing/reference'; "),
        (small_budget.main, ["nowhere.txt"], "error: the corpus nowhere.txt does not exist\n"),
        (small_budget.main, [], "Missing argument"),
        (lengths.main, ["2048", "2049"], "2049 is no multiple of 2048"),
    ],
    ids=["kernel", "text", "no text", "length"],
)
def test_bad_input_is_one_sentence(main, arguments, sentence, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["program", *arguments])
    with pytest.raises(SystemExit) as ended:
        run_program(main)
    assert ended.value.code == 2
    assert sentence in capsys.readouterr().err
