"""Backends are chosen by what is installed; what is asked for by name and cannot run is an error, all at once."""

from __future__ import annotations

import importlib
import sys

import pytest

from megatron_davinci.errors import EnvironmentProblem
from megatron_davinci.platform import backends
from megatron_davinci.platform.backends import (
    choose_backends,
    find_apex,
    find_flash_attn,
    find_transformer_engine,
)

THE_PACKAGES = ("transformer_engine", "flash_attn", "apex", "amp_C")


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder that is looked in first for packages; what was imported from it is forgotten."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.split(".")[0] in THE_PACKAGES:
            del sys.modules[name]
    importlib.invalidate_caches()


def install(site, distribution, version, **files):
    """Write a package: `files` are its modules, dots as double underscores, with their text."""
    for name, text in files.items():
        path = site.joinpath(*name.split("__"))
        path.parent.mkdir(parents=True, exist_ok=True)
        for folder in path.relative_to(site).parents:
            if str(folder) != ".":
                (site / folder / "__init__.py").touch()
        path.with_suffix(".py").write_text(text)
    info = site / f"{distribution.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
    importlib.invalidate_caches()


def engine(site, version="2.8.0", text="class LayerNormLinear: pass\n"):
    install(site, "transformer-engine", version, transformer_engine__pytorch=text)


def nvidias_apex(site, extensions=True):
    install(site, "apex", "0.1", apex__optimizers__fused_adam="class FusedAdam: pass\n")
    if extensions:
        (site / "amp_C.py").touch()
        importlib.invalidate_caches()


def test_nothing_is_installed(site):
    for find, name in (
        (find_transformer_engine, "transformer-engine"),
        (find_flash_attn, "flash-attn"),
        (find_apex, "apex"),
    ):
        assert (find().usable, find().why) == (False, f"{name} is not installed")
    chosen = choose_backends(on_cuda=True)
    assert [getattr(chosen, place).name for place in ("layers", "attention", "norm", "optimizer")] == [
        "local", "sdpa", "local", "torch",
    ]  # fmt: skip
    assert "layers: local (transformer-engine is not installed)" in str(chosen)
    assert "\n" not in str(chosen)


def test_the_other_project_named_apex_is_refused_and_not_imported(site):
    # What the package index has under this name is a toolkit for web authentication.
    install(site, "apex", "0.9.10.dev0", apex__forms="raise RuntimeError('imported')\n")
    (site / "apex" / "__init__.py").write_text("raise RuntimeError('imported')\n")
    found = find_apex()
    assert not found.usable
    assert "0.9.10.dev0 is another project of that name, not NVIDIA's" in found.why
    assert choose_backends(on_cuda=True).optimizer.name == "torch"
    with pytest.raises(EnvironmentProblem, match="another project") as caught:
        choose_backends(on_cuda=True, optimizer="apex")
    assert "docs/install-gpu.md" in str(caught.value)


def test_nvidias_apex_needs_its_extensions(site):
    nvidias_apex(site, extensions=False)
    assert find_apex() == backends.Package(
        False, "apex was built without its CUDA extensions: there is no amp_C"
    )
    (site / "amp_C.py").touch()
    importlib.invalidate_caches()
    assert find_apex() == backends.Package(True, "apex 0.1")
    chosen = choose_backends(on_cuda=True)
    assert str(chosen.optimizer.name) == "apex" and chosen.norm.name == "local"
    assert choose_backends(on_cuda=True, norm="apex", optimizer="torch").norm.name == "apex"


@pytest.mark.parametrize(
    ("version", "usable"),
    [("2.3.9", False), ("1.13.0", False), ("2.4.0", True), ("2.10.0+cu130", True), ("3.0", True)],
)
def test_a_transformer_engine_of_the_wrong_version_is_not_used(site, version, usable):
    engine(site, version)
    found = find_transformer_engine()
    assert found.usable is usable
    assert version in found.why
    assert ("older than 2.4" in found.why) is not usable


def test_one_that_was_built_for_another_cuda_says_what_failed(site):
    engine(site, text="raise OSError('libcudart.so.12: cannot open shared object file\\nmore')\n")
    assert find_transformer_engine().why == (
        "transformer-engine does not import: libcudart.so.12: cannot open shared object file"
    )


