"""Several hosts on one machine: name spaces joined by a bridge, with sshd in each.

Every host has its own network, processes, mounts and name. Files are shared, except in the
directories that are named as separate. When the process that made the hosts dies, from any cause,
the kernel removes them with all their processes. Nothing is written outside the given directory.
Needs root, iproute2, ssh, sshd and pdsh; `missing` says which of these is absent.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

NETWORK = "10.77.0"
PROGRAMS = {"ip": "iproute2", "ssh": "openssh-client", "sshd": "openssh-server", "pdsh": "pdsh"}
SSH_PORT = 22


def missing() -> str:
    """Return why hosts cannot be made here, or an empty string if they can."""
    if os.geteuid() != 0:
        return "name spaces need root"
    absent = [package for program, package in PROGRAMS.items() if not shutil.which(program)]
    if absent:
        return f"needs the packages {', '.join(absent)}"
    done = subprocess.run(["unshare", "--net", "--pid", "--fork", "--mount", "true"])
    return "name spaces are not allowed here" if done.returncode else ""


class Node:
    """A host. name: its host name, here and on the others. address: its IP on the bridge."""

    def __init__(self, name: str, address: str, process: subprocess.Popen, pid: int, port: str):
        self.name, self.address, self.pid = name, address, pid
        self._process, self._port = process, port
        self._pids = os.readlink(f"/proc/{pid}/ns/pid")

    def command(self, words: Sequence[object]) -> list[str]:
        """Return a command line that runs these words on the host."""
        spaces = ["--net", "--uts", "--mount", "--pid"]
        return ["nsenter", "--target", str(self.pid), *spaces, "--", *map(str, words)]

    def run(self, *words: object) -> str:
        """Run a command on the host to its end and return its output."""
        return subprocess.run(
            self.command(words), check=True, capture_output=True, text=True
        ).stdout

    def processes(self) -> dict[int, str]:
        """Return the command lines of its processes except sshd, by this machine's process ids."""
        found = {}
        for path in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if os.readlink(path / "ns" / "pid") == self._pids:
                    line = (path / "cmdline").read_text().replace("\0", " ").strip()
                    if line and not line.startswith("sshd") and int(path.name) != self.pid:
                        found[int(path.name)] = line
        return found

    def kill(self) -> None:
        """Kill all processes of the host, and the host."""
        self._process.kill()
        self._process.wait()

    def cut_power(self) -> None:
        """Kill the host with its network down, so that the others get no sign of it."""
        self.set_link("down")
        self.kill()

    def set_link(self, state: str) -> None:
        """Set its network link, on the side of the switch, up or down."""
        _ip(self._port.split()[0], "link", "set", self._port.split()[1], state)

    def slow_link(self, rate: str) -> None:
        """Limit the rate at which the host sends, such as 1mbit."""
        limit = ["rate", rate, "burst", "32kbit", "latency", "400ms"]
        self.run("tc", "qdisc", "replace", "dev", "eth0", "root", "tbf", *limit)


