"""Equal runs: the same runs from two checkouts end in the same bytes.

  python benchmarks/equal_runs.py train --checkout=BEFORE --out=/tmp/before
  python benchmarks/equal_runs.py train --checkout=. --out=/tmp/after
  python benchmarks/equal_runs.py compare /tmp/before /tmp/after

Runs distillation, bilevel trust, contrastive and masked self-supervision, and a study of four runs
side by side, all on generated images and one CPU device. What `smoke` leaves open between checkouts
is set here, durations in the spelling of the checkout. Compares every array of the last
checkpoint byte by byte, rows of `metrics.jsonl` and `result.json` without clocks, and the names of
the files. It reads checkpoints with Orbax itself, not with the code that it compares.
"""

import argparse
import json
import os
import pathlib
import re
import subprocess
import sys
import warnings

CLOCKS = {"seconds", "compute"}
NAMES = {"networks"}  # checksums of files, some of whose names Orbax draws
SAME = [
    "--config.mesh.cpu_devices=1",
    "--config.seed=0",
    "--config.total=12",
    "--config.optim.warmup=2",
    "--config.eval.every=6",
    "--config.log.every_steps=4",
]
PIXELS = "--config.data.transform_kwargs.normalize={'mean': (0.506,), 'std': (0.182,)}"
PROBE = ["--config.evaluators.few_label_probe.draws=2"]
ONE_PART = [  # as earlier checkouts
    "--config.data.outer=0",
    "--config.data.held_out=0.1",
    "--config.bilevel.outer_batch=0.5",
]
DURATION = re.compile(r"--config\.(total|[a-z.]+\.(?:warmup|every))=(\d+)")
TEACHER = "--config.roles.teacher.init={out}/teacher"
SUPERVISED = ["--config=configs/distill/supervised.py:smoke", PIXELS]
STUDY = [
    "--mode=study",
    "--config.study.arms={'slow': {}, 'fast': {'optim': {'lr': 0.2}}}",
    "--config.study.seeds=0,1",
    "--config.study.reference=slow",
]
RUNS = {
    "teacher": [
        *SUPERVISED,
        "--config.checkpoint.every=6",
    ],
    "kd": [
        "--config=configs/distill/kd.py:smoke",
        PIXELS,
        TEACHER,
        "--config.watch.nonfinite=skip",
    ],
    "kd_cached": ["--config=configs/distill/kd_cached.py:smoke", PIXELS, TEACHER],
    "tgeo_kd": ["--config=configs/bilevel/tgeo_kd.py:smoke", PIXELS, TEACHER],
    "simclr": ["--config=configs/ssl/simclr.py:smoke", *PROBE],
    "ijepa": ["--config=configs/ssl/ijepa.py:smoke", PIXELS, *PROBE],
    "replicas": [*SUPERVISED, *STUDY, "--config.study.replicas=yes"],
    "alone": [*SUPERVISED, *STUDY, "--config.study.replicas=no"],
}


def train(checkout, out, names):
    """Trains every run from a checkout."""
    checkout, out = checkout.resolve(), out.resolve()
    env = {**os.environ, "PYTHONPATH": str(checkout), "JAX_PLATFORMS": "cpu"}
    for name, args in RUNS.items():
        if names and name not in names:
            continue
        args = [arg.format(out=out) if "{out}" in arg else arg for arg in (*args, *SAME)]
        if name == "tgeo_kd" and (checkout / "distill_jax/core/outer_options.py").exists():
            args += ONE_PART
        if not (checkout / "distill_jax/core/durations.py").exists():  # a key for each unit
            args = [DURATION.sub(r"--config.\1.steps=\2", arg) for arg in args]
            args = [arg.replace("study.replicas", "study.lanes") for arg in args]
        command = [
            sys.executable,
            "-m",
            "distill_jax.main",
            *args,
            f"--workdir={out / name}",
        ]
        done = subprocess.run(
            [*command, f"--workdir={out / name}"],
            cwd=checkout,
            env=env,
            capture_output=True,
            text=True,
            check=False,
        )
        print(f"{name}: exit code {done.returncode}", flush=True)
        if done.returncode:
            print(done.stderr[-2000:])
    (out / "commit").write_text(
        subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=checkout, text=True)
    )


