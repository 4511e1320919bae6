"""Planned studies: entries, variants and run names, notes on fairness, and rejected input."""

import re

import pytest
from hypothesis import settings

from seqmix import SeqmixError, load_config
from seqmix.lab.study import plan as module
from seqmix.lab.study.equal_cost import cost_of
from seqmix.lab.study.plan import plan
from seqmix.lab.study.study import EQUAL_TRAINING_FIELDS, STUDIES, find_study, load_study, shipped
from seqmix.lab.units import number

NIGHTLY = settings().max_examples >= 1000
ALONE = "base: retnet-tiny\n"
UNMATCHED = "base: retnet-tiny\nmodel: {n_layers: 1}\n"


def test_entry_fields_override_the_base_config(planned):
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


def test_match_uses_cost_of_matched_target_and_rejects_cycles(planned):
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


def test_null_match_leaves_entry_unchanged(planned):
    changed = "set: {model.blocks.ret.mixer.gate: none}"
    more = f"entries: {{free: {{{changed}, match: null}}, bound: {{{changed}}}}}\n"
    retention, _, free, bound = planned(more).entries
    assert free.matched is None
    assert free.config.model.blocks["ret"].ffn == retention.config.model.blocks["ret"].ffn
    assert bound.matched is not None


def test_run_names_are_unique_and_tuning_comes_first(planned):
    more = "seeds: [0, 1]\ntune: {learning_rate: [1e-3, 3e-3]}\nvary: {data.sequence_length: [8, 16]}\n"
    found = planned(more)
    runs = found.runs
    assert len(runs) == len({run.name for run in runs}) == found.study.size == 2 * 2 * (2 + 2)
    assert runs[0].name == "retention-sequence_length8-lr0.001-seed2"
    # every entry's rates are tuned first, and something of every entry comes before the second seed
    assert [run.tunes for run in runs] == 8 * [True] + 8 * [False]
    assert {run.config.seed for run in runs[:8]} == {2}
    assert {(run.entry, run.config.seed) for run in runs[8:12]} == {("retention", 0), ("attention", 0)}
    last = runs[-1]
    assert (last.name, last.entry) == ("attention-sequence_length16-seed1", "attention")
    assert (last.config.seed, last.config.data.sequence_length) == (1, 16)


def test_planned_run_has_the_config_of_its_base(planned):
    planned_run, *_ = planned(study="base: retnet-tiny\nmixers: [retention]\n").runs
    assert planned_run.config == load_config("retnet-tiny")


def test_runs_wait_for_tuned_rate_of_their_entry(planned):
    found = planned("seeds: [0, 1]\ntune: {learning_rate: [1e-3, 3e-3], seeds: [7, 8]}\n")
    assert {run.config.seed for run in found.runs if run.tunes} == {7, 8}
    assert all(run.awaits_learning_rate for run in found.runs if not run.tunes)
    chosen = found.with_rates({"attention": 3e-3}).runs
    set_runs = [run for run in chosen if not (run.tunes or run.awaits_learning_rate)]
    assert {run.name: run.config.training.learning_rate for run in set_runs} == {
        "attention-seed0": 3e-3, "attention-seed1": 3e-3,
    }  # fmt: skip
    assert [run.name for run in chosen if run.awaits_learning_rate] == ["retention-seed0", "retention-seed1"]
    # the budget is the same for every entry, and known before the rates are
    assert sum(run.flops for run in chosen) == sum(run.flops for run in found.runs)


def test_run_cost_follows_its_variant(planned):
    found = planned("vary: {model.d_model: [16, 32], data.sequence_length: [8, 16]}\n")
    for run in found.runs:
        model, length = run.config.model, run.config.data.sequence_length
        assert run.cost == tuple(cost_of(model, metric, length) for metric in ("parameters", "flops", "state"))
        assert run.flops == 3 * 120 * 2 * length * cost_of(model, "flops", length)
    assert len({run.cost for run in found.runs}) == len(found.runs)
    assert (
        "Models are matched by parameters; within a variant, their parameters are at most 0 % apart." in found.fairness
    )


