"""Language models: configuration, builder, generation, accounting."""

from .accounting import LayerCost, ModelCost, account, flops_per_token
from .builder import build_meta, build_model, is_out_of_memory
from .compiling import CompileError, compile_blocks, compiler_failure
from .config import ModelConfig
from .decoding import Decoder
from .generate import Sampling, generate_text, generate_tokens, read, read_text, sample, stream_text
from .language_model import LanguageModel, ModelOutput, ModelState
from .loss import IGNORED, linear_cross_entropy
from .prompt_cache import Reading
from .prompts import prefill
from .subword import SubwordTokenizer, load_tokenizer, train_bpe
from .tokenizer import TOKENIZER_FILE, ByteTokenizer, TextDecoder, Tokenizer

__all__ = [
    "IGNORED",
    "TOKENIZER_FILE",
    "ByteTokenizer",
    "CompileError",
    "Decoder",
    "LanguageModel",
    "LayerCost",
    "ModelConfig",
    "ModelCost",
    "ModelOutput",
    "ModelState",
    "Reading",
    "Sampling",
    "SubwordTokenizer",
    "TextDecoder",
    "Tokenizer",
    "account",
    "build_meta",
    "build_model",
    "compile_blocks",
    "compiler_failure",
    "flops_per_token",
    "generate_text",
    "generate_tokens",
    "is_out_of_memory",
    "linear_cross_entropy",
    "load_tokenizer",
    "prefill",
    "read",
    "read_text",
    "sample",
    "stream_text",
    "train_bpe",
]
