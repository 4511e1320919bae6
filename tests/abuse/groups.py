"""All groups of hostile input, by name."""

from abuse.exports import exports
from abuse.metrics import metrics
from abuse.states import states
from abuse.tally import Group
from abuse.token_files import token_files
from abuse.vocabularies import vocabularies

GROUPS: dict[str, Group] = {
    "exports": exports,
    "states": states,
    "metrics": metrics,
    "token_files": token_files,
    "vocabularies": vocabularies,
}
ALONE = {"exports", "vocabularies"}
"""Groups whose cases may abort the process."""
