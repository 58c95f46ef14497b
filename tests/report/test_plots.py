"""Plots: what they draw, in SVG that follows the theme, in PNG, in a table and in words."""

import io
import re
import xml.etree.ElementTree as ET
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from megatron_davinci.report.axes import Axis, Stage, ticks
from megatron_davinci.report.colors import ALL
from megatron_davinci.report.forest import Forest, Row
from megatron_davinci.report.numbers import signed
from megatron_davinci.report.plots import Bar, Bars, LinePlot, Plot, Series, StackedArea, grid_png

TOKENS = Axis("tokens consumed", "tokens", zero=True)
LOSS = Axis("loss", "nats per token")


def line_plot(**changes: object) -> LinePlot:
    x = np.linspace(1e6, 4e9, 500)
    arguments: dict[str, object] = {
        "title": "Held-out loss",
        "x": TOKENS,
        "y": LOSS,
        "series": [
            Series(name="general", x=x, y=3 + 1e9 / x, colour="blue", level=5.5),
            Series(name="code", x=x, y=3.001 + 1e9 / x, colour="vermillion"),
        ],
        "stages": [Stage("1-1", 0, 2e9), Stage("1-2", 2e9, 4e9)],
    }
    return LinePlot(**{**arguments, **changes})  # type: ignore[arg-type]


def area() -> StackedArea:
    bands = [("general", "blue", [0.7, 0.2]), ("QA", "violet", [0.3, 0.8])]
    return StackedArea(title="Mixture", x=TOKENS, edges=[0, 1e9, 4e9], bands=bands)


def bars() -> Bars:
    rows = [Bar("ours", -0.2, "green", low=-0.3, high=-0.1), Bar("theirs", 0.1, "blue", reference=0.15)]
    return Bars(title="Difference", half=True, value=LOSS, bars=rows)


EVERY_KIND = [line_plot(), line_plot(steps=True, x=Axis("tokens", "tokens", log=True)), area(), bars()]


def texts(svg: str) -> dict[str, ET.Element]:
    return {
        element.text or "": element for element in ET.fromstring(svg).iter() if element.tag.endswith("text")
    }


@pytest.mark.parametrize("plot", EVERY_KIND, ids=lambda plot: plot.title)
def test_an_svg_takes_every_colour_from_the_theme(plot: Plot) -> None:
    svg = plot.svg()
    variables = re.findall(r"var\(--(\w+), (#[0-9a-f]{6})\)", svg)
    assert variables
    assert all(ALL[name].light == fallback for name, fallback in variables)
    assert not re.search(r"#[0-9a-fA-F]{6}\b", re.sub(r"var\([^)]*\)", "", svg))


@pytest.mark.parametrize("plot", EVERY_KIND, ids=lambda plot: plot.title)
def test_an_svg_is_well_formed_labelled_and_leaves_the_page_alone(plot: Plot) -> None:
    svg = plot.svg("p7-")
    root = ET.fromstring(svg)
    assert root.get("role") == "img"
    assert root.get("aria-label") == plot.describe()
    assert "<style" not in svg  # a rule for every element of the page
    ids = re.findall(r'\bid="([^"]+)"', svg)
    assert len(ids) == len(set(ids))
    assert all(name.startswith("p7-") for name in ids)
    assert set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', svg)) <= {(i, "") for i in ids} | {
        ("", i) for i in ids
    }


@pytest.mark.parametrize("plot", EVERY_KIND, ids=lambda plot: plot.title)
def test_drawing_twice_gives_the_same_bytes(plot: Plot) -> None:
    assert plot.svg() == plot.svg()
    assert plot.png() == plot.png()


def test_a_png_is_an_image_with_something_on_it() -> None:
    image = Image.open(io.BytesIO(line_plot().png()))
    image.load()
    assert image.format == "PNG"
    assert image.width > 1400
    assert len(image.convert("RGB").getcolors(1_000_000) or []) > 10


def test_several_plots_fit_on_one_png() -> None:
    one = Image.open(io.BytesIO(grid_png([line_plot()], columns=1)))
    four = Image.open(io.BytesIO(grid_png([line_plot()] * 4, columns=2, heading="a run")))
    assert four.width > 1.9 * one.width
    assert four.height > 1.9 * one.height


