"""Keys, overrides, durations and checks of the config."""

import json
import subprocess
import sys

import numpy as np
import pytest

from distill_jax.core.errors import ConfigError
from distill_jax.run import config as config_lib
from distill_jax.run.config import base, duration, override, role, validate


def make():
    config = base()
    config.objective.name = "kd"
    config.objective.kwargs = {"temperature": 4.0, "alpha": 0.9, "word": "a,b"}
    config.roles.student = role("resnet", depth=8)
    config.roles.teacher = role("resnet", depth=56)
    config.roles.teacher.frozen = True
    config.roles.teacher.init = "runs/teacher"
    config.data.name = "digits"
    config.total = "3 epochs"
    config.evaluators = {"classification": {}, "knn": {"k": 5}}
    return config


def refusal(function, *args, **kwargs):
    with pytest.raises(ConfigError) as error:
        function(*args, **kwargs)
    return str(error.value)


def test_importing_the_config_does_not_import_jax():
    code = "import sys; from distill_jax.run import config, flags; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_example_is_valid():
    validate(make())


def test_every_default_but_what_must_be_chosen_is_valid():
    message = refusal(validate, base())
    assert message.startswith("total: no length of training is set")
    assert 'total="20 epochs"' in message


def test_no_key_holds_a_bare_none():
    config = base()
    config.roles.student = role()
    for path, value in config_lib.flatten(config).items():
        parent, _, key = path.rpartition(".")
        node = config_lib.lookup(config, parent)
        assert value is not None or node.get_type(key) in (int, float, str, object), path


@pytest.mark.parametrize("path", ["", "optim", "bilevel", "data", "study", "roles.student"])
def test_closed_groups_refuse_new_keys(path):
    config = make()
    node = config_lib.lookup(config, path)
    with pytest.raises(AttributeError, match="locked"):
        node.surprise = 1


@pytest.mark.parametrize(
    "path",
    ["objective.kwargs", "data.kwargs", "optim.kwargs", "evaluators", "roles.student.kwargs"],
)
def test_open_groups_take_new_keys(path):
    config = override(make(), {"seed": 1})
    config_lib.lookup(config, path).surprise = 1
    assert config_lib.lookup(config, f"{path}.surprise") == 1


# Overrides.


