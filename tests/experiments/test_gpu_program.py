"""The session on a GPU, as far as a CPU can run it: each part tiny, what is kept, what fails, and its tables."""

import importlib
import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import rules
from experiments.gpu import correctness, report, session, steps, tables
from tests.experiments.programs import ROOT, run


@pytest.mark.slow
def test_the_whole_session_tiny(tmp_path):
    done = run("gpu", "--tiny", "--minutes=60", f"--output={tmp_path}")
    assert done.returncode == 0, done.stderr
    for part in ("session", "correctness", "steps", "epochs"):
        entries = json.loads((tmp_path / f"{part}.json").read_text())
        assert entries and not [key for key in entries if {"failed", "skipped"} & set(entries[key])], part
        assert not any(entry.get("refused") or entry.get("wrong") for entry in entries.values()), part
    assert "Left out, and failures" not in done.stdout and "| feedback_alignment " in done.stdout
    assert "| ten seeds / 10 x one |" in done.stdout.replace("  ", "")


def test_results_survive_and_failures_are_written_down(tmp_path):
    results = session.Results(tmp_path, "part")
    results.put("wrong", {"rows": {"plain": 1}})
    with results.guard("wrong"):
        raise ValueError("no such thing")
    results.put("right", {"value": np.float32(0.5)})
    again = session.Results(tmp_path, "part")
    assert again.entries["right"] == {"value": 0.5} and "no such thing" in again.entries["wrong"]["failed"]
    assert list(again.todo({"right": 1, "wrong": 1, "late": 100}, session.Clock(50))) == ["wrong"]
    assert again.entries["wrong"] == {"rows": {"plain": 1}}  # what was measured stays
    assert "s were left, 100 s are needed" in again.entries["late"]["skipped"]
    assert [path.name for path in tmp_path.iterdir()] == ["part.json"]


@pytest.mark.parametrize("rule", ["feedback_alignment", "node_perturbation(std=0.01)"])
def test_a_loop_takes_the_same_steps(rule):
    """The sum of the losses of a loop of four steps, and its last gradient, against the step itself."""
    step = session.problem("mlp", 4, small=True).step(rules.parse(rule))
    total, _, grads = jax.jit(steps.looped(step, 4))(*step.arguments)
    one = jax.jit(step.function)
    rest, key = step.arguments[:5], step.arguments[5:]
    each = [one(*rest, *(jax.random.fold_in(k, i) for k in key)) for i in range(4)]
    np.testing.assert_allclose(total, sum(value for value, *_ in each), rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), grads, each[-1][2])


def test_a_case_is_written_after_each_rule_and_goes_on(tmp_path, monkeypatch):
    case = steps.Case("mlp", "float32", 4, "backprop, sign_error(backprop), backman")
    figures = {"step_seconds": 1.0, "step_ratio": [2.0, 1.0, 3.0], "over_rule": None, "memory_bytes": 1}
    written = []

    def measure(error):
        """Measures the case; the figures of the modifier end in an error."""
        results = session.Results(tmp_path, "steps")

        def row(programs, name, calls, rows):
            written.append(list(json.loads(results.path.read_text())[str(case)].get("rows", {})))
            if name.startswith("sign_error"):
                raise error
            return figures

        monkeypatch.setattr(steps, "row", row)
        steps.measure(results, session.Clock(1e3), case, True)
        return results.entries[str(case)]

    session.Results(tmp_path, "steps").put(str(case), {})
    with pytest.raises(KeyboardInterrupt):
        measure(KeyboardInterrupt)
    assert written == [[], ["plain"], ["plain", "backprop"]]
    entry = measure(ValueError("no time"))
    assert written[3:] == [["plain", "backprop"], ["plain", "backprop"]]  # neither is measured again
    assert list(entry["rows"]) == ["plain", "backprop", "backman"] and entry["backprop_is_identical"] is True
    assert entry["refused"] == {"sign_error(backprop)": "ValueError: no time"}


