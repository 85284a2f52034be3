"""What images must look like for an imported network, as data that is stored with it."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from distill_jax.core.errors import ConfigError, nearest

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")
RANGES = ("uint8", "unit")
UPDATES = ("rgb", "bgr", "grey")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """From an image of any size to the input of a network.

    The shorter side is resized to `size / crop`, the centre of `size` by `size` is cut out, values
    are brought into `value_range`, and `mean` and `std` of each channel are removed.

    Attributes:
      size: side of the input in pixels.
      crop: share of the resized image's side that the centre has, 1 for no crop.
      interpolation: "nearest", "bilinear", "bicubic" or "lanczos".
      mean: of each channel, in units of `value_range`.
      std: of each channel, likewise.
      value_range: of `mean` and `std`: "uint8" for values in [0, 255], "unit" for [0, 1].
      channel_order: "rgb", "bgr" or "grey".
    """

    size: int
    crop: float = 1.0
    interpolation: str = "bicubic"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    value_range: str = "unit"
    channel_order: str = "rgb"

    def __post_init__(self):
        for name, known in (
            ("interpolation", INTERPOLATIONS),
            ("value_range", RANGES),
            ("channel_order", UPDATES),
        ):
            if (value := getattr(self, name)) not in known:
                raise ConfigError(f"no {name} {value!r}", where=name, hint=nearest(value, known))
        if not 0 < self.crop <= 1:
            raise ConfigError(f"crop is {self.crop!r}", where="crop", hint="above 0 and at most 1")
        if self.size < 1 or int(self.size) != self.size:
            raise ConfigError(f"size is {self.size!r}", where="size", hint="a number of pixels")
        if len(self.mean) != len(self.std) or min(self.std, default=0) <= 0:
            raise ConfigError(
                f"mean {self.mean} and std {self.std}",
                where="std",
                hint="one above 0 for each mean",
            )

    @property
    def resize(self) -> int:
        """Pixels of the shorter side before the crop."""
        return round(self.size / self.crop)

    def moments(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Returns mean and std of each channel on the scale [0, 1], as the transform normalize."""
        unit = 255.0 if self.value_range == "uint8" else 1.0
        return tuple(m / unit for m in self.mean), tuple(s / unit for s in self.std)

    def as_arguments(self) -> dict[str, Any]:
        """Returns the arguments of the transform `prepare`."""
        mean, std = self.moments()
        return {
            "size": self.size,
            "crop": self.crop,
            "interpolation": self.interpolation,
            "mean": mean,
            "std": std,
            "channel_order": self.channel_order,
        }

    def as_json(self) -> dict[str, Any]:
        """Returns plain values for a JSON file, which `from_json` reads."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in vars(self).items()}


def from_json(values: Mapping[str, Any]) -> Preprocessing:
    """Returns the card of `Preprocessing.as_json`.

    Raises:
      ConfigError: unknown names or values.
    """
    names = [field.name for field in dataclasses.fields(Preprocessing)]
    for name in values:
        if name not in names:
            raise ConfigError(
                f"no entry {name!r}", where="preprocessing", hint=nearest(name, names)
            )
    if "size" not in values:
        raise ConfigError("has no size", where="preprocessing", hint="the side of the input")
    plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return Preprocessing(**plain)


def from_timm(config: Mapping[str, Any]) -> Preprocessing:
    """Returns the card of a timm configuration: the `pretrained_cfg` of its `config.json`."""
    config = config.get("pretrained_cfg", config)
    given = {
        "crop": float(config.get("crop_pct") or 0.875),
        "interpolation": config.get("interpolation") or "bicubic",
        "mean": tuple(config.get("mean") or Preprocessing.mean),
        "std": tuple(config.get("std") or Preprocessing.std),
    }
    size = config.get("input_size") or (3, 224, 224)
    order = "grey" if size[0] == 1 else "rgb"
    return Preprocessing(size=int(size[-1]), channel_order=order, **given)


_RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
"""Pillow's numbers of its filters, which `transformers` stores."""


def from_transformers(config: Mapping[str, Any]) -> Preprocessing:
    """Returns the card of a `preprocessor_config.json` of `transformers`."""

    def side(value: Any) -> int:
        if isinstance(value, Mapping):
            return int(value.get("shortest_edge") or value.get("height") or 224)
        return int(value or 224)

    resized = side(config.get("size"))
    cropped = side(config.get("crop_size")) if config.get("do_center_crop") else resized
    if config.get("crop_pct") and not config.get("do_center_crop"):
        resized = round(cropped / config["crop_pct"])
    scale = config.get("rescale_factor", 1 / 255) if config.get("do_rescale", True) else 1.0
    normal = config.get("do_normalize", True)
    return Preprocessing(
        size=cropped,
        crop=min(1.0, cropped / resized),
        interpolation=_RESAMPLE.get(config.get("resample", 3), "bicubic"),
        mean=tuple(config.get("image_mean") or Preprocessing.mean) if normal else (0.0,) * 3,
        std=tuple(config.get("image_std") or Preprocessing.std) if normal else (1.0,) * 3,
        value_range="unit" if abs(scale * 255 - 1) < 1e-3 else "uint8",
    )
