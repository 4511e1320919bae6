"""Language models of transformers beside ours with the same weights."""

from itertools import pairwise

import torch
from torch.testing import assert_close

LENGTH, VOCAB = 30, 50


def agree(actual, expected):
    """Their rotations, recurrences and norms compute in float32 whatever the dtype."""
    assert_close(actual, expected, rtol=1e-5, atol=1e-5, check_dtype=False)


def state_dict(embedding, norm, head, layers):
    """Ours, of their parameters: for each layer the parts of a block, by name."""
    weights = {"embedding.weight": embedding.weight, "norm.weight": norm.weight, "head.weight": head.weight}
    for i, layer in enumerate(layers):
        weights |= {f"blocks.{i}.{name}": x for name, x in layer.items()}
    return weights


def compare_logits(ours, theirs, cache, paradigm):
    """All tokens at once, packed, and in pieces with a cache, down to single tokens."""
    tokens = torch.randint(VOCAB, (2, LENGTH))
    logits = theirs(tokens, use_cache=False).logits
    agree(ours(tokens, paradigm=paradigm).logits, logits)
    packed = ours(tokens.reshape(1, -1), paradigm=paradigm, cu_seqlens=torch.tensor([0, LENGTH, 2 * LENGTH]))
    agree(packed.logits, logits.reshape(1, -1, VOCAB))
    state = None
    for start, stop in pairwise([0, 12, *range(20, LENGTH + 1)]):
        output = ours(tokens[:, start:stop], state, paradigm=paradigm, return_state=True)
        state = output.state
        agree(output.logits, logits[:, start:stop])
        agree(output.logits, theirs(tokens[:, start:stop], **cache).logits)
