"""Agreement between ranks, through the launcher: one rank's problem becomes every rank's error."""

import io
import json
import os
import socket
import subprocess
import sys
from contextlib import suppress

import pytest
from running import ROOT, environment, launch

from ds_classifier import distributed

SCRIPT = """
import json, os, sys
sys.path.insert(0, {root!r})
import torch
from ds_classifier import distributed
from ds_classifier.distributed import process_group

device = distributed.init()
rank, out = distributed.rank(), {{}}

def attempt(name, call):
    try:
        out[name] = call()
    except ValueError as error:
        out[name] = f"ValueError: {{error}}"

def fail():
    raise OSError("disk full")

attempt("result", lambda: distributed.on_rank_0(lambda: {{"answer": [1, "ü"]}}, device))
attempt("failure", lambda: distributed.on_rank_0(fail, device))
attempt("nobody", lambda: distributed.raise_together(None, device))
attempt("one", lambda: distributed.raise_together("no GPU" if rank == 1 else None, device))
attempt("all", lambda: distributed.raise_together("no data", device))
out["gathered"] = distributed.all_gather(torch.tensor([[rank, 7]])).tolist()
distributed.say(f"rank {{rank}} prints")
distributed.complain(f"rank {{rank}} complains")
with open(f"rank{{rank}}.json", "w") as file:
    json.dump(out, file)
distributed.finish()
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    (folder / "script.py").write_text(SCRIPT.format(root=str(ROOT)))
    done = launch(3, "", script=folder / "script.py", cwd=folder)
    assert done.code == 0, done.output
    return [json.loads((folder / f"rank{r}.json").read_text()) for r in range(3)], done


def test_rank_0s_result_and_failure_reach_all(answers):
    for out in answers[0]:
        assert out["result"] == {"answer": [1, "ü"]}
        assert out["failure"] == "ValueError: disk full"


def test_a_problem_on_one_rank_is_raised_by_all_with_its_number(answers):
    for out in answers[0]:
        assert out["nobody"] is None
        assert out["one"] == "ValueError: rank 1: no GPU"
        assert out["all"] == "ValueError: no data"


def test_gather_is_in_rank_order(answers):
    assert all(out["gathered"] == [[[0, 7]], [[1, 7]], [[2, 7]]] for out in answers[0])


def test_only_rank_0_prints(answers):
    lines = answers[1].lines
    assert [line for line in lines if "prints" in line] == ["rank 0 prints"]
    assert [line for line in lines if "complains" in line] == ["error: rank 0 complains"]


def test_more_ranks_than_gpus_are_reported_to_all(monkeypatch):
    """The hostfile has too many slots: rank 1 of 2, on a host with one GPU."""
    import torch

    from ds_classifier import distributed
    from ds_classifier.distributed import process_group

    met = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    for name in ("WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.setenv(name, "2")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(process_group, "_meet", lambda card, timeout: met.append(card["problem"]))
    with pytest.raises(distributed.AgreedError, match="slots=1"):
        distributed.init()
    assert met == [
        "got 2 ranks on this host, which has 1 GPU; do: put slots=1 into the hostfile, or check "
        "CUDA_VISIBLE_DEVICES"
    ]


PRINTING = """
import sys
sys.path.insert(0, sys.argv[1])
from ds_classifier import distributed
from ds_classifier.distributed import process_group
for _ in range(3):
    distributed.say("a line")
    distributed.complain("an error")
"""


def test_a_reader_of_the_output_may_end():
    """The run survives the broken pipe of tee, which ends first at Ctrl-C, and saves."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-c", PRINTING, str(ROOT)]
    try:
        done = subprocess.run(command, stdout=writer, stderr=writer, timeout=60)
    finally:
        os.close(writer)
    assert done.returncode == 0


def test_a_full_disk_under_a_redirected_output_does_not_end_the_run():
    command = [sys.executable, "-c", PRINTING.replace("complain", "warn"), str(ROOT)]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, timeout=60)
    assert b"Traceback" not in done.stderr
    assert done.stderr.count(b"an error") == 3


MEETING = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
from ds_classifier import distributed
distributed.init()
print(os.environ["MASTER_PORT"], flush=True)
sys.stdin.read()  # until both have met
"""


def test_two_jobs_at_once_without_a_launcher_take_different_ports():
    """The launcher's usual port is taken, by one of them or by another program."""
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with suppress(OSError):  # if somebody else has it, it is taken all the same
            taken.bind(("", 29500))
            taken.listen()
        command = [sys.executable, "-c", MEETING, ROOT]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        jobs = [subprocess.Popen(command, env=environment(), text=True, **pipes) for _ in "ab"]
        ports = [job.stdout.readline().strip() for job in jobs]
        ends = [(job.communicate("", timeout=60)[1], job.returncode) for job in jobs]
    assert [code for _, code in ends] == [0, 0], ends
    assert len({*ports, "29500", "0"}) == 4, ports


def test_a_kept_port_is_for_rank_0_alone():
    from torch.distributed import TCPStore

    from ds_classifier.distributed import keep_port

    with keep_port() as port:
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", port))
        store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
        store.set("key", "value")
        assert store.get("key") == b"value"


LEAVING = """
import atexit, os, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import deepspeed, torch.distributed
from ds_classifier import distributed
from ds_classifier.distributed import failures

def fail(how):
    device = distributed.init()
    group = distributed.cpu_group()
    pending = torch.distributed.all_reduce(torch.ones(1), group=group, async_op=True)
    if how == "traceback":
        raise RuntimeError("a bug")
    if how == "Ctrl-C":
        raise KeyboardInterrupt
    distributed.raise_together("a problem", device)

def threads():
    names = [p.read_text().strip() for p in Path("/proc/self/task").glob("*/comm")]
    print(how, *sorted(name for name in names if "gloo" in name), flush=True)

for how in ("traceback", "Ctrl-C", "error"):
    if os.fork() == 0:
        atexit.register(threads)  # before init registers its own: called after it
        try:
            fail(how)
        except ValueError as error:
            sys.exit(failures.report(error))
    os.wait()
"""


def test_no_thread_of_gloo_is_alive_when_python_shuts_down():
    """A thread that then frees a tensor would abort the process: exit code 134."""
    command = [sys.executable, "-c", LEAVING, ROOT]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[:3] == ["traceback", "Ctrl-C", "error"], done.stderr


def test_a_terminal_without_a_character_gets_it_escaped(monkeypatch):
    screen = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr("sys.stdout", screen)
    distributed.show("é 猫")
    assert screen.buffer.getvalue().decode("latin-1") == "é \\u732b\n"
