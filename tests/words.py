"""Measure the language: the length of the documentation, the share of test code, and words that the field does not use.

    python tests/words.py [ROOT]

prints a table for any checkout of this repository, the present one by default. test_words.py holds the limits.

What is counted:

- **words** of the documentation, as `wc -w` counts them: README.md and docs/, without what programs write (regions
  between `<!-- name: begin -->` and `<!-- name: end -->`) and without docs/appendix.
- **test code**: lines of Python under tests/, over all others: the library, scripts of the documentation, examples.
- **foreign words**: words and phrases that a reader of the field would not search for, in the library, the
  documentation and the tests. Beside each stands the field's own. CHANGELOG.md and tests of former names quote them.
"""

import re
import subprocess
import sys
from pathlib import Path

FOREIGN = {
    r"behind": "after, following; prefix; implemented by",
    r"borders?": "document boundaries",
    r"anew": "again; recompute",
    r"told(?! apart)": "reported, stated, given",
    r"promises?|promised": "property; contract",
    r"proved|proves|proof": "tested against",
    r"learners?": "trainer",
    r"contestants?": "implementations",
    r"of (?:yours|ours|its own making)": "your own, our own",
    r"(?:made|written) by hand": "hand-written",
    r"(?:one |a )?(?:number|scalar|value)s? an? (?:head|token|channel|chunk|key)": "one scalar per head",
    r"tokens a (?:chunk|second|step)": "tokens per second; chunk length in tokens",
    r"in turn": "interleaved; one after another",
    r"(?:trained|treated|read|are) alike": "under identical conditions; in the same way",
    r"settled": "resolved",
    r"forgotten": "deleted; decayed",
    r"(?<!there )is no (?:run|state|file|mixer|folder|directory|number|text|mapping|list|study|such)": "is not a ...",
    r"(?:what|that) it has read": "the processed prefix",
    r"held out": "validation split",
    r"splits: bool|with_room|use_quickest|hand_over": "a former name",
}
"""Regular expressions of whole words, and what stands in their place."""
GENERATED = re.compile(r"<!-- (.+?): begin -->.*?<!-- \1: end -->", re.DOTALL)
QUOTING = {"CHANGELOG.md", "tests/words.py", "registry/deprecated.py", "tests/registry/test_deprecated_names.py"}


def tracked(root: Path, *suffixes: str) -> list[str]:
    """Files of a checkout that git knows, by their endings."""
    found = subprocess.run(
        ["git", "ls-files"], cwd=root, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    return [name for name in found if name.endswith(suffixes) and (root / name).is_file()]


def documentation_words(root: Path) -> dict[str, int]:
    """Hand-written words by page."""
    pages = [name for name in tracked(root, ".md") if name == "README.md" or name.startswith("docs/")]
    pages = [name for name in pages if not name.startswith("docs/appendix/")]
    return {name: len(GENERATED.sub("", (root / name).read_text(encoding="utf-8")).split()) for name in pages}


def readme_lines(root: Path) -> int:
    """Hand-written lines of the README: its table of mixers has a row for every file of theirs."""
    return len(GENERATED.sub("", (root / "README.md").read_text(encoding="utf-8")).splitlines())


def foreign_words(root: Path) -> dict[str, list[str]]:
    """Where each foreign word stands: `file:line`."""
    found: dict[str, list[str]] = {pattern: [] for pattern in FOREIGN}
    for name in tracked(root, ".py", ".md", ".yaml", ".toml", ".ipynb"):
        if name in QUOTING:
            continue
        for number, line in enumerate((root / name).read_text(encoding="utf-8").splitlines(), 1):
            for pattern in FOREIGN:
                if re.search(rf"\b(?:{pattern})\b", line, re.IGNORECASE):
                    found[pattern].append(f"{name}:{number}")
    return found


def share_of_tests(root: Path) -> float:
    """Lines of test code over all other lines of Python."""
    lines = {name: (root / name).read_text(encoding="utf-8").count("\n") for name in tracked(root, ".py")}
    tests = sum(count for name, count in lines.items() if name.startswith("tests/"))
    return tests / (sum(lines.values()) - tests)


def table(root: Path) -> str:
    """All counts as text."""
    pages = documentation_words(root)
    lines = [f"words of the documentation  {sum(pages.values()):,}"]
    lines += [f"  {name:40} {count:6,}" for name, count in sorted(pages.items(), key=lambda page: -page[1])]
    lines += [f"lines of README.md  {readme_lines(root)}"]
    lines += [f"test code over other code  {share_of_tests(root):.2f}", "foreign words (library, documentation, tests)"]
    for pattern, places in foreign_words(root).items():
        tests = sum(place.startswith("tests/") for place in places)
        docs = sum(place.startswith(("docs/", "README")) for place in places)
        lines.append(f"  {pattern:60} {len(places) - tests - docs:4} {docs:4} {tests:4}   {FOREIGN[pattern]}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(Path(sys.argv[1] if len(sys.argv) > 1 else ".").resolve()))
