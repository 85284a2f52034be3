"""Files as a user has them: images in folders, tables, folders of Hugging Face `datasets`."""

import json

import numpy as np
from PIL import Image


def picture(seed=0, *, height=6, width=5, channels=3):
    shape = (height, width) if channels == 1 else (height, width, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def save(path, pixels, **kwargs):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **kwargs)
    return path


def image_folders(root, *, classes=("cat", "dog"), n=12, **kwargs):
    """`root/<class>/<i>.png`, each image another."""
    for c, name in enumerate(classes):
        for i in range(n):
            save(root / name / f"{i}.png", picture(100 * c + i, **kwargs))
    return root


def csv_file(path, *, n=40, header="age,job,pay", row=None):
    row = row or (lambda i: f"{i},{'abc'[i % 3]},{'yes' if i % 2 else 'no'}")
    path.write_text("\n".join([header, *map(row, range(n))]) + "\n")
    return path


def arrow_table(columns, types=None):
    import pyarrow as pa

    types = types or {}
    return pa.table({name: pa.array(x, types.get(name)) for name, x in columns.items()})


def saved_to_disk(folder, table, features=None):
    """A folder as `Dataset.save_to_disk` of `datasets` 5.2 writes it."""
    import pyarrow as pa

    folder.mkdir(parents=True, exist_ok=True)
    name = "data-00000-of-00001.arrow"
    with pa.OSFile(str(folder / name), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as out:
        out.write_table(table)
    (folder / "dataset_info.json").write_text(json.dumps({"features": features or {}}))
    state = {"_data_files": [{"filename": name}], "_indices_files": None, "_split": None}
    (folder / "state.json").write_text(json.dumps(state))
    return folder
