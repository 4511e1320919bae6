"""Statistics of a comparison: one variance of all entries, intervals that hold together, and seeds that learn or not.

Simulations repeat a comparison of eight entries with three seeds many times, from a fixed seed, and count how often its
intervals cover and how often something is found that is not there.
"""

import subprocess
import sys
from statistics import fmean

import numpy as np
import pytest

from seqmix.lab.statistics.comparison import compare_contrasts, compare_pairs, compare_scores
from seqmix.lab.statistics.learned import (
    compare_learned,
    compare_steps,
    is_split,
    jeffreys,
    learning_steps,
)
from seqmix.lab.statistics.multiplicity import dunnett, t_quantile, tukey
from seqmix.lab.statistics.variance import estimate_variance
from seqmix.lab.study.comparisons import compare_accuracies

ENTRIES, SEEDS = 8, 3
NAMES = tuple("abcdefgh")
EQUAL = np.ones(ENTRIES)
DEVIATIONS = {
    "equal": (EQUAL, 0.06, 0.06),
    "up to three times as large": (np.geomspace(1, 3, ENTRIES), 0.06, 0.09),
    "up to ten times as large": (np.geomspace(1, 10, ENTRIES), 0.06, 0.08),
    "one six times as large": (np.array([*EQUAL[1:], 6.0]), 0.09, 0.1),
}
"""Standard deviations of the entries' scores in simulations, with the shares of families that may find something wrong:
among the differences from the subject, and among all pairs."""


def compare(scores, *, subject=None, higher=False, floor=1e-4, margin=None, incomplete=()):
    return compare_scores(
        scores, subject=subject, higher_is_better=higher, floor=floor, margin=margin, incomplete=incomplete
    )


# ---- one standard deviation of all entries


def test_variance_is_pooled_where_entries_vary_alike():
    scores = {"a": [1.0, 1.2], "b": [2.0, 2.1, 2.3], "c": [3.0]}
    found = estimate_variance(scores, 1e-4)
    pooled = (1 * np.var(scores["a"], ddof=1) + 2 * np.var(scores["b"], ddof=1)) / 3
    assert found.estimator == "pooled"
    assert found.deviations == pytest.approx(dict.fromkeys("abc", pooled**0.5))
    assert set(found.degrees.values()) == {3.0}
    assert found.sentence("nats").startswith("A seed's score has a standard deviation of 0.15 nats, pooled over 3 ent")


def test_variance_of_an_entry_that_varies_more_is_its_own():
    quiet = {name: [0.0, 0.01 * (1 + i), 0.02] for i, name in enumerate("abcde")}
    found = estimate_variance(quiet | {"wild": [0.0, 3.0, 1.0]}, 1e-4)
    assert found.estimator == "moderated"
    assert found.bartlett < 1e-3
    assert found.deviations["wild"] == pytest.approx(np.std([0.0, 3.0, 1.0], ddof=1))
    assert found.degrees["wild"] == 2
    assert found.deviations["a"] > np.std(quiet["a"], ddof=1)  # raised to what the others say
    assert found.degrees["a"] > 2
    assert "moderated by those of all 6 entries (empirical Bayes" in found.sentence("nats")


def test_seeds_that_agree_exactly_vary_as_much_as_a_score_is_measured():
    assert estimate_variance({"a": [0.5, 0.5], "b": [0.6, 0.6]}, 0.005).deviations == {"a": 0.005, "b": 0.005}
    assert estimate_variance({"a": [0.5], "b": [0.6]}, 0.005) is None


# ---- many comparisons


def test_critical_values_of_t_and_of_the_studentized_range_are_those_of_printed_tables():
    assert t_quantile(2) == pytest.approx(4.3027, abs=1e-4)
    assert tukey(4, 12) == pytest.approx(4.20 / 2**0.5, abs=0.005)


@pytest.mark.parametrize(("loading", "entries", "degrees"), [(0.5**0.5, 3, 10), (0.5**0.5, 7, 20), (0.4, 5, 6)])
def test_all_of_dunnetts_intervals_cover_in_95_percent_of_the_cases(loading, entries, degrees):
    from scipy.stats import multivariate_t

    correlation = np.full((entries, entries), loading**2) + (1 - loading**2) * np.eye(entries)
    bound = np.full(entries, dunnett([loading] * entries, degrees))
    joint = multivariate_t(shape=correlation, df=degrees, seed=0)
    assert joint.cdf(bound, lower_limit=-bound) == pytest.approx(0.95, abs=1e-3)


