"""Tables as cells: what is run, kept, added up, reduced, and reported."""

import csv
import functools
import json
import re

import numpy as np
import pytest

from experiments import build, rules, signals
from experiments.config import Config
from experiments.errors import InputError
from experiments.keeper import Keeper
from experiments.papers import cells, program, report
from experiments.papers.baldi_2018.table_1 import TABLE_1
from experiments.progress import Progress
from tests.experiments.programs import fork

CONFIG = Config(epochs=4, seeds=3, widths=(8,))
TABLE = cells.Table(
    "A table",
    [
        cells.Cell("Baseline", "BP", CONFIG, {"accuracy": (97.9, 0.1)}, minutes=2.0),
        cells.Cell("Baseline", "FA", CONFIG.replace(rule="fa"), {"accuracy": (97.2, None)}),
        cells.Cell("Signs", "FA", CONFIG.replace(rule="sign_symmetry"), beyond=True),
    ],
)


def keep(folder, cell, accuracy, epochs=4, seed=0):
    config = cell.config.replace(epochs=epochs, seed=seed, seeds=len(accuracy))
    curve = {"epoch": [1, epochs], "accuracy": [[0.5] * len(accuracy), accuracy]}
    content = {"config": config.to_dict(), "accuracy": {"by_seed": accuracy}, "curves": curve}
    return cells.keep(folder, cell, config, content)


def lines(text):
    return [[c.strip() for c in line.split("|")] for line in text.splitlines()]


def test_a_report_has_the_papers_numbers_beside_ours(tmp_path):
    keep(tmp_path, TABLE.cells[0], [0.97, 0.975, 0.98])
    keep(tmp_path, TABLE.cells[1], [0.9, 0.92], epochs=2)
    found = lines(report.markdown(TABLE, tmp_path))
    assert found[2][:5] == ["", "", "BP, paper", "BP, ours", "BP, difference"]
    ours = ["97.9 ± 0.1", "97.50 ± 0.50 (3)", "-0.40", "97.2", "91.00 ± 1.41 (2)*", "-6.20"]
    assert found[4] == ["", "Baseline", *ours, ""]
    assert found[5][1] == "*beyond the paper*" and found[6] == ["", "Signs", "", "", "", "-", "missing", "", ""]
    assert ["\\* Baseline, FA: 2 of 4 epochs, 2 of 3 seeds."] in found
    assert report.far(TABLE, tmp_path) == []
    keep(tmp_path, TABLE.cells[0], [0.92, 0.921, 0.922])
    assert report.far(TABLE, tmp_path) == ["Baseline, BP"]  # 5.8 points, with an sd of 0.1
    assert report.section("x", TABLE._replace(folder="."), tmp_path).endswith(
        "Of the cells with all epochs and seeds, more than two sd (the paper's or ours, the larger) from the column "
        "*paper*: Baseline, BP."
    )


def test_a_figure_that_a_measured_cell_does_not_have_is_not_called_missing(tmp_path):
    """Backprop has no feedback weights, so it will never have their angle."""
    table = TABLE._replace(shown=(cells.Shown(label="accuracy"), cells.Shown("angle", "angle", 1)))
    keep(tmp_path, TABLE.cells[0], [0.97, 0.975, 0.98])
    found = lines(report.markdown(table, tmp_path))
    ours = dict(zip(found[2], found[4], strict=True))
    assert "BP, angle, ours" not in ours  # a column without a number
    assert (ours["BP, accuracy, ours"], ours["FA, angle, ours"]) == ("97.50 ± 0.50 (3)", "missing")


def test_the_picture_names_the_paper_only_where_it_has_a_number(tmp_path):
    keep(tmp_path, TABLE.cells[0], [0.97, 0.975, 0.98])
    keep(tmp_path, TABLE.cells[2], [0.9], epochs=2)
    both = report.measured(TABLE, tmp_path)
    for found, papers in ((both, ["paper ± sd"]), (both[1:], [])):
        (legend,) = report.comparison(TABLE, found).legends
        assert [t.get_text() for t in legend.get_texts()] == [*papers, "ours ± sd (hollow: fewer epochs or seeds)"]


