"""Hugging Face transformers: seqmix models as transformers models, and seqmix mixers in transformers decoders.

Importing this package registers `AutoConfig`, `AutoModel` and `AutoModelForCausalLM` for the model type "seqmix".
"""

try:
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
except ModuleNotFoundError as error:
    message = "seqmix.interop.hf needs the package transformers: pip install transformers"
    raise ModuleNotFoundError(message, name=error.name) from error

from .cache import SeqmixCache
from .configuration import SeqmixConfig
from .export import export_hf
from .modeling import SeqmixForCausalLM, SeqmixModel
from .replace import replace_mixers
from .tokenizer import hf_tokenizer

__all__ = ["SeqmixCache", "SeqmixConfig", "SeqmixForCausalLM", "export_hf", "hf_tokenizer", "replace_mixers"]

AutoConfig.register(SeqmixConfig.model_type, SeqmixConfig, exist_ok=True)
AutoModel.register(SeqmixConfig, SeqmixModel, exist_ok=True)
AutoModelForCausalLM.register(SeqmixConfig, SeqmixForCausalLM, exist_ok=True)
