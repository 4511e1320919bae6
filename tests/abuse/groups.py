"""All groups of hostile input, by name."""

from abuse.configurations import configurations
from abuse.crashes import crashes
from abuse.damaged_shards import damaged_shards
from abuse.dropout import dropout
from abuse.exports import exports
from abuse.folders import folders
from abuse.full_disk import full_disk
from abuse.interrupts import interrupts
from abuse.kills import kills
from abuse.lock import lock
from abuse.metrics import metrics
from abuse.noisy_workers import noisy_workers
from abuse.outputs import outputs
from abuse.readers import readers
from abuse.shards import shards
from abuse.states import states
from abuse.studies import studies
from abuse.surroundings import surroundings
from abuse.tally import Group
from abuse.terminals import terminals
from abuse.texts import lines, texts
from abuse.token_files import token_files
from abuse.trust import trust
from abuse.vocabularies import vocabularies

GROUPS: dict[str, Group] = {
    "configurations": configurations,
    "exports": exports,
    "folders": folders,
    "shards": shards,
    "damaged_shards": damaged_shards,
    "states": states,
    "metrics": metrics,
    "texts": texts,
    "lines": lines,
    "token_files": token_files,
    "vocabularies": vocabularies,
    "full_disk": full_disk,
    "studies": studies,
    "outputs": outputs,
    "terminals": terminals,
    "noisy_workers": noisy_workers,
    "readers": readers,
    "lock": lock,
    "kills": kills,
    "crashes": crashes,
    "interrupts": interrupts,
    "dropout": dropout,
    "trust": trust,
    "surroundings": surroundings,
}
SLOW = {
    "full_disk",
    "lines",
    "outputs",
    "terminals",
    "noisy_workers",
    "readers",
    "surroundings",
    "lock",
    "kills",
    "crashes",
    "interrupts",
    "dropout",
}
"""Groups whose cases are commands of several seconds: nightly alone."""
ALONE = {"exports", "folders", "vocabularies"}
"""Groups whose cases may abort the process."""
