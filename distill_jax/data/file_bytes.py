"""Real files as windows of bytes, for classifiers of file types; labels come from extensions.

An example is the first and the last 1,024 bytes of a file, without white space before and after,
int32 `[2048]` with 256 as padding: the input of Magika's model `standard_v3_3` (Fratantonio et al.
2024, arXiv:2409.13768). The classes are the 214 types of that model.

A folder has a folder for each package. `tools/fetch_files.py` fills one from pinned packages. By
default it is the folder of the packages that are installed beside this one.

Of all files that are not too short, those are kept, in an order drawn from their paths, that

* do not exceed `per_package` of one extension in one package, nor `per_extension` in all;
* share fewer than half of their blocks with any file that is kept: the blocks are the four of 256
  bytes from either end of the window, those of fewer than 8 different values left out, and their
  content is compared, not their place. Equal windows share all.

Parts are made of whole packages, drawn by a hash of their names until a part is large enough.

A training file may give crops too, windows of a part of it: a teacher names the type of any bytes.
A crop has a length between 64 bytes and that of the file, log-uniform. One of text, which has no
zero among its first 4,096 bytes, begins at a line that is drawn; one of other content begins where
the file does.
"""

import collections
import hashlib
import json
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from distill_jax.core.api import Dataset, Provenance
from distill_jax.core.errors import ArgumentError, DataUnavailable
from distill_jax.data import source

END = 1024
"""Bytes of either end of a file."""

READ = 4096
"""Bytes that are read of either end, before white space is removed."""

PADDING = 256
SHORTEST_CROP = 64
SHORTEST = 16
BLOCK = 256
DISTINCT = 8

TYPES = Path(__file__).parent / "assets" / "file_types.json"
"""`{"classes": [names], "extensions": {extension: name}}`; see DATA_LICENSES.md."""

HINT = "python tools/fetch_files.py --out=FOLDER fills a folder from pinned packages"


class File(NamedTuple):
    """A file of a folder.

    Attributes:
      path: relative to the folder; its first part is the package.
      window: int32 `[2048]`.
    """

    path: str
    window: np.ndarray

    @property
    def package(self) -> str:
        return self.path.partition("/")[0]

    @property
    def extension(self) -> str:
        return extension(self.path)


def extension(path: str) -> str:
    """Returns the extension of a file in lower case without its dot; empty where it has none."""
    return Path(path).suffix[1:].lower()


def make_window(head: bytes, tail: bytes) -> np.ndarray:
    """Returns the window of a file that is a network's input, int32 `[2048]`.

    Args:
      head: its first bytes, `READ` of them where it has so many.
      tail: its last bytes, likewise.
    """
    window = np.full(2 * END, PADDING, np.int32)
    first, last = head.lstrip()[:END], tail.rstrip()[-END:]
    window[: len(first)] = np.frombuffer(first, np.uint8)
    window[len(window) - len(last) :] = np.frombuffer(last, np.uint8)
    return window


def read_window(path: Path) -> np.ndarray:
    """Returns the window of a file, int32 `[2048]`."""
    with path.open("rb") as file:
        head = file.read(READ)
        file.seek(max(0, path.stat().st_size - READ))
        return make_window(head, file.read(READ))


def crops(path: Path, n: int, *, seed: str) -> Iterator[np.ndarray]:
    """Yields `n` windows of parts of a file, int32 `[2048]`; see the module.

    Args:
      path: the file.
      n: number of crops.
      seed: any string.
    """
    content = path.read_bytes()
    digest = hashlib.sha256(seed.encode("utf-8", "replace")).digest()
    rng = np.random.default_rng(int.from_bytes(digest[:8], "big"))
    longest = max(len(content), 2 * SHORTEST_CROP)
    for _ in range(n):
        length, start = int(np.exp(rng.uniform(*np.log([SHORTEST_CROP, longest])))), 0
        if 0 not in content[:READ]:
            start = int(rng.integers(0, max(len(content) - length, 0) + 1))
            start = content.rfind(b"\n", 0, start) + 1
        crop = content[start : start + length]
        yield make_window(crop[:READ], crop[-READ:])