def test_dunnetts_intervals_are_those_of_scipy():
    from scipy.stats import dunnett as by_random_numbers

    rng = np.random.default_rng(0)
    samples = {name: list(rng.normal(i / 2, 1, 4)) for i, name in enumerate(NAMES[:5])}
    control, *others = samples.values()
    expected = by_random_numbers(*others, control=control, rng=np.random.default_rng(0))
    interval = expected.confidence_interval(0.95)
    found = compare(samples, subject="a")
    assert found.variance.estimator == "pooled"
    for i, name in enumerate(NAMES[1:5]):
        ours = found.differences[name]
        assert (ours.low, ours.high) == pytest.approx((interval.low[i], interval.high[i]), abs=0.02)


def test_text_study_of_37_mixers_has_the_intervals_of_its_reference():
    # a standard deviation of 0.0206 on 72 degrees of freedom: against one of them, and of all pairs
    error = 0.0206 * (2 / 3) ** 0.5
    assert dunnett([0.5**0.5] * 36, 72) * error == pytest.approx(0.053, abs=5e-4)
    assert tukey(37, 72) * error == pytest.approx(0.067, abs=1e-3)


def test_contrasts_share_one_correction():
    scores = {"a": [1.0, 1.2, 1.1], "b": [2.0, 2.1, 2.3], "c": [3.3, 3.1, 3.2]}
    change = {"change": {"a": 1.0, "b": -2.0, "c": 1.0}, "ends": {"c": 1.0, "a": -1.0}}
    found = compare_contrasts(scores, change, higher_is_better=False, floor=1e-4)
    deviation = fmean(np.var(each, ddof=1) for each in scores.values()) ** 0.5
    half = t_quantile(6, 1 - 0.025 / 2) * deviation * (6 / 3) ** 0.5
    assert found["change"].mean == pytest.approx(1.1 - 2 * fmean(scores["b"]) + 3.2)
    assert found["change"].high - found["change"].mean == pytest.approx(half)
    assert found["ends"].verdict == "worse"
    assert compare_pairs({"a": [1.0], "b": [2.0]}, [("a", "b")], higher_is_better=True, floor=1e-4) == {}


# ---- verdicts


def test_difference_within_the_declared_margin_is_equivalent():
    scores = {"a": [1.0, 1.01, 0.99], "b": [1.005, 1.0, 1.01], "c": [1.5, 1.51, 1.49]}
    verdicts = {margin: compare(scores, subject="a", margin=margin).differences for margin in (None, 0.05, 0.005)}
    assert [verdicts[margin]["b"].verdict for margin in verdicts] == ["not separated", "equivalent", "not separated"]
    assert {found["c"].verdict for found in verdicts.values()} == {"worse"}


def test_almost_all_right_three_times_is_not_worse_than_all_right():
    found = compare_accuracies({"ours": [1.0, 1.0, 1.0], "theirs": [0.9995, 0.9995, 0.9995]}, subject="ours")
    assert found.differences["theirs"].verdict == "not separated"


def test_entry_with_a_wide_interval_is_not_ranked_above_a_sure_one():
    # 84 with an interval of 64 points against 97: one seed learned little
    found = compare_accuracies({"wide": [0.99, 0.98, 0.55], "sure": [0.97, 0.98, 0.96]}, subject="sure")
    assert found.differences["wide"].verdict == "not separated"
    assert found.ranks == {"wide": (1, 2), "sure": (1, 2)}
    assert found.counts["wide"].learned == 2


def test_entry_with_failed_seeds_has_a_mean_but_no_verdict():
    scores = {"a": [1.0, 1.1, 1.2], "b": [0.1], "c": [2.0, 2.1, 2.2]}
    found = compare(scores, subject="a", incomplete=["b"])
    assert found.means["b"] == 0.1
    assert found.differences.keys() == {"c"}
    assert found.ranks == {"a": (1, 1), "c": (2, 2)}
    assert not compare(scores, subject="b", incomplete=["b"]).differences


def test_one_seed_each_has_no_interval():
    found = compare({"a": [1.0], "b": [2.0]}, subject="a")
    assert (found.variance, found.differences, found.ranks, found.pairs) == (None, {}, {}, {})
    assert found.means == {"a": 1.0, "b": 2.0}


# ---- tasks that are learned or not


def test_scores_are_split_where_seeds_of_one_entry_learn_and_fail():
    assert is_split({"a": [0.99, 0.1]})
    assert not is_split({"a": [0.99, 0.98], "b": [0.1, 0.2]})
    assert not is_split({"a": [0.92, 0.88]})  # both sides of the threshold, but close


