"""Several processes of one command on this host: started together, ended together."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

from qjax.errors import QjaxError
from qjax.pipeline.distributed import environment

POLL_SECONDS = 0.1
# For a process that is told to end to do so.
GRACE_SECONDS = 5


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


QJAX = (sys.executable, "-m", "qjax.cli")


def launch(
    command: Sequence[str],
    count: int,
    *,
    pin: bool = False,
    devices: int | None = None,
    program: Sequence[str] = QJAX,
) -> int:
    """Run `program COMMAND` in `count` processes that know each other; returns the exit code of the first.

    When one fails the others are ended at once: they would wait for it.

    Args:
      pin: each process gets cores of its own, an equal share of those that this one may use.
      devices: virtual CPU devices of each process; None for one.

    Raises:
      QjaxError: a process failed, or fewer cores than processes.
    """
    if count < 1:
        raise QjaxError(f"expected at least one process, got {count}")
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if pin and len(cores) < count:
        raise QjaxError(f"cannot pin {count} processes to {len(cores)} cores: leave --pin out")
    coordinator = f"127.0.0.1:{free_port()}"
    processes = []
    try:
        for number in range(count):
            env = {**os.environ, **environment(coordinator, count, number)}
            if devices is not None:
                env["XLA_FLAGS"] = (
                    f"{env.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}".strip()
                )
            mine = cores[number * len(cores) // count : (number + 1) * len(cores) // count] if pin else []
            processes.append(_started([*program, *command], env, mine))
        return _watched(processes)
    finally:
        _ended(processes)


def _started(command: Sequence[str], env: dict[str, str], cores: Sequence[int]) -> subprocess.Popen[bytes]:
    """A child has the affinity of the thread that starts it."""
    before = os.sched_getaffinity(0) if cores else set()
    if cores:
        os.sched_setaffinity(0, cores)
    try:
        return subprocess.Popen(command, env=env)
    finally:
        if cores:
            os.sched_setaffinity(0, before)


def _watched(processes: Sequence[subprocess.Popen[bytes]]) -> int:
    while True:
        codes = [process.poll() for process in processes]
        for number, code in enumerate(codes):
            if code:
                how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"
                raise QjaxError(f"process {number} of {len(processes)} {how}: the others were ended")
        if all(code == 0 for code in codes):
            return 0
        time.sleep(POLL_SECONDS)


def _ended(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    # Not SIGTERM, at which JAX's service would speak of many things.
    for process in processes:
        if process.poll() is None:
            process.kill()
    for process in processes:
        process.wait(GRACE_SECONDS)
