"""Variants of kernels that `benchmarks/tune_kernels.py` tries: they can be written, and other numbers are seen."""

import dataclasses
import re
import subprocess

import pytest

from benchmarks import memory_patterns, tune_kernels
from benchmarks.tune_kernels import OPS, Variant
from megatron_davinci.kernels import compilers


def test_every_variant_changes_its_source_and_nothing_else(tmp_path):
    for name, op in OPS.items():
        for number, variant in enumerate(op.variants.values()):
            folder = tmp_path / f"{name}{number}"
            folder.mkdir()
            variant.written(op.source, folder)
            texts = tune_kernels.sources.files(None)
            other = [one for one, text in texts.items() if (folder / one).read_text() != text]
            as_it_is = all(old == new for old, new in variant.texts)
            assert other == ([] if as_it_is else [op.source]), name


def test_a_list_that_is_older_than_the_sources_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has no 'kNothing = 1'"):
        Variant((("kNothing = 1", "kNothing = 2"),)).written("rope.cu", tmp_path)


@pytest.mark.long
@pytest.mark.needs("emulator")
@pytest.mark.needs("nvcc")
def test_a_variant_with_other_numbers_is_named_and_one_with_the_same_is_not():
    rope = OPS["rope_bias"]
    variants = {
        "more": rope.variants["5 passes, 2 blocks of 256 threads, 2 tokens a warp"],
        "wrong": Variant((("cosine[k] + before * sine[k]", "cosine[k] - before * sine[k]"),)),
    }
    found = tune_kernels.checked(dataclasses.replace(rope, variants=variants), seed=1)
    assert found == {"more": True, "wrong": False}


@pytest.mark.needs("nvcc")
def test_patterns_of_memory_compile_with_the_threads_that_they_are_started_with(tmp_path):
    source = memory_patterns.ROOT / "benchmarks" / memory_patterns.SOURCE
    command = [str(compilers.find_nvcc()), "-std=c++17", "-arch=sm_90", "-Xptxas=-v", "-cubin", str(source)]
    said = subprocess.run(
        [*command, "-o", str(tmp_path / "code")], capture_output=True, text=True, check=True
    ).stderr
    assert set(re.findall(r"function '(\w+)_fp32'", said)) == set(memory_patterns.PATTERNS)
    assert set(re.findall(r"(\d+) bytes spill", said)) == {"0"}
    threads = re.findall(r"PATTERN\((\w+), (\d+), (\d+),", source.read_text())
    assert {name: (int(number), int(room)) for name, number, room in threads} == memory_patterns.PATTERNS
