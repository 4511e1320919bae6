"""The configuration of Hugging Face: our model's, and what other libraries ask of one."""

import json
from collections.abc import Mapping
from typing import Any, ClassVar

from transformers import PretrainedConfig

from ..models import ModelConfig
from ..registry import SeqmixError, validated

NAME = "the model of config.json"


class SeqmixConfig(PretrainedConfig):
    """A model of seqmix as transformers sees it; config.json holds the `model` of a YAML file.

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
        config = model if isinstance(model, ModelConfig) else validated(ModelConfig, model, NAME)
        self.model: dict[str, Any] = json.loads(config.model_dump_json())
        sizes = {
            "vocab_size": config.vocab_size,
            "hidden_size": config.d_model,
            "num_hidden_layers": config.n_layers,
            "tie_word_embeddings": config.tie_embeddings,
        }
        for name, value in sizes.items():
            if kwargs.pop(name, value) != value:
                raise SeqmixError(f"config.json has another {name} than its model, {value}: change the model's")
        use_cache = kwargs.pop("use_cache", True)
        super().__init__(**kwargs)
        for name, value in {**sizes, "use_cache": use_cache}.items():
            setattr(self, name, value)

    @property
    def model_config(self) -> ModelConfig:
        """Our configuration."""
        return validated(ModelConfig, self.model, NAME)
