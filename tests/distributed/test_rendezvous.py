"""Ranks that meet, as threads of this process: all arrive, some do not, or another run answers."""

from __future__ import annotations

import json
import os
import socket
import threading
import time

import pytest
from running import ROOT, free_port, run_python

from ds_classifier.distributed import rendezvous
from ds_classifier.distributed.rendezvous import Rendezvous, interface_towards

SAME = {"the code": "1f", "--lr": 0.1}


@pytest.fixture(autouse=True)
def place(monkeypatch):
    for name in ("GLOO_SOCKET_IFNAME", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))


def card(rank: int, same: dict | None = None, problem: str | None = None) -> dict:
    return {"host": f"node-{rank}", "problem": problem, "same": same or SAME}


class Meeting:
    """Ranks that meet, each in its own thread. answers: what each rank got, or its error."""

    def __init__(self, cards: dict[int, dict], *, world: int = 0, seconds: float = 20, names=()):
        self.answers: dict[int, tuple | str] = {}
        self.said: list[str] = []
        world = world or len(cards)
        self._began = time.monotonic()

        def meet(rank: int) -> None:
            try:
                self.answers[rank] = Rendezvous(rank, world, list(names), seconds).meet(
                    cards[rank], self.said.append
                )
            except OSError as error:
                self.answers[rank] = str(error)

        self._threads = [
            threading.Thread(target=meet, args=[rank], name=f"rank {rank}") for rank in cards
        ]
        for thread in self._threads:
            thread.start()

    def end(self) -> Meeting:
        for thread in self._threads:
            thread.join(timeout=60)
            assert not thread.is_alive()
        self.seconds = time.monotonic() - self._began
        return self

    @property
    def verdicts(self) -> list[str]:
        return [answer[1] for _, answer in sorted(self.answers.items())]


def meet(*arguments, **keywords) -> Meeting:
    return Meeting(*arguments, **keywords).end()


def test_ranks_that_agree_start_with_one_store():
    found = meet({rank: card(rank) for rank in range(5)})
    assert found.verdicts == [""] * 5
    found.answers[3][0].set("word", "of rank 3")
    assert all(answer[0].get("word") == b"of rank 3" for answer in found.answers.values())
    assert found.seconds < 5


def test_a_rank_alone():
    assert meet({0: card(0)}).verdicts == [""]


def test_a_difference_is_reported_to_all_with_its_host():
    cards = {0: card(0), 1: card(1), 2: card(2, SAME | {"--lr": 0.2})}
    (verdict,) = set(meet(cards).verdicts)
    assert verdict == "rank 2 on node-2 differs from rank 0:\n  --lr is 0.2; need 0.1, as on node-0"


def test_a_problem_ends_all_at_once_though_one_is_missing():
    found = meet({0: card(0), 1: card(1, problem="no disk")}, world=3, seconds=40)
    assert set(found.verdicts) == {"node-1: no disk"}
    assert found.seconds < rendezvous._GRACE_SECONDS + 3


def test_ranks_that_do_not_connect_are_named_with_their_hosts():
    found = meet({0: card(0), 2: card(2)}, world=4, seconds=1.5, names=["a", "a", "b", "c"])
    assert set(found.verdicts) == {
        "ranks 1, 3 (a, c) did not connect within 2 s; do: read what the launcher printed about "
        "them, or raise --start_timeout"
    }


def test_without_rank_0_others_say_that_they_cannot_reach_it(monkeypatch):
    found = meet({1: card(1)}, world=2, seconds=1)
    assert found.answers[1].startswith("rank 1 cannot reach rank 0 at 127.0.0.1, port ")


def test_a_late_rank_is_waited_for():
    first = Meeting({0: card(0)}, world=2)
    time.sleep(1.5)
    second = meet({1: card(1)}, world=2)
    assert first.end().verdicts == second.verdicts == [""]


def test_ranks_of_another_start_leave_a_run_under_way_alone():
    """The same command again, while it runs: rank 0 finds its port in use, the others the run."""
    run = meet({0: card(0), 1: card(1)})
    store = run.answers[0][0]
    before = store.get("card/1")
    again = meet({0: card(0), 1: card(1, SAME | {"--lr": 9})})
    assert again.answers[0].startswith("port ")
    assert "cannot be served" in again.answers[0]
    assert "is another run, which has a rank 1 already" in again.answers[1]
    bigger = meet({2: card(2)}, world=3)
    assert "is a run of 2 ranks, not of 3" in bigger.answers[2]
    assert store.get("card/1") == before
    assert not store.check(["card/2"])
    assert store.add("arrived", 0) == 2


