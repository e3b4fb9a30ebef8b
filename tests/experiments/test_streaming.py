"""Batches from the disk: all examples once, the same from the same seed, whatever reads them; and in little memory."""

import json
import subprocess
import sys
import threading

import numpy as np
import pytest

from experiments import data, streaming
from experiments.errors import InputError
from experiments.rows import Column, Rows
from tests.experiments.programs import ROOT, environment


def numbered(examples=50):
    """Each example holds its own number."""
    x = np.tile(np.arange(examples, dtype=np.uint8)[:, None, None, None], (1, 2, 2, 1))
    return data.Dataset(x, np.arange(examples) % 3, x[:5], np.arange(5) % 3, 3, "numbered")


def read(*args, **options):
    return list(streaming.chunks(*args, **options))


def equal(one, other):
    return len(one) == len(other) and all(
        (a == b).all() for pair in zip(one, other, strict=True) for a, b in zip(*pair, strict=True)
    )


def test_an_epoch_has_every_example_once_in_full_batches():
    found = read(numbered(), 7, 0, 0, 3)
    assert [x.shape for x, _ in found] == [(3, 7, 2, 2, 1), (3, 7, 2, 2, 1), (1, 7, 2, 2, 1)]
    assert [y.shape for _, y in found] == [(3, 7), (3, 7), (1, 7)]
    x, y = (np.concatenate([chunk[i].reshape(-1, *chunk[i].shape[2:]) for chunk in found]) for i in (0, 1))
    assert x.dtype == np.uint8 and len(set(x[:, 0, 0, 0])) == 49 and (x[:, 0, 0, 0] % 3 == y).all()
    assert (x == x[:, :1, :1]).all()


def test_the_order_is_that_of_the_seed_and_the_epoch():
    one = read(numbered(), 5, 0, 0, 4)
    assert equal(one, read(numbered(), 5, 0, 0, 4))
    others = [read(numbered(), 5, seed, epoch, 4) for seed, epoch in ((0, 1), (1, 0), (1, 1))]
    assert not any(equal(one, other) for other in others) and not equal(others[0], others[1])
    steps = [np.concatenate([x for x, _ in read(numbered(), 5, 0, 0, steps)]) for steps in (1, 4, 100)]
    assert (steps[0] == steps[1]).all() and (steps[0] == steps[2]).all()  # however they are cut into chunks


@pytest.mark.parametrize(("threads", "ahead"), [(0, 0), (0, 3), (1, 1), (4, 2), (3, 10)])
def test_the_batches_do_not_depend_on_who_reads_them(threads, ahead):
    assert equal(read(numbered(), 5, 3, 2, 2), read(numbered(), 5, 3, 2, 2, threads=threads, ahead=ahead))


def test_each_process_reads_its_own_part_of_every_batch():
    whole = read(numbered(), 6, 0, 0, 3)
    seen = []
    for process in range(3):
        watched = numbered()._replace(x_train=Watched(numbered().x_train))
        seen.append(read(watched, 6, 0, 0, 3, process=(process, 3)))
        assert watched.x_train.rows_read == 48 // 3
    joined = [
        tuple(np.concatenate(part, axis=1) for part in zip(*chunks, strict=True)) for chunks in zip(*seen, strict=True)
    ]
    assert equal(whole, joined)
    with pytest.raises(InputError, match="must be a multiple of 4, the number of processes, got 6"):
        streaming.chunks(numbered(), 6, 0, 0, 3, process=(0, 4))


@pytest.mark.parametrize("threads", [0, 2])
def test_the_position_is_saved_and_restored(threads):
    whole = read(numbered(), 5, 0, 0, 2, threads=threads)
    for taken in range(len(whole) + 1):
        first = streaming.chunks(numbered(), 5, 0, 0, 2, threads=threads)
        head = [next(first) for _ in range(taken)]
        state = json.dumps(first.get_state())
        second = streaming.chunks(numbered(), 5, 0, 0, 2, threads=threads)
        second.set_state(json.loads(state))
        assert equal(whole, head + list(second))


class Watched:
    """An array that tells what is read of it."""

    def __init__(self, x):
        self.x, self.rows_read, self.second = x, 0, threading.Event()
        self.shape, self.dtype = x.shape, x.dtype
        self._reads = 0

    def __len__(self):
        return len(self.x)

    def __getitem__(self, rows):
        self._reads += 1
        self.rows_read += len(rows)
        if self._reads == 2:
            self.second.set()
        return self.x[rows]


