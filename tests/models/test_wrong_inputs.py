"""Wrong inputs to models and mixers raise one-line errors that say what was expected."""

import numpy as np
import pytest
import torch

import seqmix.models.loss as loss_module
from seqmix import MIXERS, ContractError, SeqmixError, build_model, generate_text, load_config
from seqmix.ops.decay import decay
from seqmix.training.presets import single_kind_presets

TOKENS = torch.arange(8)[None]


@pytest.fixture(scope="module")
def model():
    return build_model(load_config("retnet-tiny").model).eval()


WRONG_CALLS = {
    "tokens in a list": (lambda m: m([[1, 2]]), "tokens must be a tensor of integers .* list: pass torch.as_tensor"),
    "tokens in numpy": (
        lambda m: m(np.ones((1, 2), dtype=np.int64)),
        "tokens .* ndarray: pass torch.as_tensor",
    ),
    "float tokens": (lambda m: m(TOKENS.float()), r"tokens must be .* integers .*float32: pass tokens\.long\(\)"),
    "an integer as state": (
        lambda m: m(TOKENS, 5),
        "state must be .* return_state=True.* 4 layers, got a int",
    ),
    "integers as states": (lambda m: m(TOKENS, (1, 2, 3, 4)), "retention expects the state .* init_state .* got a int"),
    "targets in a list": (lambda m: m(TOKENS, targets=[[1] * 8]), "targets must be .* list: pass torch.as_tensor"),
    "float targets": (lambda m: m(TOKENS, targets=TOKENS.float()), r"targets .*float32: pass targets\.long\(\)"),
    "int32 targets": (lambda m: m(TOKENS, targets=TOKENS.int()), r"targets .*int32: pass targets\.long\(\)"),
    "boundaries in a list": (lambda m: m(TOKENS, cu_seqlens=[0, 3, 8]), "cu_seqlens must be an integer tensor .* list"),
    "labels": (lambda m: m(TOKENS, labels=TOKENS), "no argument 'labels': pass targets="),
    "a misspelt argument": (lambda m: m(TOKENS, target=TOKENS), "no argument 'target'; did you mean \"targets\""),
    "a text of numbers": (lambda m: generate_text(m, [1, 2]), r"list of strings, got \[1, 2\]: generate_tokens takes"),
    "a number as text": (lambda m: generate_text(m, 5), "list of strings, got 5"),
    "a list in a mixer": (lambda m: m.blocks[0].mixer([1.0]), "x must be a tensor .* got a list"),
}


@pytest.mark.parametrize("case", WRONG_CALLS)
def test_wrong_input_raises_one_line_error(case, model):
    call, sentence = WRONG_CALLS[case]
    with pytest.raises(SeqmixError, match=sentence) as refused:
        call(model)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("predictions", [False, True])
@pytest.mark.parametrize("in_parts", [False, True])
@pytest.mark.parametrize(("targets", "range_of_them"), [(TOKENS + 300, "300 to 307"), (TOKENS - 3, "-3 to 4")])
def test_target_outside_vocabulary_is_named_in_error(targets, range_of_them, in_parts, predictions, model, monkeypatch):
    if in_parts:
        monkeypatch.setattr(loss_module, "LOGITS_AT_ONCE", {"cpu": 3 * 257})
    targets = targets.clone()
    targets[0, 1] = -100
    with pytest.raises(SeqmixError, match=f"targets must be from 0 to 256, or -100 .*, got {range_of_them}"):
        model(TOKENS, targets=targets, return_predictions=predictions)


def test_op_rejects_boundaries_given_as_list():
    x = torch.zeros(1, 8, 1, 2)
    with pytest.raises(SeqmixError, match=r"cu_seqlens must be an integer tensor .* got a list"):
        decay(x, x, x, cu_seqlens=[0, 8])


@pytest.mark.parametrize("preset", single_kind_presets())
def test_wrong_input_width_error_names_both_widths(preset):
    config = load_config(preset).model
    mixer = config.blocks[config.layers[0]].mixer.build(config.d_model, layer_idx=0, n_layers=2)
    with pytest.raises(SeqmixError, match=r"expect(s|ed) x ") as refused:
        mixer(torch.zeros(1, 4, 24))
    assert all(str(width) in str(refused.value) for width in (24, config.d_model))


@pytest.mark.parametrize(("kind", "other"), [("gla", "attention"), ("gla", "retention"), ("attention", "delta_net")])
def test_mixer_rejects_state_of_another_kind(kind, other):
    mixer, stranger = (MIXERS.resolve(name)(n_heads=2).build(16, layer_idx=0, n_layers=1) for name in (kind, other))
    x = torch.randn(1, 3, 16)
    _, state = stranger(x, return_state=True)
    with pytest.raises(ContractError, match=rf"^{kind} expects a state of its own: .* got "):
        mixer(x, state)


def test_argument_checks_cause_no_graph_break(model):
    torch.compiler.reset()
    compiled = torch.compile(lambda tokens: model(tokens, targets=tokens).loss, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(TOKENS), model(TOKENS, targets=TOKENS).loss)
