"""Writes the fixtures of `tests/weights` with the real PyTorch and safetensors.

In an environment that has them (they are no dependency of this project):

    python tools/build_weight_fixtures.py

The values are formulas, which `tests/weights/test_values.py` computes again with NumPy.
"""

import collections
import json
import pathlib

import safetensors.torch
import torch

FOLDER = pathlib.Path(__file__).parents[1] / "tests" / "weights" / "fixtures"


def ramp(*shape: int) -> torch.Tensor:
    """Returns 0, 1, 2, ... in float32."""
    size = torch.Size(shape).numel()
    return torch.arange(size, dtype=torch.float32).reshape(shape)


def tensors() -> dict[str, torch.Tensor]:
    """Returns a tensor of every kind that the readers treat differently."""
    base = ramp(4, 6)
    return {
        "plain": ramp(2, 3) / 4,
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "float64": ramp(3).double() / 8,
        "float16": (ramp(5) / 2).half(),
        "bfloat16": (ramp(5) - 2).bfloat16(),
        "int8": torch.tensor([-128, -1, 0, 127], dtype=torch.int8),
        "uint8": torch.tensor([0, 255], dtype=torch.uint8),
        "int16": torch.tensor([-32768, 32767], dtype=torch.int16),
        "int32": torch.tensor([-(2**31), 2**31 - 1], dtype=torch.int32),
        "int64": torch.tensor([-(2**63), 2**63 - 1]),
        "bool": torch.tensor([[True, False], [False, True]]),
        "complex64": torch.complex(ramp(2), -ramp(2)),
        "float8_e4m3fn": (ramp(4) / 2).to(torch.float8_e4m3fn),
        "float8_e5m2": (ramp(4) / 2).to(torch.float8_e5m2),
        "uint16": torch.tensor([0, 65535]).to(torch.uint16),
        "transposed": base.t(),
        "window": base[1:3, 2::2],
        "base": base,
        "expanded": ramp(3)[:, None].expand(3, 4),
    }


class Model(torch.nn.Module):
    """Two layers, a buffer, and weights of two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(3, 4)
        self.norm = torch.nn.BatchNorm1d(4)
        self.second = torch.nn.Linear(3, 4, bias=False)
        self.second.weight = self.first.weight
        with torch.no_grad():
            for i, leaf in enumerate(self.parameters()):
                leaf.copy_(ramp(*leaf.shape) + i)


def main() -> None:
    """Writes all fixtures."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    found = tensors()
    torch.save(found, FOLDER / "kinds.pth")
    torch.save(found, FOLDER / "kinds_protocol4.pth", pickle_protocol=4)
    torch.save(found, FOLDER / "kinds_legacy.pth", _use_new_zipfile_serialization=False)
    model = Model()
    checkpoint = {
        "model": model.state_dict(),
        "parameters": [model.first.weight, (model.first.bias,)],
        "epoch": 3,
        "best": 0.25,
        "name": "naïve",
        "flags": {"ema": True, "resumed": None},
        "dtype": torch.bfloat16,
        "ordered": collections.OrderedDict(a=1),
    }
    torch.save(checkpoint, FOLDER / "checkpoint.pth")
    torch.save(checkpoint, FOLDER / "checkpoint_legacy.pt", _use_new_zipfile_serialization=False)
    own = {name: leaf.contiguous().clone() for name, leaf in found.items()}
    safetensors.torch.save_file(own, FOLDER / "kinds.safetensors", metadata={"format": "pt"})
    names, shards = sorted(own), FOLDER / "sharded"
    shards.mkdir(exist_ok=True)
    parts = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for file, part in parts.items():
        safetensors.torch.save_file({name: own[name] for name in part}, shards / file)
    index = {
        "metadata": {"total_size": sum(t.numel() * t.element_size() for t in own.values())},
        "weight_map": {name: file for file, part in parts.items() for name in part},
    }
    (shards / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


if __name__ == "__main__":
    main()
