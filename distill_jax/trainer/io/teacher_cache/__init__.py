# ruff: noqa: F401
"""Outputs of frozen networks for every training example, stored once and read in every step.

A view of an example is a function of (seed, epoch, example), so the outputs for it stay valid
whatever the order and the batch. One row is stored for each example and view; where the view does
not depend on the epoch, one row serves all epochs. What a view depends on is read off the traced
transforms.

A row of a matrix product does not depend on the other rows of its operand nor on its place among
them, but on CPU its last bits depend on how many rows there are. The teacher therefore runs on
batches of the size that a device sees in training. Its outputs, stored in float32, then equal those
of the step bit for bit. So does the student where the compiler fuses the rest of the step alike:
perceptrons, convnets and ResNets on CPU. The losses of a vision transformer on resident data differ
in the last bit, although it gets the same outputs.

A folder for each role:

    key.json             everything that determines the outputs; other runs must have the same
    <view>-<chunk>/      rows of a view: <field>.npy and digest.json; complete where it exists

A chunk is written beside its place and renamed, so an interrupted filling goes on where it stopped
and a longer training adds what is missing. Processes divide the chunks and share the folder.

`plan` decides what is stored, `store` reads and writes chunks, `fill` runs the networks.
"""

from distill_jax.trainer.io.teacher_cache.fill import Stopped, prepare
from distill_jax.trainer.io.teacher_cache.plan import (
    Plan,
    make_plan,
    select_outputs,
    teacher_fn_model,
)
from distill_jax.trainer.io.teacher_cache.store import Store, TeacherOutputs, open_store
