"""Whose layers, attention, norms, optimizer and loss run: chosen here, by what is asked for and installed."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_davinci.errors import EnvironmentProblem

OLDEST = {"transformer_engine": (2, 4), "flash_attn": (2, 7)}
"""Of the packages that are chosen among here, the oldest releases that do what is asked of them."""

_DISTRIBUTION = {"transformer_engine": "transformer-engine", "flash_attn": "flash-attn", "apex": "apex"}


@dataclass(frozen=True)
class Package:
    """Whether an optional package can be used.

    Attributes:
        usable: Whether it can.
        why: Its version, or what keeps it from being used.
    """

    usable: bool
    why: str


@dataclass(frozen=True)
class Choice:
    """What runs, and why.

    Attributes:
        name: The value that asks for it by name.
        why: A few words for the log.
    """

    name: str
    why: str


@dataclass(frozen=True)
class Backends:
    """What runs in each place. `str()` is the line for the log."""

    layers: Choice
    attention: Choice
    norm: Choice
    optimizer: Choice
    loss: Choice = Choice("megatron", "the default")
    rope: Choice = Choice("megatron", "the default")
    swiglu: Choice = Choice("megatron", "the default")
    weight_gradient: Choice = Choice("megatron", "the default")
    low_precision: Choice = Choice("none", "the default")

    def __str__(self) -> str:
        return "; ".join(f"{place}: {choice.name} ({choice.why})" for place, choice in self.places())

    def places(self) -> list[tuple[str, Choice]]:
        """Each place, and what runs there."""
        return [(field.name, getattr(self, field.name)) for field in dataclasses.fields(self)]

    @property
    def own_kernels(self) -> list[str]:
        """The settings under which this package's kernels run."""
        return [
            f"backends.{place}: davinci"
            for place, choice in self.places()
            if choice.name == "davinci" and place != "weight_gradient"  # whose product is torch's
        ]


def find_transformer_engine() -> Package:
    """Transformer Engine, built for this torch and recent enough."""
    return _find("transformer_engine", "transformer_engine.pytorch")


def find_flash_attn() -> Package:
    """The package flash-attn, built for this torch and recent enough."""
    return _find("flash_attn", "flash_attn")


def find_apex() -> Package:
    """NVIDIA's apex with its CUDA extensions.

    On the package index another project has the name. It is known by what it lacks, and is not imported.
    """
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return Package(False, "apex is not installed")
    folders = [Path(folder) for folder in spec.submodule_search_locations or []]
    if not any((folder / "optimizers" / "fused_adam.py").exists() for folder in folders):
        version = _version("apex")
        return Package(
            False,
            f"the apex {version or 'that is installed'} is another project of that name, not NVIDIA's: it has no "
            "apex.optimizers.FusedAdam",
        )
    if importlib.util.find_spec("amp_C") is None:
        return Package(False, "apex was built without its CUDA extensions: there is no amp_C")
    return _find("apex", "apex.optimizers")


