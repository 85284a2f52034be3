"""Pickles in weight files that are damaged, or that would run code, are refused; none is loaded.

Each that would run code is real: were it loaded, it would touch a file, its canary.
"""

import os
import pickle
import struct
import tracemalloc

import numpy as np
import pytest

from distill_jax import weights
from distill_jax.weights import common
from tests.weights import files
from tests.weights.files import FACTOR, refused

# Pickles that would run code. Each is real: the standard library would touch the canary.


class Calls:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def touch(path):
    return f"open({str(path)!r}, 'w').close()"


def hooked(canary):
    """A tensor whose hooks are the result of a call."""
    call = pickle.dumps(Calls(exec, touch(canary)), 2)[2:-1]
    return files.state(a=files.rebuilt(hooks=b"(" + call + b"t"))


def nested(canary):
    """A call within the arguments of an allowed one."""
    call = pickle.dumps([("a", Calls(os.system, f"touch {canary}"))], 2)[2:-1]
    return b"\x80\x02" + files.name("collections", "OrderedDict") + call + b"\x85R."


def stacked(canary):
    """STACK_GLOBAL with a dotted name."""
    call = files.text("torch") + files.text("hub.os.system")
    return b"\x80\x04" + call + b"\x93" + files.text(f"touch {canary}") + b"\x85R."


def assembled(canary):
    """A name taken from the memo, put together of pieces."""
    return (
        b"\x80\x04\x8c\x08builtins\x94\x8c\x04exec\x94h\x00h\x01\x93"
        + files.text(touch(canary))
        + b"\x85R."
    )


def by_state(canary):
    """BUILD with a state that would set attributes."""
    target = files.name("collections", "OrderedDict") + b")R"
    return b"\x80\x02" + target + b"}" + files.text("__class__") + files.text("x") + b"sb."


def by_instance(canary):
    return b"(S'" + touch(canary).replace("'", '"').encode() + b"'\nibuiltins\nexec\n."


def by_object(canary):
    call = files.name("builtins", "exec") + files.text(touch(canary))
    return b"\x80\x02(" + call + b"o."


def by_new_object(canary):
    return b"\x80\x02" + files.name("subprocess", "Popen") + files.text("x") + b"\x85\x81."


def by_persistent(canary):
    module = files.text("module") + files.name("torch", "FloatStorage") + files.text("source")
    return b"\x80\x02(" + module + files.text(touch(canary)) + b"tQ."


def persistent_call(canary):
    """A call in place of the kind of a storage."""
    call = pickle.dumps(Calls(eval, touch(canary)), 2)[2:-1]
    return b"\x80\x02(" + files.text("storage") + call + files.text("0") + b"tQ."


def import_in_import(canary):
    return pickle.dumps(Calls(__import__("importlib").import_module, "antigravity"), 2)


def call_of_storage(canary):
    return b"\x80\x02" + files.name("torch", "FloatStorage") + files.integer(1 << 40) + b"\x85R."


def call_of_text(canary):
    return b"\x80\x02" + files.text("os.system") + files.text("x") + b"\x85R."


