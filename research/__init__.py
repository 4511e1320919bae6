"""Programs and analysis that make the documentation's pages of results. Tested, but not part of the installed package.

Each program names its page, and the other modules are theirs: `python research/leaderboard.py` writes
docs/leaderboard.md. `python docs/regenerate.py` runs those that need no new measurement.
"""

from pathlib import Path

DOCS = Path(__file__).resolve().parents[1] / "docs"
"""The folder of the documentation, into whose pages the programs write."""
