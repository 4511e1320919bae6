"""Model class for lm-eval's harness: importing this module registers the model `seqmix` with lm-eval.

    python -m seqmix.interop.lm_eval run --model seqmix --model_args run=runs/retnet-tiny --tasks NAME

runs lm-eval's own command. It needs `pip install lm_eval`.
"""

import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from ..models import LanguageModel, Sampling, Tokenizer, generate_text
from ..models.scoring import Scorer
from ..registry import DataError, SeqmixError, nearest_hint
from ..training import Choice, load_run

try:
    TemplateLM: Any = import_module("lm_eval.api.model").TemplateLM
    register_model: Any = import_module("lm_eval.api.registry").register_model
except ImportError as error:
    missing = f"tasks need the package lm_eval: pip install lm_eval ({error})"
    if __name__ == "__main__":
        raise SystemExit(f"error: {missing}") from None
    raise SeqmixError(missing) from error

ARGUMENTS = ("run", "batch_size", "device", "checkpoint", "max_gen_toks")
"""Allowed names in --model_args."""
GENERATION_OPTIONS = {"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p"}
"""Supported names in the generation_kwargs of a task."""


@register_model("seqmix")
class SeqmixLM(TemplateLM):
    """Adapter of a seqmix model to the interface that lm-eval calls.

    Args:
        run: run directory or exported file; None if `model` is given.
        model: the model itself, with its tokenizer.
        batch_size: requests per batch.
        max_batch_size: ignored, because the batch size is fixed.
        device: device to load the run on; None for the CPU. A given `model` stays on its own device.
        checkpoint: checkpoint of the run: newest, best or a step.
        max_gen_toks: limit of new tokens for tasks that do not set one.

    Raises:
        SeqmixError: not exactly one of run and model is given, the tokens of the model are not text, or an argument is
            unknown.
    """

    def __init__(
        self,
        run: str | Path | None = None,
        *,
        model: LanguageModel | None = None,
        batch_size: int | str = 16,
        max_batch_size: int | None = None,  # noqa: ARG002 lm-eval passes it to every model
        device: str | torch.device | None = None,
        checkpoint: Choice = "newest",
        max_gen_toks: int = 256,
        **unknown: Any,
    ) -> None:
        super().__init__()
        for name in unknown:
            raise SeqmixError(
                f"lm-eval's model seqmix has no argument {name!r}; it has {', '.join(ARGUMENTS)}"
                f"{nearest_hint(name, ARGUMENTS)}"
            )
        if (run is None) == (model is None):
            raise SeqmixError(
                "lm-eval's model seqmix needs either run=DIR (a run directory or an exported file) or a model, got "
                f"{'neither' if run is None else 'both'}"
            )
        if not str(batch_size).isdecimal():
            raise SeqmixError(f"expected batch_size to be an integer, got {batch_size!r}")
        if model is None:
            # lm-eval's command asks for cuda:0 on every machine
            is_usable = torch.cuda.is_available() or not str(device).startswith("cuda")
            model = load_run(str(run), device=device if device and is_usable else "cpu", choice=checkpoint)
        if model.tokenizer is None:
            raise SeqmixError("lm-eval needs a model with a tokenizer for text, got a model without one")
        self.model = model.eval()
        self.max_gen_toks = max_gen_toks
        self._device = model.device
        self._tokens: Tokenizer = model.tokenizer
        self._scorer = Scorer(model, batch_size=int(batch_size))

    @property
    def forwarded_tokens(self) -> int:
        """Number of tokens processed for log-likelihoods so far."""
        return self._scorer.forwarded_tokens

    @property
    def eot_token_id(self) -> int:
        """Token that separates documents: the begin token."""
        return self._tokens.begin

    @property
    def tokenizer_name(self) -> str:
        """Identity of the tokenizer, for lm-eval's cache."""
        return self._tokens.identity

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return the tokens of a text, after the begin token unless `add_special_tokens` is False."""
        return self._tokens.encode(string).tolist()[1 if add_special_tokens is False else 0 :]

    def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        scores = [(score.log_likelihood, score.greedy) for score in self._scorer.continuations(pairs)]
        for (text, _, _), score in zip(requests, scores, strict=True):
            self.cache_hook.add_partial("loglikelihood", text, score)
        return scores

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:  # noqa: ARG002
        """Return the log-likelihoods of whole texts of any length; a text is read with one state, without windows."""
        texts = [self._tokens.encode(request.args[0]) for request in requests]
        scores = [score.log_likelihood for score in self._scorer.texts(texts)]
        for request, score in zip(requests, scores, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, score)
        return scores

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:  # noqa: ARG002
        """Continue texts up to their first stop string, in batches of requests with the same options."""
        indices_by_options: dict[str, list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            indices_by_options[repr(request.args[1])].append(index)
        texts: dict[int, str] = {}
        for indices in indices_by_options.values():
            options = self._generation_options(requests[indices[0]].args[1])
            indices.sort(key=lambda index: len(requests[index].args[0]), reverse=True)
            for start in range(0, len(indices), size := self._scorer.batch_size):
                batch = indices[start : start + size]
                generated = generate_text(self.model, [requests[index].args[0] for index in batch], **options)
                texts |= dict(zip(batch, generated, strict=True))
        for index, request in enumerate(requests):
            self.cache_hook.add_partial("generate_until", request.args, texts[index])
        return [texts[index] for index in range(len(requests))]

    def _generation_options(self, task_options: Mapping[str, Any]) -> dict[str, Any]:
        """Translate the generation_kwargs of a task to options of `generate_text`."""
        if unknown := [name for name in task_options if name not in GENERATION_OPTIONS]:
            raise SeqmixError(
                f"a task sets generation_kwargs.{unknown[0]}, which seqmix does not support: use only "
                f"{', '.join(sorted(GENERATION_OPTIONS))}"
            )
        temperature = float(task_options.get("temperature", 0 if not task_options.get("do_sample") else 1))
        sampling = Sampling(
            temperature=temperature if task_options.get("do_sample", temperature > 0) else 0.0,
            top_k=task_options.get("top_k"),
            top_p=task_options.get("top_p", 1.0),
        )
        stop = task_options.get("until") or ()
        return {
            "max_new_tokens": task_options.get("max_gen_toks", self.max_gen_toks),
            "sampling": sampling,
            "stop": [stop] if isinstance(stop, str) else list(stop),
        }


def evaluate_tasks(
    model: LanguageModel,
    tasks: Sequence[str],
    *,
    include_path: str | Path | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 16,
) -> dict[str, Any]:
    """Evaluate a model on tasks of lm-eval.

    Args:
        model: the model, with its tokenizer.
        tasks: names of tasks or groups.
        include_path: folder with further tasks, in YAML.
        num_fewshot: examples before each question; the task's own number by default.
        limit: documents per task; None for all.
        batch_size: requests per batch.

    Returns:
        A dictionary with `tasks`, the metrics and standard errors of each task by lm-eval's names; `versions`, the
        version of each task; and `forwarded_tokens`, the number of tokens processed for log-likelihoods.

    Raises:
        SeqmixError: a task is unknown, its data cannot be read, or the model's tokens are not text.
    """
    if include_path is not None and not Path(include_path).is_dir():
        raise SeqmixError(f"expected --include-path to be a folder, got {include_path}")
    manager = _task_manager(tuple(tasks), include_path)
    lm = SeqmixLM(model=model, batch_size=batch_size)
    try:
        results = import_module("lm_eval").simple_evaluate(
            lm, tasks=list(tasks), task_manager=manager, num_fewshot=num_fewshot, limit=limit, log_samples=False
        )
    except OSError as error:  # the data of a task: a file, or the network
        raise DataError(f"the data of {', '.join(tasks)} cannot be read: {str(error).splitlines()[0]}") from error
    scores = {
        task: {
            name.removesuffix(",none"): float(value)
            for name, value in values.items()
            if "," in name and isinstance(value, int | float)  # keys are "metric,filter"; other keys describe the task
        }
        for task, values in results["results"].items()
    }
    return {"tasks": scores, "versions": results["versions"], "forwarded_tokens": lm.forwarded_tokens}


@lru_cache(maxsize=1)
def _task_manager(tasks: tuple[str, ...], include_path: str | Path | None) -> Any:
    """Return lm-eval's task index, without lm-eval's own tasks if `include_path` has all the requested ones.

    Indexing lm-eval's own tasks takes half a minute.
    """
    make_manager = partial(import_module("lm_eval.tasks").TaskManager, include_path=include_path and str(include_path))
    if include_path is not None:
        local = make_manager(include_defaults=False)
        if set(tasks) <= set(local.all_subtasks):
            return local
    manager = make_manager()
    if unknown := [name for name in tasks if not manager.match_tasks([name])]:
        raise SeqmixError(
            f"lm-eval has no task {unknown[0]!r}: list the tasks with `lm_eval ls tasks`, or add your own with "
            f"--include-path DIR{nearest_hint(unknown[0], manager.all_tasks)}"
        )
    return manager


def main() -> None:
    """Run lm-eval's own command; an error in its arguments prints one sentence and exits with status 2."""
    try:
        import_module("lm_eval.__main__").cli_evaluate()
    except (ValueError, KeyError, TypeError, OSError) as error:  # lm-eval has no error class of its own
        sentence = " ".join(str(error).split()) or type(error).__name__
        sys.stderr.write(f"error: {sentence}\n")
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
