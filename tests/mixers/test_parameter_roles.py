"""Roles of parameters: what each mixer declares, how training uses it, and errors in declarations."""

import contextlib
import re

import pytest
import torch
from small_runs import refusal
from torch import nn

from seqmix.blocks import FFNS, NORMS
from seqmix.mixers import MIXERS, ContractError
from seqmix.mixers.base.roles import Role, RowBlock, roles_of
from seqmix.models import build_meta
from seqmix.testing.mixer.options import alternatives, changed
from seqmix.training import PRESETS, TrainingConfig, load_config
from seqmix.training.optimizer import build_optimizer

RATES = (
    *("A_log", "A_imag", "dt_bias", "log_step", "D", "C", "bound", "rate", r"time_\w+", "logit", "ridge", "level_rate"),
    *("sinks", "exclusion", "shift", r"mix_\w", r"token_mix\.weight", "removed", "replaced", "bonus", "skip"),
    *("frequency", r"\w*norm\w*", r"\w*bias", r"(convolution|\w*norm)\.\w+", r"filter\w+\.\w+(\.\w+)?"),
    *("center", "(output_)?feedback", "[qk]_weight", "step_factor", r"initial_\w+\.\d"),
)
NOT_DECAYED = re.compile(rf"(^|\.)({'|'.join(RATES)})$")
"""Names that authors' code exempts from weight decay: rates, biases, norms, filters and factors by channel."""


def mixer_of(config):
    with torch.device("meta"):
        for width in (24, 32, 64):
            with contextlib.suppress(ContractError):  # heads do not divide the width
                return config.build(width, layer_idx=1, n_layers=4)
    return None


@pytest.mark.parametrize("kind", sorted(MIXERS.built_in()))
def test_rates_gates_biases_and_norms_get_no_weight_decay(kind):
    example = MIXERS.resolve(kind).example()
    others = [changed(example, {name: value}) for name, values in alternatives(example).items() for value in values]
    for config in (example, *filter(None, others)):
        if (mixer := mixer_of(config)) is None:
            continue
        optimizer = build_optimizer(mixer, TrainingConfig(steps=1, batch_size=1, learning_rate=0.1, weight_decay=0.3))
        decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
        parameters = list(mixer.named_parameters())
        assert len(decay) == len(parameters)
        for name, parameter in parameters:
            assert decay[id(parameter)] == (0.0 if NOT_DECAYED.search(name) else 0.3), name


@pytest.mark.parametrize("preset", sorted(file.stem for file in PRESETS.glob("*-tiny.yaml")))
def test_every_parameter_of_a_model_has_a_role(preset):
    model = build_meta(load_config(preset).model)
    roles = roles_of(model)
    assert list(roles) == [name for name, _ in model.named_parameters()]
    assert roles["embedding.weight"].role is Role.EMBEDDING
    assert roles.get("head.weight", roles["embedding.weight"]).role in (Role.READOUT, Role.EMBEDDING)


def test_parameters_of_every_built_in_ffn_and_norm_have_roles():
    for registry in (FFNS, NORMS):
        for kind in registry.built_in():
            fields = {"expansion": 2.0, "n_experts": 2, "top_k": 1, "shared_expansion": 1.0}
            cls = registry.resolve(kind)
            config = cls(**{name: value for name, value in fields.items() if name in cls.model_fields})
            assert roles_of(config.build(8))


@pytest.mark.parametrize("kind", ["adamw", "muon", "normuon"])
@pytest.mark.parametrize("preset", ["mamba-tiny", "kda-tiny", "h3-tiny"])
def test_step_with_zero_gradients_changes_only_decayed_roles(preset, kind):
    torch.manual_seed(0)
    model = load_config(preset).model
    mixer = model.blocks[model.layers[0]].mixer.build(64, layer_idx=0, n_layers=2)
    mixer.reset_parameters()
    roles = roles_of(mixer)
    before = {name: parameter.detach().clone() for name, parameter in mixer.named_parameters()}
    optimizer = build_optimizer(mixer, TrainingConfig(steps=1, batch_size=1, learning_rate=0.1, optimizer=kind))
    for parameter in mixer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in mixer.named_parameters():
        assert torch.equal(parameter, before[name]) is not roles[name].role.decays, name


class Own(nn.Module):
    """A user's module with a parameter of its own."""

    def __init__(self, **roles):
        super().__init__()
        self.maps = nn.Linear(3, 6)
        self.table = nn.Parameter(torch.zeros(2, 3))
        self.slope = nn.Parameter(torch.zeros(3))
        if roles:
            self.parameter_roles = roles["declared"]


def test_missing_or_wrong_role_declaration_raises():
    assert "parameter_roles = {'table': ...} in Own" in refusal(lambda: roles_of(Own()))
    assert 'did you mean "table"' in refusal(lambda: roles_of(Own(declared={"tabel": Role.RATE})))
    assert 'did you mean "rate"' in refusal(lambda: roles_of(Own(declared={"table": "rates"})))
    two = {"table": "rate", "maps.weight": [RowBlock("q", 3), RowBlock("k", 2)]}
    assert "blocks with 6 rows in total for maps.weight, got 5" in refusal(lambda: roles_of(Own(declared=two)))


def test_role_declaration_overrides_that_of_a_submodule():
    declared = {"table": "rate", "maps.weight": [RowBlock("q", 3), RowBlock("gate", 3, Role.GATE)]}
    roles = roles_of(nn.ModuleDict({"own": Own(declared=declared)}))
    assert [(name, role.role) for name, role in roles.items()] == [
        ("own.table", Role.RATE),
        ("own.slope", Role.VECTOR),
        ("own.maps.weight", Role.MATRIX),
        ("own.maps.bias", Role.VECTOR),
    ]
    assert [block.name for block in roles["own.maps.weight"].blocks] == ["q", "gate"]
