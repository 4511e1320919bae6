"""Hugging Face configuration class for seqmix models, with the fields that other libraries expect."""

import json
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from transformers import PretrainedConfig

from ...models import ModelConfig
from ...registry import SeqmixError, require_trusted, unimported, validated
from ...registry.errors import shown

SOURCE = "the model of config.json"
"""Name of a `SeqmixConfig`'s model in error messages."""

FIELD_NAMES = {
    "vocab_size": "vocab_size",
    "hidden_size": "d_model",
    "num_hidden_layers": "n_layers",
    "tie_word_embeddings": "tie_embeddings",
}
"""Names that transformers uses for fields of `ModelConfig`, each with the name of the field."""


class SeqmixConfig(PretrainedConfig):
    """Configuration of a seqmix model in transformers; config.json has the section `model` of a YAML file.

    Loading it imports no modules. Fields that name code which is not imported yet (`kind: my_module:MyConfig`) are kept
    unchanged, and are validated when a model is built.

    Args:
        model: a `ModelConfig`, or its fields as in config.json.
        kwargs: fields of every transformers configuration, such as `use_cache` or `bos_token_id`.

    Raises:
        SeqmixError: the model is missing or not valid, or a field in `kwargs`, such as `hidden_size`, differs from that
            of the model.
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
        repeated = {name: kwargs.pop(name) for name in FIELD_NAMES if name in kwargs}
        use_cache = kwargs.pop("use_cache", True)
        self.model: dict[str, Any]
        if isinstance(model, Mapping) and unimported(model):
            self.model = dict(model)
            fields = dict(model)
        else:
            config = model if isinstance(model, ModelConfig) else validated(ModelConfig, model, SOURCE)
            self.model = json.loads(config.model_dump_json())
            fields = config.model_dump(include=set(FIELD_NAMES.values()))
        fields_of_model = {name: fields.get(field) for name, field in FIELD_NAMES.items()}
        for name, value in repeated.items():
            if value != fields_of_model[name]:
                raise SeqmixError(
                    f"config.json: {name} must be {shown(fields_of_model[name])}, as in its section `model`, got "
                    f"{shown(value)}: remove {name}"
                )
        super().__init__(**kwargs)
        for name, value in {**fields_of_model, "use_cache": use_cache}.items():
            setattr(self, name, value)

    @property
    def model_config(self) -> ModelConfig:
        """Validated configuration of the model.

        Raises:
            SeqmixError: the configuration is not valid, or names code that is not imported yet.
        """
        return self.read()

    def read(self, *, trust: bool = False) -> ModelConfig:
        """Return the validated configuration of the model.

        Args:
            trust: True to import the modules that the configuration names.

        Raises:
            SeqmixError: the configuration is not valid; or it names code that is not imported yet, without `trust`.
        """
        if not trust:
            require_trusted(self.model, SOURCE, "import its modules first, or set trust_remote_code=True")
        return validated(ModelConfig, self.model, SOURCE)


def _require_types(fields: Mapping[str, Any]) -> None:
    """Check the types of the configuration's dtype and special tokens, which transformers uses unchecked.

    Raises:
        SeqmixError: a dtype does not exist in torch, or the ID of a special token is not an integer.
    """
    for name, value in fields.items():
        if name in ("dtype", "torch_dtype"):
            is_valid = value is None or isinstance(
                getattr(torch, value, None) if isinstance(value, str) else value, torch.dtype
            )
            expected = "the name of a torch dtype, such as bfloat16"
        elif name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            numbers = value if isinstance(value, list) and name == "eos_token_id" else [value]
            is_valid = all(number is None or type(number) is int for number in numbers)
            expected = "a token ID, or null"
        else:
            continue
        if not is_valid:
            raise SeqmixError(f"config.json: {name}: expected {expected}, got {shown(value)}")
