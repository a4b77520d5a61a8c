"""Tables as they are printed: in a terminal, in LaTeX and in Markdown."""

import factory
import pandas as pd
import pytest
from factory import HERE

from vdbench import tables
from vdbench.tables import render


def test_terminal_table_fits_110_columns():
    suite = factory.suite(conv=factory.experiment("lenet5"), fc=factory.experiment())
    made = factory.all_records(suite)
    text = tables.render_text(suite, {"recorded": made, HERE: made}, {HERE: ["missing: fc/dense/seed9 train"]})
    assert max(map(len, text.splitlines())) <= 110
    assert "0.75" in text and "280×" in text and "missing: fc/dense/seed9 train" in text


def test_many_layers_take_several_lines_of_a_terminal():
    frame = pd.DataFrame({"sparsity": [" – ".join(f"{k}.0" for k in range(20))]})
    lines = render.to_text(frame).splitlines()
    assert len(lines) > 3 and max(map(len, lines)) <= 60
    assert len(render.to_text(frame, "pipe").splitlines()) == 3


def test_terminal_says_how_many_notes_it_left_out(suite):
    notes = [f"missing: fc/dense/seed{seed} train" for seed in range(20)]
    text = tables.render_text(suite, {HERE: [factory.record(suite, "fc", "dense", 0)]}, {HERE: notes})
    assert "and 12 more such lines" in text


def test_a_source_without_records_is_one_line(suite):
    notes = ["missing: a", "stale: c: made under another spec"]
    text = tables.render_text(suite, {HERE: []}, {HERE: notes})
    assert f"{HERE}: no records\n" in text
    assert "stale: c" in text and "missing: a" not in text


def test_latex_is_escaped(suite, tmp_path):
    assert render.latex(r"50 % of a_b & #1 ~ \x ± 2×") == (
        r"50 \% of a\_b \& \#1 \textasciitilde{} \textbackslash{}x $\pm$ 2$\times$"
    )
    bad = factory.record(suite, "fc", "dense", 0, "train", status="diverged", message="100% of x_1 & y")
    tables.write_tables(suite, {HERE: [bad]}, {HERE: []}, tmp_path)
    text = (tmp_path / "table1.tex").read_text()
    assert r"100\% of x\_1 \& y" in text
    assert text.isascii()
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == 3


def test_markdown_cells_cannot_break_the_table(suite):
    section = render.Section("s", pd.DataFrame({"a": ["x|y"]}))
    assert r"x\|y" in render.to_markdown(render.Document("t", "l", pd.DataFrame(), [section]))


@pytest.mark.parametrize(("value", "text"), [(98.94, "98.9"), (99.96, "99.96"), (99.996, "99.996"), (100.0, "100.0")])
def test_sparsity_below_100_never_reads_100(value, text):
    assert render.percent(value) == text
