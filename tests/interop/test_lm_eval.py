"""The lm-eval harness on seqmix models: three local tasks (choices, rolling likelihood, generation), offline."""

import json
import os
import shutil
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from small_runs import refusal, run_of

from seqmix import Sampling, build_model, generate_text, load_config

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}  # read when the libraries are imported
TASKS = Path(__file__).parents[1] / "data" / "lm_eval"
NAMES = ("tiny_choice", "tiny_rolling", "tiny_generation")


@pytest.fixture
def harness(tmp_path, monkeypatch):
    """The module, in a folder with the tasks and their data."""
    pytest.importorskip("lm_eval")
    from seqmix.interop import lm_eval as harness

    shutil.copytree(TASKS, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return harness


@pytest.fixture(scope="module")
def model():
    small = ["model.d_model=16", "model.n_layers=2", "model.blocks.ret.mixer.n_heads=2"]
    return build_model(load_config("retnet-tiny", small).model, seed=0).double().eval()


def documents(name: str) -> list[dict]:
    return [json.loads(line) for line in (TASKS / f"{name}.jsonl").read_text().splitlines()]


@torch.no_grad()
def log_likelihood(model, context: str, continuation: str) -> float:
    """Of a continuation, by one pass over everything."""
    tokens, given = model.tokenizer.encode(context + continuation), len(model.tokenizer.encode(context))
    targets = tokens[None, 1:].clone()
    targets[:, : given - 1] = -100
    return -model(tokens[None, :-1], targets=targets, reduction="sum").loss.item()


def test_scores_match_plain_forward_passes(harness, model):
    found = harness.evaluate_tasks(model, NAMES, include_path=".", batch_size=3)
    chosen, by_length = [], []
    for doc in documents("choice"):
        scores = torch.tensor([log_likelihood(model, doc["question"], f" {choice}") for choice in doc["choices"]])
        lengths = torch.tensor([len(choice) for choice in doc["choices"]])
        chosen.append(float(scores.argmax() == doc["answer"]))
        by_length.append(float((scores / lengths).argmax() == doc["answer"]))
    assert found["tasks"]["tiny_choice"]["acc"] == sum(chosen) / 4
    assert found["tasks"]["tiny_choice"]["acc_norm"] == sum(by_length) / 4
    texts = [doc["text"] for doc in documents("rolling")]
    nats = -sum(log_likelihood(model, "", text) for text in texts) / sum(map(len, texts))
    assert found["tasks"]["tiny_rolling"]["byte_perplexity"] == pytest.approx(2.718281828459045**nats, rel=1e-9)


def test_scores_match_the_hugging_face_wrapper(harness, model):
    pytest.importorskip("accelerate")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import make_table

    from seqmix.interop.hf import SeqmixForCausalLM, hf_tokenizer

    manager = TaskManager(include_path=".", include_defaults=False)
    wrapped, tokenizer = SeqmixForCausalLM.wrap(model), hf_tokenizer(model.tokenizer)
    for names, options in (
        (["tiny_choice", "tiny_generation"], {}),
        # theirs puts a begin token before the text, and the tokenizer would put another one
        (["tiny_rolling"], {"add_bos_token": False}),
    ):
        theirs = HFLM(pretrained=wrapped, tokenizer=tokenizer, batch_size=2, max_length=2048, **options)
        found = [
            simple_evaluate(lm, tasks=names, task_manager=manager)
            for lm in (theirs, harness.SeqmixLM(model=model, batch_size=2))
        ]
        assert make_table(found[0]) == make_table(found[1])
        for name in names:
            for one, other in zip(*(each["samples"][name] for each in found), strict=True):
                for (said,), (expected,) in zip(one["resps"], other["resps"], strict=True):
                    assert said == (expected if isinstance(said, str) else pytest.approx(expected, rel=1e-9))


def test_generations_end_before_a_stop_string(harness, model):
    lm = harness.SeqmixLM(model=model, batch_size=2)
    prompts = [doc["prompt"] for doc in documents("generation")]
    options = {"max_new_tokens": 8, "sampling": Sampling(temperature=0)}
    whole = [generate_text(model, [prompt], **options)[0] for prompt in prompts]
    stop = next(text[2] for text in whole if text[2] not in text[:2])
    for until, expected in (([], whole), ([stop], [text.split(stop)[0] for text in whole])):
        asked = {"until": until, "max_gen_toks": 8, "temperature": 0.0}
        requests = [SimpleNamespace(args=(prompt, asked)) for prompt in prompts]
        assert lm.generate_until(requests) == expected
    requests = [SimpleNamespace(args=("a", {"num_beams": 3}))]
    assert "num_beams" in refusal(lambda: lm.generate_until(requests))


def test_choices_share_the_forward_pass_of_their_context(harness, model):
    found = harness.evaluate_tasks(model, ["tiny_choice"], include_path=".")
    # bytes, after a begin token; the last one of a choice need not be processed, and the space before it must
    shared = sum(1 + len(doc["question"]) + len("".join(doc["choices"])) for doc in documents("choice"))
    assert found["forwarded_tokens"] == shared
    plain = [1 + len(doc["question"]) + len(choice) for doc in documents("choice") for choice in doc["choices"]]
    assert shared < 0.6 * sum(plain)


def test_evaluate_command_scores_runs_side_by_side(harness, seqmix, config_of, tmp_path):
    for name, seed in (("one", 0), ("two", 1)):
        run_of(config_of("training.steps=2", f"seed={seed}"), tmp_path / name)
    tasks = ("--tasks", "tiny_choice,tiny_rolling", "--include-path", ".", "--json", "scores.json", "--save")
    done = seqmix("evaluate", "one", "two", *tasks)
    assert done.status == 0, done.err
    found = json.loads(Path("scores.json").read_text())["runs"]
    assert list(found) == ["one", "two"]
    perplexities = [f"{found[run]['tasks']['tiny_rolling']['byte_perplexity']:.4f}" for run in found]
    assert perplexities[0] != perplexities[1]
    assert all(json.loads(Path(run, "scores.json").read_text()) == found[run]["tasks"] for run in found)
    (line,) = (line for line in done.out.splitlines() if "byte_perplexity" in line)
    assert line.split() == ["tiny_rolling", "byte_perplexity", *perplexities]


def test_unknown_task_raises_with_a_suggestion(harness, model, monkeypatch):
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda include_path, **_: TaskManager(None, include_path, False))
    message = refusal(lambda: harness.evaluate_tasks(model, ["tiny_chioce"], include_path="."))
    assert message.startswith("lm-eval has no task 'tiny_chioce': list the tasks with")
    assert message.endswith('; did you mean "tiny_choice"?')


