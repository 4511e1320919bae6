"""Recurrent states in fewer bits: rounding, the loss it adds to a model, and predicted errors."""

import json
import math
import runpy
from pathlib import Path

import pytest
import torch
from small_runs import run_of

from seqmix import MIXERS, SeqmixError, build_model, load_config
from seqmix.data import Batch
from seqmix.lab.precision.measure import FormatResult, Precision, rank_correlation, state_precision
from seqmix.lab.precision.report import conclusion, rows_of
from seqmix.lab.precision.state_format import FORMATS, ROUNDINGS, StateFormat

INTEGERS = ["int8", "int4"]


def numbers(*shape: int) -> torch.Tensor:
    """Numbers of very different sizes."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator) * torch.randn(shape, generator=generator).mul(3).exp()


# ---- rounding


@pytest.mark.parametrize("scales", ["channel", "head"])
@pytest.mark.parametrize("name", INTEGERS)
def test_integer_rounding_error_is_at_most_half_a_step(name, scales):
    x = numbers(3, 2, 5, 9)
    dims = -1 if scales == "channel" else (-2, -1)
    step = x.abs().amax(dims, keepdim=True) / (127 if name == "int8" else 7)
    error = (StateFormat(name, scales=scales).round(x) - x).abs()
    assert (error <= 0.501 * step).all()
    assert error.max() > 0


@pytest.mark.parametrize("scales", ["channel", "head"])
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("name", FORMATS)
def test_rounding_is_idempotent(name, rounding, scales):
    each = StateFormat(name, rounding, scales)
    for x in (
        numbers(64, 2, 3, 9),
        numbers(64, 5, 6, 2),
        numbers(64, 9),
        numbers(64),
        numbers(8, 4, 4) * 1e-30,
        numbers(8, 33).double(),
    ):
        once = each.round(x)
        again = once
        for _ in range(5):
            again = each.round(again)
        assert torch.equal(again, once)
        assert once.dtype == x.dtype


@pytest.mark.parametrize("name", ["bfloat16", "float16", *INTEGERS])
def test_stochastic_rounding_is_unbiased(name):
    x = torch.tensor([1.0, 0.3, -0.7123, 1e-3, 3e-6, 0.0, -1e-7])
    draws = StateFormat(name, "stochastic").round(x.expand(20_000, -1), torch.Generator().manual_seed(0)).double()
    error = (draws.mean(0) - x.double()).abs()
    largest_is_off_by = 2**-15 if name in INTEGERS else 0.0
    assert (error <= 5 * draws.std(0) / math.sqrt(20_000) + largest_is_off_by + 1e-9).all()
    assert (draws.std(0)[1:3] > 0).all()


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_floating_point_rounding_matches_torch(name):
    x = numbers(1000)
    assert torch.equal(StateFormat(name).round(x), x.to(getattr(torch, name)).float())
    neighbours = StateFormat(name, "stochastic").round(x)
    assert torch.equal(neighbours, neighbours.to(getattr(torch, name)).float())


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("name", FORMATS)
def test_zeros_infinities_and_nan_survive(name, rounding):
    each = StateFormat(name, rounding)
    assert not each.round(torch.zeros(2, 3, 4)).any()
    assert each.round(torch.zeros(2, 0, 4)).shape == (2, 0, 4)
    x = torch.tensor([[-math.inf, 2.0, math.nan, -1.0], [math.inf] * 4])
    for wide in (x, x.double()):
        rounded = each.round(wide)
        torch.testing.assert_close(rounded, wide, rtol=0.3, atol=0.0, equal_nan=True)
        assert rounded[0, 1].item() == pytest.approx(2.0, rel=2**-15)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (("int9",), "number format 'int9'; did you mean \"int8\""),
        (("int8", "up"), "nearest, stochastic, compensated"),
        (("int8", "nearest", "row"), "channel, head"),
    ],
)
def test_unknown_format_options_raise(fields, message):
    with pytest.raises(SeqmixError, match=message):
        StateFormat(*fields)


def test_stored_size_includes_scales_and_compensation():
    shape = torch.Size((1, 2, 16, 32))
    assert StateFormat("bfloat16").stored_bits(shape) == 1024 * 16
    assert StateFormat("int8").stored_bits(shape) == 1024 * 8 + 32 * 32
    assert StateFormat("int8", scales="head").stored_bits(shape) == 1024 * 8 + 2 * 32
    assert StateFormat("int8").stored_bits(torch.Size((1, 24, 16, 2))) == 768 * 8 + 24 * 32  # complex numbers as pairs
    assert StateFormat("int8", "compensated").stored_bits(shape) == 2 * (1024 * 8 + 32 * 32)
    assert StateFormat("int8", "compensated").stored_bits(shape, written_once=True) == 1024 * 8 + 32 * 32


# ---- models


def model_of(mixer: str, *changes: str):
    block = f"{{mixer: {mixer}, ffn: {{kind: mlp, expansion: 1.0, activation: gelu}}, norm: {{kind: layernorm}}}}"
    config = load_config("retnet-tiny", ["model.d_model=24", "model.n_layers=2", f"model.blocks.ret={block}", *changes])
    return build_model(config.model).eval()


def text(length: int, rows: int = 2) -> Batch:
    tokens = torch.randint(256, (rows, length + 1), generator=torch.Generator().manual_seed(1))
    return Batch(tokens[:, :-1], tokens[:, 1:])


def measure(mixer: str, length: int, *formats: StateFormat, changes=(), batch=None, **options) -> Precision:
    return state_precision(model_of(mixer, *changes), batch or text(length), formats, [length], **options)


def retention(**fields: object) -> str:
    fields = {"kind": "retention", "n_heads": 2, "rotation": "none", "row_norm": "false"} | fields
    return f"{{{', '.join(f'{name}: {value}' for name, value in fields.items())}}}"


@pytest.mark.parametrize("kind", sorted(MIXERS.built_in()))
def test_precision_of_every_mixer_can_be_measured(kind):
    fields = ", ".join(f"{name}: {value}" for name, value in MIXERS.built_in()[kind].example_fields().items())
    model = model_of(f"{{kind: {kind}, {fields}}}")
    batch = text(32)
    formats = [StateFormat(name) for name in ("float32", "bfloat16", "int8")]
    formats += [StateFormat("int8", "stochastic"), StateFormat("int8", "compensated")]
    result = state_precision(model, batch, formats, [16, 32])
    assert len(result.results) == 10
    exact = result.exact[1]
    assert exact.loss == pytest.approx(model(batch.inputs, targets=batch.targets).loss.item(), abs=1e-4)
    wide, half, byte, *_ = last = result.results[5:]
    assert abs(wide.lost) < 1e-4
    assert wide.state_error < 1e-5
    assert wide.state_error < half.state_error < byte.state_error < 1.0
    assert exact.state_bytes >= wide.state_bytes > half.state_bytes > byte.state_bytes
    for each in last:
        assert math.isfinite(each.lost)
        assert 0 < each.predicted <= 1.001 * each.bound or each is wide
        assert 0.5 <= each.agreement <= 1
    layers = {(each.layer, each.mixer) for each in result.tensors}
    assert layers == {(0, kind), (1, kind)}
    assert all(len(each.errors) == len(each.predicted) == len(each.bound) for each in result.tensors)


def test_float32_state_format_loses_nothing():
    (result,) = measure(retention(), 32, StateFormat("float32")).results
    assert abs(result.lost) < 1e-6
    assert result.agreement == 1.0
    assert result.state_error < 1e-6


def test_bfloat16_sums_without_decay_stall_where_theory_predicts():
    # the same token over and over: numbers of the state are n w, and n w + w rounds to n w from n = 256 to 512 on
    tokens = torch.full((1, 769), 7)
    formats = StateFormat("bfloat16"), StateFormat("bfloat16", "stochastic"), StateFormat("bfloat16", "compensated")
    result = measure(
        retention(decay="none"), 768, *formats,
        batch=Batch(tokens[:, :-1], tokens[:, 1:]), changes=["model.n_layers=1"],
    )  # fmt: skip
    nearest, stochastic, compensated = result.results
    assert 1 - 512 / 768 <= nearest.state_error <= 1 - 256 / 768
    assert nearest.predicted < nearest.state_error  # errors are not independent here
    assert stochastic.state_error < 0.06
    assert compensated.state_error < 0.005


@pytest.mark.parametrize("gamma", [0.8, 0.95])
def test_predicted_error_follows_the_decay(gamma):
    result = measure(retention(decay="constant", gamma=gamma), 128, StateFormat("int8"), changes=["model.n_layers=1"])
    (each,) = result.results
    assert each.bound / each.predicted == pytest.approx(math.sqrt((1 + gamma) / (1 - gamma)), rel=0.15)
    assert each.state_error == pytest.approx(each.predicted, rel=0.25)


def test_rounding_less_often_reduces_the_error():
    errors = [
        measure(retention(decay="constant", gamma=0.98), 64, StateFormat("int8"), every=n).results[0] for n in (1, 8)
    ]
    assert errors[1].state_error < 0.6 * errors[0].state_error
    assert errors[1].predicted < 0.6 * errors[0].predicted


def test_unrounded_state_is_exact():
    (result,) = measure(retention(), 16, StateFormat("int4"), every=17).results
    assert abs(result.lost) < 1e-6
    assert (result.state_error < 1e-6, result.predicted, result.bound) == (True, 0.0, 0.0)


@torch.no_grad()
def test_state_overflow_gives_non_finite_loss():
    model = model_of(retention())
    for parameter in model.blocks[0].mixer.parameters():
        parameter.mul_(1e3)
    result = state_precision(model, text(16), [StateFormat("float16"), StateFormat("bfloat16")], [16])
    assert math.isnan(result.results[0].lost)
    assert math.isfinite(result.results[1].lost)
    assert "16 (bfloat16)" in conclusion(result)
    assert rows_of(result)[1][4] == "not finite"


@pytest.mark.parametrize("window", ["null", "8"])
def test_cache_entries_are_rounded_once(window):
    attention = f"{{kind: attention, n_heads: 2, window: {window}}}"
    result = measure(attention, 96, StateFormat("int8"), changes=["model.n_layers=1"])
    keys, values = result.tensors
    assert (keys.tensor.split(".")[-1], values.tensor.split(".")[-1]) == ("keys", "values")
    for each in (keys, values):
        assert each.errors == pytest.approx(each.predicted, rel=0.2)  # the error of one rounding
        assert each.predicted == each.bound
    carried = measure(attention, 96, StateFormat("int8", "compensated"), changes=["model.n_layers=1"])
    assert carried.results[0].state_error == pytest.approx(result.results[0].state_error)


def test_keep_exact_excludes_named_tensors_from_rounding():
    model = model_of("{kind: mamba3, head_dim: 24}")
    options = {"formats": [StateFormat("int4")], "lengths": [32]}
    rounded, kept = (state_precision(model, text(32), **options, keep_exact=names) for names in ((), ("angle",)))
    assert {each.tensor for each in rounded.tensors} - {each.tensor for each in kept.tensors} == {"angle"}
    assert kept.kept_exact == ["angle"]
    with pytest.raises(SeqmixError, match='"angle"'):
        state_precision(model, text(32), **options, keep_exact=["angel"])
    with pytest.raises(SeqmixError, match="keep fewer tensors exact"):
        state_precision(model, text(32), **options, keep_exact=["angle", "memory", "recent"])


def test_stochastic_rounding_is_reproducible_by_seed():
    same, again, other = (
        measure(retention(), 16, StateFormat("int4", "stochastic"), seed=seed).results[0].loss for seed in (0, 0, 1)
    )
    assert same == again != other


# ---- results


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        (range(10), [n**3 for n in range(10)], 1.0),
        (range(10), [-n for n in range(10)], -1.0),
        ([1, 1, 1, 1, 2, 2, 2, 2], [5, 5, 5, 5, 9, 9, 9, 9], 1.0),
        (range(7), range(7), math.nan),
        ([*range(8), math.inf], [*range(8), -1], 1.0),
    ],
)
def test_rank_correlation_matches_known_values(x, y, expected):
    pair = (torch.tensor(list(values), dtype=torch.float64) for values in (x, y))
    assert rank_correlation(*pair) == pytest.approx(expected, nan_ok=True)


def test_answer_names_the_smallest_format_below_the_loss_limit():
    result = measure(retention(), 16, StateFormat("bfloat16"), StateFormat("int8"), StateFormat("int8", "stochastic"))

    def with_losses(*lost: float) -> Precision:
        changed = [FormatResult(**vars(each) | {"lost": one}) for each, one in zip(result.results, lost, strict=True)]
        return Precision(**vars(result) | {"results": changed})

    head = "Fewest bits per number with less than 0.01 nats per token lost: "
    assert conclusion(with_losses(0.0, 0.009, 0.0)) == f"{head}8 (int8) at 16 tokens."
    assert conclusion(with_losses(0.0, 0.01, 0.002)) == f"{head}8 (int8, stochastic) at 16 tokens."
    assert conclusion(with_losses(0.001, 0.02, math.nan)) == f"{head}16 (bfloat16) at 16 tokens."
    assert conclusion(with_losses(0.5, 0.5, 0.5)) == f"{head}32 (every other format loses more) at 16 tokens."
    assert [row[1] for row in rows_of(result)] == ["exact", "bfloat16", "int8", "int8, stochastic"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run trained for a few steps on a text."""
    folder = tmp_path_factory.mktemp("precision")
    (folder / "text.txt").write_text("the text of a small run, over and over again. " * 60)
    config = load_config(
        "retnet-tiny",
        ["model.d_model=16", "model.n_layers=2", "data.sequence_length=16", f"data.paths=[{folder}/text.txt]",
         "data.split=tail", "training.steps=2", "training.batch_size=4", "training.warmup_steps=1",
         "training.final_evaluation_batches=1"],
    )  # fmt: skip
    run_of(config, folder / "run")
    return folder / "run"


