"""Hostile and damaged files of weights: each is refused by one message, quickly, in little memory.

  python benchmarks/hostile_weights.py [--only NAME ...] [--out=FILE]

Every file is opened through two doors, each in a process of its own: `roles.teacher.init` of a
training run, and `python -m distill_jax.weights`. Right is: exit code 2, one message with the
fragment written here, no file executed, changed or left behind, at most 5 seconds of a processor
and 1 GiB of memory beyond the imports (the address space is limited to that). Good files of every
format go through the second door first, and a good run through the first.
"""

import argparse
import json
import os
import pathlib
import platform
import shutil
import struct
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import hostile  # first: it settles the environment of JAX
import numpy as np
from _hostile_box import ROOT, Box, Run, launch, snapshot, wait
from _hostile_commands import train

sys.path.insert(0, str(ROOT))

from tests.weights import files, test_gguf, test_hostile, test_hostile_pickles

SECONDS = 5
MEMORY = 1 << 30
SHOW = "distill_jax.weights.__main__:main"
INDEX = "model.safetensors.index.json"


class Case(NamedTuple):
    """A file of weights.

    Attributes:
      about: what it tries.
      name: of the file or folder in the box.
      make: writes it.
      says: fragments of the message, of which one must be there.
      init: what `roles.teacher.init` names; the file where left out.
      start: the template of the box.
    """

    about: str
    name: str
    make: Callable[[Box, str], Any]
    says: tuple[str, ...]
    init: str = ""
    start: str = "empty"


def written(content: bytes | Callable[[], bytes]) -> Callable[[Box, str], None]:
    return lambda box, name: box.write(name, content if isinstance(content, bytes) else content())


def pickled(case: str, container: Callable[[bytes], bytes]) -> Callable[[Box, str], None]:
    """Writes one of the pickles of the tests that would create a canary."""
    make = test_hostile_pickles.PICKLES[case][0]
    return lambda box, name: box.write(name, container(make(box / "CANARY")))


def zeros(entry: str, first: bytes = b"", size: int = 2 << 30, **pickle: bytes):
    """Writes an archive with an entry of `first` and `size` zeros, and perhaps a pickle."""

    def make(box: Box, name: str) -> None:
        with zipfile.ZipFile(box / name, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            for key, value in pickle.items():
                archive.writestr(f"archive/{key}.pkl", value)
            with archive.open(entry, "w", force_zip64=True) as file:
                file.write(first)
                for _ in range(size >> 24):
                    file.write(bytes(1 << 24))

    return make


def many_entries(n: int) -> bytes:
    """An archive of empty entries, of more than 65,535 (zip64)."""
    local = struct.Struct("<4s5H3I2H")
    entry = struct.Struct("<4s6H3I5H2I")
    here, directory, at = [], [], 0
    for i in range(n):
        name = b"%06x" % i
        here.append(local.pack(b"PK\3\4", 20, 0, 0, 0, 33, 0, 0, 0, len(name), 0) + name)
        fields = (20, 20, 0, 0, 0, 33, 0, 0, 0, len(name), 0, 0, 0, 0, 0, at)
        directory.append(entry.pack(b"PK\1\2", *fields) + name)
        at += len(here[-1])
    size = sum(map(len, directory))
    end = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, n, n, size, at)
    end += struct.pack("<4sIQI", b"PK\6\7", 0, at + size, 1)
    end += struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 65535, 65535, 2**32 - 1, 2**32 - 1, 0)
    return b"".join([*here, *directory, end])


def big_header(n: int) -> bytes:
    """A safetensors header of n tensors without bytes."""
    one = '"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    return files.safetensors(("{" + ",".join(one % i for i in range(n)) + ',"0":1}').encode())


def doubled(levels: int) -> bytes:
    """Pairs of pairs: 2**levels leaves in a pickle of a few bytes."""
    pairs = b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(levels))
    return b"\x80\x02X\1\0\0\0a" + pairs + b"."


def sharded(weight_map: dict[str, str], **links: str) -> Callable[[Box, str], None]:
    """Writes a folder with an index, one good shard, and links (`__` is a dot) to other places."""

    def make(box: Box, name: str) -> None:
        box.write("secret.safetensors", files.safetensors({"x": files.tensor()}, b"1234"))
        box.write(f"{name}/y.safetensors", files.safetensors({"y": files.tensor()}, b"1234"))
        box.write(f"{name}/config.json", '{"model_type": "vit"}')
        box.write(f"{name}/{INDEX}", json.dumps({"weight_map": weight_map}))
        for link, target in links.items():
            box.link(f"{name}/{link.replace('__', '.')}", target)

    return make


