"""Measurements of a model's layers, compared with closed forms, and the page that shows them."""

import base64
import re
import zlib
from pathlib import Path

import pytest
import torch
from small_runs import run_of

from seqmix import MIXERS, build_model, load_config
from seqmix.lab.figures.figure import by_legend
from seqmix.lab.inspect import look
from seqmix.lab.inspect.pictures import picture
from seqmix.lab.inspect.report import MAX_HEADS, reach_figures, render, rows_of, state_figures
from seqmix.lab.inspect.views import ROWS, effective_rank, spread

TOKENS = torch.randint(256, (1, 12), generator=torch.Generator().manual_seed(0))


def model_of(mixer: str, *changes: str):
    block = f"{{mixer: {mixer}, ffn: {{kind: mlp, expansion: 1.0, activation: gelu}}, norm: {{kind: layernorm}}}}"
    config = load_config("retnet-tiny", ["model.d_model=24", "model.n_layers=2", f"model.blocks.ret={block}", *changes])
    return build_model(config.model, dtype=torch.float64).eval()


@pytest.mark.parametrize("gamma", [0.5, 0.8])
def test_retention_head_reach_follows_its_decay(gamma):
    model = model_of(
        f"{{kind: retention, n_heads: 2, decay: constant, gamma: {gamma}, rotation: none, row_norm: false}}"
    )
    same = torch.full((1, 100), 7)  # tokens, and so queries and keys, that are the same: only decays are left
    view = look(model, same)[0]
    last = view.maps[:, -1].flip(-1)  # by distance
    wanted = (1 - gamma) / (1 - gamma**100) * gamma ** torch.arange(100, dtype=torch.float64)
    torch.testing.assert_close(last, wanted.expand(2, -1), rtol=1e-5, atol=1e-12)
    assert view.of_heads
    assert view.decays == pytest.approx([gamma] * 2)
    assert view.decay_reach == pytest.approx([gamma / (1 - gamma)] * 2)
    # of the first queries, the text has less to read
    powers = [gamma ** torch.arange(n + 1, dtype=torch.float64) for n in view.queries]
    reach = [(torch.arange(len(each)) * each).sum() / each.sum() for each in powers]
    assert view.reach == pytest.approx([torch.stack(reach).mean().item()] * 2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(MIXERS.built_in()))
def test_every_mixer_has_maps_states_and_gradient_norms(kind):
    config = MIXERS.built_in()[kind]
    fields = ", ".join(f"{name}: {value}" for name, value in config.example_fields().items())
    views = look(model_of(f"{{kind: {kind}, {fields}}}"), TOKENS)
    for view in views:
        assert view.mixer == kind
        assert view.maps.shape[1:] == (12, 12)
        sums = view.maps.sum(-1)[:, 1:]  # Mamba-3 has heads for the token before, which the first one lacks
        torch.testing.assert_close(sums, torch.ones_like(sums))
        assert view.maps.triu(1).abs().max() < 1e-9  # Hyena's are of a Fourier transform
        assert view.gradient_norm > 0
        assert view.stream_gradient_norm > 0
        assert view.states
        assert all(len(state.norms) == len(state.ranks) == len(view.points) for state in view.states)
        assert all(0 <= reach <= within + 12 for reach, within in zip(view.reach, view.reach_90, strict=True))
    assert MIXERS.built_in()[kind].example().traits.has_state