@pytest.mark.parametrize(
    ("path", "text", "value"),
    [
        ("optim.lr", "3e-4", 3e-4),
        ("optim.lr", "1", 1.0),
        ("optim.lr", 1, 1.0),
        ("seed", "7", 7),
        ("roles.teacher.frozen", "false", False),
        ("optim.clip_norm", "1", 1.0),
        ("total", "20 epochs", "20 epochs"),
        ("total", "20.0epoch", "20 epochs"),
        ("total", "1e3", "1000 steps"),
        ("total", 7, "7 steps"),
        ("total", "100_000 Examples", "100000 examples"),
        ("eval.every", "12.5%", "12.5 %"),
        ("eval.every", "1 percent", "1 %"),
        ("eval.every", "none", None),
        ("optim.warmup", "1", "1 step"),
        ("optim.clip_norm", "none", None),
        ("roles.teacher.init", "None", None),
        ("roles.student.model", "none", "none"),
        ("precision", "bfloat16", "bfloat16"),
        ("data.train_transforms", "crop,flip", ("crop", "flip")),
        ("data.train_transforms", "('crop', 'flip')", ("crop", "flip")),
        ("data.train_transforms", "crop", ("crop",)),
        ("data.train_transforms", "", ()),
        ("data.train_transforms", ["crop"], ("crop",)),
        ("study.seeds", "0,1,2", (0, 1, 2)),
        ("study.seeds", "[3]", (3,)),
        ("optim.decay_mask", "(('bias$', False), ('.', True))", (("bias$", False), (".", True))),
        ("objective.kwargs.temperature", "2", 2.0),
        ("objective.kwargs.alpha", "0.5", 0.5),
        ("objective.kwargs.new", "[1, 2]", (1, 2)),
        ("objective.kwargs.new", "true", True),
        ("objective.kwargs.new", "word", "word"),
        ("roles.student.kwargs.depth", "2.5", 2.5),
        ("data.transform_kwargs.crop.padding", "2", 2),
        ("evaluators.knn.k", "7", 7),
        ("evaluators.probe.l2", "0.1", 0.1),
        ("data.kwargs.classes", "cat,dog", ("cat", "dog")),
        ("data.kwargs.classes", "a, 1,", ("a", 1)),
        ("data.kwargs.classes", "'a, b',\"c,d\"", ("a, b", "c,d")),
        ("data.kwargs.path", "'a, b'", "a, b"),
        ("objective.kwargs.word", "b,c", "b,c"),  # a string was there
        ("objective.kwargs.word", "'b,c'", "b,c"),
        ("data.train_transforms", "'crop','flip'", ("crop", "flip")),
    ],
)
def test_overrides_are_read_as_the_type_of_the_field(path, text, value):
    config = make()
    found = config_lib.lookup(override(config, {path: text}), path)
    assert found == value and type(found) is type(value)
    assert config_lib.differences(config, make()) == []  # the given config stays as it is


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("optim.lrr", 1, ["optim.lrr", "unknown config key 'lrr'", "did you mean 'lr'"]),
        ("optin.lr", 1, ["optin", "did you mean 'optim'"]),
        ("lr", 1, ["did you mean 'optim.lr'"]),
        ("optim.batch_size", 1, ["optim.batch_size", "did you mean 'batch_size'"]),
        ("objective.temperature", 1, ["objective.temperature", "objective.kwargs"]),
        ("roles.studnet.frozen", "true", ["roles.studnet", "did you mean 'student'"]),
        ("roles.student.modle", "x", ["roles.student.modle", "did you mean 'model'"]),
        ("seed.x", 1, ["seed.x", "seed is a value, not a group"]),
        ("optim.lr", "abc", ["optim.lr: 'abc' is not of type float", "optim.lr=0.1"]),
        ("optim.lr", "none", ["optim.lr", "float"]),
        ("optim.lr", True, ["optim.lr", "True is not of type float"]),
        ("seed", "1.5", ["seed: '1.5' is not of type int"]),
        ("seed", 1.5, ["seed: 1.5 is not of type int"]),
        ("seed", True, ["seed: True is not of type int"]),
        ("precision", 32, ["precision: 32 is not of type str"]),
        ("roles.teacher.frozen", "maybe", ["roles.teacher.frozen", "bool"]),
        ("data.train_transforms", "('crop', ", ["data.train_transforms", "tuple"]),
        ("optim", "3", ["optim: a group cannot be replaced", "optim.lr"]),
        (
            "total",
            "3 eposh",
            ["total: '3 eposh' has an unknown unit 'eposh'", "did you mean 'epochs'"],
        ),
        ("total", "three epochs", ["total: 'three epochs' is not a duration", "'20 epochs'"]),
        ("total", "3 4", ["total: '3 4' is not a duration"]),
        ("total", True, ["total: True is not a duration"]),
        ("total", "10 %", ["total: '10 %' is a share of itself"]),
        ("total", "{}", ["total: a value, not a group, cannot be emptied", "total=none unsets it"]),
        ("eval.every", 0, ["eval.every: 0 is not positive", "none for none"]),
        ("checkpoint.every", "-1 epochs", ["checkpoint.every: '-1 epochs' is not positive"]),
        ("optim.warmup", "120 %", ["optim.warmup: '120 %' is more than 100 %"]),
        ("optim.warmup", "nan epochs", ["optim.warmup: 'nan epochs' is not positive"]),
        (
            "total.epochs",
            "20",
            ["total.epochs: a duration is one value", 'write total="20 epochs"'],
        ),
        ("optim.warmup", {"percent": 4.0, "steps": None}, ['write optim.warmup="4 %"']),
        ("bilevel.warmup", {"epochs": None, "steps": None}, ["write bilevel.warmup=none"]),
        (
            "eval.every.steps",
            "x",
            ["eval.every.steps: a duration is one", 'eval.every="20 epochs"'],
        ),
        ("objective.kwargs.alpha.x", 1, ["objective.kwargs.alpha is a value, not a group"]),
        ("objective.kwargs.x", "(a,b)", ["objective.kwargs.x: '(a,b)' is not a literal", "quote"]),
        ("objective.kwargs", "none", ["objective.kwargs={} empties it"]),
        ("optim", {}, ["optim: a group of fixed keys cannot be emptied"]),
        ("roles", {}, ["roles: a run needs a role", "roles.NAME=none deletes one"]),
        ("optim.lr", "{}", ["optim.lr: a value, not a group, cannot be emptied"]),
        ("evaluators.knm", "none", ["evaluators.knm: there is no 'knm'", "did you mean 'knn'"]),
    ],
)
def test_wrong_overrides_name_path_and_remedy(path, value, expected):
    message = refusal(override, make(), {path: value})
    for text in expected:
        assert text in message


