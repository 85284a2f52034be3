"""Removes machine details from shareable files: no absolute path, no host, no user.

The shareable files are `report.html`, `result.json`, `eval.json`, `env.json`, `study.json`,
`table.txt`, `metrics.jsonl`, `alarms.jsonl`, `samples.json`, the `.npz` files and `tensorboard/`.
The private files are `config.json` and `checkpoints/`, which name data and other runs by path so
that a run can be resumed, and `heartbeat.json`, `stall.txt`, `crash.txt` and the lock of a folder,
which name the host and files.
"""

import pathlib
import re
from collections.abc import Mapping
from typing import Any

_END = r"\s/'\"`,;:|&<>()\[\]{}#="
_PATH = re.compile(rf"(?<![\w/.:~<+-])(?:/[^{_END}]+)+/?")
"""An absolute path within a text, not part of a URL, a word or markup."""


def scrubbed(value: Any, folder: pathlib.Path) -> Any:
    """Returns a JSON value without absolute paths.

    A path within the folder, beside it or below the working directory becomes relative to it. Any
    other path becomes its name, and a run of a study its arm and name. The folder itself is ".".

    Args:
      value: strings, numbers, lists and mappings of them.
      folder: folder of the run or study that the value describes.
    """
    if isinstance(value, str):
        return _text(value, folder)
    if isinstance(value, Mapping):
        return {_text(str(k), folder): scrubbed(v, folder) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [scrubbed(v, folder) for v in value]
    return value


def _text(text: str, folder: pathlib.Path) -> str:
    if "/" not in text:
        return text
    # Known folders first, as whole strings, since their names may contain spaces.
    for root, shown in _roots(folder):
        start = rf"(?<![\w/.]){re.escape(root)}"
        text = re.sub(rf"{start}/(?=[^\s/])", f"{shown}/" if shown else "", text)
        text = re.sub(rf"{start}/?(?![\w/.-])", shown or pathlib.PurePath(root).name, text)
    if text.startswith("/") and not re.search(r"\n|: | -", text):  # a path, whole
        path, mark, role = text.partition("#")
        return _name(path) + mark + role
    return _PATH.sub(lambda match: _name(match[0]), text)


def _roots(folder: pathlib.Path) -> list[tuple[str, str]]:
    """Returns the root folders of relative paths, longest first, with their replacements.

    Folders that contain the home directories of users are excluded.
    """
    folder, here = folder.absolute(), pathlib.Path.cwd()
    of_study = _SEED.fullmatch(folder.name) is not None
    beside = folder.parents[min(of_study, len(folder.parents) - 1)] if folder.parents else folder
    roots = {str(path): "" for path in (here, beside) if len(path.parts) > 2}
    roots[str(folder)] = "."
    for path in (folder, beside, here):
        if str(path) in roots:
            roots.setdefault(str(path.resolve()), roots[str(path)])
    return sorted(roots.items(), key=lambda item: -len(item[0]))


_SEED = re.compile(r"seed\d+")


def _name(path: str) -> str:
    """Returns the name that replaces any other path; regular expressions are unchanged."""
    pure = pathlib.PurePath(path)
    alone = len(pure.parts) == 2
    if re.search(r"[$^*+?\\]", path) or (alone and not pathlib.Path(path).exists()):
        return path
    home = pathlib.Path.home()
    if pure == home or (pure.parent == home.parent and len(home.parts) > 2):
        return "~"
    return f"{pure.parent.name}/{pure.name}" if _SEED.fullmatch(pure.name) else pure.name
