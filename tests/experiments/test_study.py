"""Studies on paper: entries, variants and names of runs; what is the same for all; and what is refused."""

import pytest
from hypothesis import settings

from seqmix import SeqmixError, load_config
from seqmix.experiments import plan as module
from seqmix.experiments.match import cost_of
from seqmix.experiments.plan import plan
from seqmix.experiments.study import SAME, STUDIES, find_study, load_study, shipped

NIGHTLY = settings().max_examples >= 1000
ALONE = "base: retnet-tiny\n"
UNMATCHED = "base: retnet-tiny\nmodel: {n_layers: 1}\n"


def test_entries_are_the_base_with_other_models(planned):
    found = planned(
        """
entries:
  hybrid: {extends: hybrid-tiny, model: {pattern: [ret, attn], n_layers: 2}}
  deep: {model: {n_layers: 2}, match: {flops: attention, knob: d_model, tolerance: 0.5}}
  open: {set: {model.blocks.ret.mixer.gate: none, training.optimizer: muon}}
"""
    )
    by_name = {entry.name: entry.config for entry in found.entries}
    assert list(by_name) == ["retention", "attention", "hybrid", "deep", "open"]
    assert [by_name["attention"].model.blocks["ret"].mixer.kind] == ["attention"]
    # a kind alone has the heads of the mixer before it
    assert by_name["attention"].model.blocks["ret"].mixer.n_heads == 2
    assert by_name["hybrid"].model.layers == ("ret", "attn")
    assert by_name["open"].model.blocks["ret"].mixer.gate == "none"
    assert by_name["open"].training.optimizer == "muon"
    assert {config.data.sequence_length for config in by_name.values()} == {16}
    retention = cost_of(by_name["retention"].model, "parameters", 16)
    for name in ("attention", "open"):
        assert abs(cost_of(by_name[name].model, "parameters", 16) / retention - 1) < 0.01


def test_a_match_is_to_a_model_as_it_is_matched(planned):
    match = "{flops: attention, knob: blocks.*.ffn.expansion}"
    _, attention, thin = planned(f"entries: {{thin: {{match: {match}}}}}\n").entries
    assert attention.config.model.blocks["ret"].ffn.expansion == 4.0
    assert thin.matched.wanted == cost_of(attention.config.model, "flops", 16)
    with pytest.raises(SeqmixError, match="entries match each other in a circle: a -> b -> a"):
        planned("""
entries:
  a: {match: {flops: b, knob: d_model}}
  b: {match: {flops: a, knob: d_model}}
""")


def test_an_entry_without_a_match_is_as_it_is_written(planned):
    changed = "set: {model.blocks.ret.mixer.gate: none}"
    more = f"entries: {{free: {{{changed}, match: null}}, bound: {{{changed}}}}}\n"
    retention, _, free, bound = planned(more).entries
    assert free.matched is None
    assert free.config.model.blocks["ret"].ffn == retention.config.model.blocks["ret"].ffn
    assert bound.matched is not None


def test_names_of_runs(planned):
    more = "seeds: [0, 1]\nlearning_rates: [1e-3, 3e-3]\nvary: {data.sequence_length: [8, 16]}\n"
    runs = planned(more).runs
    assert len(runs) == len({run.name for run in runs}) == 2 * 2 * 2 * 2
    assert runs[0].name == "retention-sequence_length8-lr0.001-seed0"
    # something of every entry before the second seed
    assert {run.entry for run in runs[:8]} == {"retention", "attention"}
    assert {run.config.seed for run in runs[:8]} == {0}
    last = runs[-1]
    assert (last.entry, last.variant) == ("attention", {"data.sequence_length": 16})
    assert (last.config.seed, last.config.training.learning_rate, last.config.data.sequence_length) == (1, 3e-3, 16)


def test_a_run_costs_what_its_variant_does(planned):
    found = planned("vary: {model.d_model: [16, 32], data.sequence_length: [8, 16]}\n")
    for run in found.runs:
        model, length = run.config.model, run.config.data.sequence_length
        assert run.cost == tuple(cost_of(model, metric, length) for metric in ("parameters", "flops", "state"))
        assert run.flops == 3 * 120 * 2 * length * cost_of(model, "flops", length)
    assert len({run.cost for run in found.runs}) == len(found.runs)
    assert (
        "Models are matched by parameters; within a variant, their parameters are at most 0 % apart." in found.fairness
    )