def test_a_single_rank_that_meets_another_run_says_so(tmp_path):
    """The host's first rank, which reports for its host, has no error or does not exist."""
    running = rendezvous.connect(serves=True, seconds=10)
    running.set("ranks", "2")
    running.add("seat/1", 1)
    place = {name: os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT")}
    rank = dict(RANK="1", LOCAL_RANK="1", WORLD_SIZE="2", LOCAL_SIZE="2")
    done = run_python(ROOT / "launch" / "evaluate.py", tmp_path, cwd=tmp_path, **place, **rank)
    assert done.code == 1
    assert "is another run, which has a rank 1 already; do: end it" in done.output
    assert "Traceback" not in done.output


def test_a_program_that_accepts_and_never_answers_is_reported_soon(monkeypatch):
    """A web server does that; torch's client would wait forever."""
    monkeypatch.setattr(rendezvous, "_CONNECT_SECONDS", 2.0)
    with socket.create_server(("127.0.0.1", 0)) as foreign:
        monkeypatch.setenv("MASTER_PORT", str(foreign.getsockname()[1]))
        found = meet({0: card(0), 1: card(1)})
    assert "cannot be served" in found.answers[0]
    assert "is not rank 0 of a run" in found.answers[1]
    assert found.seconds < 6


@pytest.fixture
def hosts(monkeypatch):
    """Put every rank on a host of its own: 127.0.0.1 is loopback, 127.0.0.2 and up are not."""
    monkeypatch.setattr(rendezvous, "_is_loopback", lambda address: address == "127.0.0.1")
    monkeypatch.setattr(Rendezvous, "_address", lambda self: f"127.0.0.{self._rank + 1}")


def test_ranks_of_several_hosts_connect_to_each_other(hosts):
    found = meet({rank: card(rank) for rank in range(3)})
    assert found.verdicts == [""] * 3
    assert {answer[2] for answer in found.answers.values()} == {"127.0.0.2"}


def test_a_host_with_closed_ports_is_named(hosts, monkeypatch):
    def shut():
        if threading.current_thread().name != "rank 2":
            return open_port()
        refusing = socket.socket()
        refusing.bind(("127.0.0.3", 0))
        return refusing

    open_port = rendezvous._listen
    monkeypatch.setattr(rendezvous, "_listen", shut)
    (verdict,) = set(meet({rank: card(rank) for rank in range(4)}).verdicts)
    assert verdict.startswith("node-1: rank 1 cannot reach rank 2 on node-2 at 127.0.0.3, port ")
    assert "Connection refused; do: " in verdict


def test_a_missing_interface_is_reported_before_gloo_fails(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert rendezvous.interface_problem() is None
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "none7")
    (verdict,) = set(meet({0: card(0), 1: card(1)}).verdicts)
    assert verdict.startswith("GLOO_SOCKET_IFNAME: got none7; need interfaces of this host: ")


def test_a_loopback_name_gives_the_interface_to_another_host(monkeypatch):
    # The kernel's own choice for an address of this host is that address.
    assert interface_towards("127.0.0.1", 9, "127.0.0.1") == ("lo", "127.0.0.1")
    asked = []
    monkeypatch.setattr(
        rendezvous, "address_towards", lambda host, port: asked.append(host) or "127.0.0.1"
    )
    interface_towards("name", 9, "10.9.8.7")
    assert asked == ["name", "10.9.8.7"]


def test_512_ranks_meet_in_seconds():
    """Four threads make all requests, one connection each: the store serves one at a time."""
    world, cards = 512, {0: card(0)}
    first = Meeting(cards, world=world, seconds=50)

    def many(ranks: range) -> None:
        rendezvous.Rendezvous(1, world, [], 50)._wait_for_port(
            "127.0.0.1", int(rendezvous.os.environ["MASTER_PORT"])
        )
        store = rendezvous.connect(seconds=20)
        for rank in ranks:
            store.set(f"card/{rank}", json.dumps(card(rank) | {"address": "127.0.0.1"}))
            store.add("arrived", 1)

    threads = [threading.Thread(target=many, args=[range(1 + i, world, 4)]) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert first.end().verdicts == [""]
    assert first.seconds < 15
