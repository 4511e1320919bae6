"""The site builds without warnings, its search finds common topics, and its formulas are MathML and correct."""

import contextlib
import json
import re
import runpy
from html import unescape
from pathlib import Path

import pytest

from seqmix.mixers.base.state import to_dict
from seqmix.registry import ConfigError
from seqmix.training.presets import single_kind_presets

ROOT = Path(__file__).resolve().parents[2]
WANTED = {
    "wandb": "how-to/logging/",
    "KV cache": "reference/mixers/",
    "resume": "how-to/training/",
    "cite": "",
    "8 GPUs": "how-to/multi-gpu/",
}
"""What is searched for, and a page that answers."""


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    pytest.importorskip("mkdocs")
    pytest.importorskip("latex2mathml")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    folder = tmp_path_factory.mktemp("site")
    build(load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(folder)))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("words", "page"), WANTED.items(), ids=WANTED)
def test_site_search_finds_the_expected_page(site, words, page):
    documents = json.loads((site / "search" / "search_index.json").read_text())["docs"]
    pattern = re.compile(rf"\b{words}\b", re.IGNORECASE)
    found = {document["location"].partition("#")[0] for document in documents if pattern.search(text_of(document))}
    assert page in found


def text_of(document: dict[str, str]) -> str:
    return unescape(re.sub(r"<[^>]+>", " ", f"{document['title']} {document['text']}"))


def test_formulas_are_rendered_as_mathml(site):
    pages = [file.read_text() for file in site.rglob("*.html")]
    assert sum(page.count('display="block"') for page in pages) > 10
    for page in pages:
        assert "arithmatex" not in page
        assert not re.search(r"\\begin\{|<m[iot]>(?:\\\w+|&amp;)</m[iot]>", page)


def test_llms_txt_lists_all_pages(site):
    lines = (site / "llms.txt").read_text().splitlines()
    pages = [line for line in lines if line.startswith("- ")]
    assert len(pages) == len(list((ROOT / "docs").rglob("*.md")))
    links = [re.fullmatch(r"- \[.+\]\((\S+)\): \S.+", line) for line in pages]
    for link in links:
        assert link is not None
        assert (site / link[1] / "index.html").is_file()
    (scripts,) = (line for line in pages if "(./how-to/scripts/)" in line)
    assert "JSON" in scripts


@pytest.mark.parametrize("preset", single_kind_presets().values(), ids=single_kind_presets())
def test_state_size_formula_matches_the_actual_state(preset):
    page = runpy.run_path(str(ROOT / "docs" / "mixers.py"))
    model = preset.model
    config = model.blocks[model.layers[0]].mixer
    if config.kind not in page["MATHEMATICS"]:
        pytest.skip("its equations are shown as code")
    varied = [config]
    with contextlib.suppress(ConfigError):  # there is no window, or the mixer refuses it
        varied.append(type(config)(**config.model_dump() | {"window": 16}))
    for mixer in varied:
        for tokens in (8, 64):
            state = mixer.build(model.d_model, layer_idx=0, n_layers=1).init_state(1, max_length=tokens)
            counted = sum(leaf.numel() for leaf in to_dict(state).values() if leaf.is_floating_point())
            assert page["state_elements"](mixer, model.d_model, tokens) == counted
