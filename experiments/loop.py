"""The training loop: it repeats the step of a `Method` over a data set, for many seeds and settings at once.

    method = by_rule(tasks.task(lambda rngs: models.MLP((64, 100, 10), rngs=rngs)), lrules.backman(), optax.adam(1e-3))
    run = Run(method, data.load("digits"), seeds=range(5))
    records = [run.epoch() for _ in range(10)]

Each seed with its settings is a *lane*. Lanes train together by vmap, in groups that fit the memory; a lane alone is
not vmapped. A part of an epoch is one compiled loop. (On a CPU, a model with convolutions takes its steps one by one
and its lanes one after another: XLA's convolutions are much slower there in a loop, and under vmap. On an accelerator
a model with many convolutions does so, as XLA takes minutes to compile them in a loop.)
"""

import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import memory
from experiments.data import Dataset, fits
from experiments.errors import InputError
from experiments.feed import Feed, Resident, Streamed
from experiments.lanes import Group, over_lanes, shuffle
from experiments.methods import Method, of_examples, one_loss
from experiments.placement import Placement

Array = jax.Array
PyTree = Any
PARTS = 20  # of an epoch, between which the progress is shown
MANY = 10  # convolutions, with which a step on an accelerator takes far longer than its call


class Record(NamedTuple):
    """One epoch: figures by lane, arrays [lanes] or None if not measured, and the seconds that its steps took."""

    epoch: int
    train_loss: np.ndarray
    test_loss: np.ndarray
    accuracy: Any = None  # of the test set
    angle: Any = None  # degrees between the rule's update and backprop's on a fixed batch
    seconds: float = 0.0
    attacked: Any = None  # accuracy of the test set under attack
    validation_loss: Any = None
    validation_accuracy: Any = None

    def validation_figure(self) -> float | None:
        """The mean validation accuracy, or else minus the validation loss; None without a validation set."""
        if self.validation_accuracy is not None:
            return float(self.validation_accuracy.mean())
        return None if self.validation_loss is None else -float(self.validation_loss.mean())


class Diverged(InputError):
    """A loss became NaN or Inf."""


