"""Command lines of the classes a to g, with outcomes that were written before they were run."""

import json
import os
import random
import signal
import struct

import numpy as np
from _hostile_box import Box, Case, Join, Run, Start

TINY = """\
from distill_jax.run import config as config_lib


def get_config(arg=""):
    options = arg.split(",")
    config = config_lib.base()
    config.data.name = "synthetic"
    config.data.kwargs = {"n_train": 96, "n_test": 32, "image_size": 8, "channels": 1}
    if "float" in options:
        config.data.name, config.data.kwargs = "npz_file", {"path": "float.npz"}
    else:
        config.data.train_transforms = ("normalize",)
        config.data.eval_transforms = ("normalize",)
        config.data.transform_kwargs.normalize = {"mean": (0.5,), "std": (0.25,)}
    if "npz" in options:
        config.data.name, config.data.kwargs = "npz_file", {"path": "data.npz"}
    if "folder" in options:
        config.data.name, config.data.kwargs = "npz_file", {"path": "data"}
    if "idx" in options:
        config.data.name, config.data.kwargs = "idx_folder", {"root": "idx"}
    config.objective.name = "supervised"
    config.roles.student = config_lib.role("mlp", hidden=(8,))
    config.evaluators = {"classification": {}}
    config.batch_size = 16
    config.total = 9
    config.eval.every = 3
    config.optim.name = "momentum"
    config.optim.lr = 0.05
    config.log.every_steps = 2
    config.log.tensorboard = False
    config.mesh.cpu_devices = 1
    if "kd" in options or "bare" in options:
        config.objective.name = "kd"
        config.roles.teacher = config_lib.role("mlp", hidden=(8,))
        if "bare" in options:
            config.roles.teacher = config_lib.role()
        config.roles.teacher.frozen = True
        config.roles.teacher.init = "teacher"
    if "cached" in options:
        config.cache.dir = "cache"
    if "study" in options:
        config.study.arms = {"alone": {}, "smooth": {"objective": {"kwargs": {
            "label_smoothing": 0.1}}}}
        config.study.seeds = (0, 1)
        config.study.reference = "alone"
    return config
"""


