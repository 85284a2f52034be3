"""What files that are handed on may say of the machine: no absolute path, no host, no user.

Meant to be handed on are `report.html`, `result.json`, `eval.json`, `env.json`, `study.json`,
`table.txt`, `metrics.jsonl`, `alarms.jsonl`, the `.npz` files and `tensorboard/`. Private are
`config.json` and `checkpoints/`, which name data and other runs by path so that a run can go on,
`heartbeat.json`, `stall.txt`, `crash.txt` and the lock of a folder, which name host and files.
"""

import pathlib
import re
from collections.abc import Mapping
from typing import Any

_END = r"\s/'\"`,;:|&<>()\[\]{}#="
_PATH = re.compile(rf"(?<![\w/.:~<+-])(?:/[^{_END}]+)+/?")
"""An absolute path within a text: no part of a URL, of a word, or of markup."""


def scrubbed(value: Any, folder: pathlib.Path) -> Any:
    """Returns a JSON value of which no string names an absolute path.

    A path within the folder, beside it or below the working directory is shown relative to that,
    any other by its name, and a run of a study with its arm. The folder itself is ".".

    Args:
      value: strings, numbers, lists and mappings of them.
      folder: of the run or study that the value is about.
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
    # Known folders first, as whole strings: their names may have spaces.
    for root, shown in _roots(folder):
        start = rf"(?<![\w/.]){re.escape(root)}"
        text = re.sub(rf"{start}/(?=[^\s/])", f"{shown}/" if shown else "", text)
        text = re.sub(rf"{start}/?(?![\w/.-])", shown or pathlib.PurePath(root).name, text)
    if text.startswith("/") and not re.search(r"\n|: | -", text):  # a path, whole
        path, mark, role = text.partition("#")
        return _name(path) + mark + role
    return _PATH.sub(lambda match: _name(match[0]), text)


def _roots(folder: pathlib.Path) -> list[tuple[str, str]]:
    """Returns folders that paths are shown relative to, longest first, and what stands for them.

    None of them is one in which the folders of users are.
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
    """Returns how a path outside the known folders is shown; a regular expression stays."""
    pure = pathlib.PurePath(path)
    alone = len(pure.parts) == 2
    if re.search(r"[$^*+?\\]", path) or (alone and not pathlib.Path(path).exists()):
        return path
    home = pathlib.Path.home()
    if pure == home or (pure.parent == home.parent and len(home.parts) > 2):
        return "~"
    return f"{pure.parent.name}/{pure.name}" if _SEED.fullmatch(pure.name) else pure.name
