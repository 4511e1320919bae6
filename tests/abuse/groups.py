"""All groups of hostile input, by name."""

from abuse.configurations import configurations
from abuse.exports import exports
from abuse.full_disk import full_disk
from abuse.metrics import metrics
from abuse.shards import shards
from abuse.states import states
from abuse.tally import Group
from abuse.texts import lines, texts
from abuse.token_files import token_files
from abuse.vocabularies import vocabularies

GROUPS: dict[str, Group] = {
    "configurations": configurations,
    "exports": exports,
    "shards": shards,
    "states": states,
    "metrics": metrics,
    "texts": texts,
    "lines": lines,
    "token_files": token_files,
    "vocabularies": vocabularies,
    "full_disk": full_disk,
}
SLOW = {"full_disk", "lines"}
"""Groups whose cases are commands of several seconds: nightly alone."""
ALONE = {"exports", "vocabularies"}
"""Groups whose cases may abort the process."""
