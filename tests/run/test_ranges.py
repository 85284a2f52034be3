"""Every number of every module that a config can name has a range, checked when it is bound."""

import inspect
import typing

import pytest

from distill_jax.core import ranges
from distill_jax.core.errors import ConfigError
from distill_jax.data.transforms import registry
from distill_jax.run import resolve

RUN = {  # what a run provides
    "num_classes": 4,
    "num_examples": 100,
    "total_steps": 100,
    "steps_per_epoch": 5.0,
    "image_size": 16,
    "cardinalities": (3, 4),
}
NEEDED = {
    "projector": {"features": 8},
    "transformer": {"vocabulary": 8, "head": "none"},
    "prototypes": {"count": 8},
    "block_masks": {"patch_size": 4},
    "patch_masks": {"patch_size": 4},
    "random_masks": {"patch_size": 4},
    "tube_masks": {"patch_size": 4},
    "masked_thought": {"vocabulary": 8},
    "denoise": {"vocabulary": 20, "first": 8},
    "denoised_views": {"vocabulary": 20, "first": 8},
    "refinement": {"end": 8},
    "coarse_labels": {"groups": (0, 0, 1, 1)},
    "views": {"transforms": ()},
    "local_views": {"transforms": ()},
    "normalize": {"mean": 0.5, "std": 0.5},
}
NEGATIVE = {  # may be below 0
    "bias": "of a logit",
    "fill": "a colour, also of a standardized image",
    "floor": "of a log-probability",
    "mean": "of anything",
    "threshold": "a colour",
    "groups": "checked against the classes of the data",
    "grid": "a tuple, tested with the models",
    "seed": "of nested_coteaching: any whole number",
    "low": "checked together with high",
    "mask_token": "of masked_thought: -1 is a random id",
    "end": "of the transformer: -1 is the largest id of the sequence",
}
SHARES = ("dropout", "drop_path", "momentum", "centre_decay", "probability", "label_smoothing")
BUILT_ONE_BY_ONE = ("depth", "rounds", "cross_layers", "experts", "order", "count", "draws")
ELSEWHERE = {"prototypes"}  # its count is a size


def holds(hint, kinds):
    return hint in kinds or any(holds(part, kinds) for part in typing.get_args(hint))


def makers():
    for package in ("objectives", "weighting", "models", "evaluators"):
        for name in resolve.available(package):
            yield name, resolve.resolve(package, name, where="name")
    yield from registry.builders().items()


def numbers():
    for name, make in makers():
        hints = resolve._hints(make)
        for key, parameter in inspect.signature(make).parameters.items():
            hint = hints.get(key)
            if key not in RUN and hint is not bool and holds(hint, (int, float)):
                nested = typing.get_origin(hint) is tuple
                size = len(parameter.default) if nested and parameter.default else 1
                yield pytest.param(name, make, key, nested and size, id=f"{name}.{key}")


def make_with(name, make, key, value, size):
    value = (value,) * size if size else value
    kwargs = {**NEEDED.get(name, {}), key: value}
    return resolve.bind(make, kwargs, where="kwargs", provided=RUN)()


@pytest.mark.parametrize(("name", "make", "key", "size"), list(numbers()))
def test_a_number_out_of_range_is_refused(name, make, key, size):
    hostile = ["x"]
    if key not in NEGATIVE:
        hostile.append(-1)
    if key in SHARES:
        hostile += [2.0, -0.5]
    if key in BUILT_ONE_BY_ONE and name not in ELSEWHERE:
        hostile.append(10**9)
    for value in hostile:
        with pytest.raises(ConfigError) as error:
            make_with(name, make, key, value, size)
        assert key in str(error.value) or "size" in str(error.value), value


@pytest.mark.parametrize(
    ("interval", "fits", "refused"),
    [
        ("[0, 1)", [0, 0.5, 0.999], [-0.1, 1, 1.0, float("nan"), float("inf"), "x", None, True]),
        ("(0, inf)", [1e-9, 1e30], [0, -1, float("inf"), float("nan")]),
        ("[1, 5]", [1, 5, (1, 2)], [0, 6, (1, 6), (1, "x")]),
    ],
)
def test_intervals(interval, fits, refused):
    for value in fits:
        ranges.within(interval, number=value)
    for value in refused:
        if value is None:
            ranges.within(interval, number=value)  # left out
            continue
        with pytest.raises(ConfigError, match=r"^group\.number: number is"):
            ranges.within(interval, where="group", number=value)


def test_whole_numbers():
    ranges.sizes(width=3)
    ranges.counts(width=0)
    for value in (0, 1.5, 2.0, True, "3"):
        with pytest.raises(ConfigError, match="a whole number, 1 or more"):
            ranges.sizes(width=value)
