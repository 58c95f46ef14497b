"""What `benchmarks/precision.py` makes of its runs, and that its arms are configurations."""

from __future__ import annotations

import pytest

from benchmarks import precision
from megatron_davinci.config import validate


@pytest.mark.parametrize("arm", precision.ARMS)
def test_each_arm_is_a_configuration_that_differs_in_its_precision_only(arm):
    config, plain = (validate(precision.settings(one, 1), "test") for one in (arm, "fp32"))
    changed = config.train.model_copy(
        update={"low_precision": plain.train.low_precision, "precision": plain.train.precision}
    )
    assert config.model_copy(update={"train": changed}) == plain
    assert (config.train == plain.train) == (arm == "fp32")


def test_gaps_are_of_pairs_of_seeds():
    heldout = {"fp32": [3.0, 3.2, 3.4], "nvfp4": [3.1, 3.2, 3.6], "nvfp4_without_tiles": [3.2, 3.3, 3.7]}
    figures = precision.figures_of({arm: [{"heldout": one} for one in runs] for arm, runs in heldout.items()})
    assert figures["heldout_fp32"] == pytest.approx(3.2) and figures["seed_deviation"] == pytest.approx(0.2)
    assert figures["gap_nvfp4"] == pytest.approx(0.1) and figures["gap_fraction_nvfp4"] == pytest.approx(
        0.1 / 3.2
    )
    assert figures["se_gap_nvfp4"] == pytest.approx(0.1 / 3**0.5)
    assert figures["without_tiles"] == pytest.approx(0.1) and figures["se_without_tiles"] == pytest.approx(
        0, abs=1e-9
    )


def test_the_held_out_text_is_not_trained_on():
    train, held_out, digest = precision.text()
    assert len(train) > 4 * len(held_out) > 4 * 10**5 and len(digest) == 64
    assert precision.windows(held_out, 3, 0).shape == (3, precision.LENGTH + 1)
    assert precision.rate(0, 100, 1.0) == pytest.approx(0.2) and precision.rate(99, 100, 1.0) < 0.11
