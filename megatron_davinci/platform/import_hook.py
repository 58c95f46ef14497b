"""Makes `import megatron.core` quiet everywhere, and possible to use without CUDA.

`megatron_davinci/__init__.py` installs the hook; it costs nothing until Megatron-Core is imported. Then, for
each of its modules: known warnings about absent optional packages are dropped (by their exact text), and
so are deprecations; the patches of `megatron_patches` are applied, and on a CPU the name `torch` inside the
module is bound to `cpu_torch.STAND_IN`.
"""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import sys
import types
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

_KNOWN_WARNINGS = (
    r"Transformer Engine and Apex are not installed\.",
    r"Apex is not installed\.",
)


class _Loader:
    """Runs a module with its own loader, then makes our changes to it."""

    def __init__(self, loader: Any, on_cpu: bool) -> None:
        self._loader, self._on_cpu = loader, on_cpu

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: Any) -> Any:
        return self._loader.create_module(spec)

    def exec_module(self, module: types.ModuleType) -> None:
        from megatron_davinci.platform.megatron_patches import PATCHES

        with warnings.catch_warnings(), _without("wandb"):
            for text in _KNOWN_WARNINGS:
                warnings.filterwarnings("ignore", message=text, category=UserWarning)
            # About its own modules and torch's: for its developers, and fatal under `python -W error`.
            for category in (DeprecationWarning, FutureWarning):
                warnings.simplefilter("ignore", category)
            self._loader.exec_module(module)
        for patch in PATCHES:
            if patch.module == module.__name__ and (self._on_cpu or patch.scope == "all"):
                patch.apply(module)
        if self._on_cpu:
            import torch

            from megatron_davinci.platform.cpu_torch import STAND_IN

            if module.__dict__.get("torch") is torch:
                module.__dict__["torch"] = STAND_IN


@contextmanager
def _without(package: str) -> Iterator[None]:
    """Have an optional package not be there. Megatron-Core imports wandb to log inference and its own timers, which
    nobody here asks it for, and that takes longer (1.2 s) than most of its own modules.
    """
    hides = package not in sys.modules
    if hides:
        sys.modules[package] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if hides:
            del sys.modules[package]


class MegatronFinder:
    """Finds `megatron.core` modules as Python would, and wraps their loaders."""

    def __init__(self) -> None:
        self.device: str = "auto"
        self._on_cpu: bool | None = None

    @property
    def on_cpu(self) -> bool | None:
        """Whether Megatron-Core was prepared for a CPU; None before its first import."""
        return self._on_cpu

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """See `importlib.abc.MetaPathFinder.find_spec`."""
        if name != "megatron.core" and not name.startswith("megatron.core."):
            return None
        if self._on_cpu is None:
            self._prepare()
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None and hasattr(spec.loader, "exec_module"):
            spec.loader = _Loader(spec.loader, bool(self._on_cpu))  # type: ignore[assignment]
        return spec

    def _prepare(self) -> None:
        import torch

        from megatron_davinci.errors import EnvironmentProblem
        from megatron_davinci.platform.megatron_patches import SUPPORTED, patch_tensor_methods

        version = importlib.metadata.version("megatron-core")
        if not version.startswith(SUPPORTED + "."):
            raise EnvironmentProblem(
                "This megatron-core is not the one that our patches were written for.",
                found=version,
                expected=f"{SUPPORTED}.x",
                do=f"pip install 'megatron-core>={SUPPORTED},<0.17'",
            )
        self._on_cpu = self.device == "cpu" or not torch.cuda.is_available()
        if self._on_cpu:
            patch_tensor_methods()


FINDER = MegatronFinder()


def install() -> None:
    """Put the hook in front of Python's finders, once."""
    if FINDER not in sys.meta_path:
        sys.meta_path.insert(0, FINDER)