def test_unbuildable_models_are_rejected_before_training(planned):
    with pytest.raises(SeqmixError, match=r"small\.yaml: a where model\.d_model is 18: .* width 9"):
        planned("vary: {model.d_model: [16, 18]}\nentries: {a: {match: null}}\n", study=UNMATCHED)


def test_runs_with_different_rates_have_different_names(planned):
    runs = planned("tune: {learning_rate: [0.0012345671, 0.0012345672]}\n").runs
    assert runs[0].name == "retention-lr0.0012345671-seed1"
    assert len(runs) == 6


def test_deprecated_learning_rates_key_still_works(planned):
    with pytest.warns(
        FutureWarning, match=r"learning_rates is deprecated, use tune: \{learning_rate: \[0.001, 0.003\]\}"
    ):
        assert planned("learning_rates: [1e-3, 3e-3]\n").study.tune.learning_rate == (1e-3, 3e-3)
    with pytest.warns(FutureWarning, match=r"use training: \{learning_rate: 0.003\}"):
        (run, _) = planned("learning_rates: [3e-3]\n", study=UNMATCHED + "mixers: [retention, gla]\n").runs
    assert (run.config.training.learning_rate, run.awaits_learning_rate) == (3e-3, False)


def test_fairness_notes_state_equal_and_unequal_conditions(planned):
    found = planned("tune: {learning_rate: [1e-3, 3e-3]}\nseeds: [0, 1]\n")
    assert found.fairness == (
        "With the same seed, all entries see the same batches in the same order: 120 steps of 2 sequences of 16 "
        "tokens, 3,840 tokens in each run.",
        "At the end, every entry is evaluated on the same 2 batches of 2 sequences.",
        "Models are matched by parameters; all have 11,344 parameters.",
        "Not equal: the forward pass has 15.4k to 15.9k matmul FLOPs per token over entries (3.3 % apart).",
        "Not equal: the state of one sequence at the training length has 1.01 KiB to 2.01 KiB over entries.",
        "Each entry's learning rate is tuned: 0.001, 0.003 with seed 2; the best has the lowest final validation loss. "
        "Results are those of other seeds at that rate: 0, 1. They are evaluated on the data that chose the rate.",
        "To remove the difference in gate and head_norm, write in the study's file: equal: {gate: swish, head_norm: "
        "none}",
    )


def test_fairness_note_names_tuning_variants_and_seeds(planned):
    more = "tune: {learning_rate: [1e-3, 3e-3], seeds: [7, 8]}\nvary: {data.sequence_length: [8, 16]}\n"
    (sentence,) = (each for each in planned(more).fairness if "rate is tuned" in each)
    assert sentence.startswith("Each entry's learning rate is tuned in each variant: 0.001, 0.003 with seeds 7, 8; ")
    assert "the best has the lowest mean final validation loss." in sentence


def test_fairness_note_reports_unequal_flops(planned):
    more = "mixers: [retention, delta_net]\n"
    found = planned(more, study="base: retnet-tiny\nmodel: {n_layers: 1}\n")
    costs = [entry.cost.flops_per_token for entry in found.entries]
    (sentence,) = (each for each in found.fairness if "FLOPs" in each)
    percent = 100 * (max(costs) / min(costs) - 1)
    assert sentence == (
        f"Not equal: the forward pass has {number(min(costs))} to {number(max(costs))} matmul FLOPs per token over "
        f"entries ({percent:.2g} % apart)."
    )
    varied = planned(f"{more}vary: {{model.d_model: [64, 128]}}\n", study="base: retnet-tiny\nmodel: {n_layers: 1}\n")
    (sentence,) = (each for each in varied.fairness if "FLOPs" in each)
    assert " over entries and variants (within a variant at most " in sentence


def test_fairness_note_reports_unequal_states_over_variants(planned):
    (sentence,) = (each for each in planned("vary: {model.d_model: [16, 32]}\n").fairness if "state" in each)
    assert sentence.startswith("Not equal: the state of one sequence at the training length has 1.01 KiB to 4.01 KiB")
    assert sentence.endswith(" over entries and variants.")


