"""What is exported: a pure function of named inputs, its weights and its description."""

import contextlib
import dataclasses
import importlib
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any

import jax
import numpy as np

from distill_jax.core.errors import ExportError, raised_at, text_of
from distill_jax.core.partition import named_leaves
from distill_jax.models import convolution

BATCH = "b"
"""Name of the first axis of every input and output."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """A network as it is exported.

    Attributes:
      function: `(weights, inputs) -> outputs`, pure; `inputs` and `outputs` are dicts of arrays
        `[b, ...]` by name.
      weights: nested dicts of host arrays.
      inputs: shape without the batch axis and type of each input, by name.
      metadata: description of the network, text by name.
    """

    function: Callable[[Any, Mapping[str, Any]], Mapping[str, Any]]
    weights: Any
    inputs: Mapping[str, jax.ShapeDtypeStruct]
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def named_weights(self) -> dict[str, np.ndarray]:
        """The weights by path, `layer/kernel`, in tree order."""
        return {name: np.asarray(x) for name, x in named_leaves(self.weights).items()}

    def traced(self, weights: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Calls the function, traced with standard convolutions."""
        with convolution.portable(True):
            return dict(self.function(weights, inputs))

    def batch(self, size: Any) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the inputs of a batch of `size`, a number or a symbol, as shapes."""
        return {
            name: jax.ShapeDtypeStruct((size, *spec.shape), spec.dtype)
            for name, spec in self.inputs.items()
        }


def symbolic_batch() -> Any:
    """Returns a symbol for the size of the batch."""
    return jax.export.symbolic_shape(BATCH)[0]


@contextlib.contextmanager
def any_batch() -> Iterator[None]:
    """Explains errors of networks that only work with a batch of known size.

    Raises:
      ExportError: the network uses the batch size as a Python number.
    """
    try:
        yield
    except (TypeError, jax.errors.InconclusiveDimensionOperation) as error:
        if "_DimExpr" not in str(error) and not isinstance(
            error, jax.errors.InconclusiveDimensionOperation
        ):
            raise
        raise ExportError(
            f"takes the size of the batch for a number: {text_of(error)}",
            where=f"the network ({raised_at(error)})",
            hint="write x.shape[0] in place of len(x), or -1 in reshape",
        ) from error


def require(module: str, *, extra: str, what: str) -> ModuleType:
    """Imports an optional package.

    Args:
      module: what to import.
      extra: extra of this package that installs it.
      what: format that needs it, for the message.

    Raises:
      ExportError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ExportError(
            f"{what} needs the package {module.partition('.')[0]}, which cannot be imported",
            where="formats",
            hint=f'pip install "distill_jax[{extra}]"',
        ) from error
