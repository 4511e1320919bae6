"""A wrong mixer: retention that ignores its state token by token."""

from typing import Literal

from seqmix import Paradigm
from seqmix.mixers.retention import Retention, RetentionConfig


class ForgetfulConfig(RetentionConfig):
    kind: Literal["forgetful"] = "forgetful"

    def build(self, d_model, *, layer_idx, n_layers):
        return Forgetful(self, d_model)


class Forgetful(Retention):
    def mix(self, x, call):
        return super().mix(x, call._replace(state=None) if call.paradigm is Paradigm.RECURRENT else call)