def arrays(run):
    """Returns `{path: array}` of the last checkpoint of a run."""
    import jax
    import orbax.checkpoint as ocp

    warnings.filterwarnings("ignore", category=UserWarning)  # of shardings, read from their files

    steps = [p for p in (run / "checkpoints").iterdir() if p.name.isdigit()]
    last = max(steps, key=lambda p: int(p.name))
    found = {}
    for path in sorted(last.rglob("_METADATA")):
        tree = ocp.PyTreeCheckpointer().restore(path.parent)
        for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
            name = f"{path.parent.name}{jax.tree_util.keystr(keys)}"
            found[name.replace("weigher", "weighting")] = leaf  # as earlier checkouts call it
    return last.name, found


def without_clocks(value):
    if isinstance(value, dict):
        return {k: without_clocks(v) for k, v in value.items() if k not in CLOCKS | NAMES}
    return [without_clocks(v) for v in value] if isinstance(value, list) else value


def differences(one, other):
    """Yields what differs between two folders of the same run."""
    import numpy as np

    if not all((folder / "checkpoints").exists() for folder in (one, other)):
        yield "a run is missing"
        return
    (step, found), (other_step, others) = arrays(one), arrays(other)
    if step != other_step or found.keys() != others.keys():
        yield f"steps {step} and {other_step}, arrays {found.keys() ^ others.keys()}"
        return
    for name, x in found.items():
        x, y = np.asarray(x), np.asarray(others[name])
        if x.dtype != y.dtype or x.shape != y.shape or x.tobytes() != y.tobytes():
            yield f"array {name}"
    yield from (f"{name}: {len(found)} arrays" for name in () if not found)
    for name in ("metrics.jsonl", "result.json"):
        texts = [(folder / name).read_text() for folder in (one, other)]
        texts = [text.replace("weigher", "weighting") for text in texts]
        if name.endswith("l"):
            values = [[json.loads(line) for line in text.splitlines()] for text in texts]
        else:
            values = [json.loads(text) for text in texts]
        values = [without_clocks(value) for value in values]
        if values[0] != values[1]:
            yield name
    files = [{str(p.relative_to(f)) for p in f.iterdir()} for f in (one, other)]
    if files[0] != files[1]:
        yield f"files {sorted(files[0] ^ files[1])}"


def runs_in(folder):
    return sorted(p.parent.relative_to(folder) for p in folder.rglob("metrics.jsonl"))


def compare(one, other):
    """Prints what differs; returns the exit code."""
    names = sorted(set(runs_in(one)) | set(runs_in(other)))
    failed = 0
    for name in names:
        found = list(differences(one / name, other / name))
        failed += bool(found)
        count = 0 if found else len(arrays(one / name)[1])
        print(f"{name}: {'; '.join(found[:5]) or f'equal, {count} arrays'}")
    print(f"{len(names) - failed} of {len(names)} runs are equal")
    return int(failed > 0 or not names)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    made = commands.add_parser("train")
    made.add_argument("--checkout", type=pathlib.Path, default=pathlib.Path())
    made.add_argument("--out", type=pathlib.Path, required=True)
    made.add_argument("names", nargs="*", help="of runs; by default all")
    compared = commands.add_parser("compare")
    compared.add_argument("one", type=pathlib.Path)
    compared.add_argument("other", type=pathlib.Path)
    options = parser.parse_args()
    if options.command == "train":
        train(options.checkout, options.out, options.names)
        return
    sys.exit(compare(options.one, options.other))


if __name__ == "__main__":
    main()