def test_another_name_drops_the_keyword_arguments_of_the_old_one():
    config = override(make(), {"objective.name": "supervised"})
    assert config.objective.kwargs.to_dict() == {}
    config = override(make(), {"objective.kwargs.x": 1, "objective.name": "supervised"})
    assert config.objective.kwargs.to_dict() == {"x": 1}
    config = override(make(), {"objective.name": "kd", "roles.student.model": "mlp"})
    assert config.objective.kwargs.temperature == 4.0
    assert config.roles.student.kwargs.to_dict() == {}
    assert config.roles.teacher.kwargs.depth == 56


def test_a_role_is_added_by_what_defines_it():
    config = override(make(), {"roles.target.ema_of": "student", "roles.target.decay": "0.9"})
    assert config.roles.target.ema_of == "student" and config.roles.target.decay == 0.9
    assert all(role.is_locked for role in config.roles.values())
    validate(config)


def test_nested_dicts_merge_into_groups():
    changes = {"optim": {"lr": 0.5, "kwargs": {"momentum": 0.8}}, "evaluators": {"probe": {}}}
    config = override(make(), changes)
    assert config.optim.lr == 0.5 and config.optim.name == "sgd"
    assert config.optim.kwargs.momentum == 0.8
    assert config.evaluators.to_dict() == {"classification": {}, "knn": {"k": 5}, "probe": {}}


def given():
    config = make()
    config.data.corrupt = {"label_noise": 0.6, "seed": 3}
    config.data.train_transforms = ("random_crop", "normalize")
    config.data.eval_transforms = ("normalize",)
    config.data.transform_kwargs = {"normalize": {"mean": 0.5, "std": 0.5}}
    config.eval.every = 5
    return config


@pytest.mark.parametrize(
    ("values", "path", "left"),
    [
        ({"data.corrupt": "{}"}, "data.corrupt", {}),
        ({"data.corrupt": {}}, "data.corrupt", {}),
        ({"data": {"corrupt": {}}}, "data.corrupt", {}),
        (
            {"data.corrupt.label_noise": 0.2, "data.corrupt": "{}"},
            "data.corrupt",
            {"label_noise": 0.2},
        ),
        ({"objective.kwargs": "{}"}, "objective.kwargs", {}),
        ({"data.transform_kwargs.normalize": "{}"}, "data.transform_kwargs", {"normalize": {}}),
        ({"evaluators.knn": "{}"}, "evaluators", {"classification": {}, "knn": {}}),
        ({"evaluators.probe": "{}", "evaluators": "{}"}, "evaluators", {"probe": {}}),
        ({"evaluators.knn": "none"}, "evaluators", {"classification": {}}),
        ({"evaluators": {"knn": None}}, "evaluators", {"classification": {}}),
        # What no transform is left to take goes with the transforms.
        (
            {"data.train_transforms": "", "data.eval_transforms": ""},
            "data.transform_kwargs",
            {},
        ),
        (
            {"data.train_transforms": ""},
            "data.transform_kwargs",
            {"normalize": {"mean": 0.5, "std": 0.5}},
        ),
    ],
)
@pytest.mark.parametrize("by", ["command line", "arm"])
def test_groups_are_emptied_and_entries_deleted(values, path, left, by):
    config = given()
    if by == "arm":
        if any(f"{a}." in b for a in values for b in values):
            pytest.skip("a dict has one value at each path")
        flat = {"study.arms": {"a": {}}} | {f"study.arms.a.{p}": v for p, v in values.items()}
        config = override(config, flat)
        values = config_lib.arms(config)["a"]
    found = override(config, values)
    assert config_lib.lookup(found, path).to_dict() == left
    found.study = base().study
    validate(found)


