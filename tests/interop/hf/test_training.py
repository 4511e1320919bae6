"""Training with Hugging Face: the loss, gradient checkpointing, packed documents, and `Trainer`."""

from importlib.util import find_spec

import pytest
import torch
from hf_models import PAD, ragged, tiny
from torch.testing import assert_close

if None in map(find_spec, ("transformers", "accelerate")):
    pytest.skip("needs pip install transformers accelerate", allow_module_level=True)

import transformers

from seqmix.interop.hf import SeqmixForCausalLM, hf_tokenizer


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("preset", ["retnet-tiny", "hybrid-tiny", "mamba-tiny"])
def test_loss_of_padded_rows_matches_unpadded_rows(preset):
    wrapped, (prompts, tokens, mask) = SeqmixForCausalLM.wrap(tiny(preset).train()), ragged()
    loss = wrapped(tokens, attention_mask=mask, labels=tokens).loss
    sums = [
        wrapped.model(prompt[None, :-1], targets=prompt[None, 1:], reduction="sum").loss
        for prompt in prompts
        if len(prompt) > 1
    ]
    alone = torch.stack(sums).sum() / sum(len(prompt) - 1 for prompt in prompts)
    assert_close(loss, alone, check_dtype=False)  # theirs is computed in float32
    expected = gradients(wrapped, alone)
    found = [gradients(wrapped, wrapped(tokens, attention_mask=mask, labels=tokens).loss)]
    wrapped.gradient_checkpointing_enable()
    assert wrapped.model.activation_checkpointing
    found.append(gradients(wrapped, wrapped(tokens, attention_mask=mask, labels=tokens).loss))
    wrapped.gradient_checkpointing_disable()
    assert not wrapped.model.activation_checkpointing
    for each in found:
        for parameter, gradient in each.items():
            assert_close(gradient, expected[parameter], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("named", ["position_ids", "cu_seq_lens_q"])
def test_packed_documents_do_not_affect_each_other(named):
    wrapped, (prompts, _, _) = SeqmixForCausalLM.wrap(tiny("hybrid-tiny").train()), ragged()
    flatten = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=named == "cu_seq_lens_q")
    batch = flatten([{"input_ids": prompt.tolist(), "labels": prompt.tolist()} for prompt in prompts])
    del batch["position_ids" if named == "cu_seq_lens_q" else "labels"]
    found = wrapped(**batch).logits[0].split([len(prompt) for prompt in prompts])
    for logits, prompt in zip(found, prompts, strict=True):
        assert_close(logits, wrapped.model(prompt[None]).logits[0])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer_takes_two_steps_and_resumes_from_its_checkpoint(tmp_path, checkpointing):
    texts = ["the cat sat", "on the mat, and the hat too", "a", "the mat"] * 2

    def trainer(steps, **options):
        wrapped = SeqmixForCausalLM.wrap(tiny("retnet-tiny", "model.n_layers=2", dtype=torch.float32))
        tokenizer = hf_tokenizer(wrapped.model.tokenizer)
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path / f"of {steps}"),
            max_steps=steps,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            gradient_checkpointing=checkpointing,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            save_steps=2,
            logging_steps=1,
            eval_strategy="steps",
            eval_steps=2,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            **options,
        )
        return transformers.Trainer(
            model=wrapped,
            args=arguments,
            train_dataset=[tokenizer(text) for text in texts],
            eval_dataset=[tokenizer(text) for text in texts[:4]],
            data_collator=transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False),
            processing_class=tokenizer,
        )

    two = trainer(2)
    before = {name: parameter.clone() for name, parameter in two.model.named_parameters()}
    two.train()
    losses = [entry["loss"] for entry in two.state.log_history if "loss" in entry]
    assert len(losses) == 2
    assert losses[1] < losses[0]
    assert any("eval_loss" in entry for entry in two.state.log_history)
    assert all(not torch.equal(parameter, before[name]) for name, parameter in two.model.named_parameters())
    folder = tmp_path / "of 2" / "checkpoint-2"
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
    for (name, parameter), other in zip(loaded.named_parameters(), two.model.parameters(), strict=True):
        assert torch.equal(parameter, other), name
    assert transformers.AutoTokenizer.from_pretrained(folder)("a").input_ids == [PAD, ord("a")]
    if not checkpointing:
        four, again = trainer(4), trainer(4)
        four.train()
        again.train(resume_from_checkpoint=str(folder))
        for parameter, other in zip(four.model.parameters(), again.model.parameters(), strict=True):
            assert torch.equal(parameter, other)
