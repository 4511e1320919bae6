"""Every mixer at the same budget: which presets, runs in processes of their own, what is run again, and the table."""

import json
import sys

import pytest
import typer

from seqmix import MIXERS, SeqmixError
from seqmix.benchmarks import families
from seqmix.benchmarks.families import Result, Run, fill, main, run_all, single_kind_presets, table

PAGE = "# A page\n\n<!-- trained: begin -->\nold\n<!-- trained: end -->\n\nThe end.\n"


@pytest.fixture
def changes(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("def f(x):\n    return x\n" * 40)
    return [
        f"data={{paths: [{text}], split: tail, sequence_length: 16}}",
        "training={steps: 2, batch_size: 2, warmup_steps: 1, evaluation_batches: 1, final_evaluation_batches: 1}",
        "model.d_model=32",
        "model.n_layers=1",
    ]


def result(preset, seed, loss, speed, mixer="gla"):
    return Result(
        preset=preset,
        seed=seed,
        mixer=mixer,
        parameters=850_000,
        loss=loss,
        tokens_per_second=speed / 2,
        tokens_per_cpu_second=speed,
        cpu_seconds=100.0,
        state_bytes=4096,
        decode_seconds=2e-3,
        config="",
    )


def test_the_presets_have_one_mixer_each_and_are_trained_alike():
    presets = single_kind_presets()
    assert {"retnet-tiny", "attention-tiny", "linear-tiny", "mamba2-tiny"} <= set(presets)
    assert "hybrid-tiny" not in presets
    assert {families.mixer_kind(config) for config in presets.values()} <= set(MIXERS.kinds())
    # batches are a function of these and of the seed
    reference = presets["retnet-tiny"]
    for config in presets.values():
        assert config.data == reference.data
        rate = {"learning_rate": reference.training.learning_rate}
        assert config.training.model_copy(update=rate) == reference.training


def test_runs_are_trained_once_and_the_table_is_written(tmp_path, changes, capsys):
    out, page = tmp_path / "out", tmp_path / "page.md"
    page.write_text(PAGE)
    (out / "retnet-tiny-seed0.partial").mkdir(parents=True)
    (out / "retnet-tiny-seed0.partial" / "config.yaml").write_text("of a run that was killed")
    asked = {"out": out, "seed": [0], "jobs": 2, "change": changes, "page": page}
    main(presets=["retnet-tiny", "mamba2-tiny"], **asked)
    told = capsys.readouterr().out
    assert "retnet-tiny-seed0: step 2 of 2: " in told
    assert "mamba2-tiny-seed0: step 2 of 2: " in told
    assert {path.name for path in out.iterdir()} == {
        "retnet-tiny-seed0.json",
        "mamba2-tiny-seed0.json",
        "results.json",
    }
    mamba, retnet = (Result(**values) for values in json.loads((out / "results.json").read_text())["results"])
    assert (mamba.mixer, retnet.mixer) == ("mamba2", "retention")
    assert 0 < retnet.loss < 7
    assert retnet.state_bytes == 2 * 16 * 32 * 4 + 8  # one layer of two heads, and a position
    for found in (mamba, retnet):
        assert min(found.tokens_per_second, found.tokens_per_cpu_second, found.cpu_seconds, found.decode_seconds) > 0
    text = page.read_text()
    assert text.startswith("# A page\n\n<!-- trained: begin -->\n\n| mixer | preset | parameters | loss, seed 0 |")
    assert f"| `retention` | `retnet-tiny` | {retnet.parameters:,} | {retnet.loss:.4f} |" in text
    assert text.endswith("<!-- trained: end -->\n\nThe end.\n")

    main(presets=["retnet-tiny"], **asked)  # nothing is left to do
    assert "step" not in capsys.readouterr().out
    assert page.read_text() == text
    assert Run("retnet-tiny", 0, (*changes, "training.steps=3")).result(out) is None
    assert Run("retnet-tiny", 1, tuple(changes)).result(out) is None


def test_a_failed_run_is_told_and_ends_no_other(tmp_path, monkeypatch):
    code = "import sys; print('trained', sys.argv[1]); sys.exit(3 * (sys.argv[2] == '1'))"
    monkeypatch.setattr(families, "PROGRAM", (sys.executable, "-c", code))
    told = []
    problems = run_all([Run("retnet-tiny", seed) for seed in (0, 1, 2)], tmp_path, 1, told.append)
    assert problems == {"retnet-tiny-seed1": "exit status 3: trained retnet-tiny"}
    assert told == [f"retnet-tiny-seed{seed}: trained retnet-tiny" for seed in (0, 1, 2)]
    with pytest.raises(typer.Exit):
        main(out=tmp_path, presets=["retnet-tiny"], seed=[1], jobs=1, change=["training.steps=1"])
    assert json.loads((tmp_path / "results.json").read_text())["problems"] == problems


def test_the_table_compares_with_retention():
    results = [
        result("gla-tiny", 0, 1.25, 500.0),
        result("gla-tiny", 1, 1.75, 700.0),
        result("retnet-tiny", 0, 1.5, 1200.0, "retention"),
    ]
    *_, gla, retnet = table(results)
    assert gla == "| `gla` | `gla-tiny` | 850,000 | 1.2500 | 1.7500 | 1.5000 | 600 (0.50) | 4,096 | 2.00 |"
    assert retnet == "| `retention` | `retnet-tiny` | 850,000 | 1.5000 |  |  | 1,200 (1.00) | 4,096 | 2.00 |"
    assert table(results[:1])[2] == "| `gla` | `gla-tiny` | 850,000 | 1.2500 | 500 | 4,096 | 2.00 |"


def test_what_cannot_be_done_is_refused(tmp_path):
    with pytest.raises(SeqmixError, match=r"no preset 'hybrid-tiny' of one mixer; presets: attention-tiny, "):
        main(out=tmp_path, presets=["hybrid-tiny"], page=tmp_path / "none.md")
    with pytest.raises(SeqmixError, match=r"none\.md cannot be used: No such file"):
        main(out=tmp_path, page=tmp_path / "none.md")
    with pytest.raises(SeqmixError, match="no region between <!-- trained: begin -->"):
        fill("# A page", "trained", [])
