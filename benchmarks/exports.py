"""Every student architecture out and back: trained, exported, served by others, compared.

  python benchmarks/exports.py --out=benchmarks/results/exports.json

Each network is trained on data that ship with the package, exported by `--mode=export`, and called
on 1,000 test examples with batches of 1, 7 and 64 in a process that does not import distill_jax: by
ONNX Runtime, and from StableHLO by JAX alone. The outputs are compared with those of `dj.load` on
the run. The 8-bit file is compared too, by its test accuracy and its size; it has no bound.
`--tflite` adds LiteRT, which needs the extra tflite.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

import _record
import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

N = 1000
SIZES = (1, 7, 64)
MAX_ERROR = 1e-4
AGREEMENT = 0.999
NETWORKS: dict[str, tuple[str, str, dict[str, Any], int]] = {
    # name: (data, model, arguments, training steps)
    "convnet": ("fashion_mnist_5k", "convnet", {}, 2000),
    "resnet20": ("fashion_mnist_5k", "resnet", {"depth": 20}, 1000),
    "mlp": ("fashion_mnist_5k", "mlp", {}, 2000),
    "tabular_mlp": ("adult", "tabular_mlp", {}, 500),
    "wide_deep": ("adult", "wide_deep", {}, 500),
    "deepfm": ("adult", "deepfm", {}, 500),
    "dcnv2": ("adult", "dcnv2", {}, 500),
    "tabular_transformer": ("adult", "tabular_transformer", {}, 300),
    "vit_tiny": ("fashion_mnist_5k", "vit", {"variant": "tiny"}, 200),
    "wide_resnet": ("fashion_mnist_5k", "wide_resnet", {"depth": 10, "width_multiplier": 1}, 500),
    "vgg": ("fashion_mnist_5k", "vgg", {}, 100),
    "mobilenet_v2": ("fashion_mnist_5k", "mobilenet_v2", {}, 100),
    "shufflenet_v1": ("fashion_mnist_5k", "shufflenet_v1", {}, 100),
    "shufflenet_v2": ("fashion_mnist_5k", "shufflenet_v2", {}, 100),
    "resnet_four_stages": ("fashion_mnist_5k", "resnet_four_stages", {}, 20),
}

SERVE = """
import sys
import jax, numpy as np, onnxruntime
folder, sizes = sys.argv[1], [int(x) for x in sys.argv[2].split(",")]
x = dict(np.load(folder + "/x.npz"))
n = len(next(iter(x.values())))
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
session = onnxruntime.InferenceSession(folder + "/model.onnx", options)
names = [o.name for o in session.get_outputs()]
with open(folder + "/model.stablehlo", "rb") as f:
    call = jax.jit(jax.export.deserialize(bytearray(f.read())).call)
int8 = onnxruntime.InferenceSession(folder + "/model.int8.onnx", options)
runs = {
    "onnx": lambda b: dict(zip(names, session.run(names, b))),
    "stablehlo": call,
    "int8": lambda b: dict(zip(names, int8.run(names, b))),
}
try:
    from ai_edge_litert.interpreter import Interpreter
    runner = Interpreter(folder + "/model.tflite", num_threads=1).get_signature_runner()
    runs["tflite"] = lambda b: runner(**b)
except (ImportError, ValueError):
    pass
found = {}
for name, run in runs.items():
    for size in {"tflite": [1], "int8": sizes[-1:]}.get(name, sizes):
        stop = n if size > 7 or name == "tflite" else 8 * size
        parts = [run({k: v[i:i + size] for k, v in x.items()}) for i in range(0, stop, size)]
        for output in parts[0]:
            value = np.concatenate([np.array(p[output]) for p in parts])
            found[f"{name}/{size}/{output}"] = value
