"""Hybrids of two built-in mixers train, resume bitwise and decode; the nightly profile covers all pairs."""

import json
import shutil

import pytest
import torch
from hypothesis import settings
from safetensors.torch import load_file
from small_runs import require_same_run, run_of
from torch.testing import assert_close

from seqmix import MIXERS, Paradigm, Sampling, load_config, load_run
from seqmix.models import generate_tokens, prefill
from seqmix.training.checkpoint.files import checkpoints

BUILT_IN = sorted(MIXERS.built_in())
NIGHTLY = settings().max_examples > 100
# every mixer with two others
APART = range(len(BUILT_IN)) if NIGHTLY else (7,)
PAIRS = sorted(
    {tuple(sorted((kind, BUILT_IN[(i + n) % len(BUILT_IN)]))) for i, kind in enumerate(BUILT_IN) for n in APART}
)

SMALL = (
    *("model.d_model=24", "model.n_layers=2", "data.sequence_length=16", "training.steps=2", "training.batch_size=2"),
    *("training.optimizer=adamw", "training.learning_rate=3.0e-2", "training.warmup_steps=1"),
    *("training.evaluate_every=2", "training.log_every=1"),
    *("training.final_evaluation_batches=1", "training.checkpoint_every=1"),
)


def block(kind):
    mixer = MIXERS.resolve(kind).example().model_dump(mode="json", exclude_defaults=True) | {"kind": kind}
    return {"mixer": mixer, "ffn": {"kind": "mlp", "expansion": 2.0}, "norm": {"kind": "rmsnorm"}}


@pytest.mark.slow
@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
def test_hybrid_of_two_mixers_trains_resumes_and_decodes(pair, text, tmp_path):
    blocks = json.dumps({f"block{i}": block(kind) for i, kind in enumerate(pair)})
    overrides = (*SMALL, f"data.paths=[{text}]", f"model.blocks={blocks}", "model.pattern=[block0, block1]")
    config = load_config("retnet-tiny", overrides)
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    run_of(config, whole)
    first, second = (load_file(folder / "model.safetensors") for folder in checkpoints(whole))
    assert any(not torch.equal(first[name], second[name]) for name in first)
    shutil.copytree(whole, resumed, ignore=shutil.ignore_patterns(checkpoints(whole)[-1].name))
    started, *_ = run_of(config, resumed, resume=True)
    assert started.step == 1
    require_same_run(resumed, whole)

    model, steps = load_run(resumed).double(), 8
    prompts = [torch.arange(97, 97 + length) % 7 * 31 for length in (5, 12)]
    generated = generate_tokens(model, prompts, max_new_tokens=steps, sampling=Sampling(temperature=0))
    with torch.no_grad():
        for prompt, new in zip(prompts, torch.stack(list(generated), 1), strict=True):
            logits, state = prefill(model, [prompt])
            decoded = [logits[0]]
            for token in new[:-1]:
                output = model(token.view(1, 1), state, paradigm=Paradigm.RECURRENT, return_state=True)
                state = output.state
                decoded.append(output.logits[0, -1])
            read = model(torch.cat((prompt, new))[None]).logits[0, len(prompt) - 1 : -1]
            assert torch.equal(read.argmax(-1), new)
            assert_close(torch.stack(decoded), read, rtol=1e-9, atol=1e-9)
