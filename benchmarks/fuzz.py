"""Random mistakes in configs and command lines: each runs, or exits 2 with one message.

  python benchmarks/fuzz.py [--cases=2000] [--seed=0] [--workers=2] [--only CASE ...]

A case is a shipped config, mostly its smoke form, and one to three mutations drawn from the seed
and the number of the case. It is run by `main` in a worker process that lives on; four of five of
the cases that build go as far as everything that precedes compilation, the fifth trains four steps.
A case that ends with another code or prints a traceback is a failure; so is one that does not end
within 20 seconds of a processor, unless it has taken its four steps by ten times as long: a large
network compiles for longer. These are listed. `--out=FILE` writes what was found as JSON.
"""

import argparse
import collections
import contextlib
import io
import json
import multiprocessing
import os
import pathlib
import random
import shutil
import sys
import tempfile
import time
import traceback

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

LIMIT, MOST = 20.0, 10
CONFIGS = sorted(
    str(p.relative_to(ROOT))
    for p in (ROOT / "configs").rglob("*.py")
    if "def get_config" in p.read_text("utf-8")
)
ODD = [
    *("", " ", "0", "-1", "1e309", "-inf", "nan", "none", "None", "true", "()", "(", "[1,", "{}"),
    *(
        "{'a': 1}",
        "1,2,3",
        "(1, 'a')",
        "a" * 300,
        "é",
        "\u202e",
        "💥",
        "../..",
        "/dev/null",
        "a\nb",
    ),
    *("1_000", "0x10", "1e-400", "99999999999999999999", "-0.0", "1j", "lambda: 0", "%s", "$HOME"),
    *("runs/no_such", "arm:x", "#", "os:system", "os.path:join", "builtins:print", ":", "a:b:c"),
    *("((('x', True),),)", "(('(', True),)", "True", "None,None", "3.5", "2", "1", "0.5", "-3"),
]
FLAGS = [
    *("--mode=trian", "--mode", "--workdir", "--workdir=", "--workdir=/dev/null/x", "--bogus=1"),
    *("--config", "--config=", "--config=nowhere.py", "positional", "--noconfig.optim.lr", "--"),
    *("--config.", "--config.=1", "--config..a=1", "--config.optim", "--num_processes=x", "-x"),
    *("--config.optim.lr.x=1", "--config.roles=1", "--config.roles.student=none", "--process_id=0"),
    *("--config.evaluators.nothing.x=1", "--config.evaluators.calibration.bins=0", "--config.é=1"),
]


def cases(seed: int, number: int) -> tuple[list[str], str, bool]:
    """Returns the flags of a case, a name of what it does, and whether it trains."""
    r = random.Random(f"{seed}/{number}")
    from distill_jax.run import config as config_lib
    from distill_jax.run import flags

    path = r.choice(CONFIGS)
    spec = f"{path}:smoke" if r.random() < 0.9 else path
    try:
        config = flags.load(str(ROOT / spec))
    except Exception:
        return [f"--config={spec}"], "as shipped", False
    flat = config_lib.flatten(config)
    leaves = [p for p in flat if not p.startswith("study.arms")]
    argv, kinds = [], []
    for _ in range(r.choice([1, 1, 1, 2, 3])):
        kind, made = mutation(r, flat, leaves)
        kinds.append(kind)
        argv += made
    head = [f"--config={spec}"]
    if r.random() < 0.03:
        head = r.choice(
            [[], [f"--config={spec}:x"], [f"--config={spec}"] * 2, ["--config=configs"]]
        )
        kinds.append("config")
    mode = r.choice(["train"] * 7 + ["describe", "eval", "study"])
    trains = r.random() < 0.2 and mode != "study" and "smoke" in spec
    return [*head, f"--mode={mode}", *argv], "+".join(sorted(set(kinds))), trains


