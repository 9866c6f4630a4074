"""A real Slurm cluster on one machine: a controller and a few nodes, each of which can lose its power.

    python tests/cluster/slurm_cluster.py install           the Debian packages, where this is Debian and you are root
    python tests/cluster/slurm_cluster.py start DIR         then: export SLURM_CONF=DIR/slurm.conf
    python tests/cluster/slurm_cluster.py kill-node DIR n2  SIGKILL for all that runs on the node
    python tests/cluster/slurm_cluster.py start-node DIR n2
    python tests/cluster/slurm_cluster.py stop DIR

With `--network` behind start, each node has a network of its own, joined to the others by a bridge, so that it can be
cut off. There is no way from the machine into it: commands go in by `enter`.

    python tests/cluster/slurm_cluster.py enter DIR sinfo   a command as on the login node
    python tests/cluster/slurm_cluster.py cut DIR n2        pull the node's network cable
    python tests/cluster/slurm_cluster.py reconnect DIR n2

A node is a slurmd in namespaces of its own (mount, host name, processes), held by one process: killing that one ends
everything on the node at once. Disk, memory and cores are the machine's and shared. Every time-out is far
below what a site has, so that a failure shows within seconds. Needs root; everything is stopped by its recorded pid.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge", "iproute2")
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "unshare", "nsenter", "ip")
NET = "10.77.0"
"""the addresses of a cluster with a network of its own"""
_INSIDE = 'hostname "$1"; mount --bind "$2" /etc/hosts; shift 2; exec "$@"'

_CONF = """\
ClusterName=onemachine
SlurmctldHost=ctl({address})
SlurmctldPort={port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld
SlurmdPidFile={folder}/run/slurmd-%n
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,sched_min_interval=100000,bf_interval=1,batch_sched_delay=0
SlurmctldTimeout=10
SlurmdTimeout=5
MessageTimeout=5
TCPTimeout=2
BatchStartTimeout=5
InactiveLimit=0
CompleteWait=0
KillWait={kill_wait}
MinJobAge=600
UnkillableStepTimeout=60
NodeName=DEFAULT CPUs=16 Boards=1 SocketsPerBoard=1 CoresPerSocket=16 ThreadsPerCore=1 RealMemory=64000 Gres=gpu:8
{nodes}
PartitionName=DEFAULT Nodes=n[1-{count}] MaxTime=INFINITE State=UP
PartitionName=main Default=YES PriorityTier=1 GraceTime={grace} PreemptMode=REQUEUE
PartitionName=high PriorityTier=10 PreemptMode=OFF
PartitionName=short PriorityTier=1 MaxTime=1:00:00 MaxNodes=2
"""


def lacking() -> str | None:
    """Why no cluster can run here, and the remedy; None if one can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "a Slurm cluster on one machine needs Linux and root"
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        return (
            f"{', '.join(missing)} not found: python tests/cluster/slurm_cluster.py install (Debian, Ubuntu: as root)"
        )
    tried = subprocess.run(["unshare", "--mount", "--uts", "--pid", "--fork", "true"], capture_output=True, check=False)
    return "this machine does not let root make namespaces (unshare)" if tried.returncode else None


def install() -> None:
    """Install the packages by apt-get. Raises SystemExit with a sentence where no cluster can run afterwards."""
    if not all(map(shutil.which, PROGRAMS)):
        _install_packages()
    if reason := lacking():
        raise SystemExit(reason)


def _install_packages() -> None:
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise SystemExit(f"as root on Debian or Ubuntu: apt-get install {' '.join(PACKAGES)}; elsewhere the like")
    quiet = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    subprocess.run(["apt-get", "update", "-qq"], env=quiet, check=True)
    command = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *PACKAGES]
    subprocess.run(command, env=quiet, check=True, stdout=subprocess.DEVNULL)


