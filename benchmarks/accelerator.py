"""Speed of large steps on one accelerator against PyTorch and a hand-written loop, in ten minutes.

    python benchmarks/accelerator.py --torch_python=torch_env/bin/python
    python benchmarks/accelerator.py --part=dino,mae,ijepa --out=accelerator_ssl.json
    python benchmarks/accelerator.py --tiny --out=benchmarks/results/accelerator_cpu.json

The core parts, in order: distillation of a ResNet-18 by a ResNet-50 and of a ViT-S/16 by a ViT-B/16
at 224 px, SimCLR with a ResNet-50, the exact bilevel step of a ResNet-18. Other parts run with
`--part`. Each part has a share of `--seconds`; what it does not use goes to later parts. The file
is replaced after each figure, and SIGTERM, Ctrl-C and SIGKILL leave what was measured. `--tiny`
validates this script with small networks on the CPU; its times mean nothing.

Variants have a process each, and take turns once all are warm: "ours"; "hand_written", a `jit` loop
of the same networks; "stored", with stored teacher outputs; "fused_attention", ours with cuDNN's
attention (on the CPU that of `jax.nn`); "torch" and "torch_compile" (default mode) in
`_accelerator_torch.py`, run by `--torch_python`. "ours" starts alone with an empty compilation
cache, then "ours_from_cache", then all others together. Compute is bfloat16 everywhere.

`utilization` is the arithmetic of a step (`flops`, of the traced program; peers have that of
"ours") per second over the peak of the chip. `events` is what the loop waits for at an event: a
line of metrics, an evaluation, a checkpoint, in seconds and in steps. `loop_over_bare` is the cost
of the watch and the progress display, and `bare_over_constant` that of the loader, as ratios of
times of a step. A figure that does not exist is null, and `missing` says why.
"""

import argparse
import os
import platform
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _accelerator_steps as steps
import _accelerator_torch as peers
import _accelerator_workers as workers

ROOT = Path(__file__).resolve().parents[1]
CORE = {"resnet_kd": 1.2, "vit_kd": 1.1, "simclr": 1.0, "bilevel": 1.0}
"""Shares of the time, the most important part first."""

OTHERS = ("dino", "mae", "ijepa", "clip", "decoder", "replicas_resnet20", "replicas_mlp")
PEERS = ("torch", "torch_compile")
PEAKS = {
    # part of the device kind: dense bfloat16 FLOP/s, from the data sheets of the makers
    "H200": 989.4e12,
    "H100 PCIe": 756e12,
    "H100": 989.4e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "V100": None,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6": 918e12,
}
BLOCK_SECONDS, MOST_ROUNDS = 0.5, 15
TURNS, EVENTS = 0.35, 0.1
"""Shares of a part that are kept for the turns and what follows, and for what follows."""

QUICK = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
"""Compiles in a fraction of the time, for `--tiny`, whose times mean nothing."""


def peak_flops(kind: str) -> float | None:
    """Returns the bfloat16 peak of a device kind in FLOP/s; None if it is unknown."""
    return next((peak for name, peak in PEAKS.items() if name.lower() in kind.lower()), None)


def variants_of(part: str) -> tuple[str, ...]:
    """Returns the variants of a part, the first of which starts alone."""
    if part.startswith("replicas"):
        return ("vmap", "alone")
    names = ["ours", "ours_from_cache"]
    if part in ("resnet_kd", "vit_kd", "simclr"):
        names.append("hand_written")
    if part in ("resnet_kd", "vit_kd"):
        names.append("stored")
    if part == "vit_kd":
        names.append("fused_attention")
    return (*names, *PEERS) if part in CORE else tuple(names)


def missing(part: str) -> dict[str, str]:
    """Returns why a part lacks a variant."""
    found = {}
    if part not in CORE:
        found |= dict.fromkeys(PEERS, "this part has no PyTorch peer")
    if "hand_written" not in variants_of(part):
        found["hand_written"] = "this part has no hand-written loop"
    return found


