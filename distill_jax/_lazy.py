"""Public names of a package whose modules are imported when a name is first used."""

import functools
import importlib
import pathlib
import re
from collections.abc import Callable
from typing import Any

_PUBLIC = re.compile(r"^(?:class|def) ([A-Za-z]\w*)", re.MULTILINE)


def attach(package: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Returns `__getattr__` and `__dir__` of a package.

    Public names are the modules of the package and the classes and functions that one of these
    alone defines, found in the text of the modules. A name that several modules define, such as
    `make`, is reached through its module.

    Args:
      package: its full name; module names with a leading underscore are private.
    """
    root = importlib.import_module(package)

    @functools.cache
    def index() -> dict[str, list[str]]:
        files_by_name: dict[str, list[str]] = {}
        for folder in map(pathlib.Path, root.__path__):
            for path in sorted(folder.glob("*.py")):
                if not path.stem.startswith("_"):
                    for name in _PUBLIC.findall(path.read_text("utf-8")):
                        files_by_name.setdefault(name, []).append(path.stem)
        return files_by_name

    @functools.cache
    def modules() -> list[str]:
        files = (p for folder in map(pathlib.Path, root.__path__) for p in folder.glob("*.py"))
        return sorted(path.stem for path in files if not path.stem.startswith("_"))

    def get(name: str) -> Any:
        if name in modules():
            return importlib.import_module(f"{package}.{name}")
        homes = index().get(name, [])
        if len(homes) == 1:
            return getattr(importlib.import_module(f"{package}.{homes[0]}"), name)
        where = f"; it is in {', '.join(f'{package}.{home}' for home in homes)}" if homes else ""
        raise AttributeError(f"module {package!r} has no attribute {name!r}{where}")

    def names() -> list[str]:
        own = [name for name, homes in index().items() if len(homes) == 1]
        return sorted({*own, *modules()})

    return get, names