def test_a_quoted_cell_has_the_papers_number_alone(tmp_path):
    quoted = cells.Cell("Other work", "BP", CONFIG, {"accuracy": (92.4, None)}, quoted=True)
    table = cells.Table("A table", [TABLE.cells[0], quoted])
    keep(tmp_path, TABLE.cells[0], [0.97, 0.975, 0.98])
    assert lines(report.markdown(table, tmp_path))[5] == ["", "Other work", "92.4", "-", "", ""]
    assert "Other work" not in report.listing({"table 1": table}, tmp_path)
    with signals.Stop() as stop:  # there is nothing to measure
        program.run({"table 1": cells.Table("A table", [quoted])}, tmp_path, program.Wanted(), stop)


def test_blocks_of_seeds_add_up(tmp_path):
    cell = TABLE.cells[0]
    keep(tmp_path, cell, [0.93], seed=2)
    assert [c.all_seeds for c in cells.missing(tmp_path, cell, 4, 5)] == [range(0, 2), range(3, 5)]
    assert [c.all_seeds for c in cells.missing(tmp_path, cell, 4, 4, skip=1)] == [range(1, 2), range(3, 4)]
    keep(tmp_path, cell, [0.91, 0.92])
    found = cells.load(tmp_path, cell)
    assert found.seeds == [0, 1, 2] and found.values("accuracy").tolist() == [0.91, 0.92, 0.93] and not found.less
    epochs, values = found.curve("accuracy")
    assert epochs.tolist() == [1, 4] and values.tolist() == [[0.5] * 3, [0.91, 0.92, 0.93]]
    assert found.values("lipschitz") is None
    keep(tmp_path, cell, [0.8, 0.8, 0.8])  # a larger block takes the place of the smaller ones
    assert cells.load(tmp_path, cell).values("accuracy").tolist() == [0.8] * 3


def test_what_was_measured_with_other_settings_is_missing(tmp_path):
    cell = TABLE.cells[0]
    keep(tmp_path, cell, [0.9] * 3)
    assert cells.load(tmp_path, cell) and not cells.missing(tmp_path, cell, 4, 3)
    other = cell.config.replace(learning_rate=0.5)
    assert cells.load(tmp_path, cell._replace(config=other)) is None
    assert cells.load(tmp_path, cell._replace(sweep=["learning_rate=0.1,0.2"])) is None


def test_a_name_copied_from_the_list_finds_its_cell():
    table = TABLE._replace(cells=[cells.Cell("DP^T, alpha=1", "error (%)", CONFIG), *TABLE.cells])
    for cell in table.cells:
        assert table.to_measure(re.compile(cell.name)) == [cell]


def test_more_epochs_take_the_place_of_fewer(tmp_path):
    cell = TABLE.cells[0]
    first = keep(tmp_path, cell, [0.9], epochs=2)
    assert cells.missing(tmp_path, cell, 1, 1) == [] and len(cells.missing(tmp_path, cell, 4, 1)) == 1
    shown = report.listing({"table 1": TABLE}, tmp_path.parent)
    assert lines(shown)[2][1:4] == ["Baseline, BP", "table 1", "missing"]
    assert keep(tmp_path, cell, [0.95]) != first and not first.exists()
    assert cells.load(tmp_path, cell).epochs == 4


def test_a_report_is_written_with_its_picture_and_data(tmp_path):
    folder = report.folder_of(tmp_path, "table 1")
    folder.mkdir()
    keep(folder, TABLE.cells[0], [0.97, 0.98])
    text = report.write({"table 1": TABLE}, tmp_path, "A paper")
    assert (tmp_path / "README.md").read_text() == text and text.startswith("# A paper\n\n## Table 1\n")
    assert (tmp_path / "table_1.png").stat().st_size > 5000
    rows = list(csv.reader((tmp_path / "table_1.csv").open()))
    assert rows[1:] == [["Baseline, BP", "accuracy", "0", "4", "0.97"], ["Baseline, BP", "accuracy", "1", "4", "0.98"]]


def test_a_measure_of_ones_own_goes_on_after_a_stop(tmp_path):
    seen = []

    def half(job):
        seen.append(job.work)
        if len(seen) == 1:
            return None
        return {"lipschitz": {"by_seed": [2.0] * job.config.seeds}}

    table = TABLE._replace(cells=[TABLE.cells[0]._replace(measure=half)], shown=[cells.Shown("lipschitz", "", 1, 1)])
    wanted = program.Wanted(seeds=2, work=tmp_path / "work")
    for _ in range(3):
        program.run({"table 1": table}, tmp_path, wanted, signals.Stop())
    assert len(seen) == 2 and seen[0] == seen[1]  # the third time it is there
    found = cells.load(tmp_path / "table_1", table.cells[0])
    assert found.values("lipschitz").tolist() == [2.0, 2.0] and found.contents[0]["provenance"]["versions"]
    assert "2.0 ± 0.0 (2)*" in report.markdown(table, tmp_path / "table_1")


