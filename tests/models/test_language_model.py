"""The whole language model: its layers, their paradigms, and optional computations."""

import pytest
import torch
import torch.nn.functional as F
from recorded_operations import Watched
from torch.testing import assert_close

from seqmix import ContractError, ModelConfig, Paradigm, SeqmixError, Traits, build_model
from seqmix.mixers.base.state import to_dict
from seqmix.models import compile_blocks
from seqmix.models.language_model import MATMULS
from seqmix.models.prefill import prefill

HYBRID = ("retention", "attention", "linear_attention")
LENGTH = 13
PARALLEL_ONLY = Traits(paradigms=frozenset({Paradigm.PARALLEL}), state="growing", packing=False, shift_invariant=True)


def tokens(length=LENGTH, batch_size=1, seed=1):
    return torch.randint(0, 257, (batch_size, length), generator=torch.Generator().manual_seed(seed))


def exactly(actual, expected):
    assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def same_state(actual, expected):
    assert to_dict(actual).keys() == to_dict(expected).keys()
    for name, leaf in to_dict(actual).items():
        exactly(leaf, to_dict(expected)[name])


def test_logits_match_layer_by_layer_computation(model_of):
    model, x = model_of(*HYBRID, n_layers=5), tokens()
    assert [block.mixer.kind for block in model.blocks] == [*HYBRID, *HYBRID[:2]]
    hidden = F.embedding(x, model.embedding.weight)
    for block in model.blocks:
        hidden = block(hidden).y
    exactly(model(x).logits, model.norm(hidden) @ model.head.weight.T)


def test_embeddings_are_scaled_and_normalised_and_logits_softcapped(model_of):
    model, x = model_of("retention"), tokens(batch_size=2)
    fields = {"embedding_scale": 3.0, "logit_softcap": 0.7, "embedding_norm": {"kind": "layernorm", "bias": True}}
    changed = build_model(ModelConfig.model_validate(model.config.model_dump() | fields)).double()
    with torch.no_grad():
        for parameter in changed.embedding_norm.parameters():
            parameter.uniform_()
    changed.load_state_dict(model.state_dict(), strict=False)
    norm = changed.embedding_norm
    hidden = F.layer_norm(3 * F.embedding(x, model.embedding.weight), norm.weight.shape, norm.weight, norm.bias, 1e-5)
    for block in model.blocks:
        hidden = block(hidden).y
    logits = 0.7 * ((model.norm(hidden) @ model.head.weight.T) / 0.7).tanh()
    exactly(changed(x).logits, logits)
    targets = torch.roll(x, -1, 1)
    found = changed(x, targets=targets, return_predictions=True)
    exactly(found.loss, F.cross_entropy(logits.flatten(0, 1), targets.flatten()))
    assert found.predictions.equal(logits.argmax(-1).flatten())
    selected = torch.tensor([1, 5])
    exactly(changed(x, targets=targets, select=selected).logits, logits.flatten(0, 1)[selected])


def test_each_layer_runs_its_own_paradigm(model_of):
    model, seen = model_of("retention", "attention"), []
    for block in model.blocks:
        block.mixer.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["call"].paradigm), with_kwargs=True
        )
    mixed = model(tokens(), paradigm=(Paradigm.RECURRENT, Paradigm.CHUNKWISE)).logits
    exactly(mixed, model(tokens(), paradigm=Paradigm.PARALLEL).logits)
    exactly(mixed, model(tokens()).logits)
    assert seen == [Paradigm.RECURRENT, Paradigm.CHUNKWISE, Paradigm.PARALLEL, Paradigm.PARALLEL, None, None]


def test_first_declared_paradigm_is_preferred(model_of):
    model = model_of("retention", "attention", n_layers=3)
    model.blocks[1].mixer.traits = PARALLEL_ONLY
    assert model.prefer(Paradigm.CHUNKWISE, Paradigm.RECURRENT) == (
        Paradigm.CHUNKWISE,
        Paradigm.PARALLEL,  # the only one it has, although nobody asked for it
        Paradigm.CHUNKWISE,
    )


