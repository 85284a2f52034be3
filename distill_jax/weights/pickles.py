"""Interpreter of the pickles that `torch.save` writes for tensors in containers.

Nothing is imported, called or constructed on behalf of a file: a global is a name that is compared
with a short list, and everything else is refused by its name. Memory is bounded by the size of the
pickle: lengths are compared with what is left of it before they are read, containers are counted.

https://docs.python.org/3/library/pickletools.html has the operations.
"""

import struct
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from distill_jax.weights import common
from distill_jax.weights.common import WeightsError, shown

STORAGES = {
    "DoubleStorage": np.dtype("<f8"),
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": common.BFLOAT16,
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("bool"),
    "ComplexFloatStorage": np.dtype("<c8"),
    "ComplexDoubleStorage": np.dtype("<c16"),
}
"""Typed storages of PyTorch."""

DTYPES = {
    **{f"float{bits}": np.dtype(f"<f{bits // 8}") for bits in (16, 32, 64)},
    **{f"int{bits}": np.dtype(f"<i{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"uint{bits}": np.dtype(f"<u{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"complex{bits}": np.dtype(f"<c{bits // 8}") for bits in (64, 128)},
    "bool": np.dtype("bool"),
    "bfloat16": common.BFLOAT16,
    **{name: np.dtype(kind) for name, kind in common.FLOAT8.items()},
}
"""Dtypes of PyTorch, which untyped storages are read as."""

_UNTYPED = "torch.storage.UntypedStorage"
_ORDERED = "collections.OrderedDict"
_TENSOR = "torch._utils._rebuild_tensor_v2"
_TENSOR_1 = "torch._utils._rebuild_tensor"
_TENSOR_3 = "torch._utils._rebuild_tensor_v3"
_PARAMETER = "torch._utils._rebuild_parameter"

ALLOWED = {
    *(_UNTYPED, _ORDERED, _TENSOR, _TENSOR_1, _TENSOR_3, _PARAMETER),
    *(f"torch.{name}" for name in (*STORAGES, *DTYPES)),
}
"""Globals that a pickle may name."""

_INTEGER_BYTES = 16
SPARE = 4096

MAX_OPERATIONS = 2_000_000
"""Operations of a pickle; a tensor takes 40."""


class Global(NamedTuple):
    """The name of something in a Python module; never the thing itself."""

    name: str

    @property
    def dtype(self) -> np.dtype | None:
        """The dtype that it names."""
        return DTYPES.get(self.name.removeprefix("torch."))


class Ordered(dict):
    """An `OrderedDict` of a pickle: the one container that may have attributes."""

    __slots__ = ()


class Storage(NamedTuple):
    """A buffer of a pickle, which is elsewhere in the file.

    Attributes:
      key: its name.
      dtype: of its elements; None where tensors say it.
      numel: elements, of an untyped one bytes.
      offset: offset and number of elements within a larger storage, of old files.
      root: elements of that larger storage.
    """

    key: str
    dtype: np.dtype | None
    numel: int
    offset: int = 0
    root: int | None = None

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize if self.dtype is not None else 1


class Tensor(NamedTuple):
    """A tensor of a pickle; offset and strides are in elements."""

    storage: Storage
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Mark:
    __slots__ = ()


_MARK = _Mark()


class Machine:
    """Runs one pickle.

    Args:
      data: the pickle, and maybe more behind it.
      fail: makes the error of a message and a hint.

    Raises:
      WeightsError: it is damaged or has anything but tensors, containers, numbers and strings.
    """

    def __init__(self, data: memoryview, fail: Callable[..., WeightsError]):
        self._data, self._fail = data, fail
        self._at, self._containers = 0, 0
        self._stack: list[Any] = []
        self._memo: list[Any] = []

    def run(self) -> tuple[Any, int]:
        """Returns the object and the number of bytes of the pickle."""
        try:
            return self._run(), self._at
        except UnicodeDecodeError as error:
            raise self._fail("has a string in its pickle that is not UTF-8") from error

    def _run(self) -> Any:
        for _ in range(MAX_OPERATIONS):
            code = self._take(1)[0]
            if code == ord("."):
                value = self._pop()
                if self._stack:
                    raise self._damaged("ends with objects left over")
                return value
            step = _STEPS.get(code)
            if step is None:
                name = _REFUSED.get(code)
                what = f"the operation {name}" if name else f"an unknown operation 0x{code:02x}"
                raise self._fail(f"its pickle has {what}, which no file of weights needs", HINT)
            step(self)
        raise self._fail(f"its pickle has more than {MAX_OPERATIONS:,} operations", HINT)

    def _damaged(self, what: str) -> WeightsError:
        return self._fail(f"its pickle {what}", "a file that is not truncated or damaged")

    def _take(self, size: int) -> memoryview:
        if size > len(self._data) - self._at:
            raise self._damaged("is truncated")
        self._at += size
        return self._data[self._at - size : self._at]

    def _line(self) -> str:
        for end in range(self._at, min(len(self._data), self._at + 256)):
            if self._data[end] == ord("\n"):
                line = str(self._take(end - self._at), "utf-8")
                self._at += 1
                return line
        raise self._damaged("has a name without an end")

    def _number(self, size: int, *, signed: bool = False) -> int:
        return int.from_bytes(self._take(size), "little", signed=signed)

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _push_container(self, value: Any) -> None:
        self._count_containers(1)
        self._stack.append(value)

    def _count_containers(self, more: int) -> None:
        self._containers += more
        if self._containers > len(self._data) // 8 + SPARE:
            raise self._damaged("has more containers than one of tensors can have")

    def _pop(self) -> Any:
        if not self._stack or self._stack[-1] is _MARK:
            raise self._damaged("takes an object where there is none")
        return self._stack.pop()

    def _pop_to_mark(self) -> list[Any]:
        for i in range(len(self._stack) - 1, -1, -1):
            if self._stack[i] is _MARK:
                values = self._stack[i + 1 :]
                del self._stack[i:]
                return values
        raise self._damaged("takes objects where there are none")

    def _top(self, kind: type) -> Any:
        if not self._stack or not isinstance(self._stack[-1], kind):
            raise self._damaged(f"puts items into something else than a {kind.__name__}")
        return self._stack[-1]

    def _proto(self) -> None:
        if self._take(1)[0] > 5:
            raise self._damaged("is of an unknown version")

    def _frame(self) -> None:
        if self._number(8) > len(self._data) - self._at:
            raise self._damaged("is truncated")

    def _long(self, size: int) -> None:
        if size > _INTEGER_BYTES:
            raise self._fail(f"its pickle has an integer of {size} bytes", HINT)
        self._push(self._number(size, signed=True))

    def _text(self, size: int) -> None:
        self._push(str(self._take(size), "utf-8"))

    def _float(self) -> None:
        self._push(struct.unpack(">d", self._take(8))[0])

    def _put(self, index: int) -> None:
        if not self._stack or self._stack[-1] is _MARK:
            raise self._damaged("remembers an object where there is none")
        if index > len(self._memo):
            raise self._damaged("remembers objects out of order")
        if index == len(self._memo):
            self._memo.append(self._stack[-1])
        else:
            self._memo[index] = self._stack[-1]

    def _get(self, index: int) -> None:
        if index >= len(self._memo):
            raise self._damaged("recalls an object that it does not have")
        self._push(self._memo[index])

    def _append(self) -> None:
        value = self._pop()
        self._top(list).append(value)

    def _appends(self) -> None:
        values = self._pop_to_mark()
        self._top(list).extend(values)

    def _set(self, values: list[Any]) -> None:
        target = self._top(dict)
        if len(values) % 2:
            raise self._damaged("has a key without a value")
        for key, value in zip(values[::2], values[1::2], strict=True):
            if key is not None and type(key) not in (str, int, float, bool):
                raise self._fail(f"its pickle has a dictionary key that is a {kind_of(key)}", HINT)
            if key in target:
                raise self._fail(f"its pickle has the name {shown(key)} twice", "each name once")
            target[key] = value

    def _set_one(self) -> None:
        value = self._pop()
        self._set([self._pop(), value])

    def _tuple(self, size: int) -> None:
        values = [self._pop() for _ in range(size)]
        self._push_container(tuple(values[::-1]))

    def _dict(self) -> None:
        values = self._pop_to_mark()
        self._push_container({})
        self._set(values)

    def _global(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise self._damaged("names something by other than strings")
        full = f"{module}.{name}"
        if full not in ALLOWED:
            raise self._fail(f"its pickle names {shown(full)}, which is refused", HINT)
        self._push(Global(full))

    def _stack_global(self) -> None:
        name = self._pop()
        self._global(self._pop(), name)

    def _persistent(self) -> None:
        self._push(self._storage(self._pop()))

    def _storage(self, key: Any) -> Storage:
        """Returns the storage of ("storage", type, key, location, numel[, view])."""
        if not isinstance(key, tuple) or not key or key[0] != "storage":
            what = key[0] if isinstance(key, tuple) and key else key
            raise self._fail(f"its pickle refers to {shown(what)}, which is no storage", HINT)
        if len(key) not in (5, 6) or not isinstance(key[1], Global):
            raise self._damaged("has a storage that is not described as one")
        kind, name, numel = key[1].name, key[2], key[4]
        if kind != _UNTYPED and kind.removeprefix("torch.") not in STORAGES:
            raise self._damaged(f"has a storage of {shown(kind)}")
        dtype = None if kind == _UNTYPED else STORAGES[kind.removeprefix("torch.")]
        if type(name) is int:  # of early versions
            name = str(name)
        if not isinstance(name, str) or not _count(numel):
            raise self._damaged("has a storage that is not described as one")
        view = key[5] if len(key) == 6 else None
        if view is None:
            return Storage(name, dtype, numel)
        if not (isinstance(view, tuple) and len(view) == 3 and _count(view[1]) and _count(view[2])):
            raise self._damaged("has a view of a storage that is not described as one")
        if view[1] + view[2] > numel:
            raise self._damaged(f"has a view beyond the end of storage {shown(name)}")
        return Storage(name, dtype, view[2], view[1], numel)

    def _reduce(self) -> None:
        args = self._pop()
        what = self._pop()
        if not isinstance(what, Global) or not isinstance(args, tuple):
            raise self._fail(f"its pickle calls a {kind_of(what)}", HINT)
        if what.name == _ORDERED:
            return self._ordered(args)
        if what.name == _PARAMETER:
            if len(args) != 3 or not isinstance(args[0], Tensor) or not _no_hooks(args[2]):
                raise self._damaged("has a parameter that is not described as one")
            return self._push(args[0])
        if what.name in (_TENSOR, _TENSOR_1, _TENSOR_3):
            return self._push_container(self._tensor(what.name, args))
        raise self._fail(f"its pickle calls {shown(what.name)}, which is refused", HINT)

    def _ordered(self, args: tuple) -> None:
        if args and not (len(args) == 1 and isinstance(args[0], list)):
            raise self._damaged("has an OrderedDict of something else than pairs")
        pairs = args[0] if args else []
        self._count_containers(len(pairs))  # a list that is recalled gives many dictionaries
        if not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs):
            raise self._damaged("has an OrderedDict of something else than pairs")
        self._push_container(Ordered())
        self._set([value for pair in pairs for value in pair])

    def _tensor(self, name: str, args: tuple) -> Tensor:
        """Returns the tensor of (storage, offset, size, stride[, requires_grad, hooks, ...])."""
        least, most = {_TENSOR_1: (4, 4), _TENSOR: (6, 7), _TENSOR_3: (7, 8)}[name]
        if not least <= len(args) <= most or not isinstance(args[0], Storage):
            raise self._damaged("has a tensor that is not described as one")
        storage, offset, shape, strides = args[:4]
        if isinstance(shape, tuple) and len(shape) > common.MAX_DIMENSIONS:
            raise self._fail(
                f"has a tensor of {len(shape)} dimensions",
                f"at most {common.MAX_DIMENSIONS} dimensions",
            )
        if not (
            _count(offset)
            and isinstance(strides, tuple)
            and isinstance(shape, tuple)
            and len(shape) == len(strides)
            and all(map(_count, (*shape, *strides)))
        ):
            raise self._fail(
                f"has a tensor in storage {shown(storage.key)} of offset {shown(offset)}, shape "
                f"{shown(shape)} and strides {shown(strides)}",
                "integers from zero, one stride for each dimension",
            )
        if name != _TENSOR_1 and not _no_hooks(args[5]):
            raise self._fail("has a tensor with hooks, which are code", HINT)
        metadata = args[6] if name == _TENSOR and len(args) == 7 else None
        metadata = args[7] if name == _TENSOR_3 and len(args) == 8 else metadata
        if metadata:
            raise self._fail(
                f"has a tensor in storage {shown(storage.key)} that is stored as a conjugate or "
                "negative",
                "tensors saved after .resolve_conj() and .resolve_neg()",
            )
        dtype = storage.dtype
        if name == _TENSOR_3:
            dtype = args[6].dtype if isinstance(args[6], Global) else None
        if dtype is None or (name == _TENSOR_3 and storage.dtype is not None):
            raise self._damaged("has a tensor without a dtype")
        return Tensor(storage, dtype, offset, shape, strides)

    def _build(self) -> None:
        state = self._pop()
        self._top(Ordered)
        if not isinstance(state, dict) or any(key != "_metadata" for key in state):
            raise self._fail("its pickle sets attributes, which are refused", HINT)

    def _drop(self) -> None:
        if not self._stack:
            raise self._damaged("drops an object where there is none")
        self._stack.pop()


def _count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _no_hooks(value: Any) -> bool:
    return value is None or (isinstance(value, dict) and not value)


def kind_of(value: Any) -> str:
    names = {Global: "name", Ordered: "OrderedDict", Storage: "storage", Tensor: "tensor"}
    return names.get(type(value), type(value).__name__)


HINT = (
    "a state dict of tensors, saved by torch.save(model.state_dict(), path) or as safetensors; "
    "pickles of other objects are never run"
)

_STEPS: Mapping[int, Callable[[Machine], None]] = {
    ord(code): step
    for code, step in {
        "\x80": Machine._proto,
        "\x95": Machine._frame,
        "(": lambda m: m._push(_MARK),
        "0": Machine._drop,
        "1": lambda m: m._pop_to_mark() and None,
        "N": lambda m: m._push(None),
        "\x88": lambda m: m._push(True),
        "\x89": lambda m: m._push(False),
        "J": lambda m: m._push(m._number(4, signed=True)),
        "K": lambda m: m._push(m._number(1)),
        "M": lambda m: m._push(m._number(2)),
        "\x8a": lambda m: m._long(m._number(1)),
        "\x8b": lambda m: m._long(m._number(4)),
        "G": Machine._float,
        "X": lambda m: m._text(m._number(4)),
        "\x8c": lambda m: m._text(m._number(1)),
        "\x8d": lambda m: m._text(m._number(8)),
        "U": lambda m: m._text(m._number(1)),  # strings of Python 2
        "T": lambda m: m._text(m._number(4)),
        "]": lambda m: m._push_container([]),
        "l": lambda m: m._push_container(m._pop_to_mark()),
        "a": Machine._append,
        "e": Machine._appends,
        ")": lambda m: m._push(()),
        "t": lambda m: m._push_container(tuple(m._pop_to_mark())),
        "\x85": lambda m: m._tuple(1),
        "\x86": lambda m: m._tuple(2),
        "\x87": lambda m: m._tuple(3),
        "}": lambda m: m._push_container({}),
        "d": Machine._dict,
        "s": Machine._set_one,
        "u": lambda m: m._set(m._pop_to_mark()),
        "q": lambda m: m._put(m._number(1)),
        "r": lambda m: m._put(m._number(4)),
        "\x94": lambda m: m._put(len(m._memo)),
        "h": lambda m: m._get(m._number(1)),
        "j": lambda m: m._get(m._number(4)),
        "c": lambda m: m._global(m._line(), m._line()),
        "\x93": Machine._stack_global,
        "Q": Machine._persistent,
        "R": Machine._reduce,
        "b": Machine._build,
    }.items()
}

_REFUSED = {
    **{ord(code): name for code, name in {"i": "INST", "o": "OBJ", "2": "DUP"}.items()},
    **{ord("\x81"): "NEWOBJ", ord("\x92"): "NEWOBJ_EX", ord("P"): "PERSID"},
    **{ord("\x82"): "EXT1", ord("\x83"): "EXT2", ord("\x84"): "EXT4"},
    **{ord("B"): "BINBYTES", ord("C"): "SHORT_BINBYTES", ord("\x8e"): "BINBYTES8"},
    **{ord("\x96"): "BYTEARRAY8", ord("\x97"): "NEXT_BUFFER", ord("\x98"): "READONLY_BUFFER"},
    **{ord("\x8f"): "EMPTY_SET", ord("\x90"): "ADDITEMS", ord("\x91"): "FROZENSET"},
    **{ord("I"): "INT", ord("L"): "LONG", ord("F"): "FLOAT", ord("S"): "STRING"},
    **{ord("V"): "UNICODE", ord("p"): "PUT", ord("g"): "GET"},
}
