"""`seqmix export --to onnx` and `seqmix generate FILE.onnx` give the same text as the run and reject invalid files."""

import hashlib
import json
import random
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from abuse.tally import Case, fault_of
from json_mutations import mutated_json
from nightly import NIGHTLY
from onnx_models import NEEDED, check_segments, exported, graph_of, model_of
from small_runs import refusal

from seqmix import LanguageModel, load_config, load_run

if not all(map(find_spec, NEEDED)):
    pytest.skip("needs pip install 'seqmix[onnx]'", allow_module_level=True)

import onnx
from onnx import TensorProto, helper
from onnx.external_data_helper import set_external_data

import seqmix.interop.onnx.export
from seqmix.interop.onnx import export_onnx
from seqmix.interop.onnx.export import require_exportable
from seqmix.interop.onnx.generate import stream_text
from seqmix.interop.onnx.metadata import seal
from seqmix.interop.onnx.session import OnnxModel, require_equal
from seqmix.models import SubwordTokenizer, train_bpe

TINY = [
    "data={paths: [text.txt], split: tail, sequence_length: 16}",
    "training={steps: 30, batch_size: 4, warmup_steps: 1, evaluation_batches: 1, final_evaluation_batches: 1}",
    "model.d_model=32",
]
RETENTION = ["model.pattern=[ret]", "model.n_layers=1"]
HYBRID = [
    "model.blocks.delta={mixer: {kind: gated_delta_net, n_heads: 2}, ffn: null, norm: {kind: rmsnorm}}",
    "model.pattern=[ret, attn, delta]",
    "model.n_layers=3",
]


@pytest.mark.parametrize("layers", [RETENTION, pytest.param(HYBRID, marks=pytest.mark.slow)], ids=len)
def test_onnx_file_computes_and_generates_like_its_run(layers, seqmix):
    assert seqmix("train", "hybrid-tiny", *TINY, *layers, "--out", "run").status == 0
    done = seqmix("export", "run", "--to", "onnx", "run.onnx")
    assert done.status == 0, done.err
    assert "run.onnx has the model" in done.out
    check_segments(OnnxModel.load(Path("run.onnx")), load_run("run"))
    prompts = ("--prompt", "the text", "--prompt", "a small", "--max-new-tokens", 20)
    for options in (("--temperature", 0), ("--temperature", 0.9, "--top-k", 20, "--top-p", 0.9, "--seed", 3)):
        of_run = seqmix("generate", "run", *prompts, *options)
        of_file = seqmix("generate", "run.onnx", *prompts, *options)
        assert of_file.status == 0, of_file.err
        assert of_file.out == of_run.out
    stop = ("--prompt", "the text", "--temperature", 0, "--stop", "v")
    assert seqmix("generate", "run.onnx", *stop).out == seqmix("generate", "run", *stop).out
    assert "run.onnx already exists" in seqmix("export", "run", "--to", "onnx", "run.onnx").err
    for options, name in (
        (["--compile"], "--compile"),
        (["--speculate", "ngram"], "--speculate"),
        (["--device", "cuda"], "--device"),
        (["--weights", "int8"], "--weights"),
    ):
        refused = seqmix("generate", "run.onnx", "--prompt", "a", *options)
        assert refused.status == 2
        assert f"{name} cannot be used with an ONNX file" in refused.err


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["int8", pytest.param("int4", marks=NIGHTLY)])
def test_quantized_files_are_smaller_and_report_their_loss(weights, seqmix, tmp_path):
    config = [*TINY[:2], "model.d_model=64", "model.n_layers=2", "model.pattern=[ret, attn]"]
    assert seqmix("train", "hybrid-tiny", *config, "--out", "run").status == 0
    assert seqmix("export", "run", "--to", "onnx", "float.onnx").status == 0
    done = seqmix("export", "run", "--to", "onnx", "small.onnx", "--weights", weights)
    assert done.status == 0, done.err
    assert f"with {weights} weights" in done.out
    assert "nats/token as trained" in done.out
    assert (tmp_path / "small.onnx").stat().st_size < 0.6 * (tmp_path / "float.onnx").stat().st_size
    assert seqmix("generate", "small.onnx", "--prompt", "the ", "--max-new-tokens", 3).status == 0


@pytest.mark.slow
def test_onnx_file_contains_its_subword_tokenizer(tmp_path):
    bpe = train_bpe([("a", b"the cat sat on the mat, and the hat too\n" * 20)], 300, tmp_path / "tokenizer.json")
    assert bpe.vocabulary is not None
    for begin in (None, "a"):
        tokenizer = SubwordTokenizer(bpe.vocabulary, "a vocabulary", begin)
        model = model_of("retention", vocab_size=tokenizer.vocab_size + 3)
        model.tokenizer = tokenizer
        loaded = exported(model).tokenizer
        assert (loaded.begin, loaded.text_tokens) == (tokenizer.begin, tokenizer.text_tokens)
        assert loaded.encode("the hat").tolist() == tokenizer.encode("the hat").tolist()