def test_stateless_paradigm_is_used_only_for_initial_prompt(model_of, monkeypatch):
    """Compiling such a model raises."""
    model, x = model_of("unusual_mixers:NoStateConfig"), tokens()
    wanted = model(x).logits
    used = []
    forward = type(model).forward
    monkeypatch.setattr(type(model), "forward", lambda *a, **k: used.append(k["paradigm"]) or forward(*a, **k))
    logits, state = prefill(model, [x[0, :4]])
    logits, _ = prefill(model, [x[0, 4:]], state=state)
    assert used == [(Paradigm.PARALLEL,) * 2, (Paradigm.RECURRENT,) * 2]
    exactly(logits[0], wanted[0, -1])
    with pytest.raises(ContractError, match=r"nostate cannot be compiled"):
        compile_blocks(model)


def test_state_or_paradigms_with_wrong_layer_count_raise(model_of):
    model = model_of("retention", "attention")
    with pytest.raises(ContractError, match=r"paradigm .*2 layers, got 3"):
        model(tokens(), paradigm=(Paradigm.PARALLEL,) * 3)
    with pytest.raises(ContractError, match=r"state .*2 layers, got 1"):
        model(tokens(), model.init_state(1)[:1])


@pytest.mark.parametrize("token", [-1, 257])
def test_token_outside_vocabulary_raises(model_of, token):
    with pytest.raises(SeqmixError, match=rf"from 0 to 256, got {min(token, 3)} to {max(token, 3)}"):
        model_of("retention")(torch.tensor([[3, token]]))


def test_only_selected_logits_are_computed(model_of):
    model, x = model_of("retention"), tokens(batch_size=2)
    rows = torch.tensor([LENGTH + 3, 0, 5])
    widths = []
    model.head.register_forward_pre_hook(lambda module, args: widths.append(args[0].shape))
    exactly(model(x, select=rows).logits, model(x).logits.flatten(0, 1)[rows])
    assert widths[0] == (3, model.config.d_model)
    same_state(model(x, return_state=True, select=rows).state, model(x, return_state=True).state)


def test_dropout_applies_to_embedding_only_in_training(model_of):
    model, plain, x = model_of("retention", dropout=0.5), model_of("retention"), tokens(64, batch_size=8)
    assert torch.equal(model(x).logits, plain(x).logits)
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model.train()(x)
    assert seen[0].count_nonzero().item() / seen[0].numel() == pytest.approx(0.5, abs=0.05)
    left = seen[0] != 0
    exactly(seen[0][left], 2 * model.embedding(x)[left])


def of_a_step(model, *, seed=0):
    """The loss, the gradients, and how many numbers forward saves for backward, without parameters."""
    saved = {}
    parameters = {p.data_ptr() for p in model.parameters()}

    def save(x):
        if x.data_ptr() not in parameters:
            saved[x.data_ptr()] = x.numel()
        return x

    torch.manual_seed(seed)
    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(save, lambda x: x):
        loss = model(tokens(64, 2), targets=tokens(64, 2, seed=2), reduction="sum").loss
    size = sum(saved.values())
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}, size


def test_checkpointing_matmuls_skips_recomputing_linear_layers(model_of):
    model = model_of("retention", "attention", n_layers=2).train()
    loss, gradients, _ = of_a_step(model)
    products = []
    for model.activation_checkpointing in (True, "matmuls"):
        watched = Watched()
        with watched:
            again, same, _ = of_a_step(model)
        products.append(sum(func in MATMULS for func, _ in watched.seen))
        exactly(again, loss)
        exactly(same, gradients)
    linear = sum(isinstance(module, torch.nn.Linear) for block in model.blocks for module in block.modules())
    # neither recomputes the last of a block, whose result backward does not ask for
    assert products[0] - products[1] == linear - len(model.blocks)


@pytest.mark.parametrize(("kinds", "compiled"), [(HYBRID, False), (("retention",), True)])
def test_checkpointing_saves_only_block_inputs_and_keeps_gradients(model_of, kinds, compiled):
    model = model_of(*kinds, n_layers=6, dropout=0.1).train()
    for block in model.blocks:
        block.dropout.p = 0.1
    loss, gradients, saved = of_a_step(model)
    torch._dynamo.reset()
    if compiled:
        for block in model.blocks:
            block.compile(fullgraph=True, backend="aot_eager")
    model.activation_checkpointing = True
    again, same, fewer = of_a_step(model)
    exactly(again, loss)
    for name, gradient in gradients.items():
        exactly(same[name], gradient)
    inputs = (model.config.n_layers + 4) * 2 * 64 * model.config.d_model  # and what embedding, norm and loss save
    logits = 2 * 64 * model.config.vocab_size
    assert fewer <= inputs + logits + 1000
    assert saved > 3 * fewer
    torch._dynamo.reset()