class Part:
    """Measures one part, and saves after each figure."""

    def __init__(self, name: str, options: Any, folder: str, save: Callable[[], None]):
        self.name, self.options, self.folder, self.save = name, options, folder, save
        self.workers: dict[str, workers.Worker] = {}
        self.modes: dict[str, list[str]] = {}
        self.times: dict[tuple[str, str], list[float]] = {}
        self.found: dict[str, Any] = {"finished": False, "variants": {}, "missing": missing(name)}

    def start(self, variant: str) -> None:
        options = self.options
        env = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        env["DISTILL_JAX_CACHE"] = os.path.join(self.folder, f"{self.name}-programs")
        env["TORCHINDUCTOR_CACHE_DIR"] = os.path.join(self.folder, f"{self.name}-inductor")
        env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), env.get("PYTHONPATH"))))
        if options.tiny:
            env |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", "XLA_FLAGS": QUICK}
            env["OMP_NUM_THREADS"] = "1"  # PyTorch's threads spin where cores are shared
        python = options.torch_python if variant in PEERS else sys.executable
        serve = f"{self.name}:{variant}:{int(options.tiny)}:{self.folder}:{os.getpid()}"
        log = Path(self.folder, f"{self.name}-{variant}.log")
        command = (python, str(Path(__file__).resolve()), f"--serve={serve}")
        self.workers[variant] = workers.Worker(command, env=env, log=log)

    def fail(self, variant: str, why: object) -> None:
        self.found["missing"][variant] = str(why)
        self.workers.pop(variant).end()
        self.save()

    def await_ready(self, variant: str, deadline: float) -> None:
        try:
            ready = self.workers[variant].answer(deadline)
        except workers.NotReady as reason:
            return self.fail(variant, reason)
        self.modes[variant] = ready["modes"]
        row = {"batch": ready["batch"], "seconds_to_first_step": ready["at"]}
        self.found["variants"][variant] = row
        return self.save()

    def run(self, deadline: float) -> None:
        """Measures until `deadline`, a time of `time.monotonic`."""
        first, *others = variants_of(self.name)
        seconds = deadline - time.monotonic()
        turns = deadline - (2 * EVENTS if self.options.tiny else TURNS) * seconds
        try:
            self.start(first)
            self.await_ready(first, turns)
            if "ours_from_cache" in others:
                others.remove("ours_from_cache")
                self.start("ours_from_cache")
                self.await_ready("ours_from_cache", turns)
                if "ours_from_cache" in self.workers:
                    self.workers.pop("ours_from_cache").end()
            for group in [[v] for v in others] if self.options.tiny else [others]:
                for variant in group:
                    self.start(variant)
                for variant in group:
                    self.await_ready(variant, turns)
            self.turns(deadline - EVENTS * seconds)
            for variant, worker in list(self.workers.items()):
                try:
                    facts = worker.ask(deadline + 20)
                    self.summarize(variant, facts)
                except workers.NotReady as reason:
                    self.found["missing"][f"{variant}: facts"] = str(reason)
            self.found["finished"] = bool(self.times)
            self.save()
            self.events(deadline + 20)
        finally:
            for worker in self.workers.values():
                worker.end()

    def events(self, deadline: float) -> None:
        """Measures what the loop waits for between steps."""
        if "ours" not in self.workers or "ours: facts" in self.found["missing"]:
            return None
        try:
            found = self.workers["ours"].ask(deadline, events=True)
        except workers.NotReady as reason:
            self.found["missing"]["events"] = str(reason)
            return self.save()
        row = self.found["variants"]["ours"]
        row["events"] = {kind: event for kind, event in found.items() if kind != "at"}
        for event in row["events"].values() if row.get("ms") else ():
            event["steps"] = round(1e3 * event["seconds"] / row["ms"], 4)
        return self.save()

    def turns(self, deadline: float) -> None:
        """Lets the variants take turns; who begins changes from round to round."""
        count: dict[str, int] = {}
        rounds = 2 if self.options.tiny else MOST_ROUNDS
        for i in range(-1, rounds):
            names = list(self.workers)
            for variant in names[i % len(names) :] + names[: i % len(names)] if names else []:
                for mode in self.modes[variant]:
                    n = count.get(variant, 1)
                    if time.monotonic() > deadline:
                        return
                    try:
                        took = self.workers[variant].ask(deadline + 5, steps=n, mode=mode)
                    except workers.NotReady as reason:
                        self.fail(variant, reason)
                        break
                    if i >= 0:
                        self.times.setdefault((variant, mode), []).append(took["seconds"] / n)
                    elif mode == self.modes[variant][-1]:  # the turn before the first is warm-up
                        least = 1 if self.options.tiny else 3
                        wanted = int(BLOCK_SECONDS / took["seconds"])
                        count[variant] = least if self.options.tiny else max(least, wanted)
            for variant in self.workers:
                self.summarize(variant, {})

    def ratio(self, above: tuple[str, str], below: tuple[str, str]) -> float | None:
        """Returns the median over rounds of a ratio of times."""
        pairs = list(zip(self.times.get(above, ()), self.times.get(below, ()), strict=False))
        return round(statistics.median(a / b for a, b in pairs), 4) if pairs else None

    def summarize(self, variant: str, facts: dict[str, Any]) -> None:
        row, mine = self.found["variants"][variant], (variant, "loop")
        row |= {key: value for key, value in facts.items() if key != "at"}
        if mine in self.times:
            seconds = statistics.median(self.times[mine])
            row |= {"ms": round(1e3 * seconds, 3), "rounds": len(self.times[mine])}
            row["ms_spread"] = [round(1e3 * f(self.times[mine]), 3) for f in (min, max)]
            row["examples_per_second"] = round(row["batch"] / seconds, 2)
            known = [row, self.found["variants"].get("ours", {})]
            flops = next((r["flops"] for r in known if r.get("flops")), None)
            if flops and row.get("device_kind"):
                peak = peak_flops(row["device_kind"])
                row["utilization"] = peak and round(flops / seconds / peak, 4)
                if peak is None:
                    why = f"no peak is known for {row['device_kind']}"
                    self.found["missing"]["utilization"] = why
        if variant == "ours":
            row["loop_over_bare"] = self.ratio(mine, ("ours", "bare"))
            row["bare_over_constant"] = self.ratio(("ours", "bare"), ("ours", "constant"))
        first = variants_of(self.name)[0]
        self.found["speed_of_first_over"] = {
            other: self.ratio((other, "loop"), (first, "loop"))
            for other, mode in self.times
            if mode == "loop" and other != first
        }
        self.save()


