"""Meeting before the process group: who has come, from where, and whether all can start alike.

Rank 0 serves torch's TCPStore at MASTER_ADDR:MASTER_PORT; under torchrun, its agent does. Every
rank lays a card there. Rank 0 reads them all, and what it finds is everybody's error: a rank that
cannot start ends the others in seconds, wherever they are; one that does not come is named.
"""

from __future__ import annotations

import ipaddress
import json
import os
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

_LOOK_SECONDS = 0.2
_CONNECT_SECONDS = 15.0  # to a port that listens
_GRACE_SECONDS = 3.0  # once one rank has a problem: for the others to bring theirs
_LEAVE_SECONDS = 30.0  # for those who came to read why nothing starts
_NEWS_SECONDS = 30.0
_ANSWER_SECONDS = 300.0  # of the store, once it is reached
_SHOWN = 12  # problems of one kind

Card = dict[str, Any]


class Rendezvous:
    """This rank's place in the meeting.

    rank, world_size: as the launcher says. names: the hosts of the ranks where the launcher told
    them; [] otherwise. seconds: to wait for all ranks.
    """

    def __init__(self, rank: int, world_size: int, names: list[str], seconds: float):
        self._rank, self._world_size, self._names = rank, world_size, names
        self._deadline = time.monotonic() + seconds
        self._seconds = seconds

    def meet(self, card: Card, say: Callable[[str], None]) -> tuple[Any, str]:
        """Returns the store, and why the run cannot start: the same on all ranks, mostly empty.

        card: JSON-able; "host" is where the rank is, "problem" why it cannot start, "same" what
        must be alike on all ranks: {what: value}. say: prints a line on rank 0.
        Raises OSError where the store cannot be served or reached.
        """
        store = self._store()
        store.set(f"card/{self._rank}", json.dumps(card))
        store.add("come", 1)
        if card.get("problem"):
            store.add("problems", 1)
        if self._rank != 0:
            return store, self._read_verdict(store)
        cards = self._collect(store, say)
        verdict = self.judge(cards)
        store.set("start", json.dumps(verdict))
        if verdict:
            deadline = time.monotonic() + _LEAVE_SECONDS
            while store.add("read", 0) < len(cards) - 1 and time.monotonic() < deadline:
                time.sleep(_LOOK_SECONDS)
        return store, verdict

    def _store(self):
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        serves = self._rank == 0 and not _agent_serves()
        if not serves:
            self._wait_for_port(address, port)
        try:
            store = connect(serves=serves, seconds=_CONNECT_SECONDS)
        except Exception as error:  # torch has several for it
            if serves:
                raise OSError(
                    f"port {port} cannot be served: {_first_line(error)}; do: end what holds it, "
                    "or give the launcher another --master_port"
                ) from None
            raise OSError(
                f"rank {self._rank}: what listens at {address}, port {port}, is not rank 0 of this "
                "run; do: end it, or give the launcher another --master_port"
            ) from None

        store.set_timeout(timedelta(seconds=_ANSWER_SECONDS))
        return store

    def _wait_for_port(self, address: str, port: int) -> None:
        """Until rank 0 listens there. Torch would wait twice as long as told, and not say why."""
        while True:
            try:
                with socket.create_connection((address, port), timeout=_LOOK_SECONDS * 10):
                    return
            except socket.gaierror:
                reason = f"{address} is no name that this host knows"
            except OSError as error:
                reason = error.strerror or "no answer"
            if time.monotonic() > self._deadline:
                raise OSError(
                    f"rank {self._rank} does not reach rank 0 at {address}, port {port}, within "
                    f"{self._seconds:.0f} s: {reason}; do: see that rank 0 runs, and that nothing "
                    "between the hosts blocks the port"
                )
            time.sleep(_LOOK_SECONDS)

    def _collect(self, store, say: Callable[[str], None]) -> dict[int, Card]:
        """The cards of all ranks, or of those that came before the deadline or a problem."""
        news, deadline = time.monotonic() + _NEWS_SECONDS, self._deadline
        while store.add("come", 0) < self._world_size and time.monotonic() < deadline:
            if store.add("problems", 0):
                deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
            if time.monotonic() > news:
                news += _NEWS_SECONDS
                say(f"waiting for {self._describe(self._absent(store))}")
            time.sleep(_LOOK_SECONDS)
        absent = set(self._absent(store))
        present = [rank for rank in range(self._world_size) if rank not in absent]
        texts = store.multi_get([f"card/{rank}" for rank in present])
        return {rank: json.loads(text) for rank, text in zip(present, texts, strict=True)}

    def _absent(self, store) -> list[int]:
        return [r for r in range(self._world_size) if not store.check([f"card/{r}"])]

    def _read_verdict(self, store) -> str:
        try:
            store.wait(["start"], timedelta(seconds=self._seconds + _GRACE_SECONDS))
            verdict = json.loads(store.get("start"))
            store.add("read", 1)
        except Exception:  # rank 0's end breaks the connection
            raise OSError("rank 0 ended before all ranks had met") from None
        return verdict

    def judge(self, cards: dict[int, Card]) -> str:
        """Why these ranks cannot start together, a line each; empty if they can."""
        problems = _by_host(cards, {r: c["problem"] for r, c in cards.items() if c.get("problem")})
        absent = [rank for rank in range(self._world_size) if rank not in cards]
        if absent and not problems:
            problems = [
                f"{self._describe(absent)} did not come within {self._seconds:.0f} s; do: see what "
                "the launcher says of them, or raise --start_timeout"
            ]
        return "\n".join(problems or _differences(cards))

    def _describe(self, ranks: list[int]) -> str:
        numbers = ", ".join(map(str, ranks[:_SHOWN])) + (", ..." if len(ranks) > _SHOWN else "")
        text = f"rank{'s' * (len(ranks) > 1)} {numbers}"
        hosts = list(dict.fromkeys(self._names[rank] for rank in ranks)) if self._names else []
        if hosts:
            text += f" ({', '.join(hosts[:_SHOWN])}{', ...' if len(hosts) > _SHOWN else ''})"
        return text


