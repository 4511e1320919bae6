"""Writing the folder: the page, ONNX Runtime, and one ONNX file per run, all as files that open from disk.

A page opened from disk may load scripts and styles of its folder, but not fetch files or import modules. So binary
files are carried by scripts, as base64 of gzip (page/assets.js unpacks them), and the scripts are classic ones.
"""

import base64
import gzip
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from warnings import warn

from ...interop.onnx import export_onnx, require_packages
from ...interop.onnx.export import PACKAGES, require_exportable
from ...models import LanguageModel
from ...registry import DataError, SeqmixError, is_vacant, replacing_folder
from ...training import Choice, load_run
from ..figures import page as figure_page
from ..figures import theme
from .tokenizers import require_page_tokenizer

HERE = Path(__file__).parent
PAGE = HERE / "page"
RUNTIME = HERE / "runtime"
MAX_MODEL_BYTES = 350_000_000
"""Size of the largest ONNX file: browsers limit the length of a string, here of base64, to about 500 million."""


def write_playground(
    runs: Sequence[Path],
    out: Path,
    *,
    choice: Choice = "newest",
    on_note: Callable[[str], object] = warn,
    ema: bool = False,
    trust: bool = False,
    on_start: Callable[[], object] | None = None,
) -> None:
    """Write a folder whose index.html runs trained models in a browser, without a network.

    Args:
        runs: run directories, or files of `export_run`.
        out: the folder to write; it must be missing or empty.
        choice: the checkpoint, as in `load_run`.
        on_note: function that receives warnings, as in `load_run`.
        ema: True for the averaged weights, as in `load_run`.
        trust: as in `load_run`.
        on_start: function that is called after the checks, before the export, which takes some seconds per run.

    Raises:
        SeqmixError: the folder is not empty or cannot be written, a run cannot be loaded, or the page cannot run it: a
            mixer has no export to ONNX, or the page does not know the tokenizer.
    """
    if not is_vacant(out):
        raise DataError(f"{out} exists and is not an empty folder: choose a new name")
    require_packages("the playground", *PACKAGES)
    names = unique_names(runs)
    models = [load_run(run, choice=choice, on_note=on_note, ema=ema, trust=trust) for run in runs]
    for run, model in zip(runs, models, strict=True):
        require_page_tokenizer(model.tokenizer, run)
        with _naming(run):
            require_exportable(model)
    if on_start is not None:
        on_start()
    with replacing_folder(out) as folder:
        _write_page(folder)
        _write_runtime(folder)
        (folder / "models").mkdir()
        entries = []
        for number, (run, model, name) in enumerate(zip(runs, models, names, strict=True)):
            file = folder / f"{number}.onnx"
            with _naming(run):
                export_onnx(run, file, views=True, choice=choice, ema=ema, trust=trust, on_note=_ignore)
            entries.append(_describe(file, model, name) | {"file": f"models/{number}"})
            _write_asset(folder, f"models/{number}", _compress(file.read_bytes()))
            file.unlink()
        (folder / "runs.js").write_text(f'"use strict";\nconst RUNS = {json.dumps(entries)};\n', encoding="utf-8")


def unique_names(runs: Sequence[Path]) -> list[str]:
    """Return the names of runs on the page: the last part of their paths, or the whole path if that is not unique.

    Raises:
        SeqmixError: a run is named twice.
    """
    if repeated := [run for run, count in Counter(run.resolve() for run in runs).items() if count > 1]:
        raise SeqmixError(f"{repeated[0]} is named twice: name every run once")
    counts = Counter(run.name for run in runs)
    return [run.name if counts[run.name] == 1 else str(run) for run in runs]


def _write_page(folder: Path) -> None:
    for file in PAGE.iterdir():
        shutil.copyfile(file, folder / file.name)
    styles = (theme.style_sheet(":root"), _text(figure_page.HERE / "page.css"), _text(PAGE / "style.css"))
    (folder / "style.css").write_text("\n".join(styles), encoding="utf-8")


def _write_runtime(folder: Path) -> None:
    place = folder / "runtime"
    place.mkdir()
    for name in ("ort.wasm.min.js", "LICENSE", "ThirdPartyNotices.txt"):
        shutil.copyfile(RUNTIME / name, place / name)
    _write_asset(folder, "runtime/wasm", (RUNTIME / "ort-wasm-simd-threaded.wasm.gz").read_bytes())
    _write_asset(folder, "runtime/glue", _compress((RUNTIME / "ort-wasm-simd-threaded.mjs").read_bytes()))


@contextmanager
def _naming(run: Path) -> Iterator[None]:
    """Context whose SeqmixErrors begin with the name of the run."""
    try:
        yield
    except SeqmixError as error:
        raise SeqmixError(f"{run}: {error}") from error


def _ignore(note: str) -> None:
    """Ignore a warning that was given when the run was loaded first."""


def _describe(file: Path, model: LanguageModel, name: str) -> dict[str, Any]:
    """Return the facts about a model that the page shows, with the metadata of its ONNX file.

    Raises:
        SeqmixError: the file is too large for a page.
    """
    if (size := file.stat().st_size) > MAX_MODEL_BYTES:
        raise SeqmixError(f"the ONNX file of {name} has {size:,} bytes, but a page carries at most {MAX_MODEL_BYTES:,}")
    from ...interop.onnx.session import OnnxModel  # needs onnxruntime

    layers = [block.mixer.kind for block in model.blocks]
    return OnnxModel.load(file).metadata | {
        "name": name,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "layers": layers,
        "summary": ", ".join(f"{count} {kind}" for kind, count in Counter(layers).items()),
    }


def _write_asset(folder: Path, name: str, compressed: bytes) -> None:
    """Write the script that hands a compressed file to `assets`."""
    encoded = base64.b64encode(compressed).decode()
    (folder / f"{name}.js").write_text(f'assets.put("{name}", "{encoded}");\n', encoding="ascii")


def _compress(content: bytes) -> bytes:
    return gzip.compress(content, compresslevel=6, mtime=0)


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8")