def test_invalid_export_requests_raise_with_the_reason(tmp_path, monkeypatch):
    place = tmp_path / "x.onnx"
    assert "did you mean" in refusal(lambda: export_onnx(tmp_path, place, opset="contrb"))
    assert "int8" in refusal(lambda: export_onnx(tmp_path, place, weights="int9"))
    assert ".onnx" in refusal(lambda: export_onnx(tmp_path, tmp_path / "x.on"))
    assert "not a run directory" in refusal(lambda: export_onnx(tmp_path / "nothing", place))
    with torch.device("meta"):
        large = LanguageModel(load_config("retnet-1.3b").model)
    assert "2 GiB" in refusal(lambda: require_exportable(large))
    whole = SimpleNamespace(config=SimpleNamespace(readout="last"))
    assert "readout = last" in refusal(lambda: require_exportable(whole))
    monkeypatch.setattr(seqmix.interop.onnx.export, "find_spec", lambda name: None if name == "onnxscript" else name)
    assert "onnxscript: pip install 'seqmix[onnx]'" in refusal(lambda: export_onnx(tmp_path, place))
    assert list(tmp_path.iterdir()) == []


def test_foreign_onnx_files_are_rejected(tmp_path):
    file = tmp_path / "x.onnx"
    assert "cannot be read" in refusal(lambda: OnnxModel.load(file))
    file.write_bytes(b"not a graph")
    assert "not an ONNX file" in refusal(lambda: OnnxModel.load(file))
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "g", [value], [result])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, file)
    assert "not written by `seqmix export" in refusal(lambda: OnnxModel.load(file))
    helper.set_model_props(model, {"seqmix": json.dumps({"format": 99})})
    onnx.save(model, file)
    assert "format 99" in refusal(lambda: OnnxModel.load(file))


@pytest.mark.slow
def test_graph_with_different_logits_is_rejected():
    model = model_of("retention")
    graph = exported(model)
    require_equal(graph, model)
    with torch.no_grad():
        model.head.weight[3] += 0.1
    assert "computes other logits" in refusal(lambda: require_equal(graph, model))


@pytest.fixture(scope="module")
def content():
    """An exported file with a subword tokenizer."""
    model = model_of("attention", vocab_size=300)
    model.tokenizer = train_bpe([("a", b"the cat sat on the mat" * 20)], 270, Path("unwritten"), write=False)
    return graph_of(model).SerializeToString()


def generate(file):
    return list(stream_text(OnnxModel.load(file), ["the cat"], max_new_tokens=3))


def test_file_with_a_flipped_bit_is_rejected(content, tmp_path):
    file = tmp_path / "a.onnx"
    whole = seal(content)
    file.write_bytes(whole)
    assert generate(file)
    drawn = random.Random(0)
    for place in drawn.sample(range(len(content)), 20):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << drawn.randrange(8)]) + whole[place + 1 :])
        assert "is damaged: its checksum does not match" in refusal(lambda: OnnxModel.load(file))


def test_file_without_a_checksum_is_accepted(content, tmp_path):
    (tmp_path / "a.onnx").write_bytes(content)
    sealed = tmp_path / "b.onnx"
    sealed.write_bytes(seal(content))
    assert generate(tmp_path / "a.onnx") == generate(sealed)
    properties = {entry.key: entry.value for entry in onnx.load(sealed).metadata_props}
    assert properties["seqmix.sha256"] == hashlib.sha256(content).hexdigest()


def test_any_metadata_is_used_or_rejected_with_a_clear_error(content, tmp_path):
    graph = onnx.load_from_string(content)
    (entry,) = graph.metadata_props
    metadata = json.loads(entry.value) | {"config": {}, "tokenizer": "bytes", "begin_token": 256}

    def use(changed: bytes) -> None:
        entry.value = changed.decode(errors="replace")
        (tmp_path / "a.onnx").write_bytes(graph.SerializeToString())
        generate(tmp_path / "a.onnx")

    cases = [Case(name, partial(use, changed), refused=False) for name, changed in mutated_json(metadata, 0, 120)]
    assert [(case.name, fault) for case in cases if (fault := fault_of(case))] == []


def test_graph_cannot_read_other_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("secret.bin").write_bytes(bytes(16))
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [4])
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])
    weight = helper.make_tensor("w", TensorProto.FLOAT, [4], bytes(16), raw=True)
    node = helper.make_node("Concat", ["x", "w"], ["y"], axis=0)
    model = helper.make_model(helper.make_graph([node], "g", [value], [result], [weight]), ir_version=10)
    set_external_data(weight := model.graph.initializer[0], "secret.bin")
    weight.ClearField("raw_data")
    Path("x.onnx").write_bytes(model.SerializeToString())
    assert "External data path" in refusal(lambda: OnnxModel.load(Path("x.onnx")))