def test_page_marks_cells_within_one_standard_error():
    page = runpy.run_path(str(Path(__file__).resolve().parents[2] / "research" / "precision.py"))
    int8 = {"format": "int8", "rounding": "nearest", "bits": 8, "length": 256, "lost": 0.002, "lost_error": 0.001}
    int4 = int8 | {"format": "int4", "bits": 4, "lost_error": 0.004}
    exact = [{"length": 256, "loss": 2.0}]
    losses = {"sure": 0.005, "nearly lossy": 0.007, "nearly lossless": 0.013, "lossy": 0.015}
    measured = {name: {"exact": exact, "results": [int8, int4 | {"lost": lost}]} for name, lost in losses.items()}
    cells = [page["_fewest"](page["_results"](result, 256)) for result in measured.values()]
    assert cells == ["4 (int4)", "≈ 4 (int4)", "≈ 8 (int8)", "8 (int8)"]
    lines = page["lost"](measured, 256, [StateFormat("int8"), StateFormat("int4")])
    assert lines[3] == "| `nearly lossy` | 0.0020 | ≈ 0.0070 |"
    assert lines[4] == "| `nearly lossless` | 0.0020 | ≈ **0.0130** |"
    assert lines[-1] == "2 of 8 cells are marked with ≈."


def test_command_prints_answer_and_writes_page(seqmix, trained):
    done = seqmix("precision", trained, "--rounding", "nearest,compensated", "--json", "result.json")
    assert done.status == 0, done.err
    assert done.out.startswith("Fewest bits per number with less than 0.01 nats per token lost: ")
    assert "int4, compensated" in done.out
    result = json.loads(Path("result.json").read_text())
    assert [each["length"] for each in result["exact"]] == [16, 64]
    assert len(result["results"]) == 16
    page = Path("precision.html").read_text()
    assert "Fewest bits per number" in page
    assert all(f'id="{name}"' in page for name in ("lost", "state-error", "predicted"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--formats", "int8,bf16"], "'bf16'; did you mean \"bfloat16\"?"),
        (["--rounding", ","], "at least one of nearest"),
        (["--scales", "heads"], 'did you mean "head"?'),
        (["--lengths", "16,x"], "such as 256,1024, got '16,x'"),
        (["--lengths", "100000"], "choose a shorter length"),
        (["--figure", "loss"], 'did you mean "lost"?'),
        (["--keep-exact", "memroy"], 'did you mean "memory"?'),
        (["--out", "a.html", "--json", "a.html"], "different names"),
    ],
)
def test_invalid_options_are_rejected_before_writing(seqmix, trained, options, message):
    done = seqmix("precision", trained, *options)
    assert done.status == 2
    assert message in " ".join(done.err.split())
    assert not Path("precision.html").exists()