def test_gradients_of_seeds_and_devices_are_compared(monkeypatch):
    device = jax.devices()[0]
    assert correctness.of_rule("mlp", "backman", device) == 0
    assert 0 <= correctness.of_seeds("mlp", "feedback_alignment", device, seeds=3) < 1e-5
    assert correctness.relative_error([jnp.ones(4)], [2 * jnp.ones(4)]) == 0.5
    assert not correctness.relative_error([jnp.full(2, jnp.nan)], [jnp.ones(2)]) <= 1


def test_cases_differ_and_their_rules_exist():
    names = [str(case) for case in steps.cases(tiny=False)]
    assert len(set(names)) == len(names) == 17 and names[0] == "mlp, bfloat16, batch 128"
    for case in steps.cases(tiny=False):
        rules.select(case.rules)


def test_cells_of_the_papers_run_at_once_and_their_ends_are_written_down(tmp_path, monkeypatch):
    def command(entry, folder, data_dir, seconds, tiny):
        assert tables_command(entry, folder, data_dir, seconds, tiny)[2] == f"experiments.papers.{entry.paper}"
        return [sys.executable, "-c", f"import sys; print('{entry.paper}'); sys.exit(len('{entry.options}'))"]

    tables_command = tables.command
    monkeypatch.setattr(tables, "command", command)
    entries = tuple(tables.Entry(f"paper_{i}", "x" * i) for i in range(5))
    results = session.Results(tmp_path, "tables")
    tables.run(results, session.Clock(100), "data", False, entries)
    assert [results.entries[str(e)]["exit_code"] for e in entries] == [0, 1, 2, 3, 4]
    assert results.entries["paper_3 xxx"]["output"].strip() == "paper_3"
    tables.run(results, session.Clock(5), "data", False, entries[:1])
    assert results.entries[str(entries[0])] == {"skipped": "5 s were left"}
    assert "| paper_4 xxxx" in report.tables(tmp_path)


@pytest.mark.parametrize("entry", tables.ENTRIES, ids=str)
def test_the_cells_of_a_session_exist(entry):
    own = importlib.import_module(f"experiments.papers.{entry.paper}.__main__").TABLES
    options = dict(option.removeprefix("--").split("=") for option in entry.options.split())
    key = next(f"{kind} {options[kind]}" for kind in ("table", "section") if kind in options)
    assert any(re.search(options["cells"], cell.name) for cell in own[key].cells)


def test_tables_name_what_is_missing(tmp_path):
    results = session.Results(tmp_path, "epochs")
    results.put("net, backprop", {"skipped": "3 s were left"})
    assert "- epochs, net, backprop: 3 s were left" in report.tables(tmp_path)


def test_the_tables_of_the_documentation_are_those_of_its_data():
    shown = report.tables(ROOT / "docs/gpu")
    assert shown.count("| backman ") == 7 and shown.count("bit for bit") == 3
    assert shown.removeprefix("## Step times\n\n") in (ROOT / "docs/speed.md").read_text()


def test_tables_of_correctness_and_epochs(tmp_path):
    errors = {"backman": 1e-6, "dual_propagation": 2e-3, "arbp": "ValueError: no"}
    entry = {"relative_errors": errors, "wrong": ["dual_propagation", "arbp"]}
    session.Results(tmp_path, "correctness").put("mlp, device against CPU", entry)
    seconds = {"ours": [2.0, 1.0, 3.0], "scan": [1.0, 1.0, 1.0]}
    session.Results(tmp_path, "epochs").put("net, backprop", {"seconds": seconds, "ratios": {"ours / scan": 2.0}})
    shown = [[cell.strip() for cell in line.split("|")[1:-1]] for line in report.tables(tmp_path).splitlines()]
    assert ["mlp, device against CPU", "2", "2.0e-03 (dual_propagation)", "dual_propagation, arbp"] in shown
    assert ["net, backprop", "2.000 s", "2.000", "-", "-", "-"] in shown