def test_models_that_cannot_be_built_are_refused_before_anything_is_trained(planned):
    with pytest.raises(SeqmixError, match=r"small\.yaml: a where model\.d_model is 18: .* width 9"):
        planned("vary: {model.d_model: [16, 18]}\nentries: {a: {match: null}}\n", study=UNMATCHED)


def test_rates_that_differ_have_runs_of_different_names(planned):
    runs = planned("learning_rates: [0.0012345671, 0.0012345672]\n").runs
    assert runs[0].name == "retention-lr0.0012345671-seed0"
    assert len(runs) == 4


def test_what_is_the_same_is_said(planned):
    assert planned("learning_rates: [1e-3, 3e-3]\n").fairness == (
        "With the same seed, all entries see the same batches in the same order: 120 steps of 2 sequences of 16 "
        "tokens, 3,840 tokens in all.",
        "At the end, every entry is evaluated on the same 2 evaluation batches.",
        "Models are matched by parameters; all have 11,344 parameters.",
        "Each entry is reported at its best learning rate of 0.001, 0.003, by mean final validation loss over seeds.",
    )
    own = planned("entries: {muon: {training: {optimizer: muon}}}\n").fairness
    assert own[-1] == "training.optimizer differs between entries: retention adamw, attention adamw, muon muon."


@pytest.mark.parametrize("place", ["seed", "data", "vocab_size", *SAME])
def test_what_would_not_be_fair_is_seen(planned, place):
    one, other = planned().entries
    config = other.config
    training = config.training.model_copy(update={place: object()})
    changed = {
        "seed": {"seed": 7},
        "data": {"data": config.data.model_copy(update={"sequence_length": 7})},
        "vocab_size": {"model": config.model.model_copy(update={"vocab_size": 300})},
    }.get(place, {"training": training})
    unfair = module.PlannedEntry(other.name, config.model_copy(update=changed))
    with pytest.raises(SeqmixError, match=f"retention and attention cannot be compared: .*{place}"):
        module.require_fair([one, unfair], {})
    module.require_fair([one, other], {})


def test_patience_is_refused(planned, small):
    with pytest.raises(SeqmixError, match=r"training\.patience to be null, got 2: entries would stop"):
        planned(study=small.replace("log_every: 1", "log_every: 1, patience: 2"))


