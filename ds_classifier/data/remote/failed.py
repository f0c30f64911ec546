"""The failure of one try to read or write at a URL."""

from __future__ import annotations


class Failed(Exception):
    """Raised when one try fails.

    final: another try will not help. restart: the bytes received so far must be thrown away.
    advice: what to do about it; empty if the address and the server are to be checked.
    """

    def __init__(
        self, reason: str, *, final: bool = False, restart: bool = False, advice: str = ""
    ):
        super().__init__(reason)
        self.final, self.restart, self.advice = final, restart, advice
