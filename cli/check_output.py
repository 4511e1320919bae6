"""Results of `seqmix check` as files for other programs: JSON, and JUnit XML for continuous integration."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import torch

if TYPE_CHECKING:
    from ..testing import CheckOutcome

NOT_IN_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Matches characters that are not allowed in XML, but may be in the message of an exception."""


@dataclass(frozen=True)
class Tested:
    """A mixer or kernel with the outcomes of its checks."""

    kind: str
    """Kind of the mixer, or name of the kernel."""
    about: dict[str, Any]
    """Further entries of the JSON output: the configuration and d_model of a mixer; empty for a kernel."""
    outcomes: Sequence["CheckOutcome"]
    """Outcome of each check."""

    def count(self, *statuses: str) -> int:
        """Return the number of checks with one of these statuses."""
        return sum(outcome.status in statuses for outcome in self.outcomes)

    @property
    def seconds(self) -> float:
        """Time of all checks, in seconds."""
        return sum(outcome.seconds for outcome in self.outcomes)


@dataclass(frozen=True)
class CheckResult:
    """Result of `seqmix check`."""

    torch: str
    """Version of torch."""
    seed: int
    """Random seed of the examples."""
    failed: list[str]
    """Names of the checks that failed, without repetition."""
    tested: list[dict[str, Any]]
    """For each mixer or kernel: its `kind`, a mixer's `config` and `d_model`, and its `checks`. A check has a name, the
    property that it tests and what that is for, a status (passed, failed, skipped, expected failure) with the reason,
    the number of examples, seconds, and of a failure the smallest case and the code that reproduces it."""


def result_of(results: Sequence[Tested], *, seed: int) -> CheckResult:
    """Return the results of all mixers and kernels, with failing cases and the code that reproduces them."""
    tested = [
        {"kind": result.kind, **result.about, "checks": list(map(_outcome_fields, result.outcomes))}
        for result in results
    ]
    outcomes = [outcome for result in results for outcome in result.outcomes]
    failed = dict.fromkeys(outcome.check.name for outcome in outcomes if outcome.status == "failed")
    return CheckResult(str(torch.__version__), seed, list(failed), tested)


def _outcome_fields(outcome: "CheckOutcome") -> dict[str, Any]:
    """Return the JSON fields of an outcome."""
    return {
        "name": outcome.check.name,
        "property": outcome.check.property,
        "use": outcome.check.use,
        "status": outcome.status,
        "reason": outcome.reason,
        "examples": outcome.examples,
        "seconds": outcome.seconds,
        "case": None if outcome.case is None else repr(outcome.case),
        "reproduce": list(outcome.script),
        "same_as": outcome.same_as,
        "warnings": list(outcome.notes),
    }


def as_junit(results: Sequence[Tested]) -> str:
    """Return all results as JUnit XML: a test suite per mixer or kernel, with a test case per check."""
    suites = ElementTree.Element("testsuites", name="seqmix check")
    for result in results:
        attributes = {
            "name": result.kind,
            "time": f"{result.seconds:.3f}",
            "tests": str(len(result.outcomes)),
            "failures": str(result.count("failed")),
            "errors": "0",
            "skipped": str(result.count("skipped", "expected failure")),
        }
        suite = ElementTree.SubElement(suites, "testsuite", attributes)
        for outcome in result.outcomes:
            attributes = {
                "classname": f"seqmix.{result.kind}",
                "name": outcome.check.name,
                "time": f"{outcome.seconds:.3f}",
            }
            case = ElementTree.SubElement(suite, "testcase", attributes)
            reason = NOT_IN_XML.sub("?", outcome.reason)
            if outcome.status == "failed":
                ElementTree.SubElement(case, "failure", message=reason.partition("\n")[0]).text = reason
            elif outcome.status != "passed":  # pytest reports expected failures as skipped, too
                ElementTree.SubElement(case, "skipped", message=f"{outcome.status}: {reason}")
    ElementTree.indent(suites)
    return ElementTree.tostring(suites, encoding="unicode", xml_declaration=True) + "\n"