def connect(*, seconds: float, serves: bool = False):
    """A connection to the run's store, under a prefix that torchrun's restarts do not share.

    seconds: to wait for the connection, and then for each answer.
    """
    from torch.distributed import PrefixStore, TCPStore

    store = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=serves,
        wait_for_workers=False,
        timeout=timedelta(seconds=seconds),
    )
    return PrefixStore(f"ds_classifier/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def _agent_serves() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def _by_host(cards: dict[int, Card], problems: dict[int, str]) -> list[str]:
    """Each problem once, with the hosts that have it unless all do."""
    ranks_of: dict[str, list[int]] = {}
    for rank, problem in problems.items():
        ranks_of.setdefault(problem, []).append(rank)
    lines = []
    for problem, ranks in list(ranks_of.items())[:_SHOWN]:
        hosts = list(dict.fromkeys(cards[rank]["host"] for rank in ranks))
        everywhere = len(hosts) == len({card["host"] for card in cards.values()})
        lines.append(problem if everywhere else f"{', '.join(hosts[:_SHOWN])}: {problem}")
    if len(ranks_of) > _SHOWN:
        lines.append(f"and {len(ranks_of) - _SHOWN} more")
    return lines


def _differences(cards: dict[int, Card]) -> list[str]:
    """What other ranks have otherwise than rank 0, with their hosts."""
    own, problems = cards[0], {}
    for rank, card in cards.items():
        odd = [
            f"{what} is {card['same'].get(what)}; need {value}, as on {own['host']}"
            for what, value in own["same"].items()
            if card["same"].get(what) != value
        ]
        if odd:
            more = [f"and {len(odd) - _SHOWN} more differences"] if len(odd) > _SHOWN else []
            problems[rank] = "\n  ".join(["not like rank 0:", *odd[:_SHOWN], *more])
    return [f"rank {rank} on {cards[rank]['host']}: {text}" for rank, text in problems.items()][
        :_SHOWN
    ]


def address_towards(host: str, port: int) -> str:
    """This host's address on the way to another; nothing is sent. Raises OSError without a way."""
    family, kind, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(place)
        return probe.getsockname()[0]


def interface_towards(host: str, port: int) -> tuple[str, str]:
    """(name, address) of the network interface on the way to another host.

    Where that host is this one and its name stands for a loopback address, as Debian sets it up,
    the interface of the default route. Raises OSError where there is none.
    """
    import psutil

    address = address_towards(host, port)
    if ipaddress.ip_address(address).is_loopback:
        address = address_towards("192.0.2.1", 9)  # of no host on earth (RFC 5737)
    for name, addresses in psutil.net_if_addrs().items():
        if any(a.address.partition("%")[0] == address for a in addresses):
            return name, address
    raise OSError(f"no network interface here has the address {address}")