def measure(options: Any, parts: list[str]) -> dict[str, Any]:
    """Runs parts within the time; the file has what is known at each moment."""
    ends = time.monotonic() + options.seconds
    result: dict[str, Any] = {
        "purpose": "CPU validation of the script with tiny sizes; its times claim nothing"
        if options.tiny
        else "measurement",
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "seconds_allowed": options.seconds,
        "ended": "unfinished",
        "parts": {},
    }
    save = lambda: workers.write(options.out, result)  # noqa: E731
    save()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    with tempfile.TemporaryDirectory(prefix="accelerator", ignore_cleanup_errors=True) as folder:
        try:
            for i, name in enumerate(parts):
                shares = [CORE.get(part, 1.0) for part in parts[i:]]
                seconds = workers.allowance(ends - time.monotonic(), shares)
                part = Part(name, options, folder, save)
                result["parts"][name] = part.found
                part.run(time.monotonic() + seconds)
                print(name, part.found, flush=True)
            result["ended"] = "finished"
        except (KeyboardInterrupt, SystemExit) as signal_:
            result["ended"] = f"stopped: {type(signal_).__name__} {signal_}".strip()
            raise
        finally:
            result["seconds"] = round(options.seconds - (ends - time.monotonic()), 1)
            save()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--part", default=",".join(CORE), help=f"of {(*CORE, *OTHERS)}")
    parser.add_argument("--seconds", type=float, default=570.0, help="for all parts together")
    parser.add_argument("--tiny", action="store_true", help="small networks on the CPU")
    parser.add_argument("--torch_python", default=sys.executable, help="interpreter with PyTorch")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/accelerator.json"))
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        part, variant, tiny, folder, parent = options.serve.split(":")
        workers.die_with_parent(int(parent))
        if variant in PEERS:
            size = steps.SIZES[part][int(tiny)]
            return peers.serve(part, variant, size, tiny=tiny == "1")
        return steps.serve(part, variant, tiny=tiny == "1", folder=folder)
    parts = options.part.split(",")
    if unknown := [part for part in parts if part not in (*CORE, *OTHERS)]:
        raise SystemExit(f"no part {unknown[0]!r}: one of {', '.join((*CORE, *OTHERS))}")
    if options.out.is_dir() or not options.out.parent.is_dir():
        raise SystemExit(f"{options.out}: not a file in a folder that exists")
    measure(options, parts)
    return None


if __name__ == "__main__":
    main()