class Cluster:
    """A context manager: hosts node-1, node-2, ... on one bridge, which reach each other by ssh.

    root: a directory for keys, settings and the separate directories. separate: directories at the
    same path on every host, of which each host has its own.
    """

    def __init__(self, root: Path, nodes: int, *, separate: Sequence[Path] = ()):
        self._root, self._count, self._separate = root, nodes, separate
        self.nodes: list[Node] = []
        self._switch: subprocess.Popen | None = None

    def __enter__(self) -> Cluster:
        self._root.mkdir(parents=True, exist_ok=True)
        for name in ("id", "host_key"):
            key = self._root / name
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
        try:
            self._switch = _hold(
                ["unshare", "--net", "sh", "-c", "echo ready; exec sleep infinity"]
            )
            switch = str(self._switch.pid)
            _ip(switch, "link", "add", "bridge", "type", "bridge")
            _ip(switch, "link", "set", "bridge", "up")
            for number in range(1, self._count + 1):
                self.nodes.append(self._add(number, switch))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        for node in self.nodes:
            node.kill()
        if self._switch is not None:
            self._switch.kill()
            self._switch.wait()

    def _add(self, number: int, switch: str) -> Node:
        name, address = f"node-{number}", f"{NETWORK}.{number}"
        settings = {"root": str(self._root), "name": name, "count": self._count}
        settings["separate"] = [str(path) for path in self._separate]
        spaces = ["--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        process = _hold(
            [
                "unshare",
                *spaces,
                sys.executable,
                str(Path(__file__).resolve()),
                json.dumps(settings),
            ]
        )
        (pid,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        node = Node(name, address, process, int(pid), f"{switch} port{number}")
        peer = ["type", "veth", "peer", "name", "eth0", "netns", pid]
        _ip(switch, "link", "add", f"port{number}", *peer)
        _ip(switch, "link", "set", f"port{number}", "master", "bridge", "up")
        node.run("ip", "address", "add", f"{address}/24", "dev", "eth0")
        node.run("ip", "link", "set", "eth0", "up")
        node.run("ip", "link", "set", "lo", "up")
        node.run("ip", "route", "add", "default", "dev", "eth0")
        return node

    def processes(self) -> list[str]:
        """Return the command lines of all processes on the hosts."""
        return [line for node in self.nodes for line in node.processes().values()]

    def hostfile(self, path: Path, *nodes: Node) -> Path:
        """Write a hostfile with one slot on each of these hosts, or on all if none is named."""
        path.write_text("".join(f"{node.name} slots=1\n" for node in nodes or self.nodes))
        return path


def _hold(command: list[str]) -> subprocess.Popen:
    """Start a process that dies with this one, and wait until it says that it is ready."""
    from ds_classifier.distributed.processes import die_with

    parent = os.getpid()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, preexec_fn=lambda: die_with(parent)
    )
    assert process.stdout.readline() == "ready\n", f"{command} does not start"
    return process


def _ip(pid: str, *words: str) -> None:
    """Run ip in the network name space of a process."""
    subprocess.run(["nsenter", "--target", pid, "--net", "ip", *words], check=True)


# ---------------------------------------------------------------- the first process of a host


def be_a_host(root: Path, name: str, count: int, separate: list[str]) -> None:
    """Set up the host in its fresh name spaces, start sshd, and reap orphans for ever."""
    own = root / name
    own.mkdir()

    def mount(*words: object) -> None:
        subprocess.run(["mount", *map(str, words)], check=True)

    for path in separate:
        inside = own / path.strip("/").replace("/", "_")
        inside.mkdir()
        mount("--bind", inside, path)
    # Debian does the same: the host's own name resolves to a loopback address.
    others = [f"{NETWORK}.{n} node-{n}\n" for n in range(1, count + 1) if f"node-{n}" != name]
    (own / "hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {name}\n{''.join(others)}")
    mount("--bind", own / "hosts", "/etc/hosts")
    (own / "ssh_config").write_text(
        f"IdentityFile {root}/id\nStrictHostKeyChecking no\nUserKnownHostsFile /dev/null\n"
        "LogLevel ERROR\nServerAliveInterval 5\nServerAliveCountMax 2\n"
    )
    mount("--bind", own / "ssh_config", "/etc/ssh/ssh_config")
    mount("-t", "tmpfs", "tmpfs", "/run")
    mount("-t", "tmpfs", "tmpfs", "/dev/shm")
    Path("/run/sshd").mkdir()
    subprocess.run(["hostname", name], check=True)
    (own / "sshd_config").write_text(
        f"Port {SSH_PORT}\nHostKey {root}/host_key\nAuthorizedKeysFile {root}/id.pub\n"
        "PermitRootLogin yes\nPasswordAuthentication no\nStrictModes no\nUsePAM no\n"
        "ClientAliveInterval 5\nClientAliveCountMax 2\n"
    )
    subprocess.run([shutil.which("sshd"), "-f", own / "sshd_config"], check=True)
    print("ready", flush=True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        with suppress(ChildProcessError):
            os.wait()
            continue
        time.sleep(0.1)


if __name__ == "__main__":
    settings = json.loads(sys.argv[1])
    be_a_host(Path(settings.pop("root")), **settings)