@pytest.mark.parametrize(
    ("study", "sentence"),
    [
        (
            "training: {learning_rate: 0.002}\n",
            "All entries use the learning rate 0.002, which was not tuned for each.",
        ),
        (
            "training: {learning_rate: 0.002}\nentries: {fast: {training: {learning_rate: 0.01}}}\n",
            "Not equal: entries use different learning rates (0.002, 0.01), which were not tuned.",
        ),
    ],
)
def test_fairness_note_reports_untuned_learning_rates(planned, study, sentence):
    assert (
        planned(study, study="base: retnet-tiny\nmodel: {n_layers: 1}\nmixers: [retention]\n").fairness[-1] == sentence
    )


# ---- options that are equal, and what else differs


def test_equal_sets_option_in_all_mixers_that_have_it(planned):
    found = planned(
        "equal: {short_conv: null, gate: none}\nentries:\n"
        "  two: {extends: parallel-hybrid-tiny, model: {d_model: 128, n_layers: 1}, match: null}\n"
        "  mamba: {match: null, set: {model.blocks.ret.mixer: {kind: mamba}}}\n"
    )
    blocks = {entry.name: entry.config.model.blocks["ret"].mixer for entry in found.entries if entry.name != "two"}
    assert (blocks["retention"].short_conv, blocks["retention"].gate, blocks["attention"].gate) == (
        None,
        "none",
        "none",
    )
    assert blocks["mamba"].short_conv == 4
    (two,) = (entry.config.model for entry in found.entries if entry.name == "two")
    inner = two.blocks["both"].mixer.mixers
    assert [mixer.gate for mixer in inner if hasattr(mixer, "gate")] == ["none"]
    convolution, gate = found.fairness[-3:-1]
    assert convolution == (
        "Equal in all mixers that allow it: short_conv = null; mamba keeps 4: expected an integer, got null."
    )
    assert gate == (
        "Equal in all mixers that allow it: gate = none; two (mamba2) has no option gate; mamba has no option gate."
    )
    assert (
        "Equal in all mixers: gate = none."
        in planned("mixers: [retention, gla]\nequal: {gate: none}\n", study=ALONE).fairness
    )


def test_equal_option_can_vary(planned):
    found = planned("mixers: [retention, rwkv7]\nvary: {equal.short_conv: [null, 4]}\n", study=ALONE)
    assert found.fairness[0].endswith("variants differ in equal.short_conv.")  # rwkv7 has no such option
    by_name = {run.name: run.config.model.blocks["ret"].mixer for run in found.runs}
    assert by_name["retention-short_convNone-seed0"].short_conv is None
    assert by_name["retention-short_conv4-seed0"].short_conv == 4
    also = {(each.entry, each.variant["equal.short_conv"]): each.also for each in found.differences}
    assert "short_conv" not in also["rwkv7", None]
    assert "short_conv" in also["rwkv7", 4]


def differences(found):
    return {each.entry: (each.compared, set(each.also)) for each in found.differences}


def test_accessories_are_listed_as_other_differences_of_mixers(planned):
    found = planned("mixers: [retention, gla, delta_net]\n", study=ALONE + "model: {n_layers: 1}\n")
    shared = {"mixer.expand_v", "mixer.norm_affine"}  # options of both mixers, with different values
    assert differences(found) == {
        "retention": ((), set()),
        "gla": (("the mixer",), {"head_norm", "positions", *shared, "mixer.expand_k"}),
        "delta_net": (
            ("the mixer",),
            {"short_conv", "qk_norm", "gate", "head_norm", "positions", "qkv_activation", *shared, "mixer.norm_eps"},
        ),
    }
    values = {each.entry: each.values for each in found.differences}
    assert values["retention"]["short_conv"] == "null"
    assert values["delta_net"]["short_conv"] == "4"
    # an accessory that is off equals one that there is no option for; the knob of a match is no difference
    matched = planned("equal: {gate: none, head_norm: none}\n")
    assert differences(matched)["attention"] == (("the mixer",), {"positions"})
    assert {each.entry: each.values["positions"] for each in matched.differences} == {
        "retention": "retnet", "attention": "rope",
    }  # fmt: skip


