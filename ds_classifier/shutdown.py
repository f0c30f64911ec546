"""Stopping on request: signals set a flag, and all ranks agree on the step to stop after."""

from __future__ import annotations

import signal

import torch
import torch.distributed

STOPPED = (
    75  # exit code: stopped on request, run the same command again (EX_TEMPFAIL of sysexits.h)
)


class StopVote:
    """Whether any rank was asked to stop, known to all ranks at the same step.

    The vote is a reduction on the CPU that is waited for one step later, so no step waits for it.
    SIGTERM, SIGINT and SIGUSR1 ask. SIGTERM may come twice, from the scheduler to all processes and
    from the launcher to its children; only a second Ctrl-C ends the process at once.
    """

    def __init__(self):
        self._asked = torch.zeros(1)
        self._group = torch.distributed.new_group(backend="gloo")
        self._pending = None  # the vote under way: (its handle, its tensor)
        for name in ("SIGTERM", "SIGINT", "SIGUSR1"):
            signal.signal(getattr(signal, name), self._ask)

    def _ask(self, number: int, frame) -> None:
        self._asked.fill_(1)
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)

    def decide(self) -> bool:
        """Call on every rank after every step; True on all ranks after the same one."""
        decided = False
        if self._pending is not None:
            work, votes = self._pending
            work.wait()
            decided = bool(votes.item() > 0)
        votes = self._asked.clone()
        work = torch.distributed.all_reduce(votes, group=self._group, async_op=True)
        self._pending = (work, votes)
        return decided
