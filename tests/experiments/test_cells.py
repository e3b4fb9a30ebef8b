"""Tables as cells: what is run, kept, reduced, and reported."""

import json

import pytest

from experiments import rules
from experiments.config import Config
from experiments.papers import cells
from experiments.papers.baldi_2018.table_1 import TABLE_1
from tests.experiments.programs import fork

CONFIG = Config(epochs=4, seeds=3, widths=(8,))
TABLE = cells.Table(
    "A table",
    [
        cells.Cell("Baseline", "BP", CONFIG, 97.9, 0.1, minutes=2.0),
        cells.Cell("Baseline", "FA", CONFIG.replace(rule="fa"), 97.2),
        cells.Cell("Signs", "FA", CONFIG.replace(rule="sign_symmetry"), beyond=True),
    ],
)


def keep(folder, cell, accuracy, epochs=4):
    config = cell.config.replace(epochs=epochs, seeds=len(accuracy))
    content = {"config": config.to_dict(), "accuracy": {"by_seed": accuracy}}
    (folder / cell.file).write_text(json.dumps(content))


def test_a_report_has_the_papers_numbers_beside_ours(tmp_path):
    keep(tmp_path, TABLE.cells[0], [0.97, 0.975, 0.98])
    keep(tmp_path, TABLE.cells[1], [0.9, 0.92], epochs=2)
    lines = [[c.strip() for c in line.split("|")] for line in cells.report(TABLE, tmp_path).splitlines()]
    assert lines[2] == ["", "", "BP, paper", "BP, ours", "FA, paper", "FA, ours", ""]
    assert lines[4] == ["", "Baseline", "97.9 ± 0.1", "97.50 ± 0.50", "97.2", "91.00 ± 1.41*", ""]
    assert lines[5][1] == "*beyond the paper*" and lines[6] == ["", "Signs", "", "", "-", "missing", ""]
    assert ["\\* Baseline, FA: 2 of 4 epochs, 2 of 3 seeds."] in lines
    keep(tmp_path, TABLE.cells[0], [0.92, 0.921, 0.922])
    assert "Baseline, BP: -5.80 from the paper, more than two sd." in cells.report(TABLE, tmp_path)


def test_what_was_measured_with_other_settings_is_missing(tmp_path):
    cell = TABLE.cells[0]
    keep(tmp_path, cell, [0.9] * 3)
    assert cells.load(tmp_path, cell) and not cells.missing(tmp_path, cell, cell.config)
    assert cells.load(tmp_path, cell._replace(config=cell.config.replace(learning_rate=0.5))) is None
    keep(tmp_path, cell, [0.9], epochs=2)
    assert cells.missing(tmp_path, cell, cell.config)  # the full one takes its place
    assert not cells.missing(tmp_path, cell, cell.config.replace(epochs=1, seeds=1))
    shown = cells.listing({"1": TABLE}, tmp_path.parent)
    assert "1: Baseline, BP" in shown and "missing" in shown


def test_every_cell_of_the_papers_table_has_its_own_rule():
    assert len(TABLE_1.cells) == 42 and len({cell.config.rule for cell in TABLE_1.cells}) == 42
    assert len({cell.file for cell in TABLE_1.cells}) == 42
    for cell in TABLE_1.cells:
        rules.parse(cell.config.rule)
    by_name = {cell.name: cell for cell in TABLE_1.cells}
    assert by_name["Sparse-1, RBP"].paper == 90.3 and by_name["Sparse-1, SRBP"].spread == 0.6


def test_the_program_measures_reports_and_goes_on(tmp_path):
    import numpy as np

    x = np.random.default_rng(0).integers(0, 256, (200, 4, 4, 1), np.uint8)
    np.savez(tmp_path / "mnist.npz", x_train=x, y_train=np.arange(200) % 3, x_test=x[:50], y_test=np.arange(50) % 3)
    flags = ["--quick", "--cells=^Baseline", f"--data_dir={tmp_path}", f"--work={tmp_path}/work"]
    flags.append(f"--output={tmp_path}/out")
    done = fork("papers.baldi_2018", *flags)
    assert done.returncode == 0, done.stderr
    kept = sorted(path.name for path in (tmp_path / "out" / "table_1").iterdir())
    assert kept == ["baseline_bp.json", "baseline_rbp.json", "baseline_srbp.json"]
    content = json.loads((tmp_path / "out" / "table_1" / kept[0]).read_text())
    assert content["config"]["epochs"] == 1 and content["curves"]["epoch"] == [1] and content["provenance"]["versions"]
    assert "1 of 100 epochs, 1 of 5 seeds" in done.stdout
    again = fork("papers.baldi_2018", *flags)
    assert again.returncode == 0 and "epoch" not in again.stderr  # nothing is measured twice
    listed = fork("papers.baldi_2018", "--list", f"--output={tmp_path}/out")
    assert "reduced: 1 of 100 epochs" in listed.stdout and "missing" in listed.stdout


@pytest.mark.parametrize(
    ("flag", "sentence"),
    [("--table=9", "There is no table '9' here: use one of: 1"), ("--cells=(", "--cells is not a regular expression")],
)
def test_bad_input(tmp_path, flag, sentence):
    done = fork("papers.baldi_2018", flag, f"--output={tmp_path}")
    assert done.returncode != 0 and sentence in done.stderr and "Traceback" not in done.stderr
