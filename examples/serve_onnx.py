"""Classify images with an exported network: `serve_onnx.py FOLDER_OF_EXPORT IMAGE ...`.

Needs numpy, onnxruntime and Pillow alone; the file is that of `dj.load(...).export(...)`.
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image

folder, *paths = sys.argv[1:] or ["runs/teacher/export"]
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1  # a thread for each request, and requests side by side
session = onnxruntime.InferenceSession(f"{folder}/model.onnx", options)
classes = json.loads(session.get_modelmeta().custom_metadata_map["classes"])
(image,) = session.get_inputs()  # uint8 [b, h, w, c]: the transforms are in the file
_, height, width, channels = image.shape

for path in paths:
    opened = Image.open(path).convert("L" if channels == 1 else "RGB").resize((width, height))
    pixels = np.asarray(opened).reshape(1, height, width, channels)
    ((probabilities,),) = session.run(["probabilities"], {image.name: pixels})
    best = probabilities.argmax()
    print(path, classes[best] if classes else best, round(float(probabilities[best]), 3))
