"""Plots from small artificial results: what is drawn, where, and what the caption says."""

import dataclasses
import itertools
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import yaml

from made_up import LAYERS, STUDY, MadeUp, correct, drawn, load, prepare, words
from robsparse.figures import report
from robsparse.figures.data import reliability, statistics, summary, tidy
from robsparse.figures.plots import connections, costs, curves, finals, images, style
from robsparse.figures.tables import study_tables
from robsparse.figures.text import formats
from robsparse.study import loading
from robsparse.study.cells import Layout


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> summary.Material:
    return prepare(tmp_path_factory.mktemp("results"))


@pytest.fixture(autouse=True)
def _style():
    with style.applied():
        yield


def test_robust_accuracy_shows_means_dense_and_chance(material):
    figure = finals.robust_accuracy(material)
    [panel] = figure.axes
    bcs, lwm = drawn(panel, "BCS"), drawn(panel, "LWM")
    assert bcs.get_ydata() == pytest.approx([50, 50])
    assert lwm.get_ydata() == pytest.approx([30, 30])
    assert (bcs.get_xdata() != lwm.get_xdata()).all()
    assert [text.get_text() for text in panel.get_xticklabels()] == ["90 %", "95 %"]
    assert drawn(panel, "Dense").get_ydata()[0] == pytest.approx(70)
    # Chance is that of the whole test set, not of the attacked images.
    assert drawn(panel, "chance").get_ydata()[0] == pytest.approx(12.5)
    assert panel.get_ylabel() == "AutoAttack accuracy (%)"


def test_error_bars_of_robust_accuracy_are_the_interval(material):
    [panel] = finals.robust_accuracy(material).axes
    line = material.summary.query("method == 'lwm' and selection == 'best_val'").iloc[0]
    ends = [path.vertices[:, 1] for bars in panel.collections for path in bars.get_paths()]
    wanted = [100 * line.autoattack_low, 100 * line.autoattack_high]
    assert any(end == pytest.approx(wanted) for end in ends if len(end) == 2)


def test_without_flags_files_there_are_means_but_no_intervals(tmp_path):
    study = load(tmp_path)
    layout = MadeUp(study, Layout(tmp_path / "made_up"), correct).write()
    shutil.rmtree(layout.root / "evaluations")
    material = summary.make_material(study, layout, tidy.read(layout.root))
    [panel] = finals.robust_accuracy(material).axes
    assert drawn(panel, "LWM").get_ydata() == pytest.approx([30, 30])
    assert drawn(panel, "chance").get_ydata()[0] == pytest.approx(12.5)
    [group] = tidy.groups(study)
    table = study_tables.comparison_table(material, group)
    assert set(table["Difference (points)"]) == {"−20.0", "+20.0"}
    assert set(table["Verdict"]) == {"n/a"}


def test_all_weights_are_active_at_the_start_except_with_bcs(material):
    figure = curves.active_weights(material)
    panel = figure.axes[0]
    lwm, bcs = drawn(panel, "LWM"), drawn(panel, "BCS")
    assert lwm.get_xdata().tolist() == list(range(9))
    assert lwm.get_ydata().tolist() == [400] * 5 + [40] * 4
    assert lwm.get_markevery() == [0, 4]
    assert set(bcs.get_ydata()) == {40}
    assert panel.get_yscale() == "log"
    assert [axes.get_title() for axes in figure.axes] == ["sparsity 90 %", "sparsity 95 %"]


def test_layer_density_is_nonzero_weights_over_size(material):
    panel = finals.layer_density(material).axes[0]
    assert drawn(panel, "LWM").get_ydata() == pytest.approx([10, 10, 10])
    assert drawn(panel, "BCS").get_ydata()[0] > 10
    assert [text.get_text() for text in panel.get_xticklabels()] == ["1\n40", "2\n160", "3\n200"]


