"""Files that say which classes of a teacher stand for each class of the data.

`roles.<role>.classes` names such a file:

- JSON: an object from the classes of the data to the teacher's, each an entry or a list of them;
- CSV: a line `class,teacher`, then a line for each class of the teacher, first the class of the
  data that it stands for.

A class of the teacher is an index, or a name if the teacher has names: a folder of transformers
with `id2label`, or a run.
"""

import csv
import io
import pathlib
from collections.abc import Sequence
from typing import Any

from distill_jax.core.errors import ConfigError, UserError, nearest
from distill_jax.run import foreign
from distill_jax.run.config import ConfigDict
from distill_jax.run.config.checks import check_class_groups
from distill_jax.trainer.io.files import read_json, read_text

HEADER = ["class", "teacher"]


def file_of(classes: Sequence[Any]) -> pathlib.Path | None:
    """Returns the file that `roles.<role>.classes` names, None where it lists the classes."""
    match tuple(classes):
        case (str(path),):
            return pathlib.Path(path).expanduser()
    return None


def groups(config: ConfigDict, role: str, classes: Sequence[str] = ()) -> tuple[Any, ...]:
    """Returns the teacher's classes of each class of the data, as the config lists them or a file.

    Args:
      config: of the run.
      role: the teacher.
      classes: of the data, in their order.

    Returns:
      indices, or tuples of them; empty where the config has none.

    Raises:
      ConfigError: the file is absent or damaged, or its classes are not those of both sides.
    """
    given, where = config.roles[role].classes, f"roles.{role}.classes"
    if (path := file_of(given)) is None:
        return tuple(given)
    try:
        table = _read(path)
        for name in table:
            if name not in classes:
                hint = nearest(name, classes)
                raise ConfigError(f"the data have no class {name!r}", where=where, hint=hint)
        if missing := [name for name in classes if name not in table]:
            hint = "an entry for each class of the data"
            raise ConfigError(f"no entry for {missing[0]!r}", where=where, hint=hint)
        names = foreign.class_names(config, role)
        made = tuple(tuple(_index(x, names, where) for x in table[name]) for name in classes)
        check_class_groups(made, where)
    except UserError as error:
        what = f"{path.name}: {error.what}"
        raise ConfigError(what, where=where, hint=error.hint) from error
    return made


def _read(path: pathlib.Path) -> dict[str, list[Any]]:
    """Returns the entries of a file by class of the data."""
    if path.suffix == ".json":
        content = read_json(path, optional={"*": (int, str, list)})
        return {k: v if isinstance(v, list) else [v] for k, v in content.items()}
    if path.suffix != ".csv":
        raise UserError("is no .json and no .csv file", hint='("classes.json",)')
    table: dict[str, list[Any]] = {}
    rows = [row for row in csv.reader(io.StringIO(read_text(path))) if row]
    if not rows or rows[0] != HEADER:
        raise UserError("does not begin with the line class,teacher", hint=",".join(HEADER))
    for row in rows[1:]:
        if len(row) != len(HEADER):
            raise UserError(f"the line {','.join(row)!r} has {len(row)} columns", hint="two")
        table.setdefault(row[0].strip(), []).append(row[1].strip())
    return table


def _index(entry: Any, names: Sequence[str], where: str) -> int:
    if type(entry) is int:
        return entry
    if isinstance(entry, str) and names.count(entry) == 1:
        return names.index(entry)
    if isinstance(entry, str) and entry.isdecimal() and entry not in names:
        return int(entry)
    what, hint = f"{entry!r} is no class of the teacher", nearest(str(entry), names)
    if entry in names:
        what, hint = f"{names.count(entry)} classes of the teacher are called {entry!r}", "an index"
    elif not names:
        hint = "its classes have no names here: write their indices"
    raise ConfigError(what, where=where, hint=hint)