def test_a_role_is_deleted():
    assert list(override(make(), {"roles.teacher": "none"}).roles) == ["student"]
    config = make()
    config.study.arms.alone = {"roles": {"teacher": None}}
    [changes] = config_lib.arms(config).values()
    assert list(override(config, changes).roles) == ["student"]


def test_field_references_follow_overrides():
    config = make()
    config.eval.batch_size = config.get_ref("batch_size") * 2
    changed = override(config, {"batch_size": 8})
    assert changed.eval.batch_size == 16 and config.eval.batch_size == 256


# Durations.


@pytest.mark.parametrize(
    ("value", "steps"),
    [(7, 7), ("7", 7), ("7 steps", 7), ("0.5 epochs", 4), ("0.01 epochs", 1), ("25 %", 20)],
)
def test_durations_in_steps(value, steps):
    config = make()
    config.eval.every = value
    assert duration(config, "eval.every", steps_per_epoch=7.8125, total_steps=80) == steps


def test_length_of_training():
    config = make()  # three epochs of 1000 examples in batches of 128
    assert config_lib.total_steps(config, 1000) == 23
    assert config_lib.total_steps(override(config, {"total": 5}), 1000) == 5
    assert config_lib.total_steps(override(config, {"total": "1280 examples"}), 1000) == 10
    assert config_lib.total_steps(override(config, {"total": "1 example"}), 1000) == 1


def test_an_unset_duration_has_the_default_or_is_refused():
    units = {"steps_per_epoch": 8, "total_steps": 80}
    assert duration(make(), "eval.every", default=9, **units) == 9
    message = refusal(duration, make(), "eval.every", **units)
    assert message.startswith("eval.every: no duration") and 'eval.every="20 epochs"' in message


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, "total: 0 is not positive"),
        (None, "no length of training"),
        (True, "total: True is not a duration"),
        ({"epochs": 20.0}, 'write total="20 epochs"'),
        ({"epochs": 20, "steps": 5}, "total: a duration is one value"),
    ],
)
def test_wrong_durations_of_a_config_file(value, expected):
    config = make()
    config.total = value
    assert expected in refusal(validate, config)


def test_one_spelling_of_a_duration_is_as_good_as_another():
    a, b = make(), make()
    a.total, b.total = 500, "500 steps"
    assert config_lib.differences(a, b) == []
    b.total = "500 epochs"
    assert config_lib.differences(a, b) == ["total: '500 steps' -> '500 epochs'"]


# Checks.


def structure(change):
    def edit(config):
        with config.unlocked(), config.ignore_type():
            change(config)
        return config

    return edit


def changed(**values):
    return lambda config: override(config, {k.replace("__", "."): v for k, v in values.items()})


def arm(**changes):
    def edit(config):
        config.study.arms.other = changes
        return config

    return edit


def delete(config):
    del config.optim.lr


def misspell(config):
    config.optim.leaning_rate = 0.1


def retype(config):
    config.seed = "zero"


def plain_role(config):
    config.roles.student = {"model": "resnet"}


def no_group(config):
    config.optim = 3


def within(path, value):
    """Puts a value where a config file can and a command line cannot."""

    def edit(config):
        parent, _, key = path.rpartition(".")
        config_lib.lookup(config, parent)[key] = value(config)
        return config

    return edit


