"""Several processes as one JAX: how they find each other, and what is said when one is lost."""

import os
from collections.abc import Mapping
from typing import Any

from qjax.errors import QjaxError

# What `qjax launch`, or who starts processes on several hosts, sets for each of them.
COORDINATOR, COUNT, NUMBER = "QJAX_COORDINATOR", "QJAX_PROCESSES", "QJAX_PROCESS"
# Until a process that says nothing counts as lost; a connection that breaks says so at once.
HEARTBEAT_SECONDS = 20


def environment(coordinator: str, count: int, number: int) -> dict[str, str]:
    """What makes a process number `number` of `count`."""
    return {COORDINATOR: coordinator, COUNT: str(count), NUMBER: str(number)}


def join(given: Mapping[str, str] = os.environ) -> tuple[int, int] | None:
    """Join the other processes, before JAX meets a device: this one's number and how many there are; None if alone.

    On a TPU pod, where JAX knows all of that itself, QJAX_COORDINATOR=auto is enough.

    Raises:
      QjaxError: numbers that are none, or the others do not come.
    """
    coordinator = given.get(COORDINATOR)
    if not coordinator:
        return None
    import jax

    options: dict[str, Any] = {"heartbeat_timeout_seconds": HEARTBEAT_SECONDS}
    if coordinator != "auto":
        try:
            count, number = int(given[COUNT]), int(given[NUMBER])
        except (KeyError, ValueError):
            raise QjaxError(f"{COORDINATOR} is set: set {COUNT} and {NUMBER} to numbers as well") from None
        if not 0 <= number < count:
            raise QjaxError(f"expected {NUMBER} from 0 to {count - 1}, got {number}")
        options |= {"coordinator_address": coordinator, "num_processes": count, "process_id": number}
    try:
        jax.distributed.initialize(**options)
    except Exception as error:
        raise QjaxError(f"cannot join the other processes at {coordinator}: {_first(error)}") from error
    return jax.process_index(), jax.process_count()


def lost(error: BaseException) -> str | None:
    """What to say of an error that comes of another process being gone; None for other errors."""
    import jax

    words = ("gloo", "connection", "heartbeat", "coordination", "unavailable", "barrier")
    if not isinstance(error, jax.errors.JaxRuntimeError) or not any(word in str(error).lower() for word in words):
        return None
    number, count = jax.process_index(), jax.process_count()
    return f"process {number} of {count} cannot reach another one, which ended or is cut off: {_first(error)}"


def _first(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
