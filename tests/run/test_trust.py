"""Files that are read back choose no code: whatever a run, a checkpoint or data set names."""

import ast
import functools
import json
import pathlib
import sys

import numpy as np
import pytest

import distill_jax
from distill_jax import main, report
from distill_jax.core.errors import ConfigError, DataUnavailable, UserError
from distill_jax.data import npz_file, tfds
from distill_jax.run import build, flags
from distill_jax.run import config as config_lib
from distill_jax.run.preflight import teachers
from distill_jax.run.resolve import names_in, resolve
from distill_jax.trainer.io import step_folder, teacher_cache

PACKAGES = ("objectives", "models", "data", "evaluators", "weighting")

FOREIGN = """
import functools, os, pathlib
import flax.linen as nn
from json import loads
pathlib.Path(__file__).with_name("imported").write_text("")

class Net(nn.Module):
    num_classes: int
    width: int = 3
    helper = staticmethod(os.system)

    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(self.width, name="first")(x.reshape(x.shape[0], -1))
        return nn.Dense(self.num_classes)(x)

run = functools.partial(os.system, "true")
built = functools.partial(Net, num_classes=4)
"""


@pytest.fixture
def foreign(tmp_path, monkeypatch):
    """A module that can be imported, and the file that shows that it was."""
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "foreign_nets.py").write_text(FOREIGN)
    monkeypatch.syspath_prepend(str(folder))
    yield folder / "imported"
    sys.modules.pop("foreign_nets", None)


def base_config():
    config = config_lib.base()
    config.objective.name = "supervised"
    config.roles.student = config_lib.role("mlp", hidden=(4,))
    config.data.name = "digits"
    config.data.eval_transforms = config.data.train_transforms = ("scale",)
    config.data.transform_kwargs.scale = {}
    config.evaluators.classification = {}
    config.batch_size, config.total = 32, 2
    return config


# The resolver.


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("name", ["foreign_nets:Net", "os:system", "subprocess:getoutput"])
def test_code_outside_is_refused_before_it_is_imported(foreign, package, name):
    with pytest.raises(
        ConfigError, match=rf"a\.name: '{name}', .*\n.* add --trust={name.partition(':')[0]}"
    ):
        resolve(package, name, where="a.name")
    assert not foreign.exists() and "foreign_nets" not in sys.modules


@pytest.mark.parametrize(
    ("package", "name"),
    [
        ("models", "distill_jax.run.watch:os.system"),
        ("models", "distill_jax.trainer.io.step_folder:seal"),
        ("models", "distill_jax.models.mlp:jax.numpy.zeros"),
        ("models", "distill_jax.models.mlp:nn.Dense"),
        ("models", "distill_jax.models.mlp:MLP.init"),
        ("models", "distill_jax.models.mlp:MLP.__init__.__globals__"),
        ("models", "distill_jax.models.mlp:make.__call__"),
        ("models", "distill_jax.models._tables:nn.Dense"),
        ("models", "distill_jax.models.adapters:jax.jit"),
        ("models", "distill_jax.objectives.kd:make"),
        ("models", "distill_jax.models_of_mine:make"),
        ("models", "distill_jax.models.mlp.os:system"),
        ("data", "distill_jax.data.npz_file:np.load"),
        ("data", "distill_jax.data.npz_file:DataUnavailable"),
        ("data", "distill_jax.data._tables:read_asset"),
        ("data", "distill_jax.data.tfds:os.remove"),
        ("evaluators", "distill_jax.evaluators.knn:np.fromfile"),
        ("objectives", "distill_jax:objectives.kd.make"),
        ("objectives", "distill_jax.objectives:kd.dataclasses.dataclass"),
    ],
)
def test_nothing_leads_out_of_the_package_of_a_slot(package, name):
    with pytest.raises(ConfigError):
        resolve(package, name, where="a.name")


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_maker_of_a_package_is_reached_by_its_long_name(package):
    from distill_jax.run.resolve import available

    for name in available(package):
        short = resolve(package, name, where="a.name")
        if short.__module__ == f"distill_jax.{package}.{name}":
            long = resolve(package, f"distill_jax.{package}.{name}:make", where="a.name")
            assert long is short or isinstance(short, type(long))


@pytest.mark.parametrize(
    ("symbol", "reason"),
    [
        ("Net", ""),
        ("built", ""),  # a partial of what is defined there
        ("run", "is defined in posix"),
        ("loads", "is defined in json"),
        ("os.system", "is reached through the module os"),
        ("Net.helper", "is defined in posix"),
        ("nn.Dense", "is reached through the module flax.linen"),
        ("_private", "has a private part"),
    ],
)
def test_of_a_trusted_module_what_it_defines_is_trusted(foreign, symbol, reason):
    name = f"foreign_nets:{symbol}"
    find = functools.partial(resolve, "models", name, where="roles.student.model")
    if not reason:
        assert callable(find(trusted={"foreign_nets"}))
        assert callable(find(trusted={"foreign_nets:other"}))  # a name trusts its module
    else:
        with pytest.raises(ConfigError, match=reason):
            find(trusted={"foreign_nets"})
    if symbol != "_private":
        assert callable(find(trusted={name}))  # named in full: whatever it leads to


