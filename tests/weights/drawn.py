"""Weights that two programs draw alike from names and shapes alone, and the networks to compare.

Needs NumPy only: `benchmarks/parity.py` runs this beside PyTorch.
"""

import zlib
from typing import Any, NamedTuple

import numpy as np

TOKENS = (
    *("cls_token", "dist_token", "reg_token", "pos_embed", "_token", "position_embeddings"),
    *("cls", "pos_embedding"),
)


def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Returns values for a parameter or buffer: none is trivial, gains are in [0.5, 1.5]."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    last = name.replace("/", ".").rpartition(".")[2]
    gains = last in ("weight", "gamma", "lambda1", "running_var", "scale")
    if last == "num_batches_tracked":
        return np.array(7)
    if gains and len(shape) == 1:
        values = rng.uniform(0.5, 1.5, shape)
    elif len(shape) < 2 or last.endswith(TOKENS):
        values = 0.2 * rng.normal(size=shape)
    else:
        inputs = shape[:-1] if "/" in name else shape[1:]
        values = rng.normal(size=shape) / np.sqrt(np.prod(inputs))
    return np.asarray(values, np.float32)


def images(side: int, number: int = 2) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(number, side, side, 3)).astype(np.float32)


def sample(stage: np.ndarray, number: int = 16) -> np.ndarray:
    """Returns values of one stage at places that are drawn from its size."""
    flat = stage.reshape(-1)
    places = np.random.default_rng(flat.size).choice(flat.size, min(number, flat.size), False)
    return flat[np.sort(places)].astype(np.float32)


class Case(NamedTuple):
    """A network of another library and ours.

    Attributes:
      reference: name of the network in timm, `module:function` that builds it, or
        `transformers:Config:Model`, which goes through a stored folder.
      options: its arguments there.
      model: module of `distill_jax.models`.
      kwargs: its arguments here.
      family: the table of names.
      stages: modules there whose outputs are compared, by the name of the output here.
      side: of the images.
    """

    reference: str
    options: dict[str, Any]
    model: str
    kwargs: dict[str, Any]
    family: str
    stages: dict[str, str]
    side: int = 64


def _stages(pattern: str, first: int, last: int, shift: int = 0, **more: str) -> dict[str, str]:
    named = {f"stage{i}": pattern.format(i + shift) for i in range(first, last + 1)}
    return {**named, **more}


def _resnet(name: str, shortcut: bool = False, **kwargs: Any) -> Case:
    family = "resnet-d/timm" if shortcut else "resnet/torchvision"
    stem = {"stem": "deep", "shortcut": "average"} if shortcut else {"stem": "imagenet"}
    return Case(
        name,
        {},
        "resnet_four_stages",
        {"variant": name.removesuffix("d"), **stem, **kwargs},
        family,
        _stages("layer{}", 1, 4, stem="act1"),
    )


def _inverted(name: str, model: str, stages: int, **kwargs: Any) -> Case:
    return Case(
        name,
        {},
        model,
        kwargs,
        f"{model}/timm",
        _stages("blocks.{}", 1, stages, -1, stem="bn1"),
    )


def _vit(name: str, depth: int, options: dict[str, Any], **kwargs: Any) -> Case:
    named = {f"block{i}": f"blocks.{i - 1}" for i in range(1, depth + 1)}
    given = {"depth": depth, "gelu": "exact", "variant": "tiny", **kwargs}
    if kwargs.get("distilled"):
        named |= {"class_logits": "head", "distilled_logits": "head_dist"}
    return Case(
        name,
        options,
        "vit",
        given,
        "vit/timm",
        named | {"tokens": "norm", "patches": "patch_embed"},
    )


_TF = {"padding": "same", "epsilon": 1e-3}
_CONVNEXT = _stages("stages.{}", 1, 4, -1, stem="stem")
_REGNET = _stages("s{}", 1, 4, stem="stem")
_SWIN = _stages("layers.{}", 1, 4, -1, stem="patch_embed")


def _torchvision(
    name: str, family: str, model: str, stages: dict[str, str], side: int = 64, **kwargs: Any
) -> Case:
    reference, family = f"torchvision.models:{name}", f"{family}/torchvision"
    return Case(reference, {}, model, kwargs, family, stages, side)


def _features(*last: int) -> dict[str, str]:
    """The stem and the stages that end at these members of `features`."""
    return {"stem": "features.0"} | {f"stage{s}": f"features.{i}" for s, i in enumerate(last, 1)}