def choose_backends(
    *,
    on_cuda: bool,
    layers: str = "auto",
    attention: str = "auto",
    norm: str = "auto",
    optimizer: str = "auto",
    loss: str = "auto",
    rope: str = "auto",
    swiglu: str = "auto",
    weight_gradient: str = "auto",
    recipe: str = "none",
    low_precision: str = "auto",
    documents: bool = False,
    half: bool = False,
    needs_engine: tuple[str, ...] = (),
    needs_package: tuple[str, ...] = (),
    needs_cuda: tuple[str, ...] = (),
    needs_local: tuple[str, ...] = (),
    needs_adam: tuple[str, ...] = (),
) -> Backends:
    """Choose what runs in each place.

    Args:
        on_cuda: Whether the run computes on CUDA. Of the packages none works elsewhere.
        layers: `auto`, `local` or `transformer_engine`.
        attention: `auto`, `sdpa`, `flash_attn` or `transformer_engine`.
        norm: `auto`, `local`, `transformer_engine`, `apex` or `davinci`.
        optimizer: `auto`, `torch`, `transformer_engine`, `apex` or `davinci`.
        loss: `auto`, `megatron` or `davinci`.
        rope: The same.
        swiglu: The same.
        weight_gradient: The same.
        recipe: Of products of few bits; `none` for none.
        low_precision: `auto`, `transformer_engine`, `native` or `emulate`: who multiplies by that recipe.
        documents: Whether attention will be confined to documents.
        half: Whether the run computes in half precision.
        needs_engine: Settings that act in Transformer Engine's layers only; elsewhere they would be ignored.
        needs_package: Settings for which Megatron-Core wants Transformer Engine, whosever the layers are.
        needs_cuda: Settings that act on CUDA only.
        needs_local: Settings that our own layers alone have.
        needs_adam: Settings that our own AdamW alone has.

    Raises:
        EnvironmentProblem: What was asked for by name is not there, or does not go with the rest; all is listed.
    """
    found: dict[str, Package] = {}
    problems: list[str] = []

    def package(name: str) -> Package:
        if name not in found:
            find: dict[str, Callable[[], Package]] = {
                "transformer_engine": find_transformer_engine,
                "flash_attn": find_flash_attn,
                "apex": find_apex,
            }
            found[name] = find[name]() if on_cuda else Package(False, "the platform is cpu")
        return found[name]

    def choose(place: str, asked: str, own: str, automatic: tuple[str, ...]) -> Choice:
        """`asked` by name, or the first of `automatic` that is there, or our `own`."""
        if asked == own:
            return Choice(own, "asked for")
        if asked != "auto":
            there = package(asked)
            if not there.usable:
                problems.append(f"backends.{place}: {asked}, but {there.why}")
            return Choice(asked, f"asked for, {there.why}")
        for name in automatic:
            if package(name).usable:
                return Choice(name, package(name).why)
        return Choice(own, package(automatic[0]).why if automatic else "the default")

    def whose(place: str, asked: str, default: str, automatic: tuple[str, ...] = ()) -> Choice:
        """Where ours is one of several that need no package."""
        return choose(place, asked, "davinci" if asked == "davinci" else default, automatic)

    asked = {"norm": norm, "rope": rope, "swiglu": swiglu, "weight_gradient": weight_gradient}
    needs_local += tuple(f"backends.{place}: davinci" for place, name in asked.items() if name == "davinci")
    if low_precision in ("native", "emulate"):
        needs_local += (f"train.low_precision.backend: {low_precision}",)
    elif recipe == "bits":
        needs_local += ("train.low_precision.recipe: bits",)
    elif low_precision == "transformer_engine":
        needs_engine += ("train.low_precision.backend: transformer_engine",)
    chosen = choose("layers", layers, "local", ("transformer_engine",))
    if needs_local and layers == "auto":
        chosen = Choice("local", f"they alone have {needs_local[0]}")
    engine = chosen.name == "transformer_engine"
    preferred = ("transformer_engine",) if engine else ()
    attends = choose("attention", attention, "sdpa", () if documents else preferred)
    if documents and engine and attention == "auto":
        attends = Choice("sdpa", "attention is confined to documents")
    normalises = whose("norm", norm, "local", preferred)
    optimizes = whose("optimizer", optimizer, "torch", ("transformer_engine", "apex"))
    if needs_adam and optimizer == "auto":
        optimizes = Choice("davinci", f"it alone has {needs_adam[0]}")
    others = {"loss": loss, "rope": rope, "swiglu": swiglu, "weight_gradient": weight_gradient}
    ours = {place: whose(place, name, "megatron") for place, name in others.items()}
    multiplies = _who_multiplies(recipe, low_precision, engine=engine, on_cuda=on_cuda)
    if isinstance(multiplies, str):
        problems.append(multiplies)
        multiplies = Choice("none", multiplies)
    if multiplies.name == "transformer_engine" and engine and not half:
        problems.append("train.low_precision by Transformer Engine is beside bf16: train in bf16")
    if documents and attends.name == "transformer_engine":
        problems.append(
            "backends.attention: transformer_engine, but a stage or the evaluation has a document mask, which it "
            "would want packed in another way: take sdpa or flash_attn"
        )
    if attends.name == "flash_attn" and not half:
        problems.append(
            "backends.attention: flash_attn, but it computes in half precision only: train in bf16"
        )
    if engine and norm in ("local", "apex"):
        problems.append(
            f"backends.norm: {normalises.name}, but Transformer Engine's layers have their norms in them: take "
            "backends.layers: local"
        )
    if engine:
        problems += [
            f"{setting} is in our own layers only: take backends.layers: local" for setting in needs_local
        ]
    for setting in needs_cuda:
        if not on_cuda:
            problems.append(f"{setting} acts on CUDA only, and the platform is cpu")
    for setting in needs_package:
        there = package("transformer_engine")
        if not there.usable:
            problems.append(f"{setting} wants Transformer Engine, but {there.why}")
    for setting in needs_engine:
        if not engine:
            problems.append(
                f"{setting} acts in Transformer Engine's layers only, and layers are ours: {chosen.why}"
            )
    if problems:
        raise EnvironmentProblem(
            "What was asked for by name cannot run here.",
            where="the configuration",
            found="\n".join(problems),
            do="install what is named (docs/install-gpu.md says how), or take it out of the configuration",
        )
    return Backends(chosen, attends, normalises, optimizes, **ours, low_precision=multiplies)


