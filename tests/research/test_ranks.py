"""Rank statistics, compared with hand-computed values and published tables."""

import math

import numpy as np
import pytest

from seqmix.research.published_ranks import ranks
from seqmix.research.published_ranks.ranks import Column


def test_equal_values_share_the_mean_of_their_ranks():
    assert ranks.midranks([30, 10, 30, 20]).tolist() == [3.5, 1, 3.5, 2]
    assert ranks.midranks([[7, 7, 7], [3, 2, 1]]).tolist() == [[2, 2, 2], [3, 2, 1]]


def test_rho_matches_hand_computation():
    # without ties, 1 - 6 sum(d^2) / (n (n^2 - 1)): d = 1, 1, 0, 0, 0
    assert ranks.spearman([1, 2, 3, 4, 5], [2, 1, 3, 4, 5]) == pytest.approx(1 - 6 * 2 / (5 * 24))
    # mid-ranks 1, 2.5, 2.5, 4 against 1, 3, 2, 4: 4.5 / sqrt(4.5 * 5)
    assert ranks.spearman([1, 2, 2, 4], [1, 3, 2, 4]) == pytest.approx(4.5 / math.sqrt(22.5))
    assert ranks.spearman([1, 2, 3], [0.3, 0.2, 0.1]) == pytest.approx(-1)
    assert math.isnan(ranks.spearman([1, 1, 1], [1, 2, 3]))


@pytest.mark.parametrize(("n", "rho"), [(5, 0.900), (6, 0.829), (7, 0.714), (8, 0.643), (10, 0.564)])
def test_critical_values_match_published_tables(n, rho):
    assert ranks.critical_rho(n) == pytest.approx(rho, abs=0.013 if n > ranks.EXACT else 0.001)


def test_three_entries_are_too_few_for_significance():
    assert ranks.critical_rho(3) is None
    assert ranks.detectable_rho(3) is None
    assert ranks.critical_rho(4) == pytest.approx(1)


def test_p_value_is_the_fraction_of_permutations_at_least_as_correlated():
    # one of the 24 orders of four entries is as good as the best, four are as good as one exchange of neighbours
    assert ranks.permutation_p([1, 2, 3, 4], [1, 2, 3, 4]) == pytest.approx(1 / 24)
    assert ranks.permutation_p([1, 2, 4, 3], [1, 2, 3, 4]) == pytest.approx(4 / 24)
    assert ranks.permutation_p([4, 3, 2, 1], [1, 2, 3, 4]) == 1
    # random orders: never 0
    assert ranks.permutation_p(range(12), range(12), draws=99) == pytest.approx(1 / 100)


def test_more_entries_detect_weaker_correlations():
    found = [ranks.detectable_rho(n) for n in (5, 7, 10)]
    assert found == sorted(found, reverse=True)
    assert 0.7 < found[-1] < 0.8


def test_holm_correction_matches_known_values():
    assert ranks.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert ranks.holm([0.5, 0.9]) == [1, 1]


def column(paper, values, index=None):
    return Column(paper, np.arange(len(values)) if index is None else np.array(index), np.array(values, dtype=float))


def test_papers_are_pooled_with_weights_by_entry_count():
    x = np.arange(5.0)
    four, five = column("a", [1, 2, 3, 4]), column("b", [5, 4, 3, 2, 1])
    assert ranks.pooled(x, [four, five]) == pytest.approx((3 * 1 - 4 * 1) / 7)
    # two columns of one paper count as one paper: its rho is 0
    assert ranks.pooled(x, [four, column("a", [4, 3, 2, 1]), five]) == pytest.approx(-4 / 7)
    # a column of other entries, and a predictor without spread among them
    assert ranks.pooled(x, [column("c", [1, 3, 2], [4, 2, 0])]) == pytest.approx(-0.5)
    assert ranks.pooled(np.array([1.0, 1, 1, 2, 3]), [column("c", [1, 2, 3], [0, 1, 2])]) == 0


