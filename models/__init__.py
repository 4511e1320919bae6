"""Language models: configuration, builder, generation, accounting."""

from .accounting import LayerCost, ModelCost, account
from .builder import build_meta, build_model
from .config import ModelConfig
from .generate import Sampling, generate_text, generate_tokens, prefill, sample, stream_text
from .language_model import LanguageModel, ModelOutput, ModelState
from .tokenizer import ByteTokenizer

__all__ = [
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
    "prefill",
    "sample",
    "stream_text",
]
