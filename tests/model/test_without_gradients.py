"""A model that is only asked says what it said when it could be trained, bit for bit."""

import pytest

from tests.convert.ranks import build, configuration
from tests.ranks import run_ranks

# What the model is, whose rotary positions and SwiGLU it has, and how many modules of a layer are exchanged: four
# products, an MLP and the layer itself.
MODELS = {
    "biases, untied, rotated where they are written": (
        {"qkv_bias": True, "tie_embeddings": False},
        {"rope": "davinci"},
        6,
    ),
    "no bias, tied, rotated by Megatron-Core": ({"tie_embeddings": True}, {"rope": "megatron"}, 6),
    "gates that are left to the product behind": ({"tie_embeddings": True}, {"swiglu": "davinci"}, 4),
}


def logits_and_layers(changes, ours, tensor):
    """Logits before and after, and how many layers got another `forward`.

    Of sequences as they are trained on, and of sequences as branches: the second one goes on from the first.
    """
    import torch

    from megatron_davinci.evaluate.packing import Batch, batches
    from megatron_davinci.model.branches import Branches
    from megatron_davinci.model.without_gradients import without_gradients

    config = configuration(changes, tensor)
    parallel = config.parallel.model_copy(update={"sequence": False})
    backends = config.backends.model_copy(update=ours)
    (chunk,) = build(config.model_copy(update={"parallel": parallel, "backends": backends}))
    chunk.eval()
    tokens = torch.arange(24).reshape(2, 12) * 7 % 96
    first, second = tokens.tolist()
    (rows,) = batches([first, first[:8] + second], tokens=1000, balance=1000.0)
    batch = Batch.of(rows)

    def asked():
        branches = Branches(
            positions=torch.from_numpy(batch.positions),
            sees=torch.from_numpy(batch.sees)[:, None],
            outputs=torch.arange(batch.tokens.size),
            read=lambda logits, first: logits,
        )
        return chunk(torch.from_numpy(batch.tokens), None, None, packed_seq_params=branches).numpy()

    with torch.inference_mode():
        before = chunk(tokens, None, None).numpy(), asked()
        without_gradients(chunk)
        after = chunk(tokens, None, None).numpy(), asked()
    return before, after, sum("forward" in vars(layer) for layer in chunk.modules())


@pytest.mark.parametrize(("changes", "ours", "of_a_layer"), MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("tensor", [1, 2])
def test_logits_are_the_same_bit_for_bit(changes, ours, of_a_layer, tensor):
    for before, after, exchanged in run_ranks(tensor, logits_and_layers, changes, ours, tensor):
        for one, other in zip(before, after, strict=True):
            assert one.std() > 0.1
            assert (one == other).all()
        assert exchanged == 4 * of_a_layer + 1  # and the head
