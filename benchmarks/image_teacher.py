"""The study of EfficientNet-Lite0 measured: parameters, latency and parity of teacher and student.

  python benchmarks/image_teacher.py --study=runs/efficientnet \\
      --out=benchmarks/results/image_teacher.json

Reads a finished `configs/studies/efficientnet.py`. The student of its first seed and its teacher
(preparation, EfficientNet-Lite0 and the probe) become ONNX files from the same raw images to
probabilities, and are called in ONNX Runtime: one image, one thread, in turns. Needs the extras
`export` and `teachers`.
"""

import argparse
import json
import os
import pathlib
import sys
import tempfile
from typing import Any

import _record
import _turns
import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

ROUNDS = 300
IMAGES = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--study", type=_record.study_folder, required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    flags = parser.parse_args()

    import distill_jax as dj

    study = json.loads((flags.study / "study.json").read_text())
    runs = study["arms"]["distilled"]["seeds"]
    network = dj.load(flags.study / next(iter(runs.values()))["run"])
    with tempfile.TemporaryDirectory() as folder:
        place = pathlib.Path(folder)
        out = network.export(place / "student", formats=("onnx",))
        dataset, teacher, expected = teacher_file(network.config, place / "teacher.onnx")
        images = dataset.test.read(np.arange(IMAGES))["input"]
        paths = {"student": out / "model.onnx", "teacher": teacher}
        measured, calls = _turns.onnx_files(paths, images, rounds=ROUNDS)
        answers = {name: np.concatenate(call(images)) for name, call in calls.items()}
    wanted = {"student": network(images)["probabilities"], "teacher": expected(images)}

    def over(what: str) -> float:
        return measured[what]["teacher"] / measured[what]["student"]

    result = {
        **measured,
        "teacher_over_student": {
            name: over(name)
            for name in (
                "float_parameters_in_file",
                "bytes",
                "latency_ms_median",
                "latency_ms_least",
            )
        },
        "export_max_error": {
            name: float(np.abs(answers[name] - wanted[name]).max()) for name in answers
        },
        "agreement": float((answers["student"].argmax(1) == answers["teacher"].argmax(1)).mean()),
        "images": IMAGES,
        "load_average": os.getloadavg(),
        "versions": _record.versions("jax", "flax", "onnx", "onnxruntime"),
    }
    _record.write(result, flags.out, show=True)


def teacher_file(config: Any, path: pathlib.Path) -> tuple[Any, pathlib.Path, Any]:
    """Writes the teacher of a run as an ONNX file.

    Returns:
      the data set, the path, and a function from raw images to the probabilities that JAX computes.
    """
    import jax
    import jax.numpy as jnp

    from distill_jax.core.steps import teacher_view
    from distill_jax.export.onnx_model import to_onnx
    from distill_jax.export.program import Program
    from distill_jax.run import build
    from distill_jax.run.build.experiment import evaluation_transform

    experiment = build.build(config)
    frozen = build.frozen_networks(experiment, config)
    dataset: Any = experiment.dataset

    def answer(weights: Any, inputs: Any) -> Any:
        raw = inputs["input"]
        zeros = jnp.zeros(raw.shape[0], jnp.int32)
        batch = {"input": raw, "label": zeros, "index": zeros, "epoch": zeros}
        x = teacher_view(evaluation_transform(experiment, batch))
        for role, output in (("teacher", "embedding"), ("teacher_head", "logits")):
            model = experiment.models[role]
            x = model.apply(*weights[role], x, train=False, rngs={})[0][output]
        return {"probabilities": jax.nn.softmax(x)}

    one = dataset.test.read(np.zeros(1, np.int64))["input"]
    specs = {"input": jax.ShapeDtypeStruct(one.shape[1:], one.dtype)}
    weights = {role: jax.device_get(frozen[role]) for role in ("teacher", "teacher_head")}
    path.write_bytes(to_onnx(Program(function=answer, weights=weights, inputs=specs)))
    jitted = jax.jit(answer)
    return dataset, path, lambda x: np.asarray(jitted(weights, {"input": x})["probabilities"])


if __name__ == "__main__":
    main()
