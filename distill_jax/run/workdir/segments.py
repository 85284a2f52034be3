"""The segments of a run that went on differently: `history.json`, and the earlier results.

A run that was never changed has no history. `history.json` is `{"segments": [segment, ...]}`, each

    from, to: first step (counted from 0), and the step at which it ends or is planned to end
    changes: {path: [old, new]} of the config, empty for the first segment
    learning_rate: [of the last step before, of the first step], absent for the first segment
    started: time of its start, UTC
    versions: of the packages

The files of the earlier end are kept in `segments/<steps>/`.
"""

import contextlib
import os
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from distill_jax.run.workdir.changes import Changes
from distill_jax.run.workdir.results import read_result, write_json
from distill_jax.trainer.io.files import SEGMENT, mismatch, peek

FILE, FOLDER = "history.json", "segments"

KEPT = (
    *("result.json", "report.html", "config.json", "env.json", "eval.json"),
    *("predictions.npz", "embeddings.npz", "masks.npz", "trust.npz", "samples.json"),
)
"""Files that the end of a run writes, and that its next end would replace."""


def read(folder: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the segments of a run; none if it never changed or the file is damaged."""
    content = peek(folder / FILE)
    if mismatch(content, {"segments": [SEGMENT]}):
        return []
    pairs = (v for s in content["segments"] for v in s["changes"].values())
    return content["segments"] if all(len(pair) == 2 for pair in pairs) else []


def changed(folder: pathlib.Path, key: str) -> bool:
    """Whether a segment of a run changed a key or something in a group."""
    paths = {path for segment in read(folder) for path in segment["changes"]}
    return any(path == key or path.startswith(f"{key}.") for path in paths)


def record(
    folder: pathlib.Path,
    *,
    step: int,
    total: int,
    changes: Changes,
    rates: Sequence[float],
    environment: Mapping[str, Any],
) -> None:
    """Adds the segment that begins at a step, in place of one that left no state behind.

    Args:
      folder: of the run.
      step: at which the run goes on.
      total: the step at which training is to end.
      changes: of the config.
      rates: learning rate of the step before, and of the first step.
      environment: of this process, see `environment.describe_environment`.
    """
    earlier = [segment for segment in read(folder) if not segment["from"] or segment["from"] < step]
    if not earlier:
        before = peek(folder / "env.json")
        before = before if isinstance(before, dict) else {}
        start = next(iter(before.get("history") or ()), before)
        start = start if isinstance(start, dict) else {}
        earlier = [{"from": 0, "to": step, "changes": {}, **_when(start)}]
    earlier[-1]["to"] = step
    segment = {"from": step, "to": total, "changes": {k: [*v] for k, v in changes.items()}}
    segment |= {"learning_rate": [*rates], **_when(environment)}
    write_json(folder / FILE, {"segments": [*earlier, segment]})


def _when(environment: Mapping[str, Any]) -> dict[str, Any]:
    versions = environment.get("versions")
    return {
        "started": str(environment.get("started", "")),
        "versions": dict(versions) if isinstance(versions, Mapping) else {},
    }


def keep_result(folder: pathlib.Path, step: int) -> None:
    """Keeps the files of a finished run of so many steps in `segments/<step>/`.

    They stay in place too, until the next end of the run replaces them.
    """
    result = read_result(folder, log_line=lambda _: None)
    if result is None or result["steps"] != step:
        return
    target = folder / FOLDER / str(step)
    target.mkdir(parents=True, exist_ok=True)
    for name in KEPT:
        source, copy = folder / name, target / name
        if not source.is_file() or copy.exists():
            continue
        try:  # every writer replaces files whole, so that a link keeps the old content
            os.link(source, copy)
        except OSError:
            with contextlib.suppress(FileNotFoundError):
                shutil.copy2(source, copy)