def blocks(window: np.ndarray) -> set[bytes]:
    """Returns the content of the blocks by which near-duplicates are found."""
    rows = window.astype(np.uint16).reshape(-1, BLOCK)
    return {row.tobytes() for row in rows if len(np.unique(row)) >= DISTINCT}


def select(
    root: Path,
    *,
    most: int = 12_000,
    per_package: int = 40,
    per_extension: int = 400,
) -> Iterator[File]:
    """Yields the files of a folder that are kept, see the module.

    Args:
      root: the folder; links are not followed.
      most: files in all.
      per_package: of one extension in one package.
      per_extension: of one extension.
    """
    paths = [
        path.relative_to(root).as_posix()
        for path in root.rglob("*")
        if path.is_file() and not path.is_symlink() and path.parent != root
        if not path.relative_to(root).parts[0].endswith((".dist-info", ".egg-info", "__pycache__"))
    ]
    counts: collections.Counter[Any] = collections.Counter()
    owners: dict[bytes, list[int]] = {}
    for path in sorted(paths, key=lambda p: hashlib.sha256(p.encode("utf-8", "replace")).digest()):
        package, suffix = path.partition("/")[0], extension(path)
        full = counts[package, suffix] >= per_package or counts[suffix] >= per_extension
        if full or (root / path).stat().st_size < SHORTEST:
            continue
        window = read_window(root / path)
        own = blocks(window)
        shared = collections.Counter(owner for b in own for owner in owners.get(b, ()))
        if not own or (shared and 2 * max(shared.values()) >= len(own)):
            continue
        for block in own:
            owners.setdefault(block, []).append(counts["all"])
        counts.update([(package, suffix), suffix, "all"])
        yield File(path, window)
        if counts["all"] == most:
            return


def draw_packages(sizes: Mapping[str, int], share: float, *, seed: int) -> set[str]:
    """Returns packages that hold at least a share of all files, in an order drawn from their names.

    Args:
      sizes: files by package.
      share: in [0, 1).
      seed: of the order.
    """
    order = sorted(sizes, key=lambda p: hashlib.sha256(f"{seed} {p}".encode()).digest())
    drawn: set[str] = set()
    for package in order:
        if sum(sizes[p] for p in drawn) >= share * sum(sizes.values()):
            break
        drawn.add(package)
    return drawn


class Files:
    """Windows of files, labelled by extension.

    `read` has `labelled` beside input and label, float32: 0 for a file whose extension belongs to
    no type or to several, and n / m for the m others of n.

    Attributes:
      files: in order; a file with crops is repeated.
      inputs: their windows, uint16 `[n, 2048]`.
      labels: int32 `[n]`, 0 where a file has none.
      labelled: bool `[n]`.
    """

    def __init__(self, files: list[File], provenance: Provenance):
        types = read_types()
        classes = {name: i for i, name in enumerate(types["classes"])}
        found = [classes.get(types["extensions"].get(file.extension, ""), -1) for file in files]
        self.files, self.provenance = files, provenance
        self.inputs = np.stack([file.window.astype(np.uint16) for file in files])
        self.labelled = np.asarray(found) >= 0
        self.labels = np.maximum(found, 0).astype(np.int32)
        share = max(float(self.labelled.mean()), 1 / len(files))
        self._weights = (self.labelled / share).astype(np.float32)

    def __len__(self) -> int:
        return len(self.files)

    def read(self, indices: np.ndarray) -> Mapping[str, Any]:
        """Returns `input` int32 `[b, 2048]`, `label` `[b]` and `labelled` `[b]`."""
        return {
            "input": self.inputs[indices].astype(np.int32),
            "label": self.labels[indices],
            "labelled": self._weights[indices],
        }


