"""Trained parameters and feedback as plain files, for use without this repository.

    export.export("results/train/export", params, feedback)

    arrays = numpy.load("params.npz")                # {"layers/0/kernel": ..., ...}
    structure = json.load(open("structure.json"))    # for each array: shape, dtype, and how it is stored

`params.npz` has one array per parameter; its name is its path in the model, joined by "/", and feedback of a layer has
the same name. `feedback.npz` is the file that `lrules.feedback.save` writes. NumPy has no bfloat16 and the like: such
an array is stored as unsigned integers of the same bits, and `array.view(dtype)` with the dtype of `structure.json`,
from the package ml_dtypes, gives the numbers back.
"""

import io
import pathlib
import zipfile
from typing import Any

import jax
import numpy as np

import lrules
from experiments import files
from experiments.errors import InputError

Pytree = Any


def export(folder: str | pathlib.Path, params: Pytree, feedback: lrules.Feedback | None = None) -> pathlib.Path:
    """Write params.npz, feedback.npz if there is feedback, and structure.json, which comes last: with it, all is there.

    Args:
      folder: the folder; it is made if it does not exist.
      params: a pytree of arrays. With a leading axis of seeds, the arrays keep it.
      feedback: the feedback of the rule.

    Returns:
      The folder.

    Raises:
      InputError: the folder cannot be written.
    """
    folder = files.check_writable(folder)
    structure = folder / "structure.json"
    structure.unlink(missing_ok=True)  # it would describe other arrays
    arrays: dict[str, Any] = {}
    entries: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value") or "params"
        while name in arrays:  # {"a/b": ...} and {"a": {"b": ...}} read alike
            name += "'"
        array = np.asarray(leaf)
        stored = array if array.dtype.isbuiltin == 1 else array.view(f"u{array.dtype.itemsize}")
        entries[name] = {"shape": array.shape, "dtype": array.dtype.name, "stored": stored.dtype.name}
        arrays[name] = stored
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as npz:  # np.savez takes no array of the name "file"
        for name, array in arrays.items():
            with npz.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, array, allow_pickle=False)
    files.write_atomic(folder / "params.npz", content.getvalue())
    names = {"params": "params.npz"}
    if feedback is not None:
        try:
            lrules.feedback.save(folder / "feedback.npz", feedback)
        except OSError as error:
            raise InputError(
                f"The feedback cannot be written to {folder} ({files.reason(error)}): free space there, or give "
                "another --output."
            ) from error
        names["feedback"] = "feedback.npz"
    files.write_json(structure, {"format": 1, "files": names, "params": entries})
    return folder
