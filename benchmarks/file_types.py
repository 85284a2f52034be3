"""The study of file types measured: agreement over packages, calibration, recall, latency.

  python benchmarks/file_types.py --study=runs/file_types --out=benchmarks/results/file_types.json

Reads a finished `configs/studies/file_types.py`, exports the student of its first seed, and times
it against Magika's own file in ONNX Runtime: one example, one thread, the same session options, in
turns. Intervals are percentiles of 2,000 draws of test packages with replacement, in which each
arm's seeds are averaged. `ece_tempered` is the calibration error of logits divided by a temperature
that has the least loss against the teacher on held-out packages. Needs the extra `export` and
magika==1.0.3 (`pip install --no-deps`).
"""

import argparse
import json
import pathlib
import sys
import tempfile
from typing import Any

import _record
import _turns
import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

ARMS = ("distilled", "extensions")
DRAWS = 2000
ROUNDS = 100
RECALLED = 20
"""Test files that a type needs for its recall to be listed."""
ANSWERED = 0.5
"""Probability from which Magika names its first choice for most types; else `txt` or `unknown`."""
TEMPERATURES = np.geomspace(0.5, 4, 43)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--study", type=_record.study_folder, required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    flags = parser.parse_args()

    import distill_jax as dj
    from distill_jax.run import build

    study = json.loads((flags.study / "study.json").read_text())
    runs = {
        arm: [flags.study / entry["run"] for entry in study["arms"][arm]["seeds"].values()]
        for arm in ARMS
    }
    network = dj.load(runs["distilled"][0])
    dataset: Any = build.load_dataset(network.config)
    teacher = training_outputs(build, network.config, dataset.train)
    found = [read(run) for run in runs["distilled"]]
    target, packages = found[0]["teacher"], np.array([f.package for f in dataset.test.files])
    packages, labelled = packages[found[0]["index"]], dataset.test.labelled[found[0]["index"]]
    types = target.argmax(1)
    seen = np.bincount(teacher.argmax(1), minlength=target.shape[1])
    sure = target.max(1) >= np.log(ANSWERED)
    same = {arm: np.stack([agrees(read(run)) for run in runs[arm]]) for arm in ARMS}
    same["majority"] = (types == seen.argmax())[None]
    seconds = {arm: [wall(run) for run in runs[arm]] for arm in ARMS}
    results: dict[str, Any] = {
        "data": {
            part: {
                "files": len({file.path for file in getattr(dataset, part).files}),
                "examples": len(getattr(dataset, part)),
                "packages": len({file.package for file in getattr(dataset, part).files}),
                "sha256": getattr(dataset, part).provenance.sha256,
            }
            for part in ("train", "held_out", "test")
        },
        "teacher": {
            "types_among_training_files": int((seen > 0).sum()),
            "majority_class": dataset.classes[int(seen.argmax())],
            "test_files_of_types_with_under_5_training_files": float((seen[types] < 5).mean()),
            "test_files_that_magika_answers": float(sure.mean()),
            "agrees_with_extensions_on_labelled_test_files": float(
                (types == dataset.test.labels[found[0]["index"]])[labelled].mean()
            ),
        },
        "seeds": [int(seed) for seed in study["arms"]["distilled"]["seeds"]],
        "agreement": {arm: interval(values, packages) for arm, values in same.items()},
        "agreement_by_seed": {arm: values.mean(1).tolist() for arm, values in same.items()},
        "distilled_minus_extensions": interval(same["distilled"], packages, same["extensions"]),
        "agreement_on_types_with_20_training_files": {
            arm: float(values[:, seen[types] >= 20].mean()) for arm, values in same.items()
        },
        "agreement_where_magika_answers": {
            arm: interval(values[:, sure], packages[sure]) for arm, values in same.items()
        },
        "agreement_mean_of_packages": {
            arm: float(np.mean([values[:, packages == p].mean() for p in np.unique(packages)]))
            for arm, values in same.items()
        },
        "mean_recall_of_types_with_20_test_files": {
            arm: float(np.mean([values[:, types == c].mean() for c in common(types)]))
            for arm, values in same.items()
        },
        "calibration": {arm: calibration(runs[arm], dataset.held_out, network) for arm in ARMS},
        "recall": recall(dataset.classes, types, seen, same),
        "seconds_of_runs": seconds,
        "seconds_of_study": last(flags.study / "study.json") - first(runs, network.config),
    }
    x = dataset.test.read(np.arange(256))["input"]
    with tempfile.TemporaryDirectory() as folder:
        out = network.export(folder, formats=("onnx",))
        results |= served(out / "model.onnx", x, network)
    made = json.loads((runs["distilled"][0] / "result.json").read_text())["parameters"]
    results["parameters"] = {"student": made["student"], "magika": 784_519}
    results["versions"] = _record.versions("jax", "flax", "onnxruntime", "magika", "numpy")
    _record.write(results, flags.out)
    print(json.dumps({k: v for k, v in results.items() if k != "recall"}, indent=1))


