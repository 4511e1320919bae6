"""Every preset loads, is unchanged and can be built, and the small ones learn.

What a preset says is read in its file; what it leaves out are defaults. tests/data/defaults.txt has the defaults of
every configuration, and the parameters and the training FLOPs of every preset: `python tests/test_presets.py` rewrites
it after an intended change, and the reader of the commit judges the difference, a line per field.
"""

import math
import re
from enum import StrEnum
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from seqmix import MIXERS, ModelConfig, RunConfig, account, build_model, load_config, train
from seqmix.blocks import BlockConfig
from seqmix.blocks.ffn import FFNS
from seqmix.blocks.norm import NORMS
from seqmix.blocks.residual import RESIDUALS
from seqmix.data.source import DATA
from seqmix.models import build_meta
from seqmix.registry import Config, dump
from seqmix.training import PRESETS, TrainingConfig
from seqmix.training.monitoring.events import Evaluated, Stepped

GOLDEN = Path(__file__).parent / "data" / "defaults.txt"
NAMES = sorted(file.stem for file in PRESETS.glob("*.yaml"))
TINY = [name for name in NAMES if name.endswith("-tiny") and load_config(name).data.kind == "text"]


def defaults_of(config: type[Config]) -> list[str]:
    """The fields of a configuration, a line each."""
    lines = []
    for name, field in config.model_fields.items():
        default = field.get_default(call_default_factory=True)
        shown = "(required)" if field.is_required() else str(default) if isinstance(default, StrEnum) else repr(default)
        lines.append(f"  {name} = {shown}")
    return lines


def described() -> str:
    """The defaults of every configuration, and the size of every preset."""
    groups = {"mixer": MIXERS, "ffn": FFNS, "norm": NORMS, "residual": RESIDUALS, "data": DATA}
    kinds = {}
    for group, registry in groups.items():
        kinds |= {f"{group} {kind}": config for kind, config in registry.built_in().items()}
    kinds |= {"run": RunConfig, "training": TrainingConfig, "model": ModelConfig, "block": BlockConfig}
    lines = []
    for title, config in kinds.items():
        lines += [title, *defaults_of(config), ""]
    lines.append("presets: parameters, FLOPs per token")
    for name in NAMES:
        cost = account(load_config(name).model, length=64)
        lines.append(f"  {name} {cost.parameters:,} {cost.flops_per_token:,.0f}")
    return "\n".join(lines) + "\n"


def shrunk(name: str):
    """A preset's model with the same blocks, and small: 4, 8, 10 and 16 heads divide 320 into even widths."""
    layers = max(4, len(load_config(name).model.pattern or ()))
    return load_config(name, ["model.d_model=320", f"model.n_layers={layers}", "model.vocab_size=257"]).model


def test_presets_match_the_golden_file():
    assert {"retnet-tiny", "attention-tiny", "linear-tiny", "hybrid-tiny"} <= set(TINY)
    assert described() == GOLDEN.read_text(encoding="utf-8"), "if that is intended: python tests/test_presets.py"


@pytest.mark.parametrize("name", NAMES)
def test_preset_loads_by_name_from_file_and_from_dump(name, tmp_path):
    config, file = load_config(name), PRESETS / f"{name}.yaml"
    assert load_config(file) == config
    (tmp_path / "run.yaml").write_text(dump(config), encoding="utf-8")
    assert load_config(tmp_path / "run.yaml") == config
    assert file.read_text().startswith("# ")  # what it is


@pytest.mark.parametrize("name", NAMES)
def test_preset_cost_matches_its_meta_model(name):
    config = load_config(name).model
    model, cost = build_meta(config), account(config, length=64)
    assert cost.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert min(cost.flops_per_token, cost.state_bytes, cost.activation_bytes) > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_block_parameter_of_a_preset_gets_a_gradient(name):
    config = shrunk(name)
    assert set(config.layers) == set(load_config(name).model.layers)
    model = build_model(config)
    tokens = torch.randint(0, 257, (2, 20), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    losses = []
    logits = model(tokens, losses=losses).logits
    sum(losses, F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())).backward()
    # a choice of one source; factors of weights that start at zero
    silent = re.compile(r"blocks\.0\.mixer_residual\.choice\.weight|(blocks\.\d+\.\w+_)?residual\.(scale|dense\.down)")
    idle = [key for key, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    assert not [key for key in idle if not silent.fullmatch(key)]


def test_tiny_presets_have_similar_sizes_and_share_training_and_data():
    sizes = {name: account(load_config(name).model, length=64).parameters for name in TINY}
    assert max(sizes.values()) <= 1.02 * min(sizes.values()), sizes
    base = load_config("retnet-tiny")
    assert all((load_config(name).training, load_config(name).data) == (base.training, base.data) for name in TINY)


@pytest.mark.parametrize("name", TINY)
def test_tiny_preset_trains(name, tmp_path):
    # of many different tokens, so that the untrained loss is a mean of many random logits
    (tmp_path / "text.txt").write_text("".join(map(chr, range(32, 127))) * 14)
    small = ["training.steps=2", "training.warmup_steps=1", "training.batch_size=2", "data.sequence_length=24"]
    config = load_config(name, [*small, f"data.paths=[{tmp_path / 'text.txt'}]"])
    events = list(train(config, tmp_path / "run"))
    losses = [event.loss for event in events if isinstance(event, Stepped | Evaluated)]
    assert len(losses) == 3
    # untrained: the logits are about N(0, 1), which costs half a nat over the uniform guess
    assert losses[0] == pytest.approx(math.log(257) + 0.5, abs=0.5)
    assert all(math.isfinite(loss) for loss in losses)


if __name__ == "__main__":
    GOLDEN.write_text(described(), encoding="utf-8")