def test_a_layer_without_nonzero_weights_is_drawn(tmp_path):
    study = load(tmp_path)
    layout = MadeUp(study, Layout(tmp_path / "made_up"), correct).write()
    layers = pd.read_csv(layout.root / "layers.csv")
    layers.loc[(layers.method == "lwm") & (layers.layer == 3), "nonzero"] = 0
    layers.to_csv(layout.root / "layers.csv", index=False)
    figure = finals.layer_density(summary.make_material(study, layout, tidy.read(layout.root)))
    hollow = drawn(figure.axes[0], "_all_zero")
    assert hollow.get_markerfacecolor() == "none"
    assert len(hollow.get_xdata()) == 1
    assert hollow.get_ydata()[0] > 0


def test_rewiring_is_the_smoothed_mean_over_seeds(tmp_path):
    material = prepare(tmp_path, epochs=12, steps_per_epoch=10)
    figure = curves.rewiring(material)
    assert "moving average of 5 steps" in words(figure)
    steps = material.tidy.steps.query("sparsity == 0.9 and step > 0")
    own = steps.groupby(["seed", "step"]).regrown.sum().groupby("step").mean()
    line = drawn(figure.axes[0], "BCS: regrown")
    assert line.get_ydata()[10] == pytest.approx(own.loc[9:13].mean())
    assert f"BCS renewed {own.sum() / 40:.2g} times" in words(figure)


def test_without_logs_of_rewiring_the_figure_is_a_message(tmp_path):
    material = prepare(tmp_path, grid={"methods": ["dense", "lwm"]})
    assert "No method of this study rewires" in words(curves.rewiring(material))
    [group] = tidy.groups(material.study)
    assert study_tables.comparison_table(material, group) is None


@pytest.mark.parametrize("name", ["layers.csv", "curves.csv"])
def test_figures_of_empty_tables_are_messages(tmp_path, name):
    study = load(tmp_path)
    layout = MadeUp(study, Layout(tmp_path / "made_up"), correct).write()
    (layout.root / name).write_text("\n")
    material = summary.make_material(study, layout, tidy.read(layout.root))
    draw = {"layers.csv": finals.layer_density, "curves.csv": curves.active_weights}[name]
    assert "have been collected" in words(draw(material))


@pytest.mark.parametrize("draw", [draw for draw, _ in report._DRAW.values()])
def test_every_plot_has_a_caption(material, draw):
    text = words(draw(material))
    for fact in (
        "seeds 0, 1 (n = 2)",
        "Epochs: 4 (Dense); 8 (LWM, BCS)",
        "eps 8/255",
        formats.SMALL,
    ):
        assert fact in text
    assert "cpu (1 thread)" in text
    assert "election" in text


# ------------------------------------------------------------------ connections


def test_survival_equals_the_kaplan_meier_estimate_by_hand():
    # 10 connections: 2 are pruned at age 1, one has age 1 at the end; 3 of 7 are pruned at age 3.
    ages, share = statistics.survival_curve([1, 3, 4], [2, 3, 0], [1, 0, 4])
    assert ages.tolist() == [0, 1, 2, 3, 4]
    assert share == pytest.approx([1, 0.8, 0.8, 0.8 * 4 / 7, 0.8 * 4 / 7])


def test_survival_adds_up_the_connections_of_several_seeds():
    one = statistics.survival_curve([1, 2], [1, 0], [0, 3])[1]
    two = statistics.survival_curve([1, 2, 1, 2], [1, 0, 1, 0], [0, 3, 0, 3])[1]
    assert one == pytest.approx(two)


def test_survival_plot_has_one_line_for_each_method_that_rewires(material):
    figure = connections.survival(material)
    line = drawn(figure.axes[0], "BCS")
    # Two seeds: in each one, two connections are pruned at age 3 and one has age 3 at the end.
    assert line.get_ydata()[-1] == pytest.approx(100 / 3)
    assert "Kaplan-Meier" in words(figure)


def test_density_over_training_has_a_line_for_each_layer_with_three_markers(material):
    figure = connections.density_over_training(material)
    assert len(figure.axes) == 2  # one method that rewires, two sparsities
    lines = [line for line in figure.axes[0].lines if len(line.get_xdata()) > 2]
    sizes = list(LAYERS.values())[:2]
    assert [line.get_ydata()[-1] for line in lines] == pytest.approx([1000 / n for n in sizes])
    assert lines[0].get_xdata()[0] == 0
    assert lines[0].get_xdata()[-1] == 1