WRONG = [
    (within("data.kwargs.f", lambda _: lambda x: x), ["data.kwargs.f", "a function"]),
    (within("data.kwargs.f", lambda _: np.zeros(2)), ["data.kwargs.f", "ndarray", "tuples"]),
    (within("data.kwargs.f", lambda _: (1, (np.int64(2),))), ["data.kwargs.f", "int64"]),
    (within("data.kwargs.f", lambda c: c), ["data.kwargs.f: a group holds itself"]),
    (within("data.kwargs.f", lambda c: c.data), ["data.kwargs.f: a group holds itself"]),
    (within("data.kwargs.f", lambda _: ({1: 2},)), ["data.kwargs.f: the key 1", "string"]),
    (changed(objective__kwargs__temperature=float("nan")), ["temperature: nan is not finite"]),
    (changed(evaluators__knn__k=(1e999,)), ["evaluators.knn.k: inf is not finite"]),
    (changed(data__kwargs__held_out=0.3), ["data.kwargs.held_out", "set data.held_out"]),
    (
        changed(objective__kwargs__total_steps=9),
        ["objective.kwargs.total_steps: is set by the run"],
    ),
    (changed(eval__metric="train/accuracy"), ["eval.metric", "use held_out/accuracy"]),
    (changed(study__metric="train/accuracy"), ["study.metric", "use held_out/accuracy"]),
    (arm(seed=3), ["study.arms.other.seed", "study.seeds"]),
    (arm(study={}), ["study.arms.other.study"]),
    (changed(**{"study__arms__" + "a" * 300: {"seed": 1}}), ["study.arms", "200 bytes"]),
    (changed(precision="float16"), ["precision", "float16", "did you mean 'bfloat16'"]),
    (changed(data__resident="maybe"), ["data.resident", "auto, no, yes"]),
    (changed(eval__mode="maximum"), ["eval.mode", "max, min"]),
    (changed(batch_size=0), ["batch_size: 0 is out of range", "positive"]),
    (changed(batch_size=2**31), ["batch_size: 2147483648 is out of range", "32 bits"]),
    (changed(accum_steps=3), ["accum_steps: 128 examples", "3 micro-batches", "divisor"]),
    (changed(seed=-1), ["seed: -1 is out of range"]),
    (changed(optim__lr=0.0), ["optim.lr"]),
    (changed(optim__lr=float("nan")), ["optim.lr: nan"]),
    (changed(optim__weight_decay=-0.1), ["optim.weight_decay: -0.1", "0 or more"]),
    (changed(optim__clip_norm=0.0), ["optim.clip_norm: 0.0", "none for no limit"]),
    (changed(data__held_out=1.0), ["data.held_out: 1.0", "fraction"]),
    (changed(mesh__data=0), ["mesh.data: 0", "-1 for the remainder"]),
    (changed(mesh__fsdp=-1), ["mesh: only one axis"]),
    (changed(checkpoint__keep=0), ["checkpoint.keep: 0"]),
    (changed(objective__name=""), ["objective.name", "distill_jax.objectives"]),
    (changed(data__name=""), ["data.name", "distill_jax.data"]),
    (changed(roles__student__model=""), ["roles.student.model: no model is named"]),
    (changed(roles__student__frozen=True), ["roles: no role is trainable"]),
    (changed(roles__teacher__ema_of="student"), ["roles.teacher.frozen", "moving average"]),
    (
        changed(roles__teacher__frozen=False, roles__teacher__ema_of="studnt"),
        ["roles.teacher.ema_of", "'studnt' is not a trainable role", "did you mean 'student'"],
    ),
    (
        changed(roles__teacher__frozen=False, roles__teacher__ema_of="teacher"),
        ["roles.teacher.ema_of: 'teacher' is not a trainable role"],
    ),
    (
        changed(
            roles__teacher__frozen=False,
            roles__teacher__ema_of="student",
            roles__teacher__decay=1.5,
        ),
        ["roles.teacher.decay: 1.5"],
    ),
    (changed(data__train_transforms=(3,)), ["data.train_transforms: 3 is not of type str"]),
    (
        changed(data__train_transforms="crop", data__transform_kwargs__crp__pad=3),
        ["data.transform_kwargs.crp", "did you mean 'crop'"],
    ),
    (changed(optim__decay_mask=("kernel$", True)), ["optim.decay_mask: 'kernel$' is not a rule"]),
    (changed(optim__decay_mask=(("(", True),)), ["optim.decay_mask: '(' is not a regex"]),
    (changed(eval__metric="accuracy"), ["eval.metric", "held_out/accuracy"]),
    (changed(eval__metric="heldout/x"), ["eval.metric", "did you mean 'held_out'"]),
    (changed(eval__metric="test/x"), ["eval.metric", "only to report", "held_out/x"]),
    (changed(eval__metric="held_out/nll"), ["eval.mode", "worst by held_out/nll", '"min"']),
    (changed(eval__mode="min"), ["eval.mode", "worst by held_out/accuracy", '"max"']),
    (arm(eval={"metric": "held_out/kl"}), ["study.arms.other.eval.mode", '"min"']),
    (changed(study__metric="x"), ["study.metric"]),
    (changed(study__seeds=(0, 0)), ["study.seeds", "repeats"]),
    (changed(study__seeds=("a",)), ["study.seeds: 'a' is not a seed"]),
    (changed(study__reference="kd"), ["study.reference: 'kd' is not an arm"]),
    (arm(optim={"lrr": 1}), ["study.arms.other.optim.lrr", "did you mean 'lr'"]),
    (arm(optim={"lr": "x"}), ["study.arms.other.optim.lr", "float"]),
    (arm(precision="fp8"), ["study.arms.other.precision", "fp8"]),
    (arm(study={"seeds": (1,)}), ["study.arms.other.study"]),
    (structure(delete), ["optim.lr: missing key", "base()"]),
    (structure(misspell), ["optim.leaning_rate", "available: clip_norm"]),
    (structure(retype), ["seed: 'zero' is not of type int"]),
    (structure(plain_role), ["roles.student.classes: missing key", "role()"]),
    (structure(no_group), ["optim: 3 is not of type ConfigDict"]),
]


