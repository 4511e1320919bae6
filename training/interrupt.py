"""Ctrl-C and termination signals, as a request to stop after the current step with a checkpoint."""

import os
import signal
from types import FrameType
from typing import Self


class StopRequest:
    """Turns the first Ctrl-C, SIGTERM or SIGHUP into a stop request; the second one has its default effect.

    Under torchrun, only Ctrl-C has one: SIGTERM may come from torchrun and from the cluster, also while an error is
    reported, and torchrun kills what does not end. There, the death of torchrun is a stop request too.
    """

    # SIGHUP is a closed terminal; not every system has it
    SIGNALS = tuple(number for number in signal.Signals if number.name in ("SIGINT", "SIGTERM", "SIGHUP"))

    def __init__(self) -> None:
        self._made = False
        self._before = {number: signal.getsignal(number) for number in self.SIGNALS}
        self._parent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None

    def made(self) -> bool:
        """Whether a stop was requested."""
        return self._made or self._parent not in (None, os.getppid())

    def __enter__(self) -> Self:
        for number in self.SIGNALS:
            signal.signal(number, self._request)
        return self

    def _request(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        self._made = True
        self.__exit__()

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            if self._parent is None or number == signal.SIGINT:
                signal.signal(number, handler)
