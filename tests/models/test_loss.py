"""The loss over a large vocabulary, computed in parts, matches its definition."""

import pytest
import torch
import torch.nn.functional as F
from recorded_operations import Watched
from torch.testing import assert_close

from seqmix import SeqmixError
from seqmix.models import IGNORED, linear_cross_entropy
from seqmix.models import loss as module

TOKENS, WIDTH, VOCAB, AT_ONCE = 50, 8, 300, 7 * 300


@pytest.fixture(params=["torch's", "our own"])
def in_parts(request, monkeypatch):
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", {"cpu": AT_ONCE})
    if request.param == "our own":
        monkeypatch.delattr(torch.nn, "LinearCrossEntropyOptions", raising=False)
    elif not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        pytest.skip("this torch has no chunked linear_cross_entropy")


def data(dtype=torch.float64):
    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(VOCAB, WIDTH, dtype=torch.float64).to(dtype).requires_grad_()
    targets = torch.randint(0, VOCAB, (TOKENS,))
    targets[::6] = IGNORED
    return hidden, weight, targets


def from_the_definition(hidden, weight, targets, softcap=None):
    """In float64, by no function of torch's that computes a loss."""
    asked = targets != IGNORED
    logits = (hidden.double() @ weight.double().T)[asked]
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    return (logits.exp().sum(1).log() - logits.gather(1, targets[asked][:, None])[:, 0]).sum()


def with_gradients(loss, hidden, weight):
    return (loss, *torch.autograd.grad(loss, (hidden, weight)))


@pytest.mark.usefixtures("in_parts")
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_loss_computed_in_parts_matches_definition_with_gradients(softcap):
    hidden, weight, targets = data()
    for actual, expected in zip(
        with_gradients(linear_cross_entropy(hidden, weight, targets, softcap=softcap) / 3, hidden, weight),
        with_gradients(from_the_definition(hidden, weight, targets, softcap) / 3, hidden, weight),
        strict=True,
    ):
        assert_close(actual, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.usefixtures("in_parts")
def test_full_logits_are_never_in_memory():
    hidden, weight, targets = data(torch.float32)

    def largest_of(loss):
        with Watched() as watched:
            loss(hidden, weight, targets).backward()
        return watched.largest

    assert largest_of(linear_cross_entropy) <= max(AT_ONCE, weight.numel())
    whole = largest_of(lambda h, w, t: F.cross_entropy(h @ w.T, t, ignore_index=IGNORED, reduction="sum"))
    assert whole == TOKENS * VOCAB, "the watch sees logits where there are some"


@pytest.mark.usefixtures("in_parts")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_products_give_float32_loss_and_gradients(dtype):
    """In bfloat16, a sum of thousands of nats would keep only three digits."""
    hidden, weight, targets = data(torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        loss = linear_cross_entropy(hidden, weight, targets)
    assert loss.dtype == torch.float32
    # logits of the size of 10 are rounded to eight (eleven) bits, and the errors average out
    assert_close(loss.double(), from_the_definition(hidden, weight, targets), rtol=2e-3, atol=0)
    gradients = torch.autograd.grad(loss, (hidden, weight))
    expected = torch.autograd.grad(from_the_definition(hidden, weight, targets), (hidden, weight))
    for actual, exact in zip(gradients, expected, strict=True):
        assert actual.dtype == torch.float32
        assert (actual - exact).norm() < 1e-2 * exact.norm()


@pytest.mark.usefixtures("in_parts")
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_weight_gradients_of_parts_accumulate_in_float32(weights):
    hidden, weight, targets = data(torch.float32)
    weight = weight.detach().to(weights).requires_grad_()
    parts = list(zip(hidden.split(7), targets.split(7), strict=True))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (actual,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets), weight)
        wide = weight.detach().float().requires_grad_()
        gradients = [torch.autograd.grad(linear_cross_entropy(part, wide, target), wide)[0] for part, target in parts]
    assert_close(actual, sum(gradients).to(weights), rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("in_parts")
def test_token_losses_sum_to_total_loss():
    hidden, weight, targets = data()
    losses = linear_cross_entropy(hidden, weight, targets, "none")
    assert losses.shape == targets.shape
    assert not losses[targets == IGNORED].any()
    actual = with_gradients(losses.sum(), hidden, weight)
    assert_close(actual, with_gradients(linear_cross_entropy(hidden, weight, targets), hidden, weight))
    nothing = linear_cross_entropy(hidden, weight, targets.fill_(IGNORED))
    assert not any(part.any() for part in with_gradients(nothing, hidden, weight))


@pytest.fixture
def asked():
    x, targets = torch.randint(0, 257, (2, 2, 13), generator=torch.Generator().manual_seed(0))
    targets[0, 3] = IGNORED
    return x, targets


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_model_loss_and_predictions_match_its_logits(model_of, asked, reduction):
    model, (x, targets) = model_of("retention", "attention"), asked
    boundaries = torch.tensor([0, 5, 13])
    for rows, options in ((slice(None), {}), (slice(0, 1), {"cu_seqlens": boundaries, "paradigm": "parallel"})):
        logits = model(x[rows], **options).logits.flatten(0, 1)
        expected = F.cross_entropy(logits, targets[rows].flatten(), ignore_index=IGNORED, reduction=reduction)
        output = model(x[rows], targets=targets[rows], reduction=reduction, **options)
        assert_close(output.loss, expected.view(output.loss.shape))
        assert output.logits is None
        assert output.loss.shape == (x[rows].shape if reduction == "none" else ())
    assert output.predictions is None
    predicted = model(x, targets=targets, reduction=reduction, return_predictions=True)
    assert_close(predicted.predictions, model(x).logits.argmax(-1)[targets != IGNORED])
    assert_close(predicted.loss, model(x, targets=targets, reduction=reduction).loss)


def test_one_call_returns_loss_logits_and_state(model_of, asked):
    model, (x, targets) = model_of("retention", "attention"), asked
    whole = model(x, targets=targets, reduction="none").loss
    first = model(x[:, :5], targets=targets[:, :5], reduction="none", return_state=True, select=torch.tensor([2, 7]))
    second = model(x[:, 5:], first.state, targets=targets[:, 5:], reduction="none")
    assert_close(torch.cat((first.loss, second.loss), 1), whole)
    assert_close(first.logits, model(x).logits[[0, 1], [2, 2]])


def test_invalid_reduction_or_target_shape_raises(model_of, asked):
    model, (x, targets) = model_of("retention"), asked
    with pytest.raises(SeqmixError, match=r"'sum'.*'none'.*'mean'.*'avg'"):
        model(x, targets=targets, reduction="avg")
    with pytest.raises(SeqmixError, match=r"targets must have the shape of the tokens, .*, got "):
        model(x, targets=targets[:, 1:])
    with pytest.raises(SeqmixError, match="'mean'"):
        linear_cross_entropy(*data(), "mean")


def test_mean_loss_without_targets_is_zero(model_of, asked):
    model, (x, targets) = model_of("retention"), asked
    output = model(x, targets=targets.fill_(IGNORED), return_predictions=True)
    assert output.loss == 0
    assert len(output.predictions) == 0
