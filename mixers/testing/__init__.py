"""The conformance kit: any mixer, ours or a stranger's, is proved or refused.

    from seqmix.mixers.testing import parametrize_checks

    @parametrize_checks([MyConfig(n_heads=2)])
    def test_conformance(check):
        check()

Needs hypothesis (`pip install 'seqmix[test]'`).
"""

from . import checks
from .case import Case, Draw
from .check import CHECKS, Check, check
from .compare import CheckFailure
from .run import EXAMPLES, Outcome, Report, Status, check_mixer, parametrize_checks, reproduce
from .trial import Subject, Trial

__all__ = [
    "CHECKS",
    "EXAMPLES",
    "Case",
    "Check",
    "CheckFailure",
    "Draw",
    "Outcome",
    "Report",
    "Status",
    "Subject",
    "Trial",
    "check",
    "check_mixer",
    "checks",
    "parametrize_checks",
    "reproduce",
]
