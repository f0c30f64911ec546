"""Meeting before the process group: all ranks connect, and agree that the run can start.

Rank 0 serves torch's TCPStore at MASTER_ADDR:MASTER_PORT; under torchrun, its agent serves it.
Every rank takes its seat in the store, of which there is one per rank number, and writes a card of
facts about itself. Rank 0 reads all cards and answers all ranks. So a rank that cannot start ends
the ranks on all hosts within seconds, and a rank that does not connect is named.

Then each rank connects to the next one on an ephemeral port, as gloo and nccl will. Without this, a
firewall that opens only rank 0's port would show as a hang in the first collective.
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

import psutil

from ds_classifier.common.text import first_line

_POLL_SECONDS = 0.2
# To connect to a listening port. Torch looks up the name of the one who connects, which takes 10 s
# if the name server does not answer.
_CONNECT_SECONDS = 25.0
_CALL_SECONDS = 5.0  # to connect to another rank
_GRACE_SECONDS = 3.0  # after the first problem: for other ranks to report theirs
_READ_SECONDS = 30.0  # for the other ranks to read why the run cannot start
_NEWS_SECONDS = 30.0  # between lines that name the missing ranks
_ANSWER_SECONDS = 300.0  # for an answer of the store, once connected
_SHOWN = 12  # problems of one kind in a message

Card = dict[str, Any]  # what a rank writes about itself; see Rendezvous.meet


class Rendezvous:
    """The part of this rank in the meeting.

    rank, world_size: as the launcher set them.
    names: the host of each rank; [] if the launcher did not pass them on.
    seconds: to wait for all ranks.
    """

    def __init__(self, rank: int, world_size: int, names: list[str], seconds: float):
        self._rank, self._world_size, self._names = rank, world_size, names
        self._deadline = time.monotonic() + seconds
        self._seconds = seconds

    def meet(self, card: Card, say: Callable[[str], None]) -> tuple[Any, str, str]:
        """Meet the other ranks; return (store, verdict, other host).

        card: JSON-able. "host" is the rank's host, "problem" why it cannot start or None, "same"
        the facts that must not differ between ranks: {name: value}.
        say: prints a line on rank 0.
        The verdict says why the run cannot start, the same on all ranks; "" if it can.
        The other host is an address on another host than rank 0's; "" if there is none.
        Raises OSError if the store cannot be served or reached, or belongs to another run.
        """
        store = self._store()
        self._take_seat(store)
        with _listen() as listener:
            card = card | {"address": self._address(), "port": listener.getsockname()[1]}
            card["problem"] = card.get("problem") or interface_problem()
            store.set(f"card/{self._rank}", json.dumps(card))
            self._report(store, "arrived", card.get("problem"))
            cards: dict[int, Card] = {}
            if self._rank == 0:
                cards = self._collect(store, say)
                start = self._answer(store, "start", self.judge(cards), cards)
            else:
                start = self._read_answer(store, "start")
            if start["verdict"] or not start["other_host"]:
                return store, start["verdict"], start["other_host"]
            self._report(store, "called", self._call_next(store))
            if self._rank == 0:
                go = self._answer(store, "go", self._judge_calls(store, cards), cards)
            else:
                go = self._read_answer(store, "go")
        return store, go["verdict"], go["other_host"]

    def _report(self, store, stage: str, problem: str | None) -> None:
        """Count this rank as one that reached a stage, with its problem there if it has one."""
        if problem:
            store.set(f"{stage}/problem/{self._rank}", problem)
            store.add(f"{stage}/problems", 1)
        store.add(stage, 1)

    def _answer(self, store, name: str, verdict: str, cards: dict[int, Card]) -> dict[str, str]:
        """Answer all ranks. After a bad verdict, wait until they have read it."""
        answer = {"verdict": verdict, "other_host": _other_host(cards)}
        store.set(name, json.dumps(answer))
        deadline = time.monotonic() + _READ_SECONDS * bool(verdict)
        while time.monotonic() < deadline and store.add(f"{name}/read", 0) < len(cards) - 1:
            time.sleep(_POLL_SECONDS)
        return answer

    def _store(self):
        """Serve the store, or connect to it."""
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        serves = self._rank == 0 and not _agent_serves()
        if not serves:
            self._wait_for_port(address, port)
        try:
            store = _in_time(lambda: connect(serves=serves, seconds=_CONNECT_SECONDS))
        except Exception as error:  # torch raises several types
            if serves:
                raise OSError(
                    f"port {port} cannot be served: {first_line(error)}; do: end the program that "
                    "uses it, or give the launcher another --master_port"
                ) from None
            raise self._foreign("not rank 0 of a run") from None
        store.set_timeout(timedelta(seconds=_ANSWER_SECONDS))
        return store

    def _take_seat(self, store) -> None:
        """Claim this rank's number. Raises OSError if the store belongs to another run.

        If a running job holds rank 0's port, the other ranks connect to that job.
        """
        if self._rank == 0:
            store.set("ranks", str(self._world_size))
        try:
            store.wait(["ranks"], timedelta(seconds=self._seconds + _GRACE_SECONDS))
            ranks = int(store.get("ranks"))
        except Exception:
            raise OSError(f"rank {self._rank}: rank 0 did not connect") from None
        if ranks != self._world_size:
            raise self._foreign(f"a run of {ranks} ranks, not of {self._world_size}")
        if store.add(f"seat/{self._rank}", 1) > 1:
            raise self._foreign(f"another run, which has a rank {self._rank} already")

    def _foreign(self, what: str) -> OSError:
        return OSError(
            f"rank {self._rank}: the program that listens at {os.environ['MASTER_ADDR']}, port "
            f"{os.environ['MASTER_PORT']}, is {what}; do: end it, or give the launcher another "
            "--master_port"
        )

    def _address(self) -> str:
        """Return this host's address for other ranks; on rank 0's host it may be loopback."""
        try:
            if named := address_of(os.environ.get("GLOO_SOCKET_IFNAME", "")):
                return named
            return address_towards(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
        except OSError:  # rank 0 may have no network
            return "127.0.0.1"

    def _call_next(self, store) -> str | None:
        """Connect to the next rank, of the last one the first; return why it failed, or None."""
        rank = (self._rank + 1) % self._world_size
        card = json.loads(store.get(f"card/{rank}"))
        address, port = card["address"], card["port"]
        if _is_loopback(address) and not _is_loopback(self._address()):
            address = os.environ["MASTER_ADDR"]  # the next rank is on rank 0's host
        try:
            socket.create_connection((address, port), timeout=_CALL_SECONDS).close()
        except OSError as error:
            return (
                f"cannot reach rank {rank} on {card['host']} at {address}, port {port}: "
                f"{error.strerror or 'no answer'}; do: open all ports between the nodes"
            )
        return None

    def _judge_calls(self, store, cards: dict[int, Card]) -> str:
        """Return a line for each rank that cannot reach the next one."""
        deadline = time.monotonic() + _CALL_SECONDS + _GRACE_SECONDS
        while store.add("called", 0) < self._world_size and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS / 10)
        ranks = []
        if store.add("called/problems", 0):
            ranks = [r for r in cards if store.check([f"called/problem/{r}"])]
        return "\n".join(
            f"{cards[r]['host']}: rank {r} {store.get(f'called/problem/{r}').decode()}"
            for r in ranks[:_SHOWN]
        )

    def _wait_for_port(self, address: str, port: int) -> None:
        """Wait until rank 0 listens. Torch would wait for twice its time-out, and not say why."""
        while True:
            try:
                with socket.create_connection((address, port), timeout=_POLL_SECONDS * 10):
                    return
            except socket.gaierror:
                reason = f"this host cannot resolve {address}"
            except OSError as error:
                reason = error.strerror or "no answer"
            if time.monotonic() > self._deadline:
                raise OSError(
                    f"rank {self._rank} cannot reach rank 0 at {address}, port {port}, within "
                    f"{self._seconds:.0f} s: {reason}; do: check that rank 0 runs, and that no "
                    "firewall between the hosts blocks the port"
                )
            time.sleep(_POLL_SECONDS)

    def _collect(self, store, say: Callable[[str], None]) -> dict[int, Card]:
        """Return the cards of all ranks, or of those that arrived before a problem or time-out."""
        news, deadline = time.monotonic() + _NEWS_SECONDS, self._deadline
        while store.add("arrived", 0) < self._world_size and time.monotonic() < deadline:
            if store.add("arrived/problems", 0):
                deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
            if time.monotonic() > news:
                news += _NEWS_SECONDS
                say(f"waiting for {self._describe(self._absent(store))}")
            time.sleep(_POLL_SECONDS)
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
        except Exception:  # the connection breaks when rank 0 ends
            raise OSError("rank 0 ended before all ranks had met") from None
        return answer

    def judge(self, cards: dict[int, Card]) -> str:
        """Return why these ranks cannot start together, one reason per line; "" if they can."""
        problems = _by_host(cards, {r: c["problem"] for r, c in cards.items() if c.get("problem")})
        absent = [rank for rank in range(self._world_size) if rank not in cards]
        if absent and not problems:
            problems = [
                f"{self._describe(absent)} did not connect within {self._seconds:.0f} s; do: read "
                "what the launcher printed about them, or raise --start_timeout"
            ]
        return "\n".join(problems or _differences(cards))

    def _describe(self, ranks: list[int]) -> str:
        """Return "ranks 1, 3 (host-a, host-c)"."""
        numbers = ", ".join(map(str, ranks[:_SHOWN])) + (", ..." if len(ranks) > _SHOWN else "")
        text = f"rank{'s' * (len(ranks) > 1)} {numbers}"
        hosts = list(dict.fromkeys(self._names[rank] for rank in ranks)) if self._names else []
        if hosts:
            text += f" ({', '.join(hosts[:_SHOWN])}{', ...' if len(hosts) > _SHOWN else ''})"
        return text


def connect(*, seconds: float, serves: bool = False):
    """Connect to the run's store, and serve it if `serves`.

    seconds: to wait for the connection, and then for each answer.
    If MASTER_PORT is 0, the store takes a free port, and MASTER_PORT becomes its number.
    Keys get a prefix that differs between torchrun's restarts.
    """
    from torch.distributed import PrefixStore, TCPStore

    store = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=serves,
        wait_for_workers=False,
        timeout=timedelta(seconds=seconds),
    )
    os.environ["MASTER_PORT"] = str(store.port)
    return PrefixStore(f"ds_classifier/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def _agent_serves() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _in_time(make: Callable[[], Any]) -> Any:
    """Return what a call returns, or raise what it raises; TimeoutError after _CONNECT_SECONDS.

    If a program that is not a store accepts a connection, torch waits forever for its answer.
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
    """Return a socket that accepts connections at every address of this host."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _other_host(cards: dict[int, Card]) -> str:
    """Return an address on another host than rank 0's; "" if there is none."""
    for card in cards.values():
        if card["address"] != cards[0]["address"] and not _is_loopback(card["address"]):
            return card["address"]
    return ""


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def _by_host(cards: dict[int, Card], problems: dict[int, str]) -> list[str]:
    """Return a line for each distinct problem, with its hosts unless all hosts have it."""
    ranks_of: dict[str, list[int]] = {}
    for rank, problem in problems.items():
        ranks_of.setdefault(problem, []).append(rank)
    lines = []
    for problem, ranks in list(ranks_of.items())[:_SHOWN]:
        hosts = list(dict.fromkeys(cards[rank]["host"] for rank in ranks))
        on_all_hosts = len(hosts) == len({card["host"] for card in cards.values()})
        lines.append(problem if on_all_hosts else f"{', '.join(hosts[:_SHOWN])}: {problem}")
    if len(ranks_of) > _SHOWN:
        lines.append(f"and {len(ranks_of) - _SHOWN} more")
    return lines


