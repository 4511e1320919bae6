"""The files beside the weights of a Hugging Face folder: the model card, and modeling code for `trust_remote_code`."""

from collections.abc import Mapping
from typing import Any

from ..registry import SeqmixError
from ..registry.providers import named_paths
from ..training.checkpoint.provenance import seqmix_version

CARD_FILE = "README.md"
CODE_FILE = "modeling_seqmix.py"
AUTO_MAP = {
    "AutoConfig": "modeling_seqmix.SeqmixConfig",
    "AutoModel": "modeling_seqmix.SeqmixModel",
    "AutoModelForCausalLM": "modeling_seqmix.SeqmixForCausalLM",
}
"""Classes of `CODE_FILE` that transformers' Auto classes load, as in config.json."""

CODE = '''"""seqmix models for `trust_remote_code=True`. The package seqmix, which must be installed, has their code."""

import seqmix.hf
import seqmix.hf.modeling


class SeqmixConfig(seqmix.hf.SeqmixConfig):
    """Configuration of a seqmix model."""


class SeqmixModel(seqmix.hf.modeling.SeqmixModel):
    """Model without the output projection."""

    config_class = SeqmixConfig


class SeqmixForCausalLM(seqmix.hf.SeqmixForCausalLM):
    """Language model."""

    config_class = SeqmixConfig
'''

CARD = """---
library_name: seqmix
pipeline_tag: text-generation
---

# {name}

A language model of [seqmix](https://github.com/seqmix/seqmix) {version} with these mixers: {mixers}.
The package `seqmix` must be installed.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

{load}
```

{hint}
"""
IMPORT = """import seqmix.hf  # registers the model type

model = AutoModelForCausalLM.from_pretrained("{name}")"""
IMPORT_HINT = """If transformers does not recognize the model type `seqmix`, `import seqmix.hf` is missing."""
TRUST = """model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)"""
TRUST_HINT = (
    """`trust_remote_code=True` runs `modeling_seqmix.py`, which imports seqmix. `import seqmix.hf` does the same."""
)


def card_of(name: str, blocks: Mapping[str, Any], *, remote_code: bool) -> dict[str, str]:
    """Return the contents of the model card, and of the modeling code if `remote_code`, by file name.

    Args:
        name: the name of the model.
        blocks: fields of the blocks of its configuration.
        remote_code: True to write modeling code.

    Raises:
        SeqmixError: with `remote_code`, a mixer is given by a dotted path, whose module the folder would lack.
    """
    plug_ins = named_paths(blocks)
    if plug_ins and remote_code:
        raise SeqmixError(
            f"--remote-code cannot carry the plug-in {plug_ins[0]}: leave out --remote-code, and import "
            f"{plug_ins[0].partition(':')[0]} before you load the model"
        )
    load, hint = (TRUST, TRUST_HINT) if remote_code else (IMPORT, IMPORT_HINT)
    if plug_ins:
        modules = ", ".join(dict.fromkeys(f"`{path.partition(':')[0]}`" for path in plug_ins))
        hint += f"\nThe model needs {modules}: import it first, or set `trust_remote_code=True`."
    kinds = dict.fromkeys(str(block["mixer"]["kind"]) for block in blocks.values())
    card = CARD.format(
        name=name, version=seqmix_version(), mixers=", ".join(kinds), load=load.format(name=name), hint=hint
    )
    return {CARD_FILE: card} | ({CODE_FILE: CODE} if remote_code else {})
