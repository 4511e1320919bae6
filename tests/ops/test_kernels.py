"""Every declared kernel that can run here against its contract; kernel declarations and failure reports."""

import importlib
import os
import re
import subprocess
import sys
import textwrap
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from hypothesis import settings

from seqmix.ops.attention import softmax_attention
from seqmix.ops.decay import decay
from seqmix.ops.decay.chunkwise import decay_chunkwise
from seqmix.ops.runtime.kernel import KERNELS, Probe, declare, find
from seqmix.ops.runtime.paradigm import Paradigm
from seqmix.registry import SeqmixError
from seqmix.testing import (
    EXAMPLES,
    KERNEL_CHECKS,
    CheckFailure,
    DecayCase,
    SoftmaxCase,
    Status,
    check_kernel,
    kernel_check,
    parametrize_kernels,
    reproduce_kernel,
)
from seqmix.testing.kernel.families import FAMILIES, DeltaCase, DplrCase

CPU = torch.device("cpu")
REFERENCE = find("decay", Paradigm.CHUNKWISE, "reference")
PROBE = Probe(device=CPU, dtype=torch.float32, key_width=16, value_width=16)


DISTINCT = list({kernel.function: kernel for kernel in reversed(KERNELS.values())}.values())
"""One kernel of each function: a scan has the same one in two paradigms."""