def test_overlap_shows_the_index_and_the_expected_index_of_every_pair(material):
    figure = connections.mask_overlap(material)
    assert len(figure.axes) == 3  # two sparsities and the scale of colours
    assert [text.get_text() for text in figure.axes[0].texts] == ["25\n(5)"] * 4
    assert figure.axes[0].images[0].get_clim() == (0, 25)
    assert figure.axes[0].images[0].get_array().shape == (2, 2)


def test_magnitudes_are_shares_of_the_nonzero_weights(material):
    figure = connections.weight_magnitudes(material)
    line = drawn(figure.axes[0], "BCS")
    assert line.get_ydata().max() == pytest.approx(100)  # all made-up weights are in one bin
    peak = line.get_xdata()[line.get_ydata().argmax()]
    assert 0.05 < peak < 0.4


@pytest.mark.parametrize(
    "draw", [connections.survival, connections.density_over_training, curves.rewiring]
)
def test_without_rewiring_the_plot_has_a_message(draw, tmp_path):
    material = prepare(tmp_path, grid={"methods": ["dense", "lwm"]})
    assert "No method of this study" in words(draw(material))


def test_methods_look_different_and_have_the_same_look_in_every_study(tmp_path):
    all_methods = style.looks(load(tmp_path, methods=["dense", "lwm", "admm", "hydra", "bcs"]))
    few = style.looks(load(tmp_path, methods=["bcs", "lwm"]))
    assert few["lwm"] == all_methods["lwm"]
    for part in ("color", "marker", "linestyle"):
        assert len({str(getattr(look, part)) for look in all_methods.values()}) == 5
    unknown = [style._look("lwm", index, "lwm") for index in range(40)]
    assert len({(look.color, look.marker, str(look.linestyle)) for look in unknown}) == 40


# ------------------------------------------------------------------ grades

REASONS = {
    "": reliability.FINE,
    "pgd breaks 1 more images than AutoAttack": reliability.LOOK,
    "no gradient on 12% of the images": reliability.UNRELIABLE,
}
FILLING = {reliability.FINE: "full", reliability.LOOK: "bottom", reliability.UNRELIABLE: "white"}


def fillings(figure) -> set[str]:
    """How the markers of LWM are filled, in all panels of a figure."""
    lines = [line for panel in figure.axes for line in panel.lines]
    own = [ln for ln in lines if ln.get_gid() == "method:lwm" and ln.get_linestyle() == "None"]
    own = [line for line in own if line.get_marker() == "^"]
    white = [ln for ln in own if ln.get_markerfacecolor() == "white"]
    return {"white" if line in white else line.get_fillstyle() for line in own}


@pytest.mark.parametrize("reasons", REASONS)
@pytest.mark.parametrize("draw", [costs.pareto, finals.robust_accuracy])
def test_the_filling_of_a_marker_shows_the_grade(draw, reasons, tmp_path):
    figure = draw(prepare(tmp_path, potentially_unreliable=reasons))
    grade = REASONS[reasons]
    if grade == reliability.FINE and draw is finals.robust_accuracy:
        assert fillings(figure) == set()  # the markers of the line are enough
    else:
        assert fillings(figure) == {FILLING[grade]}
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert [name for name in legend if name in reliability.GRADES] == [grade][: grade != "fine"]
    assert ("may be too high" in words(figure)) == (grade != reliability.FINE)


# ------------------------------------------------------------------ places on axes


def with_costs(material, **columns):
    """The material with numbers of passes, or other columns of the summary."""
    passes = {"forward_passes": 10.0, "backward_passes": 10.0}
    return dataclasses.replace(material, summary=material.summary.assign(**passes | columns))


def test_costs_and_weights_are_drawn_at_their_exact_numbers(material):
    figure = costs.cost(with_costs(material))
    for row in (figure.axes[:3], figure.axes[3:6]):
        accuracy, passes, _ = row
        for panel in row:
            assert all(line.get_transform() == panel.transData for line in panel.lines)
        assert [line.get_xdata()[0] for line in accuracy.lines] == pytest.approx([70, 30, 50])
        assert [line.get_xdata()[0] for line in passes.lines] == [20, 20, 20]
    assert [line.get_xdata()[0] for line in figure.axes[2].lines] == [400, 400, 40]
    assert [line.get_xdata()[0] for line in figure.axes[5].lines] == [400, 400, 19]
    names = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert names == ["Dense", "LWM", "BCS"]


