"""The picture of a report: which panels there are, and what is drawn in them."""

import json

import matplotlib
import pytest

from openclip_ext.report.compare import compare, group
from openclip_ext.report.palette import row_style
from openclip_ext.report.picture import report_figure
from openclip_ext.report.run_files import read_run
from openclip_ext.report.tables import markdown_table, tables, verdict, wrapped


@pytest.fixture
def report_of(make_run):
    """A function from `loss+term=weight` to a report: top-1 by seed, and two epochs of validation."""

    def make(objectives, *, epochs=2, **params):
        folders = []
        for objective, tops in objectives.items():
            loss, *terms = objective.split("+")
            for seed, top in enumerate(tops):
                recall = [top / (epochs + 1 - epoch) for epoch in range(1, epochs + 1)]
                folder = make_run(f"{objective}-{seed}", recall=recall, loss=loss, loss_term=terms, seed=seed, **params)
                rows = [
                    {"step": step, "lr": 0.1, "contrastive_loss": 3 - step + top, "loss": 4 - step + top}
                    | {f"{term.partition('=')[0]}_loss": 0.1 * step + top for term in terms}
                    for step in range(3)
                ]
                (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
                task = {"dataset": "test", "num_samples": 360, "num_classes": 10, "scores": {"top1": top}}
                content = {"created": "1", "checkpoint": {"path": "x"}, "tasks": {"test": task}}
                (folder / "eval.json").write_text(json.dumps(content))
                folders.append(folder)
        return compare(group([read_run(str(folder)) for folder in folders]))

    return make


def panels(figure):
    """By title and label of the horizontal axis, the axes; every one of them has something drawn in it."""
    found = {(axes.get_title(), axes.get_xlabel()): axes for axes in figure.axes}
    assert len(found) == len(figure.axes)
    assert all(axes.lines or axes.collections for axes in figure.axes)
    return found


def colored(axes):
    return {
        matplotlib.colors.to_rgb(line.get_color()) for line in axes.lines if len(line.get_xdata()) > 1
    } & {matplotlib.colors.to_rgb(row_style(index)["color"]) for index in range(10)}  # fmt: skip


def test_differences_come_first_with_zero_and_chance(report_of):
    report = report_of({"clip": (0.10, 0.14, 0.12), "dcl": (0.20, 0.25, 0.21), "siglip": (0.11, 0.13, 0.13)})
    assert report["chance"]["test/top1"] == 0.1
    figure = report_figure(report)
    assert [axes.get_xlabel() for axes in figure.axes[:4]] == [
        "difference to clip", "difference to clip", "score at the end", "score at the end"
    ]  # fmt: skip
    axes = panels(figure)["test/top1, %", "difference to clip"]
    upright = [
        line.get_xdata()[0] for line in axes.lines if len(set(line.get_xdata())) == 1 and line.get_marker() != "o"
    ]
    assert upright == pytest.approx([0, 100 * (0.1 - 0.12)])  # zero, and where chance is from clip's mean
    means = {line.get_ydata()[0]: line for line in axes.lines if line.get_marker() == "o"}
    difference = report["groups"][1]["differences"]["test/top1"]
    assert means[1].get_xdata()[0] == pytest.approx(100 * difference["mean"])
    assert means[1].get_markerfacecolor() == row_style(1)["color"] and means[2].get_markerfacecolor() == "white"
    low, high = axes.get_xlim()
    assert low < 0 < 100 * (difference["mean"] + difference["interval"]) < high


def test_chance_far_away_is_a_word_at_the_edge(report_of):
    axes = panels(report_figure(report_of({"clip": (0.80, 0.81), "dcl": (0.82, 0.84)})))[
        "test/top1, %", "score at the end"
    ]
    assert [text.get_text() for text in axes.texts] == [" ◂ chance 10"]
    assert axes.get_xlim()[0] > 70


def test_objectives_that_differ_share_no_axis_without_saying_so(report_of):
    tops = {"clip": (0.1,), "clip+caption=2": (0.2,), "dcl": (0.3,), "gamma_decomp": (0.4,), "clip+caption=1": (0.5,)}
    figure = report_figure(report_of(tops))
    training = {title: axes for (title, x), axes in panels(figure).items() if x == "optimizer step"}
    assert set(training) == {
        "training: contrastive loss\nof clip, batch 1",
        "training: contrastive loss\nown objectives: heights do not compare",
        "training: caption loss\nown objectives: heights do not compare",
    }
    color = [matplotlib.colors.to_rgb(row_style(index)["color"]) for index in range(5)]
    assert colored(training["training: contrastive loss\nof clip, batch 1"]) == {color[0], color[1], color[4]}


def test_one_objective_is_one_panel_and_learning_rates_that_are_the_same_are_none(report_of):
    report = report_of({"clip": (0.1,), "clip+caption=1": (0.2,)}, batch_size=8)
    titles = [title for title, x in panels(report_figure(report)) if x == "optimizer step"]
    assert titles == ["training: contrastive loss", "training: caption loss\nof caption=1, batch 8"]


def test_curves_that_are_all_the_same_are_not_drawn(report_of):
    assert not [x for _, x in panels(report_figure(report_of({"clip": (0.1,), "dcl": (0.1,)}))) if x == "epoch"]
    assert [
        x for _, x in panels(report_figure(report_of({"clip+caption=1": (0.3,), "siglip": (0.4,)}))) if x == "epoch"
    ]


@pytest.mark.parametrize("count", [1, 2, 4, 9])
def test_labels_do_not_collide_and_no_cell_is_empty(report_of, count):
    names = [f"clip+a_term_with_a_long_name={n}.5+another_term_with_a_name={n}.25" for n in range(count)]
    figure = report_figure(report_of({name: (0.1 * n + 0.05, 0.1 * n + 0.08) for n, name in enumerate(names)}))
    figure.draw_without_rendering()
    renderer = figure._get_renderer()
    assert panels(figure)
    for axes in figure.axes:
        for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
            shown = [label.get_window_extent(renderer) for label in labels if label.get_text()]
            inside = [box for box in shown if axes.bbox.x0 - 400 < box.x0 < axes.bbox.x1 + 20]
            assert not any(a.overlaps(b) for i, a in enumerate(inside) for b in inside[:i]), axes.get_title()
    boxes = [axes.get_tightbbox(renderer) for axes in figure.axes]
    assert not any(a.shrunk(0.98, 0.98).overlaps(b.shrunk(0.98, 0.98)) for i, a in enumerate(boxes) for b in boxes[:i])


# Tables.


def test_tables_fit_and_lose_nothing(report_of):
    names = [f"clip+a_term_with_a_long_name={n}.5+another_term_with_a_name={n}.25" for n in range(9)]
    report = report_of({name: (0.1 * n + 0.05, 0.1 * n + 0.08) for n, name in enumerate(names)})
    report["metrics"] = [f"{'a' * 30}-{n}/{name}" for n in range(5) for name in ("top1", "text_to_image_R@10")]
    report["remarks"] = ["a word " * 40]
    text = tables(report)
    assert max(map(len, text.splitlines())) <= 100
    assert all(metric in text for metric in report["metrics"])
    assert "+another_term_with_a_name=8.25" in text


@pytest.mark.parametrize(
    ("tops", "expected"),
    [(((0.1,), (0.2,)), "runs"), (((0.1, 0.2), (0.2, 0.3)), "seeds"), (((0.1, 0.2), (0.2,)), "means")],
)
def test_a_difference_says_what_it_is_of(report_of, tops, expected):
    text = tables(report_of(dict(zip(("clip", "dcl"), tops, strict=True))))
    row = next(line for line in text.partition("Difference to")[2].splitlines() if line.startswith("| dcl"))
    assert row.split("|")[2].strip() == expected


def test_a_wide_table_is_several_with_the_first_column_in_each():
    text = markdown_table(["", *(f"{'c' * 40}{n}" for n in range(3))], [["row", "1", "2", "3|"]])
    first, second = text.split("\n\n")
    assert first.count("row") == second.count("row") == 1
    assert "c0 |" in first and "c1 |" in first and "c2 |" in second and "3\\|" in second


def test_text_is_wrapped_where_it_can_be_broken():
    assert wrapped("clip+feature_separation=0.5+caption=1", 24) == "clip\n+feature_separation=0.5\n+caption=1"
    assert wrapped("a/bb/ccc, dd", 6) == "a/bb/\nccc,\ndd"
    assert wrapped("x" * 12, 5) == "xxxxx\nxxxxx\nxx" and wrapped("x" * 12, 5, lines=2) == "xxxxx\nxxxx…"


def test_the_verdict_names_what_is_larger_than_its_interval(report_of):
    report = report_of({"clip": (0.10, 0.14, 0.12), "dcl": (0.20, 0.25, 0.21), "siglip": (0.11, 0.13, 0.13)}, epochs=1)
    report["metrics"] = ["test/top1"]
    difference = report["groups"][1]["differences"]["test/top1"]
    assert verdict(report) == (
        f"Of 2 differences to clip, dcl in test/top1 (+{100 * difference['mean']:.1f} ± "
        f"{100 * difference['interval']:.1f}) is larger than its 95 % interval; the other is not."
    )
    report["groups"] = [report["groups"][0], report["groups"][2]]
    assert verdict(report) == "The difference to clip is not larger than its 95 % interval."
    assert "takes two rows" in verdict(report | {"groups": report["groups"][:1]})
