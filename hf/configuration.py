"""The configuration of Hugging Face: our model's, and what other libraries ask of one."""

import json
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from transformers import PretrainedConfig

from ..models import ModelConfig
from ..registry import SeqmixError, require_trusted, unimported, validated
from ..registry.errors import shown

NAME = "the model of config.json"


SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "d_model",
    "num_hidden_layers": "n_layers",
    "tie_word_embeddings": "tie_embeddings",
}
"""Sizes by the name that transformers asks for, and that of our configuration."""


class SeqmixConfig(PretrainedConfig):
    """A model of seqmix as transformers sees it; config.json holds the `model` of a YAML file.

    Nothing is imported for it: fields that name code which is not imported yet (`kind: my_module:MyConfig`) are kept as
    they are, and are validated once a model is built of them.

    Args:
        model: our configuration, or its fields as config.json has them.
        kwargs: fields of every configuration of transformers, such as `use_cache` or `bos_token_id`.

    Raises:
        SeqmixError: the model is missing or not valid, or a size differs from it.
    """

    model_type = "seqmix"
    has_no_defaults_at_init = True
    keys_to_ignore_at_inference: ClassVar = ["past_key_values", "cache"]

    def __init__(self, model: ModelConfig | Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        if model is None:
            raise SeqmixError("SeqmixConfig needs a model: SeqmixConfig(load_config('retnet-tiny').model)")
        if (kind := kwargs.pop("model_type", self.model_type)) != self.model_type:
            raise SeqmixError(f"config.json: model_type: expected {self.model_type!r}, got {shown(kind)}")
        _require_types(kwargs)
        given = {name: kwargs.pop(name) for name in SIZES if name in kwargs}
        use_cache = kwargs.pop("use_cache", True)
        self.model: dict[str, Any]
        if isinstance(model, Mapping) and unimported(model):
            self.model = dict(model)
            fields = dict(model)
        else:
            config = model if isinstance(model, ModelConfig) else validated(ModelConfig, model, NAME)
            self.model = json.loads(config.model_dump_json())
            fields = config.model_dump(include=set(SIZES.values()))
        sizes = {name: fields.get(ours) for name, ours in SIZES.items()}
        for name, value in given.items():
            if value != sizes[name]:
                raise SeqmixError(f"config.json has another {name} than its model, {sizes[name]}: change the model's")
        super().__init__(**kwargs)
        for name, value in {**sizes, "use_cache": use_cache}.items():
            setattr(self, name, value)

    @property
    def model_config(self) -> ModelConfig:
        """Our configuration.

        Raises:
            SeqmixError: it names code that is not imported yet, or is not valid.
        """
        return self.read()

    def read(self, *, trust: bool = False) -> ModelConfig:
        """Our configuration; with `trust` the modules that it names are imported.

        Raises:
            SeqmixError: it is not valid, or names code that is not imported yet, without `trust`.
        """
        if not trust:
            require_trusted(self.model, NAME, "import its modules before, or give trust_remote_code=True")
        return validated(ModelConfig, self.model, NAME)


def _require_types(fields: Mapping[str, Any]) -> None:
    """Refuse values of other types in fields that transformers computes with.

    Raises:
        SeqmixError: a dtype that torch does not have, or a token that is not a number.
    """
    for name, value in fields.items():
        if name in ("dtype", "torch_dtype"):
            known = value is None or isinstance(
                getattr(torch, value, None) if isinstance(value, str) else value, torch.dtype
            )
            expected = "the name of a dtype of torch, such as bfloat16"
        elif name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            numbers = value if isinstance(value, list) and name == "eos_token_id" else [value]
            known = all(number is None or type(number) is int for number in numbers)
            expected = "the number of a token, or null"
        else:
            continue
        if not known:
            raise SeqmixError(f"config.json: {name}: expected {expected}, got {shown(value)}")