def _differences(cards: dict[int, Card]) -> list[str]:
    """Return the facts in which other ranks differ from rank 0, with the hosts of those ranks."""
    own, lines = cards[0], []
    for rank, card in cards.items():
        facts = [
            f"{name} is {card['same'].get(name)}; need {value}, as on {own['host']}"
            for name, value in own["same"].items()
            if card["same"].get(name) != value
        ]
        if facts:
            more = [f"and {len(facts) - _SHOWN} more differences"] if len(facts) > _SHOWN else []
            head = f"rank {rank} on {card['host']} differs from rank 0:"
            lines.append("\n  ".join([head, *facts[:_SHOWN], *more]))
    return lines[:_SHOWN]


def interface_problem() -> str | None:
    """Return why gloo cannot use the interfaces that GLOO_SOCKET_IFNAME names, or None."""
    names, here = os.environ.get("GLOO_SOCKET_IFNAME", ""), psutil.net_if_addrs()
    absent = [name for name in names.split(",") if name and name not in here]
    if not absent:
        return None
    return (
        f"GLOO_SOCKET_IFNAME: got {names}; need interfaces of this host: {', '.join(here)}; do: "
        "unset it, since training finds the interface between the hosts"
    )


def address_of(interface: str) -> str:
    """Return the first IP address of a network interface; "" if it has none.

    interface: a name, or a comma-separated list of names, of which the first counts.
    """
    for entry in psutil.net_if_addrs().get(interface.partition(",")[0], []):
        if entry.family in (socket.AF_INET, socket.AF_INET6):
            return entry.address.partition("%")[0]
    return ""


def address_towards(host: str, port: int) -> str:
    """Return this host's address on the route to another; nothing is sent.

    Raises OSError if there is no route.
    """
    family, kind, _, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(target)
        return probe.getsockname()[0]


def interface_towards(host: str, port: int, other_host: str = "") -> tuple[str, str]:
    """Return (name, address) of the network interface on the route to another host.

    On that host itself, whose name may stand for a loopback address (as Debian sets it up): the
    interface on the route to the address `other_host`, or the default route's if that is "".
    Raises OSError if there is none.
    """
    address = address_towards(host, port)
    if _is_loopback(address):
        address = address_towards(other_host or "192.0.2.1", 9)  # no host has it (RFC 5737)
    for name, addresses in psutil.net_if_addrs().items():
        if any(a.address.partition("%")[0] == address for a in addresses):
            return name, address
    raise OSError(f"no network interface of this host has the address {address}")
