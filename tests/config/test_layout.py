"""A layout is laid, or every number that does not divide is said."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import megatron_davinci.config.nearest_layouts as nearest
from megatron_davinci.config import Layout, check_layout, load_config, validate
from megatron_davinci.config.layout_problems import even_split, layout_problems
from megatron_davinci.config.nearest_layouts import nearest_layouts
from megatron_davinci.errors import ConfigError
from tests.config import small


def configuration(
    *, tensor=1, pipeline=1, context=1, sequence=False, micro=1, batches=(4,), length=16, virtual_pipeline=1,
    pipeline_layers=None, expert=1, expert_tensor=1, **model,
):  # fmt: skip
    phases = [{"size": size, "steps": 1} for size in batches[:-1]] + [{"size": batches[-1]}]
    whole = small.settings(
        model={"max_sequence_length": length, **model},
        parallel={
            "tensor": tensor,
            "pipeline": pipeline,
            "virtual_pipeline": virtual_pipeline,
            "pipeline_layers": pipeline_layers,
            "context": context,
            "expert": expert,
            "expert_tensor": expert_tensor,
            "sequence": sequence,
        },
    )
    whole["train"]["micro_batch_size"] = micro
    whole["data"]["sequence_length"] = length
    whole["curriculum"][0]["global_batch_size"] = phases
    return validate(whole, "test")


def divides(part: int, number: int) -> bool:
    """By handing out one at a time, as a person would."""
    left = number
    while left > 0:
        left -= part
    return left == 0


small_sizes = st.integers(1, 9)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    tensor=st.integers(1, 4),
    pipeline=st.integers(1, 4),
    context=st.integers(1, 3),
    sequence=st.booleans(),
    micro=st.integers(1, 3),
    batches=st.lists(st.integers(1, 12), min_size=1, max_size=3),
    length=st.integers(1, 12),
    layers=small_sizes,
    groups=small_sizes,
    per_group=st.integers(1, 3),
    ffn=small_sizes,
    vocab=small_sizes,
    world=st.integers(1, 12),
)
def test_every_number_that_does_not_divide_is_listed_and_no_other(
    tensor, pipeline, context, sequence, micro, batches, length, layers, groups, per_group, ffn, vocab, world
):
    sequence = sequence and tensor > 1
    heads = groups * per_group
    config = configuration(
        tensor=tensor, pipeline=pipeline, context=context, sequence=sequence, micro=micro, batches=batches,
        length=length, num_layers=layers, num_attention_heads=heads, num_query_groups=groups, head_dim=2,
        ffn_hidden_size=ffn, vocab_size=vocab,
    )  # fmt: skip
    expected = []
    for name, number, by in [
        ("model.num_attention_heads", heads, tensor),
        ("model.ffn_hidden_size", ffn, tensor),
        ("model.vocab_size", vocab, tensor),
        ("data.sequence_length", length, 2 * context if context > 1 else 1),
        ("data.sequence_length", length, context * tensor if sequence else 1),
        ("model.num_layers", layers, pipeline),
        ("the number of ranks", world, tensor * pipeline * context),
    ]:
        if not divides(by, number):
            expected.append((name, number))
    # A key/value head may be shared by several tensor ranks, where each has an equal part of its rows.
    if not divides(tensor, groups):
        if not divides(groups, tensor):
            expected.append(("model.num_query_groups", groups))
        elif not divides(tensor, 2 * groups * 2):
            expected.append(("2 * model.num_query_groups * head_dim", 2 * groups * 2))
    together = tensor * pipeline * context
    if divides(together, world):
        data = world // together
        expected += [
            ("global_batch_size of stage one", size)
            for size in sorted(set(batches))
            if not divides(micro * data, size)
        ]
    if not expected:
        assert check_layout(config, world) == Layout(world, tensor, pipeline, world // together, context)
        return
    with pytest.raises(ConfigError) as caught:
        check_layout(config, world)
    found = str(caught.value.found).splitlines()
    assert {line.split(" is n")[0] for line in found} == {f"{name} ({number})" for name, number in expected}
    assert len(found) == len(expected)


def test_the_message_has_the_numbers_and_what_to_change():
    with pytest.raises(ConfigError) as caught:
        check_layout(configuration(tensor=3, pipeline=2, num_layers=3), 8)
    text = str(caught.value)
    assert "model.num_query_groups (2) is neither a multiple nor a divisor of parallel.tensor (3)" in text
    assert "model.num_layers (3) is not a multiple of parallel.pipeline (2): remainder 1" in text
    assert "the number of ranks (8) is not a multiple of parallel.tensor * parallel.pipeline (6)" in text
    assert "parallel.tensor=2" in str(caught.value.do)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    tensor=st.integers(1, 5),
    pipeline=st.integers(1, 5),
    virtual=st.integers(1, 3),
    context=st.integers(1, 3),
    sequence=st.booleans(),
    micro=st.integers(1, 5),
    batches=st.lists(st.integers(1, 24), min_size=1, max_size=2),
    layers=small_sizes,
    groups=st.integers(1, 4),
    experts=st.one_of(st.none(), st.integers(2, 6)),
    expert=st.integers(1, 3),
    world=st.integers(1, 9),
)
def test_every_layout_that_is_offered_goes(
    tensor, pipeline, virtual, context, sequence, micro, batches, layers, groups, experts, expert, world
):
    config = configuration(
        tensor=tensor, pipeline=pipeline, context=context, sequence=sequence and tensor > 1, micro=micro,
        batches=batches, num_layers=layers, num_attention_heads=4 * groups, num_query_groups=groups, head_dim=2,
        virtual_pipeline=virtual if pipeline > 1 else 1, expert=expert,
        experts=None if experts is None else {"number": experts},
    )  # fmt: skip
    assume(layout_problems(config, world))
    offered = nearest_layouts(config, world)
    with pytest.raises(ConfigError) as caught:
        check_layout(config, world)
    assert str(caught.value.do).splitlines()[1:] == [suggestion.overrides for suggestion in offered]
    assert offered, "one rank always goes, and it is near"
    for suggestion in offered:
        # What is written there, read as a person would paste it.
        written = [part for part in suggestion.overrides.split() if "=" in part]
        with tempfile.TemporaryDirectory() as folder:
            path = small.write(Path(folder), config.model_dump(mode="json", exclude_unset=True))
            pasted = load_config(path, written)
        assert pasted.model_dump() == suggestion.config.model_dump()
        check_layout(pasted, suggestion.ranks)


def test_the_nearest_change_comes_first():
    # Eight ranks take 16 sequences at once: smaller micro-batches, or two ranks for each.
    offered = [
        suggestion.overrides for suggestion in nearest_layouts(configuration(micro=2, batches=(8,)), 8)
    ]
    assert offered[0] == "train.micro_batch_size=1"
    assert "parallel.tensor=2" in offered


def test_a_search_costs_the_same_for_any_number_of_layers(monkeypatch):
    asked, log2 = [], math.log2
    monkeypatch.setattr(math, "log2", lambda number: asked.append(number) or log2(number))
    for layers in (36, 36 * 10**5):
        asked.clear()
        with pytest.raises(ConfigError, match="impossible"):
            check_layout(configuration(tensor=3, num_layers=layers), 8)
        assert len(asked) < 500


@pytest.mark.parametrize("axis", ["pipeline", "virtual_pipeline"])
def test_layers_are_not_split_among_more_chunks_than_there_are(monkeypatch, axis):
    asked, split = [], nearest.even_split
    monkeypatch.setattr(
        nearest, "even_split", lambda layers, chunks: asked.append(chunks) or split(layers, chunks)
    )
    config = validate(small.settings(parallel={"pipeline": 2, axis: 10**6}), "test")
    assert nearest_layouts(config, 4)
    assert max(asked, default=0) <= config.model.num_layers


def test_a_batch_size_of_several_stages_is_said_once():
    whole = small.settings()
    stage = whole["curriculum"][0]
    whole["curriculum"] = [{**stage, "name": name, "global_batch_size": size} for name, size in
                           (("one", 3), ("two", 4), ("three", 3), ("four", 5))]  # fmt: skip
    with pytest.raises(ConfigError) as caught:
        check_layout(validate(whole, "test"), 2)
    assert [line.split(" is not")[0] for line in str(caught.value.found).splitlines()] == [
        "global_batch_size of stages one, three (3)",
        "global_batch_size of stage four (5)",
    ]


def test_a_world_without_a_rank():
    with pytest.raises(ConfigError, match="at least one rank"):
        check_layout(configuration(), 0)


def test_a_layout_reads_like_the_field_writes_it():
    assert str(check_layout(configuration(tensor=2, pipeline=2), 8)) == "TP2 x PP2 x DP2 = 8 ranks"
    assert str(check_layout(configuration(context=4), 8)) == "TP1 x PP1 x CP4 x DP2 = 8 ranks"


def test_layers_that_do_not_divide_are_offered_as_an_uneven_split():
    with pytest.raises(ConfigError) as caught:
        check_layout(configuration(pipeline=2, virtual_pipeline=2, num_layers=6), 2)
    text = str(caught.value.found)
    assert (
        "model.num_layers (6) is not a multiple of parallel.pipeline * parallel.virtual_pipeline (4)" in text
    )
    assert "parallel.pipeline_layers=[1,2,2,1]" in str(caught.value.do)
    offered = configuration(pipeline=2, virtual_pipeline=2, num_layers=6, pipeline_layers=[1, 2, 2, 1])
    assert str(check_layout(offered, 2)) == "TP1 x PP2 x VP2 x DP1 = 2 ranks"


@given(layers=st.integers(1, 100), chunks=st.integers(1, 20))
def test_a_suggested_split_is_even_and_spares_the_last_chunk(layers, chunks):
    split = even_split(layers, chunks)
    assert len(split) == chunks and sum(split) == layers
    assert max(split) - min(split) <= 1
    assert split[-1] == min(split) and split[0] <= max(split)


def test_an_uneven_split_that_is_wrong_is_said_whole():
    with pytest.raises(ConfigError) as caught:
        check_layout(configuration(pipeline=3, num_layers=4, pipeline_layers=[2, 0, 1, 2]), 3)
    assert str(caught.value.found).splitlines() == [
        "parallel.pipeline_layers has 4 numbers, and parallel.pipeline * parallel.virtual_pipeline is 3",
        "parallel.pipeline_layers adds up to 5, and model.num_layers is 4",
        "parallel.pipeline_layers ([2,0,1,2]) leaves a chunk between the first and the last without a layer",
    ]


def test_an_interleaved_pipeline_needs_a_micro_batch_for_each_rank():
    with pytest.raises(ConfigError, match=r"needs at least parallel.pipeline \(2\)"):
        check_layout(configuration(pipeline=2, virtual_pipeline=2, num_layers=4, batches=(2, 4)), 4)
    check_layout(configuration(pipeline=2, virtual_pipeline=2, num_layers=4, batches=(4, 6)), 4)
    with pytest.raises(ConfigError, match="needs pipeline >= 2"):
        configuration(virtual_pipeline=2, num_layers=4)


def test_fewer_ranks_than_the_layout_needs():
    with pytest.raises(ConfigError, match="the number of ranks \\(1\\)"):
        check_layout(configuration(tensor=2), 1)


def test_sequence_parallelism_needs_a_tensor_group():
    with pytest.raises(ConfigError, match="needs tensor >= 2"):
        configuration(sequence=True)