def training_outputs(build: Any, config: Any, train: Any) -> np.ndarray:
    """Returns what the teacher gave for training files, from the folder of the study.

    Crops are left out: the first example of a path is the file.
    """
    stored = build.stored_teacher_outputs(build.build(config), config, {}, print)
    whole = np.unique([file.path for file in train.files], return_index=True)[1]
    return stored.read(np.zeros(len(whole), int), whole)["teacher"]["logits"]


def common(types: np.ndarray) -> np.ndarray:
    """Returns the types of at least `RECALLED` files."""
    return np.flatnonzero(np.bincount(types) >= RECALLED)


def read(run: pathlib.Path) -> dict[str, np.ndarray]:
    with np.load(run / "predictions.npz") as found:
        return {
            "student": found["logits_student"],
            "teacher": found["logits_teacher"],
            "index": found["index"],
        }


def agrees(found: dict[str, np.ndarray]) -> np.ndarray:
    return found["student"].argmax(1) == found["teacher"].argmax(1)


def wall(run: pathlib.Path) -> float:
    return json.loads((run / "result.json").read_text())["compute"]["seconds"]


def first(runs: dict[str, list[pathlib.Path]], config: Any) -> float:
    """Returns when the study wrote its first file, a config or the key of the teacher's outputs."""
    paths = [run / "config.json" for arm in runs.values() for run in arm]
    return min(map(last, [*paths, pathlib.Path(config.cache.dir) / "teacher" / "key.json"]))


def last(path: pathlib.Path) -> float:
    return path.stat().st_mtime


def interval(
    values: np.ndarray, packages: np.ndarray, minus: np.ndarray | None = None
) -> dict[str, Any]:
    """Returns the mean over seeds and files, with an interval over test packages.

    Args:
      values: bool `[seeds, n]`.
      packages: names `[n]`.
      minus: values that are subtracted, `[seeds, n]`.
    """
    each = values.mean(0) - (0 if minus is None else minus.mean(0))
    names = np.unique(packages)
    sums = np.array([each[packages == name].sum() for name in names])
    counts = np.array([(packages == name).sum() for name in names])
    drawn = np.random.default_rng(0).integers(0, len(names), (DRAWS, len(names)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.percentile(means, (2.5, 97.5))
    return {"mean": float(each.mean()), "interval": [float(low), float(high)]}


def calibration(runs: list[pathlib.Path], held_out: Any, network: Any) -> dict[str, float]:
    """Returns measures of a student's confidence that it agrees with the teacher, over seeds."""
    import distill_jax as dj
    from distill_jax.evaluators import calibration as evaluator
    from distill_jax.weights import onnx_teacher

    x = held_out.read(np.arange(len(held_out)))["input"]
    held = onnx_teacher.open_onnx(network.config.cache.teacher)(x)["logits"].argmax(1)
    measure, measured = evaluator.make(), []
    for run in runs:
        found = read(run)
        batch = {"label": found["teacher"].argmax(1)}
        logits = np.asarray(dj.load(run)(x)["logits"])
        losses = [loss(logits / t, held) for t in TEMPERATURES]
        t = float(TEMPERATURES[int(np.argmin(losses))])
        one = dict(measure({"student": {"logits": found["student"]}}, batch))
        tempered = measure({"student": {"logits": found["student"] / t}}, batch)
        measured.append(one | {"ece_tempered": tempered["ece"], "temperature": t})
    return {
        name: float(np.mean([m[name] for m in measured]))
        for name in ("ece", "ece_adaptive", "aurc", "ece_tempered", "temperature")
    }


def loss(logits: np.ndarray, labels: np.ndarray) -> float:
    shifted = logits - logits.max(1, keepdims=True)
    right = np.take_along_axis(shifted, labels[:, None], 1)[:, 0]
    return float((np.log(np.exp(shifted).sum(1)) - right).mean())


def recall(
    classes: Any, types: np.ndarray, seen: np.ndarray, same: dict[str, np.ndarray]
) -> dict[str, Any]:
    """Returns, for each type of enough test files, the share that a student finds."""
    counts = np.bincount(types, minlength=len(classes))
    return {
        classes[c]: {
            "test_files": int(counts[c]),
            "training_files": int(seen[c]),
            **{arm: float(same[arm][:, types == c].mean()) for arm in ARMS},
        }
        for c in np.argsort(-counts)
        if counts[c] >= RECALLED
    }


def served(student: pathlib.Path, x: np.ndarray, network: Any) -> dict[str, Any]:
    """Returns sizes and single-thread latencies of both files, and the error of the export."""
    from distill_jax.weights import packages

    paths = {"student": student, "magika": packages.locate("magika")}
    measured, calls = _turns.onnx_files(paths, x, rounds=ROUNDS)
    median, best = measured["latency_ms_median"], measured["latency_ms_least"]
    exported = np.concatenate([calls["student"](one[None])[0] for one in x])
    return {
        **measured,
        "latency_ratio_median": median["magika"] / median["student"],
        "latency_ratio_least": best["magika"] / best["student"],
        "export_max_error": float(np.abs(exported - network(x)["probabilities"]).max()),
    }


if __name__ == "__main__":
    main()
