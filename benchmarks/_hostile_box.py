"""A folder in which command lines are run, and how their outcome is judged.

Every case runs in the same folder, which is restored from a template before it: stored absolute
paths stay valid. A command runs in a fork of this process, which has imported everything and has
started nothing of JAX, or in a new interpreter where the environment is read at import.
"""

import contextlib
import ctypes
import dataclasses
import hashlib
import importlib
import io
import json
import os
import pathlib
import resource
import shutil
import signal
import sys
import time
import traceback
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

ROOT = pathlib.Path(__file__).parents[1]
PROCESSOR_SECONDS, WALL_SECONDS = 20, 150
MEMORY = 16 * 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A command line and its right outcome.

    Attributes:
      args: flags; `{box}` stands for the folder.
      out: the outcomes that are right, separated by `|`: trains, resumes, finished, evaluates,
        describes, studies, helps (code 0), warned (code 0 and a fragment of `says`), refused
        (code 2, one message with a fragment of `says`), nonfinite (3), stopped (75), interrupted
        (ended by a signal, or 75 or 130), fails (not 0, no traceback, a fragment of `says`).
      says: fragments, of which one must be in the output, in lower case; none asks for nothing.
      equal: reference whose metrics the result must equal where a run was finished or evaluated.
      workdir: where the run lies; what a command may change.
      writes: more paths that it may change.
      env: changes of the environment; None removes a variable.
      at: the working directory, within the box.
      fresh: a new interpreter instead of a fork.
      streams: {0, 1, 2: "closed" | "full" | "broken"}.
      unprivileged: permissions of files bind it, also where it runs as root.
      umask: of the process.
      limits: {name of a resource: soft limit}.
      kill: (signal, seconds) sent after that time.
      hook: "die" kills at the save of step 9, "term" sends SIGTERM to itself at the first save,
        "hold" waits at the first save until a file `go` exists.
      without: (file, fragment) that must not be in what was written.
      code: the exit codes that are right, where not those of `out`.
      untouched: nothing in the workdir may change, whatever the outcome.
      began: training had begun, so that a refusal leaves what was saved.
      entry: the program, `module:function`; a new interpreter runs the usual one.
    """

    args: tuple[str, ...]
    out: str
    says: tuple[str, ...] = ()
    equal: str = ""
    workdir: str = "runs/a"
    writes: tuple[str, ...] = ()
    env: Mapping[str, str | None] = dataclasses.field(default_factory=dict)
    at: str = "."
    fresh: bool = False
    streams: Mapping[int, str] = dataclasses.field(default_factory=dict)
    unprivileged: bool = False
    umask: int = 0o022
    limits: Mapping[str, int] = dataclasses.field(default_factory=dict)
    kill: tuple[int, float] | None = None
    hook: str = ""
    without: tuple[str, str] | None = None
    code: tuple[int, ...] = ()
    untouched: bool = False
    began: bool = False
    entry: str = "distill_jax.main:run"


@dataclasses.dataclass(frozen=True)
class Start:
    """Starts a command and goes on once it holds at its first save."""

    run: Run


@dataclasses.dataclass(frozen=True)
class Join:
    """Lets the command that was started go on, and judges it."""


Step = Callable[["Box"], Any] | Run | Start | Join


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """What is done in a box, in order.

    Attributes:
      id: its name; the first letter is its class.
      about: what it tries.
      start: the template that the box is restored from.
      steps: preparations and commands.
    """

    id: str
    about: str
    start: str = "empty"
    steps: tuple[Step, ...]


@dataclasses.dataclass
class Ended:
    """How a command ended; its most memory includes what its parent had imported."""

    code: int
    text: str
    seconds: float
    processor_seconds: float
    hung: bool
    most_bytes: int


class Box:
    """The folder of a case."""

    def __init__(self, root: pathlib.Path):
        self.root = root
        self.foreign_bytes: dict[str, bytes] = {}
        self.commands = 0

    def __truediv__(self, name: str) -> pathlib.Path:
        return self.root / name

    def write(self, name: str, content: str | bytes) -> None:
        path = self / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    def foreign(self, name: str, content: str | bytes = b"somebody's work\n\x00\xff") -> None:
        """Writes a file of another program, which must survive byte for byte."""
        self.write(name, content)
        self.foreign_bytes[name] = (self / name).read_bytes()

    def npz(self, name: str, **arrays: Any) -> None:
        (self / name).parent.mkdir(parents=True, exist_ok=True)
        with (self / name).open("wb") as file:
            np.savez(file, **arrays)

    def zipped(self, name: str, members: Mapping[str, bytes], **options: Any) -> None:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", **options) as archive:
            for member, content in members.items():
                archive.writestr(member, content)
        self.write(name, buffer.getvalue())

    def edit(self, name: str, change: Callable[[Any], Any]) -> None:
        """Changes a JSON file; `change` may return a new value or change the old one."""
        path = self / name
        value = json.loads(path.read_text())
        changed = change(value)
        path.write_text(json.dumps(value if changed is None else changed))

    def seal(self, step: str) -> None:
        """Writes the checksums of a step anew, as an attacker would."""
        from distill_jax.trainer.io import step_folder

        step_folder.seal(self / step)

    def flip(self, name: str, at: float, bit: int = 0) -> None:
        data = bytearray((self / name).read_bytes())
        data[int(at * (len(data) - 1))] ^= 1 << bit
        (self / name).write_bytes(bytes(data))

    def truncate(self, name: str, share: float) -> None:
        data = (self / name).read_bytes()
        (self / name).write_bytes(data[: int(share * len(data))])

    def remove(self, name: str) -> None:
        path = self / name
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def link(self, name: str, target: str) -> None:
        (self / name).parent.mkdir(parents=True, exist_ok=True)
        (self / name).symlink_to(target.replace("{box}", str(self.root)))

    def largest(self, step: str) -> str:
        """Returns the largest file of a step: its arrays."""
        files = [p for p in (self / step).rglob("*") if p.is_file()]
        found = max(files, key=lambda p: (p.stat().st_size, str(p)))
        return str(found.relative_to(self.root))


def snapshot(root: pathlib.Path) -> dict[str, str]:
    """Returns what every path below a folder is: a digest, a link's target, or a kind."""
    found = {}
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name != "__pycache__"]
        for name in [*files, *(n for n in folders if os.path.islink(os.path.join(folder, n)))]:
            path = os.path.join(folder, name)
            key = os.path.relpath(path, root)
            if os.path.islink(path):
                found[key] = "link to " + os.readlink(path)
            elif os.path.isfile(path):
                found[key] = hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()
            else:
                found[key] = "special"
    return found


