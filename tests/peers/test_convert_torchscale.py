"""Converted RetNet models of torchscale (0.3.0). Its rotations and norms compute in float32 unless asked for more."""

import json
from importlib.util import find_spec

import pytest
import torch
from peers.converted import VOCAB, compare, computing_in, moved
from peers.torchscale_modules import torchscale_classes
from safetensors.torch import save_file

pytestmark = pytest.mark.skipif(find_spec("torchscale") is None, reason="needs pip install --no-deps torchscale")

ARGS = {
    "decoder_embed_dim": 24,
    "decoder_value_embed_dim": 36,
    "decoder_retention_heads": 2,
    "decoder_ffn_embed_dim": 40,
    "decoder_layers": 2,
    "vocab_size": VOCAB,
}
CASES = {
    "torchscale-retnet": ({}, 1e-5),  # their third normaliser cancels under the head norm but for its eps
    "torchscale-retnet, no eps": ({"activation_fn": "swish", "layernorm_eps": 0.0}, 1e-9),
}


def measured(case, dtype, folder):
    """What `compare` finds, and their arguments."""
    torchscale, (fields, _) = torchscale_classes(), CASES[case]
    args = torchscale.Config(**ARGS | fields)

    def decoder():
        return torchscale.Decoder(args, torch.nn.Embedding(VOCAB, args.decoder_embed_dim))

    theirs = moved(decoder())
    (folder / "theirs").mkdir()
    save_file(theirs.state_dict(), folder / "theirs/model.safetensors")
    (folder / "theirs/args.json").write_text(json.dumps(vars(args)))

    @torch.no_grad()
    def reference(tokens):
        with computing_in(dtype):
            wide = decoder().to(dtype).eval()  # with its own angles and decays
            wide.load_state_dict(
                {name: x for name, x in theirs.state_dict().items() if "rel_pos" not in name}, strict=False
            )
            return wide(tokens)[0]

    return compare(folder / "theirs", folder, "torchscale-retnet", reference, dtype), vars(args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_logits_match_in_every_paradigm_and_export_restores_the_weights(case, dtype, tmp_path):
    (result, args), (_, bound) = measured(case, dtype, tmp_path), CASES[case]
    assert max(result.worst.values()) < (1e-4 if dtype == torch.float32 else bound)
    assert result.changed == []
    back = json.loads((tmp_path / "back/config.json").read_text())
    assert back == {name: args[name] for name in back}
