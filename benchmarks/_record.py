"""What result files say of the place where their figures were made, and how they are written."""

import argparse
import json
import os
import platform
from collections.abc import Callable, Collection
from importlib.metadata import version
from pathlib import Path
from typing import Any


def versions(*packages: str) -> dict[str, str]:
    """Returns the version of each package."""
    return {package: version(package) for package in packages}


def some_of(known: Collection[str]) -> Callable[[str], list[str]]:
    """Returns the type of an argument of names separated by commas, each of which is known."""

    def read(text: str) -> list[str]:
        names = text.split(",")
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"no {unknown[0]!r}; any of {', '.join(known)}")
        return names

    return read


def study_folder(text: str) -> Path:
    """Returns the folder of an argument; without a study there, the parser says so."""
    if not (Path(text) / "study.json").is_file():
        raise argparse.ArgumentTypeError(f"no study.json in {text}; --mode=study writes one")
    return Path(text)


def machine() -> dict[str, Any]:
    """Returns the version of Python, the kind of processor and how many there are."""
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
    }


def write(report: dict, out: str | Path | None, *, indent: int = 1, show: bool = False) -> None:
    """Writes a report as JSON to `out`, if given; `show` prints it first."""
    text = json.dumps(report, indent=indent)
    if show:
        print(text)
    if out:
        Path(out).write_text(text + "\n")