def mutation(r: random.Random, flat, leaves: list[str]) -> tuple[str, list[str]]:
    def flag(path, value) -> list[str]:
        return [f"--config.{path}={value}"]

    def typo(text: str) -> str:
        i = r.randrange(len(text))
        return r.choice([text[:i] + text[i + 1 :], text[:i] + r.choice("aé_.0") + text[i:]])

    kind = r.choice(
        [
            *("odd value",) * 3,
            *("scaled number",) * 4,
            *("value of another key",) * 3,
            *("key", "duplicate", "unit", "role", "name", "transforms", "flag", "kwargs", "sane"),
        ]
    )
    path = r.choice(leaves)
    if kind == "odd value":
        return kind, flag(path, r.choice(ODD))
    if kind == "scaled number":
        numbers = [p for p in leaves if type(flat[p]) in (int, float)]
        path = r.choice(numbers)
        factor = r.choice([-1, 0, 0.5, 2, 10, 1e-6, 1e6, 1e12, -1e3])
        value = flat[path] * factor
        return kind, flag(path, int(value) if type(flat[path]) is int else value)
    if kind == "value of another key":
        return kind, flag(path, flat[r.choice(leaves)])
    if kind == "key":
        return kind, flag(typo(path), flat[path])
    if kind == "duplicate":
        return kind, flag(path, flat[path]) + flag(path, r.choice(ODD))
    if kind == "unit":
        group = r.choice(["total", "optim.warmup", "eval.every", "checkpoint.every"])
        unit = r.choice(["steps", "epochs", "examples", "percent", "days"])
        return kind, flag(f"{group}.{unit}", r.choice([0, 1, 5, 0.5, -2, 1e9, 200, "x"]))
    roles = sorted({p.split(".")[1] for p in leaves if p.startswith("roles.")})
    if kind == "role":
        role, other = r.choice(roles), r.choice([*roles, "student", "nobody"])
        key, value = r.choice(
            [
                *(("ema_of", other), ("frozen", "true"), ("frozen", "false"), ("init", other)),
                *(("init", "."), ("model", ""), ("model", "mlp"), ("decay", 2), ("model", "vit")),
                *(("init", "/"), ("init", "configs"), ("ema_of", role), ("model", "resnet")),
            ]
        )
        return kind, flag(f"roles.{role}.{key}", value)
    if kind == "name":
        from distill_jax.run.resolve import available

        where, package = r.choice(
            [
                *(("objective.name", "objectives"), ("weighting.name", "weighting")),
                *(("data.name", "data"), (f"roles.{r.choice(roles)}.model", "models")),
            ]
        )
        return kind, flag(
            where, r.choice([*available(package), typo(r.choice(available(package)))])
        )
    if kind == "transforms":
        names = ["normalize", "scale", "random_crop", "mixup", "cutmix", "views", "horizontal_flip"]
        names += ["random_erasing", "rotation", "downscale", "local_views", "nothing"]
        chosen = ",".join(r.sample(names, r.randint(0, 3)))
        return kind, flag(r.choice(["data.train_transforms", "data.eval_transforms"]), chosen)
    if kind == "flag":
        return kind, [r.choice(FLAGS)]
    if kind == "kwargs":
        groups = ["objective.kwargs", "weighting.kwargs", "data.kwargs", "data.corrupt"]
        groups += ["optim.kwargs", "optim.schedule_kwargs", f"roles.{r.choice(roles)}.kwargs"]
        keys = ["num_classes", "temperature", "widths", "momentum", "x", "n_train", "label_noise"]
        keys += ["image_size", "alpha", "weight", "features", "depth", "final", "channels", "seed"]
        values = [*ODD, "-5", "0", "1", "2", "7", "1000000", "'a'", "(1, 2)", "(0,)"]
        return kind, flag(f"{r.choice(groups)}.{r.choice(keys)}", r.choice(values))
    sane = {"optim.lr": 0.01, "log.every_steps": 2, "seed": 3, "eval.batch_size": 64}
    path = r.choice(sorted(sane))
    return "sane", flag(path, sane[path])


class _Enough(Exception):
    """Everything that precedes the first compilation went well."""


def run(seed: int, number: int, folder: pathlib.Path) -> dict:
    """Runs a case in this process."""
    from distill_jax import main
    from distill_jax.contrib import replicas
    from distill_jax.run import build
    from distill_jax.run.train.program import SingleRun

    argv, kinds, trains = cases(seed, number)
    workdir = folder / f"case{number}"
    flags = [*argv]
    if not any(a.startswith("--workdir") for a in argv):
        flags.insert(1, f"--workdir={workdir}")
    if trains:  # four steps of what the case left alone
        flags.append("--config.total=4")
        if any(name in argv[0] for name in ("kd.py", "kd_cached.py")):
            flags.insert(len(argv[:1]), f"--config.roles.teacher.init={folder / 'teacher'}")
    out, err = io.StringIO(), io.StringIO()
    saved = SingleRun.start, replicas.Replicas.start, build.compile_step

    def enough(*args, **kwargs):
        raise _Enough

    if not trains:
        SingleRun.start = replicas.Replicas.start = build.compile_step = enough
    began, busy = time.perf_counter(), time.process_time()
    code, outcome, detail = None, "", ""
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main.main(["distill-jax", *flags])
    except _Enough:
        outcome = "built"
    except SystemExit as exit:
        outcome, detail = "system exit", str(exit.code)
    except BaseException:
        outcome, detail = "traceback", traceback.format_exc()
    finally:
        SingleRun.start, replicas.Replicas.start, build.compile_step = saved
    seconds, busy = time.perf_counter() - began, time.process_time() - busy
    text = err.getvalue()
    if "_Enough" in text:
        outcome = "built"
    elif "Traceback" in text and code == 1:
        outcome, detail = "traceback", text
    elif code == 0:
        outcome = "ran"
    elif code == 2:
        one = [line[:7] for line in text.splitlines()].count("error: ") == 1
        outcome = "refused" if one and "Traceback" not in text else "not one message"
        detail = (
            text if outcome != "refused" else text.partition("error: ")[2].splitlines()[0][:150]
        )
    elif code == 3:
        outcome = "not finite"
    elif code is not None:
        outcome, detail = f"exit {code}", text
    shutil.rmtree(workdir, ignore_errors=True)
    return {
        "case": number,
        "argv": argv,
        "kinds": kinds,
        "outcome": outcome,
        "seconds": round(seconds, 2),
        "processor_seconds": round(busy, 2),
        "detail": detail[-1500:],
    }


