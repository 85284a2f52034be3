"""What result files say of the place where their figures were made, and how they are written."""

import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any


def versions(*packages: str) -> dict[str, str]:
    """Returns the version of each package."""
    return {package: version(package) for package in packages}


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