def checkpoint(change: Callable[[Box, str], Any], *, sealed: bool = True):
    """Changes the best step of a run; an attacker writes its checksums anew."""

    def make(box: Box, name: str) -> None:
        for step in sorted(filter(str.isdigit, os.listdir(box / name / "checkpoints"))):
            folder = f"{name}/checkpoints/{step}"
            change(box, folder)
            if sealed:
                box.seal(folder)

    return make


def arrays_elsewhere(box: Box, folder: str) -> None:
    largest = box.largest(f"{folder}/role.student")
    shutil.move(box / largest, box / "elsewhere")
    box.link(largest, "{box}/elsewhere")


def _nested(box: Box, folder: str) -> None:
    text = '{"tree_metadata": ' + "[" * 10**6 + "]" * 10**6 + ', "use_ocdbt": true}'
    box.write(f"{folder}/role.student/_METADATA", text)


PTH, OLD = files.pth, files.legacy
GOOD, ONE = test_hostile.GOOD, test_hostile.ONE
RUN = "a checkpoint of Orbax"

CASES: dict[str, Case] = {
    "pickle-system": Case(
        "os.system in a zip archive", "w.pth", pickled("os.system", PTH), ("posix.system",)),
    "pickle-exec-old": Case(
        "exec in a file of before PyTorch 1.6", "w.pth", pickled("exec", OLD), (".exec",)),
    "pickle-hooks": Case(
        "a call as the hooks of a tensor", "w.bin", pickled("hooks", PTH), (".exec",)),
    "pickle-nested": Case(
        "a call within an allowed call", "w.pt", pickled("nested", PTH), ("posix.system",)),
    "pickle-dotted": Case(
        "a dotted name below torch", "w.pth", pickled("dotted", PTH), ("torch.hub",)),
    "pickle-assembled": Case(
        "a name out of the memo", "w.pth", pickled("assembled", PTH), ("builtins.exec",)),
    "pickle-state": Case(
        "attributes set by BUILD", "w.pth", pickled("build", PTH), ("sets attributes",)),
    "pickle-source": Case(
        "a module with its source", "w.pth", pickled("module", OLD), ("refers to 'module'",)),
    "pickle-doubled": Case(
        "2^60 leaves in 200 bytes", "w.pth", written(PTH(doubled(60))), ("tensor", "pickle")),
    "pickle-deep": Case(
        "three million lists in each other", "w.pth",
        written(lambda: PTH(b"\x80\x02" + b"]" * 3_000_000 + b"a" * 2_999_999 + b".")),
        ("containers", "nested")),
    "pickle-long": Case(
        "thirty million operations", "w.pth",
        written(lambda: PTH(b"\x80\x02}" + b"K\1" + b"q\0" * 15_000_000 + b"0.")),
        ("operations",)),
    "pickle-length": Case(
        "a string of 2^62 bytes", "w.pth",
        written(PTH(b"\x80\x04\x8d" + struct.pack("<Q", 1 << 62) + b"a.")), ("truncated",)),
    "zip-bomb-storage": Case(
        "zeros of 2 GiB as a storage", "w.pth",
        zeros("archive/data/0", data=GOOD),
        ("expand to",)),
    "zip-bomb-pickle": Case(
        "zeros of 2 GiB as the pickle", "w.pth", zeros("archive/data.pkl", GOOD), ("expand to",)),
    "zip-bomb-small": Case(
        "a bomb whose directory says 16 bytes", "w.pth",
        written(lambda: test_hostile.doctored(test_hostile.bomb(), size=16)), ("has not the 16",)),
    "zip-overlap": Case(
        "an entry within another one", "w.pth", written(test_hostile.overlapping), ("overlaps",)),
    "zip-twice": Case(
        "an entry of two meanings", "w.pth",
        written(lambda: test_hostile.renamed(PTH(GOOD))), ("differs between",)),
    "zip-many": Case(
        "a million entries", "w.pth", written(lambda: many_entries(10**6)),
        ("directory claims",)),
    "zip-several": Case(
        "150,000 entries, none of them of PyTorch", "w.pth", written(lambda: many_entries(150_000)),
        ("without checksums",)),
    "zip-path": Case(
        "a storage that is a path", "w.pth",
        written(PTH(files.state(a=files.rebuilt(files.storage("../../../etc/passwd"))))),
        ("no entry",)),
    "pth-endian": Case(
        "big-endian, of before PyTorch 1.6", "w.pth", written(OLD(GOOD, little=False)),
        ("big-endian",)),
    "pth-cut": Case(
        "cut in its last storage", "w.pth", written(OLD(GOOD)[:-3]), ("beyond the end",)),
    "npz-bomb": Case(
        "an array of 2 GiB of zeros", "w.npz",
        zeros("a.npy", files.npy(shape=f"({1 << 29},)", data=b"")), ("expand to",)),
    "npz-objects": Case(
        "an array of pickled objects", "w.npz",
        lambda box, name: box.write(name, test_hostile.pickled(box / "CANARY")), ("a pickle",)),
    "npz-shape": Case(
        "a header of 10^13 rows", "w.npz", written(test_hostile.npz(shape=f"({10**13},)")),
        ("16 bytes of data",)),
    "npz-nested": Case(
        "a header of 3,000 brackets", "w.npz", written(test_hostile.npz(shape="(" * 3000)),
        ("header",)),
    "safetensors-length": Case(
        "a header of 2^63 bytes", "w.safetensors", written(files.safetensors(ONE, length=2**63)),
        ("header claims",)),
    "safetensors-overlap": Case(
        "two tensors in one place", "w.safetensors",
        written(files.safetensors(ONE | {"b": files.tensor(2, 6)}, b"0" * 6)), ("overlap",)),
    "safetensors-shape": Case(
        "2^64 elements in 4 bytes", "w.safetensors",
        written(test_hostile.header_of(shape=[2**32, 2**32])), ("no memory can hold",)),
    "safetensors-cut": Case(
        "cut in its last tensor", "w.safetensors", written(files.safetensors(ONE, b"000")),
        ("buffer of 3 bytes",)),
    "safetensors-deep": Case(
        "four million brackets", "w.safetensors",
        written(lambda: files.safetensors(b'{"a":' + b"[" * 4_000_000)), ("not JSON", "lists")),
    "safetensors-many": Case(
        "1.5 million tensors in a header of 90 MB", "w.safetensors",
        written(lambda: big_header(1_500_000)), ("header", "tensors", "lists and objects")),
    "gguf-counts": Case(
        "2^60 tensors", "w.gguf", written(test_gguf.gguf(counts=(1 << 60, 0))), ("claims",)),
    "gguf-strings": Case(
        "five million strings in its metadata", "w.gguf",
        written(lambda: test_gguf.gguf([test_gguf.entry(
            "a", test_gguf.ARRAY, struct.pack("<IQ", test_gguf.STRING, 5_000_000)
            + bytes(8 * 5_000_000))])), ("strings",)),
    "gguf-overlap": Case(
        "two tensors in one place", "w.gguf",
        written(test_gguf.gguf([], [test_gguf.info(n, (2,), 0, 0) for n in "ab"], b"\0" * 8)),
        ("overlap",)),
    "gguf-endian": Case(
        "big-endian", "w.gguf", written(test_gguf.gguf(version=3 << 24)), ("big-endian",)),
    "index-parent": Case(
        "a shard beside the folder", "w", sharded({"x": "../secret.safetensors"}),
        ("beside the index",), "hf:w"),
    "index-absolute": Case(
        "a shard /etc/passwd", "w", sharded({"x": "/etc/passwd"}), ("beside the index",), "hf:w"),
    "index-link": Case(
        "a shard that is a link out of the folder", "w",
        sharded({"x": "x.safetensors", "y": "y.safetensors"},
                x__safetensors="../secret.safetensors"),
        ("link",), "hf:w"),
    "index-device": Case(
        "a shard that is /dev/zero", "w",
        sharded({"x": "x.safetensors", "y": "y.safetensors"}, x__safetensors="/dev/zero"),
        ("link", "regular"), "hf:w"),
    "index-many": Case(
        "an index of 500,000 shards", "w",
        lambda box, name: sharded({str(i): f"{i}.safetensors" for i in range(500_000)})(box, name),
        ("does not exist",), "hf:w"),
    "config-deep": Case(
        "a config.json of a million brackets, and no weights", "w",
        lambda box, name: box.write(f"{name}/config.json", '{"a":' + "[" * 10**6),
        ("json", "without safetensors"), "hf:w"),
    "orbax-flipped": Case(
        "a bit of the arrays of a run is flipped", "teacher",
        checkpoint(lambda box, f: box.flip(box.largest(f"{f}/role.student"), 0.5), sealed=False),
        (RUN, "differ", "damaged"), start="teacher"),
    "orbax-cut": Case(
        "arrays cut in half, checksums right", "teacher",
        checkpoint(lambda box, f: box.truncate(box.largest(f"{f}/role.student"), 0.5)),
        (RUN, "could not be read"), start="teacher"),
    "orbax-link": Case(
        "arrays are a link out of the run, checksums right", "teacher",
        checkpoint(arrays_elsewhere), (RUN, "symbolic link"), start="teacher"),
    "orbax-deep": Case(
        "a million brackets as the tree, checksums right", "teacher", checkpoint(_nested),
        (RUN, "JSON", "nested"), start="teacher"),
    "orbax-handler": Case(
        "the arrays are said to lie as separate files, checksums right", "teacher",
        checkpoint(lambda box, f: box.edit(
            f"{f}/role.student/_METADATA", lambda m: m.update(use_ocdbt=False))),
        (RUN, "not stored as"), start="teacher"),
}  # fmt: skip


