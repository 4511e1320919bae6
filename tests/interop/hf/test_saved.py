"""Models saved for Hugging Face load unchanged with the Auto classes: weights, configuration and tokenizer."""

import json
from importlib.util import find_spec

import pytest
import torch
from hf_models import PAD, ragged, tiny
from safetensors.torch import load_file, save_file

if find_spec("transformers") is None:
    pytest.skip("needs pip install transformers", allow_module_level=True)

import transformers

from seqmix import ModelConfig, Sampling, SeqmixError, generate_text, load_config, load_run, train
from seqmix.interop.hf import SeqmixConfig, SeqmixForCausalLM, SeqmixModel, hf_tokenizer
from seqmix.models import ByteTokenizer, SubwordTokenizer, train_bpe

TEXT = [("a", b"the cat sat on the mat, and the hat too: \xc3\xa9\xe2\x82\xac\n" * 20)]
MOE = "model.blocks.gla.ffn={kind: moe, expansion: 1.0, n_experts: 4, top_k: 2}"
# tied embeddings; blocks that share parameters; buffers that are saved and buffers that are not
PRESETS = {"retnet-tiny": (), "hybrid-tiny": ("model.tie_embeddings=true",), "zamba2-tiny": (), "gla-tiny": (MOE,)}


@pytest.mark.parametrize("preset", PRESETS)
@torch.no_grad()
def test_saved_model_loads_bitwise_equal(preset, tmp_path):
    wrapped = SeqmixForCausalLM.wrap(tiny(preset, *PRESETS[preset], dtype=torch.float32))
    wrapped.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is SeqmixForCausalLM
    assert not loaded.training
    assert loaded.model.config == wrapped.model.config == loaded.config.model_config
    tensors = loaded.state_dict()
    assert tensors.keys() == wrapped.state_dict().keys()
    for (name, tensor), (_, buffer) in zip(wrapped.state_dict().items(), wrapped.named_buffers(), strict=False):
        assert torch.equal(tensor, tensors[name]), name
        assert buffer.isfinite().all()
    _, tokens, mask = ragged()
    logits = wrapped(tokens, attention_mask=mask).logits
    assert torch.equal(loaded(tokens, attention_mask=mask).logits, logits)
    base = transformers.AutoModel.from_pretrained(tmp_path)
    assert type(base) is SeqmixModel
    assert torch.equal(base.model.head(base(tokens, attention_mask=mask).last_hidden_state), logits)
    # every tensor is in the file once
    assert len(load_file(tmp_path / "model.safetensors")) == len(list(wrapped.model.parameters())) + len(
        {id(buffer) for name, buffer in wrapped.model.named_buffers() if name in wrapped.model.state_dict()}
    )
    assert {id(p) for p in loaded.parameters()} == {id(p) for p in loaded.model.parameters()}
    assert len(list(loaded.parameters())) == len(list(wrapped.parameters()))


def test_unsaved_buffers_are_initialized_on_load(tmp_path):
    wrapped = SeqmixForCausalLM.wrap(tiny("gla-tiny", MOE, dtype=torch.float32))
    wrapped.save_pretrained(tmp_path)
    loaded = SeqmixForCausalLM.from_pretrained(tmp_path)
    buffers = dict(loaded.named_buffers())
    assert any(name not in loaded.state_dict() for name in buffers)
    for name, buffer in wrapped.named_buffers():
        assert torch.equal(buffers[name], buffer), name


def test_model_built_from_config_depends_on_the_torch_seed():
    config = SeqmixConfig(load_config("retnet-tiny", ["model.d_model=64"]).model)
    models = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        models.append(transformers.AutoModelForCausalLM.from_config(config))
    first, same, other = (model.model.blocks[3].mixer.in_proj.weight for model in models)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_dtype_argument_sets_the_precision_of_a_loaded_model(tmp_path):
    wrapped = SeqmixForCausalLM.wrap(tiny("retnet-tiny", dtype=torch.float32))
    wrapped.save_pretrained(tmp_path)
    loaded = SeqmixForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert loaded.generate(torch.tensor([[PAD, 1, 2]]), max_new_tokens=2).shape == (1, 5)


def test_hf_config_round_trips_ours_and_rejects_conflicts(tmp_path):
    config = SeqmixConfig(load_config("hybrid-tiny").model, bos_token_id=PAD)
    config.save_pretrained(tmp_path)
    loaded = transformers.AutoConfig.from_pretrained(tmp_path)
    assert (type(loaded), loaded.model_config, loaded.bos_token_id) == (SeqmixConfig, config.model_config, PAD)
    assert (loaded.vocab_size, loaded.hidden_size, loaded.num_hidden_layers) == (257, 128, 4)
    file = tmp_path / "config.json"
    saved = json.loads(file.read_text())
    assert ModelConfig.model_validate(saved["model"]) == config.model_config
    for change, sentence in [
        ({"vocab_size": 300}, "vocab_size must be 257, as in its section `model`, got 300"),
        ({"model": saved["model"] | {"d_modle": 1}}, "unknown key 'd_modle'"),
        ({"model": None}, "needs a model"),
    ]:
        file.write_text(json.dumps(saved | change))
        with pytest.raises(SeqmixError, match=sentence):
            transformers.AutoConfig.from_pretrained(tmp_path)