_FOUR = _features(1, 3, 5, 7)
_BLOCKS = _stages("trunk_output.block{}", 1, 4, stem="stem")
_TORCHVISION = (
    _torchvision("mobilenet_v2", "mobilenet-v2", "mobilenet", _features(1, 3, 6, 10, 13, 16, 17)),
    _torchvision(
        "mobilenet_v3_large",
        "mobilenet-v3",
        "mobilenet",
        _features(1, 3, 6, 10, 12, 15),
        variant="v3_large",
        epsilon=1e-3,
    ),
    _torchvision(
        "mobilenet_v3_small",
        "mobilenet-v3",
        "mobilenet",
        _features(1, 3, 6, 8, 11),
        variant="v3_small",
        epsilon=1e-3,
    ),
    _torchvision(
        "efficientnet_b0",
        "efficientnet",
        "efficientnet",
        _features(*range(1, 8)),
        padding="symmetric",
        epsilon=1e-5,
    ),
    _torchvision(
        "efficientnet_b5",
        "efficientnet",
        "efficientnet",
        _features(*range(1, 8)),
        padding="symmetric",
        variant="b5",
        epsilon=1e-3,
    ),
    _torchvision("regnet_x_400mf", "regnet", "regnet", _BLOCKS, variant="x_400mf"),
    _torchvision("regnet_y_400mf", "regnet", "regnet", _BLOCKS, variant="y_004"),
    _torchvision("convnext_tiny", "convnext", "convnext", _FOUR, variant="tiny"),
    _torchvision(
        "vit_b_16",
        "vit",
        "vit",
        {f"block{i}": f"encoder.layers.encoder_layer_{i - 1}" for i in range(1, 13)}
        | {"tokens": "encoder.ln"},
        variant="base",
        depth=12,
        patch_size=16,
    )._replace(options={"image_size": 64}),
    _torchvision("resnet18", "resnet", "resnet_four_stages", _stages("layer{}", 1, 4)),
    _torchvision(
        "swin_transformer.SwinTransformer", "swin", "swin", _FOUR, side=128, window=4
    )._replace(
        options={
            "patch_size": [4, 4],
            "embed_dim": 96,
            "depths": [2, 2, 6, 2],
            "num_heads": [3, 6, 12, 24],
            "window_size": [4, 4],
        }
    ),
)

CASES = {
    case.reference: case
    for case in (
        *_TORCHVISION,
        _resnet("resnet18"),
        _resnet("resnet34"),
        _resnet("resnet50"),
        _resnet("resnet101"),
        _resnet("resnet152"),
        _resnet("resnet50d", True),
        _inverted("efficientnet_b0", "efficientnet", 7, padding="symmetric", epsilon=1e-5),
        _inverted("tf_efficientnet_b0", "efficientnet", 7, **_TF),
        _inverted("tf_efficientnet_b1", "efficientnet", 7, variant="b1", **_TF),
        _inverted("tf_efficientnet_lite0", "efficientnet", 7, variant="lite0", **_TF),
        _inverted("mobilenetv2_100", "mobilenet", 7),
        _inverted("mobilenetv3_large_100", "mobilenet", 6, variant="v3_large"),
        _inverted("mobilenetv3_small_100", "mobilenet", 5, variant="v3_small"),
        Case("regnetx_002", {}, "regnet", {"variant": "x_002"}, "regnet/timm", _REGNET),
        Case("regnety_004", {}, "regnet", {"variant": "y_004"}, "regnet/timm", _REGNET),
        Case("convnext_tiny", {}, "convnext", {"variant": "tiny"}, "convnext/timm", _CONVNEXT),
        Case(
            "convnextv2_atto",
            {},
            "convnext",
            {"variant": "atto", "version": 2},
            "convnext/timm",
            _CONVNEXT,
        ),
        _vit("vit_tiny_patch16_224", 12, {"img_size": 64}, variant="tiny", patch_size=16),
        _vit(
            "deit_tiny_distilled_patch16_224",
            12,
            {"img_size": 64},
            patch_size=16,
            distilled=True,
        ),
        _vit(
            "vit_small_patch14_reg4_dinov2",
            12,
            {"img_size": 56, "num_classes": 1000},
            width=384,
            heads=6,
            patch_size=14,
            registers=4,
            layer_scale=1e-5,
            class_position=False,
        )._replace(side=56),
        Case(
            "swin_tiny_patch4_window7_224",
            {"img_size": 64, "window_size": 4},
            "swin",
            {"variant": "tiny", "window": 4},
            "swin/timm",
            _SWIN,
        ),
    )
}


def _of_transformers(kind: str, model: str, options: dict[str, Any], **kwargs: Any) -> Case:
    sizes = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 256,
        "image_size": 32,
        "patch_size": 8,
        "num_labels": CLASSES,
    }
    return Case(
        f"transformers:{kind}Config:{model}",
        {**sizes, **options},
        "vit",
        {
            **{"width": 64, "depth": 2, "heads": 4, "patch_size": 8, "gelu": "exact"},
            **kwargs,
        },
        "",
        {"block1": "hidden_states.1", "tokens": "last_hidden_state"},
        side=32,
    )


