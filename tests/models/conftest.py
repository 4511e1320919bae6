"""Small models of every kind of mixer, made from names."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from seqmix import MIXERS, LanguageModel, ModelConfig, build_model

VARIANTS: dict[str, dict[str, Any]] = {
    "retention of the plain kind": {"kind": "retention", "row_norm": False, "gate": "none", "rotation": "none"},
    "learnable retention": {"kind": "retention", "learnable_decay": True, "rotation": "rope", "head_norm": "rms"},
    "windowed attention": {"kind": "attention", "window": 5, "n_kv_heads": 1},
    "xpos attention": {"kind": "attention", "positions": "xpos"},
    "attention without positions": {"kind": "attention", "positions": "none"},
    "linear attention without denominator": {
        "kind": "linear_attention",
        "denominator": False,
        "feature_map": "identity",
        "head_norm": "rms",
    },
}
"""Mixers beside the defaults, by name."""


def mixer(name: str) -> dict[str, Any]:
    """A mixer with small chunks and two heads (of eight values), whatever else it may be."""
    given = VARIANTS.get(name, {"kind": name})
    cls = MIXERS.resolve(given["kind"])
    small = {"n_heads": 2, "head_dim": 8, "chunk_size": 4}
    return cls.example_fields() | {key: value for key, value in small.items() if key in cls.model_fields} | given


def make_config(*mixers: str, **fields: Any) -> ModelConfig:
    """A model with one block a name, each named `block0`, `block1`, ..., tiled over the layers."""
    blocks = {
        f"block{i}": {"mixer": mixer(name), "ffn": {"kind": "mlp", "expansion": 2.0}, "norm": {"kind": "layernorm"}}
        for i, name in enumerate(mixers)
    }
    defaults = {
        "d_model": 16,
        "n_layers": max(2, len(blocks)),
        "vocab_size": 257,
        "blocks": blocks,
        "pattern": tuple(blocks),
        "norm": {"kind": "layernorm"},
    }
    return ModelConfig(**defaults | fields)


@pytest.fixture
def config_of() -> Callable[..., ModelConfig]:
    """`make_config`."""
    return make_config


@pytest.fixture
def model_of() -> Callable[..., LanguageModel]:
    """A built float64 model of `make_config`, in evaluation mode."""

    def build(*mixers: str, seed: int = 0, dtype: torch.dtype = torch.float64, **fields: Any) -> LanguageModel:
        return build_model(make_config(*mixers, **fields), dtype=dtype, seed=seed).eval()

    return build


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`each_mixer` is every kind that is built in, every variant above, and a hybrid of all kinds."""
    if "each_mixer" in metafunc.fixturenames:
        kinds = [(kind,) for kind in MIXERS.kinds()]
        hybrid = tuple(MIXERS.kinds())
        metafunc.parametrize(
            "each_mixer",
            [*kinds, *((name,) for name in VARIANTS), hybrid],
            ids=lambda names: "hybrid" if len(names) > 1 else names[0],
        )


@pytest.fixture
def plainly_compiled(monkeypatch):
    """The compiler's front end alone: inductor takes seconds for each graph."""
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compile_(f, **options | {"backend": "eager"}))
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