@pytest.mark.parametrize(("edit", "expected"), WRONG)
def test_wrong_configs_name_path_and_remedy(edit, expected):
    message = refusal(validate, edit(make()))
    for text in expected:
        assert text in message


def test_only_a_config_is_a_config():
    assert "ConfigDict" in refusal(validate, {"seed": 0})


def test_a_moving_average_and_a_stored_network_need_no_model():
    config = override(make(), {"roles.teacher.model": ""})
    validate(config)
    config = override(config, {"roles.teacher.init": "none"})
    assert "roles.teacher.model" in refusal(validate, config)
    validate(override(config, {"roles.teacher.frozen": False, "roles.teacher.ema_of": "student"}))


def test_arms_are_dotted_overrides():
    config = make()
    config.study.arms = {
        "kd": {},
        "ce": {"objective": {"name": "supervised"}, "optim": {"lr": 0.2}},
    }
    config.study.reference = "ce"
    validate(config)
    arms = config_lib.arms(config)
    assert arms == {"kd": {}, "ce": {"objective.name": "supervised", "optim.lr": 0.2}}
    assert override(config, arms["ce"]).objective.kwargs.to_dict() == {}


# Files.


def test_run_stands_for_the_seed_of_the_run():
    config = config_lib.base()
    config.seed, config.data.kwargs = 7, {"split_seed": 3}
    assert config_lib.data_arguments(config) == ({"split_seed": 3}, {})
    assert not config_lib.data_follow_seed(config)
    config.data.kwargs = {"split_seed": "run"}
    assert config_lib.data_arguments(config) == ({"split_seed": 7}, {})
    assert config_lib.data_follow_seed(config)


