"""lm-eval's harness on seqmix models: importing this module registers the model `seqmix` with it.

    python -m seqmix.harness run --model seqmix --model_args run=runs/retnet-tiny --tasks NAME --include_path DIR

is lm-eval's own command. It needs `pip install 'seqmix[eval]'`.
"""

import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from .models import LanguageModel, Sampling, Tokenizer, generate_text
from .models.scoring import Scorer
from .registry import SeqmixError, nearest
from .training import Choice, load_run

try:
    TemplateLM: Any = import_module("lm_eval.api.model").TemplateLM
    register_model: Any = import_module("lm_eval.api.registry").register_model
except ImportError as error:
    missing = f"tasks need the package lm_eval: pip install 'seqmix[eval]' ({error})"
    if __name__ == "__main__":
        raise SystemExit(f"error: {missing}") from None
    raise SeqmixError(missing) from error

ARGUMENTS = ("run", "batch_size", "device", "checkpoint", "max_gen_toks")
"""What --model_args may name."""
UNDERSTOOD = {"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p"}
"""Options of generation that a task may set."""


@register_model("seqmix")
class SeqmixLM(TemplateLM):
    """A seqmix model as lm-eval calls it.

    Args:
        run: a run directory or an exported file; None with a `model`.
        model: the model itself, with its tokenizer.
        batch_size: requests at once.
        max_batch_size: ignored: the batch size is fixed.
        device: its device; None for the CPU, or that of the `model`.
        checkpoint: which checkpoint of the run: newest, best or a step.
        max_gen_toks: new tokens of a generation whose task does not limit them.

    Raises:
        SeqmixError: there is neither a run nor a model, its tokens are not text, or an argument is unknown.
    """

    def __init__(
        self,
        run: str | Path | None = None,
        *,
        model: LanguageModel | None = None,
        batch_size: int | str = 16,
        max_batch_size: int | None = None,  # noqa: ARG002 lm-eval gives it to every model
        device: str | torch.device | None = None,
        checkpoint: Choice = "newest",
        max_gen_toks: int = 256,
        **unknown: Any,
    ) -> None:
        super().__init__()
        for name in unknown:
            raise SeqmixError(
                f"lm-eval's model seqmix has no argument {name!r}; it has {', '.join(ARGUMENTS)}"
                f"{nearest(name, ARGUMENTS)}"
            )
        if (run is None) == (model is None):
            raise SeqmixError("lm-eval's model seqmix needs run=DIR: a run directory or an exported file")
        if not str(batch_size).isdecimal():
            raise SeqmixError(f"the batch size is a number for seqmix models, and was given as {batch_size!r}")
        if model is None:
            # lm-eval's command asks for cuda:0 on every machine
            usable = torch.cuda.is_available() or not str(device).startswith("cuda")
            model = load_run(str(run), device=device if device and usable else "cpu", choice=checkpoint)
        if model.tokenizer is None:
            raise SeqmixError("lm-eval's tasks are text, and the tokens of this model are not")
        self.model = model.eval()
        self.max_gen_toks = max_gen_toks
        self._device = model.device
        self._tokens: Tokenizer = model.tokenizer
        self._scorer = Scorer(model, batch_size=int(batch_size))

    @property
    def forwarded_tokens(self) -> int:
        """Tokens that log-likelihoods have processed so far."""
        return self._scorer.forwarded_tokens

    @property
    def eot_token_id(self) -> int:
        """The token between documents: the one that begins them."""
        return self._tokens.begin

    @property
    def tokenizer_name(self) -> str:
        """The identity of the tokenizer."""
        return self._tokens.identity

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The tokens of a text, opened by the begin token unless `add_special_tokens` is False."""
        return self._tokens.encode(string).tolist()[1 if add_special_tokens is False else 0 :]

    def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        found = [(score.log_likelihood, score.greedy) for score in self._scorer.continuations(pairs)]
        for (text, _, _), score in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", text, score)
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:  # noqa: ARG002
        """The log-likelihood of whole texts, of any length: no window, the state goes on."""
        texts = [self._tokens.encode(request.args[0]) for request in requests]
        found = [score.log_likelihood for score in self._scorer.texts(texts)]
        for request, score in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, score)
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:  # noqa: ARG002
        """Continue texts up to the first of their stop strings, in batches of requests with the same options."""
        alike: dict[str, list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            alike[repr(request.args[1])].append(index)
        texts: dict[int, str] = {}
        for indices in alike.values():
            options = self._options(requests[indices[0]].args[1])
            indices.sort(key=lambda index: len(requests[index].args[0]), reverse=True)
            for start in range(0, len(indices), size := self._scorer.batch_size):
                part = indices[start : start + size]
                found = generate_text(self.model, [requests[index].args[0] for index in part], **options)
                texts |= dict(zip(part, found, strict=True))
        for index, request in enumerate(requests):
            self.cache_hook.add_partial("generate_until", request.args, texts[index])
        return [texts[index] for index in range(len(requests))]

    def _options(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """The options of `generate_text` for those of a task."""
        if unknown := [name for name in asked if name not in UNDERSTOOD]:
            raise SeqmixError(f"a task sets generation_kwargs.{unknown[0]}; seqmix has {', '.join(sorted(UNDERSTOOD))}")
        temperature = float(asked.get("temperature", 0 if not asked.get("do_sample") else 1))
        sampling = Sampling(
            temperature=temperature if asked.get("do_sample", temperature > 0) else 0.0,
            top_k=asked.get("top_k"),
            top_p=asked.get("top_p", 1.0),
        )
        stop = asked.get("until") or ()
        return {
            "max_new_tokens": asked.get("max_gen_toks", self.max_gen_toks),
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
        include_path: a folder of further tasks, in YAML.
        num_fewshot: examples before each question; the task's own number by default.
        limit: documents of each task; None for all.
        batch_size: requests at once.

    Returns:
        `tasks`, by name each metric and its standard error, named as lm-eval's; `versions` of the tasks; and
        `forwarded_tokens`, which log-likelihoods have processed.

    Raises:
        SeqmixError: a task is unknown, its data cannot be read, or the model's tokens are not text.
    """
    if include_path is not None and not Path(include_path).is_dir():
        raise SeqmixError(f"--include-path {include_path} is not a folder")
    manager = _task_manager(tuple(tasks), include_path)
    lm = SeqmixLM(model=model, batch_size=batch_size)
    try:
        found = import_module("lm_eval").simple_evaluate(
            lm, tasks=list(tasks), task_manager=manager, num_fewshot=num_fewshot, limit=limit, log_samples=False
        )
    except OSError as error:  # the data of a task: a file, or the network
        raise SeqmixError(f"the data of {', '.join(tasks)} cannot be read: {str(error).splitlines()[0]}") from error
    scores = {
        task: {
            name.removesuffix(",none"): float(value)
            for name, value in values.items()
            if "," in name and isinstance(value, int | float)  # metric,filter; the others describe the task
        }
        for task, values in found["results"].items()
    }
    return {"tasks": scores, "versions": found["versions"], "forwarded_tokens": lm.forwarded_tokens}


@lru_cache(maxsize=1)
def _task_manager(tasks: tuple[str, ...], include_path: str | Path | None) -> Any:
    """lm-eval's index of tasks; of its own thousands, which takes half a minute, only where the folder lacks a task."""
    make = partial(import_module("lm_eval.tasks").TaskManager, include_path=include_path and str(include_path))
    if include_path is not None:
        local = make(include_defaults=False)
        if set(tasks) <= set(local.all_subtasks):
            return local
    manager = make()
    if unknown := [name for name in tasks if not manager.match_tasks([name])]:
        raise SeqmixError(
            f"lm-eval has no task {unknown[0]!r}{nearest(unknown[0], manager.all_tasks)}; "
            "`lm_eval ls tasks` lists them, --include-path DIR adds others"
        )
    return manager


def main() -> None:
    """lm-eval's own command; what is wrong with its arguments is one sentence, and the status 2."""
    try:
        import_module("lm_eval.__main__").cli_evaluate()
    except (ValueError, KeyError, TypeError, OSError) as error:  # lm-eval has no error of its own
        sentence = " ".join(str(error).split()) or type(error).__name__
        sys.stderr.write(f"error: {sentence}\n")
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
