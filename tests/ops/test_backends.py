"""Backend selection: what each name resolves to, and when `auto` chooses something other than the reference."""

import logging
from dataclasses import replace

import pytest
import torch

import seqmix.ops.kernels.selection as module
from seqmix import build_model, load_config
from seqmix.mixers import Paradigm
from seqmix.ops import attention  # noqa: F401 (declares the kernels of softmax)
from seqmix.ops.decay.chunkwise import decay_chunkwise
from seqmix.ops.kernels.native import build
from seqmix.ops.kernels.selection import choose, describe_backends, disagreement
from seqmix.ops.runtime.kernel import Probe, chosen, find, reference
from seqmix.registry import SeqmixError

PROBE = Probe(device=torch.device("cpu"), dtype=torch.float32, key_width=8, value_width=4, log_decay="H")
ON_GPU = replace(PROBE, device=torch.device("cuda"))
CHUNKWISE = reference("decay", Paradigm.CHUNKWISE)


needs_triton = pytest.mark.skipif(
    find("decay", Paradigm.CHUNKWISE, "triton").unsupported(ON_GPU) != [], reason="needs triton"
)


@pytest.fixture(autouse=True)
def _nothing_is_remembered():
    for function in (choose, module._warn_unmeasured):
        function.cache_clear()
    yield
    for function in (choose, module._warn_unmeasured):
        function.cache_clear()


@pytest.fixture
def trial(monkeypatch):
    """Say how the trial of a kernel ends."""
    return lambda reason: monkeypatch.setattr(module, "disagreement", lambda kernel, probe: reason)


@pytest.mark.skipif(build.failure("recurrence") is not None, reason="there is no C++ compiler")
def test_auto_chooses_native_on_cpu_where_it_is_faster():
    fixed = dict.fromkeys(Paradigm, "reference") | {Paradigm.RECURRENT: "native"}
    assert choose("decay", "auto", PROBE) == fixed
    assert choose("decay", "auto", replace(PROBE, log_decay="B T H")) == fixed | {Paradigm.CHUNKWISE: "native"}
    assert choose("softmax", "auto", PROBE) == dict.fromkeys(Paradigm, "sdpa")


@needs_triton
@pytest.mark.parametrize("log_decay", ["H", "B T H K"])
def test_auto_chooses_the_kernel_that_passes_its_trial_and_logs_it_once(trial, caplog, log_decay):
    probe = replace(ON_GPU, log_decay=log_decay)
    caplog.set_level(logging.INFO, logger="seqmix")
    trial(None)
    triton = {Paradigm.PARALLEL: "reference", Paradigm.RECURRENT: "triton", Paradigm.CHUNKWISE: "triton"}
    assert [choose("decay", "auto", probe) for _ in range(3)] == [triton] * 3
    choices = [record.getMessage() for record in caplog.records if record.levelname == "INFO"]
    for message, paradigm in zip(choices, ("chunkwise", "recurrent"), strict=True):
        assert all(word in message for word in ("decay", paradigm, "cuda", "float32", "triton"))
    assert describe_backends("decay", triton) == "triton"


@needs_triton
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_unsupported_kernel_falls_back_while_other_paradigms_keep_triton(trial, caplog, backend):
    trial(None)
    found = choose("decay", backend, replace(ON_GPU, value_width=513))
    assert found == dict.fromkeys(Paradigm, "reference") | {Paradigm.RECURRENT: "triton"}
    assert describe_backends("decay", found) == "triton (recurrent)"
    message, *others = caplog.messages
    assert all(word in message for word in ("chunkwise", "reference", "513"))
    assert len(others) == (backend == "auto")  # the kernel that it chooses is not measured


@needs_triton
def test_auto_warns_once_that_its_kernels_are_unmeasured(trial, caplog):
    trial(None)
    for op, log_decay in (("decay", "H"), ("decay", "B T H"), ("delta", "B T H")):
        assert "triton" in choose(op, "auto", replace(ON_GPU, log_decay=log_decay)).values()
    (message,) = caplog.messages
    expected = ["auto chose triton", "not been measured on a GPU", "backend=reference", "backend=fla"]
    assert all(words in message for words in expected)


@needs_triton
def test_explicit_or_third_party_kernels_do_not_warn(trial, caplog, monkeypatch):
    trial(None)
    choose("decay", "triton", ON_GPU)
    chunkwise = {Paradigm.CHUNKWISE: ("fla",)}
    monkeypatch.setattr(module, "AUTO", {"decay": chunkwise})
    monkeypatch.setattr(module, "find", lambda op, paradigm, name: replace(CHUNKWISE, backend=name))
    assert choose("decay", "auto", ON_GPU)[Paradigm.CHUNKWISE] == "fla"
    assert caplog.messages == []


