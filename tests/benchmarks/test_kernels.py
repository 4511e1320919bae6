"""A kernel proved as a process of its own: what it prints, and its exit status."""

from dataclasses import replace

import pytest
import typer

from seqmix import Paradigm, SeqmixError
from seqmix.benchmarks.kernels import main
from seqmix.ops.kernels import KERNELS, Key, reference
from seqmix.testing import KERNEL_CHECKS

STEP = Key("decay", Paradigm.RECURRENT, "reference")


def test_each_check_is_told_and_a_broken_promise_is_the_exit_status(monkeypatch, capsys):
    right = reference("decay", Paradigm.RECURRENT)

    def doubles(q, *rest, **options):
        return right.function(2 * q, *rest, **options)

    monkeypatch.setattr("seqmix.benchmarks.kernels.KERNEL_CHECKS", dict(list(KERNEL_CHECKS.items())[:1]))
    main(str(STEP), "cpu", 2)
    assert capsys.readouterr().out == "passed outputs_are_the_definitions\n"
    monkeypatch.setitem(KERNELS, STEP, replace(right, function=doubles))
    with pytest.raises(typer.Exit) as ended:
        main(str(STEP), "cpu", 2)
    assert ended.value.exit_code == 1
    told = capsys.readouterr().out
    assert told.startswith("failed outputs_are_the_definitions: ")
    assert told.endswith("decay/recurrent/reference breaks a promise\n")


def test_a_kernel_that_does_not_exist_is_refused():
    with pytest.raises(
        SeqmixError, match=r'there is no kernel \'decay/recurent/triton\'; .*did you mean "decay/recurr'
    ):
        main("decay/recurent/triton", "cpu", 1)
