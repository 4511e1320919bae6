"""Commands as programs drive them: exit statuses by cause, and no questions."""

import pytest
from conftest import SMALL

TEXT = "data.paths=[text.txt]"


@pytest.mark.parametrize(
    ("status", "arguments", "sentence"),
    [
        (2, ("train", "retnet-tniy"), 'did you mean "retnet-tiny"?'),
        (2, ("train", "retnet-tiny", "model.n_layers=0"), "model.n_layers"),
        (2, ("train", "retnet-tiny", "--budget", "soon"), "expected a duration such as 90s, 30m or 1h30m"),
        (3, ("train", "retnet-tiny", *SMALL, "data.paths=[texts.txt]"), "the corpus texts.txt does not exist"),
        (3, ("train", "--resume", "nothere"), "nothere is not a run directory"),
        (3, ("generate", "nothere"), "nothere is not a run directory: it does not exist"),
        (3, ("evaluate", "nothere"), "nothere is not a run directory"),
        (3, ("average", "nothere", "--to", "new"), "nothere is not a run directory"),
        (3, ("plot", "nothere"), "nothere"),
        (5, ("train", "retnet-tiny", *SMALL, TEXT, "model.d_model=1048576"), "out of memory"),
    ],
)
def test_the_exit_status_says_the_cause(refused, status, arguments, sentence):
    assert sentence in refused(*arguments, status=status)


def test_divergence_has_its_own_status(seqmix):
    done = seqmix("train", "retnet-tiny", *SMALL, TEXT, "training.learning_rate=1.0e+30", "training.warmup_steps=0")
    assert (done.status, done.err.count("\n")) == (4, 1)
    assert "try a lower training.learning_rate" in done.err
