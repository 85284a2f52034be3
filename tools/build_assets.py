"""Rebuilds the data that ships inside the package from the original files.

    python tools/build_assets.py --fashion-mnist /usr/share/datasets/fashion-mnist

The folder holds the four original idx files (plain or .gz), for example from Debian's package
dataset-fashion-mnist. The script checks published facts about the complete data set before it
cuts, and prints the sha256 of what it writes; with --check it writes nothing and compares. The
bytes of the .npz depend on the zlib that compresses it, the digest of the arrays does not.
"""

import argparse
import hashlib
import io
import sys
from pathlib import Path

import numpy as np

from distill_jax.data import fashion_mnist_5k, idx_folder, source

ASSETS = Path(source.__file__).parent / "assets"
PER_CLASS = {"train": 500, "test": 100}


def first_per_class(labels: np.ndarray, count: int) -> np.ndarray:
    """Returns the positions of the first `count` examples of each class, in the original order."""
    chosen = [np.flatnonzero(labels == label)[:count] for label in np.unique(labels)]
    return np.sort(np.concatenate(chosen))


def cut_fashion_mnist(root: str | Path) -> dict[str, np.ndarray]:
    """Returns the arrays of Fashion-MNIST-5k/1k after checking the originals.

    Counts are those of the data set's README; mean and standard deviation of the training images
    are the published 0.2860 and 0.3530.
    """
    arrays = {}
    for part, (images, labels) in idx_folder.read_folder(root).items():
        total = 6000 if part == "train" else 1000
        if np.bincount(labels).tolist() != [total] * 10 or images.shape[1:] != (28, 28):
            raise SystemExit(f"{root}: the {part} part is not that of Fashion-MNIST")
        if part == "train":
            moments = images.mean() / 255, images.std() / 255
            if not np.allclose(moments, (0.28604, 0.35302), atol=5e-6):
                raise SystemExit(f"{root}: mean and deviation {moments}, not 0.28604 and 0.35302")
        sha256 = source.digest({"input": images[..., None], "label": labels})
        print(f"original {part}: n {len(labels)}, sha256 of arrays {sha256}")
        chosen = first_per_class(labels, PER_CLASS[part])
        arrays[f"x_{part}"], arrays[f"y_{part}"] = images[chosen], labels[chosen]
    return arrays


def npz_bytes(arrays: dict[str, np.ndarray]) -> bytes:
    """Returns a compressed .npz; NumPy dates its entries 1980, so equal arrays give equal bytes."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # pyright: ignore[reportArgumentType]
    return buffer.getvalue()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--fashion-mnist", required=True, metavar="FOLDER")
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    args = parser.parse_args()
    arrays = cut_fashion_mnist(args.fashion_mnist)
    content = npz_bytes(arrays)
    sha256 = hashlib.sha256(content).hexdigest()
    path = ASSETS / fashion_mnist_5k.ASSET
    print(f"{path.name}: {len(content)} bytes, sha256 {sha256}")
    print(f"{path.name}: sha256 of arrays {source.digest(arrays)}")
    if args.check:
        same = path.read_bytes() == content
        print("identical to the file in the package" if same else "DIFFERS from the file")
        return 0 if same else 1
    ASSETS.mkdir(exist_ok=True)
    path.write_bytes(content)
    if sha256 != fashion_mnist_5k.SHA256:
        print(f"set SHA256 in {fashion_mnist_5k.__name__} to {sha256}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
