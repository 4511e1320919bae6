"""Modeling code beside the weights of a Hugging Face folder, for `trust_remote_code`."""

from collections.abc import Mapping
from typing import Any

from ...registry import SeqmixError
from ...registry.providers import named_paths

CODE_FILE = "modeling_seqmix.py"
AUTO_MAP = {
    "AutoConfig": "modeling_seqmix.SeqmixConfig",
    "AutoModel": "modeling_seqmix.SeqmixModel",
    "AutoModelForCausalLM": "modeling_seqmix.SeqmixForCausalLM",
}
"""Classes of `CODE_FILE` that transformers' Auto classes load, as in config.json."""

CODE = '''"""seqmix models for `trust_remote_code=True`. The package seqmix, which must be installed, has their code."""

import seqmix.interop.hf
import seqmix.interop.hf.modeling


class SeqmixConfig(seqmix.interop.hf.SeqmixConfig):
    """Configuration of a seqmix model."""


class SeqmixModel(seqmix.interop.hf.modeling.SeqmixModel):
    """Model without the output projection."""

    config_class = SeqmixConfig


class SeqmixForCausalLM(seqmix.interop.hf.SeqmixForCausalLM):
    """Language model."""

    config_class = SeqmixConfig
'''


def code_of(blocks: Mapping[str, Any]) -> dict[str, str]:
    """Return the modeling code by file name, for a configuration with these blocks.

    Raises:
        SeqmixError: a mixer is given by a dotted path, whose module the folder would lack.
    """
    if plug_ins := named_paths(blocks):
        raise SeqmixError(
            f"--remote-code cannot carry the plug-in {plug_ins[0]}: leave out --remote-code, and import "
            f"{plug_ins[0].partition(':')[0]} before you load the model"
        )
    return {CODE_FILE: CODE}
