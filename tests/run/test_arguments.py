"""Errors of the library name arguments; in a run they get the path of the config."""

import pytest

import distill_jax as dj
from distill_jax.core.errors import ArgumentError, ConfigError, UserError, below
from distill_jax.run import arguments, flags

CONFIG = flags.load("bilevel/tgeo_kd:smoke")


@pytest.mark.parametrize(
    ("where", "path"),
    [
        ("temperature", "objective.kwargs.temperature"),
        ("blocks", "weighting.kwargs.blocks"),
        ("teacher", "roles.teacher"),
        ("student.input", "roles.student"),
        ("student.widths", "roles.student.kwargs.widths"),
        ("student.model", "roles.student.model"),
        ("weighting", "weighting.name"),
        ("weighting.outputs", "roles.weighting.kwargs.outputs"),
        ("loss_terms", "weighting.loss_terms"),
        ("random_crop", "data.transform_kwargs.random_crop"),
        ("random_crop.padding", "data.transform_kwargs.random_crop.padding"),
        ("batch", "data.train_transforms"),
        ("corrupt.seed", "data.corrupt.seed"),
        ("trust.bins", "evaluators.trust.bins"),
        ("outer_terms", "bilevel.outer_loss"),
        ("no_key", "no_key"),
    ],
)
def test_an_argument_gets_the_path_that_set_it(where, path):
    with pytest.raises(ConfigError) as error, arguments.located(CONFIG):
        raise ArgumentError("is wrong", where=where, hint="another")
    assert str(error.value) == f"{path}: is wrong\n  another"
    assert type(error.value) is ConfigError and isinstance(error.value.__cause__, ArgumentError)


@pytest.mark.parametrize(
    ("where", "path"),
    [("rate", "optim.rate"), ("steps[1].x", "optim.warmup[1].x"), ("", "optim"), ("a", "a")],
)
def test_arguments_of_one_call_stand_below_its_group(where, path):
    with pytest.raises(UserError) as error, below("optim", {"rate": "rate", "steps": "warmup"}):
        raise ArgumentError("is wrong", where=where)
    assert error.value.where == path


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: dj.objectives.KD(temperature=-1), "temperature: temperature is -1"),
        (lambda: dj.Bilevel(unroll=0), "unroll: unroll is 0"),
        (lambda: dj.models.mlp.make(num_classes=3, hidden=(0,)), "hidden: hidden is"),
    ],
)
def test_errors_of_the_library_are_value_errors_that_name_the_argument(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert isinstance(error.value, UserError) and str(error.value).startswith(message)