def test_prose_with_a_colon_trusts_no_module():
    config = base_config()
    config.study.title = "os: a study"
    with pytest.raises(ConfigError):
        resolve("models", "os:system", where="a", trusted=names_in(config))


def test_one_module_imports_by_name():
    """`resolve` and the config file are the only ways from text to code."""
    found = set()
    for path in pathlib.Path(distill_jax.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            name = ""
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func).rpartition(".")[2]
            elif isinstance(node, ast.Import):
                name = next((a.name for a in node.names if "pickle" in a.name), "")
            elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                name = "" if ast.unparse(node.value) == "False" else "allow_pickle"
            if name in ("import_module", "__import__", "exec", "run_path", "allow_pickle") or (
                "pickle" in name or (name == "eval" and isinstance(node.func, ast.Name))
            ):
                found.add((path.name, name))
    assert found == {
        ("resolve.py", "import_module"),
        ("config_files.py", "run_path"),
        ("__init__.py", "import_module"),  # of public names, from tables in the code
        ("_lazy.py", "import_module"),
        ("certificates.py", "import_module"),  # networks of the tables of families
        ("onnx_teacher.py", "import_module"),  # onnxruntime
        ("program.py", "import_module"),  # converters, by names in the code
    }


# What is read back: the config of a run.


SLOTS = {
    "data.name": lambda c, name: c.data.update({"name": name}),
    "objective.name": lambda c, name: c.objective.update({"name": name}),
    "weighting.name": lambda c, name: c.weighting.update({"name": name}),
    "roles.student.model": lambda c, name: c.roles.student.update({"model": name}),
    "evaluators": lambda c, name: c.evaluators.update({name: {}}),
    "data.train_transforms": lambda c, name: c.data.update({"train_transforms": (name,)}),
    "data.eval_transforms": lambda c, name: c.data.update({"eval_transforms": (name, "scale")}),
    "cache.teacher": lambda c, name: c.cache.update(
        {"teacher": name, "dir": "answers", "roles": ("teacher",)}
    ),
}


def store(folder, config):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(config_lib.to_json(config))
    result = {"status": "done", "seed": 0, "steps": 2, "metrics": {}, "best": {}}
    (folder / "result.json").write_text(json.dumps(result))
    return folder


@pytest.mark.parametrize("mode", ["eval", "describe"])
@pytest.mark.parametrize("slot", SLOTS)
def test_a_stored_config_names_no_code(foreign, tmp_path, slot, mode):
    config = base_config()
    SLOTS[slot](config, "foreign_nets:Net")
    run = store(tmp_path / "run", config)
    with pytest.raises(UserError) as error:
        main._do(flags.parse(["", f"--mode={mode}", f"--workdir={run}"]))
    assert error.value.where == slot and "--trust=foreign_nets" in error.value.hint
    assert not foreign.exists()


@pytest.mark.parametrize(
    "given",
    [
        ["--trust=foreign_nets"],
        ["--trust=json,foreign_nets"],
        ["--trust=json", "--trust=foreign_nets"],
        ["--config.roles.student.model=foreign_nets:Net"],
        ["--config=given.py"],
    ],
)
def test_what_the_command_line_names_is_imported(foreign, tmp_path, monkeypatch, given):
    monkeypatch.chdir(tmp_path)
    config = base_config()
    SLOTS["roles.student.model"](config, "foreign_nets:Net")
    config.roles.student.kwargs = {"width": 5}
    run = store(tmp_path / "run", config)
    pathlib.Path("given.py").write_text(
        "import pathlib\nfrom distill_jax.run.config import from_json\n"
        "def get_config():\n    return from_json(pathlib.Path('run/config.json').read_text())\n"
    )
    parsed = flags.parse(["", "--mode=eval", f"--workdir={run}", *given])
    made = build.build(parsed.config, shapes_only=True, trusted=parsed.trusted)
    assert made.shapes.roles["student"].params["first"]["kernel"].shape == (64, 5)


def test_wrong_modules_to_trust(tmp_path):
    run = store(tmp_path / "run", base_config())
    for text in ("os:system", "a b", "", "os,", "..x"):
        with pytest.raises(UserError, match=r"--trust: .* names no module"):
            flags.parse(["", "--mode=eval", f"--workdir={run}", f"--trust={text}"])


# What is read back: checkpoints.


def checkpoint_of(folder, name, **kwargs):
    """A run folder whose only step tells of a network, and can be read as far as that."""
    step = folder / "checkpoints" / "5"
    (step / "meta").mkdir(parents=True)
    network = {"model": name, "kwargs": kwargs}
    config = {"roles": {"student": network}, "data": base_config().data.to_dict()}
    meta = {"step": 5, "metric": None, "config": config}
    (step / step_folder.META).write_text(json.dumps(meta))
    step_folder.seal(step)
    return folder


