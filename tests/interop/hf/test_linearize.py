"""A tiny random Llama and a tiny Qwen3 go through all stages of linearization."""

import pytest

transformers = pytest.importorskip("transformers")

import torch  # noqa: E402

from seqmix import load_run  # noqa: E402
from seqmix.lab.linearize import Linearization, Plan  # noqa: E402

SIZES = {
    "vocab_size": 257,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
STAGE = {"tokens": 64, "learning_rate": 1e-3}


@pytest.mark.parametrize("name", ["Llama", "Qwen3"])
def test_transformers_model_goes_through_all_linearization_stages(name, tmp_path, text, monkeypatch):
    monkeypatch.setattr("seqmix.lab.linearize.measure.DECODED", 3)
    torch.manual_seed(0)
    more = {"head_dim": 8} if name == "Qwen3" else {}
    theirs = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**SIZES, **more)).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    plan = Plan.model_validate(
        {
            "swap": [{"layers": [1], "mixer": {"kind": "gated_delta_net", "n_heads": 4, "expand_v": 1.0}}],
            "stages": dict.fromkeys(("mixer_output", "hidden", "logits", "text"), STAGE),
            "calibration_tokens": 32,
            "data": {"kind": "text", "paths": [str(text)], "sequence_length": 16},
            "training": {"batch_size": 2, "final_evaluation_batches": 2},
        }
    )
    work = Linearization(tmp_path / "theirs", plan, tmp_path / "out", device="cpu", tokenizer="bytes")
    taken = work.prepare().taken[0]
    assert {"q copied", "k 2 x 8 to 4 x 8", "v 2 x 8 to 4 x 8", "o copied"} <= {*taken.done}
    for stage in plan.staged:
        assert [event.loss for event in work.stage(stage) if hasattr(event, "loss")]
    found = work.finish()
    tokens = torch.randint(256, (1, 20))
    with torch.no_grad():
        logits = theirs(tokens).logits
        torch.testing.assert_close(work.teacher(tokens).logits, logits, atol=1e-4, rtol=1e-4)
        assert load_run(tmp_path / "out")(tokens).logits.shape == logits.shape
    assert found.student.divergence < 0.1
