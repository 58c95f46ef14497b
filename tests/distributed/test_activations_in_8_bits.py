"""What is kept in 8 bits is the same, whoever gives a layer its input: another layer, a rank, or recomputation.

The latter two give a tensor that autograd takes for a leaf, as it takes weights, which are kept as they are.
"""

from __future__ import annotations

import pytest

from tests.config import small
from tests.ranks import run_ranks
from tests.stepping import take_all

SIZES = {"hidden_size": 64, "ffn_hidden_size": 128, "num_attention_heads": 4, "num_query_groups": 2}
LOW = {"recipe": "current", "backend": "emulate", "activations": "fp8"}


def settings(pipeline=1, **recompute):
    train = {"precision": "fp32", "micro_batch_size": 4, "threads": 1, "low_precision": LOW}
    return small.settings(
        model=SIZES,
        parallel={"device": "cpu", "pipeline": pipeline},
        train={**train, "recompute": recompute},
    )


@pytest.mark.long
def test_recomputation_and_pipeline_stages_do_not_change_what_is_kept():
    whole = {
        "kept": settings(),
        "full": settings(granularity="full"),
        "norms": settings(granularity="selective", modules=["layernorm"]),
    }
    alone = run_ranks(1, take_all, whole)[0]
    assert alone["full"] == alone["kept"] == alone["norms"]
    *_, last = run_ranks(2, take_all, {"kept": settings(pipeline=2)})
    assert last["kept"].norms[0] == pytest.approx(alone["kept"].norms[0], rel=1e-6)
