"""The result of a run, and the files of a run or study that ended early."""

import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from distill_jax.core.errors import CheckpointError
from distill_jax.trainer.io.files import (
    RESULT,
    RESULT_PARTS,
    DamagedFile,
    MissingFile,
    mismatch,
    peek,
    read_json,
    write_text,
)
from distill_jax.trainer.io.step_folder import read_meta, verify
from distill_jax.trainer.io.step_index import finished_steps


def read_result(
    folder: pathlib.Path, *, log_line: Callable[[str], None] = print
) -> dict[str, Any] | None:
    """Returns the result of a finished run, None where it is not finished or is damaged.

    A run that goes on from its end is not finished once a newer state is saved; until it ends
    again, `result.json` is that of the earlier end.

    Args:
      folder: of the run.
      log_line: prints a line.
    """
    try:
        result = read_json(folder / "result.json", shape={"status": str})
        if result["status"] == "done":
            path = folder / "result.json"
            result = read_json(path, shape=RESULT, optional=RESULT_PARTS)
            newest = finished_steps(folder / "checkpoints")[-1:]
            return None if newest and newest[0] > result["steps"] else result
    except MissingFile:
        pass
    except DamagedFile as error:
        log_line(f"warning: {error}; it is rebuilt from the checkpoints")
    return None


def write_result(folder: pathlib.Path, result: Mapping[str, Any]) -> None:
    """Writes `result.json`; a damaged one becomes `result.json.damaged`.

    That of an earlier end, of which `segments` keeps a copy, is replaced.
    """
    from distill_jax.run import processes

    path = folder / "result.json"
    before = peek(path)
    earlier = not mismatch(before, RESULT) and before["steps"] < result["steps"]
    if processes.is_main() and path.is_file() and not earlier and not has_failed(path):
        taken = len(list(folder.glob("result.json.damaged*")))
        path.rename(folder / f"result.json.damaged{taken or ''}")
    write_json(path, result)


def has_failed(path: pathlib.Path) -> bool:
    """Whether a `result.json` is the record of a run that a study gave up or a sweep stopped."""
    result = peek(path)
    return isinstance(result, dict) and result.get("status") in ("failed", "stopped")


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes a JSON file whole or not at all; of several processes the first one does."""
    from distill_jax.run import processes

    if processes.is_main():
        write_text(path, json.dumps(value, indent=1))


def intact(folder: pathlib.Path, *, study: bool = False) -> str:
    """Returns a clause on the intact files of a run or study that ended early; reads every byte."""

    def finished(run: pathlib.Path) -> bool:
        return read_result(run, log_line=lambda _: None) is not None

    if study:
        n = sum(finished(run) for run in folder.glob("*/seed*"))
        runs = "1 run is" if n == 1 else f"{n} runs are"
        return f"{runs} finished; the same command keeps these and continues with the others"
    if finished(folder):
        return "training is finished and its result is in result.json"
    for step in finished_steps(folder / "checkpoints")[::-1]:
        try:
            verify(folder / "checkpoints" / str(step))
            read_meta(folder / "checkpoints" / str(step))
        except (CheckpointError, OSError):
            continue
        return f"the checkpoint of step {step} is complete; the same command continues from it"
    return "there is no complete checkpoint; the same command starts from the beginning"
