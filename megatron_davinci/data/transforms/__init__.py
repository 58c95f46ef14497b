"""What is done to samples between the data and the model: one file an intervention, keyed by the sample number."""

from megatron_davinci.data.transforms.build import stage_transforms
from megatron_davinci.data.transforms.pipeline import SampleTransforms, Transformed
from megatron_davinci.data.transforms.seen import as_seen

__all__ = ["SampleTransforms", "Transformed", "as_seen", "stage_transforms"]
