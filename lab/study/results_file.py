"""The file of a study's results, results.json."""

import json
from pathlib import Path

from pydantic import ValidationError

from ...registry import DataError, read_bytes, write_file
from .results import Results
from .summary import summarise, with_timed_speeds

RESULTS_FILE = "results.json"


class ResultsError(DataError):
    """A file does not hold the results of a study."""


def read_results(path: str | Path) -> Results:
    """Read results from a results.json, or from a study's folder.

    Raises:
        ResultsError: the file does not exist or does not hold results.
    """
    path = Path(path)
    file = path / RESULTS_FILE if path.is_dir() else path
    try:
        return _parse(read_bytes(file))
    except OSError as error:
        expected = f"expected a study's folder or its {RESULTS_FILE}"
        raise ResultsError(f"{file} cannot be read: {error.strerror}; {expected}") from None
    except ValidationError as error:
        detail = error.errors(include_url=False)[0]
        place = "".join(f"{key}." for key in detail["loc"])[:-1]
        raise ResultsError(
            f"{file} does not hold the results of a study: {f'{place}: ' if place else ''}{detail['msg']}"
        ) from None


def _parse(text: bytes) -> Results:
    """Return the results in a file's text.

    Files of seqmix 0.4 and before have a rank in the summary, by each entry's own seeds: their summary is computed
    again from the runs.
    """
    try:
        return Results.model_validate_json(text)
    except ValidationError as error:
        places = [detail["loc"] for detail in error.errors(include_url=False)]
        if not any(place[:1] == ("summary",) and place[-1] == "rank" for place in places):
            raise
    results = Results.model_validate_json(json.dumps(json.loads(text) | {"summary": []}))
    rates = sorted({run.learning_rate for run in results.runs if run.tunes and run.learning_rate is not None})
    rows = summarise(results.runs, rates, results.learned)
    return with_timed_speeds(results.model_copy(update={"summary": tuple(rows)}))


def write(results: Results, folder: Path) -> Path:
    """Write results.json; an existing file is replaced atomically."""
    return write_file(results.model_dump_json(indent=1) + "\n", folder / RESULTS_FILE)
