"""Data on disk and its order: indexed datasets, sources, and which tokens sample `n` is. NumPy only."""

from megatron_davinci.data.indexed import IndexedDataset, dtype_for_vocab
from megatron_davinci.data.indexed_writer import IndexedDatasetWriter
from megatron_davinci.data.manifest import Manifest, Shard

__all__ = ["IndexedDataset", "IndexedDatasetWriter", "Manifest", "Shard", "dtype_for_vocab"]