def test_missing_or_unknown_tensor_raises_by_name(tmp_path):
    SeqmixForCausalLM.wrap(tiny("retnet-tiny", dtype=torch.float32)).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    whole = load_file(file)
    name = "model.blocks.0.mixer.in_proj.weight"
    for tensors, sentence in [
        ({key: tensor for key, tensor in whole.items() if key != name}, f"missing tensors {name}"),
        ({**whole, "model.other": torch.zeros(1)}, "unexpected tensors model.other"),
    ]:
        save_file(tensors, file, metadata={"format": "pt"})
        with pytest.raises(SeqmixError, match=sentence):
            SeqmixForCausalLM.from_pretrained(tmp_path)


@pytest.fixture(params=["bytes", "subwords", "own begin"])
def tokenizer(request, tmp_path):
    if request.param == "bytes":
        return ByteTokenizer()
    trained = train_bpe(TEXT, 300, tmp_path / "tokenizer.json")
    if request.param == "subwords":
        return trained
    file = json.loads(trained.vocabulary)
    file["added_tokens"] = [{"id": 299, "content": "<s>", "special": True, "normalized": False, "lstrip": False}]
    file["added_tokens"][0] |= {"rstrip": False, "single_word": False}
    return SubwordTokenizer(json.dumps(file).encode(), "a vocabulary", "<s>")


TEXTS = ["the hat", "", " é€\x00\n\n", "🙂 zwölf", "a" * 300]


def test_hf_tokenizer_produces_our_tokens(tokenizer, tmp_path):
    hf_tokenizer(tokenizer).save_pretrained(tmp_path / "hf")
    SeqmixConfig(load_config("retnet-tiny").model).save_pretrained(tmp_path / "hf")
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert len(loaded) == tokenizer.vocab_size
    assert loaded.bos_token_id == loaded.pad_token_id == tokenizer.begin
    for text in TEXTS:
        assert loaded(text).input_ids == tokenizer.encode(text).tolist()
        decode = tokenizer.decoder()
        ours = "".join(map(decode, tokenizer.encode(text).tolist()[1:])) + decode(None)
        assert loaded.decode(loaded(text).input_ids, skip_special_tokens=True) == ours == text
    batch = loaded(TEXTS[:3], padding=True, return_tensors="pt")
    assert (batch.attention_mask[:, -1] == 1).all()
    assert batch.input_ids[0][batch.attention_mask[0] == 1].tolist() == tokenizer.encode(TEXTS[0]).tolist()


def test_vocabulary_with_gaps_keeps_its_token_ids():
    words = {"a": 0, "b": 7}
    file = {"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel", "vocab": words, "unk_token": "a"}}
    file |= dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"))
    assert hf_tokenizer(SubwordTokenizer(json.dumps(file).encode(), "a vocabulary"))("b").input_ids == [8, 7]


@pytest.mark.parametrize("unit", ["bytes", "subwords", "own begin"])
def test_exported_run_streams_the_same_text(config_of, seqmix, refused, tmp_path, unit):
    changes = []
    if unit != "bytes":
        train_bpe(TEXT, 280, tmp_path / "tokenizer.json")
        changes = [f"data.tokenizer={tmp_path / 'tokenizer.json'}", "model.vocab_size=290"]
        changes += ["data.begin_token=a"] if unit == "own begin" else []
    for _ in train(config_of("model.d_model=32", *changes), tmp_path / "run"):
        pass
    done = seqmix("export", "run", "--to", "hf", "out")
    assert (done.status, done.out.startswith("out has the model")) == (0, True), done.err
    model = transformers.AutoModelForCausalLM.from_pretrained("out")
    tokenizer = transformers.AutoTokenizer.from_pretrained("out")
    streamer = transformers.TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    prompt = tokenizer("the mixer ", return_tensors="pt")
    model.generate(**prompt, max_new_tokens=20, do_sample=False, streamer=streamer)
    sampling = Sampling(temperature=0)
    assert generate_text(load_run("run"), ["the mixer "], max_new_tokens=20, sampling=sampling) == ["".join(streamer)]
    assert refused("export", "run", "--to", "hf", "out", status=3).startswith("out exists and is not an empty folder")
    assert refused("export", "run", "--to", "hff", "new").endswith("got 'hff'; did you mean \"hf\"?")
    assert refused("export", "run", "--to", "hf").startswith("export --to hf needs an output: --out DIR")
