"""Breaks off runs in six ways, continues them, and compares with runs that were left alone.

  python benchmarks/kills.py --kills=100 --out=benchmarks/results/kills.json

Kinds, drawn with a seed in equal numbers: SIGKILL; SIGTERM; a full disk (a file system of its own,
filled until some KiB are left; needs root); a file of a checkpoint cut off at a random length; one
random bit of such a file flipped; SIGKILL of one of two processes. The moment is a random step and
up to 0.3 s more, and for a part of the kills any moment from the start of the process. A run is
broken off up to four times, each time continued by the same command, and then runs to its end.

Equal means: every array of the last and of the selected checkpoint byte for byte, the selected
step, all rows of the log in their order and the result, times excepted. A refusal must be a message
without a traceback; the run is then continued as the message says.
"""

import argparse
import collections
import contextlib
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any

import _survival as survival

sys.path.insert(0, str(survival.ROOT / "launch"))
import local  # pyright: ignore[reportMissingImports]

STEPS, EVERY = 40, 7
TIMEOUT = 600
KINDS = ("SIGKILL", "SIGTERM", "disk_full", "truncated", "flipped", "one_of_two")
OFTEN = {"ema_teacher": 3, "ps_kd_table": 3, "crd_bank": 2, "kd_convnet": 1, "tgeo_bilevel": 1}
TWO = "ema_teacher"


class Case:
    """One run folder and the commands that were run in it."""

    def __init__(self, name, workdir, teacher):
        self.name, self.workdir, self.teacher = name, workdir, teacher
        self.codes, self.messages, self.texts = [], [], []
        self.told = 0  # messages that were acted on
        self.more = []  # flags of the next command alone

    def command(self):
        changes = {"total": STEPS, "checkpoint.every": EVERY, "mesh.cpu_devices": 1}
        args = survival.flags(self.name, self.workdir, teacher=self.teacher, changes=changes)
        args, self.more = [*args, *self.more], []
        return [sys.executable, "-m", "distill_jax.main", *args]

    def start(self, command=None):
        pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        environ = {**os.environ, "DISTILL_JAX_TIMEOUT": "90"}
        return subprocess.Popen(command or self.command(), cwd=survival.ROOT, env=environ, **pipe)

    def end(self, process):
        text, _ = process.communicate(timeout=TIMEOUT)
        self.texts.append(text)
        self.codes.append(process.returncode)
        if process.returncode not in (0, -signal.SIGKILL):
            lines = text.splitlines()
            first = next((i for i, line in enumerate(lines) if "error:" in line), -1)
            self.messages.append(" ".join(line.strip() for line in lines[first : first + 3])[:600])
        return process.returncode

    def reach(self, process, step, seconds):
        """Waits until the log has `step`, and `seconds` more, or the process has ended."""
        while process.poll() is None:
            if max((row["step"] for row in survival.rows(self.workdir)), default=0) >= step:
                time.sleep(seconds)
                return
            time.sleep(0.002)

    def run(self):
        """Runs the same command until it ends well or refuses."""
        for _ in range(3):
            if self.end(self.start()) in (0, 2):
                break
        return self.codes[-1]

    def run_two(self):
        args = self.command()[3:]
        launcher = [sys.executable, str(survival.ROOT / "launch" / "local.py")]
        return self.end(self.start([*launcher, "--processes=2", "--devices=1", "--", *args]))


def pick(draw, names):
    """A scenario, the cheaper ones more often."""
    names = sorted(names)
    return draw.choices(names, [OFTEN[name] for name in names])[0]


def moment(draw, case):
    """A step to wait for and seconds to wait after it; of some kills only seconds."""
    if draw.random() < 0.15:
        return 0, draw.uniform(0, 8)
    now = max((row["step"] for row in survival.rows(case.workdir)), default=0)
    return draw.randint(min(now + 1, STEPS), min(now + 20, STEPS)), draw.uniform(0, 0.3)


def signalled(case, facts, *, number):
    process = case.start()
    case.reach(process, facts["step"], facts["wait"])
    process.send_signal(number)
    case.end(process)


def disk_full(case, draw, facts):
    facts["left"] = left = draw.randrange(0, 120_000)
    process = case.start()
    case.reach(process, facts["step"], facts["wait"])
    fill = case.workdir / "filler"
    with contextlib.suppress(OSError), fill.open("wb", buffering=0) as file:
        while file.write(bytes(2**20)):
            pass
    os.truncate(fill, fill.stat().st_size - left)
    case.end(process)
    fill.unlink()


