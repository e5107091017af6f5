"""Hosts as Linux namespaces: each with a name, a network, processes and mounts of its own, an sshd, and our disk."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

Job = subprocess.CompletedProcess[str]
DYING_WITH_US = ("setpriv", "--pdeathsig", "KILL")
NAMESPACES = ("--net", "--uts", "--pid", "--mount")

SSHD = """
Port 22
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
PidFile none
StrictModes no
UsePAM no
PermitRootLogin yes
Subsystem sftp internal-sftp
Banner {folder}/banner
"""
GREETING = "authorised use only"  # as clusters greet, on ssh's standard error; shown at SSH_LOG_LEVEL=INFO
SSH = """
Host *
  IdentityFile {folder}/key
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
"""
START = """
set -e
hostname {name}
mount --bind {folder}/hosts /etc/hosts
mount -t sysfs none /mnt && mount --rbind /sys/fs/cgroup /mnt/fs/cgroup && mount --move /mnt /sys
ip link set lo up
until ip link show eth0 >/dev/null 2>&1; do sleep 0.1; done
ip addr add {address}/24 dev eth0
ip link set eth0 up
mkdir -p /run/sshd
exec $(command -v sshd) -D -e -f {folder}/sshd_config
"""


class Host:
    """One host; it lives until `stop`, or until this process ends."""

    def __init__(self, name: str, address: str, folder: Path) -> None:
        self.name, self.address = name, address
        script = START.format(name=name, address=address, folder=folder)
        self._log = (folder / f"{name}.log").open("w")
        # Whatever runs on it is in its process namespace, which ends with the first process of it.
        self._keeper = subprocess.Popen(
            [*DYING_WITH_US, "unshare", *NAMESPACES, "--fork", "--kill-child", "--mount-proc", "sh", "-c", script],
            stdout=self._log,
            stderr=self._log,
        )

    @property
    def pid(self) -> int:
        """Its first process."""
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            if children := psutil.Process(self._keeper.pid).children():
                return int(children[0].pid)
            time.sleep(0.05)
        raise TimeoutError(f"host {self.name} did not start")

    def command(self, words: Sequence[str]) -> list[str]:
        """What runs `words` there, in our folder."""
        return ["nsenter", f"--target={self.pid}", *NAMESPACES, f"--wdns={Path.cwd()}", *words]

    def run(self, words: Sequence[str], timeout: float = 240, typed: str = "", **environment: str) -> Job:
        """A finished command on this host, and what is typed into it."""
        return subprocess.run(
            self.command(words),
            env={**os.environ, **environment},
            input=typed,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def processes(self) -> list[str]:
        """The command lines there, but for its sshd's."""
        return [" ".join(words) for _, words in self._processes()]

    def kill_all(self) -> None:
        """What runs there, but for its sshd, is killed."""
        for process, _ in self._processes():
            with contextlib.suppress(psutil.Error):
                process.kill()

    def _processes(self) -> list[tuple[psutil.Process, list[str]]]:
        namespace = os.readlink(f"/proc/{self.pid}/ns/pid")
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if os.readlink(f"/proc/{process.pid}/ns/pid") == namespace:
                    found.append((process, process.cmdline()))
        # No command line: it has ended, and its parent, the host's first process, has yet to reap it.
        return [(process, words) for process, words in found if words and "sshd" not in " ".join(words)]

    def stop(self) -> None:
        """Everything on it ends."""
        with contextlib.suppress(psutil.Error, TimeoutError):
            psutil.Process(self.pid).kill()
        self._keeper.wait(10)
        self._log.close()


@contextlib.contextmanager
def network(names: Sequence[str], folder: Path) -> Iterator[dict[str, Host]]:
    """Hosts on one Ethernet, 10.77.0.1 and up; `folder`/bin holds the ssh that finds them."""
    addresses = {name: f"10.77.0.{number}" for number, name in enumerate(names, start=1)}
    lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in addresses.items())]
    lines.append("10.77.0.99 nowhere")  # a name with no host behind it
    (folder / "hosts").write_text("\n".join(lines) + "\n")
    for key in ("key", "host_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / key], check=True)
    (folder / "sshd_config").write_text(SSHD.format(folder=folder))
    (folder / "banner").write_text(f"{GREETING}\n")
    (folder / "ssh_config").write_text(SSH.format(folder=folder))
    (folder / "bin").mkdir()
    ssh = folder / "bin" / "ssh"
    log_level = "-o LogLevel=${SSH_LOG_LEVEL:-ERROR}"
    ssh.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/ssh_config {log_level} "$@"\n')
    ssh.chmod(0o755)
    hosts: dict[str, Host] = {}
    switch = subprocess.Popen([*DYING_WITH_US, "unshare", "--net", "sleep", "infinity"])
    try:
        for name, address in addresses.items():
            hosts[name] = Host(name, address, folder)
        _connect(switch.pid, hosts)
        for host in hosts.values():
            _wait_for_sshd(host, ssh)
        yield hosts
    finally:
        for host in hosts.values():
            host.stop()
        switch.kill()
        switch.wait()


def _connect(switch: int, hosts: dict[str, Host]) -> None:
    def on_switch(*words: str) -> None:
        subprocess.run(["nsenter", f"--target={switch}", "--net", "ip", *words], check=True)

    while os.readlink(f"/proc/{switch}/ns/net") == os.readlink("/proc/self/ns/net"):
        time.sleep(0.05)
    on_switch("link", "add", "bridge0", "type", "bridge")
    on_switch("link", "set", "bridge0", "up")
    for name, host in hosts.items():
        on_switch("link", "add", f"to-{name}", "type", "veth", "peer", "name", "eth0", "netns", str(host.pid))
        on_switch("link", "set", f"to-{name}", "master", "bridge0", "up")


def _wait_for_sshd(host: Host, ssh: Path) -> None:
    for _ in range(50):
        if host.run([str(ssh), "-o", "BatchMode=yes", host.name, "true"], timeout=20).returncode == 0:
            return
        time.sleep(0.2)
    raise TimeoutError(f"no sshd on host {host.name}")