def test_the_next_chunk_is_read_while_the_first_is_used():
    watched = numbered()._replace(x_train=Watched(numbered().x_train))
    iterator = streaming.chunks(watched, 5, 0, 0, 1)
    next(iterator)
    assert watched.x_train.second.wait(timeout=60)  # nobody has asked for the second chunk
    rest = len(list(iterator))
    lazy = numbered()._replace(x_train=Watched(numbered().x_train))
    iterator = streaming.chunks(lazy, 5, 0, 0, 1, threads=0)
    next(iterator)
    assert rest == 9 and lazy.x_train.rows_read == 5


def test_rows_on_the_disk_and_features_of_records_are_read_alike(tmp_path):
    whole = numbered()
    np.save(tmp_path / "x.npy", whole.x_train)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    column = Column([{"image": row} for row in whole.x_train], "image", (2, 2, 1), np.uint8)
    for x in (mapped, Rows(mapped, np.arange(50)), column, Rows(column, np.arange(50))):
        assert equal(read(whole, 5, 0, 0, 2), read(whole._replace(x_train=x), 5, 0, 0, 2))


def test_floats_come_as_float32_and_targets_may_be_images():
    x = np.random.default_rng(0).random((6, 2, 2, 1))
    pictures = data.Dataset(x, x, x, x, 4, "pictures")
    pictures = pictures._replace(y_train=x.copy())
    for inputs, targets in streaming.chunks(pictures, 3, 0, 0, 2):
        assert inputs.dtype == targets.dtype == np.float32 and targets.shape == (2, 3, 2, 2, 1)
        assert (inputs == targets).all()


def test_fits_counts_the_bytes_of_all_parts():
    small = data.Dataset(*(np.zeros(n, np.uint8) for n in (100, 10, 50, 5)), 3, "small")
    assert data.fits(small, 165) and not data.fits(small, 164)
    assert not data.fits(small._replace(x_val=np.zeros(1, np.float32), y_val=np.zeros(1, np.uint8)), 169)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch": 51}, "must be <= 50, the number of training examples of numbered, got 51"),
        ({"batch": 0}, "The batch size must be at least 1, got 0"),
        ({"steps": 0}, "The number of steps in a chunk must be at least 1, got 0"),
        ({"seed": -1}, "The seed must be at least 0, got -1"),
        ({"epoch": -1}, "The epoch must be at least 0, got -1"),
        ({"threads": -1}, "The number of threads must be at least 0, got -1"),
        ({"ahead": 0}, "The number of chunks ahead must be at least 1, got 0"),
    ],
)
def test_numbers_out_of_range(options, words):
    with pytest.raises(InputError, match=words):
        streaming.chunks(numbered(), **({"batch": 5, "seed": 0, "epoch": 0, "steps": 2} | options))


IN_LITTLE_MEMORY = """
import re, resource, sys
import numpy as np
from experiments import data, streaming

small = data.load("digits")
list(streaming.chunks(small, 16, 0, 0, 4))  # JAX and Grain have started what they need
used = int(re.search(r"VmData:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (used + 96 * 2**20,) * 2)
loaded = data.split_validation(data.load("npy:" + sys.argv[1]), 0.25)
assert not data.fits(loaded, 96 * 2**20)
rows = sum(x.shape[0] * x.shape[1] for x, _ in streaming.chunks(loaded, 16, 0, 0, 4))
rows += sum(len(loaded.x_val[i : i + 64]) for i in range(0, len(loaded.x_val), 64))
try:
    np.array(loaded.x_train)
except MemoryError:
    print(rows, "rows; the whole does not fit")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits memory without mapped files")
def test_a_set_larger_than_the_memory(tmp_path):
    """256 MiB of images where 96 MiB are left; the file is sparse, so that it takes no room on the disk."""
    images = np.lib.format.open_memmap(tmp_path / "x_train.npy", "w+", np.uint8, (4096, 256, 256, 1))
    images[::64, 0, 0] = 255
    np.save(tmp_path / "y_train.npy", np.arange(4096) % 4)
    np.save(tmp_path / "x_test.npy", np.zeros((4, 256, 256, 1), np.uint8))
    np.save(tmp_path / "y_test.npy", np.arange(4))
    command = [sys.executable, "-c", IN_LITTLE_MEMORY, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.stdout == "4096 rows; the whole does not fit\n", done.stderr
