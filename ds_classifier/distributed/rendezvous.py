"""Meeting before the process group: who has come, from where, and whether all can start alike.

Rank 0 serves torch's TCPStore at MASTER_ADDR:MASTER_PORT; under torchrun, its agent does. Every
rank takes its seat, of which there is one, and lays a card there. Rank 0 reads them all, and what
it finds is everybody's error: a rank that cannot start ends the others in seconds, wherever they
are; one that does not come is named. Then each rank calls on the next one, at a port of no name as
gloo and nccl use: a firewall that lets only rank 0's port through would be felt much later.
"""

from __future__ import annotations

import ipaddress
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

_LOOK_SECONDS = 0.2
# To a port that listens. Torch asks name servers who connects, 10 s for one that does not answer.
_CONNECT_SECONDS = 25.0
_CALL_SECONDS = 5.0  # to reach another rank
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

    def meet(self, card: Card, say: Callable[[str], None]) -> tuple[Any, str, str]:
        """Returns the store, why the run cannot start, the same on all ranks and mostly empty, and
        the address of a rank on another host than rank 0, if there is one.

        card: JSON-able; "host" is where the rank is, "problem" why it cannot start, "same" what
        must be alike on all ranks: {what: value}. say: prints a line on rank 0.
        Raises OSError where the store cannot be served or reached, or is another run's.
        """
        store = self._store()
        self._take_seat(store)
        with _listen() as listener:
            card = card | {"address": self._address(), "port": listener.getsockname()[1]}
            card["problem"] = card.get("problem") or interface_problem()
            store.set(f"card/{self._rank}", json.dumps(card))
            self._come(store, "come", card.get("problem"))
            cards: dict[int, Card] = {}
            if self._rank == 0:
                cards = self._collect(store, say)
                start = self._answer(store, "start", self.judge(cards), cards)
            else:
                start = self._read_answer(store, "start")
            if start["verdict"] or not start["elsewhere"]:
                return store, start["verdict"], start["elsewhere"]
            self._come(store, "called", self._call_on_next(store))
            if self._rank == 0:
                go = self._answer(store, "go", self._judge_calls(store, cards), cards)
            else:
                go = self._read_answer(store, "go")
        return store, go["verdict"], go["elsewhere"]

    def _come(self, store, where: str, problem: str | None) -> None:
        if problem:
            store.set(f"{where}/problem/{self._rank}", problem)
            store.add(f"{where}/problems", 1)
        store.add(where, 1)

    def _answer(self, store, name: str, verdict: str, cards: dict[int, Card]) -> dict[str, str]:
        """Rank 0 tells all; where nothing starts, it waits until they have read why."""
        answer = {"verdict": verdict, "elsewhere": _elsewhere(cards)}
        store.set(name, json.dumps(answer))
        deadline = time.monotonic() + _LEAVE_SECONDS * bool(verdict)
        while time.monotonic() < deadline and store.add(f"{name}/read", 0) < len(cards) - 1:
            time.sleep(_LOOK_SECONDS)
        return answer

    def _store(self):
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        serves = self._rank == 0 and not _agent_serves()
        if not serves:
            self._wait_for_port(address, port)
        try:
            store = _in_time(lambda: connect(serves=serves, seconds=_CONNECT_SECONDS))
        except Exception as error:  # torch has several for it
            if serves:
                raise OSError(
                    f"port {port} cannot be served: {_first_line(error)}; do: end what holds it, "
                    "or give the launcher another --master_port"
                ) from None
            raise self._foreign("not rank 0 of a run") from None
        store.set_timeout(timedelta(seconds=_ANSWER_SECONDS))
        return store

    def _take_seat(self, store) -> None:
        """Be this run's only rank of this number. Raises OSError if the store is another run's.

        Where rank 0 finds its port held by a run under way, the other ranks reach that one.
        """
        if self._rank == 0:
            store.set("ranks", str(self._world_size))
        try:
            store.wait(["ranks"], timedelta(seconds=self._seconds + _GRACE_SECONDS))
            ranks = int(store.get("ranks"))
        except Exception:
            raise OSError(f"rank {self._rank}: rank 0 did not come") from None
        if ranks != self._world_size:
            raise self._foreign(f"a run of {ranks} ranks, not of {self._world_size}")
        if store.add(f"seat/{self._rank}", 1) > 1:
            raise self._foreign(f"another run, which has a rank {self._rank} already")

    def _foreign(self, what: str) -> OSError:
        return OSError(
            f"rank {self._rank}: what listens at {os.environ['MASTER_ADDR']}, port "
            f"{os.environ['MASTER_PORT']}, is {what}; do: end it, or give the launcher another "
            "--master_port"
        )

    def _address(self) -> str:
        """Where others reach this rank; on rank 0's own host it may be a loopback address."""
        try:
            if named := address_of(os.environ.get("GLOO_SOCKET_IFNAME", "")):
                return named
            return address_towards(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
        except OSError:  # this is rank 0, whose network may be none
            return "127.0.0.1"

    def _call_on_next(self, store) -> str | None:
        """Why the rank after this one, where the last one's is the first, cannot be reached."""
        rank = (self._rank + 1) % self._world_size
        card = json.loads(store.get(f"card/{rank}"))
        place = (card["address"], card["port"])
        if _is_loopback(place[0]) and not _is_loopback(self._address()):
            place = (os.environ["MASTER_ADDR"], place[1])  # it is on rank 0's host
        try:
            socket.create_connection(place, timeout=_CALL_SECONDS).close()
        except OSError as error:
            return (
                f"does not reach rank {rank} on {card['host']} at {place[0]}, port {place[1]}: "
                f"{error.strerror or 'no answer'}; do: let the nodes reach each other on all ports"
            )
        return None

    def _judge_calls(self, store, cards: dict[int, Card]) -> str:
        """Which ranks do not reach the next one, a line each."""
        deadline = time.monotonic() + _CALL_SECONDS + _GRACE_SECONDS
        while store.add("called", 0) < self._world_size and time.monotonic() < deadline:
            time.sleep(_LOOK_SECONDS / 10)
        ranks = (
            [r for r in cards if store.check([f"called/problem/{r}"])]
            if (store.add("called/problems", 0))
            else []
        )
        return "\n".join(
            f"{cards[r]['host']}: rank {r} {store.get(f'called/problem/{r}').decode()}"
            for r in ranks[:_SHOWN]
        )

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
            if store.add("come/problems", 0):
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

    def _read_answer(self, store, name: str) -> dict[str, str]:
        try:
            store.wait([name], timedelta(seconds=self._seconds + _GRACE_SECONDS))
            answer = json.loads(store.get(name))
            store.add(f"{name}/read", 1)
        except Exception:  # rank 0's end breaks the connection
            raise OSError("rank 0 ended before all ranks had met") from None
        return answer

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


def _in_time(make: Callable[[], Any]) -> Any:
    """What a call makes, or its error; TimeoutError if it takes longer than a connection may.

    Torch waits without end for the first answer of what accepts a connection and is no store.
    """
    outcome: dict[str, Any] = {}

    def call() -> None:
        try:
            outcome["made"] = make()
        except Exception as error:
            outcome["error"] = error

    thread = threading.Thread(target=call, name="connecting", daemon=True)
    thread.start()
    thread.join(_CONNECT_SECONDS)
    if "error" in outcome:
        raise outcome["error"]
    if "made" not in outcome:
        raise TimeoutError("no answer")
    return outcome["made"]


def _listen() -> socket.socket:
    """A socket that the kernel lets others connect to, at any address of this host."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _elsewhere(cards: dict[int, Card]) -> str:
    """The address of a rank on another host than rank 0; empty if there is none."""
    for card in cards.values():
        if card["address"] != cards[0]["address"] and not _is_loopback(card["address"]):
            return card["address"]
    return ""


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


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


def interface_problem() -> str | None:
    """Why gloo could not use the interface that the environment names."""
    import psutil

    names, here = os.environ.get("GLOO_SOCKET_IFNAME", ""), psutil.net_if_addrs()
    absent = [name for name in names.split(",") if name and name not in here]
    if not absent:
        return None
    return (
        f"GLOO_SOCKET_IFNAME: got {names}; need names of interfaces here, {', '.join(here)}; do: "
        "unset it, training finds the interface between the hosts"
    )


def address_of(interface: str) -> str:
    """The first address of a network interface, or of a list of them; empty if there is none."""
    import psutil

    for found in psutil.net_if_addrs().get(interface.partition(",")[0], []):
        if found.family in (socket.AF_INET, socket.AF_INET6):
            return found.address.partition("%")[0]
    return ""


def address_towards(host: str, port: int) -> str:
    """This host's address on the way to another; nothing is sent. Raises OSError without a way."""
    family, kind, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(place)
        return probe.getsockname()[0]


def interface_towards(host: str, port: int, elsewhere: str = "") -> tuple[str, str]:
    """(name, address) of the network interface on the way to another host.

    Where that host is this one and its name stands for a loopback address, as Debian sets it up,
    the interface on the way to the address elsewhere; without one, that of the default route.
    Raises OSError where there is none.
    """
    import psutil

    address = address_towards(host, port)
    if _is_loopback(address):
        address = address_towards(elsewhere or "192.0.2.1", 9)  # of no host on earth (RFC 5737)
    for name, addresses in psutil.net_if_addrs().items():
        if any(a.address.partition("%")[0] == address for a in addresses):
            return name, address
    raise OSError(f"no network interface here has the address {address}")