def test_a_cell_with_a_sweep_has_the_figures_of_the_chosen_point(tmp_path):
    config = Config(widths=(8,), epochs=2, validation=0.3, select="best_validation", optimizer="sgd", probe=0)
    sweep = ["learning_rate=0.000001,0.1"]
    table = cells.Table("A sweep", [cells.Cell("BP", "", config, sweep=sweep)])
    program.run({"table 1": table}, tmp_path, program.Wanted(work=tmp_path / "work"), signals.Stop())
    found = cells.load(tmp_path / "table_1", table.cells[0])
    content = found.contents[0]
    assert content["chosen"] == {"learning_rate": 0.1} and content["sweep"] == sweep
    best = content["epoch_by_seed"][0] - 1
    assert found.values("accuracy")[0] == pytest.approx(found.curve("accuracy")[1][best, 0])


def test_every_cell_of_the_papers_table_has_its_own_rule():
    own = [cell for cell in TABLE_1.cells if cell.config.dataset == "mnist"]
    assert len({cell.config.rule for cell in own}) == len(own)
    assert len([cell for cell in own if not cell.beyond]) == 42
    assert len({cell.stem for cell in TABLE_1.cells}) == len(TABLE_1.cells)
    for cell in TABLE_1.cells:
        rules.parse(cell.config.rule)
    by_name = {cell.name: cell.paper["accuracy"] for cell in own if cell.paper}
    assert by_name["Sparse-1, RBP"] == (90.3, 1.1) and by_name["Sparse-1, SRBP"] == (94.6, 0.6)


def test_the_program_measures_reports_and_goes_on(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (200, 4, 4, 1), np.uint8)
    np.savez(tmp_path / "mnist.npz", x_train=x, y_train=np.arange(200) % 3, x_test=x[:50], y_test=np.arange(50) % 3)
    flags = ["--table=1", "--quick", "--cells=^Baseline.*BP$", f"--data_dir={tmp_path}", f"--work={tmp_path}/work"]
    flags.append(f"--output={tmp_path}/out")
    done = fork("papers.baldi_2018", *flags)
    assert done.returncode == 0, done.stderr
    kept = sorted(path.name for path in (tmp_path / "out" / "table_1").glob("baseline_*bp.*"))
    assert kept[:3] == [f"baseline_{rule}.0.1_epochs.json" for rule in ("bp", "rbp", "srbp")]
    content = json.loads((tmp_path / "out" / "table_1" / kept[0]).read_text())
    assert content["config"]["epochs"] == 1 and content["curves"]["epoch"] == [1] and content["provenance"]["versions"]
    command = content["provenance"]["command"]
    assert "--quick" in command and str(tmp_path) not in command  # the folders of a machine are nobody's business
    assert "1 of 100 epochs, 1 of 5 seeds" in done.stdout
    again = fork("papers.baldi_2018", *flags)
    assert "step/s" in done.stderr and "step/s" not in again.stderr  # nothing is measured twice
    assert again.returncode == 0
    listed = fork("papers.baldi_2018", "--table=1", "--cells=^(Base|No)", "--list", f"--output={tmp_path}/out")
    states = {row[1]: row[3] for row in lines(listed.stdout)[2:]}
    reduced = "reduced: 1 of 100 epochs, 1 of 5 seeds"
    named = {f"{row}, {rule}" for row in ("Baseline", "No-f'") for rule in ("BP", "RBP", "SRBP")}
    assert states == {name: reduced if "Baseline" in name else "missing" for name in named}


@pytest.mark.parametrize(
    ("flag", "sentence"),
    [
        ("--table=9", "There is no table '9' here: use one of: 1"),
        ("--cells=(", "--cells is not a regular expression"),
        ("--cells=Basline", "--cells=Basline: No cell with this name is in these tables; --list shows"),
        ("--table=1 --skip_seeds=5", "--skip_seeds=5 leaves none of 5 seeds: give a larger --seeds"),
    ],
)
def test_bad_input(tmp_path, flag, sentence):
    done = fork("papers.baldi_2018", *flag.split(), f"--output={tmp_path}")
    assert done.returncode != 0 and sentence in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("text", ['{"config": ', "{}", "[1]", '{"config": {"zzz": 1}}', '{"config": {"rule": 1}}'])
