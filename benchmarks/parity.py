"""Compares networks with those of timm, stage by stage, with every parameter and buffer redrawn.

    python benchmarks/parity.py --peers=<python of an environment with torch, timm and safetensors>

For each network of `tests/weights/drawn.py` that Python draws all weights, runs the network on two
images and writes weights and stages; this one reads the file, recognises the family and the size,
fills the network by the table of names and compares. Both run apart from each other.
"""

import argparse
import importlib
import json
import operator
import pathlib
import subprocess
import sys
import tempfile

import numpy as np

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from tests.weights import drawn  # noqa: E402

RESULTS = ROOT / "benchmarks/results/parity.json"
DIGESTS = ROOT / "tests/weights/fixtures/parity.json"
FOLDER, ARCHIVE = "transformers/", "npz/"
BOUND = 1e-4
NETWORKS = {
    **drawn.CASES,
    **{f"{FOLDER}{name}": case for name, case in drawn.FOLDERS.items()},
    **{f"{ARCHIVE}{name}": case for name, case in drawn.ARCHIVES.items()},
}


def run(case: drawn.Case, **options) -> tuple[dict, dict]:
    """Returns weights and outputs of the other library's network."""
    import timm
    import torch

    torch.set_num_threads(1)
    module, _, function = case.reference.partition(":")
    if function:
        build = operator.attrgetter(function)(importlib.import_module(module))
        network = build(**options, **case.options)
    else:
        network = timm.create_model(module, **{**options, **case.options})
    return filled_outputs(case, network.eval())


def filled_outputs(case: drawn.Case, network) -> tuple[dict, dict]:
    """Draws the weights of a network of PyTorch and returns them and its outputs."""
    import torch

    state = network.state_dict()
    filled = {
        key: torch.from_numpy(np.array(drawn.draw(key, tuple(value.shape)))).to(value.dtype)
        for key, value in state.items()
        if not key.endswith("relative_position_index")
    }
    network.load_state_dict(filled, strict=False)
    return filled, outputs_of(case, network)


def outputs_of(case: drawn.Case, network) -> dict:
    """Returns the stages of a network of PyTorch and its logits."""
    import torch

    found = {}

    def keep(output: str):
        def hook(module, inputs, value):
            found[output] = value.permute(0, 2, 3, 1) if _is_nchw(case, output, value) else value

        return hook

    modules = dict(network.named_modules())
    for output, module in case.stages.items():
        modules[module].register_forward_hook(keep(output))
    with torch.inference_mode():
        x = torch.from_numpy(drawn.images(case.side)).permute(0, 3, 1, 2)
        found["logits"] = network(x)
    return {name: value.numpy() for name, value in found.items()}


def run_archive(name: str, folder: pathlib.Path) -> dict:
    """Writes an `.npz` with drawn weights by the names of Flax, and returns what timm makes of it.

    The file of "vision_transformer" has the blocks one by one, the others in one array.
    """
    import timm

    case, weights = drawn.ARCHIVES[name], drawn.archive(name)
    path = folder / "model.npz"
    np.savez(path, **(drawn.stacked(weights) if name.startswith("big") else weights))
    network = timm.create_model(case.reference, **case.options).eval()
    network.load_pretrained(str(path))
    return outputs_of(case, network)


def reference(name: str, folder: pathlib.Path) -> None:
    """Writes weights and outputs of a network, to be read by another Python."""
    from safetensors.torch import save_file

    if name.startswith(FOLDER):
        found = run_folder(drawn.FOLDERS[name.removeprefix(FOLDER)], folder)
    elif name.startswith(ARCHIVE):
        found = run_archive(name.removeprefix(ARCHIVE), folder)
    else:
        filled, found = run(drawn.CASES[name])
        (folder / "config.json").write_text(json.dumps({"architecture": name}))
        save_file(filled, str(folder / "model.safetensors"))
    np.savez(folder / "stages.npz", **found)
    print(json.dumps(_versions()))


def run_folder(case: drawn.Case, folder: pathlib.Path) -> dict:
    """Writes a folder of transformers with drawn weights, and returns what its network gives."""
    import torch
    import transformers
    from safetensors.torch import load_file, save_file

    _, config, model = case.reference.split(":")
    kind = getattr(transformers, model)
    kind(getattr(transformers, config)(**case.options)).save_pretrained(folder)
    path = str(folder / "model.safetensors")
    drawn_ones = {
        k: torch.from_numpy(drawn.draw(k, tuple(v.shape))) for k, v in load_file(path).items()
    }
    save_file(drawn_ones, path, metadata={"format": "pt"})
    network = kind.from_pretrained(folder, attn_implementation="eager").eval()
    if "CLIP" in model:
        return _clip_outputs(network, drawn.images(case.side))
    body = next(iter(network.children())) if "logits" in _outputs_of(model) else network
    found = {}
    hook = body.register_forward_hook(lambda m, i, out: found.update(tokens=out.last_hidden_state))
    with torch.inference_mode():
        x = torch.from_numpy(drawn.images(case.side)).permute(0, 3, 1, 2)
        out = network(x, output_hidden_states=True)
    hook.remove()
    found["block1"] = out.hidden_states[1]
    if "logits" in out:
        found["logits"] = out.logits
    return {name: value.numpy() for name, value in found.items()}


