"""A run as a value: JSON and back, its hash, and one sentence for each wrong field."""

import dataclasses
import json

import pytest

from experiments.config import Config
from experiments.errors import InputError


def test_it_survives_json():
    config = Config(rule="backman(alpha=0.5)", widths=(3, 4), weight_decay=0.1, layers=True)
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_it_is_loaded_from_a_file_or_a_result(tmp_path):
    config = Config(epochs=7)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    (tmp_path / "metrics.json").write_text(json.dumps({"config": config.to_dict(), "accuracy": 1}))
    assert Config.load(tmp_path / "config.json") == Config.load(str(tmp_path / "metrics.json")) == config


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "cannot be read"),
        ("{", "is not JSON"),
        ("[1]", "must hold a JSON object, got list"),
        ('{"epoch": 3}', "has no field 'epoch': did you mean 'epochs'"),
    ],
)
def test_a_wrong_file_is_told(tmp_path, content, sentence):
    if content is not None:
        (tmp_path / "c.json").write_text(content)
    with pytest.raises(InputError, match=sentence):
        Config.load(tmp_path / "c.json")


def test_the_hash_is_that_of_the_values_that_differ_from_the_defaults(monkeypatch):
    """So a field that comes later, at its default, leaves the hash of old runs as it is."""
    config = Config(epochs=7)
    hashes = {Config().hash(), config.hash(), config.replace(seed=1).hash(), config.replace(rule="backman").hash()}
    assert len(hashes) == 4 and config.hash() == Config(epochs=7).hash()
    dicts = Config.to_dict
    monkeypatch.setattr(Config, "to_dict", lambda self: dicts(self) | {"new": 1})
    assert config.hash() in hashes


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"epochs": 0}, "epochs must be an integer >= 1, got 0"),
        ({"seeds": 1.5}, "seeds must be an integer >= 1, got 1.5"),
        ({"seeds": True}, "seeds must be an integer >= 1, got True"),
        ({"learning_rate": float("nan")}, "learning_rate must be a number >= 0, got nan"),
        ({"clip": 0}, "clip must be a number > 0, got 0"),
        ({"validation": 1.5}, "validation must be a number >= 0 and <= 0.999, got 1.5"),
        ({"loss": "l2"}, "loss has no choice 'l2': use one of: cross_entropy"),
        ({"rule": 3}, "rule must be a text, got 3"),
        ({"layers": 1}, "layers must be true or false, got 1"),
        ({"widths": [8, 0]}, "widths must be an integer >= 1, got 0"),
        ({"seed": 2**31 - 1, "seeds": 2}, "The last seed must be below 2\\*\\*31, got 2147483648"),
        ({"layers": True, "probe": 0}, "as in probe=256"),
        ({"accumulate": 3}, "accumulate must divide the batch size 64, got 3"),
    ],
)
def test_a_wrong_value_is_told(changes, sentence):
    with pytest.raises(InputError, match=sentence):
        Config(**changes)


def test_it_is_a_value():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().epochs = 3  # type: ignore[misc]
    assert Config(widths=[3]) == Config(widths=(3,)) and {Config(), Config()} == {Config()}