def good(box: Box) -> Iterator[str]:
    """Writes a good file of every format; yields their names."""
    content = {
        "good.pth": PTH(GOOD),
        "good.bin": OLD(GOOD),
        "good.safetensors": files.safetensors(ONE, b"1234"),
        "good.npz": test_hostile.npz(),
        "good.gguf": test_gguf.WHOLE,
    }
    for name, data in content.items():
        box.write(name, data)
        yield name
    sharded({"y": "y.safetensors"})(box, "good")
    yield "good"


def memory(field: str) -> int:
    """Returns a size in bytes of this process, as Linux knows it."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def open_file(box: Box, run: Run, case: Case | None) -> dict[str, Any]:
    """Runs a door and judges it; a good file where there is no case."""
    before, began = snapshot(box.root), memory("VmRSS")
    ended = wait(run, *launch(box, run))
    after = snapshot(box.root)
    text, wrong = ended.text.strip(), []
    own = ("runs/a/", "tmp/", "home/") if case is None else ("tmp/", "home/")
    changed = [n for n in before.keys() | after.keys() if before.get(n) != after.get(n)]
    if any("CANARY" in name for name in changed):
        wrong.append("executed")
    if left := [name for name in changed if not name.startswith(own)]:
        wrong.append(f"changed {', '.join(sorted(left)[:3])}")
    if ended.code != (0 if case is None else 2):
        wrong.append(f"exit code {ended.code}")
    if "Traceback" in text:
        wrong.append("traceback")
    if case is not None:
        text = text[max(text.find("error: "), 0) :]  # behind warnings
        lines = text.splitlines()
        if len(lines) > (1 if run.entry == SHOW else 2) or len(text) > 2000:
            wrong.append(f"a message of {len(lines)} lines, {len(text)} characters")
        if not any(part in text for part in case.says):
            wrong.append(f"none of {case.says} is in the message")
    beyond = max(0, ended.most_bytes - began)
    if case is not None and ended.processor_seconds > SECONDS:
        wrong.append(f"{ended.processor_seconds:.1f} s of a processor")
    if case is not None and beyond > MEMORY:
        wrong.append(f"{beyond >> 20} MiB")
    return {
        "processor_seconds": round(ended.processor_seconds, 2),
        "mib": beyond >> 20,
        "message": text[:300].replace(str(box.root), "BOX"),
        "wrong": wrong,
    }


def doors(box: Box, name: str, init: str) -> dict[str, Run]:
    """Returns the two commands that open weights."""
    limits = {"RLIMIT_AS": memory("VmSize") + MEMORY, "RLIMIT_CPU": 4 * SECONDS}
    role = f"--config.roles.teacher.init={init or name}"
    return {
        "init": train(role, config="tiny.py:bare", limits=limits),
        "show": Run(args=(name,), out="", entry=SHOW, limits=limits),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--out", type=pathlib.Path)
    args = parser.parse_args()
    hostile.prepare()
    import distill_jax.weights.__main__  # noqa: F401
    from distill_jax.weights import pretrained  # noqa: F401

    folder = pathlib.Path(tempfile.mkdtemp(prefix="hostile-"))
    rows: dict[str, Any] = {}
    try:
        runner = hostile.Runner(folder)
        box = runner.fresh("teacher")
        controls = [doors(box, name, "")["show"] for name in good(box)]
        for run in [*controls, train(config="tiny.py:bare")]:
            found = open_file(box, run, None)
            assert not found["wrong"], (run.args, found)
        for name in args.only:
            case, found = CASES[name], {}
            box = runner.fresh(case.start)
            case.make(box, case.name)
            for door, run in doors(box, case.name, case.init).items():
                found[door] = open_file(box, run, case)
            rows[name] = {"about": case.about, **found}
            for door, row in found.items():
                for what in row["wrong"]:
                    print(f"{name}, {door}: {what}\n    {row['message']}", flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    refused = sum(not (row["init"]["wrong"] or row["show"]["wrong"]) for row in rows.values())
    both = [row[door] for row in rows.values() for door in ("init", "show")]
    result = {
        "files": len(rows),
        "refused": refused,
        "good_files_read": len(controls),
        "limits": {"processor_seconds": SECONDS, "mib": MEMORY >> 20},
        "most_processor_seconds": max(row["processor_seconds"] for row in both),
        "most_mib": max(row["mib"] for row in both),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "rows": rows,
    }
    print({name: value for name, value in result.items() if name != "rows"})
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    return int(refused < len(rows))


if __name__ == "__main__":
    sys.exit(main())