def test_missing_task_data_or_folder_is_named(harness, model):
    Path("choice.jsonl").unlink()
    assert "the data of tiny_choice cannot be read" in refusal(
        lambda: harness.evaluate_tasks(model, ["tiny_choice"], include_path=".")
    )
    message = refusal(lambda: harness.evaluate_tasks(model, ["tiny_choice"], include_path="tsaks"))
    assert message == "expected --include-path to be a folder, got tsaks"


def test_model_works_with_the_lm_eval_command(harness, config_of, tmp_path, monkeypatch, capsys):
    run_of(config_of("training.steps=2"), tmp_path / "one")
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.tasks import TaskManager

    arguments = ["--model", "seqmix", "--model_args", "run=one", "--tasks", "tiny_generation", "--include_path", "."]
    monkeypatch.setattr(sys, "argv", ["lm_eval", *arguments])
    # its own thousands of tasks take half a minute to list
    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))
    cli_evaluate()
    assert "exact_match" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("model_args", "words"),
    [
        (
            "rnu=one",
            """has no argument 'rnu'; it has run, batch_size, device, checkpoint, max_gen_toks; did you mean "run"?""",
        ),
        ("run=nowhere", "nowhere is not a run directory: it does not exist"),
    ],
)
def test_wrong_lm_eval_model_argument_reports_a_readable_error(harness, monkeypatch, capsys, model_args, words):
    from lm_eval.tasks import TaskManager

    arguments = ["--model", "seqmix", "--model_args", model_args, "--tasks", "tiny_choice", "--include_path", "."]
    monkeypatch.setattr(sys, "argv", ["lm_eval", *arguments])
    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))
    with pytest.raises(SystemExit) as ended:
        harness.main()
    assert ended.value.code == 2
    assert words in capsys.readouterr().err.splitlines()[-1]


def test_missing_lm_eval_error_says_what_to_install(seqmix, config_of, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    monkeypatch.delitem(sys.modules, "seqmix.interop.lm_eval", raising=False)
    run_of(config_of("training.steps=2"), tmp_path / "one")
    done = seqmix("evaluate", tmp_path / "one", "--tasks", "any")
    assert done.status == 2
    assert "pip install lm_eval" in done.err