def images(n: int, seed: int = 0, classes: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Returns uint8 images `[n, 8, 8, 1]` that can be told apart, and int64 labels `[n]`."""
    prototypes = np.random.default_rng(99).normal(size=(classes, 8, 8, 1))
    r = np.random.default_rng(seed)
    labels = r.permutation(np.arange(n) % classes).astype(np.int64)
    x = 128 + 40 * (prototypes[labels] + r.normal(size=(n, 8, 8, 1)))
    return np.clip(x, 0, 255).astype(np.uint8), labels


def arrays(kind: str = "uint8") -> dict[str, np.ndarray]:
    """Returns the four arrays of a data set, uint8 images or float features `[n, 12]`."""
    (x, y), (x_test, y_test) = images(96, 1), images(32, 2)
    if kind == "float":
        x, x_test = (v.reshape(len(v), -1)[:, :12].astype(np.float32) for v in (x, x_test))
        x, x_test = (x - 128) / 64, (x_test - 128) / 64
    return {"x_train": x, "y_train": y, "x_test": x_test, "y_test": y_test}


def base_files(box: Box) -> None:
    for folder in ("tmp", "home"):
        (box / folder).mkdir(parents=True, exist_ok=True)
    box.write("tiny.py", TINY)
    box.npz("data.npz", **arrays())
    box.npz("float.npz", **arrays("float"))


def train(*more: str, config: str = "tiny.py", workdir: str = "runs/a", out="trains", **kw) -> Run:
    flags = (f"--config={config}", f"--workdir={workdir}", *more)
    return Run(args=flags, out=out, workdir=kw.pop("own", workdir), **kw)


def evaluate(*more: str, workdir: str = "runs/a", out: str = "evaluates", **kw) -> Run:
    flags = ("--mode=eval", f"--workdir={workdir}", *more)
    return Run(args=flags, out=out, workdir=kw.pop("own", workdir), **kw)


def study(*more: str, config: str = "tiny.py:study", workdir: str = "runs/s", out="studies", **kw):
    flags = ("--mode=study", f"--config={config}", f"--workdir={workdir}", *more)
    return Run(args=flags, out=out, workdir=kw.pop("own", workdir), **kw)


def plain(*args: str, out: str, **kw) -> Run:
    return Run(args=args, out=out, **kw)


def refused(*more: str, says=(), **kw) -> Run:
    return train(*more, out=kw.pop("out", "refused"), says=says, **kw)


def _teacher(config: str = "tiny.py", seed: int = 7) -> Run:
    return train(f"--config.seed={seed}", config=config, workdir="teacher")


def _best(box: Box) -> int:
    """Returns the step that is best of the teacher: the one that is used."""
    return json.loads((box / "teacher/result.json").read_text())["best"]["step"]


DIE = {"hook": "die", "out": "interrupted"}

TEMPLATES = {
    "empty": ("", (base_files,)),
    "clean": ("empty", (train(),)),
    "half": ("empty", (train(**DIE),)),
    "teacher": ("empty", (_teacher(),)),
    "kd": ("teacher", (train(config="tiny.py:kd"),)),
    "kd_half": ("teacher", (train(config="tiny.py:kd", **DIE),)),
    "cached": ("teacher", (train(config="tiny.py:kd,cached", writes=("cache",)),)),
    "cached_half": ("teacher", (train(config="tiny.py:kd,cached", writes=("cache",), **DIE),)),
    "npz": ("empty", (train(config="tiny.py:npz"),)),
    "npz_half": ("empty", (train(config="tiny.py:npz", **DIE),)),
    "float": ("empty", (train(config="tiny.py:float"),)),
    "study": ("empty", (study(),)),
}
"""Name: the template it goes on from, and what is done. A reference is the run `runs/a` of one."""

CASES: list[Case] = []


def case(id: str, about: str, *steps, start: str = "empty") -> None:
    CASES.append(Case(id=id, about=about, start=start, steps=steps))


# a: environment and console.


def _environment() -> None:
    def env(name: str, about: str, values, out="trains", says=(), fresh=True, **kw) -> None:
        equal = kw.pop("equal", "clean")
        run = train(out=out, says=says, env=values, fresh=fresh, equal=equal, **kw)
        case(f"a-{name}", about, run)

    env("home-unset", "HOME is not set", {"HOME": None})
    env(
        "home-absent",
        "HOME does not exist, default cache",
        {"HOME": "/proc/nothing/home", "DISTILL_JAX_CACHE": None},
    )
    env(
        "home-file",
        "HOME is a file, default cache",
        {"HOME": "{box}/tiny.py", "DISTILL_JAX_CACHE": None},
    )
    env("cache-file", "the compilation cache is a file", {"DISTILL_JAX_CACHE": "{box}/tiny.py"})
    env("cache-empty", "the compilation cache is an empty string", {"DISTILL_JAX_CACHE": ""})
    env("cache-null", "the compilation cache is /dev/null", {"DISTILL_JAX_CACHE": "/dev/null"})
    env(
        "cache-readonly",
        "the compilation cache cannot be written",
        {"DISTILL_JAX_CACHE": "/proc/nothing"},
    )
    env(
        "locale-c",
        "ASCII locale and console, umlauts in the workdir",
        {"LC_ALL": "C", "PYTHONIOENCODING": "ascii"},
        workdir="runs/größe",
    )
    env(
        "locale-ascii",
        "file names forced to ASCII, umlauts in the workdir",
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        out="trains|refused",
        says=("utf-8", "encoding", "not unicode"),
        workdir="runs/größe",
    )
    env("locale-odd", "a locale that does not exist", {"LC_ALL": "xx_YY.UTF-9", "LANG": "nonsense"})
    env("tmpdir-absent", "TMPDIR does not exist", {"TMPDIR": "/nonexistent/tmp"})
    env("tmpdir-file", "TMPDIR is a file", {"TMPDIR": "{box}/tiny.py"})
    env("hashseed-1", "another order of sets", {"PYTHONHASHSEED": "1"})
    env("hashseed-2", "another order of sets", {"PYTHONHASHSEED": "4242"})
    env("optimize", "without assertions and docstrings", {"PYTHONOPTIMIZE": "2"})
    env(
        "threads-odd",
        "numbers of threads that are no numbers",
        {"OMP_NUM_THREADS": "0", "OPENBLAS_NUM_THREADS": "many", "MKL_NUM_THREADS": "-1"},
    )
    env(
        "terminal-odd",
        "a terminal of width 0",
        {"TERM": "nonsense", "COLUMNS": "0", "LINES": "x", "NO_COLOR": "1"},
    )
    env(
        "slurm-shell",
        "an interactive allocation of 4 tasks, outside srun",
        {"SLURM_JOB_ID": "12", "SLURM_NTASKS": "4", "SLURM_JOB_NODELIST": "n[1-4]"},
    )
    env(
        "slurm-odd",
        "a number of tasks that is no number",
        {"SLURM_STEP_NUM_TASKS": "four", "SLURM_JOB_ID": "12"},
        out="refused",
        says=("SLURM",),
    )
    env(
        "timeout-odd",
        "a timeout that is no number",
        {"DISTILL_JAX_TIMEOUT": "soon"},
        out="refused",
        says=("DISTILL_JAX_TIMEOUT",),
    )
    env("memory-odd", "an unknown value of an own variable", {"DISTILL_JAX_KEEP_MEMORY": "maybe"})
    env(
        "processes-odd",
        "an unknown value of an own variable",
        {"DISTILL_JAX_PROCESSES": "4"},
        out="refused",
        says=("DISTILL_JAX_PROCESSES",),
    )
    env(
        "jax-bool-odd",
        "a JAX variable that is no boolean",
        {"JAX_LOG_COMPILES": "perhaps"},
        out="refused",
        says=("JAX_LOG_COMPILES", "perhaps"),
    )
    env(
        "jax-int-odd",
        "a JAX variable that is no number",
        {"JAX_NUM_CPU_DEVICES": "two"},
        out="refused|trains",
        says=("JAX_NUM_CPU_DEVICES", "two"),
    )
    env(
        "jax-enum-odd",
        "an unknown matrix precision",
        {"JAX_DEFAULT_MATMUL_PRECISION": "best"},
        out="refused",
        says=("JAX_DEFAULT_MATMUL_PRECISION", "best"),
    )
    env(
        "xla-flags-odd",
        "a flag that XLA does not know",
        {"XLA_FLAGS": "--xla_no_such_flag=1"},
        out="refused|fails",
        says=("XLA_FLAGS", "xla_no_such_flag"),
    )
    env(
        "xla-devices",
        "XLA is told to split the CPU into 4",
        {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"},
        out="trains",
        equal="",
    )
    env("debug-nans", "JAX looks for NaN itself", {"JAX_DEBUG_NANS": "1"})
    env("cuda-hidden", "no CUDA device is visible", {"CUDA_VISIBLE_DEVICES": ""})

    for name, about, streams, code in (
        ("stdout-closed", "stdout is closed", {1: "closed"}, ()),
        ("stdin-closed", "stdin is closed", {0: "closed"}, ()),
        ("all-closed", "all streams are closed", {0: "closed", 1: "closed", 2: "closed"}, ()),
        ("stdout-full", "stdout has no room", {1: "full"}, (0, 1, 2, 120)),
        ("stderr-full", "stderr has no room", {2: "full"}, (0, 120)),
        ("stderr-broken", "nobody reads stderr", {2: "broken"}, ()),
    ):
        case(
            f"a-{name}",
            about,
            train(fresh=True, streams=streams, equal="clean", code=code),
            train(out="finished", equal="clean"),
        )
    case(
        "a-refusal-unheard",
        "a mistake, and stderr is closed",
        refused("--config.optim.lr=-1", fresh=True, streams={2: "closed"}),
    )
    case(
        "a-cwd-gone",
        "the working directory was deleted",
        lambda box: (box / "gone").mkdir(),
        Run(
            args=("--config={box}/tiny.py", "--workdir={box}/runs/a"),
            out="trains|refused",
            workdir="runs/a",
            at="gone",
            writes=("gone",),
            equal="clean",
        ),
    )
    case(
        "a-few-files",
        "24 open files at most",
        train(
            fresh=True,
            limits={"RLIMIT_NOFILE": 24},
            out="trains|refused|fails",
            says=("too many open files", "failed to open"),
            began=True,
            equal="clean",
        ),
        train(out="trains|resumes|finished", equal="clean"),
    )
    case(
        "a-small-files",
        "no file may exceed 3000 bytes",
        train(
            limits={"RLIMIT_FSIZE": 3000},
            env={"DISTILL_JAX_CACHE": "off"},
            out="refused",
            says=("larger", "too large"),
            began=True,
            code=(2,),
        ),
        train(out="trains|resumes", equal="clean"),
    )
    for name, number, seconds in (
        ("term-early", signal.SIGTERM, 0.3),
        ("int-early", signal.SIGINT, 0.6),
        ("term-import", signal.SIGTERM, 0.9),
        ("hup", signal.SIGHUP, 0.7),
    ):
        case(
            f"a-{name}",
            f"{signal.Signals(number).name} after {seconds} s, then the same again",
            train(fresh=True, kill=(number, seconds), out="interrupted|trains"),
            train(out="trains|resumes|finished", equal="clean"),
        )
    case(
        "a-term-saving",
        "SIGTERM while the first checkpoint is saved, then the same again",
        train(hook="term", out="stopped"),
        train(out="resumes|trains", equal="clean"),
    )
    case("a-umask", "nobody else may read", train(equal="clean", umask=0o077))


# b: paths and folders.


def _paths() -> None:
    def workdir(name, about, text, own, *before, out="trains", says=(), **kw):
        equal = "" if out == "refused" else "clean"
        case(
            f"b-{name}",
            about,
            *before,
            train(workdir=text, own=own, out=out, says=says, equal=equal, **kw),
        )

    workdir("dots", "a path with ..", "./runs/../runs/./a", "runs/a")
    workdir("slashes", "a path with double and trailing slashes", "runs//a//", "runs/a")
    workdir("home", "a path with ~", "~/run", "home/run")
    workdir("spaces", "a path with spaces and quotes", "runs/my 'best' run", "runs/my 'best' run")
    workdir(
        "unicode", "a path with emoji and right-to-left marks", "runs/💥\u202e é", "runs/💥\u202e é"
    )
    workdir("newline", "a path with a line break", "runs/a\nb", "runs/a\nb")
    workdir("dash", "a path that begins with a dash", "-x", "-x")
    workdir("percent", "a path of patterns and formats", "runs/{seed}%s*?", "runs/{seed}%s*?")
    workdir(
        "brackets",
        "a path with brackets, which Orbax takes for a pattern",
        "runs/a[1]",
        "runs/a[1]",
        out="trains|refused",
        says=("'[1]'",),
    )
    workdir(
        "link",
        "a link to an empty folder",
        "link",
        "target",
        lambda box: ((box / "target").mkdir(), box.link("link", "target")),
    )
    workdir(
        "linked-parent",
        "below a link",
        "link/run",
        "target/run",
        lambda box: ((box / "target").mkdir(), box.link("link", "target")),
    )
    workdir(
        "fifo",
        "a named pipe",
        "pipe",
        "pipe",
        lambda box: os.mkfifo(box / "pipe"),
        out="refused",
        says=("pipe",),
    )
    workdir("file", "a file", "tiny.py", "runs/a", out="refused", says=("tiny.py",))
    workdir(
        "below-file",
        "a folder below a file",
        "tiny.py/run",
        "runs/a",
        out="refused",
        says=("tiny.py",),
    )
    workdir(
        "long-name",
        "a name of 300 characters",
        "runs/" + "n" * 300,
        "runs",
        out="refused",
        says=("workdir", "too long"),
    )
    workdir(
        "long-path",
        "a path of 5000 characters",
        "/".join(["d" * 100] * 50),
        "d" * 100,
        out="refused",
        says=("workdir", "too long"),
    )
    workdir(
        "denied",
        "a folder of another user",
        "denied/run",
        "denied/run",
        lambda box: ((box / "denied").mkdir(), os.chmod(box / "denied", 0o555)),
        out="refused",
        says=("denied",),
        unprivileged=True,
    )
    workdir(
        "device",
        "a device",
        "/dev/full",
        "runs/a",
        out="refused",
        says=("--workdir", "/dev/full"),
    )
    workdir(
        "surrogate",
        "a name that is not UTF-8",
        os.fsdecode(b"runs/\xff\xfe"),
        os.fsdecode(b"runs/\xff\xfe"),
        out="trains|refused",
        says=("workdir",),
        fresh=True,
    )
    case(
        "b-cwd",
        "the folder of the config itself",
        lambda box: box.foreign("notes.txt"),
        train(workdir=".", own=".", out="trains|refused", says=("notes", "workdir", "files")),
    )
    case(
        "b-notes",
        "a folder with somebody's notes",
        lambda box: box.foreign("runs/a/notes.txt"),
        train(out="trains|refused", says=("notes.txt", "runs/a"), equal="clean"),
    )
    case(
        "b-inside-run",
        "a folder inside a finished run",
        lambda box: [
            box.foreign_bytes.update({n: (box / n).read_bytes()})
            for n in ("runs/a/result.json", "runs/a/metrics.jsonl")
        ],
        train(workdir="runs/a/again", out="trains|refused", says=("runs/a",), equal="clean"),
        start="clean",
    )
    case(
        "b-inside-checkpoints",
        "a number among the checkpoints of a finished run",
        train(workdir="runs/a/checkpoints/12", out="trains|refused", says=("checkpoint", "run")),
        train(out="finished", equal="clean"),
        start="clean",
    )
    case(
        "b-teacher-is-workdir",
        "the teacher's own folder as workdir",
        refused(
            "--config.seed=7",
            config="tiny.py:kd",
            workdir="teacher",
            says=("teacher", "another config"),
        ),
        train("--config.seed=7", workdir="teacher", out="finished"),
        start="teacher",
    )

    def config(name, about, spec, *before, out="refused", says=(), **kw):
        case(
            f"b-config-{name}",
            about,
            *before,
            train(config=spec, out=out, says=says, equal="" if out == "refused" else "clean", **kw),
        )

    config(
        "link",
        "a link to a config",
        "link.py",
        lambda box: box.link("link.py", "tiny.py"),
        out="trains",
    )
    config(
        "spaces",
        "a config with spaces in its path",
        "my configs/tiny one.py",
        lambda box: box.write("my configs/tiny one.py", TINY),
        out="trains",
    )
    config(
        "bom",
        "a config with a byte order mark",
        "bom.py",
        lambda box: box.write("bom.py", b"\xef\xbb\xbf" + TINY.encode()),
        out="trains",
    )
    config(
        "crlf",
        "a config of DOS",
        "dos.py",
        lambda box: box.write("dos.py", TINY.replace("\n", "\r\n")),
        out="trains",
    )
    config(
        "latin",
        "a config in Latin-1",
        "latin.py",
        lambda box: box.write("latin.py", ("# größe\n" + TINY).encode("latin-1")),
        out="trains|refused",
        says=("latin.py",),
    )
    config(
        "binary",
        "a program in place of a config",
        "program.py",
        lambda box: box.write("program.py", bytes(range(256)) * 4),
        says=("program.py",),
    )
    config("null", "/dev/null", "/dev/null", says=("/dev/null",))
    config(
        "colon",
        "a colon in the folder of a config",
        "a:b/tiny.py",
        lambda box: box.write("a:b/tiny.py", TINY),
        out="trains|refused",
        says=("no such file", "a:b"),
    )
    config(
        "empty",
        "an empty config",
        "empty.py",
        lambda box: box.write("empty.py", ""),
        says=("get_config",),
    )

    def teacher(name, about, text, *before, out="trains", says=(), **kw):
        case(
            f"b-teacher-{name}",
            about,
            *before,
            train(
                f"--config.roles.teacher.init={text}",
                config="tiny.py:kd",
                out=out,
                says=says,
                equal=kw.pop("equal", "" if out == "refused" else "kd"),
                **kw,
            ),
            start="teacher",
        )

    teacher("dots", "a teacher by a path with ..", "runs/../teacher/")
    teacher(
        "home",
        "a teacher by ~",
        "~/teacher",
        lambda box: os.rename(box / "teacher", box / "home/teacher"),
    )
    teacher(
        "spaces",
        "a teacher with spaces",
        "my teacher",
        lambda box: os.rename(box / "teacher", box / "my teacher"),
    )
    teacher("link", "a link to a teacher", "link", lambda box: box.link("link", "teacher"))
    teacher(
        "step",
        "one step of a teacher",
        "teacher/checkpoints/9",
        out="trains|refused",
        says=("teacher",),
        equal="",
    )
    teacher(
        "empty",
        "an empty folder",
        "nothing",
        lambda box: (box / "nothing").mkdir(),
        out="refused",
        says=("nothing",),
    )
    teacher("file", "a file", "tiny.py", out="refused", says=("tiny.py",))
    teacher(
        "hash",
        "a role that the teacher's run has not",
        "teacher#nobody",
        out="refused",
        says=("nobody",),
    )
    teacher("url", "an address on the net", "gs://bucket/run", out="refused", says=("gs:",))

    def data(name, about, text, *before, out="trains", says=()):
        case(
            f"b-data-{name}",
            about,
            *before,
            train(
                f"--config.data.kwargs.path={text}",
                config="tiny.py:npz",
                out=out,
                says=says,
                equal="" if out == "refused" else "npz",
            ),
        )

    data(
        "home", "data by ~", "~/d.npz", lambda box: os.rename(box / "data.npz", box / "home/d.npz")
    )
    data(
        "link",
        "a link to data, with spaces",
        "my link.npz",
        lambda box: box.link("my link.npz", "data.npz"),
    )
    data(
        "dangling",
        "a link to nothing",
        "link.npz",
        lambda box: box.link("link.npz", "nowhere.npz"),
        out="refused",
        says=("link.npz",),
    )
    data(
        "loop",
        "a link to itself",
        "loop.npz",
        lambda box: box.link("loop.npz", "loop.npz"),
        out="refused",
        says=("loop.npz",),
    )
    data("config", "a config in place of data", "tiny.py", out="refused", says=("tiny.py",))

    def cache(name, about, text, own, *before, out="trains", says=()):
        case(
            f"b-cache-{name}",
            about,
            *before,
            train(
                f"--config.cache.dir={text}",
                config="tiny.py:kd",
                out=out,
                says=says,
                writes=(own,),
                equal="" if out == "refused" else "kd",
            ),
            start="teacher",
        )

    cache("spaces", "stored answers by a path with spaces and ..", "x/../my answers", "my answers")
    cache("home", "stored answers by ~", "~/answers", "home/answers")
    cache(
        "file", "a file for stored answers", "tiny.py", "nothing", out="refused", says=("tiny.py",)
    )
    cache(
        "foreign",
        "a folder with somebody's files for stored answers",
        "cache",
        "cache",
        lambda box: (box.foreign("cache/teacher/notes.txt"), box.foreign("cache/model.bin")),
        out="trains|refused",
        says=("cache",),
    )
    cache(
        "workdir",
        "the workdir for stored answers",
        "runs/a",
        "runs/a",
        out="trains|refused",
        says=("cache.dir",),
    )


# c: names and code.

GOOD_MODULE = """\
from distill_jax.data import synthetic
from distill_jax.models import mlp
from distill_jax.objectives import supervised
from distill_jax.evaluators import classification

data, objective, evaluator = synthetic.make, supervised.make, classification.make


def model(*, num_classes: int, hidden: tuple[int, ...] = (8,)):
    return mlp.make(num_classes=num_classes, hidden=hidden)


def anything(**kwargs):
    return None


def number(**kwargs):
    return 3


async def late(**kwargs):
    return None


class Outer:
    class Inner:
        make = staticmethod(synthetic.make)


constant = 3
"""

SLOTS = {
    "objective": "objective.name",
    "weighting": "weighting.name",
    "data": "data.name",
    "model": "roles.student.model",
}


def _names() -> None:
    write = lambda box: box.write("mine.py", GOOD_MODULE)  # noqa: E731
    kwargs = ["--config.data.kwargs={'n_train': 96, 'n_test': 32, 'image_size': 8, 'channels': 1}"]
    hidden = ["--config.roles.student.kwargs.hidden=(8,)"]
    for slot, symbol, more in (
        ("data", "mine:data", kwargs),
        ("model", "mine:model", hidden),
        ("objective", "mine:objective", []),
        ("data", "mine:Outer.Inner.make", kwargs),
    ):
        name = symbol.partition(":")[2].replace(".", "-")
        case(
            f"c-own-{slot}-{name}".lower(),
            f"a module of the working directory as {slot}",
            write,
            train(f"--config.{SLOTS[slot]}={symbol}", *more, equal="clean"),
        )
    for slot, symbol in (
        ("data", "mine:anything"),
        ("model", "mine:number"),
        ("objective", "mine:anything"),
        ("weighting", "mine:number"),
        ("data", "mine:late"),
        ("model", "mine:constant"),
    ):
        name = symbol.partition(":")[2]
        about = f"{symbol} as {slot}, which gives something else"
        more = {"data": ["--config.data.kwargs={}"], "model": []}.get(slot, [])
        says = (SLOTS[slot], slot, symbol)
        case(
            f"c-wrong-{slot}-{name}",
            about,
            write,
            refused(f"--config.{SLOTS[slot]}={symbol}", *more, says=says),
        )

    odd = {
        "no-symbol": "mine:",
        "no-module": ":make",
        "two-colons": "mine:model:x",
        "no-colon": "mine.model",
        "call": "mine:model()",
        "relative": "..mine:model",
        "shell": "mine:model; touch CANARY",
        "substitution": "$(touch CANARY):x",
        "backticks": "`touch CANARY`:x",
        "expression": "mine:__import__('os').system('touch CANARY')",
        "dunder": "mine:__builtins__.eval",
        "path": "../mine.py:model",
        "null": "mine\\x00:model",
        "math": "math:pi",
        "module": "os:path",
        "print": "builtins:print",
        "exit": "sys:exit",
        "input": "builtins:input",
        "type": "builtins:type",
        "unicode": "m\u0456ne:model",
        "absent": "nowhere.at.all:make",
        "long": "m" * 5000 + ":make",
    }
    for name, symbol in odd.items():
        case(
            f"c-name-{name}",
            f"{symbol[:40]!r} as a network",
            write,
            refused(
                f"--config.roles.student.model={symbol}",
                "--config.roles.student.kwargs={}",
                says=("roles.student.model", "roles.student", symbol[:30]),
            ),
        )

    modules = {
        "raises": ("raise ValueError('broken on purpose')\n", "refused", ("noisy", "broken")),
        "exits": ("raise SystemExit(0)\n", "refused", ("noisy",)),
        "exits-text": ("import sys\nsys.exit('bye')\n", "refused", ("noisy", "bye")),
        "syntax": ("def broken(:\n", "refused", ("noisy",)),
        "needs": ("import not_installed_here\n", "refused", ("not_installed_here",)),
        "unspeakable": (
            "class E(Exception):\n    def __str__(self):\n        raise RuntimeError\nraise E\n",
            "refused",
            ("noisy",),
        ),
        "base-exception": (
            "class Stop(BaseException): pass\nraise Stop('x')\n",
            "refused",
            ("noisy",),
        ),
        "recursion": ("def f(): return f()\nf()\n", "refused", ("noisy", "recursion")),
        "null-byte": (b"x = 1\x00\n", "refused", ("noisy",)),
        "prints": ("print('hello from import')\n", "trains", ()),
        "warns": ("import warnings\nwarnings.warn('mind')\n", "trains", ()),
        "argv": ("import sys\nsys.argv[:] = ['other', '--mode=eval']\n", "trains", ()),
        "chdir": ("import os\nos.chdir(os.environ['HOME'])\n", "trains", ()),
        "seeds": ("import random, numpy\nrandom.seed(1)\nnumpy.random.seed(1)\n", "trains", ()),
    }
    for name, (text, out, says) in modules.items():
        body = text if isinstance(text, bytes) else (text + GOOD_MODULE).encode()
        case(
            f"c-import-{name}",
            "a module whose import does something",
            lambda box, body=body: box.write("noisy.py", body),
            train(
                "--config.roles.student.model=noisy:model",
                *hidden,
                out=out,
                says=says,
                equal="clean" if out == "trains" else "",
            ),
        )

    configs = {
        "keyboard": ("def get_config():\n    raise KeyboardInterrupt\n", "refused|interrupted", ()),
        "recursion": ("def get_config():\n    return get_config()\n", "refused", ("recursion",)),
        "huge": (
            "def get_config():\n    raise ValueError('x' * 10**6)\n",
            "refused",
            ("valueerror",),
        ),
        "class": ("class get_config:\n    pass\n", "refused", ("get_config",)),
        "generator": ("def get_config():\n    yield 1\n", "refused", ("generator",)),
        "unspeakable": (
            "class E(Exception):\n    def __str__(self):\n        raise RuntimeError\n"
            "def get_config():\n    raise E\n",
            "refused",
            (),
        ),
        "surrogate": (
            "def get_config():\n    raise ValueError('\\ud800')\n",
            "refused",
            ("valueerror",),
        ),
        "key": (
            TINY.replace("return config", "config.optim.learning_rate = 1\n    return config"),
            "refused",
            ("learning_rate",),
        ),
        "prints": (
            TINY.replace("return config", "print('hello')\n    return config"),
            "trains",
            (),
        ),
        "neighbour": ("import helper\n" + TINY, "trains", ()),
        "numpy": (
            TINY.replace("0.05", "__import__('numpy').float64(0.05)"),
            "trains|refused",
            ("optim.lr",),
        ),
        "set": (TINY.replace("(8,)", "{8}"), "refused", ("hidden",)),
        "bytes": (TINY.replace('"synthetic"', 'b"synthetic"'), "refused", ("data.name",)),
        "nan": (TINY.replace("0.25", "float('nan')"), "refused", ("std", "normalize", "nan")),
    }
    for name, (text, out, says) in configs.items():
        case(
            f"c-config-{name}",
            "a config file that does something",
            lambda box, text=text: (box.write("odd.py", text), box.write("helper.py", "x = 1\n")),
            train(config="odd.py", out=out, says=says, equal="clean" if out == "trains" else ""),
        )
    case(
        "c-foreign-configs",
        "a foreign package `configs` in the working directory",
        lambda box: box.write("configs/common.py", "raise ValueError('not this one')\n"),
        train(
            "--config.total=4",
            config=f"{_root()}/configs/distill/supervised.py:smoke",
            env={"DISTILL_JAX_CACHE": "off"},
        ),
    )


def _root():
    from _hostile_box import ROOT

    return ROOT


# d: values.


def _values() -> None:
    wrong = [
        "optim.lr=nan", "optim.lr=inf", "optim.lr=-0.1", "optim.lr=0.1,0.2", "optim.lr=",
        "optim.lr=fast", "batch_size=16.0", "batch_size=0x10", "batch_size=-16",
        "batch_size=true", "batch_size=99999999999999999999", "total=0", "total=-3",
        "total=none", "total=nan epochs", "total=inf epochs", "total=-1 epochs",
        "total=0 epochs", "total=0 examples", "eval.every=nan percent", "eval.every=0 percent",
        "eval.every=-5 percent", "eval.every=0", "checkpoint.every=nan epochs",
        "checkpoint.every=inf percent", "checkpoint.every=-1", "optim.warmup=nan percent",
        "optim.warmup=-1", "optim.warmup=250 percent", "seed=-1", "seed=4294967296",
        "seed=1.0", "seed=nan", "data.held_out=1", "data.held_out=nan", "data.held_out=-0.1",
        "data.held_out=0.9999", "data.held_out=1e-9", "accum_steps=0", "accum_steps=3",
        "accum_steps=-4", "roles.student.kwargs.hidden=(0,)", "roles.student.kwargs.hidden=(-8,)",
        "roles.student.kwargs.hidden=(8.5,)", "roles.student.kwargs.hidden=('a',)",
        "roles.student.kwargs.hidden=8", "roles.student.kwargs.hidden=((8,),)",
        "roles.student.kwargs.hidden=(True,)", "roles.student.kwargs.hidden=(None,)",
        "roles.student.kwargs.num_classes=3", "roles.student.kwargs.dropout=nan",
        "precision=float16", "mesh.data=0", "mesh.data=3", "mesh.cpu_devices=-1", "mesh.model=2",
        "eval.batch_size=0", "log.every_steps=0", "watch.spike=nan", "watch.stall_seconds=nan",
        "watch.stall_seconds=-1", "checkpoint.keep=0", "optim.decay_mask=(('(', True),)",
        "optim.clip_norm=0", "optim.clip_norm=nan", "optim.weight_decay=nan",
        "optim.kwargs.momentum=nan", "optim.kwargs.momentum=1.5",
        "objective.kwargs.label_smoothing=1.5", "objective.kwargs.label_smoothing=nan",
        "objective.kwargs.label_smoothing=-0.1", "objective.kwargs.label_smoothing='x'",
        "objective.kwargs.label_smoothing=(0.1,)", "data.kwargs.n_train=0",
        "data.kwargs.n_train=-5", "data.kwargs.n_train=nan", "data.kwargs.n_train=1000000000000",
        "data.kwargs.image_size=0", "data.kwargs.channels=0", "data.kwargs.n_test=-1",
        "log.grad_norm=maybe", "eval.metric=held_out/", "eval.metric=/accuracy",
        "eval.metric=held_out/nothing", "eval.metric=held_out/ACCURACY",
        "eval.metric=test/accuracy", "eval.mode=min",
        "data.transform_kwargs.normalize.std=(0.0,)",
        "data.transform_kwargs.normalize.std=(nan,)",
        "data.transform_kwargs.normalize.mean=(0.5,0.5)", "data.views=-1", "cache.top_k=-1",
        "optim.schedule=cosinus", "optim.name=SGD", "data.resident=maybe",
        "evaluators.classification.nothing=1", "study.metric=accuracy",
    ]  # fmt: skip
    says = {
        "optim.kwargs.momentum": ("momentum",),
        "mesh.data": ("mesh", "batch"),
        "mesh.model": ("mesh", "device"),
    }
    for text in wrong:
        key, _, value = text.partition("=")
        name = "".join(c if c.isalnum() else "_" for c in f"{key.rpartition('.')[2]}={value}")[:36]
        fragments = says.get(key, (key, key.rpartition(".")[2], key.rpartition(".")[0] or key))
        case(
            f"d-{key.split('.')[0]}-{name}",
            f"--config.{text}",
            refused(f"--config.{text}", says=fragments),
        )
    right = [
        ("fullwidth", "batch_size=\uff11\uff16", "trains|refused", "clean"),
        ("seed-largest", "seed=4294967295", "trains", ""),
        ("spaces", "batch_size= 16 ", "trains|refused", "clean"),
        ("exponent", "optim.lr=5e-2", "trains", "clean"),
        ("integer-for-float", "roles.student.kwargs.dropout=0", "trains", "clean"),
        ("no-hidden", "roles.student.kwargs.hidden=()", "trains", ""),
        ("tuple-without-brackets", "roles.student.kwargs.hidden=8,", "trains", "clean"),
        ("case-of-none", "optim.clip_norm=None", "trains", "clean"),
        ("larger-evaluation", "eval.batch_size=1000000", "trains", "clean"),
    ]
    for name, text, out, equal in right:
        case(
            f"d-right-{name}",
            f"--config.{text}",
            train(
                f"--config.{text}",
                out=out,
                equal=equal,
                says=(text.split("=")[0],) if "refused" in out else (),
            ),
        )
    case(
        "d-two-units",
        "a length by its unit, as in earlier versions",
        refused("--config.total.epochs=9", says=("total", '--config.total="9 epochs"')),
    )
    case(
        "d-flag-twice",
        "one key twice",
        train(
            "--config.seed=1",
            "--config.seed=0",
            out="trains|refused",
            equal="clean",
            says=("seed",),
        ),
    )
    case(
        "d-kd-temperature-zero",
        "a temperature of 0",
        refused(
            "--config.objective.kwargs.temperature=0", config="tiny.py:kd", says=("temperature",)
        ),
        start="teacher",
    )
    case(
        "d-kd-temperature-nan",
        "a temperature that is NaN",
        refused(
            "--config.objective.kwargs.temperature=nan", config="tiny.py:kd", says=("temperature",)
        ),
        start="teacher",
    )
    case(
        "d-kd-alpha-nan",
        "a weight that is NaN",
        refused("--config.objective.kwargs.alpha=nan", config="tiny.py:kd", says=("alpha",)),
        start="teacher",
    )
    case(
        "d-kd-alpha-inf",
        "a weight that is infinite",
        refused("--config.objective.kwargs.alpha=inf", config="tiny.py:kd", says=("alpha",)),
        start="teacher",
    )
    case(
        "d-ema-nan",
        "a decay that is NaN",
        refused(
            "--config.roles.teacher.init=none",
            "--config.roles.teacher.frozen=false",
            "--config.roles.teacher.ema_of=student",
            "--config.roles.teacher.decay=nan",
            config="tiny.py:kd",
            says=("decay",),
        ),
    )


# e: data on the command line.


def _header(shape: str, descr: str = "'|u1'", more: str = "") -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, {more}}}"
    text = text + " " * (-(len(text) + 11) % 64) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()


def _npy(array: np.ndarray) -> bytes:
    import io

    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


class _Pickled:
    """Touches a canary when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch CANARY",)


def _data() -> None:
    def arrays_case(name, about, change, out="refused", says=(), kind="uint8", equal="") -> None:
        def write(box: Box) -> None:
            found = arrays(kind)
            found = change(found) or found
            box.npz("data.npz" if kind == "uint8" else "float.npz", **found)

        config = "tiny.py:npz" if kind == "uint8" else "tiny.py:float"
        file = "data.npz" if kind == "uint8" else "float.npz"
        case(
            f"e-{name}",
            about,
            write,
            train(config=config, out=out, says=says or (file, "data"), equal=equal),
        )

    def each(key, change):
        return lambda a: {k: change(v) if k[0] in key else v for k, v in a.items()}

    big = each("x", lambda v: v.astype(">f4"))
    arrays_case("big-endian", "big-endian features", big, "trains", kind="float", equal="float")
    arrays_case(
        "big-endian-labels",
        "big-endian labels",
        each("y", lambda v: v.astype(">i8")),
        "trains",
        equal="npz",
    )
    arrays_case("fortran", "Fortran order", each("x", np.asfortranarray), "trains", equal="npz")
    arrays_case(
        "strided",
        "reversed twice, with strides",
        each("x", lambda v: v[::-1][::-1]),
        "trains",
        equal="npz",
    )
    arrays_case(
        "float64",
        "features of 64 bits",
        each("x", lambda v: v.astype(np.float64)),
        "trains",
        kind="float",
        equal="float",
    )
    arrays_case(
        "float16",
        "features of 16 bits",
        each("x", lambda v: v.astype(np.float16)),
        "trains",
        kind="float",
    )
    arrays_case(
        "uint8-labels",
        "labels of 8 bits",
        each("y", lambda v: v.astype(np.uint8)),
        "trains",
        equal="npz",
    )
    arrays_case(
        "uint64-labels",
        "labels of 64 bits without sign",
        each("y", lambda v: v.astype(np.uint64)),
        "trains",
        equal="npz",
    )
    arrays_case(
        "three-axes",
        "images without a channel axis",
        each("x", lambda v: v[..., 0]),
        "trains",
        equal="npz",
    )
    arrays_case(
        "extra-keys",
        "arrays of other names beside",
        lambda a: a | {"notes": np.array("hello"), "x_val": np.zeros(3)},
        "trains",
        equal="npz",
    )
    for dtype in ("uint16", "int8", "int32", "complex64", "bool"):
        arrays_case(
            f"x-{dtype}",
            f"inputs of {dtype}",
            each("x", lambda v, d=dtype: v.astype(d)),
            says=(dtype, "uint8"),
        )
    arrays_case(
        "x-dates",
        "inputs that are dates",
        each("x", lambda v: v.astype("datetime64[s]")),
        says=("datetime", "uint8"),
    )
    arrays_case(
        "x-text",
        "inputs that are text",
        each("x", lambda v: v.astype("U3")),
        says=("U3", "str", "uint8"),
    )
    arrays_case(
        "x-records",
        "inputs that are records",
        each("x", lambda v: v.view([("r", "u1")])),
        says=("inputs", "uint8"),
    )
    arrays_case(
        "x-object",
        "inputs that are pickled objects",
        each("x", lambda v: np.array([_Pickled()] * len(v), object)),
        says=("pickle", "object"),
    )
    arrays_case(
        "y-object",
        "labels that are pickled objects",
        each("y", lambda v: np.array([_Pickled()] * len(v), object)),
        says=("pickle", "object"),
    )
    arrays_case(
        "extra-object",
        "a pickled object in an array that nobody reads",
        lambda a: a | {"extra": np.array([_Pickled()], object)},
        "trains|refused",
        says=("pickle", "object"),
        equal="npz",
    )
    arrays_case("y-column", "labels [n, 1]", each("y", lambda v: v[:, None]), says=("labels",))
    arrays_case(
        "y-one-hot",
        "one-hot labels",
        each("y", lambda v: np.eye(4, dtype=int)[v]),
        says=("labels",),
    )
    arrays_case(
        "y-text", "labels that are text", each("y", lambda v: v.astype("U3")), says=("labels",)
    )
    arrays_case(
        "y-bool",
        "labels that are booleans",
        each("y", lambda v: v > 1),
        "refused|trains",
        says=("labels",),
    )
    arrays_case(
        "y-unlabelled",
        "labels of -1 for unlabelled images",
        lambda a: a | {"y_train": np.where(np.arange(96) < 9, -1, a["y_train"])},
        says=("-1", "negative"),
    )
    arrays_case(
        "y-gap",
        "labels 0, 1, 2 and 9",
        each("y", lambda v: np.where(v == 3, 9, v)),
        "refused|warned",
        says=("label", "class"),
    )
    arrays_case(
        "y-ignore",
        "labels of 255 where nothing is known",
        lambda a: a | {"y_train": np.where(np.arange(96) < 9, 255, a["y_train"])},
        "refused|warned",
        says=("label", "class"),
    )
    arrays_case(
        "y-overflow",
        "a label of 2**63",
        lambda a: (
            a
            | {
                "y_train": np.where(
                    np.arange(96) == 5, np.uint64(2**63), a["y_train"].astype(np.uint64)
                )
            }
        ),
        says=("label",),
    )
    arrays_case(
        "y-constant",
        "one class alone",
        each("y", lambda v: v * 0),
        "refused|warned",
        says=("class", "label"),
    )
    arrays_case(
        "x-inf",
        "an infinite feature",
        lambda a: (
            a
            | {"x_train": np.where(np.arange(96 * 12).reshape(96, 12) == 77, np.inf, a["x_train"])}
        ),
        kind="float",
        says=("finite", "inf"),
    )
    arrays_case(
        "x-column-nan",
        "a column that is NaN throughout, as of an empty field",
        each("x", lambda v: np.where(np.arange(12) == 3, np.nan, v)),
        kind="float",
        says=("finite", "nan"),
    )
    arrays_case(
        "x-overflow",
        "features beyond float32",
        each("x", lambda v: v.astype(np.float64) * 1e300),
        kind="float",
        says=("finite", "range", "float32", "large", "overflow"),
    )
    arrays_case(
        "x-huge",
        "features of 1e30",
        each("x", lambda v: v * np.float32(1e30)),
        "refused|nonfinite|warned",
        kind="float",
        says=("finite", "range", "large", "scale"),
    )
    arrays_case(
        "x-constant",
        "images that are all alike",
        each("x", lambda v: v * 0 + 7),
        "refused|warned|trains",
    )
    arrays_case(
        "shape-1d",
        "inputs [n]",
        each("x", lambda v: v[:, 0, 0, 0].astype(np.float32)),
        "refused|trains",
        says=("inputs", "shape", "[n"),
    )
    arrays_case(
        "shape-empty",
        "inputs [n, 0]",
        each("x", lambda v: v[:, :0]),
        kind="float",
        says=("empty", "shape", "0"),
    )
    arrays_case(
        "shape-flat-image",
        "images of height 0",
        each("x", lambda v: v[:, :0]),
        says=("empty", "shape", "0"),
    )
    arrays_case(
        "none",
        "no example",
        lambda a: {k: v[:0] for k, v in a.items()},
        says=("no examples", "empty"),
    )
    arrays_case(
        "one",
        "a single example",
        lambda a: {k: v[:1] for k, v in a.items()},
        says=("example", "held", "class"),
    )
    arrays_case(
        "no-test",
        "an empty test part",
        lambda a: a | {"x_test": a["x_test"][:0], "y_test": a["y_test"][:0]},
        says=("no examples", "empty", "test"),
    )
    arrays_case(
        "lengths",
        "a label too few",
        lambda a: a | {"y_train": a["y_train"][:-1]},
        says=("95", "labels"),
    )
    arrays_case(
        "missing",
        "no test labels",
        lambda a: {k: v for k, v in a.items() if k != "y_test"},
        says=("y_test",),
    )
    arrays_case(
        "capital",
        "keys in capitals",
        lambda a: {k.upper(): v for k, v in a.items()},
        says=("x_train",),
    )
    arrays_case(
        "scalar",
        "an array without axes",
        lambda a: a | {"x_train": np.float32(3)},
        says=("x_train", "inputs", "shape"),
    )

    def file(name, about, write, out="refused", says=("data.npz",), equal="", config="tiny.py:npz"):
        case(f"e-file-{name}", about, write, train(config=config, out=out, says=says, equal=equal))

    members = lambda: {f"{k}.npy": _npy(v) for k, v in arrays().items()}  # noqa: E731
    file("empty", "a file of no bytes", lambda box: box.write("data.npz", b""))
    file(
        "npy",
        "a single array in place of an archive",
        lambda box: box.write("data.npz", _npy(arrays()["x_train"])),
    )
    file("text", "text in place of an archive", lambda box: box.write("data.npz", "x,y\n1,2\n"))
    file(
        "pickle",
        "a pickle in place of an archive",
        lambda box: box.write("data.npz", __import__("pickle").dumps(_Pickled())),
    )
    file("truncated", "an archive that was cut off", lambda box: box.truncate("data.npz", 0.7))
    file(
        "crc",
        "an archive with a wrong checksum",
        lambda box: box.write(
            "data.npz",
            (box / "data.npz")
            .read_bytes()
            .replace(arrays()["x_train"].tobytes()[:64], bytes(64), 1),
        ),
    )
    file(
        "header-code",
        "a header that is code",
        lambda box: box.zipped(
            "data.npz",
            members() | {"x_train.npy": _header("(96, __import__('os').system('touch CANARY'))")},
        ),
    )
    file(
        "header-huge",
        "a header of 10**13 images",
        lambda box: box.zipped(
            "data.npz",
            members()
            | {"x_train.npy": _header("(10**13, 8, 8, 1)".replace("10**13", str(10**13)))},
        ),
    )
    file(
        "header-negative",
        "a header of -1 images",
        lambda box: box.zipped(
            "data.npz", members() | {"x_train.npy": _header("(-1, 8, 8, 1)") + bytes(64)}
        ),
    )
    file(
        "header-long",
        "a header of nested brackets",
        lambda box: box.zipped(
            "data.npz", members() | {"x_train.npy": _header("(" * 9000 + ")" * 9000)}
        ),
    )
    file(
        "traversal",
        "a member that names a path outside",
        lambda box: box.zipped("data.npz", members() | {"../CANARY.npy": _npy(np.zeros(1))}),
        "trains|refused",
        equal="npz",
    )
    file(
        "bomb",
        "300 MB of zeros in 300 KB, with 96 labels",
        lambda box: box.zipped(
            "data.npz",
            members() | {"x_train.npy": _header("(4687500, 8, 8, 1)") + bytes(300_000_000)},
            compression=8,
        ),
        says=("labels",),
    )
    file(
        "twice",
        "a member that is there twice",
        lambda box: box.write("data.npz", _twice(members())),
        "trains|refused",
        equal="npz",
    )

    def folder(name, about, change, out="refused", says=("data",), equal="npz"):
        def write(box: Box) -> None:
            for key, content in members().items():
                box.write(f"data/{key}", content)
            change(box)

        file(
            f"folder-{name}",
            about,
            write,
            out,
            says,
            equal if "trains" in out else "",
            "tiny.py:folder",
        )

    folder("plain", "a folder of arrays", lambda box: None, "trains")
    folder(
        "notes",
        "a folder with somebody's notes beside",
        lambda box: (box.foreign("data/notes.txt"), box.foreign("data/.DS_Store")),
        "trains",
    )
    folder(
        "broken-beside",
        "a broken array of another name beside",
        lambda box: box.write("data/old.npy", b"\x93NUMPY"),
        "trains|refused",
        ("old.npy", "data"),
    )
    folder(
        "pickle-beside",
        "a pickled array of another name beside",
        lambda box: box.write("data/other.npy", __import__("pickle").dumps(_Pickled())),
        "trains|refused",
        ("other.npy", "data"),
    )
    folder(
        "folder-for-file",
        "a folder in place of an array",
        lambda box: ((box / "data/x_train.npy").unlink(), (box / "data/x_train.npy").mkdir()),
        says=("x_train",),
    )
    folder(
        "cut",
        "an array that was cut off",
        lambda box: box.truncate("data/x_train.npy", 0.5),
        says=("x_train", "data"),
    )

    def idx(name, about, change, out="refused", says=("idx",), equal=""):
        def write(box: Box) -> None:
            a = arrays()
            names = (
                "train-images-idx3",
                "train-labels-idx1",
                "t10k-images-idx3",
                "t10k-labels-idx1",
            )
            for stem, v in zip(names, a.values(), strict=True):
                v = v[..., 0] if v.ndim == 4 else v
                head = bytes([0, 0, 8, v.ndim]) + np.array(v.shape, ">u4").tobytes()
                box.write(f"idx/{stem}-ubyte", head + v.astype(np.uint8).tobytes())
            change(box)

        case(
            f"e-idx-{name}",
            about,
            write,
            train(config="tiny.py:idx", out=out, says=says, equal=equal),
        )

    idx("plain", "a folder in MNIST's layout", lambda box: None, "trains", equal="npz")
    idx(
        "rank",
        "a header of rank 255",
        lambda box: box.write("idx/train-images-idx3-ubyte", bytes([0, 0, 8, 255]) + bytes(40)),
    )
    idx(
        "overflow",
        "a header whose product overflows 64 bits",
        lambda box: box.write(
            "idx/train-images-idx3-ubyte", bytes([0, 0, 8, 3]) + b"\xff" * 12 + bytes(64)
        ),
    )
    idx(
        "gzip-garbage",
        "a file named .gz that is none",
        lambda box: (
            (box / "idx/train-labels-idx1-ubyte").unlink(),
            box.write("idx/train-labels-idx1-ubyte.gz", "no gzip"),
        ),
    )
    idx(
        "swapped",
        "labels and images exchanged",
        lambda box: (
            os.rename(box / "idx/train-labels-idx1-ubyte", box / "x"),
            os.rename(box / "idx/train-images-idx3-ubyte", box / "idx/train-labels-idx1-ubyte"),
            os.rename(box / "x", box / "idx/train-images-idx3-ubyte"),
        ),
        says=("labels", "idx"),
    )
    for name, classes, out in (
        ("too-few", "('a','b','c')", "refused"),
        ("too-many", "('a','b','c','d','e')", "refused|warned"),
        ("twice", "('a','a','b','c')", "refused|warned"),
        ("numbers", "(1,2,3,4)", "refused|trains|warned"),
    ):
        case(
            f"e-classes-{name}",
            f"class names {classes} for four labels",
            train(
                f"--config.data.kwargs.classes={classes}",
                config="tiny.py:npz",
                out=out,
                says=("class",),
            ),
        )
    case(
        "e-classes-markup",
        "class names that are markup",
        train(
            "--config.data.kwargs.classes=('<img src=x onerror=alert(1)>','b','c','d')",
            config="tiny.py:npz",
            without=("runs/a/report.html", "<img src=x"),
        ),
    )


def _twice(members) -> bytes:
    import io
    import warnings
    import zipfile

    buffer = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w") as archive:
        warnings.simplefilter("ignore")
        for name, content in [*members.items(), *members.items()]:
            archive.writestr(name, content)
    return buffer.getvalue()


# f: resume and concurrency.


def _resume() -> None:
    def half(name, about, *steps, start="half", **kw) -> None:
        again = kw or {"out": "resumes", "equal": "clean"}
        case(f"f-{name}", about, *steps, train(**again), start=start)

    half("same", "the same command after SIGKILL")
    half("twice", "killed again, then the same command", train(hook="die", out="interrupted"))
    case(
        "f-finished",
        "a finished run once more",
        train(out="finished", equal="clean"),
        start="clean",
    )
    for name, flag, says in (
        ("seed", "--config.seed=3", "seed"),
        ("lr", "--config.optim.lr=0.06", "optim.lr"),
        ("steps", "--config.total=12", "total"),
        ("metric", "--config.eval.metric=held_out/macro_f1", "eval.metric"),
        ("decay", "--config.optim.weight_decay=0.001", "weight_decay"),
        ("network", "--config.roles.student.kwargs.hidden=(16,)", "hidden"),
    ):
        for start in ("half", "clean"):
            case(
                f"f-changed-{name}-{start}",
                f"another {name} for a {start} run",
                refused(flag, says=(says,)),
                train(out="resumes" if start == "half" else "finished", equal="clean"),
                start=start,
            )
    for name, flag in (
        ("log", "--config.log.every_steps=2"),
        ("keep", "--config.checkpoint.keep=3"),
        ("stall", "--config.watch.stall_seconds=100"),
        ("batch", "--config.eval.batch_size=16"),
    ):
        case(
            f"f-neutral-{name}",
            f"{flag} when a run goes on",
            train(flag, out="resumes", equal="" if name == "batch" else "clean"),
            start="half",
        )
    half(
        "config-renamed",
        "the config file has another name",
        lambda box: os.rename(box / "tiny.py", box / "other.py"),
        config="other.py",
        out="resumes",
        equal="clean",
    )
    case(
        "f-copied",
        "a copy of a run folder goes on",
        lambda box: __import__("shutil").copytree(box / "runs/a", box / "runs/b"),
        train(workdir="runs/b", out="resumes", equal="clean"),
        start="half",
    )
    case(
        "f-moved",
        "a run folder that was moved goes on",
        lambda box: os.rename(box / "runs/a", box / "moved"),
        train(workdir="moved", out="resumes", equal="clean"),
        start="half",
    )
    for file, out in (
        ("env.json", "resumes"),
        ("heartbeat.json", "resumes"),
        ("metrics.jsonl", "resumes|refused"),
    ):
        half(
            f"without-{file.partition('.')[0]}",
            f"{file} is gone",
            lambda box, file=file: (
                box.remove(f"runs/a/{file}") if (box / "runs/a" / file).exists() else None
            ),
            out=out,
            says=(file,) if "refused" in out else (),
            equal="clean" if file != "metrics.jsonl" else "",
        )
    half(
        "without-checkpoints",
        "the folder of checkpoints is gone",
        lambda box: box.remove("runs/a/checkpoints"),
        out="trains|refused",
        equal="clean",
        says=("checkpoint",),
    )
    for file in ("result.json", "report.html", "predictions.npz"):
        case(
            f"f-finished-without-{file.partition('.')[0]}",
            f"a finished run without {file}",
            lambda box, file=file: box.remove(f"runs/a/{file}"),
            train(out="finished|resumes", equal="clean"),
            start="clean",
        )

    def data(name, about, change, out="refused", says=("data", "sha256", "checksum"), **kw):
        for mode in ("resume", "eval"):
            right = out if mode == "resume" else out.replace("resumes", "evaluates")
            run = (
                train(config="tiny.py:npz", out=right, says=says, equal=kw.get("equal", ""))
                if mode == "resume"
                else evaluate(out=right, says=says, equal=kw.get("equal", ""))
            )
            start = "npz_half" if mode == "resume" else "npz"
            case(f"f-data-{name}-{mode}", f"{about}, then {mode}", change, run, start=start)

    def again(change):
        return lambda box: box.npz("data.npz", **change(arrays()))

    def bit(a):
        x = a["x_train"].copy()
        x[5, 2, 2, 0] ^= 1
        return a | {"x_train": x}

    data("bit", "one bit of one training image is another", again(bit))
    data(
        "test-label",
        "one test label is another",
        again(lambda a: a | {"y_test": (a["y_test"] + (np.arange(32) == 3)) % 4}),
    )
    data(
        "order",
        "training examples in another order",
        again(lambda a: a | {"x_train": a["x_train"][::-1], "y_train": a["y_train"][::-1]}),
    )
    data(
        "appended",
        "eight examples more",
        again(
            lambda a: (
                a
                | {
                    "x_train": np.concatenate([a["x_train"], a["x_train"][:8]]),
                    "y_train": np.concatenate([a["y_train"], a["y_train"][:8]]),
                }
            )
        ),
    )
    data("gone", "the data are gone", lambda box: box.remove("data.npz"), says=("data.npz",))
    data(
        "touched",
        "the file has another time",
        lambda box: os.utime(box / "data.npz", (1, 1)),
        out="resumes",
        says=(),
        equal="npz",
    )
    data(
        "compressed",
        "the same arrays in another archive",
        lambda box: np.savez_compressed(box / "data.npz", allow_pickle=False, **arrays()),
        out="resumes|refused",
        equal="npz",
    )

    def teacher(name, about, *change, out="refused", says=("teacher",), equal="", **kw):
        case(
            f"f-teacher-{name}",
            about,
            *change,
            train(config="tiny.py:kd", out=out, says=says, equal=equal, **kw),
            start="kd_half",
        )

    other = lambda box: box.remove("teacher")  # noqa: E731
    teacher("seed", "the teacher was trained again with another seed", other, _teacher(seed=8))
    teacher(
        "same",
        "the teacher was trained again, equally",
        other,
        _teacher(),
        out="resumes|refused",
        equal="kd",
    )
    teacher(
        "best-gone",
        "the teacher's best step was removed",
        lambda box: box.remove(f"teacher/checkpoints/{_best(box)}"),
    )
    teacher("gone", "the teacher is gone", other)
    teacher(
        "more",
        "a file more in the teacher's folder",
        lambda box: box.write("teacher/notes.txt", "x"),
        out="resumes",
        says=(),
        equal="kd",
    )
    teacher(
        "link",
        "the teacher is a link now, to the same",
        lambda box: (os.rename(box / "teacher", box / "real"), box.link("teacher", "real")),
        out="resumes|refused",
        equal="kd",
    )
    case(
        "f-cache-chunk-gone",
        "a chunk of stored answers is gone",
        lambda box: [
            box.remove(f"cache/teacher/{p}")
            for p in os.listdir(box / "cache/teacher")
            if p != "key.json"
        ][:1],
        train(config="tiny.py:kd,cached", out="resumes", equal="cached", writes=("cache",)),
        start="cached_half",
    )
    case(
        "f-cache-other-teacher",
        "another teacher with the stored answers of the first",
        other,
        _teacher(seed=8),
        train(
            config="tiny.py:kd,cached",
            workdir="runs/b",
            out="refused",
            says=("cache", "teacher"),
            writes=("cache",),
        ),
        start="cached",
    )
    case(
        "f-devices",
        "two devices when a run of one goes on",
        train("--config.mesh.cpu_devices=2", out="warned|refused", says=("device",)),
        start="half",
    )

    # Two at a time.
    case(
        "f-two-configs",
        "another config in the folder of a run that goes on",
        Start(train(hook="hold", equal="clean")),
        refused("--config.seed=5", says=("another", "in use", "running", "lock")),
        Join(),
    )
    case(
        "f-eval-meanwhile",
        "an evaluation of a run that goes on",
        Start(train(hook="hold", equal="clean")),
        evaluate(out="evaluates|refused", says=("checkpoint", "running", "in use", "lock")),
        Join(),
    )
    case(
        "f-describe-meanwhile",
        "a description of a run that goes on",
        Start(train(hook="hold", equal="clean")),
        plain("--mode=describe", "--config=tiny.py", out="describes"),
        Join(),
    )
    case(
        "f-copy-meanwhile",
        "a copy of a run that goes on is another run",
        Start(train(hook="hold", equal="clean", writes=("runs/b",))),
        lambda box: __import__("shutil").copytree(box / "runs/a", box / "runs/b"),
        train(workdir="runs/b", out="trains|resumes", equal="clean"),
        Join(),
    )
    case(
        "f-two-spellings",
        "the same folder by another path while it is in use",
        lambda box: box.link("link", "runs"),
        Start(train(hook="hold", equal="clean")),
        refused(workdir="link/a", own="runs/a", says=("in use", "running", "lock", "process")),
        Join(),
    )
    case(
        "f-study-twice",
        "a study twice at a time",
        Start(study(hook="hold")),
        study(out="refused", says=("in use", "running", "lock", "process")),
        Join(),
    )
    case(
        "f-arm-meanwhile",
        "an arm of a study that goes on, by itself",
        Start(study(hook="hold")),
        refused(
            workdir="runs/s/alone/seed0",
            own="runs/s",
            says=("in use", "running", "lock", "process", "study"),
        ),
        Join(),
    )


# g: modes and flags.


def _modes() -> None:
    def wrong(name, about, run, *, start="empty", before=()):
        case(f"g-{name}", about, *before, run, start=start)

    wrong(
        "eval-empty",
        "evaluation of an empty folder",
        evaluate(out="refused", says=("config", "checkpoint")),
        before=(lambda box: (box / "runs/a").mkdir(parents=True),),
    )
    wrong("eval-absent", "evaluation of no folder", evaluate(out="refused", says=("exist",)))
    wrong(
        "eval-study",
        "evaluation of a study",
        evaluate(workdir="runs/s", out="refused", says=("config", "study")),
        start="study",
    )
    wrong(
        "eval-checkpoint",
        "evaluation of one checkpoint",
        evaluate(
            workdir="runs/a/checkpoints/9",
            own="runs/a",
            out="refused",
            says=("config", "run"),
            untouched=True,
        ),
        start="clean",
    )
    wrong(
        "eval-other-config",
        "evaluation with the config of another run",
        evaluate("--config=tiny.py:npz", out="refused", says=("data",), untouched=True),
        start="clean",
    )
    wrong(
        "eval-other-network",
        "evaluation with another network",
        evaluate(
            "--config.roles.student.kwargs.hidden=(16,)",
            out="refused",
            says=("hidden",),
            untouched=True,
        ),
        start="clean",
    )
    wrong("eval-half", "evaluation of a run that was broken off", evaluate(), start="half")
    wrong("eval-finished", "evaluation of a finished run", evaluate(equal="clean"), start="clean")
    wrong(
        "eval-batch",
        "evaluation in other batches",
        evaluate("--config.eval.batch_size=7", equal="clean"),
        start="clean",
    )
    wrong(
        "eval-twice",
        "evaluation with the mode given twice",
        evaluate("--mode=eval", out="evaluates|refused", says=("mode",), equal="clean"),
        start="clean",
    )
    wrong(
        "train-no-config",
        "training without a config",
        plain("--workdir=runs/a", out="refused", says=("config",)),
    )
    wrong(
        "train-no-workdir",
        "training without a workdir",
        plain("--config=tiny.py", out="refused", says=("workdir",)),
    )
    wrong(
        "train-in-study",
        "training in the folder of a study",
        refused(workdir="runs/s", out="refused", says=("study",), untouched=True),
        start="study",
    )
    wrong(
        "study-in-run",
        "a study in the folder of a run",
        study(workdir="runs/a", out="refused", says=("run",), untouched=True),
        start="clean",
    )
    wrong(
        "study-none",
        "a study of a config that defines none",
        study(config="tiny.py", out="refused", says=("study",)),
    )
    wrong("nothing", "no flag", plain(out="refused", says=("config", "workdir")))
    wrong(
        "empty-flag",
        "an empty argument",
        plain("", "--config=tiny.py", out="refused", says=("flag", "config", "workdir")),
    )
    wrong("mode-capital", "a mode in capitals", refused("--mode=Train", says=("train",)))
    wrong("mode-empty", "an empty mode", refused("--mode=", says=("mode",)))
    wrong("workdir-empty", "an empty workdir", refused(workdir="", own="runs/a", says=("workdir",)))
    wrong("help", "help beside other flags", plain("--mode=eval", "--help", out="helps"))
    wrong(
        "help-odd",
        "help beside flags that do not exist",
        plain("--nonsense", "--help", out="helps|refused"),
    )
    wrong(
        "describe", "a description", plain("--mode=describe", "--config=tiny.py", out="describes")
    )
    wrong(
        "describe-absent",
        "a description of data that are absent",
        plain(
            "--mode=describe",
            "--config=tiny.py:npz",
            "--config.data.kwargs.path=nowhere.npz",
            out="describes|refused",
            says=("nowhere.npz",),
        ),
    )
    wrong(
        "processes-alone",
        "a number of processes alone",
        refused("--num_processes=2", says=("coordinator",)),
    )
    wrong(
        "processes-range",
        "a process beyond their number",
        refused(
            "--num_processes=2", "--process_id=5", "--coordinator=localhost:1", says=("process",)
        ),
    )
    wrong("processes-zero", "no processes", refused("--num_processes=0", says=("process",)))
    for name, arm in (
        ("dots", ".."),
        ("dot", "."),
        ("report", "report.html"),
        ("file", "study.json"),
        ("table", "table.txt"),
    ):
        text = TINY.replace('"smooth"', f'"{arm}"')
        wrong(
            f"arm-{name}",
            f"an arm named {arm!r}",
            study(config="odd.py:study", out="refused", says=("arm", arm)),
            before=(lambda box, text=text: box.write("odd.py", text),),
        )
    arms = {
        "circle": (
            '{"alone": {"roles": {"student": {"init": "arm:b"}}}, "b": {"roles": '
            '{"student": {"init": "arm:alone"}}}}',
            ("circle",),
        ),
        "itself": (
            '{"alone": {"roles": {"student": {"init": "arm:alone"}}}, "b": {}}',
            ("circle", "itself"),
        ),
        "absent": (
            '{"alone": {}, "b": {"roles": {"student": {"init": "arm:nobody"}}}}',
            ("nobody",),
        ),
        "typo": ('{"alone": {}, "b": {"optim": {"learning_rate": 0.1}}}', ("learning_rate",)),
        "value": ('{"alone": {}, "b": {"optim": {"lr": "fast"}}}', ("optim.lr",)),
        "equal-case": ('{"alone": {}, "Alone": {"optim": {"lr": 0.1}}}', ()),
    }
    for name, (value, says) in arms.items():
        text = TINY.replace(
            "config.study.seeds =", f"config.study.arms = {value}\n        config.study.seeds ="
        )
        wrong(
            f"arms-{name}",
            f"arms: {value[:60]}",
            study(
                config="odd.py:study",
                out="refused" if says else "studies|refused",
                says=says or ("arm",),
            ),
            before=(lambda box, text=text: box.write("odd.py", text),),
        )
    wrong("study-again", "a finished study once more", study(), start="study")
    wrong(
        "study-seed-more",
        "a finished study with a seed more",
        study("--config.study.seeds=0,1,2"),
        start="study",
    )
    wrong(
        "study-arm-changed",
        "a finished study whose arm is another now",
        study(config="odd.py:study", out="refused", says=("config", "smooth"), untouched=False),
        before=(
            lambda box: box.write(
                "odd.py", TINY.replace('"label_smoothing": 0.1', '"label_smoothing": 0.2')
            ),
        ),
        start="study",
    )


for _add in (_environment, _paths, _names, _values, _data, _resume, _modes):
    _add()
RANDOM = random.Random
