"""Text and JSON files: validated when read, and written atomically.

Every stored JSON file is read here. An invalid file raises a `DamagedFile` error that names it;
nothing is silently replaced by a default. This module does not need JAX.
"""

import contextlib
import json
import math
import os
import pathlib
import stat
import uuid
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from distill_jax.core.errors import UserError, text_of

Shape = Mapping[str, Any]
"""Keys of an object, with the types of their values.

A type is a Python type or a tuple of them; `Mapping` and `dict` mean any object. A list `[t]` means
a list of that type, and a shape means an object with its keys. A key "name?" is optional, and "*"
stands for all keys that are not named. Other keys are not checked.
"""


NUMBER = (int, float)
NUMBERS: Shape = {"*": NUMBER}

RESULT_PARTS: Shape = {
    "metrics": NUMBERS,
    "best": NUMBERS,
    "chosen_by": (str, type(None)),
    "selecting": {"*": (Mapping, type(None))},
    "skipped": int,
    "selection_lost": [{"step": int}],
    "compute": {
        "flops_per_step?": (*NUMBER, type(None)),
        "seconds_per_step?": (*NUMBER, type(None)),
        "shares?": NUMBERS,
        "phases?": NUMBERS,
        "*": NUMBER,
    },
    "alarms": [dict.fromkeys(("rule", "step", "metric", "message"), (str, *NUMBER, type(None)))],
    "parameters": NUMBERS,
    "provenance": {"*": Mapping},
    "classes": list,
}
"""Contents of the `result.json` of a run."""

RESULT: Shape = {"status": str, "seed": int, "steps": int, "metrics": NUMBERS, "best": NUMBERS}
"""Required contents of the `result.json` of a finished run."""


SEGMENT: Shape = {
    "from": int,
    "to": int,
    "changes": {"*": [str]},
    "learning_rate?": [NUMBER],
    "started?": str,
    "versions?": Mapping,
}
"""A segment in the `history.json` of a run that went on differently."""


class DamagedFile(UserError):
    """A file that cannot be read or has invalid contents."""


class MissingFile(DamagedFile):
    """A file that is absent."""


def read_bytes(path: pathlib.Path, *, hint: str = "") -> bytes:
    """Returns the content of a regular file; a pipe or device in its place does not block.

    Raises:
      MissingFile: there is none.
      DamagedFile: it is a folder, a device or a pipe, or cannot be read.
    """
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            what = "is a folder" if stat.S_ISDIR(mode) else "is not a regular file"
            raise DamagedFile(f"{what}, where a file belongs", where=str(path), hint=hint)
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MissingFile("does not exist", where=str(path), hint=hint) from error
    except (OSError, ValueError, MemoryError) as error:
        raise DamagedFile(f"cannot be read: {reason(error)}", where=str(path), hint=hint) from error


def read_text(path: pathlib.Path, *, hint: str = "") -> str:
    """Returns the content of a UTF-8 text file; raises as `read_bytes` does."""
    return _decode(read_bytes(path, hint=hint), path, hint)


def read_json(
    path: pathlib.Path,
    *,
    shape: Shape | None = None,
    optional: Shape | None = None,
    hint: str = "",
) -> dict[str, Any]:
    """Returns the JSON object in a file.

    Args:
      path: the file.
      shape: keys that must be there, and the types of their values.
      optional: the same of keys that may be absent.
      hint: what to do about a file that is damaged.

    Raises:
      MissingFile: there is none.
      DamagedFile: it is not UTF-8, not JSON, not an object, or not of that shape.
    """
    return parse_json(read_bytes(path, hint=hint), path, shape=shape, optional=optional, hint=hint)


def parse_json(
    data: bytes,
    path: pathlib.Path | str,
    *,
    shape: Shape | None = None,
    optional: Shape | None = None,
    hint: str = "",
) -> dict[str, Any]:
    """Returns the JSON object in the content of a file; raises as `read_json` does."""
    content = _parse(_decode(data, path, hint), path, hint)
    if not isinstance(content, dict):
        what = f"holds {_spell(content)}, not a JSON object"
        raise DamagedFile(what, where=str(path), hint=hint)
    wanted = {**(shape or {}), **{f"{name}?": kinds for name, kinds in (optional or {}).items()}}
    if what := mismatch(content, wanted):
        raise DamagedFile(what, where=str(path), hint=hint)
    return content