@pytest.mark.parametrize(
    ("study", "said"),
    [
        ("mixers: [retention]\n", "missing key 'base'"),
        (ALONE, "a study needs entries to compare: give mixers, entries, or both"),
        (
            ALONE + "mixers: [retention, {kind: retention}]\n",
            "retention is listed twice: give each a name under entries",
        ),
        (ALONE + "mixers: [{n_heads: 2}]\n", "expected a mixer's kind or a mapping with the key kind, got"),
        (ALONE + "mixers: [retention]\nentries: {retention: {}}\n", "retention is in both mixers and entries"),
        (ALONE + "mixers: [retention]\nseeds: [1, 1]\n", "each value once, got [1, 1]"),
        (ALONE + "entries: {a: {set: {data.order: epochs}}}\n", "got data.order: change it for the whole study"),
        (ALONE + "entries: {a: {training: {steps: 3}}}\n", "training.steps affects the batches or the evaluation"),
        (
            ALONE + "entries: {a: {set: {training.carry_state: true}}}\n",
            "training.carry_state affects the batches or the evaluation",
        ),
        (ALONE + "mixers: [retention]\nvary: {seed: [1]}\n", "vary cannot change seed: use seeds"),
        (ALONE + "mixers: [retention]\nvary: {steps: [1]}\n", "fields of model, data or training, got steps"),
        (
            ALONE + "mixers: [retention]\npaper: [{label: x, entry: retenton, theirs: 1.0}]\n",
            "'retenton'; did you mean \"retention\"? Entries: retention",
        ),
        # reading one may never end
        ("base: /dev/null\nmixers: [retention]\n", "/dev/null cannot be read: it is a pipe or device"),
        (ALONE + "entries: {a: {extends: /dev/null}}\n", "/dev/null cannot be read: it is a pipe or device"),
        # what would be changed twice, once in vain
        (
            ALONE + "entries: {a: {training: {learning_rate: 0.5}}}\nlearning_rates: [0.1, 0.2]\n",
            "entries.a has a learning rate",
        ),
        (
            ALONE + "mixers: [retention]\ntraining: {learning_rate: 0.5}\nlearning_rates: [0.1, 0.2]\n",
            "training has a learning rate",
        ),
        (
            ALONE + "entries: {a: {set: {model.d_model: 64}}}\nvary: {model.d_model: [16, 32]}\n",
            "entries.a changes model.d_model",
        ),
        (
            ALONE + "entries: {a: {model: {blocks: {ret: {mixer: {gate: none}}}}}}\nvary: {model.blocks.ret: [1]}\n",
            "a changes model.blocks.ret.mixer.gate",
        ),
        (
            ALONE + "mixers: [retention]\nvary: {model.blocks.ret.ffn.expansion: [1, 2]}\n"
            "match: {parameters: 100, knob: blocks.*.ffn.expansion}\n",
            "knob blocks.",
        ),
        # what only a resolved entry tells
        (
            ALONE + "mixers: [retention]\ndata: {kind: parity}\ntraining: {carry_state: true}\n",
            "small.yaml: training.carry_state",
        ),
        (ALONE + "mixers: [retention, atention]\n", "unknown mixer kind 'atention'; did you mean \"attention\"?"),
        (ALONE + "entries: {a: {model: {n_layer: 2}}}\n", "entries.a: model.n_layer"),
        (ALONE + "entries: {a: {extends: retnet-tinny}}\n", "'retnet-tinny'; did you mean \"retnet-tiny\"?"),
        (ALONE + "mixers: [retention]\nvary: {data.sequence_lenth: [1]}\n", "vary: data.sequence_lenth"),
        (ALONE + "mixers: [retention]\nmatch: {parameters: other, knob: n_layers}\n", "'other'"),
        (
            ALONE + "mixers: [retention]\nmatch: {parameters: 1000000, knob: n_layer}\n",
            "'n_layer'; did you mean \"n_layers\"? Allowed: ",
        ),
        (ALONE + "mixers: [retention]\nvary: {data.paths: [[a/b], [a_b]]}\n", "retention-pathsa_b-seed0"),
    ],
)
def test_errors(written, study, said):
    file = written(study=study)
    with pytest.raises(SeqmixError) as error:
        plan(load_study(file), file)
    start, _, end = said.partition(".*")
    assert start in str(error.value)
    assert str(error.value).endswith(end.lstrip(", ") if end else "")


def test_a_study_is_found(written, tmp_path):
    assert find_study(str(written())) == tmp_path / "small.yaml"
    for name in shipped():
        assert find_study(name) == STUDIES / f"{name}.yaml"
    with pytest.raises(SeqmixError, match=r"no study 'recal': give a YAML file or one of .*recall"):
        find_study("recal")
    with pytest.raises(SeqmixError, match=r'the study .*smal\.yaml does not exist; did you mean "small\.yaml"\?'):
        find_study(str(tmp_path / "smal.yaml"))


# short-convolution has the entries of short-convolution-text
@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in shipped() if NIGHTLY or name != "short-convolution-text"])
def test_shipped_studies_can_be_made(name):
    found = plan(load_study(STUDIES / f"{name}.yaml"), STUDIES / f"{name}.yaml")
    assert found.study.question
    assert found.runs


def test_extends_takes_the_model_and_leaves_the_vocabulary(planned):
    (entry,) = planned(study="base: retnet-tiny\nmodel: {vocab_size: 300}\nentries: {a: {extends: gla-tiny}}\n").entries
    assert entry.config.model.vocab_size == 300
    assert entry.config.model.blocks.keys() == load_config("gla-tiny").model.blocks.keys()
    assert entry.config.training == load_config("retnet-tiny").training


def test_a_study_has_the_name_of_its_file_whatever_bytes_that_is(tmp_path):
    file = tmp_path / "caf\udce9.yaml"
    file.write_text(f"{UNMATCHED}mixers: [retention]\n")
    assert load_study(file).name == "caf\ufffd"
