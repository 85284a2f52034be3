"""Tables of names: what is moved, what is refused, and the way back."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from distill_jax.core.errors import UserError
from distill_jax.weights import cards, layouts
from distill_jax.weights.mapping import Family, MappingError, Rule, apply_map, invert_map
from distill_jax.weights.patterns import compiled

TOY = Family(
    name="toy/there",
    model="toy",
    signature=("stem.weight",),
    rules=(
        Rule("stem", "stem", "conv"),
        Rule("layer{s}.bn{c}", "stage{s-1}/norm{c}", "batch_norm"),
        Rule("layer{s}.{part=up|down}", "stage{s-1}/{part}", "linear"),
        Rule(("q", "k", "v"), "mix", "qkv"),
        Rule("fused", ("a", "b"), "linear_io"),
        Rule("positions", "positions", "positions"),
        Rule("fc", "head", "linear"),
    ),
    first="stem.weight",
    optional=("mask",),
    tied={"out.weight": "fc.weight"},
)
SIZES = {"heads": 2}


def source(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {
        "stem.weight": (4, 3, 5, 5),
        "layer1.bn1.weight": (4,),
        "layer1.bn1.bias": (4,),
        "layer1.bn1.running_mean": (4,),
        "layer1.bn1.running_var": (4,),
        "layer1.up.weight": (6, 4),
        "layer2.down.weight": (4, 6),
        "q.weight": (4, 6),
        "k.weight": (4, 6),
        "v.weight": (4, 6),
        "q.bias": (4,),
        "k.bias": (4,),
        "v.bias": (4,),
        "fused.weight": (5, 8),
        "positions": (1, 5, 3),
        "fc.weight": (7, 4),
        "fc.bias": (7,),
    }
    weights = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    counter = {"layer1.bn1.num_batches_tracked": np.array(3)}
    return weights | counter | {"out.weight": weights["fc.weight"]}


def network(**changes):
    params = {
        "stem/kernel": (5, 5, 3, 4),
        "stage0/norm1/scale": (4,),
        "stage0/norm1/bias": (4,),
        "stage0/up/kernel": (4, 6),
        "stage1/down/kernel": (6, 4),
        "mix/kernel": (6, 12),
        "mix/bias": (12,),
        "a/kernel": (5, 4),
        "b/kernel": (5, 4),
        "positions": (1, 5, 3),
        "head/kernel": (4, 7),
        "head/bias": (7,),
        "mask": (2,),
        **changes,
    }
    state = {"batch_stats/stage0/norm1/mean": (4,), "batch_stats/stage0/norm1/var": (4,)}

    def filled(shapes):
        arrays = {name: np.full(shape, 9, np.float32) for name, shape in shapes.items() if shape}
        return unflatten_dict(arrays, sep="/")

    return filled(params), filled(state)


def test_every_tensor_comes_to_its_place():
    weights = source()
    params, state, report = apply_map(weights, TOY, *network(), sizes=SIZES)
    at: dict[str, Any] = {**flatten_dict(params, sep="/"), **flatten_dict(state, sep="/")}
    np.testing.assert_array_equal(at["stem/kernel"][1, 2, 0], weights["stem.weight"][:, 0, 1, 2])
    np.testing.assert_array_equal(at["stage1/down/kernel"], weights["layer2.down.weight"].T)
    np.testing.assert_array_equal(
        at["batch_stats/stage0/norm1/var"], weights["layer1.bn1.running_var"]
    )
    # columns of `mix` go by head, then query, key, value, each of two
    np.testing.assert_array_equal(
        at["mix/bias"][:4], [*weights["q.bias"][:2], *weights["k.bias"][:2]]
    )
    np.testing.assert_array_equal(at["mix/kernel"][:, 10:], weights["v.weight"].T[:, 2:])
    np.testing.assert_array_equal(at["b/kernel"], weights["fused.weight"][:, 4:])
    np.testing.assert_array_equal(at["mask"], [9, 9])
    assert report.kept == ("mask",) and report.tensors == 17 and report.dtypes == {"float32": 17}
    assert set(report.ignored) == {"out.weight", "layer1.bn1.num_batches_tracked"}


def test_the_way_back_gives_what_came():
    weights = source()
    params, state, _ = apply_map(weights, TOY, *network(mask=None), sizes=SIZES)
    back = invert_map(params, state, TOY, sizes=SIZES)
    assert set(back) == set(weights)
    for name, array in weights.items():
        if not name.endswith("num_batches_tracked"):
            np.testing.assert_array_equal(back[name], array, err_msg=name)


def test_parameters_without_a_name_there_are_listed():
    with pytest.raises(MappingError, match="no names for 'mask'"):
        invert_map(*network(), TOY, sizes=SIZES)


def ones(*shape):
    return np.ones(shape, np.float32)


def changed(**changes):
    weights = source() | changes
    return {name: array for name, array in weights.items() if array is not None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer1.up.weight": ones(5, 4)}, "'layer1.up.weight' .*, and 'stage0/up/kernel' is"),
        ({"extra.weight": ones(3)}, "1 of the file have no place: 'extra.weight'"),
        ({"layer3.up.weight": ones(6, 4)}, "would be stage2/up/kernel"),
        ({"layer1.bn1.running_var": None}, "no tensor: 'batch_stats/stage0/norm1/var'"),
        ({"k.weight": None}, "lacks 'k.weight', which 'q.weight' goes with"),
        ({"fc.weight": ones(9, 4), "out.weight": None}, 'head="replace"'),
        ({"fc.bias": np.ones(7, np.int8)}, "'fc.bias' is int8"),
        ({"fc.bias": np.ones(7, ml_dtypes.float8_e4m3fn)}, "'fc.bias' is float8_e4m3fn"),
        ({"out.weight": ones(7, 4)}, "'out.weight' should be 'fc.weight'"),
        ({"positions": ones(1, 6, 3)}, "no square grid"),
        ({"stem.weight": ones(4, 3, 5, 4)}, "'stem.weight'.*'stem/kernel'"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(changes, message):
    with pytest.raises(MappingError, match=message):
        apply_map(changed(**changes), TOY, *network(), sizes=SIZES)


def test_sizes_that_shapes_do_not_tell_are_asked_for():
    with pytest.raises(MappingError, match="depends on 'heads'"):
        apply_map(source(), TOY, *network())


@pytest.mark.parametrize("dtype", ["float16", "float64", ml_dtypes.bfloat16])
def test_other_floats_are_converted(dtype):
    weights = {n: a if a.dtype == int else a.astype(dtype) for n, a in source().items()}
    params, _, report = apply_map(weights, TOY, *network(), sizes=SIZES)
    assert params["head"]["bias"].dtype == np.float32
    np.testing.assert_array_equal(params["head"]["bias"], weights["fc.bias"].astype(np.float32))
    assert [*report.dtypes] == [np.dtype(dtype).name]


def test_heads_are_replaced():
    template = network(**{"head/kernel": (4, 2), "head/bias": (2,)})
    params, _, report = apply_map(source(), TOY, *template, sizes=SIZES, head="replace")
    np.testing.assert_array_equal(params["head"]["kernel"], np.full((4, 2), 9))
    assert report.replaced == ("head/kernel", "head/bias")


@pytest.mark.parametrize("channels", [1, 4, 6])
def test_first_convolutions_adapt_to_other_channels(channels):
    template = network(**{"stem/kernel": (5, 5, channels, 4)})
    weights = source()
    params, _, report = apply_map(weights, TOY, *template, sizes=SIZES)
    kernel = params["stem"]["kernel"]
    assert "3 channels to" in report.adapted[0]
    if channels != 4:  # a constant image gives what it gave
        expected = weights["stem.weight"].sum((1, 2, 3))
        np.testing.assert_allclose(kernel.sum((0, 1, 2)), expected, rtol=1e-4, atol=1e-5)
    else:
        np.testing.assert_allclose(kernel[:, :, 3], kernel[:, :, 0])


def test_positions_are_resized_to_another_grid():
    weights = source() | {"positions": np.arange(15, dtype=np.float32).reshape(1, 5, 3)}
    params, _, report = apply_map(weights, TOY, *network(positions=(1, 17, 3)), sizes=SIZES)
    resized = params["positions"][0, 1:].reshape(4, 4, 3)
    assert "positions" in report.adapted[0]
    np.testing.assert_array_equal(params["positions"][0, 0], [0, 1, 2])
    np.testing.assert_allclose(resized, -resized[::-1, ::-1] + 2 * resized.mean((0, 1)), rtol=1e-5)
    other = layouts.resize_grid(ones(3, 3, 2), (5, 2))
    np.testing.assert_allclose(other, 1, rtol=1e-6)


@pytest.mark.parametrize(
    ("side", "first"),
    [
        (6, [0.8764895, 0.7371405, 0.1151156, -1.351046, -0.2801883, 1.096727]),
        (3, [0.6285824, -0.4577016, 0.3693332, 0.1637587, 0.1885616, 0.03163055]),
    ],
)
def test_positions_are_resized_as_timm_does(side, first):
    """Stored values of `timm.layers.resample_abs_pos_embed` (timm 1.0.31, torch 2.14.1)."""
    positions = np.random.default_rng(1).normal(size=(1, 17, 1)).astype(np.float32)
    resize = layouts.LAYOUTS["positions"].resize
    assert resize is not None
    found = resize(positions, (1, side * side + 1, 1), {})
    np.testing.assert_allclose(found[0, 1:7, 0], first, rtol=0, atol=2e-6)


def test_a_prefix_chooses_one_of_several_networks():
    weights = source()
    both = {f"model.{n}": a for n, a in weights.items()}
    both |= {f"ema.{n}": 2 * a for n, a in weights.items()}
    params, _, report = apply_map(both, TOY, *network(), sizes=SIZES, prefix="ema.")
    np.testing.assert_array_equal(params["head"]["bias"], 2 * weights["fc.bias"])
    assert len(report.outside) == len(weights)


@pytest.mark.parametrize(
    ("template", "name", "fields"),
    [
        ("a{i}.{j}", "a10.2", {"i": 10, "j": 2}),
        ("a{i+1}", "a3", {"i": 2}),
        ("a{i-1}", "a3", {"i": 4}),
        ("a{i+1}", "a0", None),
        ("a{i}.b{i}", "a1.b2", None),
        ("a{i}.b{i+1}", "a1.b2", {"i": 1}),
        ("{x=up|down}.w", "down.w", {"x": "down"}),
        ("{x=up|down}.w", "side.w", None),
        ("a{i}", "a1.b", None),
    ],
)
def test_patterns_read_what_they_write(template, name, fields):
    pattern = compiled(template)
    assert pattern.match(name) == fields
    assert fields is None or pattern.format(fields) == name


def test_cards_are_stored_and_read_back():
    card = cards.Preprocessing(
        size=224, crop=0.875, mean=(127.0,) * 3, std=(128.0,) * 3, value_range="uint8"
    )
    assert cards.from_json(card.as_json()) == card and card.resize == 256
    timm = {
        "input_size": [3, 288, 288],
        "crop_pct": 0.95,
        "interpolation": "bicubic",
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
    }
    assert cards.from_timm({"pretrained_cfg": timm}).mean == (0.5,) * 3
    vit = {
        "size": {"height": 224, "width": 224},
        "resample": 2,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    assert cards.from_transformers(vit) == cards.Preprocessing(
        size=224, interpolation="bilinear", mean=(0.5,) * 3, std=(0.5,) * 3
    )
    clip = {
        "size": {"shortest_edge": 256},
        "do_center_crop": True,
        "crop_size": {"height": 224, "width": 224},
    }
    assert cards.from_transformers(clip).resize == 256


@pytest.mark.parametrize(
    ("entry", "message"),
    [({"sise": 3}, "did you mean 'size'"), ({}, "no size"), ({"size": 3, "std": [0, 1, 1]}, "std"),
     ({"size": 3, "interpolation": "cubic"}, "bicubic"), ({"size": 3, "crop": 2.0}, "at most 1")],
)  # fmt: skip
def test_cards_with_mistakes_are_refused(entry, message):
    with pytest.raises(UserError, match=message):
        cards.from_json(entry)
