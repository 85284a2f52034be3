"""From a config to everything a run needs. Alone in knowing all packages."""

from distill_jax.run.build.controls import predict_controls, untrained
from distill_jax.run.build.data import (
    DataReader,
    batch_shapes,
    load_dataset,
    make_transform,
    open_dataset,
    outer_share,
)
from distill_jax.run.build.evaluators import ask, check_metric, evaluator_of
from distill_jax.run.build.experiment import Experiment, flops_of
from distill_jax.run.build.feed import Feed, feed_shapes
from distill_jax.run.build.method import Outer, make_weighting, schedule_args
from distill_jax.run.build.networks import make_model, provided_to_models
from distill_jax.run.build.phases import build
from distill_jax.run.build.programs import compile_step, is_finite, make_step
from distill_jax.run.build.start import (
    for_evaluation,
    frozen_networks,
    initial_state,
    on_device,
    stored_teacher_outputs,
    with_class_means,
    with_dataset_pass,
)

__all__ = [
    "DataReader",
    "Experiment",
    "Feed",
    "Outer",
    "ask",
    "batch_shapes",
    "build",
    "check_metric",
    "compile_step",
    "evaluator_of",
    "feed_shapes",
    "flops_of",
    "for_evaluation",
    "frozen_networks",
    "initial_state",
    "is_finite",
    "load_dataset",
    "make_model",
    "make_step",
    "make_transform",
    "make_weighting",
    "on_device",
    "open_dataset",
    "outer_share",
    "predict_controls",
    "provided_to_models",
    "schedule_args",
    "stored_teacher_outputs",
    "untrained",
    "with_class_means",
    "with_dataset_pass",
]
