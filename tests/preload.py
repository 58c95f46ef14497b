"""Imported once by the fork server; ranks are forked from it with all of this in memory."""

import torch

from megatron_davinci.platform.import_hook import FINDER

# The pool's ranks are gloo ranks, on a machine with GPUs too; tests/gpu starts processes of its own.
FINDER.device = "cpu"
torch.set_num_threads(1)

import megatron_davinci.cli.train  # noqa: E402
import megatron_davinci.evaluate.heldout  # noqa: E402
import megatron_davinci.train.loop  # noqa: E402, F401