def test_plugin_mixer_is_measured_by_gradients(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples" / "plugin"))
    views = look(model_of("{kind: seqmix_mingru:MinGRUConfig}"), TOKENS)
    assert [view.of_heads for view in views] == [False, False]
    assert views[0].maps.shape == (1, 12, 12)
    assert not views[0].maps.triu(1).any()


def test_saturated_gates_and_decays_are_counted():
    model = model_of("{kind: gated_retention, n_heads: 2}")
    with torch.no_grad():
        mixer = model.blocks[0].mixer
        rows = dict(zip(mixer.widths, mixer.in_proj.weight.split(list(mixer.widths.values())), strict=True))
        rows["gate"].zero_()
        rows["gamma"].zero_()
    first, second = look(model, TOKENS)
    assert first.saturated_gates == 0
    assert first.saturated_decays == 0
    assert first.decays == pytest.approx([0.5 ** (1 / 16)] * 2)
    with torch.no_grad():
        rows["gate"][:, 0] = 1e3
    assert look(model, TOKENS)[0].saturated_gates > 0.9
    assert second.layer == 1


def test_gradient_norms_match_a_backward_pass():
    model = model_of("{kind: gla, n_heads: 2}")
    views = look(model, TOKENS)
    model(TOKENS[:, :-1], targets=TOKENS[:, 1:]).loss.backward()
    for view, block in zip(views, model.blocks, strict=True):
        norm = torch.stack([p.grad.norm() for p in block.parameters()]).norm().item()
        assert view.gradient_norm == pytest.approx(norm)


def test_effective_rank_of_identity_constant_and_zero_matrices():
    assert effective_rank(torch.eye(5)[None]) == pytest.approx(5)
    assert effective_rank(torch.ones(1, 4, 4)) == pytest.approx(1, abs=1e-6)
    assert effective_rank(torch.zeros(2, 3, 3)) == 0


def test_indices_are_spread_evenly():
    assert spread(4, 64) == [0, 1, 2, 3]
    assert spread(100, 4) == [24, 49, 74, 99]


def test_picture_encodes_weights_as_png_opacity():
    address = picture(torch.tensor([[1.0, 0.0], [0.25, 1.0]]))
    png = base64.b64decode(address.partition(",")[2])
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    data = zlib.decompress(png[png.index(b"IDAT") + 4 : png.index(b"IEND") - 8])
    assert list(data) == [0, 0, 255, 0, 0, 0, 0, 128, 0, 255]


def test_command_writes_page_figure_and_json(seqmix, config_of, tmp_path):
    pytest.importorskip("altair")
    run_of(config_of("training.steps=1"), tmp_path / "run")
    done = seqmix("inspect", tmp_path / "run", "--text", "text.txt", "--tokens", "20", "--json", "i.json")
    assert done.status == 0, done.err
    page = (tmp_path / "inspect.html").read_text()
    assert len(re.findall(r'class="map"', page)) == 4
    assert "20 bytes of text.txt" in page
    for figure in ("within", "reach", "state-norm", "state-rank", "gradients"):
        assert f'data-figure="{figure}"' in page
    assert '"reach_90"' in (tmp_path / "i.json").read_text()
    drawing = ("inspect", tmp_path / "run", "--text", "text.txt", "--figure", "reach", "--out", "r.svg")
    assert seqmix(*drawing).status == 0
    # where there is no room for its data, the page is whole nonetheless
    done = seqmix("inspect", tmp_path / "run", "--text", "text.txt", "--out", "new.html", "--json", "/dev/full")
    assert (done.status, "/dev/full cannot be written" in done.err) == (3, True)
    assert "</html>" in (tmp_path / "new.html").read_text()


def test_page_renders_for_mixer_without_attention_maps():
    pytest.importorskip("altair")
    views = look(model_of("{kind: mamba}"), TOKENS)
    views[0].maps, views[0].reach, views[0].reach_90 = None, [], []
    page = render(views, "a run", "facts")
    assert "by gradients with respect to its inputs" in page
    assert rows_of(views[0])[0][3] == ""
    assert (ROWS, MAX_HEADS) == (64, 16)


def test_reach_figure_shows_every_head_of_every_layer():
    views = look(model_of("{kind: retention, n_heads: 12}", "model.n_layers=3"), TOKENS)
    within, reach = reach_figures(views)
    drawn = [(row["x"], row["y"]) for row in reach.rows() if row.get("marker")]
    assert drawn == [(view.layer, pytest.approx(distance)) for view in views for distance in view.reach]
    assert len(drawn) == 36
    # a layer has one colour, and a colour one layer
    assert len(by_legend([within, reach, *state_figures(views)])) == 1


def test_page_says_how_many_maps_are_omitted():
    pytest.importorskip("altair")
    views = look(model_of("{kind: retention, n_heads: 24, rotation: none}"), TOKENS)
    assert render(views, "a run", "facts").count("The first 16 of 24 heads.") == 2


def test_unreadable_text_and_bad_output_paths_are_rejected(refused, config_of, tmp_path):
    pytest.importorskip("altair")
    run_of(config_of("training.steps=1"), tmp_path / "run")
    assert "none.txt cannot be read" in refused("inspect", tmp_path / "run", "--text", "none.txt", status=3)
    both = refused("inspect", tmp_path / "run", "--text", "text.txt", "--out", "x.html", "--json", "x.html")
    assert both == "--out and --json are both x.html: give them different names"
    assert "must end in one of" in refused("inspect", tmp_path / "run", "--text", "text.txt", "--out", "x.doc")