def test_equal_costs_have_equal_places_on_different_lines(material):
    passes = costs.cost(with_costs(material)).axes[1]
    places = [(line.get_xdata()[0], line.get_ydata()[0]) for line in passes.lines]
    assert len({x for x, _ in places}) == 1
    assert len({y for _, y in places}) == len(places)


def test_active_weights_are_drawn_at_their_exact_numbers(material):
    panel = curves.active_weights(material).axes[0]
    for name in ("Dense", "LWM", "BCS"):
        assert drawn(panel, name).get_transform() == panel.transData
    # Below equal lines, the earlier one of the legend is wider.
    widths = [drawn(panel, name).get_linewidth() for name in ("Dense", "LWM", "BCS")]
    assert widths == sorted(widths, reverse=True)
    assert len(set(widths)) == 3


def test_the_summary_marks_the_pareto_front(material):
    figure = costs.pareto(material)
    [panel] = figure.axes
    places = {
        (line.get_label(), line.get_xdata()[0], round(float(line.get_ydata()[0]), 6))
        for line in panel.lines
        if line.get_gid()
    }
    assert places == {
        ("Dense", 400, 70),
        ("LWM", 400, 30),
        ("BCS", 40, 50),
        ("BCS", 19, 50),
    }
    line = next(line for line in panel.lines if line.get_drawstyle() == "steps-post")
    assert line.get_xydata().tolist() == [[19, 50], [400, 70]]
    bold = [text.get_text() for text in panel.texts if text.get_fontweight() == "bold"]
    assert bold == ["BCS 95 %", "Dense"]
    plain = [text.get_text() for text in panel.texts if text.get_fontweight() != "bold"]
    assert plain == ["90 %", "90 %", "95 %"]  # BCS, and LWM at both sparsities


def slow_front(rows: pd.DataFrame) -> set[int]:
    """The front by its definition: every pair of rows is compared."""
    found = set()
    for i, a in rows.iterrows():
        ahead = [
            b.peak_active_weights <= a.peak_active_weights
            and b.autoattack_accuracy >= a.autoattack_accuracy
            and (b.peak_active_weights, b.autoattack_accuracy)
            != (a.peak_active_weights, a.autoattack_accuracy)
            for _, b in rows.iterrows()
        ]
        if not any(ahead):
            found.add(i)
    return found


@pytest.mark.parametrize("seed", range(20))
def test_front_equals_its_definition(seed):
    rng = np.random.default_rng(seed)
    rows = pd.DataFrame(
        {
            "peak_active_weights": rng.choice(12, 9, replace=False),
            "autoattack_accuracy": rng.integers(0, 6, 9) / 6,
            "reliability": "fine",
            "failure": "",
        }
    )
    assert set(costs.front(rows).index) == slow_front(rows)


def test_front_has_neither_unreliable_nor_failed_networks():
    rows = pd.DataFrame(
        {
            "peak_active_weights": [1, 2, 3, 4],
            "autoattack_accuracy": [0.9, 0.8, 0.7, 0.6],
            "reliability": ["unreliable", "look", "fine", "fine"],
            "failure": ["", "", "", ""],
        }
    )
    assert costs.front(rows).index.tolist() == [1]
    rows.loc[1, "failure"] = "collapsed"
    assert costs.front(rows).index.tolist() == [2]


@pytest.mark.parametrize("seed", range(5))
def test_spread_labels_keep_their_order_and_a_gap(seed):
    values = sorted(np.random.default_rng(seed).uniform(0, 10, 7).tolist())
    found = costs.spread(values, 1.5)
    assert (np.diff(found) >= 1.5 - 1e-9).all()
    assert np.mean(found) == pytest.approx(np.mean(values))
    far = [0.0, 5.0, 10.0]
    assert costs.spread(far, 1.5) == far


# ------------------------------------------------------------------ curves, bands, layers


