"""All groups of hostile input, by name."""

from abuse.states import states
from abuse.tally import Group
from abuse.token_files import token_files
from abuse.vocabularies import vocabularies

GROUPS: dict[str, Group] = {"states": states, "token_files": token_files, "vocabularies": vocabularies}
ALONE = {"vocabularies"}
"""Groups whose cases may abort the process."""
