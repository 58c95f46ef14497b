"""Data on disk and its order: indexed datasets, sources, and which tokens sample `n` is. NumPy only."""

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