# Commands.


def launch(box: Box, run: Run) -> tuple[int, float, pathlib.Path]:
    """Starts a command; returns its process id, when it began, and the file of its output."""
    box.commands += 1
    path = box.root.parent / f"output-{box.commands}"
    out = path.open("wb")
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        try:
            _child(box, run, out.fileno())
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(99)
    out.close()
    return pid, time.perf_counter(), path


def _child(box: Box, run: Run, out: int) -> None:
    os.setsid()
    os.umask(run.umask)
    resource.setrlimit(resource.RLIMIT_CPU, (PROCESSOR_SECONDS, PROCESSOR_SECONDS + 2))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for name, value in run.limits.items():
        kind = getattr(resource, name)
        resource.setrlimit(kind, (value, resource.getrlimit(kind)[1]))
    args = [arg.replace("{box}", str(box.root)) for arg in run.args]
    os.environ |= {
        "HOME": str(box / "home"),
        "TMPDIR": str(box / "tmp"),
        "PYTHONPATH": str(ROOT),
        "DISTILL_JAX_CACHE": str(box.root.parent / "compiled"),
    }
    for name, value in run.env.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value.replace("{box}", str(box.root))
    os.chdir(box / run.at)
    if run.at == "gone":
        os.rmdir(box / "gone")
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(out, 1)
    os.dup2(out, 2)
    for stream, kind in run.streams.items():
        if kind == "closed":
            os.close(stream)
        elif kind == "full":
            os.dup2(os.open("/dev/full", os.O_WRONLY), stream)
        elif kind == "broken":
            read, write = os.pipe()
            os.dup2(write, stream)
            os.close(read)
            os.close(write)
    if run.unprivileged and os.getuid() == 0:
        _drop_override()
    if run.fresh:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        os.execv(sys.executable, [sys.executable, "-m", "distill_jax.main", *args])
    sys.path[0] = str(box / run.at)
    sys.argv = ["distill-jax", *args]
    if run.hook:
        _hook(box, run.hook)
    module, _, function = run.entry.partition(":")
    code: Any = 0
    try:
        code = getattr(importlib.import_module(module), function)()
    except SystemExit as error:
        code = error.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
        code = 1
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(int(code or 0))