def damage(case, draw, facts, *, kind):
    folders = survival.step_folders(case.workdir)
    # Without its best state a run ends with another result, which says so.
    index = json.loads((case.workdir / "checkpoints" / "index.json").read_text())["saved"]
    measured = {int(step): metric for step, metric in index.items() if metric is not None}
    best = max(measured, key=lambda step: (measured[step], -step), default=None)
    others = [step for step in folders if step != best] or list(folders)
    step = max(folders) if draw.random() < 0.5 else draw.choice(others)
    files = [p for p in sorted(folders[step].rglob("*")) if p.is_file() and p.stat().st_size]
    path = draw.choice(files)
    data = bytearray(path.read_bytes())
    place = draw.randrange(len(data))
    if kind == "truncated":
        del data[place:]
    else:
        data[place] ^= 1 << draw.randrange(8)
    path.write_bytes(data)
    facts["file"] = str(path.relative_to(case.workdir / "checkpoints"))
    facts |= {"checkpoints": list(folders), "byte": place, "damaged_step": step}


def one_of_two(case, draw, facts):
    victim = draw.randrange(2)
    facts["killed"] = f"process {victim}"
    commands = local.commands(case.command()[3:], processes=2, devices=1, port=local.free_port())
    both = [case.start(command) for command in commands]
    texts = {}

    def read(i):
        texts[i] = both[i].communicate(timeout=TIMEOUT)[0]

    readers = [threading.Thread(target=read, args=(i,)) for i in range(2)]
    for reader in readers:
        reader.start()
    case.reach(both[0], facts["step"], facts["wait"])
    both[victim].kill()
    began = time.monotonic()
    readers[1 - victim].join(TIMEOUT)
    facts["other_ended_after_s"] = round(time.monotonic() - began, 2)
    readers[victim].join()
    other = both[1 - victim]
    case.codes.append(other.returncode)
    case.texts.append(texts[1 - victim])
    lines = texts[1 - victim].splitlines()
    signs = ("error: another process", "another task died", "did not meet all other processes")
    told = [line for line in lines if any(sign in line for sign in signs)]
    facts["other_told"] = bool(told) or other.returncode == 0
    case.messages += [line[:300] for line in told[:1]]


def hold(case, want, facts):
    """Checks that nothing that was finished is lost; before the command runs again."""
    rows = survival.rows(case.workdir)
    facts["log_kept"] = rows == want["rows"][: len(rows)]
    facts["logged"] = len(rows)
    facts["checkpoints_left"] = list(survival.step_folders(case.workdir))
    if (case.workdir / "result.json").exists():
        facts["result_before"] = survival.result(case.workdir) == want["result"]


def follow(case, facts):
    """Does what a refusal says; returns whether there was one."""
    told = case.messages[-1] if case.messages else ""
    if case.codes[-1] != 2 or case.told == len(case.messages):
        return False
    case.told = len(case.messages)
    if "--start_over" not in told:
        return False
    case.more = ["--start_over"]
    facts.setdefault("refused", []).append(told)
    return True


def chain(case, kinds, draw, want):
    """Breaks a run off in several ways and lets it end; returns the facts of each way."""
    found = []
    case.workdir.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(case.workdir)]
    subprocess.run(mount, check=True)
    for kind in kinds:
        if (case.workdir / "result.json").exists():
            break
        facts: dict[str, Any] = {"kind": kind, "run": case.name}
        if kind in ("truncated", "flipped"):
            if not survival.step_folders(case.workdir):
                continue
            damage(case, draw, facts, kind=kind)
            found.append(facts)
            continue
        for _ in range(3):
            facts["step"], facts["wait"] = moment(draw, case)
            if kind == "disk_full":
                disk_full(case, draw, facts)
            elif kind == "one_of_two":
                one_of_two(case, draw, facts)
            else:
                signalled(case, facts, number=signal.Signals[kind])
            if not follow(case, facts):
                break
        facts["exit"] = case.codes[-1]
        hold(case, want, facts)
        if case.codes[-1] != 0:  # else it came too late
            found.append(facts)
    last = {}
    for _ in range(4):
        code = case.run_two() if "one_of_two" in kinds else case.end(case.start())
        if code == 0 or not (follow(case, last) or code == 75):
            break
    whole = {
        "exits": case.codes,
        "messages": case.messages,
        "refused": last.get("refused", []),
        "resumed_from": [
            int(line.split("continuing from step ")[1])
            for text in case.texts
            for line in text.splitlines()
            if "continuing from step" in line
        ],
        "set_aside": sum("set aside" in text for text in case.texts),
        "no_traceback": not any("Traceback" in text for text in case.texts),
    }
    whole |= compare(case.workdir, want) if case.codes[-1] == 0 else {"byte_equal": False}
    if not all(whole.get(check) for check in CHECKS):
        whole["output"] = [text[-3000:] for text in case.texts]
    subprocess.run(["umount", str(case.workdir)], check=True)
    return found, whole


