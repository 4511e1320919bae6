"""muP and CompleteP: initial values, learning rates and scores across widths, and the coordinate check."""

import pytest
import torch
from small_runs import refusal

from seqmix import build_model
from seqmix.lab.coordinates import coordinates
from seqmix.mixers.base.roles import Role, roles_of
from seqmix.models import build_meta
from seqmix.models.parametrization import fan_in_ratio
from seqmix.training import load_config
from seqmix.training.optimizer import build_optimizer, set_learning_rate, trainings_of
from seqmix.training.presets import single_kind_presets

MUP = "model.parametrization={kind: mup, base_width: 64}"
SMALL = ("model.n_layers=2", "data.sequence_length=32", "training.optimizer=adamw")


def config_of(*changes, preset="retnet-tiny"):
    return load_config(preset, [*SMALL, *changes])


def test_mup_at_base_width_matches_standard_parametrization():
    plain, mup = (build_model(config_of("model.d_model=64", *changes).model) for changes in ((), (MUP,)))
    for (name, one), (_, other) in zip(plain.named_parameters(), mup.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    training = config_of().training
    for a, b in zip(trainings_of(plain, training), trainings_of(mup, training), strict=True):
        assert (a.multiplier, a.weight_decay) == (b.multiplier, b.weight_decay)


@pytest.mark.parametrize("init", ["{kind: paper}", "{kind: normal, std: 0.1}"])
def test_initial_values_and_learning_rates_scale_with_width(init):
    config = config_of("model.d_model=256", f"model.init={init}", MUP)
    model = build_model(config.model)
    std = 0.1 if "normal" in init else 64**-0.5
    expected = {"embedding.weight": std, "head.weight": std / 4}
    if "normal" in init:
        expected["blocks.0.mixer.in_proj.weight"] = std / 2
    for name, value in expected.items():
        assert model.get_parameter(name).std().item() == pytest.approx(value, rel=0.05), name
    by_name = {a.name: a for a in trainings_of(model, config.training)}
    for name, multiplier in {
        "embedding.weight": 1,
        "blocks.1.mixer.in_proj.weight": 0.25,
        "blocks.1.ffn.down_proj.weight": 0.25,
        "blocks.1.ffn_norm.weight": 1,
        "head.weight": 0.25,
    }.items():
        assert by_name[name].multiplier == multiplier, name
        if by_name[name].weight_decay:
            assert by_name[name].weight_decay * multiplier == pytest.approx(config.training.weight_decay)
    optimizer = build_optimizer(model, config.training)
    set_learning_rate(optimizer, 0.4)
    assert {group["lr"] for group in optimizer.param_groups} == {0.4, 0.1}
    # a step of Muon is as large in the spectral norm, relative to the weights', at every width
    muon = {a.name: a for a in trainings_of(model, config.training.model_copy(update={"optimizer": "muon"}))}
    assert muon["blocks.0.ffn.up_proj.weight"].multiplier == pytest.approx(0.5)


def test_initial_matrices_of_every_mixer_shrink_with_fan_in():
    # constants of TTT and Titans, and Xavier's rule from fixed ranks (RWKV-7, latent attention), did not
    wrong = []
    for preset in single_kind_presets():
        mixers = []
        for width in (64, 256):
            torch.manual_seed(0)
            config = config_of(f"model.d_model={width}", "model.n_layers=1", MUP, preset=preset)
            mixers.append(build_model(config.model).blocks[0].mixer)
        narrow, wide = mixers
        for name, role in roles_of(narrow).items():
            if role.role in (Role.MATRIX, Role.GATE):
                before, after = narrow.get_parameter(name), wide.get_parameter(name)
                expected = before.std() * fan_in_ratio(after.shape, before.shape) ** -0.5
                if abs(after.std() - expected) > 0.15 * expected:
                    wrong.append((preset, name))
    assert wrong == []


def test_attention_scores_scale_with_inverse_head_width():
    for kind in ("attention", "latent_attention"):
        mixer = f"model.blocks.ret.mixer={{kind: {kind}, n_heads: 2}}"
        wide, plain = (
            build_meta(config_of("model.d_model=256", mixer, *changes).model).blocks[0].mixer
            for changes in ((MUP,), ())
        )
        base = build_meta(config_of("model.d_model=64", mixer).model).blocks[0].mixer
        assert wide.score_scale == pytest.approx(plain.score_scale * (base.score_width / plain.score_width) ** 0.5)
        assert base.score_scale == base.score_width**-0.5


def test_completep_scales_residual_branches_with_depth():
    complete = "model.parametrization={kind: completep, base_width: 64, base_depth: 2}"
    deep, shared = (
        build_meta(config_of("model.d_model=64", "model.n_layers=8", complete, *changes).model)
        for changes in ((), ("model.blocks.ret.shared=true",))
    )
    assert {block.residual_scale for block in (*deep.blocks, *shared.blocks)} == {0.25}
    assert build_meta(config_of("model.d_model=64", complete).model).blocks[0].residual_scale == 1


def test_settings_that_mup_cannot_scale_raise():
    assert "needs tie_embeddings = false" in refusal(lambda: config_of(MUP, "model.tie_embeddings=true"))
    narrow = config_of("model.parametrization={kind: mup, base_width: 3}")
    assert "base_width: the model cannot be built with d_model = 3: " in refusal(lambda: build_meta(narrow.model))


def test_activations_grow_with_width_only_without_mup():
    """The learning rate follows the paper's coordinate checks: large enough to matter within a few steps."""
    for changes, verdicts in (((), {"grows"}), ((MUP,), {"flat"})):
        result = coordinates(config_of(*changes, "training.learning_rate=0.003"), (64, 192), steps=6, batch_size=2)
        found = {one.verdict for one in result if one.part in ("mixer (ret)", "ffn (ret)", "stream")}
        assert found == verdicts, result
