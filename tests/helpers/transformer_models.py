"""Language models of transformers beside ours with the same weights."""

from itertools import pairwise

import torch
from torch.testing import assert_close

from seqmix.interop.convert import ARCHITECTURES
from seqmix.interop.convert.architecture import rule
from seqmix.interop.convert.layout import to_ours
from seqmix.models import build_model

LENGTH, VOCAB = 30, 50


def agree(actual, expected):
    """Their rotations, recurrences and norms compute in float32 whatever the dtype."""
    assert_close(actual, expected, rtol=1e-5, atol=1e-5, check_dtype=False)


def converted(name, theirs, **fields):
    """Our model of theirs, in float64; `fields` change how its mixers compute."""
    architecture = ARCHITECTURES[name]
    config = architecture.config(theirs.config.to_dict(), name)
    blocks = {
        label: block.model_copy(update={"mixer": block.mixer.model_copy(update=fields)})
        for label, block in config.blocks.items()
    }
    model = build_model(config.model_copy(update={"blocks": blocks})).double()
    model.load_state_dict(
        to_ours(architecture.rules(model), theirs.state_dict(), name, architecture.ignored_tensors, {})
    )
    return model


def mixer_weights(layout, mixer, theirs, at):
    """Parameters of our mixer, of tensors by name in their layer, as a declaration's layout of `at` has them."""
    shapes = {f"mixer.{name}": tuple(x.shape) for name, x in mixer.state_dict().items()}
    given = {f"{at}.{name}": x for name, x in theirs.items()}
    return {name.removeprefix("mixer."): rule(name, layout[name], shape)(given) for name, shape in shapes.items()}


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
