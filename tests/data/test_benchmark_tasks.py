"""Tasks of published benchmarks: independent programs check every label of a thousand examples.

Each program returns all labels of an example, so missing labels are found as well as wrong ones.
"""

import re
from collections.abc import Callable

import numpy as np
import pytest
import torch

from seqmix import ConfigError, build_model, load_config
from seqmix.data import DATA
from seqmix.data.source import blank
from seqmix.data.task import Task
from seqmix.lab.suite.tasks import FOLDER, Extent, base_of, load_settings
from seqmix.mixers import ContractError
from seqmix.models import IGNORED

Labels = dict[int, int]


def recall(tokens: list[int], half: int) -> Labels:
    found: Labels = {}
    for i in range(0, len(tokens), 2):
        earlier = [j for j in range(0, i, 2) if tokens[j] == tokens[i] < half]
        if earlier:
            found[i] = tokens[earlier[-1] + 1]
    return found


def fuzzy(tokens: list[int]) -> Labels:
    """Keys are letters a to g, values A to H, and x pads; the last token of the last value is not shown."""
    text = "".join("abcdefgABCDEFGHx"[token] for token in tokens)
    pairs = list(re.finditer("([a-g]+)([A-H]*)", text))
    found: Labels = {}
    for i, pair in enumerate(pairs):
        for earlier in pairs[:i]:
            if earlier[1] == pair[1]:
                found |= {pair.end(1) - 1 + j: 7 + "ABCDEFGH".index(c) for j, c in enumerate(earlier[2])}
                break
    return found


def selective(tokens: list[int]) -> Labels:
    head = tokens[: tokens.index(15)]
    symbols = [token for token in head if token]
    assert len(tokens) - len(head) - 1 == len(symbols) == 16
    assert head[-1] != 0 == sum(tokens[len(head) + 1 :])
    return {len(head) + 1 + i: symbol for i, symbol in enumerate(symbols)}


def mqar(tokens: list[int]) -> Labels:
    pairs = {tokens[i]: tokens[i + 1] for i in range(0, 32, 2)}
    return {tokens.index(key, 32): value for key, value in pairs.items()}


def forgetting(tokens: list[int]) -> Labels:
    first, last = ({tokens[i]: tokens[i + 1] for i in range(0, end, 2)} for end in (24, 32))
    assert len(first) == len(last) == 12
    assert sum(first[key] != last[key] for key in first) == 4
    return {tokens.index(key, 32): value for key, value in last.items()}


def compositional(tokens: list[int]) -> Labels:
    values = {(tokens[i], tokens[i + 1]): tokens[i + 2] for i in range(0, 27, 3)}
    assert [len({key[part] for key in values}) for part in (0, 1)] == [3, 3]
    assert len({*values.values()}) == 9
    return {i + 1: values[tokens[i], tokens[i + 1]] for i in range(27, 59) if (tokens[i], tokens[i + 1]) in values}


def parity(tokens: list[int]) -> Labels:
    return {i: str(tokens[: i + 1]).count("1") % 2 for i in range(len(tokens))}


def arithmetic(tokens: list[int], *, every: bool) -> Labels:
    text = "".join("01234+-*()="[token] for token in tokens).partition("=")[0]
    ends = range(1, len(text) + 1, 2) if every else ()
    return {len(text): eval(text) % 5} | {end - 1: eval(text[:end]) % 5 for end in ends}


def listops(tokens: list[int]) -> Labels:
    """Innermost lists are replaced by their values until nothing but a digit is left."""
    names = [*"0123456789", "[MIN ", "[MAX ", "[MED ", "[SM ", "]", ""]
    text = re.sub("(?<=[0-9]])(?=[0-9[])", " ", "".join(f"{names[t]} " if t < 10 else names[t] for t in tokens))
    assert text.count("[") == text.count("]") > 0
    end = len([t for t in tokens if t < 15])
    assert 16.5 < end <= 33
    while "[" in text:
        text = re.sub(r"\[(MIN|MAX|MED|SM) ([0-9 ]+)\]", lambda found: f"{listed(*found.groups())} ", text)
    return {end - 1: int(text)}


