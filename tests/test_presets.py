"""Every preset: it loads, it is unchanged, it can be built, and the small ones learn.

`python tests/test_presets.py` rewrites tests/data/presets.yaml after an intended change; the reader of the commit
judges the difference.
"""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from seqmix import account, build_model, load_config, train
from seqmix.models import build_meta
from seqmix.registry import dump
from seqmix.training import PRESETS
from seqmix.training.events import Evaluated, Stepped

GOLDEN = Path(__file__).parent / "data" / "presets.yaml"
NAMES = sorted(file.stem for file in PRESETS.glob("*.yaml"))
TINY = [name for name in NAMES if name.endswith("-tiny") and load_config(name).data.kind == "text"]


def resolved() -> str:
    """All presets as the library reads them, one after another."""
    return "".join(f"--- # {name}\n{dump(load_config(name))}" for name in NAMES)


def shrunk(name: str):
    """A preset's model with the same blocks, and small: 4, 8, 10 and 16 heads divide 320 into even widths."""
    layers = max(4, len(load_config(name).model.pattern or ()))
    return load_config(name, ["model.d_model=320", f"model.n_layers={layers}", "model.vocab_size=257"]).model


def test_the_presets_are_unchanged():
    assert {"retnet-tiny", "attention-tiny", "linear-tiny", "hybrid-tiny"} <= set(TINY)
    assert resolved() == GOLDEN.read_text(encoding="utf-8"), "if that is intended: python tests/test_presets.py"


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_loads_by_name_by_file_and_as_a_dump(name, tmp_path):
    config, file = load_config(name), PRESETS / f"{name}.yaml"
    assert load_config(file) == config
    (tmp_path / "run.yaml").write_text(dump(config), encoding="utf-8")
    assert load_config(tmp_path / "run.yaml") == config
    assert file.read_text().startswith("# ")  # what it is


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_is_built_on_meta_and_counted(name):
    config = load_config(name).model
    model, cost = build_meta(config), account(config, length=64)
    assert cost.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert min(cost.flops_per_token, cost.state_bytes, cost.activation_bytes) > 0


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_of_a_preset_s_blocks_has_a_gradient(name):
    config = shrunk(name)
    assert set(config.layers) == set(load_config(name).model.layers)
    model = build_model(config)
    tokens = torch.randint(0, 257, (2, 20), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    F.cross_entropy(model(tokens).logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    assert not [
        key for key, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()
    ]


def test_the_tiny_presets_are_equally_large_and_differ_only_in_the_model():
    sizes = {name: account(load_config(name).model, length=64).parameters for name in TINY}
    assert max(sizes.values()) <= 1.02 * min(sizes.values()), sizes
    base = load_config("retnet-tiny")
    assert all((load_config(name).training, load_config(name).data) == (base.training, base.data) for name in TINY)


@pytest.mark.parametrize("name", TINY)
def test_a_tiny_preset_trains(name, tmp_path):
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
    GOLDEN.write_text(resolved(), encoding="utf-8")