def test_jeffreys_interval_is_that_of_a_beta_distribution_with_closed_ends():
    from scipy.stats import beta

    assert jeffreys(3, 7) == pytest.approx(beta.ppf([0.025, 0.975], 3.5, 4.5))
    low, high = jeffreys(3, 3)
    assert (round(low, 2), high) == (0.46, 1.0)
    assert jeffreys(0, 3) == pytest.approx((0.0, 1 - low))


def test_five_seeds_against_none_are_told_apart_and_three_are_not():
    five = compare_learned({name: [1.0] * 5 if name == "a" else [0.0] * 5 for name in NAMES[:7]}, subject="a")
    assert {each.verdict for each in five.differences.values()} == {"worse"}
    three = compare_learned({"a": [1.0] * 3, "b": [0.0] * 3, "c": [0.0] * 3}, subject="a")
    assert {each.verdict for each in three.differences.values()} == {"not separated"}


def test_learning_takes_the_steps_after_which_accuracy_stays():
    assert learning_steps([(10, 0.5), (20, 0.95), (30, 0.99)]) == 20
    assert learning_steps([(10, 0.95), (20, 0.5), (30, 0.99)]) == 30
    assert learning_steps([(10, 0.95), (20, 0.5)]) is None


def test_steps_to_learn_are_compared_with_seeds_that_did_not_learn():
    steps = {"a": [100, 120, 110, 130, 105], "b": [400, None, 390, None, 380], "c": [115, 125, 100, 110, 120]}
    found = compare_steps(steps, 400, "a")
    assert found["b"] < 0.05 < found["c"]
    assert compare_steps({"a": [None, None], "b": [None]}, 400, "a") == {"b": 1.0}


# ---- how often this is right


def simulated(deviations, repeats, *, means=0.0, seed=0):
    rng = np.random.default_rng(seed)
    draws = means + deviations[:, None] * rng.standard_normal((repeats, ENTRIES, SEEDS))
    return ({name: list(each) for name, each in zip(NAMES, draw, strict=True)} for draw in draws)


@pytest.mark.slow
@pytest.mark.parametrize("spread", DEVIATIONS)
def test_intervals_of_normal_scores_cover_as_often_as_they_say(spread):
    """Coverage of intervals of means; wrong findings, where all entries are equal, among differences and all pairs."""
    deviations, most, most_pairs = DEVIATIONS[spread]
    repeats = 2000
    covered, wrong, wrong_pairs = [], 0, 0
    for scores in simulated(deviations, repeats):
        found = compare(scores, subject="a")
        covered += [abs(found.means[name]) <= margin for name, margin in found.margins.items()]
        wrong += any(each.verdict != "not separated" for each in found.differences.values())
        wrong_pairs += any(each.verdict != "not separated" for each in found.pairs.values())
    assert 0.93 <= fmean(covered) <= 0.97
    assert wrong / repeats <= most
    assert wrong_pairs / repeats <= most_pairs


@pytest.mark.slow
def test_difference_of_four_standard_deviations_is_found_in_four_of_five_cases():
    means = np.array([4.0, *[0.0] * (ENTRIES - 1)])[:, None]
    repeats = 400
    power = [
        each.verdict == "better"
        for scores in simulated(EQUAL, repeats, means=means)
        for each in compare(scores, subject="a").differences.values()
    ]
    assert fmean(power) >= 0.8


@pytest.mark.slow
@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("seeds", [3, 5, 12])
def test_intervals_of_learning_cover_at_least_nine_times_in_ten(probability, seeds):
    rng = np.random.default_rng(0)
    learned = rng.binomial(seeds, probability, 20_000)
    intervals = np.array([jeffreys(k, seeds) for k in range(seeds + 1)])[learned]
    assert ((intervals[:, 0] <= probability) & (probability <= intervals[:, 1])).mean() >= 0.9


@pytest.mark.slow
@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_entries_that_learn_equally_often_are_rarely_told_apart(probability):
    rng = np.random.default_rng(0)
    repeats = 1000
    wrong = 0
    for draws in rng.random((repeats, ENTRIES, 5)) < probability:
        found = compare_learned(
            {name: list(map(float, each)) for name, each in zip(NAMES, draws, strict=True)}, subject="a"
        )
        wrong += any(each.verdict != "not separated" for each in found.differences.values())
    assert wrong / repeats <= 0.06


def test_library_starts_without_scipy():
    code = "import sys, seqmix, seqmix.models; sys.exit('scipy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