class Cluster:
    """A cluster with its state in `folder`; any number of objects may speak of the same one."""

    def __init__(
        self, folder: Path, nodes: int = 3, kill_wait: int = 15, grace: int = 30, network: bool = False
    ) -> None:
        """`kill_wait` and `grace`: seconds from SIGTERM to SIGKILL, and for a preempted job. `network`: one of its own.

        A folder that holds a cluster already keeps what that was made with.
        """
        self.folder = folder.absolute()
        self.conf = self.folder / "slurm.conf"
        self.names = [f"n{number}" for number in range(1, nodes + 1)]
        self.network = Network(self.folder) if network or (self.folder / "network").exists() else None
        if not self.conf.exists():
            self._configure(kill_wait, grace)
        self.environment = os.environ | {"SLURM_CONF": str(self.conf)}

    def start(self) -> None:
        """Start whatever does not run, and wait until all nodes can be used."""
        if self.network:
            self.network.make(self.names)
        if not self._alive("munged"):
            munge = self.folder / "munge"
            for left in munge.glob("socket*"):
                left.unlink()
            files = [f"--{name}-file={munge}/{name}" for name in ("key", "log", "seed")]
            self._spawn("munged", ["munged", "-F", f"--socket={munge}/socket", f"--pid-file={munge}/pid", *files])
            self._until((munge / "socket").exists, "munged does not start", 10)
        self.start_controller()
        for name in self.names:
            self._boot(name, "slurmd", "-N", name)
        self.wait_for_nodes()

    def start_controller(self) -> None:
        """The controller alone; returns when it answers."""
        self._boot("ctl", "slurmctld")
        self._until(lambda: self.run("scontrol", "ping").returncode == 0, "the controller does not answer", 20)

    def kill_controller(self) -> None:
        """SIGKILL."""
        self._kill("ctl")

    def on_node(self, name: str, *command: str) -> subprocess.CompletedProcess[str]:
        """A command as root on a node, which sees its mounts, its name and its network. Raises if it fails."""
        enter = ["nsenter", f"--target={self._pid(name)}", "--mount", "--uts", "--net"]
        return subprocess.run([*enter, *command], capture_output=True, text=True, timeout=60, check=True)

    def kill_node(self, name: str) -> None:
        """SIGKILL for everything that runs on the node, as when its power fails."""
        self._kill(name)

    def start_node(self, name: str) -> None:
        """Boot it again; returns when it can be used."""
        self._boot(name, "slurmd", "-N", name)
        self.wait_for_nodes()

    def cut(self, name: str) -> None:
        """Cut a node off from all others and from the controller, where the cluster has a network of its own."""
        assert self.network, "only a cluster that was started with a network of its own has cables"
        self.network.link(name, up=False)

    def reconnect(self, name: str) -> None:
        """Reconnect it; returns when Slurm can use it."""
        assert self.network
        self.network.link(name, up=True)
        self.wait_for_nodes()

    def wait_for_nodes(self) -> None:
        """Wait until all nodes are up."""
        up = ("idle", "mixed", "allocated", "completing")

        def ready() -> bool:
            states = self.run("sinfo", "-h", "-N", "-p", "main", "-o", "%T").stdout.split()
            return len(states) == len(self.names) and all(state in up for state in states)

        self._until(ready, f"the nodes do not come up; see {self.folder}/log", 60)

    def stop(self) -> None:
        """End all jobs, then the daemons."""
        if self._alive("ctl"):
            self.run("scancel", "--state=RUNNING", "-u", "root")
            self.run("scancel", "--state=PENDING", "-u", "root")
        for name in (*self.names, "ctl", "munged"):
            self._kill(name)
        if self.network:
            self.network.remove(self.names)

    def on_login_node(self, *command: str) -> list[str]:
        """What to start instead of `command`, so that it runs as on the login node."""
        if self.network is None:
            return list(command)
        return [*self.network.inside("ctl"), "unshare", "--mount", "--uts", *self._inside("login"), *command]

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """A command as on the login node."""
        return subprocess.run(
            self.on_login_node(*command),
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            cwd=self.folder,
        )

    def _configure(self, kill_wait: int, grace: int) -> None:
        for name in ("munge", "state", "spool", "log", "run"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        for folder in (self.folder, *self.folder.parents[:-1]):  # munged wants a way in for everybody
            with contextlib.suppress(OSError):
                folder.chmod(folder.stat().st_mode | 0o011)
        key = self.folder / "munge" / "key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        count, port = len(self.names), _free_ports(len(self.names) + 1)
        net = NET if self.network else "127.0.0"
        hosts = ["127.0.0.1 localhost", f"{net}.10 ctl", *(f"{net}.{10 + i} n{i}" for i in range(1, count + 1))]
        (self.folder / "hosts").write_text("\n".join(hosts) + "\n")
        for number in range(8):  # stand-ins for GPUs: /dev/null by other names
            os.mknod(self.folder / "run" / f"gpu{number}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/run/gpu[0-7]\n")
        nodes = "\n".join(
            f"NodeName=n{i} NodeHostname=n{i} NodeAddr={net}.{10 + i} Port={port + i}" for i in range(1, count + 1)
        )
        about = {"nodes": nodes, "count": count, "kill_wait": kill_wait, "grace": grace}
        self.conf.write_text(_CONF.format(folder=self.folder, address=f"{net}.10", port=port, **about))

    def _boot(self, name: str, *daemon: str) -> None:
        if self._alive(name):
            return
        (self.folder / "spool" / name).mkdir(exist_ok=True)
        program, *options = daemon
        alone = ["unshare", "--mount", "--uts", "--pid", "--fork", "--mount-proc", "--kill-child=KILL"]
        where = self.network.inside(name) if self.network else []
        self._spawn(name, [*where, *alone, *self._inside(name), program, "-D", "-f", str(self.conf), *options])

    def _inside(self, name: str) -> list[str]:
        """What gives a process in namespaces of its own a host name, and the names of the others."""
        return ["bash", "-c", _INSIDE, "boot", name, str(self.folder / "hosts")]

    def _spawn(self, name: str, command: list[str]) -> None:
        with (self.folder / "log" / f"{name}.out").open("ab") as log:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, env=_plain()
            )
        (self.folder / "run" / f"{name}.pid").write_text(str(process.pid))

    def _pid(self, name: str) -> int | None:
        try:
            return int((self.folder / "run" / f"{name}.pid").read_text())
        except (OSError, ValueError):
            return None

    def _alive(self, name: str) -> bool:
        pid = self._pid(name)
        if pid is None:
            return False
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)  # ours, perhaps, and dead
        with contextlib.suppress(OSError):
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        return False

    def _kill(self, name: str) -> None:
        pid = self._pid(name)
        if pid is not None and self._alive(name):
            os.kill(pid, signal.SIGKILL)
            self._until(lambda: not self._alive(name), f"{name} does not die", 10)
        (self.folder / "run" / f"{name}.pid").unlink(missing_ok=True)

    def _until(self, done: Callable[[], bool], otherwise: str, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not done():
            if time.monotonic() > end:
                raise RuntimeError(otherwise)
            time.sleep(0.1)


class Network:
    """One network namespace a node, and one for controller and login node, which holds the bridge between them."""

    def __init__(self, folder: Path) -> None:
        """The namespaces' names begin with a tag that is kept in `folder`, so that two clusters have different ones."""
        mark = folder / "network"
        if not mark.exists():
            folder.mkdir(parents=True, exist_ok=True)
            mark.write_text(f"tr{secrets.token_hex(3)}")
        self.tag = mark.read_text()

    def inside(self, name: str) -> list[str]:
        """The words before a command that run it in the network of a node."""
        return ["nsenter", f"--net=/run/netns/{self.tag}-{name}"]

    def make(self, names: list[str]) -> None:
        """Make all that is missing."""
        if Path(f"/run/netns/{self.tag}-ctl").exists():
            return
        self._ip("netns", "add", f"{self.tag}-ctl")
        self._in("ctl", "link", "set", "lo", "up")
        self._in("ctl", "link", "add", "bridge", "type", "bridge")
        self._in("ctl", "addr", "add", f"{NET}.10/24", "dev", "bridge")
        self._in("ctl", "link", "set", "bridge", "up")
        for number, name in enumerate(names, 1):
            space = f"{self.tag}-{name}"
            self._ip("netns", "add", space)
            self._in(name, "link", "set", "lo", "up")
            self._in(name, "link", "add", "eth0", "type", "veth", "peer", "name", name, "netns", f"{self.tag}-ctl")
            self._in("ctl", "link", "set", name, "master", "bridge", "up")
            self._in(name, "addr", "add", f"{NET}.{10 + number}/24", "dev", "eth0")
            self._in(name, "link", "set", "eth0", "up")

    def link(self, name: str, up: bool) -> None:
        """The cable of a node."""
        self._in("ctl", "link", "set", name, "up" if up else "down")

    def remove(self, names: list[str]) -> None:
        """Remove all of it."""
        for name in (*names, "ctl"):
            if Path(f"/run/netns/{self.tag}-{name}").exists():
                self._ip("netns", "delete", f"{self.tag}-{name}")

    def _in(self, name: str, *words: str) -> None:
        self._ip("-n", f"{self.tag}-{name}", *words)

    def _ip(self, *words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def _plain() -> dict[str, str]:
    """The environment of a daemon: nothing of whoever starts it."""
    return {"PATH": os.environ.get("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"), "LANG": "C.UTF-8"}


def _free_ports(count: int) -> int:
    """The first of `count` ports that nobody has, below those the system gives to outgoing connections."""
    for base in range(26_000 + os.getpid() % 250 * 20, 31_000, 20):  # two that begin at once look at different ones
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            for port in range(base, base + count):
                stack.enter_context(socket.socket()).bind(("0.0.0.0", port))
            return base
    raise RuntimeError("no free ports between 26,000 and 31,000")


def main() -> None:
    """Entry of the script."""
    verb, *rest = sys.argv[1:] or ["help"]
    if verb == "install":
        install()
        return
    verbs = ("start", "stop", "status", "kill-node", "start-node", "enter", "cut", "reconnect")
    if verb not in verbs or not rest:
        raise SystemExit(__doc__)
    if reason := lacking():
        raise SystemExit(reason)
    cluster = Cluster(Path(rest[0]), network="--network" in rest[1:2])
    if verb == "start":
        cluster.start()
        print(f"export SLURM_CONF={cluster.conf}")
    elif verb == "stop":
        cluster.stop()
    elif verb == "status":
        print(cluster.run("sinfo", "-N").stdout, end="")
    elif verb == "enter":
        command = cluster.on_login_node(*rest[1:])
        os.execvpe(command[0], command, cluster.environment)
    else:
        {
            "kill-node": cluster.kill_node,
            "start-node": cluster.start_node,
            "cut": cluster.cut,
            "reconnect": cluster.reconnect,
        }[verb](rest[1])


if __name__ == "__main__":
    main()
