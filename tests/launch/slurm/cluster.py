"""A real Slurm cluster on one machine, for tests: every node is a set of namespaces with its own slurmd.

    python tests/launch/slurm/cluster.py DIRECTORY [NODES]     start, print the nodes, stop on Enter or Ctrl-C

It starts one set of namespaces (network, hostname, mounts, processes) called `login` with slurmctld and a bridge, and
one for each of node1, node2, ... with slurmd and a cable to the bridge. The addresses 10.77.0.x exist only inside them.
All files are in DIRECTORY; the machine's own network, /etc and services stay unchanged. `down` kills the first process
of each set, and the kernel ends the others with it.

Needs root and Debian's slurmctld, slurmd, slurm-client, slurm-wlm-basic-plugins and iproute2; `install` installs them.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

PACKAGES = ["slurmctld", "slurmd", "slurm-client", "slurm-wlm-basic-plugins", "iproute2"]
PROGRAMS = ["slurmctld", "slurmd", "sbatch", "ip", "unshare", "nsenter"]
SUBNET, LOGIN = "10.77.0", "login"

CONFIGURATION = """\
ClusterName=ksatest
SlurmctldHost=login({subnet}.254)
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
StateSaveLocation={home}/state
SlurmdSpoolDir={home}/spool.%n
SlurmctldPidFile={home}/slurmctld.pid
SlurmdPidFile={home}/slurmd.%n.pid
SlurmctldLogFile={home}/log/slurmctld.log
SlurmdLogFile={home}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=bf_interval=2,sched_min_interval=200000
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
ReturnToService=2
KillWait=5
SlurmdParameters=config_overrides
SlurmdTimeout=10
MinJobAge=86400
NodeName=node[1-{nodes}] CPUs=2 SocketsPerBoard=1 CoresPerSocket=2 ThreadsPerCore=1 RealMemory=4000 State=UNKNOWN
PartitionName=low  Nodes=ALL PriorityTier=1  PreemptMode=REQUEUE GraceTime=60 MaxTime=60 Default=YES State=UP
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF MaxTime=60 State=UP
"""

# The first process of a node waits for its cable, then runs the daemon and reaps orphaned processes.
FIRST_PROCESS = """
name=$1 home=$2; shift 2
hostname "$name"
ip link set lo up
mount --bind "$home/hosts" /etc/hosts
mount --bind "$home/nsswitch.conf" /etc/nsswitch.conf
until [ -e "$home/wired.$name" ]; do sleep .02; done
"$@" & wait
"""


class Cluster:
    """Slurm with nodes node1 ... nodeN in namespaces. A context manager: no process outlives it."""

    def __init__(self, home: Path, nodes: int = 2):
        self.home, self.nodes = home, nodes
        self._first: dict[str, subprocess.Popen] = {}  # `unshare` of each node
        self.environment = {**os.environ, "SLURM_CONF": str(home / "slurm.conf")}

    def __enter__(self) -> Cluster:
        try:
            self._up()
        except BaseException:
            self.down()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.down()

    def run(self, *command: str, host: str = LOGIN, check: bool = True, **options) -> subprocess.CompletedProcess:
        """Run a command on a host of the cluster, in this process's working directory."""
        done = subprocess.run(
            [*self._inside(host), *command], env=self.environment, capture_output=True, text=True, **options
        )
        if check and done.returncode:
            raise AssertionError(
                f"{' '.join(command)} on {host} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
            )
        return done

    def crash(self, node: str) -> None:
        """Kill the node and every process on it at once."""
        os.kill(self.pid(node), signal.SIGKILL)
        self._first.pop(node).wait()

    def boot(self, node: str) -> None:
        (self.home / f"wired.{node}").unlink(missing_ok=True)
        self._start(node, "slurmd", "-D", "-N", node)
        cable = f"sw{node.removeprefix('node')}"
        self._ip(LOGIN, f"link add {cable} type veth peer name eth0 netns {self.pid(node)}")
        self._ip(LOGIN, f"link set {cable} master br0 up")
        self._ip(node, f"addr add {SUBNET}.{node.removeprefix('node')}/24 dev eth0")
        self._ip(node, "link set eth0 up")
        (self.home / f"wired.{node}").touch()

    def down(self) -> None:
        for name in list(self._first):
            try:
                self.crash(name)
            except (ProcessLookupError, FileNotFoundError, IndexError):
                self._first.pop(name, None)

    def logs(self) -> str:
        """The ends of the daemons' logs, for the message of a failing test."""
        return "\n".join(
            f"== {p.name}\n{p.read_text(errors='replace')[-3000:]}" for p in sorted((self.home / "log").iterdir())
        )

    def _up(self) -> None:
        shutil.rmtree(self.home, ignore_errors=True)
        for name in ("log", "state"):
            (self.home / name).mkdir(parents=True)
        hosts = {
            "localhost": "127.0.0.1",
            LOGIN: f"{SUBNET}.254",
            **{f"node{i}": f"{SUBNET}.{i}" for i in range(1, self.nodes + 1)},
        }
        (self.home / "hosts").write_text("".join(f"{address} {name}\n" for name, address in hosts.items()))
        switch = Path("/etc/nsswitch.conf").read_text() if Path("/etc/nsswitch.conf").exists() else ""
        (self.home / "nsswitch.conf").write_text(
            "".join(f"{line}\n" for line in switch.splitlines() if not line.startswith("hosts:")) + "hosts: files\n"
        )
        (self.home / "slurm.conf").write_text(CONFIGURATION.format(home=self.home, nodes=self.nodes, subnet=SUBNET))
        self._start(LOGIN, "slurmctld", "-D")
        for line in ("link add br0 type bridge", f"addr add {SUBNET}.254/24 dev br0", "link set br0 up"):
            self._ip(LOGIN, line)
        (self.home / f"wired.{LOGIN}").touch()
        for i in range(1, self.nodes + 1):
            self.boot(f"node{i}")
        self.wait_idle(self.nodes)

    def wait_idle(self, nodes: int, timeout: float = 30) -> None:
        deadline = time.monotonic() + timeout
        while self.run("sinfo", "-h", "-p", "low", "-t", "idle", "-o", "%D", check=False).stdout.strip() != str(nodes):
            if time.monotonic() > deadline:
                raise AssertionError(f"{nodes} nodes did not come up\n{self.logs()}")
            time.sleep(0.1)

    def _start(self, name: str, *daemon: str) -> None:
        log = open(self.home / "log" / f"{name}.out", "a")
        self._first[name] = subprocess.Popen(
            [
                "unshare",
                "--net",
                "--uts",
                "--mount",
                "--pid",
                "--fork",
                "--mount-proc",
                "--propagation",
                "private",
                "--kill-child",
                "bash",
                "-c",
                FIRST_PROCESS,
                "_",
                name,
                str(self.home),
                *daemon,
            ],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        log.close()

    def pid(self, name: str) -> int:
        """The process id, on this machine, of the host's first process."""
        outer = self._first[name].pid
        for _ in range(250):
            inner = Path(f"/proc/{outer}/task/{outer}/children").read_text().split()
            if inner:
                return int(inner[0])
            time.sleep(0.02)
        raise AssertionError(f"{name} did not start\n{self.logs()}")

    def _inside(self, host: str) -> list[str]:
        return [
            "nsenter",
            f"--target={self.pid(host)}",
            "--net",
            "--uts",
            "--mount",
            "--pid",
            f"--wdns={os.getcwd()}",
            "--",
        ]

    def _ip(self, host: str, line: str) -> None:
        for _ in range(100):  # until the process has entered its own namespace
            inside = os.readlink(f"/proc/{self.pid(host)}/ns/net")
            if inside != os.readlink("/proc/self/ns/net"):
                break
            time.sleep(0.02)
        subprocess.run(["nsenter", f"--target={self.pid(host)}", "--net", "ip", *line.split()], check=True)


def missing() -> str:
    """Why no cluster can run here, or an empty string. Installs the packages if possible."""
    if os.geteuid():
        return "Slurm's test cluster needs root, for namespaces"
    if absent := [program for program in PROGRAMS if shutil.which(program) is None]:
        install(PACKAGES)
        absent = [program for program in PROGRAMS if shutil.which(program) is None]
    return f"Slurm cannot be installed here: no {', '.join(absent)}" if absent else ""


def install(packages: list[str]) -> None:
    """Install Debian packages, as root and with apt-get. The policy file keeps their services from starting."""
    if os.geteuid() or shutil.which("apt-get") is None:
        return
    policy = Path("/usr/sbin/policy-rc.d")
    ours = not policy.exists()
    if ours:
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    try:
        for command in (["update", "-qq"], ["install", "-y", "-qq", "--no-install-recommends", *packages]):
            subprocess.run(["apt-get", *command], check=False, capture_output=True, env=environment)
    finally:
        if ours:
            policy.unlink()


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    if missing():
        sys.exit(missing())
    with Cluster(Path(sys.argv[1]).resolve(), int(sys.argv[2]) if len(sys.argv) > 2 else 2) as cluster:
        print(f"started slurmctld and slurmd on {cluster.nodes} nodes; SLURM_CONF={cluster.home / 'slurm.conf'}")
        for name in cluster._first:
            print(f"  on {name}: nsenter --target={cluster.pid(name)} --net --uts --mount --pid --wdns=$PWD -- COMMAND")
        try:
            input("Enter stops the cluster\n")
        except (KeyboardInterrupt, EOFError):
            pass