# an eighth of the cases that `seqmix check` draws, beside the fixed ones; all of them nightly
@pytest.mark.conformance
@parametrize_kernels(DISTINCT, examples=settings().max_examples // 8)
def test_every_kernel_passes_the_check(check, device):
    check(device=device)


def interpreted_only(probe):
    """The limits of a kernel that is written in Triton."""
    if probe.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return ["on a CPU Triton only runs in its interpreter: set TRITON_INTERPRET=1 before it is imported"]
    return ["keys are at most 256 wide"] if probe.key_width > 256 else []


TRITON = replace(
    REFERENCE, backend="stand-in", reference=False, tolerances={torch.float32: 1e-5}, limits=interpreted_only
)


def test_kernel_that_cannot_run_here_is_skipped_with_its_reason(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    called = []
    kernel = replace(TRITON, function=called.append)
    outcomes = check_kernel(kernel).outcomes
    assert {outcome.status for outcome in outcomes} == {Status.SKIPPED}
    assert all("TRITON_INTERPRET=1" in outcome.reason for outcome in outcomes)
    assert not called
    mark = parametrize_kernels([kernel]).mark
    with pytest.raises(pytest.skip.Exception, match="TRITON_INTERPRET=1"):
        mark.args[1][0].values[0]()


def test_kernel_is_checked_only_on_supported_inputs(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    dtypes = set()

    def function(x):
        dtypes.add(x.q.dtype)
        if x.q.dtype != torch.float32:
            raise SeqmixError("float32 only")
        return decay_chunkwise(x)

    report = check_kernel(replace(TRITON, function=function), checks=["outputs_are_the_definitions"], examples=20)
    assert report.passed
    assert dtypes == {torch.float32}
    names = ["what_is_not_taken_is_refused", "a_carried_state_does_not_drift"]
    refused, drift = check_kernel(replace(TRITON, function=function), checks=names, examples=20).outcomes[::-1]
    assert refused.status is Status.PASSED
    assert dtypes > {torch.float32}
    assert drift.status is Status.SKIPPED
    assert "decay/chunkwise/stand-in" in drift.reason


def test_kernel_is_declared_once_and_can_be_found(monkeypatch):
    monkeypatch.setattr("seqmix.ops.runtime.kernel.KERNELS", dict(KERNELS))
    assert declare(TRITON) is TRITON
    assert find("decay", Paradigm.CHUNKWISE, "stand-in") is TRITON
    with pytest.raises(SeqmixError, match=r"decay/chunkwise/stand-in .*decay_chunkwise"):
        declare(TRITON)
    with pytest.raises(SeqmixError, match=r"referense.*decay/chunkwise/reference"):
        find("decay", Paradigm.CHUNKWISE, "referense")


def test_references_raise_on_integer_or_mixed_dtypes():
    q = torch.ones(1, 2, 1, 1, dtype=torch.int64)
    for function in (decay, softmax_attention):
        with pytest.raises(SeqmixError, match=r"float64, .* int64, int64"):
            function(q, q, q, paradigm=Paradigm.PARALLEL)
        with pytest.raises(SeqmixError, match="float32, float64, float32"):
            function(q.float(), q.double(), q.float())


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.__name__)
def test_layouts_change_strides_but_not_values(family):
    sizes = {"lengths": (3, 3), "n_heads": 2, "key_width": 4, "value_width": 5, "log_decay": family.decays[-1]}
    sizes |= {"n_kv_heads": 2} if hasattr(family, "n_kv_heads") else {}
    contiguous = family(**sizes).inputs(CPU)
    assert all(x.is_contiguous() for x in contiguous.values())
    for layout in ("fused", "heads_first", "sliced", "mixed"):
        for name, x in family(**sizes, layout=layout).inputs(CPU).items():
            assert torch.equal(x, contiguous[name])
            assert not x.is_contiguous() or x.ndim == 1 or (layout, name) == ("mixed", "q")
    if family in (DecayCase, DeltaCase, DplrCase, SoftmaxCase):  # scans have no heads of queries, keys and values
        mixed = family(**sizes, layout="mixed").inputs(CPU)
        assert len({mixed[name].stride() for name in "qkv"}) == 3
        assert family(**sizes, layout="sliced").inputs(CPU)["v"]._base.isnan().any()


@pytest.mark.slow
@pytest.mark.parametrize(("kernel", "most"), [(REFERENCE, 98), (find("softmax", Paradigm.PARALLEL, "sdpa"), 83)])
def test_fixed_cases_run_after_drawn_cases_and_scale_with_examples(kernel, most, monkeypatch):
    cases = []
    for name in ("gradients_are_the_definitions", "a_cut_changes_nothing"):
        only_kept = replace(KERNEL_CHECKS[name], test=lambda trial: cases.append(trial.case), share=1.0)
        monkeypatch.setitem(KERNEL_CHECKS, name, only_kept)
    for examples in (EXAMPLES, EXAMPLES // 2, EXAMPLES // 10):
        cases.clear()
        check_kernel(kernel, checks=["gradients_are_the_definitions"], examples=examples)
        assert len(cases[examples:]) == most * examples // EXAMPLES
        assert all(case.grad for case in cases)
    cases.clear()
    check_kernel(kernel, checks=["a_cut_changes_nothing"])
    fixed = cases[EXAMPLES:]
    assert any(len(case.lengths) > 256 for case in fixed)
    assert any(case.length > 128 == case.chunk_size for case in fixed)
    assert all(sum(case.cuts) for case in fixed)


REFERENCES = [kernel for kernel in KERNELS.values() if kernel.reference]


PLAIN = ["decay/parallel/reference", "short_convolution/parallel/reference"]
"""Kernels of torch's own operations, which have second derivatives."""


@pytest.mark.parametrize("kernel", REFERENCES, ids=lambda kernel: str(kernel.key))
def test_second_derivatives_are_correct_or_raise_a_one_line_error(kernel):
    family = FAMILIES[kernel.op]
    names = ("q", "k", "v") if issubclass(family, DecayCase | SoftmaxCase) else family.names
    case = family(lengths=(6,), key_width=4, value_width=4, chunk_size=4, grad=names, log_decay=family.decays[0])
    inputs = {name: x.detach().requires_grad_(name in names) for name, x in case.inputs(CPU).items()}
    wanted = [inputs[name] for name in names]
    first = torch.autograd.grad(case.run(kernel, inputs)["output"].square().sum(), wanted, create_graph=True)
    again = sum(gradient.square().sum() for gradient in first)
    if str(kernel.key) in PLAIN:
        exact_first = torch.autograd.grad(case.define(inputs)["output"].square().sum(), wanted, create_graph=True)
        exact_again = sum(gradient.square().sum() for gradient in exact_first)
        torch.testing.assert_close(*(torch.autograd.grad(x, wanted) for x in (again, exact_again)))
        return
    with pytest.raises(SeqmixError, match=f"^{kernel.op}.* has no second derivatives") as error:
        again.backward()
    assert "\n" not in str(error.value)


def off_by_a_step(x):
    """A kernel whose queries read the state before them."""
    output, state = decay_chunkwise(x)
    return output.roll(1, 1), state


WRONG = replace(REFERENCE, backend="off_by_a_step", function=off_by_a_step, reference=False)


def test_failure_names_the_place_and_how_to_reproduce_it(monkeypatch):
    monkeypatch.setitem(KERNELS, WRONG.key, WRONG)
    (outcome,) = check_kernel(WRONG, checks=["outputs_are_the_definitions"]).outcomes
    assert outcome.status is Status.FAILED
    named = ["outputs_are_the_definitions", "2 of 2", "step 0, head 0, row 0, V 0", "expected", "got"]
    assert all(words in outcome.reason for words in named)
    assert outcome.case == DecayCase(lengths=(2,), dtype=outcome.case.dtype)
    rest = outcome.reason.splitlines()
    lines = rest[rest.index("To reproduce:") + 1 :]
    snippet = textwrap.dedent("\n".join(line for line in lines if line.startswith("    ")))
    with pytest.raises(CheckFailure, match="2 of 2"):
        exec(snippet)


@pytest.mark.parametrize(("error", "seen"), [(4e-7, False), (1e-6, True)])
def test_small_float16_delta_states_may_differ_only_by_tiny_rounding(error, seen):
    """In float16, every value that a token writes is a multiple of 6e-8."""

    def off(x):
        output, state = kernel.function(x)
        return output, state + error

    kernel = find("delta", Paradigm.CHUNKWISE, "reference")
    case = DeltaCase(dtype=torch.float16, lengths=(3,), final_state=True, sizes=(1.0, 1e-3, 1e-3), rate=0.01)
    with pytest.raises(CheckFailure, match="final state") if seen else nullcontext():
        reproduce_kernel("outputs_are_the_definitions", replace(kernel, function=off), case)


OWN = """
from dataclasses import replace

from seqmix import Paradigm
from seqmix.ops.decay.chunkwise import decay_chunkwise
from seqmix.ops.runtime.kernel import find
import seqmix.ops.decay


def wide(probe):
    return ["wide"] if probe.key_width > 64 else []


def wrong(x):
    output, state = decay_chunkwise(x)
    return output.roll(1, 1), state


reference = find("decay", Paradigm.CHUNKWISE, "reference")
made = replace(reference, backend="own", function=wrong, limits=wide)
kernels = [replace(reference, backend="other", function=wrong, reference=False, limits=wide)]
kernels += [replace(made, function=lambda x: wrong(x))]
"""


def test_small_gate_errors_fail_the_check_despite_sinks():
    kernel = find("softmax", Paradigm.PARALLEL, "sdpa")
    scores = ("log_forget", "slopes", "softcap", "sinks")
    sizes = {"lengths": (3,), "n_heads": 3, "n_kv_heads": 3, "value_width": 2, "forgetting": 9.0, "seed": 22195}
    case = SoftmaxCase(dtype=torch.bfloat16, grad=("log_forget",), scores=scores, **sizes)
    reproduce_kernel("gradients_are_the_definitions", kernel, case)

    def off(x):
        return kernel.function(x._replace(log_forget=x.log_forget + Off.apply(x.log_forget)))

    with pytest.raises(CheckFailure, match="log_forget"):
        reproduce_kernel("gradients_are_the_definitions", replace(kernel, function=off), case)


class Off(torch.autograd.Function):
    """Zeros with a gradient of 1e-5."""

    @staticmethod
    def forward(ctx, x):
        return torch.zeros_like(x)

    @staticmethod
    def backward(ctx, above):
        return torch.full_like(above, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("which", "made"), [("made", "from own import made as kernel"), (0, 'kernel = Kernel(op="decay"')]
)
def test_reproduction_script_finds_or_builds_an_undeclared_kernel(tmp_path, monkeypatch, which, made):
    (tmp_path / "own.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own", raising=False)
    own = importlib.import_module("own")
    kernel = own.made if which == "made" else own.kernels[which]
    (outcome,) = check_kernel(kernel, checks=["outputs_are_the_definitions"]).outcomes
    assert any(line.startswith(made.replace('"', "'")) for line in outcome.script)
    script = [sys.executable, "-c", "\n".join(outcome.script)]
    done = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert re.search(r"^\S*CheckFailure: ", done.stderr, re.MULTILINE), done.stderr
    (outcome,) = check_kernel(own.kernels[1], checks=["outputs_are_the_definitions"]).outcomes
    assert "kernel = ...  # the kernel that was checked: <lambda> cannot be imported" in outcome.reason


def test_unknown_check_or_op_raises():
    with pytest.raises(SeqmixError, match=r"'outputs_are_the_definition'.*outputs_are_the_definitions"):
        check_kernel(REFERENCE, checks=["outputs_are_the_definition"])
    with pytest.raises(SeqmixError, match=r"hyena.*decay"):
        check_kernel(replace(REFERENCE, op="hyena"))
    with pytest.raises(ValueError, match="outputs_are_the_definitions"):
        kernel_check(share=1)(KERNEL_CHECKS["outputs_are_the_definitions"].test)
