"""The language keeps its limits, and what measures it counts right. `python tests/words.py` prints the table."""

import subprocess
from pathlib import Path

from words import FOREIGN, documentation_words, foreign_words, readme_lines, share_of_tests

ROOT = Path(__file__).resolve().parents[1]


def test_the_documentation_is_short():
    assert sum(documentation_words(ROOT).values()) <= 26_000
    assert readme_lines(ROOT) <= 140


def test_test_code_is_shorter_than_other_code():
    assert share_of_tests(ROOT) <= 0.75


def test_words_are_the_fields():
    found = {
        word: [place for place in places if not place.startswith("tests/")]
        for word, places in foreign_words(ROOT).items()
    }
    assert {f"{word}: write {FOREIGN[word]}": places for word, places in found.items() if places} == {}


def test_what_is_counted(tmp_path):
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    for name, text in {
        "README.md": "one two\n<!-- a: begin -->\nthree\n<!-- a: end -->\nfour\n",
        "docs/appendix/a.md": "five",
        "docs/how-to/b.md": "Behind it.\n",
        "ops/__init__.py": "",
        "ops/a.py": "# bordering on it\n# on borders\n",
        "tests/a.py": "1\n",
    }.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    subprocess.run(["git", "add", "."], cwd=tmp_path, check=True)
    assert readme_lines(tmp_path) == 3
    assert documentation_words(tmp_path) == {"README.md": 3, "docs/how-to/b.md": 2}
    assert {word: places for word, places in foreign_words(tmp_path).items() if places} == {
        "behind": ["docs/how-to/b.md:1"],
        "borders?": ["ops/a.py:2"],
    }
    assert share_of_tests(tmp_path) == 0.5
