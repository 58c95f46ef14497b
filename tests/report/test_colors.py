"""One colour for each domain, told apart by everyone, readable on both papers."""

from itertools import combinations

import numpy as np
import pytest

from megatron_davinci.report.colors import ALL, PAGE, SERIES, assign, css_variables

# Machado, Oliveira & Fernandes 2009, severity 1.0, for linear RGB.
_SIGHT = {
    "normal": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "tritanopia": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}


def linear(colour: str) -> np.ndarray:
    value = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def contrast(a: str, b: str) -> float:
    """WCAG 2 contrast ratio."""
    low, high = sorted(float(linear(colour) @ [0.2126, 0.7152, 0.0722]) for colour in (a, b))
    return (high + 0.05) / (low + 0.05)


def difference(a: str, b: str, sight: str) -> float:
    """CIE 1976 colour difference as seen with a kind of sight."""

    def lab(colour: str) -> np.ndarray:
        to_xyz = np.array(
            [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
        ) / np.array([[0.9505], [1.0], [1.089]])
        xyz = to_xyz @ np.clip(_SIGHT[sight] @ linear(colour), 0, 1)
        f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
        return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])

    return float(np.linalg.norm(lab(a) - lab(b)))


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_text_colour_is_readable_on_its_paper(theme: str) -> None:
    paper = getattr(PAGE["paper"], theme)
    for name in (*SERIES, "ink", "muted"):
        assert contrast(getattr(ALL[name], theme), paper) >= 4.5, name


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("sight", list(_SIGHT))
def test_series_are_told_apart_with_every_kind_of_sight(theme: str, sight: str) -> None:
    domains = set(assign(["general", "code", "science", "QA"]).values())
    for a, b in combinations(SERIES, 2):
        least = 15 if {a, b} <= domains else 10
        assert difference(getattr(SERIES[a], theme), getattr(SERIES[b], theme), sight) >= least, (a, b)


def test_the_measure_of_sight_can_fail() -> None:
    # Pure red and a dark olive: far apart for most of us, nearly one colour with deuteranopia.
    assert difference("#c2410c", "#9a6700", "normal") > 30
    assert difference("#c2410c", "#9a6700", "deuteranopia") < 10


def test_a_domain_has_its_colour_whoever_stands_beside_it() -> None:
    everyone = assign(["QA", "general", "web", "science", "code", "law"])
    for domain in ("general", "code", "science", "QA"):
        assert assign([domain])[domain] == everyone[domain]
    assert len(set(everyone.values())) == 6
    assert assign(["law", "web"]) == assign(["web", "law"])


def test_more_names_than_colours_still_get_one_each() -> None:
    assert set(assign([f"arm {i}" for i in range(20)]).values()) == set(SERIES)


def test_light_colours_are_unique_so_that_an_svg_can_be_themed_by_them() -> None:
    assert len({colour.light for colour in ALL.values()}) == len(ALL)
    assert f"--ink: {PAGE['ink'].dark};" in css_variables("dark")
