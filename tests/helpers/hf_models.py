"""Tiny models of ours and ragged prompts, for what is around Hugging Face."""

import torch

from seqmix import build_model, load_config

VOCAB, PAD = 257, 256
LENGTHS = (5, 9, 1)


def tiny(preset, *changes, seed=1, dtype=torch.float64):
    """The model of a preset, narrow, in evaluation mode."""
    config = load_config(preset, ["model.d_model=64", *changes])
    model = build_model(config.model, seed=seed, dtype=dtype).eval()
    model.tokenizer = config.data.tokenizer_of()
    return model


def ragged(lengths=LENGTHS, seed=0):
    """Prompts of these lengths, as one batch with padding on the left, and its mask."""
    generator = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(256, (length,), generator=generator) for length in lengths]
    longest = max(lengths)
    rows = [torch.cat((torch.full((longest - len(prompt),), PAD), prompt)) for prompt in prompts]
    return prompts, torch.stack(rows), torch.stack([(row != PAD).long() for row in rows])