def work(seed: int, asked, told) -> None:
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
    folder = pathlib.Path(tempfile.mkdtemp())
    os.chdir(ROOT)
    from distill_jax.run import processes

    processes.follow(os.getppid())  # where the program that asks is killed, this one ends too
    import jax

    jax.config.update("jax_num_cpu_devices", 1)
    from distill_jax import main

    teacher = ["--config=configs/distill/supervised.py:smoke", f"--workdir={folder / 'teacher'}"]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        main.main(["distill-jax", *teacher])
    while (number := asked.get()) is not None:
        told.put(("begins", time.process_time()))
        row = run(seed, number, folder)
        jax.clear_caches() if number % 40 == 0 else None
        told.put(("ends", row))
    shutil.rmtree(folder, ignore_errors=True)


def _busy(pid: int | None) -> float:
    """Returns the processor seconds of a process: others share the machine."""
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def fuzz(seed: int, numbers: list[int], workers: int, report) -> list[dict]:
    """Runs cases in workers; one that computes ten times too long is killed and replaced."""
    context = multiprocessing.get_context("spawn")
    rows: list[dict] = []
    left = collections.deque(numbers)

    class Worker:
        def __init__(self):
            self.asked, self.told = context.Queue(), context.Queue()
            self.process = context.Process(target=work, args=(seed, self.asked, self.told))
            self.process.start()
            self.number: int | None = None
            self.since = self.wall = 0.0

    crew, shown = [Worker() for _ in range(workers)], 0
    while left or any(w.number is not None for w in crew):
        for i, w in enumerate(crew):
            if w.number is None and left:
                w.number, w.since = left.popleft(), 0.0
                w.asked.put(w.number)
            while not w.told.empty():
                kind, what = w.told.get()
                if kind == "begins":
                    w.since, w.wall = what, time.time()
                else:
                    rows.append(what)
                    w.number, w.since = None, 0.0
            late = w.since and (
                _busy(w.process.pid) - w.since > MOST * LIMIT
                or time.time() - w.wall > 3 * MOST * LIMIT
            )
            if w.number is not None and (late or not w.process.is_alive()):
                what = "hang" if late else f"died ({w.process.exitcode})"
                w.process.kill()
                argv, kinds, _ = cases(seed, w.number)
                rows.append(
                    {
                        **{"case": w.number, "argv": argv, "kinds": kinds, "outcome": what},
                        **{
                            "seconds": MOST * LIMIT,
                            "processor_seconds": MOST * LIMIT,
                            "detail": "",
                        },
                    }
                )
                crew[i] = Worker()
        if len(rows) // 25 > shown:
            shown = len(rows) // 25
            print(len(rows), dict(collections.Counter(r["outcome"] for r in rows)), flush=True)
            report(rows)
        time.sleep(0.02)
    for w in crew:
        w.asked.put(None)
        w.process.join()
    return sorted(rows, key=lambda row: row["case"])


GOOD = ("refused", "built", "ran", "not finite", "system exit")
TRAINED = ("ran", "not finite")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", type=int, nargs="*")
    parser.add_argument("--out", default="")
    args = parser.parse_args()
    numbers = args.only or list(range(args.first, args.first + args.cases))

    def report(rows: list[dict]) -> None:
        if args.out:
            text = json.dumps(summary(args.seed, rows), indent=1)
            pathlib.Path(args.out).write_text(text + "\n")

    rows = fuzz(args.seed, numbers, args.workers, report)
    report(rows)
    result = summary(args.seed, rows)
    for row in result["failures"]:
        tail = row["detail"].strip().splitlines()
        print(row["case"], row["outcome"], row["argv"], "\n    ", "\n     ".join(tail[-8:]))
    print({k: v for k, v in result.items() if k not in ("failures", "kinds")})


def summary(seed: int, rows: list[dict]) -> dict:
    """Counts outcomes and lists failures; also of a part of the cases."""
    import jax

    slow = [row for row in rows if row["processor_seconds"] > LIMIT]
    keys = ("case", "argv", "outcome", "seconds", "processor_seconds")
    return {
        "jax": jax.__version__,
        "python": sys.version.split()[0],
        "seed": seed,
        "cases": len(rows),
        "outcomes": dict(collections.Counter(row["outcome"] for row in rows)),
        "failures": [
            row
            for row in rows
            if row["outcome"] not in GOOD or (row in slow and row["outcome"] not in TRAINED)
        ],
        "over_20_processor_seconds": [{k: row[k] for k in keys} for row in slow],
        "slowest_processor_seconds": max(row["processor_seconds"] for row in rows),
        "slowest_seconds": max(row["seconds"] for row in rows),
        "kinds": dict(collections.Counter(k for row in rows for k in row["kinds"].split("+"))),
    }


if __name__ == "__main__":
    main()
