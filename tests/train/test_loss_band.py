"""Losses beside those of a reference run: when they have left its band, and what is no reference."""

from __future__ import annotations

import json

import pytest

from megatron_davinci.config.low_precision import BandConfig
from megatron_davinci.errors import DataError
from megatron_davinci.train.loss_band import LossBand


def reference(folder, steps=20):
    folder.mkdir()
    lines = [{"step": n, "consumed_samples": 4 * n, "loss": 2.0 + n % 3} for n in range(1, steps + 1)]
    # A run that went on from a checkpoint has written a step twice: the last time counts.
    text = "".join(json.dumps(line) + "\n" for line in [lines[-1] | {"loss": 9.0}, *lines])
    (folder / "metrics.jsonl").write_text(text)
    return folder


def taken(band, losses, first=1):
    found = []
    for step, above in enumerate(losses, first):
        found.append(band.add(step, 4 * step, (2.0 + step % 3) * (1 + above)))
    return found


def test_it_is_said_once_when_the_loss_leaves_the_band_and_once_when_it_is_back(tmp_path):
    band = LossBand(BandConfig(reference=reference(tmp_path / "bf16"), width=0.01, steps=4))
    gaps = taken(band, [0.005] * 6)
    assert gaps[:3] == [None] * 3 and gaps[3:] == pytest.approx([0.005] * 3) and band.told() == []
    assert taken(band, [0.05, 0.05, 0.05], 7)[0] == pytest.approx(0.065 / 4)
    (said,) = band.told()
    assert (
        said.startswith("Step 7: the loss leaves the reference's band: +1.6") and "keep_first_layers" in said
    )
    taken(band, [0.0] * 6, 10)
    (said,) = band.told()
    assert "is back in the reference's band" in said
    # Below the reference is no reason to worry.
    taken(band, [-0.3] * 4, 16)
    assert band.told() == []


def test_a_loss_that_is_no_number_is_outside(tmp_path):
    band = LossBand(BandConfig(reference=reference(tmp_path / "bf16"), steps=1))
    band.add(1, 4, float("nan"))
    assert "leaves" in band.told()[0]


def test_steps_that_the_reference_has_not_are_named_once(tmp_path):
    band = LossBand(BandConfig(reference=reference(tmp_path / "bf16", steps=2), steps=1))
    assert taken(band, [0.0] * 4)[2:] == [None, None]
    (said,) = band.told()
    assert "no step that ends at sample 12" in said


def test_what_is_no_reference_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"a run directory with metrics\.jsonl in it"):
        LossBand(BandConfig(reference=tmp_path))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "consumed_samples": 4, "loss": NaN}\n')
    with pytest.raises(DataError, match="no line with consumed_samples and loss"):
        LossBand(BandConfig(reference=tmp_path))