CLASSES = 10
"""Of the last layers of `DIGESTS` and `FOLDERS`."""

FOLDERS = {
    "vit": _of_transformers("ViT", "ViTForImageClassification", {}, epsilon=1e-12)._replace(
        family="vit/transformers"
    ),
    "deit": _of_transformers(
        "DeiT", "DeiTForImageClassificationWithTeacher", {}, epsilon=1e-12, distilled=True
    )._replace(family="deit/transformers"),
    "dinov2": _of_transformers("Dinov2", "Dinov2Model", {}, layer_scale=1.0)._replace(
        family="dinov2-headless/transformers"
    ),
    "dinov2_registers": _of_transformers(
        "Dinov2WithRegisters",
        "Dinov2WithRegistersModel",
        {"num_register_tokens": 4},
        layer_scale=1.0,
        registers=4,
    )._replace(family="dinov2-headless/transformers"),
}
"""Folders of transformers."""

_CLIP = {"patch_bias": False, "pre_norm": True, "projection": 24, "epsilon": 1e-5}
_CLIP |= {"width": 64, "depth": 2, "heads": 4, "patch_size": 8, "gelu": "quick"}
_CLIP_IMAGES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "image_size": 32,
    "patch_size": 8,
    "projection_dim": 24,
}
_CLIP_TEXTS = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 96,
    "max_position_embeddings": 16,
}


def _clip(kind: str, model: str, options: dict[str, Any]) -> Case:
    stages = dict.fromkeys(("patches", "block1", "block2", "pooled", "embedding"), "")
    reference = f"transformers:{kind}:{model}"
    return Case(reference, options, "vit", _CLIP, "clip_image/transformers", stages, side=32)


FOLDERS |= {
    "clip_image": _clip("CLIPVisionConfig", "CLIPVisionModelWithProjection", _CLIP_IMAGES),
    "clip": _clip(
        "CLIPConfig",
        "CLIPModel",
        {"vision_config": _CLIP_IMAGES, "text_config": _CLIP_TEXTS, "projection_dim": 24},
    ),
}


def archive(name: str) -> dict[str, np.ndarray]:
    """Returns drawn weights by the names of Flax, those of the blocks one by one."""
    big = name.startswith("big_vision")
    second, at, to = ("1", 0, 0) if big else ("2", 1, 3)
    attention, mlp = f"MultiHeadDotProductAttention_{at}", f"MlpBlock_{to}"
    mean = name.endswith("mean")
    positions = "pos_embedding" if big else "Transformer/posembed_input/pos_embedding"
    shapes: dict[str, tuple[int, ...]] = {
        **({} if mean else {"cls": (1, 1, 64)}),
        positions: (1, 16 if big else 17, 64),
        **{"embedding/kernel": (8, 8, 3, 64), "embedding/bias": (64,)},
        "Transformer/encoder_norm/scale": (64,),
        "Transformer/encoder_norm/bias": (64,),
        "head/kernel": (64, CLASSES),
        "head/bias": (CLASSES,),
    }
    for i in range(2):
        block = f"Transformer/encoderblock_{i}"
        for n in ("0", second):
            shapes |= {f"{block}/LayerNorm_{n}/{x}": (64,) for x in ("scale", "bias")}
        for part in ("query", "key", "value"):
            shapes[f"{block}/{attention}/{part}/kernel"] = (64, 4, 16)
            shapes[f"{block}/{attention}/{part}/bias"] = (4, 16)
        shapes[f"{block}/{attention}/out/kernel"] = (4, 16, 64)
        shapes[f"{block}/{attention}/out/bias"] = (64,)
        for n, (a, b) in enumerate(((64, 256), (256, 64))):
            shapes[f"{block}/{mlp}/Dense_{n}/kernel"] = (a, b)
            shapes[f"{block}/{mlp}/Dense_{n}/bias"] = (b,)
    return {key: draw(key, shape) for key, shape in shapes.items()}


