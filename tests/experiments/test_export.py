"""Exported files hold what was trained, for readers that have NumPy alone."""

import json
import os

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

import lrules
from experiments import models
from experiments.errors import InputError
from experiments.export import export


def read(folder):
    """As the docstring of the module says it."""
    structure = json.loads((folder / "structure.json").read_text())
    with np.load(folder / structure["files"]["params"]) as file:
        arrays = dict(file)
    assert set(arrays) == set(structure["params"])
    for name, entry in structure["params"].items():
        assert entry["stored"] == arrays[name].dtype.name
        if entry["stored"] != entry["dtype"]:
            arrays[name] = arrays[name].view(getattr(ml_dtypes, entry["dtype"]))
        assert entry["shape"] == list(arrays[name].shape) and entry["dtype"] == arrays[name].dtype.name
    return arrays, structure


def test_a_model(tmp_path):
    """Feedback has the names of the parameters; with an axis of seeds, the arrays keep it."""
    model = models.build("mlp", (4,), 3, rngs=nnx.Rngs(0), widths=[8, 8], activation="tanh")
    net, params = lrules.from_nnx(model)
    feedback = lrules.feedback_alignment().init(jax.random.key(0), net, params, jnp.ones((2, 4)))
    assert export(tmp_path / "one", params, feedback) == tmp_path / "one"
    arrays, structure = read(tmp_path / "one")
    weights = [name for name, array in arrays.items() if array.ndim == 2]
    assert len(weights) == 3 and set(feedback.fixed) == set(weights[1:])
    assert [tuple(a.shape) for a in arrays.values()] == [leaf.shape for leaf in jax.tree.leaves(params)]
    assert all(np.array_equal(a, leaf) for a, leaf in zip(arrays.values(), jax.tree.leaves(params), strict=True))
    loaded = lrules.feedback.load(tmp_path / "one" / structure["files"]["feedback"])
    assert all(jnp.array_equal(loaded.fixed[name], value) for name, value in feedback.fixed.items())
    export(tmp_path / "two", jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), params))
    arrays, structure = read(tmp_path / "two")
    assert arrays[weights[0]].shape == (2, 4, 8) and structure["files"] == {"params": "params.npz"}


def test_names_and_dtypes(tmp_path):
    params = {"a": [jnp.ones(2, jnp.bfloat16)], "b": {"c": jnp.ones((), jnp.float8_e4m3fn), "value": np.ones(1)}}
    params |= {"file": jnp.ones(1), "b/c": jnp.zeros(3, jnp.int4)}
    export(tmp_path, params)
    arrays, _ = read(tmp_path)
    assert {name: array.dtype.name for name, array in arrays.items()} == {
        "a/0": "bfloat16", "b/c": "float8_e4m3fn", "b": "float64", "b/c'": "int4", "file": "float32",
    }  # fmt: skip
    export(tmp_path, jnp.zeros(3))
    assert list(read(tmp_path)[0]) == ["params"]


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    """One sentence, and no structure.json that describes files of another export."""
    export(tmp_path / "a", {"w": jnp.ones(2)}, lrules.Feedback({}, {}))
    replace = os.replace

    def full(source, target):
        if str(target).endswith("feedback.npz"):
            raise OSError(28, os.strerror(28))
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(InputError, match=r"^The feedback cannot be written to \S+ \(No space left on device\): free"):
        export(tmp_path / "a", {"w": jnp.ones(2)}, lrules.Feedback({}, {}))
    assert sorted(os.listdir(tmp_path / "a")) == ["feedback.npz", "params.npz"]
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written"):
        export(tmp_path / "file", {})


def test_the_folder_may_be_a_text(tmp_path):
    folder = export(f"{tmp_path}/new", {"w": np.ones(2)})
    assert sorted(path.name for path in folder.iterdir()) == ["params.npz", "structure.json"]
