"""The file of a study's results, results.json."""

import json
from pathlib import Path

from pydantic import ValidationError

from ...registry import DataError, read_bytes, write_file
from .results import Results
from .summary import summarise

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
        return _of_this_version(read_bytes(file))
    except OSError as error:
        expected = f"expected a study's folder or its {RESULTS_FILE}"
        raise ResultsError(f"{file} cannot be read: {error.strerror}; {expected}") from None
    except ValidationError as error:
        detail = error.errors(include_url=False)[0]
        place = "".join(f"{key}." for key in detail["loc"])[:-1]
        raise ResultsError(
            f"{file} does not hold the results of a study: {f'{place}: ' if place else ''}{detail['msg']}"
        ) from None


def _of_this_version(text: bytes) -> Results:
    """Validate results; a summary of seqmix 0.4 or before, which had a rank by each entry's own seeds, is made anew."""
    try:
        content = json.loads(text)
    except ValueError:
        return Results.model_validate_json(text)  # raises what is wrong with it
    rows = content.get("summary") if isinstance(content, dict) else None
    if not (isinstance(rows, list) and any(isinstance(row, dict) and "rank" in row for row in rows)):
        return Results.model_validate_json(text)
    results = Results.model_validate_json(json.dumps(content | {"summary": []}))
    rates = sorted({run.learning_rate for run in results.runs if run.tunes and run.learning_rate is not None})
    return results.model_copy(update={"summary": tuple(summarise(results.runs, rates, results.learned))})


def write(results: Results, folder: Path) -> Path:
    """Write results.json; an existing file is replaced atomically."""
    return write_file(results.model_dump_json(indent=1) + "\n", folder / RESULTS_FILE)