def kd_config(init):
    config = base_config()
    config.objective.name = "kd"
    config.roles.teacher = config_lib.role()
    config.roles.teacher.init, config.roles.teacher.frozen = str(init), True
    return config


def test_a_checkpoint_names_no_code(foreign, tmp_path):
    config = kd_config(checkpoint_of(tmp_path / "teacher", "foreign_nets:Net", width=6))
    with pytest.raises(ConfigError, match="--trust=foreign_nets") as error:
        build.build(config, shapes_only=True)
    assert error.value.where == "roles.teacher.model" and not foreign.exists()
    made = build.build(config, shapes_only=True, trusted={"foreign_nets"})
    assert made.shapes.roles["teacher"].params["first"]["kernel"].shape == (64, 6)


def test_a_network_that_the_checkpoint_does_not_have(tmp_path):
    config = kd_config(f"{checkpoint_of(tmp_path / 'teacher', 'mlp')}#studnet")
    with pytest.raises(UserError, match=r"no network 'studnet'\n.*did you mean 'student'"):
        build.build(config, shapes_only=True)


def test_a_checkpoint_that_tells_something_else_than_was_written(tmp_path):
    folder = checkpoint_of(tmp_path / "teacher", "mlp")
    meta = folder / "checkpoints" / "5" / step_folder.META
    meta.write_text(meta.read_text().replace('"mlp"', '"vit"'))
    with pytest.raises(UserError, match="differs from what was written"):
        build.build(kd_config(folder), shapes_only=True)


# What is read back: arrays, tables, data.


class Payload:
    """Unpickled, it writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (pathlib.Path(self.path),)


@pytest.fixture
def payload(tmp_path):
    mark = tmp_path / "unpickled"
    array = np.array([Payload(str(mark))], object)
    yield array
    assert not mark.exists()
    np.save(tmp_path / "again.npy", array)  # the payload would have worked
    np.load(tmp_path / "again.npy", allow_pickle=True)
    assert mark.exists()


def test_arrays_of_a_run_are_not_unpickled(tmp_path, payload):
    run = store(tmp_path / "run", base_config())
    for name in ("predictions", "trust", "embeddings", "masked"):
        np.savez(
            run / f"{name}.npz", **dict.fromkeys(("label", "logits_student", "ratio"), payload)
        )
    (run / "result.json").write_text(json.dumps({"status": "done", "metrics": {}, "best": {}}))
    assert report.write_run_report(run).exists()


def test_stored_answers_are_not_unpickled(tmp_path, payload):
    store = teacher_cache.Store(tmp_path, {"logits": np.zeros((1, 2), np.float32)}, n=1, chunk=1)
    store.path(0, 0).mkdir()
    np.save(store.path(0, 0) / "logits.npy", payload)
    step_folder.seal(store.path(0, 0))
    with pytest.raises(UserError, match="Python objects"):
        store.read(0, np.zeros(1, np.int64))


def test_data_are_not_unpickled(tmp_path, payload):
    np.savez(
        tmp_path / "data.npz", x_train=payload, y_train=payload, x_test=payload, y_test=payload
    )
    with pytest.raises(DataUnavailable):
        npz_file.make(path=str(tmp_path / "data.npz"))


def test_a_prepared_data_set_names_no_code(foreign, tmp_path):
    for key in ("pythonClassName", "python_class_name", "type"):
        inner = {"label": {key: "foreign_nets.Net"}}
        stored = {key: "tensorflow_datasets.core.features.X", "featuresDict": {"features": inner}}
        (tmp_path / "features.json").write_text(json.dumps(stored))
        with pytest.raises(DataUnavailable, match=r"names code outside TFDS: 'foreign_nets\.Net'"):
            tfds.check_features(tmp_path)
    assert not foreign.exists()


def test_names_in_what_is_only_reported_are_not_imported(foreign, tmp_path):
    """`result.json`, `study.json`, `env.json` and the records are text to the report."""
    poison = {"data.name": "foreign_nets:Net", "run": "../../foreign_nets:Net", "status": "done"}
    run = store(tmp_path / "study" / "a" / "seed0", base_config())
    for name in ("result", "env"):
        (run / f"{name}.json").write_text(json.dumps(poison))
    for name in ("metrics", "alarms"):
        (run / f"{name}.jsonl").write_text(json.dumps({"step": 1, **poison}) + "\n")
    study = {
        "metric": "test/accuracy",
        "arms": {"a": {"overrides": poison, "seeds": {"0": poison}}},
    }
    (tmp_path / "study" / "study.json").write_text(json.dumps(study))
    report.write_run_report(run)
    report.write_study_report(tmp_path / "study")
    list(teachers.teacher_saw({"data": base_config().data.to_dict()}, base_config(), where=""))
    assert not foreign.exists()
