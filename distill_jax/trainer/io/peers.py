"""What several processes of one program agree on. A single process agrees with itself at once."""

import contextlib
import json
from collections.abc import Callable
from typing import Any

from distill_jax.core.errors import UserError, text_of

BLOCK = 4096
"""Bytes of a text that go to the others in one collective: one shape is one compilation."""


waiting: Callable[[str], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
"""Entered with a description around every wait for other processes, such as by a watchdog."""


def is_main() -> bool:
    """Whether this process writes files and prints: the first or the only one."""
    import jax

    return jax.process_index() == 0


def count() -> int:
    """Number of processes."""
    import jax

    return jax.process_count()


def any_process(flag: bool) -> bool:
    """Whether a flag is set in any process. All processes must call this at the same point."""
    import numpy as np

    if count() == 1:
        return flag
    from jax.experimental import multihost_utils

    with waiting("asking all processes"):
        return bool(np.asarray(multihost_utils.process_allgather(np.int32(flag))).any())


def barrier(name: str) -> None:
    """Waits until every process has reached this call."""
    if count() > 1:
        from jax.experimental import multihost_utils

        with waiting(f"barrier {name}"):
            multihost_utils.sync_global_devices(name)


def from_first(decide: Callable[[], Any], *, where: str) -> Any:
    """Returns the decision of the first process in every process.

    Args:
      decide: called only in the first process; returns a JSON-like value.
      where: path to name in the error of the other processes.

    Raises:
      UserError: `decide` raised it; it is raised in every process.
    """
    if count() == 1:
        return decide()
    error, reported = None, ""
    if is_main():
        try:
            reported = json.dumps({"found": decide()})
        except UserError as e:
            error, reported = e, json.dumps({"error": e.what})
    message = json.loads(_broadcast(reported))
    if error is not None:
        raise error
    if "error" in message:
        raise UserError(f"process 0 refused: {message['error']}", where=where)
    return message["found"]


def _broadcast(text: str) -> str:
    """Returns the text of the first process in every process."""
    import numpy as np
    from jax.experimental import multihost_utils

    data = text.encode()
    with waiting("asking process 0"):
        size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
        data, blocks = data.ljust(size, b"\0"), []
        for start in range(0, size, BLOCK):
            block = np.frombuffer(data[start : start + BLOCK].ljust(BLOCK, b"\0"), np.uint8)
            blocks.append(np.asarray(multihost_utils.broadcast_one_to_all(block)).tobytes())
    return b"".join(blocks)[:size].decode()


def is_loss_of_peer(error: BaseException) -> bool:
    """Whether an error of a collective means that another process has exited."""
    while error.__context__ is not None and error.__context__ is not error:
        error = error.__context__
    message = text_of(error, most=100_000, lines=None)
    signs = ("Gloo", "NCCL", "Connection reset", "Connection closed", "Socket closed", "heartbeat")
    return type(error).__name__ in ("ValueError", "JaxRuntimeError", "XlaRuntimeError") and any(
        sign in message for sign in signs
    )
