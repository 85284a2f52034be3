"""Names become functions, keyword arguments are checked before anything is called."""

import dataclasses
import functools
import sys
import typing

import pytest
from ml_collections import ConfigDict

from distill_jax.core.errors import ConfigError
from distill_jax.run import resolve as resolve_lib
from distill_jax.run.resolve import bind, resolve


def refusal(function, *args, **kwargs):
    with pytest.raises(ConfigError) as error:
        function(*args, **kwargs)
    return str(error.value)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of four modules, put in the place of `distill_jax.toys`."""
    import distill_jax

    folder = tmp_path / "toys"
    (folder / "nested").mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "robot.py").write_text("def make(*, arms: int = 2): return arms\n")
    (folder / "nested" / "__init__.py").write_text("class Doll: pass\nmake = Doll\n")
    (folder / "broken.py").write_text("import a_package_that_is_absent\ndef make(): pass\n")
    (folder / "faulty.py").write_text("1 / 0\ndef make(): pass\n")
    (folder / "shared.py").write_text("def shared(): pass\n")
    (folder / "_private.py").write_text("def make(): pass\n")
    monkeypatch.setattr(distill_jax, "__path__", [*distill_jax.__path__, str(tmp_path)])
    yield folder
    for name in [name for name in sys.modules if name.startswith("distill_jax.toys")]:
        del sys.modules[name]


def test_a_name_is_the_make_of_its_module():
    from distill_jax.objectives import kd

    assert resolve("objectives", "kd", where="objective.name") is kd.make


@pytest.mark.parametrize(
    "name", ["collections:OrderedDict", "os.path:join", "json:JSONDecoder.decode"]
)
def test_a_dotted_name_is_a_symbol(name):
    module, _, symbol = name.partition(":")
    found = resolve("models", name, where="roles.student.model", trusted={name})
    assert found.__qualname__.endswith(symbol.split(".")[-1]), module


def test_available_names_are_read_without_importing(package):
    assert resolve_lib.available("toys") == ["broken", "faulty", "nested", "robot"]
    assert not {"distill_jax.toys.robot", "distill_jax.toys.broken"} & set(sys.modules)
    assert resolve("toys", "robot", where="toy")(arms=3) == 3
    assert resolve("toys", "nested", where="toy").__name__ == "Doll"


def test_an_unknown_name_lists_what_exists(package):
    message = refusal(resolve, "toys", "robbot", where="toy.name")
    assert message.startswith("toy.name: unknown toy 'robbot'\n  did you mean 'robot'?")
    assert "available: broken, faulty, nested, robot" in message
    for name in ("shared", "_private", "", "nested.inner", "robot.make"):
        assert "toy.name" in refusal(resolve, "toys", name, where="toy.name")
    message = refusal(resolve, "objectives", "tgeo", where="objective.name")
    assert message.startswith("objective.name: unknown objective 'tgeo'") and "kd" in message


@pytest.mark.parametrize(
    ("name", "cause", "expected"),
    [
        ("broken", ModuleNotFoundError, "No module named 'a_package_that_is_absent'"),
        ("faulty", ZeroDivisionError, "division by zero"),
    ],
)
def test_a_failure_inside_a_module_stays_visible(package, name, cause, expected):
    for spelt in (name, f"distill_jax.toys.{name}:make"):
        with pytest.raises(ConfigError, match="exists but its import failed") as error:
            resolve("toys", spelt, where="toy.name")
        assert expected in str(error.value) and cause.__name__ in str(error.value)
        assert isinstance(error.value.__cause__, cause)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("absent_package.sub:Thing", "no module named 'absent_package.sub'"),
        ("collections.absent:Thing", "no module named 'collections.absent'"),
        ("collections:OrderdDict", "did you mean 'OrderedDict'"),
        ("sys:path", "not a function"),
        (".relative:x", "no module named"),
        (":x", "no module named ''"),
        ("a b:x", "no module named 'a b'"),
        ("collections:", "has no ''"),
        ("os:environ.nothing", "has no 'environ.nothing'"),
        ("collections:__builtins__.nothing", "has no '__builtins__.nothing'"),
    ],
)
def test_wrong_symbols(name, expected):
    message = refusal(resolve, "models", name, where="roles.student.model", trusted={name})
    assert message.startswith("roles.student.model: ") and expected in message


# Keyword arguments.


def build(
    width: int,
    *,
    rate: float = 0.1,
    bias: bool = True,
    act: str = "relu",
    stages: tuple[int, ...] = (1, 2),
    limit: float | None = None,
    kind: typing.Literal["a", "b"] = "a",
    num_classes: int = 10,
    anything: typing.Any = None,
):
    return dict(locals())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    temperature: float = 4.0
    size: int
    roles: typing.ClassVar[tuple[str, ...]] = ("student",)


class Plain:
    def __init__(self, depth: int, **kwargs):
        self.depth, self.kwargs = depth, kwargs


def test_binding_calls_with_what_the_config_says():
    made = bind(build, ConfigDict({"width": 3, "rate": 1, "stages": (4,)}), where="k")()
    assert (made["width"], made["rate"], made["stages"], made["bias"]) == (3, 1, (4,), True)
    assert bind(Method, {"size": 2}, where="k")() == Method(size=2)


def test_provided_values_fill_what_is_accepted_and_unset():
    provided = {"num_classes": 7, "image_size": 32, "width": 5}
    assert bind(build, {}, where="k", provided=provided)()["num_classes"] == 7
    assert bind(build, {"num_classes": 3}, where="k", provided=provided)()["num_classes"] == 3
    assert bind(build, {}, where="k", provided=provided)()["width"] == 5
    assert bind(Plain, {"depth": 1}, where="k", provided=provided)().kwargs == {}


def test_nested_groups_arrive_as_plain_dicts():
    bound = bind(build, ConfigDict({"width": 1, "anything": {"a": {"b": 1}}}), where="k")
    assert type(bound()["anything"]) is dict and type(bound()["anything"]["a"]) is dict


@pytest.mark.parametrize(
    ("fn", "kwargs", "expected"),
    [
        (build, {"width": 1, "widht": 2}, ["k.widht", "build does not accept 'widht'", "'width'"]),
        (build, {}, ["k: build needs 'width'", "set k.width"]),
        (Method, {}, ["k: Method needs 'size'"]),
        (Method, {"size": 1, "temprature": 2}, ["k.temprature", "did you mean 'temperature'"]),
        (Method, {"size": 1, "roles": ()}, ["k.roles", "does not accept"]),
        (Method, {"size": 1.5}, ["k.size: 1.5 is a float", "Method expects int"]),
        (Plain, {}, ["Plain needs 'depth'"]),
        (Plain, {"depth": "x"}, ["k.depth: 'x' is a str", "expects int"]),
        (build, {"width": True}, ["k.width: True is a bool"]),
        (build, {"width": 1, "rate": "0.1"}, ["k.rate: '0.1' is a str", "expects float"]),
        (build, {"width": 1, "rate": None}, ["k.rate: None"]),
        (build, {"width": 1, "bias": 1}, ["k.bias: 1 is a int", "expects bool"]),
        (build, {"width": 1, "act": 3}, ["k.act: 3", "expects str"]),
        (build, {"width": 1, "stages": 3}, ["k.stages: 3", "tuple[int, ...]"]),
        (build, {"width": 1, "limit": "x"}, ["k.limit: 'x'", "float | None"]),
        (build, {"width": 1, "kind": "c"}, ["k.kind: 'c'", "Literal"]),
    ],
)
def test_wrong_keyword_arguments(fn, kwargs, expected):
    message = refusal(bind, fn, kwargs, where="k")
    for text in expected:
        assert text in message


@pytest.mark.parametrize(
    "kwargs",
    [{"limit": None}, {"limit": 2}, {"stages": [1]}, {"kind": "b"}, {"anything": object()}],
)
def test_fitting_values_pass(kwargs):
    bind(build, {"width": 1, **kwargs}, where="k")()


def test_any_keyword_goes_where_the_function_takes_any():
    assert bind(Plain, {"depth": 1, "extra": 2}, where="k")().kwargs == {"extra": 2}


def test_annotations_that_do_not_evaluate_are_not_checked():
    def odd(x: "NoSuchType" = 1):  # noqa: F821
        return x

    assert bind(odd, {"x": "anything"}, where="k")() == "anything"


def test_items_of_tuples_are_checked():
    def sized(sizes: tuple[int, ...] = (), pair: tuple[float, float] = (0.0, 1.0)):
        return sizes, pair

    for kwargs in ({"sizes": (1, 2)}, {"sizes": ()}, {"pair": (1, 0.5)}, {"sizes": [3]}):
        bind(sized, kwargs, where="k")()
    for key, value in (("sizes", (1, "x")), ("sizes", (1.5,)), ("pair", (0.0, "x"))):
        with pytest.raises(ConfigError, match=rf"k\.{key}"):
            bind(sized, {key: value}, where="k")


def test_what_has_no_signature_is_refused():
    with pytest.raises(ConfigError, match=r"^k: dict is built in"):
        bind(dict, {}, where="k")


def test_a_function_with_arguments_is_named_without_them():
    def corrupt(dataset, *, noise=0.0):
        return dataset, noise

    with pytest.raises(ConfigError) as error:
        bind(functools.partial(corrupt, object()), {"nose": 1}, where="k")
    assert "corrupt does not accept 'nose'" in str(error.value) and "object" not in str(error.value)


def test_a_module_whose_error_cannot_be_shown_is_refused(package):
    (package / "mute.py").write_text(
        "class E(Exception):\n    def __str__(self): raise RuntimeError\n"
        "def make(): pass\nraise E\n"
    )
    text = refusal(resolve, "toys", "mute", where="x.name")
    assert text.startswith("x.name: module distill_jax.toys.mute exists but its import failed: E")


def test_names_are_looked_up_in_anything(package):
    """Parts of a name may lead through objects without a `__dict__`, or that raise."""
    (package / "odd.py").write_text(
        "numbers = (1, 2)\n"
        "class Trap:\n    def __getattr__(self, name): raise OSError('trap')\n"
        "trap = Trap()\ndef make(): pass\n"
    )
    module = "distill_jax.toys.odd"
    for symbol, says in [("numbers.first", "has no 'numbers.first'"), ("trap.a", "OSError: trap")]:
        text = refusal(resolve, "toys", f"{module}:{symbol}", where="x", trusted={module})
        assert says in text, text