def test_json_round_trip():
    config = make()
    config.data.train_transforms = ("crop", "flip")
    config.objective.kwargs.layers = (1, 2)
    config.objective.kwargs.mode = "3"
    config.data.transform_kwargs = {"crop": {"parts": (("zoom", {"area": (0.5, 1.0)}),)}}
    config.study.arms = {"a": {}, "b": {"optim": {"lr": 1.0}}}
    config.eval.batch_size = config.get_ref("batch_size") * 2
    text = config_lib.to_json(config)
    restored = config_lib.from_json(text)
    validate(restored)
    assert config_lib.to_json(restored) == text
    assert config_lib.differences(config, restored) == []
    assert restored.is_locked and restored.optim.is_locked and restored.roles.student.is_locked
    assert override(restored, {"optim.clip_norm": "2"}).optim.clip_norm == 2.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        ('{"sed": 1}', "did you mean 'seed'"),
        ('{"seed": "a"}', "seed"),
        ('{"roles": null}', "'roles' is null"),
        ('{"study": null}', "study: is null, not a group"),
        ('{"optim": {"lr": 1' + "0" * 400 + "}}", "optim.lr"),
    ],
)
def test_damaged_stored_configs_are_refused(text, expected):
    assert expected in refusal(config_lib.from_json, text)


def test_a_stored_config_of_an_earlier_version_is_that_of_this_one():
    config = make()
    config.objective.name, config.objective.kwargs = "dino", {"heads_only": "3 epochs"}
    config.optim.warmup = "30 steps"
    config.study.arms = {
        "a": {"total": "4 steps", "bilevel": {"warmup": None}},
        "b": {"objective": {"name": "my.module:Own", "kwargs": {"warmup_epochs": 2.0}}},
        "c": {"objective": {"name": "dkd", "kwargs": {"warmup": "0.5 epochs"}}},
    }
    old = json.loads(config_lib.to_json(config))
    old["total"] = {"steps": None, "epochs": 3.0, "examples": None}
    old["optim"]["warmup"] = {"steps": 30, "epochs": None, "percent": None}
    for group in ("eval", "checkpoint"):
        old[group]["every"] = {"steps": None, "epochs": None, "percent": None}
    old["objective"]["kwargs"] = {"heads_epochs": 3.0}
    arms = old["study"]["arms"]
    arms["a"] = {"total": {"steps": 4, "epochs": None}, "bilevel": {"warmup": {"epochs": None}}}
    arms["c"]["objective"]["kwargs"] = {"warmup_epochs": 0.5}
    found = config_lib.from_json(json.dumps(old))
    assert config_lib.differences(found, config) == []
    assert config_lib.differences(config_lib.from_json(config_lib.to_json(config)), config) == []
    old["weigher"] = old.pop("weighting")
    old["weigher"]["signals"] = old["weigher"].pop("loss_terms")
    old["bilevel"]["order"] = {"after_step": "real"}[old["bilevel"].pop("outer_update")]
    old["bilevel"]["part"] = old["bilevel"].pop("jvp_fraction")
    old["study"]["lanes"] = old["study"].pop("replicas")
    assert config_lib.differences(config_lib.from_json(json.dumps(old)), config) == []
    old["total"]["steps"] = 9
    assert "ambiguous duration: steps=9 and epochs=3.0" in refusal(
        config_lib.from_json, json.dumps(old)
    )


def test_what_json_cannot_hold_is_refused():
    config = make()
    config.objective.kwargs.f = print
    assert "cannot be stored" in refusal(config_lib.to_json, config)


def test_differences_name_path_old_and_new():
    a = make()
    b = override(a, {"optim.lr": 0.2, "log.every_steps": 1, "objective.kwargs.beta": 2})
    assert config_lib.differences(a, b, ignore=("log",)) == [
        "objective.kwargs.beta: (absent) -> 2",
        "optim.lr: 0.1 -> 0.2",
    ]
    assert config_lib.differences(a, b)[0] == "log.every_steps: 50 -> 1"
    assert config_lib.differences(a.to_dict(), a) == []
