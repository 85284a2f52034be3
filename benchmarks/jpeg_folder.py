"""How many JPEG files a second the package reads, decodes and crops to 224 pixels.

  python benchmarks/jpeg_folder.py --out=benchmarks/results/jpeg_folder.json

Files are windows of the two photographs that come with scikit-learn, 500 x 375 pixels (about the
mean of ImageNet), 1000 x 750 and 4000 x 3000, saved with quality 90. `image_folder` decodes them
when they are read, and the stream loader (grain) reads batches ahead on threads. A rate per core is
one over the processor time of an example, which other programs on the machine affect little; `wall`
has the examples per second that were seen. `pillow` is the bare decoding of the same files, all
their pixels, in one thread.
"""

import argparse
import io
import os
import pathlib
import tempfile
import time
from typing import Any

import _record
import numpy as np

SIZES, FILES, BATCH, SIDE = ((500, 375), (1000, 750), (4000, 3000)), 32, 16, 224
THREADS = (0, 2)
SECONDS = 2.0


def make_folder(root: pathlib.Path, size: tuple[int, int]) -> int:
    """Writes the files in folders of two classes and returns their mean number of bytes."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    generator, total = np.random.default_rng(0), 0
    for name, pixels in zip("ab", load_sample_images().images, strict=True):
        (root / name).mkdir(parents=True)
        photo = Image.fromarray(pixels)
        for i in range(FILES // 2):
            width = int(generator.integers(300, 500))
            height = width * size[1] // size[0]
            x = int(generator.integers(0, photo.width - width))
            y = int(generator.integers(0, photo.height - height))
            window = photo.crop((x, y, x + width, y + height)).resize(size)
            data = io.BytesIO()
            window.save(data, "JPEG", quality=90)
            total += len(data.getvalue())
            (root / name / f"{i}.jpg").write_bytes(data.getvalue())
    return total // FILES


def rates(step: Any, examples: int) -> dict[str, float]:
    """Repeats a step of so many examples; returns examples a second of wall and processor time."""
    step()
    began, used, count = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - began < SECONDS:
        step()
        count += examples
    wall, cpu = time.perf_counter() - began, time.process_time() - used
    return {"wall": round(count / wall, 1), "per_core": round(count / cpu, 1)}


def measure(size: tuple[int, int]) -> dict[str, Any]:
    """Returns the rates for files of one size."""
    from PIL import Image

    from distill_jax.data import image_folder, loader

    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        found: dict[str, Any] = {"mean_bytes": make_folder(root, size)}
        files = [path.read_bytes() for path in sorted(root.glob("*/*.jpg"))]

        def decode() -> None:
            for content in files:
                Image.open(io.BytesIO(content)).load()

        found["pillow"] = rates(decode, len(files))
        dataset = image_folder.make(
            path=folder, size=SIDE, mode="rgb", resident_bytes=0, test_fraction=0.1, held_out=0.0
        )
        train = dataset.parts["train"]
        found["threads"] = {}
        for threads in THREADS:
            stream = loader.StreamLoader(train, batch_size=BATCH, seed=0, num_threads=threads)
            batches = iter(stream)
            found["threads"][threads] = rates(lambda batches=batches: next(batches), BATCH)
            batches.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=pathlib.Path)
    options = parser.parse_args()
    report = {
        "results": {f"{w}x{h}": measure((w, h)) for w, h in SIZES},
        "side": SIDE,
        "batch": BATCH,
        "files": FILES,
        "seed": 0,
        "cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg(),
        "versions": _record.versions("jax", "grain", "numpy", "pillow"),
    }
    _record.write(report, options.out, show=True)


if __name__ == "__main__":
    main()