def test_built_in_accessories_are_listed(planned):
    found = planned("mixers: [retention, mamba2, attention]\n", study=ALONE + "model: {n_layers: 1}\n")
    values = {each.entry: each.values for each in found.differences}
    assert values["mamba2"]["gate"] == "swish (built in)"
    assert values["mamba2"]["head_norm"] == "rms of groups, after the gate (built in)"
    assert values["attention"]["head_norm"] == "no option"
    assert {name: each["qkv_activation"] for name, each in values.items()} == {
        "retention": "none", "mamba2": "silu", "attention": "none",
    }  # fmt: skip
    assert "gate" not in differences(found)["mamba2"][1]  # retention's is a swish too
    # Mamba-2 has no field for the number of heads: it follows from the widths
    assert {name: each["mixer.n_heads"] for name, each in values.items()} == {
        "retention": "2", "mamba2": "4", "attention": "2",
    }  # fmt: skip


def test_silu_without_convolution_counts_as_a_difference(planned):
    found = planned(
        "mixers: [retention, delta_net]\nequal: {short_conv: null}\n", study=ALONE + "model: {n_layers: 1}\n"
    )
    assert "qkv_activation" in differences(found)["delta_net"][1]
    of_one = planned(
        "mixers: [retention]\nentries: {conv: {set: {model.blocks.ret.mixer.short_conv: 4}}}\n",
        study=ALONE + "model: {n_layers: 1}\n",
    )
    assert differences(of_one)["conv"] == (("short_conv",), set())


def test_entries_with_the_same_mixer_differ_in_the_fields_they_set(planned):
    found = planned(
        "entries:\n  open: {set: {model.blocks.ret.mixer.gate: none}}\n  warm: {training: {warmup_steps: 7}}\n"
        "  wide: {match: null, extends: retnet-tiny}\n  both: {model: {dropout: 0.1}, set: {training.ema: 0.9}}\n",
        study="base: retnet-tiny\nmodel: {n_layers: 1}\nmixers: [retention]\n",
    )
    assert differences(found) == {
        "retention": ((), set()),
        "open": (("gate",), set()),
        "warm": (("training.warmup_steps",), set()),
        "wide": ((), set()),
        "both": (("dropout", "training.ema"), set()),
    }


def test_options_that_only_the_other_kind_has_are_not_listed_as_differences(planned):
    found = planned(
        "entries:\n  streams: {model: {residual: {kind: hyper, n_streams: 2}}}\n"
        "  scaled: {model: {residual: {kind: scalars}, dropout: 0.1}}\n",
        study="base: retnet-tiny\nmodel: {n_layers: 1}\nmixers: [retention]\n",
    )
    assert differences(found) == {
        "retention": ((), set()),
        "streams": (("residual.kind", "residual.n_streams"), set()),
        "scaled": (("residual.kind", "dropout"), set()),
    }


def test_other_model_differences_are_listed_beside_the_mixer(planned):
    entry = (
        "{set: {model.blocks.ret.mixer: {kind: gla, n_heads: 4}, training.weight_decay: 0.0}, "
        "model: {blocks: {ret: {ffn: {kind: swiglu, expansion: 2.0}}}}}"
    )
    found = planned(f"subject: other\nentries: {{other: {entry}}}\n")
    compared, also = differences(found)["retention"]
    assert compared == ("the mixer",)
    assert {"training.weight_decay", "ffn.kind", "mixer.n_heads"} <= also
    assert differences(found)["other"] == ((), set())


@pytest.mark.parametrize("place", ["seed", "data", "vocab_size", *EQUAL_TRAINING_FIELDS])
def test_entries_with_unequal_conditions_cannot_be_compared(planned, place):
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