def reference(case, *, two=False):
    code = case.run_two() if two else case.run()
    assert code == 0, case.texts
    result = survival.result(case.workdir)
    folders = survival.step_folders(case.workdir)
    return {
        "rows": survival.rows(case.workdir),
        "result": result,
        "last": survival.arrays(folders[STEPS]),
        "best": survival.arrays(folders[result["best"]["step"]]),
    }


def compare(workdir, want):
    result, folders = survival.result(workdir), survival.step_folders(workdir)
    best = folders.get(result["best"]["step"])
    return {
        "byte_equal": survival.byte_equal(survival.arrays(folders[STEPS]), want["last"]),
        "best_byte_equal": best is not None
        and survival.byte_equal(survival.arrays(best), want["best"]),
        "same_selection": result["best"] == want["result"]["best"],
        "same_result": result == want["result"],
        "same_log": survival.rows(workdir) == want["rows"],
    }


CHECKS = (
    "byte_equal",
    "best_byte_equal",
    "same_selection",
    "same_result",
    "same_log",
    "no_traceback",
)


def passed(facts, whole):
    keys = ("log_kept", "result_before", "other_told")
    return all(whole.get(check) for check in CHECKS) and all(facts.get(key, True) for key in keys)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="")
    options = parser.parse_args()
    draw = random.Random(options.seed)
    left = collections.Counter(KINDS[i % len(KINDS)] for i in range(options.kills))
    root = pathlib.Path(tempfile.mkdtemp(prefix="kills"))
    teacher = root / "teacher"
    survival.train_teacher(teacher)
    wants, chains = {}, []
    began = time.monotonic()
    while left.total():
        two = draw.random() < left["one_of_two"] / left.total()
        name = TWO if two else pick(draw, OFTEN)
        if (name, two) not in wants:
            folder = root / f"whole-{name}-{'two' if two else 'one'}"
            wants[name, two] = reference(Case(name, folder, teacher), two=two)
        open_kinds = [k for k in left.elements() if (k == "one_of_two") == two]
        kinds = draw.sample(open_kinds, min(4, len(open_kinds)))
        if kinds[0] in ("truncated", "flipped"):  # there is nothing to damage yet
            first = next((k for k in kinds if k not in ("truncated", "flipped")), "SIGKILL")
            kinds = [first, *kinds][:4]
        case = Case(name, root / f"chain{len(chains)}", teacher)
        found, whole = chain(case, kinds, draw, wants[name, two])
        for facts in found:
            facts["passed"] = passed(facts, whole)
            left[facts["kind"]] = max(0, left[facts["kind"]] - 1)
        chains.append({"run": name, "processes": 2 if two else 1, "kills": found, **whole})
        print(round(time.monotonic() - began), json.dumps(chains[-1]), flush=True)
        write(options, chains, root)
    shutil.rmtree(root)


def write(options, chains, root):
    import jax
    import orbax.checkpoint

    cases = [facts for one in chains for facts in one["kills"]]
    by_kind = {
        kind: {
            "passed": sum(c["passed"] for c in cases if c["kind"] == kind),
            "of": sum(c["kind"] == kind for c in cases),
        }
        for kind in KINDS
    }
    result = {
        "of": len(cases),
        "passed": sum(c["passed"] for c in cases),
        "kinds": by_kind,
        "runs": len(chains),
        **{check: sum(bool(c.get(check)) for c in chains) for check in CHECKS},
        "refusals": sum(len(c["refused"]) for c in [*cases, *chains] if "refused" in c),
        "other_ended_after_s": max((c.get("other_ended_after_s", 0.0) for c in cases), default=0.0),
        "seed": options.seed,
        "steps": STEPS,
        "versions": {"jax": jax.__version__, "orbax-checkpoint": orbax.checkpoint.__version__},
        "chains": chains,
    }
    if options.out:
        text = json.dumps(result, indent=1).replace(f"{root}/", "")  # where it ran says nothing
        pathlib.Path(options.out).write_text(text + "\n")
    print(f"{result['passed']} of {result['of']} passed", flush=True)


if __name__ == "__main__":
    main()
