"""The loss weight of prompts: what a source's mask leaves out may carry a part of the loss instead of none.

daVinci-LLM's appendix B trains on question-answer data with the loss on answers only, which is weight 0.
"""

from __future__ import annotations

import numpy as np

from megatron_davinci.data.transforms.sample import Sample


class PromptWeight:
    """Weighs labels that carry no loss by their source's mask.

    Weights are whole numbers, since Megatron-Core divides the summed loss by a count that is an int32: with
    `prompt / full` = 1/2 a prompt's label weighs 1 and any other weighs 2.

    Args:
        prompt: What a prompt's label weighs.
        full: What any other weighs, at most 255.
    """

    largest_id = None

    def __init__(self, prompt: int, full: int) -> None:
        self._prompt, self._full = prompt, full

    def __call__(self, sample: Sample) -> Sample:
        """As `SampleTransform`. Comes first: afterwards 0 may mean a label that is no prompt."""
        whole = (sample.weights != 0).view(np.uint8)
        weights = whole * np.uint8(self._full - self._prompt) + np.uint8(self._prompt)
        weights[0] = 0
        count = len(whole) - 1 - int(np.count_nonzero(whole[1:]))
        said = f"prompt loss weight {self._prompt / self._full:g} of {count:,} labels"
        return sample._replace(
            weights=weights, full=self._full, applied=(*sample.applied, said) if count else sample.applied
        )
