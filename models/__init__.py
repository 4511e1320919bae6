"""Language models: configuration, builder, generation, scoring and cost accounting."""

from .accounting import LayerCost, ModelCost, account, flops_per_token
from .builder import build_meta, build_model, is_out_of_memory
from .compiling import CompileError, compile_blocks, compiler_failure
from .config import ModelConfig
from .decoding import Decoder
from .drafting import Draft, ModelDraft, NgramDraft
from .generate import cache_text, generate_text, generate_tokens, stream_text
from .language_model import Checkpointing, LanguageModel, ModelOutput, ModelState
from .loss import IGNORED, linear_cross_entropy
from .prefill import prefill
from .prompt_cache import PromptCache, cache_tokens
from .sampling import Sampling, sample
from .speculation import Speculation
from .subword import SubwordTokenizer, load_tokenizer, train_bpe
from .tokenizer import TOKENIZER_FILE, ByteTokenizer, Tokenizer

__all__ = [
    "IGNORED",
    "TOKENIZER_FILE",
    "ByteTokenizer",
    "Checkpointing",
    "CompileError",
    "Decoder",
    "Draft",
    "LanguageModel",
    "LayerCost",
    "ModelConfig",
    "ModelCost",
    "ModelDraft",
    "ModelOutput",
    "ModelState",
    "NgramDraft",
    "PromptCache",
    "Sampling",
    "Speculation",
    "SubwordTokenizer",
    "Tokenizer",
    "account",
    "build_meta",
    "build_model",
    "cache_text",
    "cache_tokens",
    "compile_blocks",
    "compiler_failure",
    "flops_per_token",
    "generate_text",
    "generate_tokens",
    "is_out_of_memory",
    "linear_cross_entropy",
    "load_tokenizer",
    "prefill",
    "sample",
    "stream_text",
    "train_bpe",
]
