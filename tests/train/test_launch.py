"""The exit code of a launcher is that of the rank that explains the others."""

from types import SimpleNamespace

import pytest

from megatron_davinci.train.launch import cause_of


@pytest.mark.parametrize(
    ("ends", "cause"),
    [
        ({0: (5, 10), 1: (-9, 11)}, 1),  # rank 0 lost rank 1, and was seen first
        ({0: (131, 10), 1: (1, 10)}, 1),  # rank 0 was ended with it
        ({0: (-3, 10), 1: (2, 12), 2: (1, 11)}, 2),
        ({0: (5, 10), 1: (131, 10)}, 0),  # another node's rank is the cause
        ({0: (75, 10), 1: (75, 10)}, 0),
    ],
)
def test_a_rank_that_lost_another_is_no_cause(ends, cause):
    failures = {rank: SimpleNamespace(exitcode=code, timestamp=at) for rank, (code, at) in ends.items()}
    assert cause_of(failures)[0] == cause