def stacked(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the weights of `archive` as newer files have them: all blocks in one array."""
    first, one, every = "Transformer/encoderblock_0/", "Transformer/encoderblock_", {}
    for name, array in weights.items():
        if name.startswith(first):
            last = name.removeprefix(first)
            rows = [weights[f"{one}{i}/{last}"] for i in range(2)]
            every[f"Transformer/encoderblock/{last}"] = np.stack(rows)
        elif not name.startswith(one):
            every[name] = array
    return every


def _archive(family: str, options: dict[str, Any], **kwargs: Any) -> Case:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4}
    case = _vit(
        "vit_tiny_patch16_224",
        2,
        {**sizes, "act_layer": "gelu_tanh", "num_classes": CLASSES, **options},
        **{"width": 64, "heads": 4, "patch_size": 8, "gelu": "tanh", **kwargs},
    )
    return case._replace(family=f"vit/{family}", side=32)


_MEAN = {"class_token": False, "global_pool": "avg", "fc_norm": False}
ARCHIVES = {
    "vision_transformer": _archive("vision_transformer", {}),
    "big_vision_class": _archive("big_vision", {"no_embed_class": True}, class_position=False),
    "big_vision_mean": _archive("big_vision", _MEAN, pool="mean", class_position=False),
}
"""Archives of Flax as timm reads them; those of big_vision have all blocks in one array."""


def _is_small(case: Case) -> bool:
    small = ("mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0", "regnet_y_400mf")
    return case.reference.endswith(small)


_NARROW_CONVNEXT = {"widths": (8, 16, 24, 32), "repeats": (1, 1, 2, 1)}
_NARROW_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 1}

DIGESTS = {
    "resnet18": _resnet("resnet18", max_depth=1)._replace(options={"layers": (1, 1, 1, 1)}),
    "resnet50d": _resnet("resnet50d", True, max_depth=1, width=16)._replace(
        options={"layers": (1, 1, 1, 1), "channels": (16, 32, 64, 128), "stem_width": 8}
    ),
    "efficientnet": Case(
        "timm.models.efficientnet:_gen_efficientnet",
        {
            "variant": "tf_efficientnet_b0",
            "channel_multiplier": 0.25,
            "depth_multiplier": 0.5,
            "pad_type": "same",
            "bn_eps": 1e-3,
        },
        "efficientnet",
        {"variant": "b0", "width_multiplier": 0.25, "depth_multiplier": 0.5},
        "efficientnet/timm",
        _stages("blocks.{}", 1, 7, -1, stem="bn1"),
        side=33,
    ),
    "mobilenet": _inverted("mobilenetv3_small_100", "mobilenet", 5, variant="v3_small"),
    "regnet": Case("regnety_002", {}, "regnet", {"variant": "y_002"}, "regnet/timm", _REGNET, 32),
    "convnext": Case(
        "convnext_atto",
        {"dims": (8, 16, 24, 32), "depths": (1, 1, 2, 1)},
        "convnext",
        {"variant": "atto", **_NARROW_CONVNEXT},
        "convnext/timm",
        _CONVNEXT,
    ),
    "convnext_v2": Case(
        "convnextv2_tiny",
        {"dims": (8, 16, 24, 32), "depths": (1, 1, 2, 1)},
        "convnext",
        {"variant": "tiny", "version": 2, **_NARROW_CONVNEXT},
        "convnext/timm",
        _CONVNEXT,
        side=70,
    ),
    "deit": _vit(
        "deit_tiny_distilled_patch16_224",
        2,
        _NARROW_VIT,
        width=64,
        heads=1,
        patch_size=8,
        distilled=True,
    )._replace(side=32),
    "dinov2": _vit(
        "vit_small_patch14_reg4_dinov2",
        2,
        {**_NARROW_VIT, "num_heads": 2, "num_classes": 10},
        width=64,
        heads=2,
        patch_size=8,
        registers=4,
        layer_scale=1e-5,
        class_position=False,
    )._replace(side=32),
    "swin": Case(
        "swin_tiny_patch4_window7_224",
        {"img_size": 48, "window_size": 4, "embed_dim": 32, "depths": (2, 2), "num_heads": (1, 2)},
        "swin",
        {"window": 4, "width": 32, "repeats": (2, 2), "heads": (1, 2)},
        "swin/timm",
        _stages("layers.{}", 1, 2, -1, stem="patch_embed"),
        side=48,
    ),
    **{
        f"torchvision/{case.family.split('/')[0]}": case for case in _TORCHVISION if _is_small(case)
    },
    "torchvision/vit": _torchvision(
        "VisionTransformer",
        "vit",
        "vit",
        {f"block{i}": f"encoder.layers.encoder_layer_{i - 1}" for i in (1, 2)}
        | {"tokens": "encoder.ln"},
        32,
        **{"variant": "tiny", "width": 64, "depth": 2, "heads": 1, "patch_size": 8},
        gelu="exact",
    )._replace(
        options={
            "image_size": 32,
            "patch_size": 8,
            "num_layers": 2,
            "num_heads": 1,
            "hidden_dim": 64,
            "mlp_dim": 256,
        }
    ),
    "torchvision/swin": _torchvision(
        "swin_transformer.SwinTransformer",
        "swin",
        "swin",
        _features(1, 3),
        48,
        **{"window": 4, "width": 32, "repeats": (2, 2), "heads": (1, 2)},
    )._replace(
        options={
            "patch_size": [4, 4],
            "embed_dim": 32,
            "depths": [2, 2],
            "num_heads": [1, 2],
            "window_size": [4, 4],
        }
    ),
}
"""Small networks whose outputs are stored, so that no other library is needed to compare."""
