"""Imported once by the fork server; ranks are forked from it with all of this in memory."""

import torch

import megatron_davinci

torch.set_num_threads(1)

import megatron_davinci.cli.train  # noqa: E402
import megatron_davinci.evaluate.heldout  # noqa: E402
import megatron_davinci.train.loop  # noqa: E402, F401
