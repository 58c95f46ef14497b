"""Data on disk and its order: indexed datasets, sources, and which tokens sample `n` is. NumPy only.

What is named here is imported from its module when it is first asked for: who turns text into tokens needs no
loader, and a process that starts for that alone is ready in half the time.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_davinci.data.batches import Batch, Batches
    from megatron_davinci.data.curriculum import Curriculum, Location, Locations
    from megatron_davinci.data.indexed import IndexedDataset, dtype_for_vocab
    from megatron_davinci.data.indexed_writer import IndexedDatasetWriter
    from megatron_davinci.data.journal import Journal, MixRecord, SkipRecord
    from megatron_davinci.data.loader import Loader, NativeLoader
    from megatron_davinci.data.manifest import Manifest, Shard
    from megatron_davinci.data.merge import merge_datasets
    from megatron_davinci.data.source import Source
    from megatron_davinci.data.survey import make_manifest
    from megatron_davinci.data.verify import verify_source

__all__ = [
    "Batch",
    "Batches",
    "Curriculum",
    "IndexedDataset",
    "IndexedDatasetWriter",
    "Journal",
    "Loader",
    "Location",
    "Locations",
    "Manifest",
    "MixRecord",
    "NativeLoader",
    "Shard",
    "SkipRecord",
    "Source",
    "dtype_for_vocab",
    "make_manifest",
    "merge_datasets",
    "verify_source",
]

_MODULES = {
    "batches": ("Batch", "Batches"),
    "curriculum": ("Curriculum", "Location", "Locations"),
    "indexed": ("IndexedDataset", "dtype_for_vocab"),
    "indexed_writer": ("IndexedDatasetWriter",),
    "journal": ("Journal", "MixRecord", "SkipRecord"),
    "loader": ("Loader", "NativeLoader"),
    "manifest": ("Manifest", "Shard"),
    "merge": ("merge_datasets",),
    "source": ("Source",),
    "survey": ("make_manifest",),
    "verify": ("verify_source",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
