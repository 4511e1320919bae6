"""What `seqmix check` found, as files for other programs: JSON, and the XML of JUnit for continuous integration."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import torch

if TYPE_CHECKING:
    from ..testing import CheckOutcome

NOT_IN_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Characters that no XML file may hold; the message of an exception may hold any."""


@dataclass(frozen=True)
class Tested:
    """One mixer or kernel, and how its checks ended."""

    kind: str
    """Of a mixer, or the name of a kernel."""
    about: dict[str, Any]
    """What else JSON says of it: the configuration."""
    outcomes: Sequence["CheckOutcome"]

    def count(self, *statuses: str) -> int:
        """Checks that ended so."""
        return sum(outcome.status in statuses for outcome in self.outcomes)

    @property
    def seconds(self) -> float:
        """Of all checks."""
        return sum(outcome.seconds for outcome in self.outcomes)


def as_json(found: Sequence[Tested], *, seed: int) -> str:
    """Every check of everything tested, with the cases that fail and the lines that reproduce them."""
    from ..training.checkpoint.provenance import seqmix_version

    tested = [{"kind": one.kind, **one.about, "checks": list(map(_fields, one.outcomes))} for one in found]
    about = {"seqmix": seqmix_version(), "torch": str(torch.__version__), "seed": seed}
    return json.dumps({**about, "tested": tested}, indent=2) + "\n"


def _fields(outcome: "CheckOutcome") -> dict[str, Any]:
    ended = {name: getattr(outcome, name) for name in ("status", "reason", "examples", "seconds")}
    case = None if outcome.case is None else repr(outcome.case)
    about = {name: getattr(outcome.check, name) for name in ("name", "property", "use")}
    more = {"same_as": outcome.same_as, "warnings": list(outcome.notes)}
    return {**about, **ended, "case": case, "reproduce": list(outcome.script), **more}


def as_junit(found: Sequence[Tested]) -> str:
    """The same as JUnit has it: a suite for everything tested, and in it a case for every check."""
    suites = ElementTree.Element("testsuites", name="seqmix check")
    for one in found:
        counts = {"tests": len(one.outcomes), "failures": one.count("failed"), "errors": 0}
        counts["skipped"] = one.count("skipped", "expected failure")
        attributes = {"name": one.kind, "time": f"{one.seconds:.3f}"}
        attributes |= {name: str(count) for name, count in counts.items()}
        suite = ElementTree.SubElement(suites, "testsuite", attributes)
        for outcome in one.outcomes:
            named = {"classname": f"seqmix.{one.kind}", "name": outcome.check.name, "time": f"{outcome.seconds:.3f}"}
            case = ElementTree.SubElement(suite, "testcase", named)
            reason = NOT_IN_XML.sub("?", outcome.reason)
            if outcome.status == "failed":
                ElementTree.SubElement(case, "failure", message=reason.partition("\n")[0]).text = reason
            elif outcome.status != "passed":  # pytest's own file has an expected failure as skipped, too
                ElementTree.SubElement(case, "skipped", message=f"{outcome.status}: {reason}")
    ElementTree.indent(suites)
    return ElementTree.tostring(suites, encoding="unicode", xml_declaration=True) + "\n"