_NATIVE = ("delayed", "current", "block")  # which torch multiplies


def _who_multiplies(recipe: str, asked: str, *, engine: bool, on_cuda: bool) -> Choice | str:
    """Whose products follow a recipe, or what is wrong with that."""
    if recipe == "none":
        return Choice("none", "the default")
    here = gpu_problem(recipe) if on_cuda else None
    itself = here or (native_problem(recipe) if on_cuda else None)
    if asked == "native":
        return (
            Choice("native", "asked for")
            if itself is None
            else f"train.low_precision.backend: native, but {itself}"
        )
    if asked == "emulate":
        return Choice(asked, "asked for")
    if asked == "transformer_engine" or engine:
        if here is not None:
            return f"train.low_precision.recipe: {recipe}, but {here}"
        return Choice("transformer_engine", "asked for" if asked != "auto" else "its layers run")
    if not on_cuda:
        return Choice("emulate", "the platform is cpu")
    if recipe in _NATIVE and itself is None:
        return Choice("native", "layers are ours, and torch multiplies in FP8 here")
    why = itself or "torch's own products have delayed, current and block only"
    return (
        f"train.low_precision.recipe: {recipe}, but layers are ours and {why}: take Transformer Engine's layers, or "
        "backend: emulate, which has the same rounding and is slower than bf16"
    )


_SINCE = {"delayed": (8, 9), "current": (8, 9), "block": (9, 0), "mxfp8": (10, 0), "nvfp4": (10, 0)}
"""The compute capability from which on a GPU multiplies by a recipe: Ada, Hopper, Blackwell."""


def gpu_problem(recipe: str) -> str | None:
    """Why this GPU has no products of a recipe, and what it has; None where it has, or there is no GPU to ask.

    Args:
        recipe: As in `train.low_precision.recipe`.
    """
    import torch

    if recipe not in _SINCE or not torch.cuda.is_available():
        return None
    capability = torch.cuda.get_device_capability()
    if capability >= _SINCE[recipe]:
        return None
    has = [name for name, since in _SINCE.items() if capability >= since]
    return (
        f"{torch.cuda.get_device_name()} (compute capability {capability[0]}.{capability[1]}) has no products of it: "
        + (f"take {', '.join(has)}, or " if has else "take ")
        + "backend: emulate, which has the same rounding and is slower than bf16"
    )


def native_problem(recipe: str) -> str | None:
    """Why torch's own products do not follow a recipe on this GPU; None where they do, or there is no GPU to ask.

    A scale a tensor is everywhere where FP8 is. Scales of blocks are cuBLAS's from 12.9 on, on Hopper alone.

    Args:
        recipe: As in `train.low_precision.recipe`.
    """
    import torch

    if recipe != "block" or not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    if major != 9:
        return (
            f"torch multiplies with scales of blocks of 128 on Hopper alone, and {torch.cuda.get_device_name()} has "
            f"compute capability {major}.{minor}: take recipe: current, or Transformer Engine's mxfp8 on Blackwell"
        )
    if not hasattr(torch.nn.functional, "scaled_mm"):
        return (
            f"torch {torch.__version__} has no torch.nn.functional.scaled_mm, by which blocks of 128 are multiplied: "
            "take a newer one, or recipe: current"
        )
    if _numbers(torch.version.cuda or "0.0") < (12, 9):
        return (
            f"torch was built for CUDA {torch.version.cuda}, and cuBLAS multiplies with scales of blocks of 128 from "
            "12.9 on: take a build for a newer one, or recipe: current"
        )
    return None


def _find(name: str, module: str) -> Package:
    """Import `module` of package `name`, and compare its version."""
    if importlib.util.find_spec(name) is None:
        return Package(False, f"{_DISTRIBUTION[name]} is not installed")
    version = _version(name)
    oldest = OLDEST.get(name)
    if version is not None and oldest is not None and _numbers(version) < oldest:
        return Package(False, f"{_DISTRIBUTION[name]} {version} is older than {'.'.join(map(str, oldest))}")
    try:
        importlib.import_module(module)
    except (ImportError, OSError) as error:  # OSError: built for another CUDA
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return Package(False, f"{_DISTRIBUTION[name]} does not import: {reason}")
    return Package(True, f"{_DISTRIBUTION[name]}{f' {version}' if version else ''}")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(_DISTRIBUTION[name])
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, int]:
    first, _, rest = version.partition(".")
    second = rest.partition(".")[0]
    return (int(first) if first.isdecimal() else 0, int(second) if second.isdecimal() else 0)