def test_names_at_the_line_ends_do_not_touch_though_the_lines_do() -> None:
    found = texts(line_plot().svg())
    heights = [float(found[name].get("y", "nan")) for name in ("general", "code")]
    assert abs(heights[0] - heights[1]) >= 12


def test_stages_are_named_at_the_top_and_the_last_is_on_the_right() -> None:
    found = texts(line_plot().svg())
    assert float(found["1-1"].get("x", "nan")) < float(found["1-2"].get("x", "nan"))
    assert found["1-1"].get("y") == found["1-2"].get("y")


def test_stages_too_narrow_for_their_names_go_to_another_row() -> None:
    narrow = [Stage("first stage", 0, 1e7), Stage("second stage", 1e7, 2e7), Stage("third", 2e7, 4e9)]
    found = texts(line_plot(stages=narrow).svg())
    assert found["first stage"].get("y") != found["second stage"].get("y")


def test_axes_say_what_they_measure_in_which_unit_and_tokens_are_short() -> None:
    found = texts(line_plot().svg())
    assert "loss, nats per token" in found
    assert "tokens consumed" in found
    assert "2B" in found
    assert not any(re.search(r"\d{5}", text) for text in found)


def test_what_a_plot_cuts_off_it_says() -> None:
    x = np.linspace(0, 1e9, 200)
    falling = [Series(name="", x=x, y=np.where(x < 1e7, 11.0, 3 + x / 1e9))]
    whole = texts(line_plot(series=falling).svg())
    cut = texts(line_plot(series=falling, skip_start=0.1).svg())
    assert not any("cut off" in text for text in whole)
    little = [Series(name="", x=x, y=np.where(x < 1e7, 4.05, 3 + x / 1e9))]
    assert not any("cut off" in text for text in texts(line_plot(series=little, skip_start=0.1).svg())), (
        "it fits"
    )
    assert any("up to 11.0, is cut off" in text for text in cut)


def test_a_spike_after_the_start_is_never_cut_off() -> None:
    y = np.full(200, 3.0)
    y[150] = 30.0
    found = texts(line_plot(series=[Series(name="", x=np.arange(200.0), y=y)], skip_start=0.1).svg())
    assert not any("cut off" in text for text in found)
    assert "30" in found


def test_a_plot_without_points_says_so() -> None:
    for series in ([], [Series(name="general", x=[], y=[])], [Series(name="general", x=[1.0], y=[np.nan])]):
        assert "no data yet" in texts(line_plot(series=series, stages=()).svg())


def test_one_point_is_drawn() -> None:
    svg = line_plot(series=[Series(name="general", x=[5e6], y=[3.0])], stages=[Stage("1-1", 0, 5e6)]).svg()
    assert "<use " in svg
    assert "no data yet" not in svg


def test_a_name_is_text_not_markup_and_not_mathematics() -> None:
    hostile = r'</svg><script>alert("$\frac{1}{0}$")</script> #ffffff'
    svg = line_plot(
        title=hostile, series=[Series(name=hostile, x=[1, 2], y=[1, 2])], stages=[Stage(hostile, 0, 2)]
    ).svg()
    assert "<script" not in svg
    ET.fromstring(svg)
    assert any(text.startswith("</svg><script>") for text in texts(svg))
    assert line_plot(title=hostile).png()


def test_the_table_behind_a_plot_has_its_ends_and_few_rows() -> None:
    headers, rows = line_plot().table()
    assert headers == ["tokens consumed", "general", "code"]
    assert len(rows) == 40
    assert rows[0][:2] == ["1M", "1003"]
    assert rows[-1] == ["4B", "3.250", "3.251"]


def test_series_with_points_of_their_own_are_listed_one_after_the_other() -> None:
    apart = [Series(name="a", x=[1, 2], y=[1, 2]), Series(name="b", x=[1, 2, 3], y=[3, 2, 1])]
    headers, rows = line_plot(series=apart).table()
    assert headers == ["series", "tokens consumed", "loss, nats per token"]
    assert [row[0] for row in rows] == ["a", "a", "b", "b", "b"]


