"""The readers agree with PyTorch and safetensors, where those are installed."""

import collections

import numpy as np
import pytest

from distill_jax import weights
from tests.weights import files, test_values

torch = pytest.importorskip("torch")
safetensors_torch = pytest.importorskip("safetensors.torch")


def bits(tensor):
    """The bytes of a tensor, in order of its elements."""
    whole = tensor.detach().clone(memory_format=torch.contiguous_format).reshape(-1)
    return whole.view(torch.uint8).numpy().tobytes()


def assert_same(path, tensors):
    found = weights.read(path)
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert found[name].shape == tuple(tensor.shape), name
        assert f"torch.{found[name].dtype.name}" == str(tensor.dtype), name
        assert np.ascontiguousarray(found[name]).tobytes() == bits(tensor), name


DTYPES = (
    *("float16", "float32", "float64", "bfloat16", "complex64", "complex128", "bool"),
    *(f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)),
    *("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"),
)


def tensors(seed):
    """Random tensors of random dtypes, shapes and views, some of one storage."""
    source = np.random.default_rng(seed)
    found = {}
    for i in range(8):
        dtype = getattr(torch, str(source.choice(DTYPES)))
        shape = tuple(int(n) for n in source.integers(1, 5, source.integers(0, 4)))
        raw = torch.from_numpy(source.integers(0, 2, (*shape, 16), dtype=np.uint8))
        whole = raw[..., 0].to(dtype) if dtype == torch.bool else raw.view(dtype)[..., 0].clone()
        found[f"t{i}"] = whole
        if shape:
            found[f"t{i}.view"] = whole.transpose(0, -1)[int(source.integers(0, 2)) :: 2]
        found[f"t{i}.again"] = whole
    return found


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize(
    "how",
    [{}, {"_use_new_zipfile_serialization": False}, {"pickle_protocol": 3}, {"pickle_protocol": 5}],
    ids=str,
)
def test_torch_save(seed, how, tmp_path):
    saved = tensors(seed)
    torch.save(saved, tmp_path / "w.pth", **how)
    assert_same(tmp_path / "w.pth", saved)


@pytest.mark.parametrize("seed", range(10))
def test_safetensors(seed, tmp_path):
    saved = {
        name: tensor.clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors(seed).items()
        if tensor.dtype != torch.complex128  # which safetensors lacks
    }
    safetensors_torch.save_file(saved, tmp_path / "w", metadata={"a": "b"})
    assert_same(tmp_path / "w", saved)
    assert weights.read(tmp_path / "w").metadata == {"a": "b"}


def test_a_big_endian_archive_is_read_as_torch_reads_it(tmp_path):
    path = tmp_path / "big.pth"
    path.write_bytes(test_values.swapped((files.FIXTURES / "kinds.pth").read_bytes()))
    old = {"float8_e4m3fn", "float8_e5m2", "uint16"}  # torch does not swap untyped storages
    theirs = torch.load(path, weights_only=True)
    found = weights.read(path)
    for name, tensor in theirs.items():
        if name not in old:
            assert np.ascontiguousarray(found[name]).tobytes() == bits(tensor), name


def test_parameters_modules_and_optimizers(tmp_path):
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 3, 5, 5)).sum().backward()
    optimizer.step()
    everything = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "parameters": collections.OrderedDict(model.named_parameters()),
    }
    for legacy in (False, True):
        torch.save(everything, tmp_path / "w", _use_new_zipfile_serialization=not legacy)
        found = weights.read(tmp_path / "w")
        for name, tensor in model.state_dict().items():
            assert found[f"model.{name}"].tobytes() == bits(tensor)
        moment = optimizer.state_dict()["state"][0]["exp_avg"]
        assert found["optimizer.state.0.exp_avg"].tobytes() == bits(moment)
        assert found.metadata["optimizer.param_groups.0.lr"] == 1e-3
        assert found.metadata["optimizer.param_groups.0.betas"] == (0.9, 0.999)
        assert found.metadata["optimizer.param_groups.0.params"] == (0, 1, 2, 3)
        assert ("model.0.weight", "parameters.0.weight") in found.tied


def test_what_torch_refuses_too(tmp_path):
    """A whole module is a pickle of classes."""
    torch.save(torch.nn.Linear(2, 2), tmp_path / "w")
    with pytest.raises(weights.WeightsError, match=r"names 'torch\.nn\.modules\.linear\.Linear'"):
        weights.read(tmp_path / "w")
    torch.save(torch.ones(2, dtype=torch.complex64).conj(), tmp_path / "w")
    with pytest.raises(weights.WeightsError, match="conjugate"):
        weights.read(tmp_path / "w")
    torch.save(torch.ones(3).to_sparse(), tmp_path / "w")
    with pytest.raises(weights.WeightsError, match="_rebuild_sparse_tensor"):
        weights.read(tmp_path / "w")