def _clip_outputs(network, images: np.ndarray) -> dict:
    import torch

    tower, found = network.vision_model, {}
    patches = tower.embeddings.patch_embedding
    keep = patches.register_forward_hook(lambda m, i, out: found.update(patches=out))
    with torch.inference_mode():
        out = tower(torch.from_numpy(images).permute(0, 3, 1, 2), output_hidden_states=True)
        found["patches"] = found["patches"].flatten(2).transpose(1, 2)
        found |= {f"block{i}": out.hidden_states[i] for i in (1, 2)}
        found["pooled"] = out.pooler_output
        found["embedding"] = network.visual_projection(out.pooler_output)
    keep.remove()
    return {name: value.numpy() for name, value in found.items()}


def _outputs_of(model: str) -> tuple[str, ...]:
    return ("logits",) if "Classification" in model else ()


def _versions() -> dict[str, str]:
    import timm
    import torch
    import torchvision

    names = (timm, torch, torchvision)
    return {module.__name__: module.__version__ for module in names}


def digests() -> None:
    """Stores a few values of every stage of the small networks."""
    table, outputs = {}, {}
    for name, case in drawn.DIGESTS.items():
        _, outputs[name] = run(case, num_classes=drawn.CLASSES)
    for name, case in drawn.FOLDERS.items():
        with tempfile.TemporaryDirectory() as folder:
            outputs[f"{FOLDER}{name}"] = run_folder(case, pathlib.Path(folder))
    for name in drawn.ARCHIVES:
        with tempfile.TemporaryDirectory() as folder:
            outputs[f"{ARCHIVE}{name}"] = run_archive(name, pathlib.Path(folder))
    for name, found in outputs.items():
        table[name] = {
            stage: {
                "shape": list(value.shape),
                "std": float(f"{value.std():.6g}"),
                "values": [float(f"{x:.8g}") for x in drawn.sample(value)],
            }
            for stage, value in found.items()
        }
    rows = [f' "{name}": {json.dumps(stages)}' for name, stages in table.items()]
    versions = json.dumps(_versions())
    DIGESTS.write_text("{\n" + ",\n".join([f' "versions": {versions}', *rows]) + "\n}\n")


def _is_nchw(case: drawn.Case, output: str, value) -> bool:
    return value.ndim == 4 and case.model != "swin"


def compare(name: str, folder: pathlib.Path) -> dict:
    """Returns the largest error of each stage, in its standard deviations."""
    import jax

    from distill_jax.weights import certificates, pretrained
    from distill_jax.weights.mapping import invert_map

    case = NETWORKS[name]
    archived = name.startswith(ARCHIVE)
    source = folder / "model.npz" if archived else f"hf:{folder}"
    opened = pretrained.open_pretrained(str(source))
    found, known, kwargs = opened.weights, opened.family, opened.kwargs
    for key, value in case.kwargs.items():
        told = kwargs.get(key, value)
        assert told == value or key in ("variant", "layer_scale"), (name, key, told, value)
    model = certificates.network(opened)
    x = drawn.images(case.side)
    template = jax.eval_shape(model.init, jax.random.key(0), x)
    params, state, report = opened.fill(*template)
    back = invert_map(params, state, known, sizes=kwargs)
    back = {f"{opened.prefix}{key}": value for key, value in back.items()}
    mapped = set(found) - set(report.ignored)
    returned = mapped <= set(back) and all(np.array_equal(back[k], found[k]) for k in mapped)
    outputs, _ = jax.jit(lambda p, s, x: model.apply(p, s, x, train=False))(params, state, x)
    stages = np.load(folder / "stages.npz")
    errors = {}
    for stage in stages.files:
        ours, theirs = np.asarray(outputs[stage]), stages[stage]
        assert ours.shape == theirs.shape, (name, stage, ours.shape, theirs.shape)
        errors[stage] = float(np.abs(ours - theirs).max() / theirs.std())
    return {
        "family": known.name,
        "recognised": {k: v for k, v in kwargs.items() if k != "num_classes"},
        "parameters": int(sum(leaf.size for leaf in jax.tree.leaves(params))),
        "tensors": report.tensors,
        "returned": returned,
        "largest": max(errors.values()),
        "stages": errors,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--peers", help="Python with torch, timm and safetensors")
    parser.add_argument("--reference", metavar="NAME", help="write what this network gives there")
    parser.add_argument("--folder", type=pathlib.Path)
    parser.add_argument("--only", default="", help="names that begin so")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    parser.add_argument("--digests", action="store_true", help="rewrite the stored values there")
    given = parser.parse_args()
    if given.digests:
        digests()
        return 0
    if given.reference:
        reference(given.reference, given.folder)
        return 0
    table, versions = {}, {}
    names = [name for name in NETWORKS if name.startswith(given.only)]
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            there = [given.peers, __file__, f"--reference={name}", f"--folder={folder}"]
            done = subprocess.run(there, capture_output=True, text=True, check=False)
            if done.returncode:
                print(done.stderr)
                return 1
            versions = json.loads(done.stdout.splitlines()[-1])
            table[name] = compare(name, pathlib.Path(folder))
        print(f"{name:34} {table[name]['largest']:.1e} {table[name]['returned']}", flush=True)
    known = (
        json.loads(given.out.read_text())["networks"] if given.only and given.out.exists() else {}
    )
    result = {"bound": BOUND, "versions": versions, "networks": known | table}
    given.out.write_text(json.dumps(result, indent=1) + "\n")
    return int(any(row["largest"] > BOUND or not row["returned"] for row in table.values()))


if __name__ == "__main__":
    sys.exit(main())