def test_suggested_equal_line_removes_accessory_differences(planned, small):
    study = small.replace("mixers: [retention, attention]", "mixers: [retention, attention, gated_delta_net]")
    study = study.replace("match: {parameters: retention, knob: blocks.*.ffn.expansion}\n", "")
    before = planned(study=study)
    (sentence,) = (each for each in before.fairness if "equal: {" in each)
    removed, line = re.fullmatch(r"To remove the difference in (.*), write .*: (equal: \{.*\})", sentence).groups()
    assert "short_conv" in removed
    also = {field for each in before.differences for field in each.also}
    after = planned(line + "\n", study=study)
    left = {field for each in after.differences for field in each.also}
    assert also - left == set(re.split(r", | and ", removed))
    assert not any("To remove" in each for each in after.fairness)


def test_study_with_early_stopping_is_rejected(planned, small):
    with pytest.raises(
        SeqmixError, match=r"small\.yaml:\d+: training\.patience: expected null, got 2: entries would stop"
    ):
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
        (
            ALONE + "mixers: [retention]\nvary: {training.learning_rate: [1]}\n",
            "vary cannot change training.learning_rate: use tune",
        ),
        (ALONE + "mixers: [retention]\nvary: {steps: [1]}\n", "fields of model, data, training or equal, got steps"),
        (
            ALONE + "mixers: [retention, gla]\nsubject: glaa\n",
            "subject names an unknown entry 'glaa'; did you mean \"gla\"? Entries: retention, gla",
        ),
        (ALONE + "mixers: [gla]\ntune: {learning_rate: [0.1]}\n", "tune.learning_rate: expected at least two"),
        (
            ALONE + "mixers: [gla]\nseeds: [3]\ntune: {learning_rate: [0.1, 0.2], seeds: [3]}\n",
            "tune.seeds and seeds must differ, got 3 in both",
        ),
        # options that are to be equal
        (
            ALONE + "mixers: [retention]\nequal: {short_cnv: 4}\n",
            'small.yaml:3: equal.short_cnv: no mixer has this option; did you mean "short_conv"?.*',
        ),
        (
            ALONE + "mixers: [retention]\nequal: {short_conv: wide}\n",
            "small.yaml:3: equal.short_conv: no mixer allows this value (keeps null: expected an integer",
        ),
        (
            ALONE + "mixers: [retention]\nvary: {equal.short_cnv: [4]}\n",
            "small.yaml:3: vary.equal.short_cnv: no mixer has this option",
        ),
        (
            ALONE + "mixers: [retention]\nvary: {equal.gate: [none]}\nequal: {gate: swish}\n",
            "vary changes equal.gate, but equal sets gate too",
        ),
        (
            ALONE + "mixers: [{kind: gla, n_heads: 2, short_conv: 3}]\nequal: {short_conv: 4}\n",
            "equal sets short_conv in all mixers, but mixers: gla sets it too",
        ),
        (
            ALONE + "entries: {a: {set: {model.blocks.ret.mixer.gate: none}}}\nequal: {gate: none}\n",
            "equal sets gate in all mixers, but entries.a sets it too",
        ),
        (
            ALONE + "mixers: [retention]\npaper: [{label: x, entry: retenton, theirs: 1.0}]\n",
            "'retenton'; did you mean \"retention\"? Entries: retention",
        ),
        # reading one may never end
        ("base: /dev/null\nmixers: [retention]\n", "/dev/null cannot be read: it is a pipe or device"),
        (ALONE + "entries: {a: {extends: /dev/null}}\n", "/dev/null cannot be read: it is a pipe or device"),
        # what would be changed twice, once in vain
        (
            ALONE + "entries: {a: {training: {learning_rate: 0.5}}}\ntune: {learning_rate: [0.1, 0.2]}\n",
            "entries.a has a learning rate",
        ),
        (
            ALONE + "mixers: [retention]\ntraining: {learning_rate: 0.5}\ntune: {learning_rate: [0.1, 0.2]}\n",
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
        # with file and line
        (
            ALONE + "mixers:\n- retention\n- atention\n",
            "small.yaml:4: model.blocks.ret.mixer.kind: unknown mixer kind 'atention'; did you mean \"attention\"?",
        ),
        (
            ALONE + "mixers:\n- retention\n- kind: attention\n  n_headz: 2\n",
            "small.yaml:5: model.blocks.ret.mixer.n_headz: unknown key 'n_headz'; did you mean \"n_heads\"?",
        ),
        (
            ALONE + "entries:\n  a:\n    set:\n      model.blocks.ret.mixer: {kind: atention}\n",
            "small.yaml:5: model.blocks.ret.mixer.kind: unknown mixer kind 'atention'",
        ),
        (
            ALONE + "entries:\n  a:\n    set:\n      model.blocks.ret.mixer.gat: none\n",
            "small.yaml:5: model.blocks.ret.mixer.gat: unknown key 'gat'; did you mean \"gate\"?",
        ),
        (ALONE + "entries: {a: {model: {n_layer: 2}}}\n", "small.yaml:2: model.n_layer: unknown key"),
        (
            ALONE + "entries:\n  a:\n    extends: retnet-tinny\n",
            "small.yaml:4: entries.a.extends: unknown preset 'retnet-tinny'; did you mean \"retnet-tiny\"?",
        ),
        ("base: retnet-tinny\nmixers: [gla]\n", "small.yaml:1: base: unknown preset 'retnet-tinny'"),
        (ALONE + "model: {n_layer: 2}\nmixers: [gla]\n", "small.yaml:2: model.n_layer: unknown key"),
        (ALONE + "mixers: [retention]\nvary: {data.sequence_lenth: [1]}\n", "small.yaml:3: data.sequence_lenth"),
        (ALONE + "mixers: [retention]\nmatch: {parameters: other, knob: n_layers}\n", "'other'"),
        (
            ALONE + "mixers: [retention]\nmatch: {parameters: 1000000, knob: n_layer}\n",
            "'n_layer'; did you mean \"n_layers\"? Allowed: ",
        ),
        (ALONE + "mixers: [retention]\nvary: {data.paths: [[a/b], [a_b]]}\n", "retention-pathsa_b-seed0"),
    ],
)
def test_invalid_studies_raise(written, study, said):
    file = written(study=study)
    with pytest.raises(SeqmixError) as error:
        plan(load_study(file), file)
    start, _, end = said.partition(".*")
    assert start in str(error.value)
    assert str(error.value).endswith(end.lstrip(", ") if end else "")


