"""Writer of safetensors; the reader is `distill_jax.weights`.

https://github.com/huggingface/safetensors#format
"""

import json
from collections.abc import Mapping

import numpy as np

from distill_jax.core.errors import ExportError

_NAMES = {
    **{f"{k}{b}": f"{low}{b // 8}" for k, low in (("I", "i"), ("U", "u")) for b in (8, 16, 32, 64)},
    **{f"F{b}": f"f{b // 8}" for b in (16, 32, 64)},
    "BOOL": "b1",
}
_OF_KIND = {kind: name for name, kind in _NAMES.items()}


def to_safetensors(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> bytes:
    """Returns a safetensors file of arrays by name.

    Args:
      tensors: arrays of booleans, integers or floats, and bfloat16.
      metadata: text by name.

    Raises:
      ExportError: an array of another type.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    parts, at = [], 0
    # Wide types first, so that every tensor is aligned.
    for name in sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name)):
        x = np.asarray(tensors[name])
        kind = "BF16" if x.dtype.name == "bfloat16" else _OF_KIND.get(x.dtype.str[1:])
        if kind is None:
            raise ExportError(f"safetensors holds no {x.dtype}", where=name)
        data = x.astype(x.dtype.newbyteorder("<"), copy=False).tobytes()
        header[name] = {"dtype": kind, "shape": x.shape, "data_offsets": [at, at + len(data)]}
        parts.append(data)
        at += len(data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + b"".join(parts)