def test_counts_are_equivalent_to_repeated_entries():
    rng = np.random.default_rng(0)
    x, y, counts = rng.integers(3, size=8), rng.normal(size=8), rng.integers(4, size=8)
    assert ranks.spearman(x, y, counts) == pytest.approx(ranks.spearman(np.repeat(x, counts), np.repeat(y, counts)))
    assert np.isnan(ranks.spearman(x, y, np.eye(8)[0]))
    columns = [column("a", y[:5]), column("b", y[3:], [3, 4, 5, 6, 7])]
    assert ranks.pooled(x, columns, np.ones(8)) == ranks.pooled(x, columns)
    assert ranks.pooled(x, columns, np.eye(8)[0]) == 0


def test_pooled_intervals_resample_mixers_and_seeds():
    x = np.array([np.arange(9.0)])
    agreeing = [column(name, range(9)) for name in "ab"]
    assert ranks.pooled_interval(x[None], agreeing) == (1, 1)
    mixed = [*agreeing, column("c", range(9, 0, -1))]
    assert ranks.pooled_interval(x[None], mixed) == pytest.approx((1 / 3, 1 / 3))  # the papers stay
    partly = [column("a", [1, 0, 2, 3, 4, 6, 5, 7, 8])]
    low, high = ranks.pooled_interval(x[None], partly)
    assert low < ranks.pooled(x[0], partly) < high == 1
    # seeds that rank in opposite orders: a draw has either, or a tie of all entries
    assert ranks.pooled_interval(np.array([[x[0], -x[0]]]), agreeing) == (-1, 1)


def test_two_correlations_are_compared_on_the_same_resampled_mixers():
    x = np.arange(9.0)
    columns = [column("a", range(9)), column("b", [1, 0, 2, 3, 4, 6, 5, 7, 8])]
    assert ranks.pooled_interval(x[None, None], columns, minus=x) == (0, 0)
    assert ranks.pooled_interval(x[None, None], columns[:1], minus=-x) == (2, 2)


def test_rho_interval_of_a_column_contains_its_rho():
    rng = np.random.default_rng(1)
    by_seed = np.arange(8) + rng.normal(size=(3, 8))
    published = column("a", range(8))
    low, high = ranks.rho_interval(by_seed[None], published)
    assert -1 <= low < ranks.spearman(by_seed.mean(0), published.values) <= high <= 1
    assert ranks.rho_interval(np.ones((1, 2, 4)), column("a", range(4))) is None


def test_seed_means_within_one_percent_tie_in_any_order():
    seeds = np.array([[0.27, 0.31, 0.2], [0.31, 0.04, 0.2], [0.04, 0.27, 0.23]])
    assert len(set(seeds.mean(0))) == 3  # sums of floats depend on the order
    assert ranks.combined(seeds[None]).tolist() == [0, 0, 0]
    # two tasks tie where their z-scores cancel out, and less than a percent counts in neither of them alone
    both = np.stack([[[0.1, 0.5, 0.9]], [[0.904, 0.5, 0.096]]])
    assert ranks.midranks(ranks.combined(both)).tolist() == [2, 2, 2]
    assert ranks.midranks([0.1 + 0.2, 0.3]).tolist() == [1.5, 1.5]


def test_entries_absent_from_all_columns_do_not_lower_p_values():
    # one entry has all right, all others are equal: it is the best of six in 1 of 6 shuffles, whoever else is there
    columns = [column("a", range(6)), column("b", range(6))]
    for others in (0, 30):
        scores = np.zeros(6 + others)
        scores[5] = 1
        assert ranks.pooled_p(scores, columns) == pytest.approx(1 / 6, abs=0.03)


def test_shuffled_scores_have_uniform_p_values():
    rng = np.random.default_rng(2)
    columns = [column("a", range(6)), column("b", [2, 0, 1, 4, 3], [1, 3, 5, 7, 0])]
    p_values = [ranks.pooled_p(rng.permutation(8.0 * np.arange(8)), columns, draws=200) for _ in range(100)]
    assert 0.4 < np.mean(p_values) < 0.6
    assert np.mean(np.array(p_values) <= 0.1) < 0.2
    assert ranks.critical_pooled(columns) < 0.9