def mismatch(value: Any, wanted: Any, name: str = "") -> str:
    """Returns a description of the parts of a JSON value with the wrong type, empty if none.

    Args:
      value: the value.
      wanted: a type as in `Shape`.
      name: path of the value, for the message.
    """
    if isinstance(wanted, Mapping):
        if not isinstance(value, Mapping):
            return f"{name!r} is {_spell(value)}"
        dot = f"{name}." if name else ""
        named = {key.removesuffix("?") for key in wanted}
        for key, kinds in wanted.items():
            bare = key.removesuffix("?")
            if key == "*":
                inner = {k: v for k, v in value.items() if k not in named}
            elif bare in value:
                inner = {bare: value[bare]}
            elif key == bare:
                return f"has no {dot + key!r}"
            else:
                continue
            for k, v in inner.items():
                if wrong := mismatch(v, kinds, f"{dot}{k}"):
                    return wrong
        return ""
    if isinstance(wanted, list):
        if not isinstance(value, list):
            return f"{name!r} is {_spell(value)}"
        parts = (mismatch(v, wanted[0], f"{name}[{i}]") for i, v in enumerate(value))
        return next((wrong for wrong in parts if wrong), "")
    fits = isinstance(value, wanted) and (not isinstance(value, bool) or wanted is bool)
    if fits and isinstance(value, int) and abs(value) >= 2**1023:  # no float holds it
        fits = False
    return "" if fits else f"{name!r} is {_spell(value)}"


def read_value(path: pathlib.Path) -> Any:
    """Returns the JSON value in a file, of any kind; raises as `read_json` does."""
    return _parse(read_text(path), path, "")


def peek(path: pathlib.Path) -> Any:
    """Returns the contents of a JSON file, None if it is missing or cannot be read."""
    try:
        return read_value(path)
    except DamagedFile:
        return None


class Line(NamedTuple):
    """A line of a JSON-lines file: its bytes, and its object, None if it is damaged."""

    data: bytes
    row: dict[str, Any] | None


def read_lines(path: pathlib.Path) -> list[Line]:
    """Returns the lines of a JSON-lines file whose rows have a number `step`.

    A line is damaged if it is not UTF-8, not JSON or not such a row. An incomplete last line, which
    a killed process leaves, is also damaged. A missing file has no lines.

    Raises:
      DamagedFile: the file itself cannot be read.
    """
    try:
        data = read_bytes(path)
    except MissingFile:
        return []
    return [Line(line, _row(line, path)) for line in data.splitlines(keepends=True)]


def read_rows(path: pathlib.Path, *, until: float = math.inf) -> list[dict[str, Any]]:
    """Returns the rows of `read_lines` up to a step; damaged lines are left out."""
    rows = (line.row for line in read_lines(path))
    return [row for row in rows if row is not None and row["step"] <= until]


def damaged(lines: Iterable[Line]) -> list[Line]:
    """Returns the damaged lines except an incomplete last line, which is expected."""
    return [line for line in lines if line.row is None and line.data.endswith(b"\n")]


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a temporary path next to `path`, which replaces `path` if the block succeeds."""
    temporary = path.with_name(f".{path.stem}.tmp-{uuid.uuid4().hex[:8]}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a text file atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _row(line: bytes, path: pathlib.Path) -> dict[str, Any] | None:
    if not line.endswith(b"\n"):
        return None
    with contextlib.suppress(DamagedFile):
        return parse_json(line, path, shape={"step": (int, float)})
    return None


def _decode(data: bytes, path: pathlib.Path | str, hint: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        what = f"is not UTF-8: byte {data[error.start]:#04x} at position {error.start}"
        raise DamagedFile(what, where=str(path), hint=hint) from error


def _parse(text: str, path: pathlib.Path | str, hint: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError, MemoryError) as error:
        what = "is empty" if not text.strip() else f"is not JSON: {reason(error)}"
        raise DamagedFile(what, where=str(path), hint=hint) from error


def reason(error: BaseException) -> str:
    """Returns the reason why a file could not be read or written, in one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return text_of(error) or type(error).__name__


def _spell(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", type(None): "null"}
    return names.get(type(value), repr(value)[:40])