def test_training_curves_are_the_mean_over_seeds_with_the_range_of_seeds(material):
    figure = curves.training_curves(material)
    for panel, title in zip(figure.axes, ("sparsity 90 %", "sparsity 95 %"), strict=True):
        assert panel.get_title() == title
        for name, epochs in (("Dense", 4), ("LWM", 8), ("BCS", 8)):
            line = drawn(panel, name)
            assert line.get_xdata().tolist() == list(range(1, epochs + 1))
            assert line.get_ydata() == pytest.approx([45] * epochs)
    band = figure.axes[0].collections[0].get_paths()[0].vertices
    assert {round(float(y), 6) for y in band[:, 1]} == {40, 50}
    assert drawn(figure.axes[0], "LWM").get_markevery() == [0, 4]


def test_layers_have_a_legend(material):
    figure = connections.density_over_training(material)
    [legend] = figure.legends
    names = [text.get_text() for text in legend.get_texts()]
    assert names == ["layer 1: 40 weights", "layer 2: 160 weights", "layer 3: 200 weights"]
    shades = [line.get_color() for line in legend.get_lines()]
    lines = [line for line in figure.axes[0].lines if len(line.get_xdata()) > 2]
    assert all(np.array_equal(a.get_color(), b) for a, b in zip(lines, shades, strict=False))


def test_legend_of_many_layers_has_the_first_and_the_last(material):
    sizes = pd.Series(range(100, 153), index=map(str, range(53)))
    handles = connections._layer_handles(sizes)
    assert len(handles) == 8
    assert handles[0].get_label() == "layer 1: 100 weights"
    assert handles[-1].get_label() == "layer 53: 152 weights"


def test_a_panel_without_data_says_so_and_has_no_axes(tmp_path):
    path = tmp_path / "made_up.yaml"
    blocks = [
        STUDY["grid"] | {"methods": ["bcs"], "sparsities": [0.9]},
        STUDY["grid"] | {"methods": ["lwm"], "sparsities": [0.95]},
    ]
    path.write_text(yaml.safe_dump(STUDY | {"grid": blocks}))
    study = loading.load(path)
    layout = MadeUp(study, Layout(tmp_path / "made_up"), correct).write()
    material = summary.make_material(study, layout, tidy.read(layout.root))
    for draw in (connections.survival, curves.rewiring):
        full, empty = draw(material).axes
        assert full.lines
        assert [text.get_text() for text in empty.texts] == ["no data"]
        assert not empty.lines
        assert len(empty.get_xticks()) == len(empty.get_yticks()) == 0


# ------------------------------------------------------------------ files, widths, captions


def test_captions_are_beside_the_picture_and_not_in_it(material):
    figure = finals.robust_accuracy(material)
    inside = words(SimpleNamespace(caption=(), texts=figure.texts, axes=figure.axes))
    assert "worst case per image" in words(figure)
    assert "worst case per image" not in inside
    assert "seeds 0, 1" not in inside


def numbers(axis) -> list:
    """The horizontal numbers of an axis that are inside the panel."""
    low, high = sorted(axis.get_view_interval())
    shown = [t for t in axis.get_ticklabels() if t.get_visible() and t.get_text()]
    places = [text.get_unitless_position()[axis.axis_name == "y"] for text in shown]
    kept = zip(shown, places, strict=True)
    return [text for text, at in kept if low <= at <= high and not text.get_rotation()]


@pytest.mark.parametrize("name", [n for n in report._DRAW if n != "published"])
@pytest.mark.parametrize("size", style.WIDTHS)
def test_paper_has_the_asked_width_and_no_overlapping_ticks(name, size, material):
    draw, _ = report._DRAW[name]
    with style.applied(style.WIDTHS[size]):
        figure = draw(with_costs(material))
        assert figure.get_size_inches()[0] == style.WIDTHS[size]
        figure.draw_without_rendering()
        renderer = figure.canvas.get_renderer()
        for axis in [axis for panel in figure.axes for axis in (panel.xaxis, panel.yaxis)]:
            boxes = [text.get_window_extent(renderer) for text in numbers(axis)]
            pairs = itertools.combinations(boxes, 2)
            assert not any(a.overlaps(b) for a, b in pairs), numbers(axis)


