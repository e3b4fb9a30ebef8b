"""The picture of a pipeline's timetables, drawn from `experiments.parallel.timetable`."""

from docs.generate.svg import Drawing
from experiments.parallel import timetable

STAGES, MICROBATCHES = 4, 4
LEFT, UNIT, HIGH = 78, 27, 26


def pipeline() -> Drawing:
    made = Drawing("The timetables of a pipeline under backpropagation and under a direct rule", height=332)
    costs = timetable.equal(STAGES, 1.0, 2.0, 1.0)
    down = timetable.one_forward_one_backward(costs, MICROBATCHES)
    at_once = timetable.direct(costs, MICROBATCHES)
    _panel(made, 18, "backpropagation: a stage waits for the error from above", down)
    lower = _panel(made, 178, "a direct rule: the output error comes to all stages at once", at_once)
    for task in at_once.tasks:
        if task.kind == "F" and task.stage == STAGES - 1:
            x = LEFT + UNIT * task.end
            made.arrow((x, lower), (x, lower + STAGES * HIGH + 7), "fixed", dashed=True)
            made.text(x, lower + STAGES * HIGH + 16, "e" + "₁₂₃₄"[task.microbatch], "fixed", 13)
    x = LEFT + UNIT * at_once.makespan + 50
    legend = (("forward", 1, "1", "forward pass"), ("error", 2, "1′", "error and update"), ("error", 1, "1′", "update"))
    for i, (kind, wide, number, words) in enumerate(legend):
        made.box(x, lower + 20 + 32 * i, number, kind, wide * UNIT - 3, HIGH - 5)
        made.text(x + 110, lower + 20 + 32 * i, words, "ink", 13)
    return made


def _panel(made: Drawing, top: float, title: str, table: timetable.Timetable) -> float:
    """A timetable; the last stage, which has the outputs, is on top. Returns where its stages begin."""
    made.text(LEFT + 240, top, title, "other", 14)
    begin = top + 16
    for stage in range(STAGES):
        made.text(42, begin + HIGH * (STAGES - 1 - stage) + HIGH / 2, f"stage {stage + 1}", "ink", 13)
    for task in table.tasks:
        y = begin + HIGH * (STAGES - 1 - task.stage) + HIGH / 2
        kind = "forward" if task.kind == "F" else "error"
        middle, wide = LEFT + UNIT * (task.start + task.end) / 2, UNIT * (task.end - task.start) - 3
        made.box(middle, y, f"{task.microbatch + 1}" + "′" * (task.kind == "B"), kind, wide, HIGH - 5)
    return begin


PIPELINES = {"pipeline": pipeline}
