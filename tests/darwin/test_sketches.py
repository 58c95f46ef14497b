"""Arrays in one file: what is written is what is mapped."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_davinci.darwin.sketches import KEY, Arrays, first_of_each, names, save_sketch


def test_what_is_written_is_what_is_mapped(tmp_path):
    arrays = {
        "keys": np.array([(1, 2), (3, 4), (1, 2)], KEY),
        "empty": np.empty((0, 5), np.uint32),
        "numbers": np.arange(21, dtype=np.float64).reshape(7, 3)[::2],
        **names(["a", "", "être", "\ud800"]),
    }
    save_sketch(tmp_path / "deeper" / "00000", **arrays)
    assert [path.name for path in (tmp_path / "deeper").iterdir()] == ["00000.sketch"]
    found = Arrays(tmp_path / "deeper" / "00000")
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape
        assert (found[name] == array).all()
    assert [found.name(k) for k in range(4)] == ["a", "", "être", "\ud800"]
    assert first_of_each(found["keys"]).tolist() == [0, 1, 0]
    with pytest.raises(KeyError):
        found["other"]


def test_no_key_is_equal_to_none():
    assert first_of_each(np.array([(0, 0), (0, 0), (5, 0), (5, 0)], KEY)).tolist() == [0, 1, 2, 2]
