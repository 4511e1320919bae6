"""Language models: configuration, builder, generation, accounting."""

from .accounting import LayerCost, ModelCost, account
from .builder import build_meta, build_model
from .config import ModelConfig
from .generate import Sampling, generate_text, generate_tokens, prefill, sample, stream_text
from .language_model import LanguageModel, ModelOutput, ModelState
from .loss import IGNORED, linear_cross_entropy
from .tokenizer import ByteTokenizer

__all__ = [
    "IGNORED",
    "ByteTokenizer",
    "LanguageModel",
    "LayerCost",
    "ModelConfig",
    "ModelCost",
    "ModelOutput",
    "ModelState",
    "Sampling",
    "account",
    "build_meta",
    "build_model",
    "generate_text",
    "generate_tokens",
    "linear_cross_entropy",
    "prefill",
    "sample",
    "stream_text",
]