def test_study_is_found_by_path_or_name(written, tmp_path):
    assert find_study(str(written())) == tmp_path / "small.yaml"
    for name in shipped():
        assert find_study(name) == STUDIES / f"{name}.yaml"
    with pytest.raises(SeqmixError, match=r"no study 'recal': give a YAML file or one of .*recall"):
        find_study("recal")
    with pytest.raises(SeqmixError, match=r'the study .*smal\.yaml does not exist; did you mean "small\.yaml"\?'):
        find_study(str(tmp_path / "smal.yaml"))


@pytest.mark.parametrize("name", [name for name in shipped() if name.startswith("recipe-")])
def test_recipe_studies_hold_out_the_validation_text_of_their_preset(name):
    file = find_study(name)
    study = load_study(file)
    preset = load_config(study.base)
    assert name == f"recipe-{study.base}"
    for run in plan(study, file).runs:
        assert run.config.data.test_fraction == preset.data.validation_fraction
        assert run.config.data.validation_fraction > 0


# short-convolution has the entries of short-convolution-text
@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in shipped() if NIGHTLY or name != "short-convolution-text"])
def test_shipped_studies_can_be_planned(name):
    found = plan(load_study(STUDIES / f"{name}.yaml"), STUDIES / f"{name}.yaml")
    assert found.study.question
    assert found.runs


def test_entry_that_extends_a_preset_keeps_the_vocabulary_size_of_the_study(planned):
    (entry,) = planned(study="base: retnet-tiny\nmodel: {vocab_size: 300}\nentries: {a: {extends: gla-tiny}}\n").entries
    assert entry.config.model.vocab_size == 300
    assert entry.config.model.blocks.keys() == load_config("gla-tiny").model.blocks.keys()
    assert entry.config.training == load_config("retnet-tiny").training


def test_non_utf8_file_name_gives_a_printable_study_name(tmp_path):
    file = tmp_path / "caf\udce9.yaml"
    file.write_text(f"{UNMATCHED}mixers: [retention]\n")
    assert load_study(file).name == "caf\ufffd"