def test_a_damaged_file_is_named(tmp_path, text):
    kept = keep(tmp_path, TABLE.cells[0], [0.9] * 3)
    kept.write_text(text)
    with pytest.raises(InputError, match=f"{kept.name} cannot be used .*: delete it, or copy it here again"):
        report.markdown(TABLE, tmp_path)
    kept.unlink()
    assert "missing" in report.markdown(TABLE, tmp_path)


class Killed(Progress):
    """A bar that ends the program, as a kill would, in the second epoch."""

    def advance(self, units, note=None):
        super().advance(units, note)
        if self.done > 1.5 * self.total / 2:
            raise KeyboardInterrupt


def test_a_killed_cell_goes_on_inside_the_epoch(tmp_path, monkeypatch):
    monkeypatch.setattr(cells, "Keeper", functools.partial(Keeper, seconds=0.0))
    config = Config(dataset="digits", widths=(8,), epochs=2, seeds=2, optimizer="sgd")
    dataset = build.dataset(config)

    def measure(work, bar):
        return cells.measure(cells.Job(config, (), lambda _: dataset, tmp_path / work, signals.Stop(), bar))

    with pytest.raises(KeyboardInterrupt):
        measure("killed", Killed(1, "epoch", show=False))
    bar = Progress(1, "epoch", show=False)
    found = measure("killed", bar)
    assert bar.total / 2 < bar.begin < bar.done == bar.total and bar.unit == "step"
    whole = measure("whole", Progress(1, "epoch", show=False))
    np.testing.assert_array_equal(found["accuracy"]["by_seed"], whole["accuracy"]["by_seed"])


def test_a_cell_without_its_file_is_measured_anew(tmp_path):
    cell = cells.Cell("BP", "", Config(dataset="digits", widths=(8,), epochs=1, optimizer="sgd"))
    tables, folder = {"table 1": cells.Table("A table", [cell])}, tmp_path / "out" / "table_1"
    wanted = program.Wanted(work=tmp_path / "work")
    program.run(tables, tmp_path / "out", wanted, signals.Stop())
    assert not list((tmp_path / "work").rglob("*_METADATA"))  # no checkpoint of a finished run is left
    (kept,) = folder.glob("*.json")
    kept.unlink()
    program.run(tables, tmp_path / "out", wanted, signals.Stop())
    assert kept.exists()


def test_all_blocks_of_seeds_have_the_same_validation_images(tmp_path):
    seen = []

    def look(job):
        seen.append(np.asarray(job.dataset(job.config).x_val))
        return {"accuracy": {"by_seed": [0.5] * job.config.seeds}}

    cell = cells.Cell("BP", "", Config(dataset="digits", validation=0.2, seeds=3), measure=look)
    tables = {"table 1": cells.Table("A table", [cell])}
    for wanted in (program.Wanted(seeds=1, work=tmp_path), program.Wanted(work=tmp_path)):
        program.run(tables, tmp_path / "out", wanted, signals.Stop())
    assert cells.load(tmp_path / "out" / "table_1", cell).seeds == [0, 1, 2] and len(seen) == 2
    np.testing.assert_array_equal(*seen)


def test_a_command_is_kept_without_the_folders_of_the_machine():
    command = "program.py --table=1 --work /a --output=/b -data_dir '/c d' --quick"
    assert program.without_places(command) == "program.py --table=1 --quick"


def test_names_and_seeds_that_leave_nothing_to_measure():
    quoted = cells.Cell("Other work", "BP", CONFIG, quoted=True)
    tables = {"table 1": cells.Table("A table", [*TABLE.cells, quoted])}
    with pytest.raises(InputError, match="Each cell with this name is only quoted from the paper"):
        program.check(tables, program.Wanted(re.compile("Other")))
    with pytest.raises(InputError, match="--skip_seeds=2 leaves none of 2 seeds"):
        program.check(tables, program.Wanted(seeds=2, skip_seeds=2))
    program.check(tables, program.Wanted(re.compile("^Base"), skip_seeds=2))