def _drop_override() -> None:
    """Gives up the capabilities by which root passes over permissions (capset(2), prctl(2))."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    held = (ctypes.c_uint32 * 6)()
    if libc.capget(header, held):
        raise OSError(ctypes.get_errno(), "capget")
    for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        libc.prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP: a program started later
        for i in range(3):
            held[i] &= ~(1 << capability)
    if libc.capset(header, held):
        raise OSError(ctypes.get_errno(), "capset")


def _hook(box: Box, hook: str) -> None:
    from distill_jax.trainer.io import checkpoint

    save, pid, saved = checkpoint.Checkpointer.save, os.getpid(), []

    def hooked(self, state, *args, **kwargs):
        if hook == "die" and int(state.step) >= 9:
            self.wait()
            os.kill(pid, signal.SIGKILL)
        if hook == "term" and not saved:
            os.kill(pid, signal.SIGTERM)
        if hook == "hold" and not saved:
            (box / "held").touch()
            for _ in range(1200):
                if (box / "go").exists():
                    break
                time.sleep(0.05)
        saved.append(1)
        return save(self, state, *args, **kwargs)

    checkpoint.Checkpointer.save = hooked


def wait(run: Run, pid: int, began: float, output: pathlib.Path) -> Ended:
    """Waits for a command, ends it where it takes too long, and returns how it ended."""
    hung, told = False, run.kill is None
    while True:
        done, status, used = os.wait4(pid, os.WNOHANG)
        passed = time.perf_counter() - began
        if done:
            break
        if not told and run.kill and passed > run.kill[1]:
            os.kill(pid, run.kill[0])
            told = True
        if passed > WALL_SECONDS:
            hung = True
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        time.sleep(0.01)
    busy = used.ru_utime + used.ru_stime
    code = os.waitstatus_to_exitcode(status)
    hung = hung or code == -signal.SIGXCPU or busy > PROCESSOR_SECONDS
    text = output.read_text("utf-8", "replace")
    return Ended(code, text, passed, busy, hung, used.ru_maxrss * 1024)


# Judgement.

QUIET = ("lock", "heartbeat", "__pycache__")
MODES = {"eval": "evaluates", "describe": "describes", "study": "studies"}


def fingerprint(workdir: pathlib.Path) -> dict[str, Any]:
    """Returns metrics, selection and log rows of a finished run, without clocks."""
    result = json.loads((workdir / "result.json").read_text())
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {
        "metrics": result["metrics"],
        "best": result["best"],
        "rows": [
            {k: v for k, v in row.items() if k == "step" or "/" in k}
            for row in rows
            if any("/" in k for k in row)
        ],
    }


def _outcome(run: Run, ended: Ended) -> str:
    """Names how a command ended."""
    text = ended.text
    if ended.hung:
        return "hang"
    if "Traceback (most recent call last)" in text:
        return "traceback"
    if ended.code < 0 or ended.code in (134, 137, 139):
        return f"signal {ended.code}"
    if ended.code == 0:
        if any("help" in arg for arg in run.args):
            return "helps"
        modes = [arg.partition("=")[2] for arg in run.args if arg.startswith("--mode=")]
        if modes and modes[-1] in MODES:
            return MODES[modes[-1]]
        if "is finished" in text:
            return "finished"
        return "resumes" if "continuing from step" in text else "trains"
    return {2: "refused", 3: "nonfinite", 75: "stopped"}.get(ended.code, f"code {ended.code}")


def judge(
    box: Box,
    run: Run,
    ended: Ended,
    before: Mapping[str, str],
    references: Callable[[str], Any],
) -> tuple[str, list[tuple[str, str]]]:
    """Returns the outcome of a command and what is wrong with it: (kind, detail)."""
    outcome, wrong = _outcome(run, ended), []
    right = run.out.split("|")
    text = ended.text.lower()
    told = not run.says or any(fragment.lower() in text for fragment in run.says)
    done = ended.code == 0 and outcome not in ("hang", "traceback")
    if outcome == "hang":
        wrong.append(("hang", f"{ended.processor_seconds:.0f} s of a processor"))
    elif outcome == "traceback":
        last = [line for line in ended.text.splitlines() if line and not line.startswith(" ")]
        wrong.append(("traceback", last[-1][:300] if last else ""))
    elif done and "warned" in right and told:
        outcome = "warned"
    elif not done and outcome != "refused" and "fails" in right:
        outcome = "fails"
        if not told:
            wrong.append(("poor message", f"none of {run.says}: {ended.text[-300:]}"))
    elif "interrupted" in right and (ended.code < 0 or ended.code in (75, 130, 143)):
        outcome = "interrupted"
    if run.code and ended.code in run.code and outcome not in ("hang", "traceback"):
        pass
    elif outcome not in right and not wrong:
        kind = "silently wrong" if done else "wrongly refused" if ended.code == 2 else "crash"
        if not done and "refused" in right:
            kind = "crash"
        wrong.append((kind, f"{outcome}, not {run.out}: {_brief(ended.text)}"))
    elif outcome == "refused":
        starts = [line.startswith("error: ") for line in ended.text.splitlines()]
        if sum(starts) != 1 and 2 not in run.streams:
            wrong.append(("poor message", f"{sum(starts)} messages: {ended.text[-300:]}"))
        elif not told:
            wrong.append(("poor message", f"none of {run.says}: {_brief(ended.text)}"))
        elif max(map(len, ended.text.splitlines()), default=0) > 20_000:
            wrong.append(("poor message", "a line of more than 20000 characters"))
    wrong += _state(box, run, outcome, done, before)
    if run.equal and done and not wrong:
        wrong += _equal(box, run, outcome, references)
    if run.without and run.without[1] in _text(box / run.without[0]):
        wrong.append(("silently wrong", f"{run.without[0]} contains {run.without[1]!r}"))
    return outcome, wrong


def _text(path: pathlib.Path) -> str:
    return path.read_text("utf-8", "replace") if path.is_file() else ""


def _brief(text: str) -> str:
    found = text.partition("error: ")[2] or text[-300:]
    return " / ".join(found.splitlines()[:3])[:300]


def _state(box: Box, run: Run, outcome: str, done: bool, before) -> list[tuple[str, str]]:
    wrong, after = [], snapshot(box.root)
    if canaries := sorted(name for name in after if "CANARY" in name):
        wrong.append(("executed", ", ".join(canaries)))
    for name, content in box.foreign_bytes.items():
        path = box / name
        if not path.is_file() or path.read_bytes() != content:
            wrong.append(("foreign lost", name))
    own = (run.workdir, "tmp", "home", "held", "go", "CANARY", *run.writes)

    def inside(name: str, folders) -> bool:
        folders = (os.path.normpath(folder) for folder in folders)
        return any(name == f or name.startswith(f + "/") or f == "." for f in folders)

    changed = [n for n in before if after.get(n) != before[n] and not inside(n, own)]
    if changed := [n for n in changed if n not in box.foreign_bytes and not _quiet(n)]:
        wrong.append(("foreign lost", f"outside the workdir: {', '.join(sorted(changed)[:4])}"))
    new = [n for n in after if n not in before and "CANARY" not in n]
    if outside := [n for n in new if not inside(n, own)]:
        wrong.append(("wrote outside", ", ".join(sorted(outside)[:4])))
    if (outcome == "refused" and "refused" in run.out and not run.began) or run.untouched:
        kept = list(after.values())
        lost = [
            n
            for n, what in before.items()
            if inside(n, (run.workdir,)) and what not in kept and not _quiet(n)
        ]
        if lost:
            wrong.append(("lost work", f"refused, and changed: {', '.join(sorted(lost)[:4])}"))
        held = list(before.values())
        left = [
            n for n in new if inside(n, (run.workdir,)) and not _quiet(n) and after[n] not in held
        ]
        if left:
            wrong.append(("left behind", ", ".join(sorted(left)[:4])))
    if (
        done
        and outcome in ("trains", "resumes", "finished", "warned")
        and "eval" not in str(run.args)
    ):
        try:
            status = json.loads((box / run.workdir / "result.json").read_text())["status"]
        except (OSError, ValueError, KeyError):
            status = "absent"
        study = any("--mode" in arg for arg in run.args)
        if status != "done" and not study and outcome != "warned":
            wrong.append(("silently wrong", "code 0, and no finished result"))
    return wrong


def _quiet(name: str) -> bool:
    return any(part in os.path.basename(name) for part in QUIET)


def _equal(box: Box, run: Run, outcome: str, references) -> list[tuple[str, str]]:
    expected = references(run.equal)
    if outcome == "evaluates":
        found = json.loads((box / run.workdir / "eval.json").read_text())["last"]
        name = "test/nll"
        if not np.isclose(found[name], expected["metrics"][name], rtol=1e-6, atol=0):
            return [("silently wrong", f"{name} {found[name]}, not {expected['metrics'][name]}")]
        return []
    found = fingerprint(box / run.workdir)
    for part in ("metrics", "best", "rows"):
        if found[part] != expected[part]:
            detail = f"{part} differ from the reference {run.equal!r}"
            if part != "rows":
                keys = [k for k in expected[part] if found[part].get(k) != expected[part][k]]
                detail += f": {keys[:2]}"
            return [("silently wrong", detail)]
    return []