def test_auto_falls_back_to_reference_and_warns_when_trials_fail(trial, caplog):
    trial("it was wrong")
    assert choose("decay", "auto", ON_GPU) == dict.fromkeys(Paradigm, "reference")
    assert len(caplog.messages) == 2
    for message, paradigm in zip(caplog.messages, ("chunkwise", "recurrent"), strict=True):
        assert f"decay {paradigm}" in message


@pytest.mark.parametrize("log_decay", [None, "H", "B T H", "B T H K"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trial_accepts_a_correct_kernel(log_decay, dtype):
    assert disagreement(CHUNKWISE, replace(PROBE, log_decay=log_decay, dtype=dtype)) is None


def late(x):
    """Queries read the state before them."""
    output, state = decay_chunkwise(x)
    return output.roll(1, 1), state


def without_the_gradient_of_the_state(x):
    return decay_chunkwise(x._replace(initial_state=x.initial_state.detach() + 0 * x.initial_state))


def half_a_chunk(x):
    """The last, ragged chunk is left out of the state."""
    output, _ = decay_chunkwise(x)
    return output, decay_chunkwise(x._replace(q=x.q[:, :256], k=x.k[:, :256], v=x.v[:, :256])).final_state


def broken(x):
    raise RuntimeError("no code for this device\nand a trace")


@pytest.mark.parametrize(
    ("function", "named"),
    [
        (late, ["output", "1.4e"]),
        (without_the_gradient_of_the_state, ["gradient of initial_state", "1.0e"]),
        (half_a_chunk, ["final state"]),
        (broken, ["RuntimeError: no code for this device"]),
    ],
)
def test_trial_rejects_a_wrong_kernel_and_names_the_difference(function, named):
    found = disagreement(replace(CHUNKWISE, function=function), PROBE)
    assert all(word in found for word in ("decay/chunkwise/reference", *named))
    assert "\n" not in found


def test_trial_covers_learned_and_fixed_decays():
    calls = []
    seen = replace(CHUNKWISE, function=lambda x: calls.append(x) or CHUNKWISE.function(x))
    assert disagreement(seen, PROBE) is None
    learned, fixed = calls
    assert learned.log_decay.requires_grad
    assert not fixed.log_decay.requires_grad
    assert fixed.chunk_size == 128
    for x in calls:
        assert all(tensor.requires_grad for tensor in (x.q, x.k, x.v, x.initial_state))
        # columns of one projection: a token's row has all three
        assert {tensor.stride(1) for tensor in (x.q, x.k, x.v)} == {2 * (8 + 8 + 4)}
    # what only fixed rates ask for is tried
    wrong = replace(CHUNKWISE, function=lambda x: CHUNKWISE.function(x if x.log_decay.requires_grad else late(x)[0]))
    assert "failed in a trial" in disagreement(wrong, PROBE)


def test_delta_trial_uses_unit_keys_and_checks_the_gradient_of_beta():
    kernel, calls, probe = reference("delta", Paradigm.CHUNKWISE), [], replace(PROBE, log_decay="B T H")
    seen = replace(kernel, function=lambda x: calls.append(x) or kernel.function(x))
    assert disagreement(seen, probe) is None
    torch.testing.assert_close(calls[0].k.norm(dim=-1), torch.ones(2, 259, 2))
    assert calls[0].beta.min() > 0
    wrong = replace(kernel, function=lambda x: kernel.function(x._replace(beta=x.beta.detach() + 0 * x.beta)))
    assert "the gradient of beta" in disagreement(wrong, probe)


@needs_triton
@pytest.mark.parametrize("log_decay", ["B T H", "B T H K"])
def test_auto_chooses_triton_for_delta_within_its_key_widths(trial, log_decay):
    trial(None)
    probe = replace(ON_GPU, dtype=torch.bfloat16, key_width=128, value_width=128, log_decay=log_decay)
    found = choose("delta", "auto", probe)
    assert found == dict.fromkeys(Paradigm, "reference") | {Paradigm.CHUNKWISE: "triton"}
    assert describe_backends("delta", found) == "triton"
    wide = choose("delta", "auto", replace(probe, key_width=256))
    assert wide == (dict.fromkeys(Paradigm, "reference") if log_decay == "B T H K" else found)


@pytest.mark.parametrize("wrong", ["kernel", "reference"])
def test_device_lost_during_a_trial_raises_a_clear_error(wrong, monkeypatch):
    monkeypatch.setattr(module, "_device_works", lambda device: False)
    if wrong == "reference":
        monkeypatch.setattr(module, "reference", lambda *_: replace(CHUNKWISE, function=broken))
    kernel = replace(CHUNKWISE, function=broken) if wrong == "kernel" else CHUNKWISE
    with pytest.raises(SeqmixError, match=r"no code for this device; cpu no longer works .*`backend: reference`$"):
        disagreement(kernel, PROBE)


@needs_triton
def test_explicit_backend_that_fails_its_gpu_trial_raises(trial):
    trial("it was wrong")
    with pytest.raises(SeqmixError, match="backend triton cannot run: it was wrong"):
        choose("decay", "triton", ON_GPU)


def test_auto_tries_the_next_backend_when_a_trial_fails(monkeypatch):
    triton, fla = (replace(CHUNKWISE, backend=name) for name in ("triton", "fla"))
    monkeypatch.setattr(module, "find", lambda op, paradigm, name: fla if name == "fla" else triton)
    monkeypatch.setattr(module, "disagreement", lambda kernel, probe: None if kernel is fla else "it was wrong")
    found = choose("decay", "auto", ON_GPU)
    assert (found[Paradigm.CHUNKWISE], found[Paradigm.RECURRENT]) == ("fla", "reference")


def test_trial_of_a_recurrent_kernel_uses_one_token():
    step, read = reference("decay", Paradigm.RECURRENT), []
    counted = replace(step, function=lambda x: read.append(x.q.shape[1]) or step.function(x))
    assert disagreement(counted, PROBE) is None
    assert read == [1]
    doubles = replace(step, function=lambda x: step.function(x._replace(q=2 * x.q)))
    assert "output" in disagreement(doubles, PROBE)


def test_explicit_backend_that_cannot_run_raises_with_reasons():
    with pytest.raises(SeqmixError, match=r"fla .*bfloat16, float16.* float32.*CUDA"):
        choose("decay", "fla", PROBE)
    with pytest.raises(SeqmixError, match=r"decay .*'flex'.* auto, "):
        choose("decay", "flex", PROBE)
    config = load_config("retnet-tiny", ["model.blocks.ret.mixer.backend=fla"])
    with pytest.raises(SeqmixError, match=r"model\.blocks\.ret\.mixer: .*fla"):
        build_model(config.model)


def test_reference_computes_paradigms_a_backend_lacks():
    x = torch.zeros(1)
    assert chosen("softmax", Paradigm.PARALLEL, "auto", x) is reference("softmax", Paradigm.PARALLEL)
    flex = find("softmax", Paradigm.PARALLEL, "flex")
    assert chosen("softmax", Paradigm.PARALLEL, "flex", x) is flex
    assert chosen("softmax", Paradigm.RECURRENT, "flex", x) is reference("softmax", Paradigm.RECURRENT)


def test_model_resolves_backends_when_built(monkeypatch):
    asked = []
    monkeypatch.setattr(
        "seqmix.mixers.base.contract.choose", lambda op, backend, probe: asked.append((op, probe)) or {}
    )
    model = build_model(load_config("hybrid-tiny").model, activations=torch.bfloat16)
    assert model.backends == {"ret": "reference", "attn": "sdpa"}
    assert {op for op, _ in asked} == {"decay", "softmax"}
    assert {(probe.device.type, probe.dtype) for _, probe in asked} == {("cpu", torch.bfloat16)}


@torch.no_grad()
def test_layer_calls_its_resolved_backend(monkeypatch):
    plain = build_model(load_config("attention-tiny").model).eval()
    model = build_model(load_config("attention-tiny", ["model.blocks.attn.mixer.backend=flex"]).model).eval()
    tokens = torch.arange(20)[None]
    called = []
    flex = find("softmax", Paradigm.PARALLEL, "flex")
    counted = replace(flex, function=lambda x: called.append(1) or flex.function(x))
    monkeypatch.setitem(module.KERNELS, flex.key, counted)
    torch.testing.assert_close(model(tokens).logits, plain(tokens).logits)
    assert len(called) == 4


def test_unknown_backend_error_lists_only_backends_of_the_op():
    with pytest.raises(SeqmixError) as refused:
        choose("delta", "triton_tf32x3", PROBE)
    assert str(refused.value) == (
        "delta has no backend 'triton_tf32x3'; did you mean \"triton\"? Available: auto, native, reference, triton"
    )