def test_a_mixture_in_words_and_in_rows() -> None:
    assert (
        area().describe()
        == "Mixture: shares against tokens consumed. general from 70% to 20%; QA from 30% to 80%."
    )
    assert area().table()[1] == [["0", "1B", "70%", "30%"], ["1B", "4B", "20%", "80%"]]
    assert {"general 20%", "QA 80%"} <= set(texts(area().svg()))


def test_bars_show_intervals_and_references_in_their_table() -> None:
    headers, rows = bars().table()
    assert headers == ["", "loss, nats per token", "interval", "reference"]
    assert rows[0] == ["ours", "−0.200", "−0.300 to −0.100", "–"]
    assert rows[1] == ["theirs", "0.100", "–", "0.150"]


@pytest.mark.parametrize("limits", [(0.1, 1000.0), (0.4, 2.5), (1e3, 1e13), (2.0, 2.1)])
def test_a_log_axis_has_at_least_two_ticks_and_not_too_many(limits: tuple[float, float]) -> None:
    found = ticks(Axis("x", "", log=True), limits, 6)
    assert 2 <= len(found) <= 8
    assert all(limits[0] <= value <= limits[1] for value in found)


def test_a_unit_is_left_out_only_where_the_label_says_the_word() -> None:
    assert Axis("time of a step", "s").caption == "time of a step, s"
    assert Axis("tokens consumed", "tokens").caption == "tokens consumed"


def test_a_line_ends_where_its_values_do_and_a_point_alone_is_a_point() -> None:
    x, y = np.linspace(0, 1e9, 100), np.full(100, 3.0)
    y[40:60] = np.nan
    path = re.findall(r' d="([^"]+)"', line_plot(series=[Series(name="", x=x, y=y)], stages=()).svg())
    assert any(one.count("M") == 2 for one in path)
    y[10::2] = np.nan
    assert line_plot(series=[Series(name="", x=x, y=y)], stages=()).svg().count("<use ") > 20


def test_many_stages_in_one_place_leave_the_plot_its_height() -> None:
    edges = [*np.linspace(0, 4e7, 31), 4e9]
    stages = [Stage(f"stage {i}", a, b) for i, (a, b) in enumerate(pairwise(edges))]
    found = texts(line_plot(stages=stages, half=True).svg())
    up = {
        float(text): float(one.get("y", "nan"))
        for text, one in found.items()
        if re.fullmatch(r"[3-9][.\d]*", text)
    }
    assert up[min(up)] - up[max(up)] > 30
    assert {"stage 0", "stage 30"} <= set(found)


def test_a_stage_beyond_what_is_shown_is_not_named() -> None:
    stages = [Stage("1-1", 0, 2e9), Stage("1-2", 2e9, 5e9), Stage("2-1", 5e9, 9e9)]
    found = texts(line_plot(stages=stages).svg())
    assert {"1-1", "1-2"} <= set(found) and "2-1" not in found


def test_names_of_many_bands_do_not_touch() -> None:
    bands = [(f"source {i}", "blue", [1 / 40]) for i in range(40)]
    many = StackedArea(title="Mixture", x=TOKENS, edges=[0, 1e9], bands=bands)
    at = sorted(float(one.get("y", "nan")) for name, one in texts(many.svg()).items() if "source" in name)
    assert min(np.diff(at)) >= 12
    one, two = (Image.open(io.BytesIO(grid_png(plots, columns=1))) for plots in ([many], [many, bars()]))
    assert one.height < two.height < 1.6 * one.height


def test_a_long_name_leaves_a_forest_its_room() -> None:
    rows = [Row("an arm of many words, " * 9, 0.1, 0.0, 0.2, [0.1], "blue", "equivalent")]
    svg = Forest(title="Differences", axis=LOSS, rows=rows, write=signed).svg()
    places = {text: float(element.get("x", "nan")) for text, element in texts(svg).items()}
    assert places["0"] < places["0.1"] < places["0.2"]
