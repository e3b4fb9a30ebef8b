"""When each stage of a pipeline does what: timetables of backpropagation and of direct rules.

A stage does one task at a time, in a fixed order, and each task begins as soon as what it needs is there:

- forward of a microbatch: its forward on the stage below.
- backward of a microbatch: in backpropagation, its backward on the stage above; under a direct rule, its forward on the
  last stage, because the output error goes to all stages at once.

    >>> from experiments.parallel import timetable
    >>> even = timetable.equal(stages=4, forward=1.0, backward=2.0, update=1.0)
    >>> {name: make(even, 8).makespan for name, make in timetable.SCHEDULES.items()}
    {'GPipe': 33.0, '1F1B': 33.0, 'direct': 19.0}

Sending takes no time here. With M microbatches, P stages and f for a forward pass, backpropagation takes
3 (M + P - 1) f (both orders of it), and a direct rule with an update of f takes (2 M + P - 1) f.

References:
  GPipe: Huang et al.: GPipe: efficient training of giant neural networks using pipeline parallelism (2019).
  1F1B: Narayanan et al.: PipeDream: generalized pipeline parallelism for DNN training (2019).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple


class Costs(NamedTuple):
    """The time of a task on each stage, for one microbatch; `first` and `last` are counted in the outer stages."""

    forward: Sequence[float]
    backward: Sequence[float]  # of backpropagation: the weight gradients, and the error that goes down
    update: Sequence[float]  # of a direct rule


class Task(NamedTuple):
    """What a stage does from `start` to `end`."""

    stage: int
    kind: str  # "F" or "B"
    microbatch: int
    start: float
    end: float


class Timetable(NamedTuple):
    """All tasks of a step."""

    stages: int
    tasks: list[Task]

    @property
    def makespan(self) -> float:
        """The time of the step."""
        return max(task.end for task in self.tasks)

    @property
    def idle(self) -> list[float]:
        """For each stage, the part of the step in which it waits."""
        busy = [0.0] * self.stages
        for task in self.tasks:
            busy[task.stage] += task.end - task.start
        return [1 - time / self.makespan for time in busy]

    @property
    def in_flight(self) -> list[int]:
        """For each stage, the most microbatches whose forward pass it has done and whose backward pass it has not."""
        most = []
        for stage in range(self.stages):
            steps = [(t.start, 1) for t in self.tasks if t.stage == stage and t.kind == "F"]
            steps += [(t.end, -1) for t in self.tasks if t.stage == stage and t.kind == "B"]
            now, top = 0, 0
            for _, change in sorted(steps):
                now += change
                top = max(top, now)
            most.append(top)
        return most


def equal(stages: int, forward: float, backward: float, update: float) -> Costs:
    """Costs that are equal on all stages."""
    return Costs([forward] * stages, [backward] * stages, [update] * stages)


def gpipe(costs: Costs, microbatches: int) -> Timetable:
    """All forward passes, then all backward passes, the last microbatch first."""
    up = [("F", m) for m in range(microbatches)]
    down = [("B", m) for m in reversed(range(microbatches))]
    return _run([up + down for _ in costs.forward], costs.forward, costs.backward, sequential=True)


def one_forward_one_backward(costs: Costs, microbatches: int) -> Timetable:
    """Backpropagation in which a stage alternates as soon as it can; it keeps at most P microbatches."""
    orders = _alternating(len(costs.forward), microbatches)
    return _run(orders, costs.forward, costs.backward, sequential=True)


def direct(costs: Costs, microbatches: int) -> Timetable:
    """A direct rule: the update of a microbatch runs in all stages as soon as its output error is there."""
    orders = _alternating(len(costs.forward), microbatches)
    return _run(orders, costs.forward, costs.update, sequential=False)


SCHEDULES: dict[str, Callable[[Costs, int], Timetable]] = {
    "GPipe": gpipe,
    "1F1B": one_forward_one_backward,
    "direct": direct,
}


def _alternating(stages: int, microbatches: int) -> list[list[tuple[str, int]]]:
    """P - s forward passes on stage s, then a backward pass and a forward pass in turn."""
    orders = []
    for stage in range(stages):
        ahead = min(stages - stage, microbatches)
        order = [("F", m) for m in range(ahead)]
        for m in range(microbatches):
            order.append(("B", m))
            order += [("F", m + ahead)] if m + ahead < microbatches else []
        orders.append(order)
    return orders


def _run(
    orders: list[list[tuple[str, int]]], forward: Sequence[float], backward: Sequence[float], *, sequential: bool
) -> Timetable:
    last = len(orders) - 1
    ends: dict[tuple[int, str, int], float] = {}
    tasks, free, places = [], [0.0] * len(orders), [0] * len(orders)

    def needed(stage: int, kind: str, m: int) -> tuple[int, str, int] | None:
        if kind == "F":
            return (stage - 1, "F", m) if stage else None
        if sequential:
            return (stage + 1, "B", m) if stage < last else None
        return (last, "F", m)

    while any(place < len(order) for place, order in zip(places, orders, strict=True)):
        before = sum(places)
        for stage, order in enumerate(orders):
            while places[stage] < len(order):
                kind, m = order[places[stage]]
                need = needed(stage, kind, m)
                if need is not None and need not in ends:
                    break
                start = max(free[stage], ends[need] if need else 0.0)
                free[stage] = start + (forward if kind == "F" else backward)[stage]
                ends[stage, kind, m] = free[stage]
                tasks.append(Task(stage, kind, m, start, free[stage]))
                places[stage] += 1
        assert sum(places) > before, "the orders of the stages wait for one another"
    return Timetable(len(orders), tasks)