class Shapes:
    """The sizes and shapes that are known without reading the files."""

    shapes_only = True
    provenance = Provenance("files", "", 1024, "", "")

    def __len__(self) -> int:
        return self.provenance.n

    def read(self, indices: np.ndarray) -> Mapping[str, Any]:
        b = len(indices)
        return {
            "input": np.zeros((b, 2 * END), np.int32),
            "label": np.zeros(b, np.int32),
            "labelled": np.ones(b, np.float32),
        }


def read_types() -> dict[str, Any]:
    """Returns the names of the types, and the type of each extension that has one alone."""
    return json.loads(TYPES.read_text())


def spec(**kwargs: Any) -> Dataset:
    """Returns shapes in place of files, for `make` with the same arguments."""
    del kwargs
    return Dataset(Shapes(), Shapes(), Shapes(), tuple(read_types()["classes"]))


def make(
    *,
    path: str = "",
    test: float = 0.2,
    held_out: float = 0.1,
    split_seed: int = 0,
    most: int = 12_000,
    per_package: int = 40,
    per_extension: int = 400,
    crops_each: int = 0,
    licence: str = "",
) -> Dataset:
    """Reads the files of a folder of packages, see the module.

    Args:
      path: the folder; that of the installed packages if it is empty.
      test: share of the files that the packages of the test part hold, at least.
      held_out: of the others, share that the packages of the held-out part hold, at least; 0 for
        none.
      split_seed: seed of both draws.
      most: files in all.
      per_package: files of one extension in one package.
      per_extension: files of one extension.
      crops_each: crops of each training file, besides its own window.
      licence: of the files, for the provenance.

    Raises:
      DataUnavailable: there is no such folder, or too few packages with files in it.
      ArgumentError: shares outside [0, 1).
    """
    for name, share in (("test", test), ("held_out", held_out)):
        if not 0 <= share < 1 or (name == "test" and not share):
            raise ArgumentError(f"{name} is {share}", where=name, hint="a share of the files")
    if crops_each < 0:
        raise ArgumentError(f"crops_each is {crops_each}", where="crops_each", hint="at least 0")
    root = source.existing(path or sysconfig.get_path("purelib"), hint=HINT)
    files = list(select(root, most=most, per_package=per_package, per_extension=per_extension))
    sizes = collections.Counter(file.package for file in files)
    tested = draw_packages(sizes, test, seed=split_seed)
    rest = {package: n for package, n in sizes.items() if package not in tested}
    held = draw_packages(rest, held_out, seed=split_seed + 1)
    parts = {
        "train": [f for f in files if f.package in rest.keys() - held],
        "held_out": [f for f in files if f.package in held],
        "test": [f for f in files if f.package in tested],
    }
    if not parts["train"]:
        raise DataUnavailable(
            f"{len(files)} files of {len(sizes)} packages leave nothing to train on",
            where=str(path),
            hint=f"a folder for each of several packages: {HINT}",
        )
    parts["train"] = [
        example
        for file in parts["train"]
        for example in (
            file,
            *(File(file.path, w) for w in crops(root / file.path, crops_each, seed=file.path)),
        )
    ]
    made = {name: _part(name, members, path, licence) for name, members in parts.items()}
    return Dataset(**made, classes=tuple(read_types()["classes"]))


def _part(name: str, files: list[File], path: str, licence: str) -> Any:
    if not files:
        return source.ArraySource(
            np.zeros((0, 2 * END), np.int32),
            np.zeros(0, np.int32),
            Provenance(f"files ({name})", path, 0, "", licence),
        )
    sha = hashlib.sha256()
    for file in files:
        sha.update(file.path.encode("utf-8", "replace") + b"\n" + file.window.tobytes())
    packages = len({file.package for file in files})
    title = f"files of {packages} packages ({name})"
    return Files(files, Provenance(title, path, len(files), sha.hexdigest(), licence))
