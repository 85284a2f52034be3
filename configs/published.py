"""Published top-1 accuracies, in percent, that a study can be held against.

`CIFAR100` gives, for each pair of `configs/studies/kd_cifar100.py`, teacher and student alone and
the methods by their arm names. Means over 3 to 5 runs; no spread is published but for `tgeo_kd`.

- All but the last two: table 1 and 2 of Tian, Krishnan, Isola 2020 (arXiv:1910.10699), as the
  README of its authors' repository prints them; accuracy after the last epoch.
- `dkd`: Zhao et al. 2022 (arXiv:2203.08679), README of its authors' repository, which prints the
  pair ResNet32x4 to ShuffleNetV2 under another name. Its protocol may select the best epoch.
- `tgeo_kd`: Hu et al. 2024 (arXiv:2312.15112), table 1; more epochs than the others.
"""

_PAIRS = (
    "wrn-40-2-wrn-16-2",
    "wrn-40-2-wrn-40-1",
    "resnet56-resnet20",
    "resnet110-resnet20",
    "resnet110-resnet32",
    "resnet32x4-resnet8x4",
    "vgg13-vgg8",
    "vgg13-mobilenet_v2",
    "resnet50-mobilenet_v2",
    "resnet50-vgg8",
    "resnet32x4-shufflenet_v1",
    "resnet32x4-shufflenet_v2",
    "wrn-40-2-shufflenet_v1",
)

_ROWS = {
    "teacher": "75.61 75.61 72.34 74.31 74.31 79.42 74.64 74.64 79.34 79.34 79.42 79.42 75.61",
    "alone": "73.26 71.98 69.06 69.06 71.14 72.50 70.36 64.60 64.60 70.36 70.50 71.82 70.50",
    "kd": "74.92 73.54 70.66 70.67 73.08 73.33 72.98 67.37 67.35 73.81 74.07 74.45 74.83",
    "fitnet": "73.58 72.24 69.21 68.99 71.06 73.50 71.02 64.14 63.16 70.69 73.59 73.54 73.73",
    "at": "74.08 72.77 70.55 70.22 72.31 73.44 71.43 59.40 58.58 71.84 71.73 72.73 73.32",
    "sp": "73.83 72.43 69.67 70.04 72.69 72.94 72.68 66.30 68.08 73.34 73.48 74.56 74.52",
    "cc": "73.56 72.21 69.63 69.48 71.48 72.97 70.71 64.86 65.43 70.25 71.14 71.29 71.38",
    "vid": "74.11 73.30 70.38 70.16 72.61 73.09 71.23 65.56 67.57 70.30 73.38 73.40 73.61",
    "rkd": "73.35 72.22 69.61 69.25 71.82 71.90 71.48 64.52 64.43 71.50 72.28 73.21 72.21",
    "pkt": "74.54 73.45 70.34 70.25 72.61 73.64 72.88 67.13 66.52 73.01 74.10 74.69 73.89",
    "ab": "72.50 72.38 69.47 69.53 70.98 73.17 70.94 66.06 67.20 70.65 73.55 74.31 73.34",
    "ft": "73.25 71.59 69.84 70.22 72.37 72.86 70.58 61.78 60.99 70.29 71.75 72.50 72.03",
    "fsp": "72.91 - 69.95 70.11 71.89 72.62 70.23 - - - - - -",
    "nst": "73.68 72.24 69.60 69.53 71.96 73.30 71.53 58.16 64.96 71.28 74.12 74.68 74.89",
    "crd": "75.48 74.14 71.16 71.46 73.48 75.51 73.94 69.73 69.11 74.30 75.11 75.65 76.05",
    "dkd": "76.23 74.81 71.97 - 74.11 76.32 74.68 69.71 70.35 - 76.45 77.07 76.70",
    "tgeo_kd": "- 75.43 72.98 73.55 75.09 77.27 - - - - 76.83 76.89 77.05",
}

CIFAR100: dict[str, dict[str, float]] = {
    pair: {name: float(row.split()[i]) for name, row in _ROWS.items() if row.split()[i] != "-"}
    for i, pair in enumerate(_PAIRS)
}