assert not [m for m in sys.modules if m.startswith("distill_jax")]
np.savez(folder + "/y.npz", **found)
"""


def train(name: str, folder: pathlib.Path) -> None:
    """Trains a network."""
    from distill_jax.run import config as config_lib
    from distill_jax.run.train import loop

    data, model, kwargs, steps = NETWORKS[name]
    config = config_lib.base()
    config.data.name = data
    if data == "fashion_mnist_5k":
        config.data.train_transforms = config.data.eval_transforms = ("normalize",)
    config.objective.name = "supervised"
    config.evaluators = {"classification": {}}
    config.roles.student = config_lib.role(model, **kwargs)
    config.optim.name, config.optim.lr = "adamw", 2e-3
    config.batch_size, config.total = 32, steps
    config.log.tensorboard = False
    loop.train(config, folder, log_line=lambda line: None)


def measure(name: str, folder: pathlib.Path, formats: str) -> dict[str, Any]:
    """Returns errors and agreement of one network by format and batch."""
    import distill_jax as dj
    from distill_jax import main
    from distill_jax.run import build

    run = folder / "run"
    train(name, run)
    command = ["x", "--mode=export", f"--workdir={run}", f"--formats={formats}"]
    assert main.main([*command, "--outputs=logits,probabilities"]) == 0
    predict = dj.load(run)
    test = build.load_dataset(predict.config).test
    x = test.read(np.arange(min(N, len(test))))["input"]
    out = run / "export"
    np.savez(out / "x.npz", **(x if isinstance(x, dict) else {"input": x}))
    line = [sys.executable, "-c", SERVE, str(out), ",".join(map(str, SIZES))]
    done = subprocess.run(line, cwd=out, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    wanted = predict(x)
    labels = test.read(np.arange(len(wanted["logits"])))["label"]
    rows: dict[str, Any] = {}
    with np.load(out / "y.npz") as stored:
        given = dict(stored)
    for key, value in given.items():
        served, size, output = key.split("/")
        row = rows.setdefault(served, {}).setdefault(size, {"examples": len(value)})
        row[f"max_error_{output}"] = float(np.abs(value - wanted[output][: len(value)]).max())
        if output == "logits":
            said = value.argmax(1)
            row["top1_agreement"] = float((said == wanted[output][: len(value)].argmax(1)).mean())
            row["accuracy"] = float((said == labels[: len(value)]).mean())
    cards = {
        card["format"]: {k: card[k] for k in ("bytes", "parity")}
        for card in (json.loads(p.read_text()) for p in sorted(out.glob("*.card.json")))
    }
    passed = all(
        max(v for k, v in row.items() if k.startswith("max_error")) <= MAX_ERROR
        and row["top1_agreement"] >= AGREEMENT
        for served, sizes in rows.items()
        if served != "int8"
        for row in sizes.values()
    )
    return {
        "model": NETWORKS[name][1:],
        "data": test.provenance.name,
        "accuracy": float((wanted["logits"].argmax(1) == labels).mean()),
        "largest_logit": float(np.abs(wanted["logits"]).max()),
        "served_without_distill_jax": rows,
        "cards": cards,
        "passed": passed,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--only", help="names, by commas")
    parser.add_argument("--tflite", action="store_true")
    flags = parser.parse_args()
    formats = "stablehlo,onnx,onnx_int8,safetensors" + (",tflite" if flags.tflite else "")
    names = flags.only.split(",") if flags.only else list(NETWORKS)
    results: dict[str, Any] = {}
    if flags.only and flags.out and flags.out.exists():
        results = json.loads(flags.out.read_text())["networks"]
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            results[name] = measure(name, pathlib.Path(folder), formats)
        print(name, json.dumps(results[name]["served_without_distill_jax"]), flush=True)
        report = {
            "limits": {"max_error": MAX_ERROR, "top1_agreement": AGREEMENT},
            "versions": _record.versions("jax", "onnx", "onnxruntime"),
            "passed": f"{sum(r['passed'] for r in results.values())} of {len(results)}",
            "networks": results,
        }
        _record.write(report, flags.out)


if __name__ == "__main__":
    main()
