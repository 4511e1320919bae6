"""Models of transformers (5.24), converted: equal logits in every paradigm, and back bit for bit."""

import json
from importlib.util import find_spec

import pytest
import torch
from peers.converted import VOCAB, compare, computing_in, moved

from seqmix.convert.fields import HARMLESS

# not importorskip: it would also skip where transformers is installed and its import fails
if find_spec("transformers") is None:
    pytest.skip("needs pip install transformers", allow_module_level=True)

import transformers
from transformers import AutoModelForCausalLM

COMMON = {"hidden_size": 24, "vocab_size": VOCAB, "num_hidden_layers": 2, "initializer_range": 0.3}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 40}
MODELS = {
    "llama": ("Llama", HEADS),
    "llama, tied": ("Llama", HEADS | {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "mistral": ("Mistral", HEADS | {"sliding_window": 7}),
    "mamba2": ("Mamba2", {"num_heads": 4, "head_dim": 12, "state_size": 6, "n_groups": 2, "chunk_size": 8}),
    "mamba2, limited": (
        "Mamba2",
        {"num_heads": 4, "head_dim": 12, "state_size": 6, "n_groups": 1, "time_step_limit": (0.1, 0.8)},
    ),
    "mamba": ("Mamba", {"state_size": 5, "time_step_rank": 2, "intermediate_size": 48}),
    "qwen3": ("Qwen3", HEADS | {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}),
}


def model_of(case, dtype):
    """Their model, moved; of float64 all that they compute in float32 whatever the dtype is float64 too."""
    kind, fields = MODELS[case]
    config = getattr(transformers, f"{kind}Config")(**COMMON | fields)
    torch.manual_seed(0)
    with computing_in(dtype):
        return moved(AutoModelForCausalLM.from_config(config, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", MODELS)
def test_logits_are_equal_in_every_paradigm_and_the_way_back_is_exact(case, dtype, tmp_path):
    theirs = model_of(case, dtype)
    theirs.save_pretrained(tmp_path / "theirs")

    @torch.no_grad()
    def reference(tokens):
        with computing_in(dtype):
            return theirs(tokens, use_cache=False).logits

    result = compare(tmp_path / "theirs", tmp_path, case.partition(",")[0], reference, dtype)
    print(case, dtype, result)
    assert max(result.worst.values()) < (1e-4 if dtype == torch.float32 else 1e-9)
    assert result.changed == []
    again = type(theirs.config).from_pretrained(tmp_path / "back").to_dict()
    assert function_of(again) == function_of(theirs.config.to_dict())


def function_of(config):
    """What matters of a configuration, as JSON has it."""
    config = {k: v for k, v in config.items() if k not in HARMLESS.split()}
    return json.loads(json.dumps({k: v for k, v in config.items() if k not in STARTS}))


STARTS = {"dtype", "initializer_range", "architectures", "chunk_size"}