PICKLES = {
    "os.system": (lambda c: pickle.dumps(Calls(os.system, f"touch {c}"), 2), r"posix\.system"),
    "exec": (lambda c: pickle.dumps({"a": Calls(exec, touch(c))}, 2), r"builtin.*\.exec"),
    "eval, protocol 4": (lambda c: pickle.dumps([Calls(eval, touch(c))], 4), r"builtins\.eval"),
    "open": (lambda c: pickle.dumps(Calls(open, str(c), "w"), 2), r"io\.open"),
    "getattr": (lambda c: b"\x80\x02cbuiltins\ngetattr\n.", r"builtins\.getattr"),
    "importlib": (import_in_import, r"importlib\.import_module"),
    "nested": (nested, r"posix\.system"),
    "hooks": (hooked, r"builtin.*\.exec"),
    "torch.load": (lambda c: b"\x80\x02ctorch.serialization\nload\n.", r"serialization\.load"),
    "torch.hub": (lambda c: b"\x80\x02ctorch.hub\nload\n.", r"torch\.hub\.load"),
    "torch.jit": (lambda c: b"\x80\x02c__torch__.model\nNet\n.", r"__torch__\.model\.Net"),
    "rebuild of a type": (
        lambda c: b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n.", "_rebuild_from_type_v2"),
    "dotted": (stacked, r"torch\.hub\.os\.system"),
    "assembled": (assembled, r"builtins\.exec"),
    "numpy": (lambda c: pickle.dumps(np.float64(1), 2), r"numpy.*scalar"),
    "build": (by_state, "sets attributes"),
    "inst": (by_instance, "operation STRING"),
    "obj": (by_object, r"builtins\.exec"),
    "newobj": (by_new_object, r"subprocess\.Popen"),
    "ext": (lambda c: b"\x80\x02\x82\x01.", "operation EXT1"),
    "module": (by_persistent, "refers to 'module'"),
    "call in a storage": (persistent_call, r"builtin.*\.eval"),
    "call of a storage": (call_of_storage, r"calls 'torch\.FloatStorage'"),
    "call of a string": (call_of_text, "calls a str"),
    "escape": (lambda c: b"\x80\x02c\x1b[2J\nx\n.", r"\\x1b\[2J\.x"),
}  # fmt: skip


@pytest.mark.parametrize("container", [files.pth, files.legacy])
@pytest.mark.parametrize("case", PICKLES)
def test_pickles_that_would_run_code(case, container, tmp_path):
    make, match = PICKLES[case]
    canary = tmp_path / "canary"
    (tmp_path / "w.pth").write_bytes(container(make(canary)))
    refused(tmp_path / "w.pth", match)
    assert not canary.exists()


def test_the_canary_is_touched_by_what_the_tests_refuse(tmp_path):
    """Else they would show nothing."""
    for case in ("os.system", "exec", "eval, protocol 4", "open", "nested", "assembled", "obj"):
        canary = tmp_path / case.replace(" ", "")
        found = pickle.loads(PICKLES[case][0](canary))
        if case == "open":
            found.close()
        assert canary.exists(), case


# Pickles that are damaged, or that ask for more than they have.

TENSOR = files.rebuilt


def plain(data):
    return b"\x80\x02" + data + b"."


DAMAGED = {
    "length beyond the end": (plain(b"X\xff\xff\xff\x7fabc"), "truncated"),
    "length of 8 bytes": (b"\x80\x04\x8d" + b"\xff" * 8 + b"a.", "truncated"),
    "bytearray of 1 TB": (b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b".", "BYTEARRAY8"),
    "frame of 1 TB": (b"\x80\x04\x95" + struct.pack("<Q", 1 << 40) + b"N.", "truncated"),
    "memo of 4 billion": (plain(b"Nr\xff\xff\xff\xff"), "out of order"),
    "memo that is empty": (plain(b"h\x07"), "recalls"),
    "integer of 1 MB": (plain(b"\x8b\x00\x00\x10\x00" + b"\x01" * (1 << 20)), "1048576 bytes"),
    "pop of nothing": (plain(b"0"), "drops"),
    "append to nothing": (plain(b"Na"), "something else than a list"),
    "mark without items": (plain(b"u"), "takes objects where there are none"),
    "mark taken as an item": (plain(b"(\x85"), "takes an object where there is none"),
    "key without a value": (plain(b"}(Nu"), "key without a value"),
    "key of a list": (plain(b"}(]Nu"), "dictionary key that is a list"),
    "name twice": (plain(b"}(" + 2 * (files.text("a") + TENSOR()) + b"u"), "'a' twice"),
    "name twice by nesting": (
        plain(b"}(" + files.text("a.b") + TENSOR() + files.text("a") + b"}" + files.text("b")
              + TENSOR() + b"su"), "two values of the name 'a.b'"),
    "number and text as names": (
        plain(b"}(K\x01" + TENSOR() + files.text("1") + TENSOR() + b"u"), "two values of the name"),
    "contains itself": (plain(b"]q\x00h\x00a"), "contain themselves"),
    "two objects": (plain(b"NN"), "left over"),
    "no end": (b"\x80\x02N", "truncated"),
    "unknown operation": (plain(b"\xff"), "unknown operation 0xff"),
    "version": (b"\x80\x09N.", "unknown version"),
    "name without an end": (plain(b"c" + b"a" * 999), "name without an end"),
    "set": (plain(b"\x8f"), "EMPTY_SET"),
    "bytes": (b"\x80\x04C\x01a.", "SHORT_BINBYTES"),
    "100,000 lists": (plain(b"(" + b"]" * 10**5 + b"l"), "more containers"),
    "100,000 tuples": (plain(b"N" + b"\x85" * 10**5), "more containers"),
    "not UTF-8": (plain(b"X\x01\x00\x00\x00\xff"), "not UTF-8"),
    "storage as a value": (plain(files.storage()), "has storage where a tensor belongs"),
    "class as a value": (plain(files.name("torch", "FloatStorage")), "has name where a tensor"),
    "shape of text": (
        plain(TENSOR(shape=(4,)).replace(files.numbers((4,)), files.text("four"))), "shape 'four'"),
    "negative size": (plain(TENSOR(shape=(-4,))), r"shape \(-4,\)"),
    "negative offset": (plain(TENSOR(offset=-1)), "offset -1"),
    "negative stride": (plain(TENSOR(strides=(-1,))), "strides"),
    "offset beyond the end": (plain(TENSOR(offset=1)), "element 4 of storage '0', which has 4"),
    "stride beyond the end": (plain(TENSOR(shape=(2,), strides=(4,))), "element 4 of storage"),
    "huge offset": (plain(TENSOR(offset=2**61)), "element 23058430"),
    "two strides": (plain(TENSOR(strides=(1, 1))), "one stride for each dimension"),
    "65 dimensions": (plain(TENSOR(shape=(1,) * 65, strides=(1,) * 65)), "65 dimensions"),
    "expanded to 4 TB": (plain(TENSOR(shape=(2**40,), strides=(0,))), "add up to more than 4 TiB"),
    "expanded beyond memory": (plain(TENSOR(shape=(2**61,), strides=(0,))), "no memory can hold"),
    "empty beyond memory": (
        plain(TENSOR(shape=(0, 2**61), strides=(1, 1))), "no memory can hold"),
    "conjugate": (
        plain(TENSOR(more=b"}" + files.text("conj") + b"\x88s")), "conjugate or negative"),
    "hooks that are there": (
        plain(TENSOR(hooks=b"]" + files.text("ab") + b"K\x01\x86a\x85")), "hooks"),
    "typed storage of version 3": (
        plain(TENSOR(function="_rebuild_tensor_v3", more=files.name("torch", "uint16"))), "dtype"),
    "quantised": (plain(files.storage(kind=("torch", "QInt8Storage"))), r"torch\.QInt8Storage"),
    "parameter of nothing": (
        plain(files.name("torch._utils", "_rebuild_parameter") + b"N\x88N\x87R"), "parameter"),
    "numel beyond counting": (plain(TENSOR(files.storage(numel=2**70))), "not described as one"),
}  # fmt: skip


@pytest.mark.parametrize("container", [files.pth, files.legacy])
@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_pickles(case, container, tmp_path):
    data, match = DAMAGED[case]
    content = container(data)
    (tmp_path / "w.pth").write_bytes(content)
    refused(tmp_path / "w.pth", match)


def test_shared_containers_do_not_multiply(tmp_path):
    """Thirty lists, each of which has the one before twice, would have a billion leaves."""
    data = (
        b"\x80\x02]N"
        + b"a"
        + b"".join(
            bytes([ord("q"), i]) + b"0](" + bytes([ord("h"), i, ord("h"), i]) + b"e"
            for i in range(30)
        )
    )
    (tmp_path / "w.pth").write_bytes(files.pth(data + b"."))
    refused(tmp_path / "w.pth", "contain themselves or are nested too deeply")


def test_long_names_do_not_multiply(tmp_path):
    """A name of 100 KB over 10,000 values would make names of a gigabyte."""
    values = b"(N" + b"]" + b"K\x01" * 10**4 + b"l"
    for inner in (values, b"](" + b"NN]" * 3000 + b"e"):
        (tmp_path / "w").write_bytes(files.pth(files.state(**{"k" * 10**5: inner})))
        refused(tmp_path / "w", "contain themselves or are nested too deeply")


def recalled(value, use, times):
    """A pickle that builds a value once and uses it many times."""
    return b"\x80\x02" + value + b"q\x000](" + (use * times) + b"e."


PAIRS = b"](" + b"".join(files.text(f"{i:03x}") + b"K\1\x86" for i in range(2000)) + b"e"
SHAPE = b"(" + b"K\1" * 2000 + b"t"
RECALLED = {
    "list of numbers": (b"](" + b"K\1" * 2000 + b"e", b"h\0", "nested too deeply"),
    "tuple of numbers": (SHAPE, b"h\0", "nested too deeply"),
    "pairs": (PAIRS, files.name("collections", "OrderedDict") + b"h\0\x85R", "more containers"),
    "shape": (
        SHAPE,
        files.rebuilt().replace(files.numbers((4,)), b"h\0"),
        "2000 dimensions",
    ),
}


@pytest.mark.parametrize("case", RECALLED)
def test_what_is_recalled_does_not_multiply(case, tmp_path):
    """Two thousand items, two thousand times: work and memory of four million."""
    value, use, match = RECALLED[case]
    (tmp_path / "w").write_bytes(files.pth(recalled(value, use, 2000)))
    refused(tmp_path / "w", match)


@pytest.mark.parametrize("place", ["shape", "persistent"])
def test_nested_containers_in_messages(place, tmp_path):
    """Forty lists, each of which has the one before twice, cannot be written out."""
    tree = b"]" + b"".join(b"q" + bytes([i]) + b"0](h" + bytes([i]) + b"h" + bytes([i]) + b"e"
                           for i in range(40))  # fmt: skip
    deep = b"N" + b"\x85" * 3000
    for value in (tree, deep):
        if place == "shape":
            data = files.rebuilt().replace(files.numbers((4,)), value)
        else:
            data = b"(" + value + b"tQ"
        (tmp_path / "w").write_bytes(files.pth(b"\x80\x02" + data + b"."))
        refused(tmp_path / "w", "shape" if place == "shape" else "no storage")


def test_a_long_name_does_not_widen_the_table(tmp_path):
    header = {f"{i}": files.tensor(4 * i, 4 * i + 4) for i in range(300)}
    header["x" * 10**5] = files.tensor(1200, 1204)
    (tmp_path / "w").write_bytes(files.safetensors(header, b"\0" * 1204))
    assert len(weights.summary(weights.read(tmp_path / "w"))) < 60_000


@pytest.mark.parametrize(
    "item",
    [b"K\x01", b"N", b"M\xff\xff", b"\x8c\x02ab", b"\x8c\x02ab\x94", b"G" + b"\1" * 8, b")"],
)
def test_lists_of_plain_values_take_a_multiple_of_the_file(item, tmp_path):
    data = b"\x80\x04}" + files.text("list") + b"](" + item * 20000 + b"es."
    (tmp_path / "w").write_bytes(files.pth(data))
    tracemalloc.start()
    try:
        weights.read(tmp_path / "w")
    except weights.WeightsError as error:
        assert item == b")" and "nested too deeply" in str(error)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < FACTOR * (tmp_path / "w").stat().st_size + common.SLACK // 8


def test_dictionaries_take_a_multiple_of_the_file(tmp_path):
    entries = b"".join(b"\x8c\x04" + f"{i:04x}".encode() + b"K\x01" for i in range(10000))
    (tmp_path / "w").write_bytes(files.pth(b"\x80\x04}(" + entries + b"u."))
    tracemalloc.start()
    found = weights.read(tmp_path / "w")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.metadata["00ff"] == 1 and len(found.metadata) == 10000
    assert peak < FACTOR * (tmp_path / "w").stat().st_size + common.SLACK // 8
