"""The documentation's Lightning example trains like the plain loop."""

import re
from pathlib import Path

import pytest
import torch

import seqmix
from seqmix.training.optimizer import build_optimizer
from seqmix.training.schedule import learning_rate

PAGE = Path(__file__).resolve().parents[2] / "docs" / "how-to" / "training-loop.md"


def test_lightning_example_trains_like_the_plain_loop(config_of, tmp_path, monkeypatch):
    pytest.importorskip("lightning")
    monkeypatch.chdir(tmp_path)
    config = config_of()
    settings, source = config.training, config.open_data()
    names = {"config": config, "settings": settings, "source": source, "build_model": seqmix.build_model}
    names |= {"build_optimizer": build_optimizer, "learning_rate": learning_rate}
    (block,) = re.findall(r"^```py\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    exec(block.replace("trainer.fit(Module(),", "module = Module()\ntrainer.fit(module,"), names)

    model = seqmix.build_model(config.model, seed=0)
    optimizer = build_optimizer(model, settings)
    for step in range(settings.steps):
        batch = source.training_batch(step, batch_size=8, seed=0)
        model(batch.inputs, targets=batch.targets).loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings)
        optimizer.step()
        optimizer.zero_grad()
    trained = names["module"].model.cpu()
    for (name, value), other in zip(trained.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-5, msg=name)
