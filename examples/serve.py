"""Load a trained network and apply it to raw inputs; the run is that of README's first command."""

import sys

import numpy as np

import distill_jax as dj

predict = dj.load(sys.argv[1] if len(sys.argv) > 1 else "runs/teacher")
images = np.zeros((3, *predict.input["shape"]), np.uint8)
outputs = predict(images)
for row in outputs["probabilities"]:
    print(predict.classes[row.argmax()], round(float(row.max()), 3))