def listed(name: str, digits: str) -> int:
    values = sorted(map(int, digits.split()))
    n = len(values)
    assert 2 <= n <= 5
    middle = (values[(n - 1) // 2] + values[n // 2]) // 2
    return {"MIN": values[0], "MAX": values[-1], "MED": middle, "SM": sum(values) % 10}[name]


def ruler(tokens: list[int], task: str) -> Labels:
    text = "".join(map(chr, tokens)).rstrip("\0")
    *lines, question = text.split("\n")
    asked, _, _ = question.partition(": ")
    if task.startswith("niah"):
        key = re.search("for ([-0-9a-z]+) mentioned", asked)
        assert key
        (answer,) = (line.split()[-1].strip(".") for line in lines if f" {key[1]} " in line)
        others = {line for line in lines if f" {key[1]} " not in line}
        assert (len(others) == 1) == (task == "niah_single_1")
        assert len(answer) == (36 if task == "niah_multikey_3" else 7)
    elif task == "vt":
        chain = [line.split() for line in lines if line.startswith("VAR")]
        number = asked.split()[-1]
        assert [line[3:] for line in chain] == [[number], *(["VAR", line[1]] for line in chain[:-1])]
        assert len({line for line in lines if "VAR" not in line}) == 1
        answer = " ".join(line[1] for line in chain)
    else:
        (line,) = lines
        words = [word for word in line.split() if word.isalpha()]
        counts = {word: words.count(word) for word in words}
        ranked = sorted(counts, key=lambda word: -counts[word])
        best = ranked[: 10 if task == "cwe" else 3]
        assert counts[best[-1]] > counts[ranked[len(best)]]
        if task == "cwe":
            assert line.split()[::2] == [str(n) for n in range(1, len(words) + 1)]
            assert [counts[word] for word in ranked] == [6] * 10 + [1] * (len(ranked) - 10)
        answer = " ".join(sorted(best) if task == "cwe" else best)
    start = len(text) - len(answer)
    assert question.startswith(f"{asked}: {answer[:-1]}")
    assert start < 1100
    return {start + i: ord(letter) for i, letter in enumerate(answer)}


RULER = ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "vt", "cwe", "fwe")
CASES: list[tuple[str, dict, Callable[[list[int]], Labels]]] = [
    ("in_context_recall", {"sequence_length": 128}, lambda tokens: recall(tokens, 8)),
    ("in_context_recall", {"sequence_length": 128, "noise_tokens": 16}, lambda tokens: recall(tokens, 8)),
    ("fuzzy_recall", {"sequence_length": 128}, fuzzy),
    ("selective_copying", {"sequence_length": 256, "symbols": (16,), "layout": "mad"}, selective),
    ("mqar", {"sequence_length": 64, "pairs": (16,), "vocab_size": 8192, "noise": False}, mqar),
    ("forgetting_mqar", {"pairs": (12,), "vocab_size": 8192, "noise": False}, forgetting),
    ("compositional_mqar", {"sequence_length": 60, "pairs": (9,), "noise": False}, compositional),
    ("parity", {"sequence_length": 64}, parity),
    ("compression", {}, lambda tokens: {i: int(str(token)) for i, token in enumerate(tokens)}),
    ("listops", {"sequence_length": 45, "lengths": (33,)}, listops),
    *(
        ("ruler", {"sequence_length": 1100, "task": task}, lambda tokens, task=task: ruler(tokens, task))
        for task in RULER
    ),
    ("modular_arithmetic", {"ask": "every"}, lambda tokens: arithmetic(tokens, every=True)),
    ("modular_arithmetic", {"brackets": True}, lambda tokens: arithmetic(tokens, every=False)),
]


def thousand(kind: str, fields: dict) -> list[tuple[list[int], Labels]]:
    """Examples as an evaluation has them, and their labels."""
    config = DATA.resolve(kind)(**fields)
    inputs, targets = blank(1000, config.sequence_length)
    Task(config).fill(np.random.default_rng(5), inputs, targets, config.difficulties[-1], validation=True)
    labels = [{i: t for i, t in enumerate(row) if t != IGNORED} for row in targets.tolist()]
    return list(zip(inputs.tolist(), labels, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "fields", "program"), CASES, ids=lambda value: value if isinstance(value, str) else ""
)
def test_labels_of_a_thousand_examples_match_an_independent_program(kind, fields, program):
    for tokens, labels in thousand(kind, fields):
        assert program(tokens) == labels


@pytest.mark.parametrize(("group", "size", "commutes"), [
    ("S3", 6, False), ("S5", 120, False), ("A5", 60, False), ("A4xZ5", 60, False), ("Z60", 60, True),
])  # fmt: skip
def test_permutation_labels_follow_the_group_multiplication(group, size, commutes):
    config = DATA.resolve("permutation")(group=group, sequence_length=20)
    assert config.n_tokens == size
    examples = thousand("permutation", {"group": group, "sequence_length": 20})
    # the multiplication table as the labels tell it, without the generator's: label before, token, label after
    table: dict[tuple[int, int], int] = {}
    for tokens, labels in examples:
        assert sorted(labels) == list(range(20))
        for before, token, after in zip([0, *labels.values()], tokens, labels.values(), strict=False):
            assert table.setdefault((before, token), after) == after
    # it is that of a group with this number of elements, which is associative and commutes or not
    known = [(a, b, c) for a, b in list(table)[:3000] for c in range(0, size, 7)]
    for a, b, c in known:
        if (b, c) in table and (table[a, b], c) in table and (a, table[b, c]) in table:
            assert table[table[a, b], c] == table[a, table[b, c]]
    assert all(table[0, a] == a == table[a, 0] for a in range(size) if (a, 0) in table and (0, a) in table)
    pairs = [(a, b) for a, b in table if (b, a) in table]
    assert all(table[a, b] == table[b, a] for a, b in pairs) == commutes
    # how often an element must be applied until nothing has changed tells these groups apart
    orders = {order(table, a) for a in range(size)} - {0}
    wanted = {"S3": {1, 2, 3}, "S5": {1, 2, 3, 4, 5, 6}, "A5": {1, 2, 3, 5}, "A4xZ5": {1, 2, 3, 5, 10, 15}}
    assert orders == wanted.get(group, {n for n in range(1, 61) if 60 % n == 0})


def order(table: dict[tuple[int, int], int], a: int) -> int:
    """The order of an element; 0 if the examples do not show it."""
    power, count = a, 1
    while power and (power, a) in table:
        power, count = table[power, a], count + 1
    return 0 if power else count


def test_memorized_facts_are_one_to_one_and_shared_across_splits():
    facts: dict[int, set[int]] = {}
    for tokens, labels in thousand("memorization", {}):
        assert tokens[1::2] == [255] * 16
        assert list(labels) == list(range(1, 32, 2))
        for place, value in labels.items():
            facts.setdefault(tokens[place - 1], set()).add(value)
    assert facts.keys() == set(range(127))
    assert {len(values) for values in facts.values()} == {1}
    assert len(set.union(*facts.values())) == 127
    assert min(set.union(*facts.values())) >= 127
    batch = Task(DATA.resolve("memorization")()).training_batch(0, 64, seed=9)
    assert all(
        facts[key] == {value}
        for key, value in zip(batch.inputs[:, 0].tolist(), batch.targets[:, 1].tolist(), strict=True)
    )


def test_mad_recall_tasks_have_the_documented_token_shares():
    plain, noisy = (np.array([t for t, _ in thousand("in_context_recall", {"noise_tokens": n})]) for n in (0, 16))
    assert (plain[:, 0::2].max(), plain[:, 1::2].min(), plain.max()) == (7, 8, 15)
    assert np.bincount(plain[:, 0], minlength=8).min() > 80
    assert (noisy[:, 0:-2:2] >= 16).mean() == pytest.approx(0.2 * 62 / 63, abs=0.01)
    assert ((noisy[:, 0::2] >= 16) == (noisy[:, 1::2] >= 16)).all()
    assert noisy[:, -2].max() < 8
    # keys of evaluations have three tokens, those of training one to three, and values one to three in both
    config = DATA.resolve("fuzzy_recall")()
    for training, lengths in ((True, {1, 2, 3}), (False, {3})):
        inputs, targets = blank(300, 128)
        Task(config).fill(np.random.default_rng(0), inputs, targets, 3, validation=not training)
        texts = ["".join("kkkkkkkvvvvvvvv "[token] for token in row) for row in inputs.tolist()]
        assert {len(run) for text in texts for run in re.findall("k+", text)} == lengths
        assert {len(run) for text in texts for run in re.findall("v+", text)} == {1, 2, 3}


@pytest.mark.parametrize("kind", ["in_context_recall", "fuzzy_recall"])
def test_mad_trains_on_every_token_and_evaluates_only_answers(kind):
    config = DATA.resolve(kind)(train_on="every_token")
    inputs, targets = Task(config).training_batch(0, 8, seed=0)
    assert (targets[:, :-1] == inputs[:, 1:]).all()
    (examples, *_) = Task(config).evaluation_batches(8, 1)
    assert 0 < (examples.batch.targets != IGNORED).float().mean() < 0.6


def test_compression_sequences_end_with_a_reserved_token():
    tokens = np.array([tokens for tokens, _ in thousand("compression", {})])
    assert (tokens[:, -1] == 15).all()
    assert np.bincount(tokens[:, :-1].ravel(), minlength=16)[:15].std() < 90
    assert tokens[:, :-1].max() == 14


def test_training_set_batches_are_reordered_between_epochs():
    task = Task(DATA.resolve("parity")(training_examples=35))
    epochs = [[task.training_batch(3 * e + i, 10, seed=1).inputs.numpy().tobytes() for i in range(3)] for e in range(4)]
    assert len({batch for epoch in epochs for batch in epoch}) == len(set(epochs[0])) == 3
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert task.training_batch(0, 10, seed=2).inputs.numpy().tobytes() not in epochs[0]


def test_mad_blanks_are_spread_evenly_between_symbols():
    inputs = np.array([tokens for tokens, _ in thousand("selective_copying", dict(CASES[3][1]))])
    places = np.nonzero(inputs[:, :239])[1].reshape(1000, 16)
    gaps = np.diff(places, axis=1, prepend=-1) - 1
    assert gaps.mean(0) == pytest.approx(np.full(16, 223 / 16), abs=0.6)


@pytest.mark.parametrize(
    ("kind", "fields", "named"),
    [
        ("in_context_recall", {"keys": (9,)}, "keys .*at most 8, half of vocab_size 16, got 9"),
        ("fuzzy_recall", {"key_lengths": (8,)}, "vocab_size 17 .*16"),
        ("memorization", {"facts": (128,)}, "facts .*127, .*vocab_size 256, got 128"),
        ("permutation", {"group": "S6xZ2"}, "720 elements, got 1,440 in S6xZ2"),
        ("permutation", {"group": "D4"}, "group"),
    ],
    ids=str,
)
def test_impossible_task_config_is_refused(kind, fields, named):
    with pytest.raises(ValueError, match=named):
        DATA.resolve(kind)(**fields)


def test_compression_model_decodes_from_the_last_vector_only():
    settings = load_settings("small")
    config = base_of(settings, settings.tasks["compression"], Extent(steps=0.01))
    model, tokens = build_model(config.model), Task(config.data).training_batch(0, 2, seed=0).inputs
    x = model.embed(tokens)
    for block in model.blocks:
        x = block(x).y
    # whatever the others are
    others = torch.cat((torch.randn_like(x[:, :-1]), x[:, -1:]), dim=1)
    assert model.readout is not None
    assert torch.equal(model.logits(model.readout(others)), model(tokens).logits)
    assert len({row.numpy().tobytes() for row in model(tokens).logits[0].detach()}) == 16  # places differ
    with pytest.raises(ContractError, match="turn off states"):
        model(tokens, return_state=True)
    for change in ("model.readout=each", "data={kind: parity}"):
        with pytest.raises(ConfigError, match=r"needs model\.readout"):
            load_config(FOLDER / "base.yaml", ["model.readout=last", "data={kind: compression}", change])
