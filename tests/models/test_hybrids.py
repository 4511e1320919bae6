"""Any two built-in mixers make a model that trains, resumes to the bit, and decodes."""

import json
import shutil
from itertools import combinations_with_replacement

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from seqmix import MIXERS, Paradigm, Sampling, load_config, load_run, train
from seqmix.models.generate import generate_tokens
from seqmix.training.checkpoint import checkpoints

BUILT_IN = [kind for kind in MIXERS.kinds() if MIXERS.origin(kind).startswith("seqmix.")]
SMALL = (
    "model.d_model=24",
    "model.n_layers=2",
    "data.sequence_length=16",
    "training.steps=2",
    "training.batch_size=2",
    "training.learning_rate=3.0e-2",
    "training.warmup_steps=1",
    "training.evaluate_every=2",
    "training.final_evaluation_batches=1",
    "training.checkpoint_every=1",
    "training.log_every=1",
)


def block(kind):
    mixer = MIXERS.resolve(kind).example().model_dump(mode="json", exclude_defaults=True) | {"kind": kind}
    return {"mixer": mixer, "ffn": {"kind": "mlp", "expansion": 2.0}, "norm": {"kind": "rmsnorm"}}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("a mixer reads its state, and writes it again; " * 20)
    return file


def tensors(folder):
    """What a checkpoint holds, to the bit."""
    found = {f"{file.name}: {name}": x for file in folder.glob("*.safetensors") for name, x in load_file(file).items()}
    return {name: x.numpy().tobytes() for name, x in found.items()}


def losses(run):
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line.get("loss", line.get("validation_loss")) for line in lines]


@torch.no_grad()
def continued(model, prompt, steps, *, again):
    """The greedy continuation and its logits: token by token, or from the whole text for every token."""
    output = model(prompt[None], return_state=True)
    text, seen = prompt[None], []
    for _ in range(steps):
        seen.append(output.logits[0, -1])
        token = output.logits[:, -1:].argmax(-1)
        text = torch.cat((text, token), dim=1)
        output = model(text) if again else model(token, output.state, paradigm=Paradigm.RECURRENT, return_state=True)
    return text[0, len(prompt) :], torch.stack(seen)


@pytest.mark.parametrize("pair", list(combinations_with_replacement(BUILT_IN, 2)), ids="+".join)
def test_two_mixers_train_resume_and_decode(pair, text, tmp_path):
    blocks = json.dumps({f"block{i}": block(kind) for i, kind in enumerate(pair)})
    overrides = (*SMALL, f"data.paths=[{text}]", f"model.blocks={blocks}", "model.pattern=[block0, block1]")
    config = load_config("retnet-tiny", overrides)
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    list(train(config, whole))
    first, second = checkpoints(whole)
    expected = tensors(second)
    assert tensors(first) != expected
    shutil.copytree(whole, resumed, ignore=shutil.ignore_patterns(second.name))
    started, *_ = train(config, resumed, resume=True)
    assert started.step == 1
    assert losses(resumed) == losses(whole)
    made = tensors(resumed / second.relative_to(whole))
    assert [name for name in expected if made.get(name) != expected[name]] == []

    model = load_run(resumed).double()
    prompts = [torch.arange(97, 97 + length) % 7 * 31 for length in (5, 12)]
    generated = generate_tokens(model, prompts, max_new_tokens=8, sampling=Sampling(temperature=0))
    for prompt, tokens in zip(prompts, torch.stack(list(generated), 1), strict=True):
        decoded, read = (continued(model, prompt, 8, again=again) for again in (False, True))
        assert tokens.tolist() == decoded[0].tolist() == read[0].tolist()
        assert_close(decoded[1], read[1], rtol=1e-9, atol=1e-9)
