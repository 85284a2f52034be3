"""Serve an exported network with ONNX Runtime; the file is that of `dj.load(...).export(...)`."""

import json
import sys

import numpy as np
import onnxruntime

folder = sys.argv[1] if len(sys.argv) > 1 else "runs/teacher/export"
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1  # a thread for each request, and requests side by side
session = onnxruntime.InferenceSession(f"{folder}/model.onnx", options)
about = session.get_modelmeta().custom_metadata_map
classes = json.loads(about["classes"])
(image,) = session.get_inputs()  # uint8 [b, h, w, c]: the transforms are in the file

images = np.zeros((3, *image.shape[1:]), np.uint8)
(probabilities,) = session.run(["probabilities"], {image.name: images})
for row in probabilities:
    print(classes[row.argmax()] if classes else row.argmax(), round(float(row.max()), 3))