def test_auto_takes_transformer_engine_where_it_is(site):
    engine(site)
    chosen = choose_backends(on_cuda=True, half=True)
    assert {getattr(chosen, p).name for p in ("layers", "attention", "norm", "optimizer")} == {
        "transformer_engine"
    }
    confined = choose_backends(on_cuda=True, half=True, documents=True)
    assert (confined.layers.name, confined.attention.name) == ("transformer_engine", "sdpa")
    assert "confined to documents" in confined.attention.why
    local = choose_backends(on_cuda=True, layers="local")
    assert (local.attention.name, local.norm.name, local.optimizer.name) == (
        "sdpa",
        "local",
        "transformer_engine",
    )


def test_on_a_cpu_nothing_of_it_is_looked_for(site):
    engine(site, text="raise SystemExit('looked for')\n")
    assert choose_backends(on_cuda=False).layers.name == "local"
    with pytest.raises(EnvironmentProblem, match="the platform is cpu"):
        choose_backends(on_cuda=False, layers="transformer_engine")


def test_all_that_cannot_run_is_listed(site):
    install(site, "flash-attn", "2.8.3", flash_attn__interface="")
    with pytest.raises(EnvironmentProblem) as caught:
        choose_backends(
            on_cuda=True,
            layers="transformer_engine",
            attention="flash_attn",
            norm="apex",
            optimizer="apex",
            half=False,
        )
    lines = str(caught.value.found).splitlines()
    assert [line.split(",")[0] for line in lines] == [
        "backends.layers: transformer_engine", "backends.norm: apex", "backends.optimizer: apex",
        "backends.attention: flash_attn", "backends.norm: apex",
    ]  # fmt: skip
    assert "half precision only" in lines[3] and "have their norms in them" in lines[4]


def test_what_does_not_go_together(site):
    engine(site)
    with pytest.raises(EnvironmentProblem, match="packed in another way"):
        choose_backends(on_cuda=True, attention="transformer_engine", documents=True)
    with pytest.raises(EnvironmentProblem, match="norms in them"):
        choose_backends(on_cuda=True, norm="local")


def test_moments_in_8_bits_take_our_adamw(site):
    engine(site)
    needs = {"needs_adam": ("optimizer.moments: fp8",)}
    for on_cuda in (False, True):
        chosen = choose_backends(on_cuda=on_cuda, **needs)
        assert chosen.optimizer.name == "davinci" and chosen.optimizer.why.endswith("moments: fp8")
        assert "backends.optimizer: davinci" in chosen.own_kernels
    assert choose_backends(on_cuda=False, optimizer="davinci").optimizer.why == "asked for"


def test_the_loss_is_megatron_cores_unless_ours_is_asked_for():
    assert choose_backends(on_cuda=False).loss.name == choose_backends(on_cuda=True).loss.name == "megatron"
    assert "; loss: davinci (asked for); " in str(choose_backends(on_cuda=False, loss="davinci"))


def test_a_recipe_that_the_gpu_lacks_is_said_with_what_it_has(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    ours = {"on_cuda": True, "layers": "local", "half": True}
    assert choose_backends(**ours, recipe="current").low_precision.name == "native"
    assert choose_backends(**ours, recipe="nvfp4", low_precision="emulate").low_precision.name == "emulate"
    with pytest.raises(
        EnvironmentProblem, match=r"H100 \(compute capability 9.0\).* take delayed, current, block, or"
    ):
        choose_backends(**ours, recipe="nvfp4")
    # Blocks of 128 are cuBLAS's from 12.9 on, on Hopper alone.
    for build, capability, said in (
        ("13.0", (9, 0), None),
        ("12.8", (9, 0), "built for CUDA 12.8.* from 12.9 on.*recipe: current"),
        (
            "13.0",
            (10, 0),
            r"on Hopper alone, and NVIDIA H100 has compute capability 10.0: take recipe: current",
        ),
    ):
        monkeypatch.setattr(torch.version, "cuda", build)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda capability=capability: capability)
        for asked in ("native", "auto"):
            if said is None:
                assert (
                    choose_backends(**ours, recipe="block", low_precision=asked).low_precision.name
                    == "native"
                )
                continue
            with pytest.raises(EnvironmentProblem, match=said):
                choose_backends(**ours, recipe="block", low_precision=asked)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    with pytest.raises(EnvironmentProblem, match=r"8\.0.*take backend: emulate"):
        choose_backends(**ours, recipe="current", low_precision="native")
    assert choose_backends(on_cuda=False, recipe="mxfp8").low_precision.name == "emulate"
    assert choose_backends(on_cuda=False).low_precision.name == "none"
