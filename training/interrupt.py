"""Ctrl-C and termination signals, as a request to stop after the current step with a checkpoint."""

import os
import signal
from types import FrameType
from typing import Self


class StopRequest:
    """Context in which the first Ctrl-C, SIGTERM or SIGHUP is a stop request, and the second has its default effect.

    Under torchrun, a second SIGTERM or SIGHUP has no effect: torchrun and the cluster may both send SIGTERM, even while
    an error is reported, and torchrun kills a process that does not end. The death of torchrun is a stop request too.
    """

    # a closed terminal sends SIGHUP, which Windows lacks
    SIGNALS = tuple(number for number in signal.Signals if number.name in ("SIGINT", "SIGTERM", "SIGHUP"))

    def __init__(self) -> None:
        self._signalled = False
        self._handlers = {number: signal.getsignal(number) for number in self.SIGNALS}
        self._parent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None

    def was_made(self) -> bool:
        """Return True if a stop was requested."""
        return self._signalled or self._parent not in (None, os.getppid())

    def __enter__(self) -> Self:
        for number in self.SIGNALS:
            signal.signal(number, self._request)
        return self

    def _request(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        self._signalled = True
        self.__exit__()

    def __exit__(self, *error: object) -> None:
        for number, handler in self._handlers.items():
            if self._parent is None or number == signal.SIGINT:
                signal.signal(number, handler)
