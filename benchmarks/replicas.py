"""Eight seeds as replicas of one program against the same eight runs one after the other.

  python benchmarks/replicas.py --out=benchmarks/results/replicas.json

Each variant has a process of its own and a few turns in every round; the figure is the median over
rounds of the ratio of the times of one step of all eight runs. Runs alone have the devices that the
command line would give them; replicas have a device for each core.
"""

import argparse
import json
import os
import pathlib
import sys
import tempfile
import time

import _record
import _turns

RUNS = 8
NETS = {
    # name: (network and its arguments, batch)
    "mlp": ("mlp", {"hidden": (256, 256)}, 64),
    "convnet": ("convnet", {"widths": (8, 16, 32)}, 128),
}
STRATEGIES = ("vmap", "loop", "unroll")


def make_config(net: str, *, replicas: bool):
    from distill_jax.configs import common
    from distill_jax.run import config as config_lib

    config = common.fashion_mnist()
    config.objective.name = "supervised"
    model, kwargs, config.batch_size = NETS[net]
    config.roles.student = config_lib.role(model, **kwargs)
    config.data.train_transforms = ("normalize",)
    del config.data.transform_kwargs["random_crop"]
    config.total = "12 epochs"
    config.log.tensorboard = False
    config.study.arms = {"alone": {}}
    config.study.reference, config.study.seeds = "alone", tuple(range(RUNS))
    config.study.replicas = "yes" if replicas else "no"
    return config


def make_step(net: str, variant: str):
    """Returns a function that takes one step of all runs, and what compiling them took."""
    from distill_jax.run import environment

    config = make_config(net, replicas=variant != "alone")
    environment.configure_jax(cpu_devices=environment.cpu_devices(config))
    import jax

    from distill_jax.contrib import replicas
    from distill_jax.run import build, study
    from distill_jax.run.train.program import Program, SingleRun
    from distill_jax.run.train.run import Run

    folder = pathlib.Path(tempfile.mkdtemp())
    members = [
        replicas.Member("alone", seed, study.arm_config(config, "alone", seed, folder), folder, "")
        for seed in range(RUNS)
    ]
    if variant == "alone":
        first, count = members[0].config, RUNS
        run = Run(first, folder, build.build(first), arm="", reported="", log_line=print)
        program: Program = SingleRun(run)
    else:
        experiments = replicas.make_experiments(members, build.build)
        program = replicas.Replicas(members, experiments, strategy=variant)
        program.runs = [
            Run(
                m.config,
                folder / str(m.seed),
                e,
                arm="",
                reported="",
                share=1 / RUNS,
                log_line=print,
            )
            for m, e in zip(members, experiments, strict=True)
        ]
        count = 1
    state, step = program.start()
    compilations: list[float] = []

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        del kwargs
        if event.endswith("backend_compile_duration"):
            compilations.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    began = time.perf_counter()
    program.compile(0)
    took = {
        "compiled_programs": sum(seconds > 0.1 for seconds in compilations),
        "compile_seconds": round(time.perf_counter() - began, 2),
    }

    def advance():
        nonlocal state, step
        for _ in range(count):
            fed = program.feed(step)
            state, metrics = program.update["inner"](state, program.online, fed, program.key)
            metrics.block_until_ready()
            step += 1
        return jax.device_get(metrics).ravel()[0]

    return advance, took


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--serve")
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    os.environ.setdefault("DISTILL_JAX_CACHE", "off")
    if options.serve:
        net, variant = options.serve.split(":")
        advance, took = make_step(net, variant)
        if "REPLICAS_FACTS" in os.environ:
            pathlib.Path(os.environ["REPLICAS_FACTS"], f"{net}-{variant}").write_text(
                json.dumps(took)
            )
        _turns.serve(advance)
        return
    began, results = time.perf_counter(), {}
    with tempfile.TemporaryDirectory() as facts:
        for net in NETS:
            variants = {name: {"REPLICAS_FACTS": facts} for name in ("alone", *STRATEGIES)}
            steps = 12 if net == "mlp" else 2
            turns = _turns.take_turns(
                __file__, variants, net=net, rounds=options.rounds, steps=steps
            )
            results[net] = {
                name: {
                    "ms_per_step_of_all_runs": _turns.median_ms(turns[name]),
                    "throughput_over_alone": _turns.ratio(turns["alone"], turns[name]),
                    "cpu_time_of_alone_over_its_own": _turns.ratio(
                        turns["alone"], turns[name], "cpu"
                    ),
                    "peak_mib": round(max(turn["peak_mib"] for turn in turns[name])),
                    **json.loads(pathlib.Path(facts, f"{net}-{name}").read_text()),
                }
                for name in variants
            }
            print(net, json.dumps(results[net], indent=1), file=sys.stderr)
    report = {
        "runs": RUNS,
        "results": results,
        "seconds": round(time.perf_counter() - began),
        "device": "cpu",
        "cores": os.cpu_count(),
        "versions": _record.versions("jax", "flax", "optax", "numpy"),
    }
    _record.write(report, options.out, show=True)


if __name__ == "__main__":
    main()