class Run:
    """A method on a data set, for many lanes at once.

    Attributes:
      epochs, step, warmed: the finished epochs, steps of the epoch that has begun, and epochs of the warm-up.
      curve: records inside the epochs and at their ends: {"epoch", "step", "train_loss" (the mean since the record
        before, or of the epoch) and what the method measures [lanes]}.
      compile_seconds: the time that initialising and compiling took.
    """

    def __init__(
        self,
        method: Method | Callable[..., Method],
        data: Dataset,
        *,
        seeds: Sequence[int] = (0,),
        settings: Mapping[str, Sequence[float]] | None = None,
        batch_size: int = 64,
        check_nan: bool = False,
        probe: int = 256,
        record_every: int = 0,
        rows: np.ndarray | None = None,
        placement: Placement | None = None,
        limit: int | None = None,
        resident: int | None = None,
        parts: int = PARTS,
    ):
        """Initialises and compiles.

        Args:
          method: what to train; with `settings`, a function that takes them by name and returns the method.
          data: the data set.
          seeds: the seed of each lane.
          settings: numbers by name, one for each lane, such as {"learning_rate": [0.1, 0.01]}.
          batch_size: examples in a step.
          check_nan: stop with `Diverged` when a loss becomes NaN or Inf.
          probe: training examples on which the method measures; 0: it does not.
          record_every: steps between the records of the curve; 0: none inside an epoch.
          rows: the training examples of each lane [lanes, examples] (default: all); `rows` may be set between epochs.
          placement: where arrays lie, for many devices.
          limit: bytes that a group of lanes may take (default: what the device has).
          resident: bytes that a data set on the device may take; a larger one is read from the disk (default: half of
            what the device has).
          parts: of the first epoch; on an accelerator the loop is compiled for them.
        """
        begin = time.perf_counter()
        self.seeds, self.batch_size, self.check_nan = tuple(seeds), batch_size, check_nan
        self.record_every, self.curve = record_every, list[dict[str, Any]]()
        self.rows = rows
        self._examples = len(data.x_train) if rows is None else rows.shape[1]
        self.steps = steps_per_epoch(data, batch_size, self._examples)
        self.epochs, self.step, self.warmed = 0, 0, 0
        self._seconds, self._losses = 0.0, list[np.ndarray | list[Array]]()
        self._names = tuple(settings or ())
        self._make = method if not isinstance(method, Method) else lambda: method
        self._place = placement or Placement()
        self._functions: dict[tuple[str, int], Any] = {}
        values = [np.asarray(v, np.float32) for v in (settings or {}).values()]
        example = self._make(**{name: v[0] for name, v in zip(self._names, values, strict=True)})
        self._measures, self._attacks = probe > 0 and example.measure is not None, example.attacked is not None
        self._warms_up = example.warm_up is not None
        # The loop, and the lanes of a group, are those of one compiled program.
        self._fixed = jax.default_backend() != "cpu"
        self._looped = example.convolves < MANY if self._fixed else not example.convolves
        self._feed: Feed
        available = self._place.least(memory.available())
        limit = available if limit is None else limit
        if rows is not None or fits(data, available // 2 if resident is None else resident):
            self._feed = Resident(data, self._place.whole)
        else:
            self._feed = Streamed(
                data,
                self._place.whole,
                seed=self.seeds[0],
                batch_size=batch_size,
                steps=self.steps if self._looped else 1,
                record_every=record_every,
            )
        self._probe = self._feed.first(probe)
        lies, batch = example.lies, self._feed.first(batch_size)[0]
        self._lies = None if lies is None else lambda carry: lies(carry, batch)
        keys = self._place.whole(jax.vmap(jax.random.key)(jnp.asarray(self.seeds)))

        def group(start: int, stop: int) -> Group:
            lanes = slice(start, stop)
            return Group(lanes, keys[lanes], tuple(self._place.whole(v[lanes]) for v in values))

        lanes = len(self.seeds)
        longest = self._stops(parts)[0] if self._fixed else self._longest
        size = memory.fitting(lanes, lambda n: self._train(group(0, n), longest), limit) if self._looped else 1
        self._groups = [group(i, min(i + size, lanes)) for i in range(0, lanes, size)]
        for g in self._groups:
            g.carry = self._place.carry(self._call("init", 2, g, g.keys, *self._feed.first(batch_size)), self._lies)
            self._train(g, longest)
        self.compile_seconds = time.perf_counter() - begin

    # The functions of the method, for the lanes of a group

    def _method(self, settings: Sequence[Any]) -> Method:
        return self._make(**dict(zip(self._names, settings, strict=True)))

    def _call(self, name: str, shared: int, group: Group, *args: Any) -> Any:
        """A function of the method for all lanes of a group; the last `shared` arguments are the same for all."""

        def one(settings: Any, *args: Any) -> Any:
            found = getattr(self._method(settings), name)(*args)
            return of_examples(found, len(args[-1])) if name in ("evaluate", "attacked") else found

        if (name, group.size) not in self._functions:
            self._functions[name, group.size] = jax.jit(over_lanes(one, group.size, shared))
        return self._functions[name, group.size](group.settings, *args)

    @property
    def _longest(self) -> int:
        """The most steps of a call of the compiled loop."""
        return (self._feed.chunk or self.steps) if self._looped else 1

    def _train(self, group: Group, longest: int, name: str = "step") -> Any:
        """The compiled loop: (settings, carry, keys, order, start, length, x, y) -> (carry, losses [lanes, longest]).

        The order has the rows of x and y for each step; where a part of the set is given, it begins at `start`. On an
        accelerator the length is always `longest`, which XLA knows: otherwise it would ask the host after each step.
        """
        key = (f"{longest} times {name}", group.size)
        if key in self._functions:
            return self._functions[key]

        def train(
            settings: Any, carry: PyTree, key: Array, order: Array, start: Any, length: Any, x: Array, y: Array
        ) -> tuple[PyTree, Array]:
            step = getattr(self._method(settings), name)

            def body(i: Any, loop: tuple[PyTree, Array]) -> tuple[PyTree, Array]:
                carry, losses = loop
                rows = order[i if self._feed.chunk else start + i]
                batch = [self._place.batch(a[rows]) for a in (x, y)]
                carry, loss = step(carry, jax.random.fold_in(key, start + i), *batch)
                return carry, losses.at[i].set(one_loss(loss))

            first = carry, jnp.zeros(longest)
            if not self._looped:
                return body(0, first)
            return jax.lax.fori_loop(0, longest if self._fixed else length, body, first)

        init = functools.partial(self._call, "init", 2, group)
        carry = jax.eval_shape(init, group.keys, *self._feed.first(self.batch_size))
        layout = self._place.layout(carry, self._lies)
        if layout is not None:
            carry = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), carry, layout)
        keys, order = self._shuffle(group, 2, 0)
        x, y = next(iter(self._feed.parts(0, 0)))
        arguments = carry, keys, self._feed.order(order), 0, longest, x, y
        jitted = jax.jit(over_lanes(train, group.size, 4), donate_argnums=1, out_shardings=(layout, None))
        self._functions[key] = jitted.lower(group.settings, *arguments).compile()
        return self._functions[key]

    # Training

    def _shuffle(self, group: Group, purpose: int, epoch: int) -> tuple[Array, Array]:
        """The keys [lanes] and orders of examples [lanes, steps, batch] of an epoch."""
        keys, order = shuffle(group.keys, purpose, epoch, self._examples, self.steps, self.batch_size)
        if self.rows is None:
            return keys, order
        rows = self._place.whole(self.rows[group.lanes])
        return keys, jax.vmap(lambda rows, order: rows[order])(rows, order)

    def order(self, epoch: int) -> np.ndarray:
        """The examples of each step of an epoch [lanes, steps, batch]."""
        return self._joined(self._shuffle(group, 2, epoch)[1] for group in self._groups)

    def _stops(self, parts: int) -> list[int]:
        """The steps after which the host takes over: equal parts if there is a divisor, records among them."""
        most = math.ceil(self.steps / parts)
        if not self._looped:
            length = 1
        elif self._feed.chunk:
            length = self._feed.chunk
        elif self.record_every:
            length = max(n for n in range(1, min(most, self.record_every) + 1) if self.record_every % n == 0)
        else:
            equal = [n for n in range(parts, parts // 4, -1) if self.steps % n == 0]
            length = self.steps // equal[0] if equal else most
        return [*range(length, self.steps, length), self.steps]

    def _finish(self, name: str, purpose: int, epoch: int, parts: int, advance: Callable[[int], Any] | None) -> bool:
        """Trains from the present step to the end of an epoch; False if `advance` stopped it before."""
        shuffled = jax.block_until_ready([self._shuffle(group, purpose, epoch) for group in self._groups])
        begin = time.perf_counter()
        finished = True
        parts_read = self._feed.parts(2 * epoch + (purpose == 3), self.step)  # a warm-up has an order of its own
        shuffled = [(keys, self._feed.order(order)) for keys, order in shuffled]
        for stop in self._stops(parts):
            if stop <= self.step:
                continue
            losses = []
            x, y = next(parts_read)
            for group, (keys, order) in zip(self._groups, shuffled, strict=True):
                length = stop - self.step
                train = self._train(group, length if self._fixed else self._longest, name)
                group.carry, loss = train(group.settings, group.carry, keys, order, self.step, length, x, y)
                losses.append(loss[:, :length])
            self._losses.append(losses)
            done, self.step = stop - self.step, stop
            if self.check_nan:
                self._check()
            if name == "step" and self.record_every and stop % self.record_every == 0 and stop < self.steps:
                self.curve.append(self._curve_record([keys for keys, _ in shuffled]))
            if advance:
                jax.block_until_ready(losses)
                pause = time.perf_counter()
                stopped = advance(done)
                begin += time.perf_counter() - pause  # a checkpoint, perhaps
                if stopped and stop < self.steps:
                    finished = False
                    break
        jax.block_until_ready([group.carry for group in self._groups])
        self._seconds += time.perf_counter() - begin
        return finished

    @property
    def validates(self) -> bool:
        """Whether there is a validation set."""
        return "val" in self._feed.sets

    @property
    def learns_feedback(self) -> bool:
        """Whether there is feedback that a warm-up would train."""
        feedback = getattr(self._groups[0].carry, "feedback", None)
        return feedback is not None and bool(jax.tree.leaves((feedback.learned, feedback.state)))

    def warm_up(self, epochs: int, *, parts: int = PARTS, advance: Callable[[int], Any] | None = None) -> bool:
        """Trains only what the method says must be ready before, for some epochs, which do not count as epochs.

        The later epochs have the same batches as without a warm-up. `advance` is that of `epoch`; if it stops the
        warm-up, the result is False, and the next call goes on from there.
        """
        while self._warms_up and self.learns_feedback and self.warmed < epochs:
            if not self._finish("warm_up", 3, self.warmed, parts, advance):
                return False
            self.warmed, self.step, self._losses = self.warmed + 1, 0, []
        self._seconds = 0.0
        return True

    def epoch(self, *, parts: int = PARTS, advance: Callable[[int], Any] | None = None) -> Record | None:
        """Trains to the end of the epoch and evaluates.

        It calls `advance(steps)` after each of about `parts` parts. If that returns true, the epoch stops there, the
        result is None, and the next call goes on from there.
        """
        if not self._finish("step", 2, self.epochs, parts, advance):
            return None
        measured = self.measure(self.epochs)
        losses = self._epoch_losses()
        train_loss = losses.mean(1)
        since = (self.steps - 1) // self.record_every * self.record_every if self.record_every else 0
        seconds = self._end_epoch()
        test = self.evaluate(*self._feed.sets["test"])
        held = self.evaluate(*self._feed.sets["val"]) if "val" in self._feed.sets else {}
        attacked = self.evaluate(*self._feed.sets["test"], name="attacked") if self._attacks else {}
        record = Record(
            self.epochs,
            train_loss,
            test["loss"],
            test.get("accuracy"),
            measured.get("angle"),
            seconds,
            attacked.get("accuracy"),
            held.get("loss"),
            held.get("accuracy"),
        )
        recent = losses[:, since:].mean(1)
        self.curve.append({"epoch": self.epochs, "step": self.steps, "train_loss": recent} | measured)
        return record

    def steps_of_an_epoch(self) -> np.ndarray:
        """Trains for an epoch without evaluating; returns the losses [lanes, steps]."""
        self._finish("step", 2, self.epochs, 1, None)
        losses = self._epoch_losses()
        self._end_epoch()
        return losses

    def _end_epoch(self) -> float:
        """Counts the epoch as finished; returns the seconds of its steps."""
        seconds, self._seconds = self._seconds, 0.0
        self.epochs, self.step, self._losses = self.epochs + 1, 0, []
        return seconds

    def measure(self, epoch: int) -> dict[str, np.ndarray]:
        """What the method measures on the probe [lanes], with the keys of an epoch."""
        return self._measured([self._shuffle(group, 2, epoch)[0] for group in self._groups])

    def _measured(self, keys: Sequence[Array]) -> dict[str, np.ndarray]:
        if not self._measures:
            return {}
        return self._joined(
            self._call("measure", 2, group, group.carry, k, *self._probe)
            for group, k in zip(self._groups, keys, strict=True)
        )

    def evaluate(self, x: Array, y: Array, *, batch_size: int = 250, name: str = "evaluate") -> dict[str, np.ndarray]:
        """Means over a set of examples [lanes], such as "loss" and "accuracy"; `attacked` is the other name."""
        found = self.figures(x, y, batch_size=batch_size, name=name)
        return {figure: values.mean(1) for figure, values in found.items()}

    def figures(self, x: Array, y: Array, *, batch_size: int = 250, name: str = "evaluate") -> dict[str, np.ndarray]:
        """The figures of each example of a set [lanes, examples]."""
        size = min(batch_size, len(x))
        starts = [*range(0, len(x) - size, size), len(x) - size]  # the last batch overlaps: all have one size
        parts = []
        for i, start in enumerate(starts):
            examples = self._feed.put(x[start : start + size]), self._feed.put(y[start : start + size])
            known = i * size - start
            found = self._joined(self._call(name, 2, g, g.carry, *examples) for g in self._groups)
            parts.append({figure: values[:, known:] for figure, values in found.items()})
        return {figure: np.concatenate([part[figure] for part in parts], 1) for figure in parts[0]}

    def _joined(self, by_group: Any) -> Any:
        """The results of all groups, as NumPy arrays [lanes, ...]."""
        return jax.tree.map(lambda *parts: np.concatenate(parts), *map(self._place.gather, by_group))

    def _epoch_losses(self) -> np.ndarray:
        """The losses of the epoch so far [lanes, steps]."""
        parts = [p if isinstance(p, np.ndarray) else np.concatenate(self._place.gather(p)) for p in self._losses]
        joined = np.concatenate(parts, 1) if parts else np.zeros((len(self.seeds), 0), np.float32)
        self._losses = [joined]
        return joined

    def _curve_record(self, keys: Sequence[Array]) -> dict[str, Any]:
        losses = self._epoch_losses()[:, -self.record_every :].mean(1)
        return {"epoch": self.epochs + 1, "step": self.step, "train_loss": losses} | self._measured(keys)

    def _check(self) -> None:
        losses = self._epoch_losses()
        bad = np.argwhere(~np.isfinite(losses.T))
        if len(bad):
            step, lane = bad[0]
            raise Diverged(
                f"The loss of seed {self.seeds[lane]} became NaN or Inf in epoch {self.epochs + 1}, step {step + 1}: "
                "lower the learning rate or look for extreme values in the data."
            )

    # What a checkpoint holds

    @property
    def carry(self) -> PyTree:
        """What the method carries, every leaf [lanes, ...]."""
        carries = [group.carry for group in self._groups]
        return carries[0] if len(carries) == 1 else jax.tree.map(lambda *parts: jnp.concatenate(parts), *carries)

    @carry.setter
    def carry(self, carry: PyTree) -> None:
        for group in self._groups:
            own = jax.tree.map(lambda leaf, group=group: leaf[group.lanes], carry)
            group.carry = self._place.carry(own if len(self._groups) > 1 else carry, self._lies)

    def state(self) -> dict[str, Any]:
        """All that the next step depends on: give it to `restore` of a run that was made the same way."""
        losses = self._epoch_losses()
        return {
            "carry": self.carry,
            "losses": np.pad(losses, ((0, 0), (0, self.steps - self.step))),  # always of one shape
            "epochs": self.epochs,
            "step": self.step,
            "warmed": self.warmed,
            "seconds": self._seconds,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from a `state`."""
        self.carry = state["carry"]
        self.epochs, self.step, self.warmed = (int(state[name]) for name in ("epochs", "step", "warmed"))
        self._losses, self._seconds = [np.asarray(state["losses"])[:, : self.step]], float(state["seconds"])


def steps_per_epoch(data: Dataset, batch_size: int, examples: int | None = None) -> int:
    """The number of full batches in an epoch; the examples that are left out differ from epoch to epoch."""
    examples = len(data.x_train) if examples is None else examples
    steps = examples // batch_size
    if not steps:
        raise InputError(
            f"The batch size must be <= {examples}, the number of training examples of {data.name}, got {batch_size}."
        )
    return steps
