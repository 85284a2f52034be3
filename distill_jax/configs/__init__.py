"""The shipped configs, importable in a source tree, where their files are in `configs/`.

A wheel maps that folder onto this package and leaves this file out.
"""

import pathlib

__path__ = [str(pathlib.Path(__file__).resolve().parents[2] / "configs")]
