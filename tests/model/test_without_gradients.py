"""A model that is only asked says what it said when it could be trained, bit for bit."""

import pytest

from tests.convert.ranks import build, configuration
from tests.ranks import run_ranks

MODELS = {
    "biases, untied": {"qkv_bias": True, "tie_embeddings": False},
    "no bias, tied": {"tie_embeddings": True},
}


def logits_and_layers(changes, tensor):
    """Logits before and after, and how many layers got another `forward`."""
    import torch

    from megatron_davinci.model.without_gradients import without_gradients

    config = configuration(changes, tensor)
    config = config.model_copy(update={"parallel": config.parallel.model_copy(update={"sequence": False})})
    (chunk,) = build(config)
    chunk.eval()
    tokens = torch.arange(24).reshape(2, 12) * 7 % 96
    with torch.inference_mode():
        before = chunk(tokens, None, None)
        without_gradients(chunk)
        after = chunk(tokens, None, None)
    return before.numpy(), after.numpy(), sum("forward" in vars(layer) for layer in chunk.modules())


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("tensor", [1, 2])
def test_logits_are_the_same_bit_for_bit(changes, tensor):
    for before, after, exchanged in run_ranks(tensor, logits_and_layers, changes, tensor):
        assert before.std() > 0.1
        assert (before == after).all()
        assert exchanged == 4 * 5 + 1  # four products and an MLP in each layer, and the head