def test_paper_has_letters_of_print_and_embedded_fonts(material, tmp_path):
    with style.applied(style.WIDTHS["column"]):
        figure = finals.robust_accuracy(material)
        assert figure.axes[0].xaxis.label.get_fontsize() == 7
        style.save(figure, tmp_path / "plot.pdf")
    content = (tmp_path / "plot.pdf").read_bytes()
    assert content.count(b"/FontFile2") >= 1  # TrueType programs inside the file
    assert b"/Type3" not in content


def test_a_row_of_panels_is_broken_on_narrow_paper(tmp_path):
    material = prepare(tmp_path, grid={"sparsities": [0.8, 0.9, 0.95]})
    places = {}
    for width in (None, *style.WIDTHS.values()):
        with style.applied(width):
            axes = curves.active_weights(material).axes
            places[width] = [style._place(panel) for panel in axes]
    assert places[None] == places[6.75] == [(0, 0), (0, 1), (0, 2)]
    assert places[3.25] == [(0, 0), (0, 1), (1, 0)]


def test_svg_names_the_methods_and_keeps_text(material):
    text = style.svg(finals.robust_accuracy(material), "robust_accuracy")
    assert 'id="method:bcs"' in text
    assert ">BCS</text>" in re.sub(r"\s+", "", text)
    assert text == style.svg(finals.robust_accuracy(material), "robust_accuracy")


@pytest.mark.parametrize("channels", [1, 3])
def test_a_small_change_of_pixels_is_visible(material, channels):
    # In L2, a pixel changes by much less than eps.
    clean = np.full((channels, 4, 4), 0.5)
    perturbed = clean.copy()
    perturbed[:, 0, 0] += 0.004
    perturbed[:, 0, 1] -= 0.002
    keys = {"dataset": "digits", "arch": "small_cnn", "objective": "at", "sparsity": 0.9}
    place = pd.Series(keys | {"image": 0, "label": 1, "robust": "bcs", "broken": "lwm"})
    place["misclassified"] = ""
    figure, [row] = style.panels(1, 4)
    images._draw(row, material, place, "lwm", tidy.Broken(clean, perturbed, 7))
    change = np.asarray(row[2].images[0].get_array()).reshape(4, 4, channels)
    assert change[0, 0] == pytest.approx([1] * channels, abs=1e-4)
    assert change[0, 1] == pytest.approx([0.25] * channels, abs=1e-4)
    assert change[1, 1] == pytest.approx([0.5] * channels, abs=1e-4)
    assert "at most 0.004" in words(figure)


@pytest.mark.parametrize("size", style.WIDTHS)
def test_names_of_many_methods_fit_beside_the_pictures(size, material, monkeypatch, recwarn):
    labels = {f"m{i}": f"A long name {i} °".replace(" ", "\N{NO-BREAK SPACE}") for i in range(17)}
    names = [*labels]
    kinds = {"robust": names[:6], "broken": names[6:12], "misclassified": names[12:]}
    place = pd.Series(vars(material.study.cells()[0]) | {k: " ".join(v) for k, v in kinds.items()})
    place["image"], place["label"] = 3, 5
    broken = tidy.Broken(np.zeros((1, 8, 8)), np.ones((1, 8, 8)), 7)
    monkeypatch.setattr(images, "_labels_of", lambda *_: labels)
    monkeypatch.setattr(images, "_chosen", lambda _: [(place, "m6", broken)] * 3)
    with style.applied(style.WIDTHS[size]):
        figure = images.pictures(material)
        renderer = figure.canvas.get_renderer()
        texts = [panel.texts[0].get_window_extent(renderer) for panel in figure.axes[3::4]]
        pictures = [panel.get_window_extent(renderer) for panel in figure.axes[2::4]]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(texts, 2))
    for text, picture in zip(texts, pictures, strict=True):
        assert text.x1 <= figure.bbox.x1
        assert picture.x1 < text.x0
        assert picture.width > 0.5 * figure.dpi  # inches
    assert not [w for w in recwarn if "layout" in str(w.message)]
