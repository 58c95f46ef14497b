"""How much of a copy's bandwidth a GPU reaches by how work is handed to blocks, and how wide they read.

A kernel moves what AdamW with moments in 8 bits moves, 18.25 bytes a parameter in nine streams, and computes next to
nothing. Where as many blocks as there is room for are dealt every n-th tile, the multiprocessor that is farthest from
memory ends last; where each tile has a block, it begins wherever there is room. Codes come by lines of 128 bytes, or
by pieces of 64. Which of these made kernels of AdamW what they are is in docs/kernels.md.

figures: PATTERN_dealt_fraction_of_copy, PATTERN_a_block_a_tile_fraction_of_copy; `ahead`: the next tile is on its way
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks import adamw_speed, common, kernel_speed  # noqa: E402
from megatron_davinci.errors import EnvironmentProblem  # noqa: E402
from megatron_davinci.kernels import nvrtc  # noqa: E402
from megatron_davinci.kernels.table import Kernel  # noqa: E402
from megatron_davinci.platform import cuda_launch  # noqa: E402

SOURCE = "memory_patterns.cu"
COUNT = 376_832 * 8192  # about the report's parameters, in whole tiles of every pattern
PATTERNS = {  # threads, and blocks that a multiprocessor has room for
    "ahead_in_pieces": (256, 2),
    "ahead_in_lines": (256, 2),
    "in_pieces": (256, 4),
    "in_lines": (256, 4),
    "large_in_lines": (1024, 1),
}
KERNELS = {
    name: Kernel(name, SOURCE, threads, "ppppppl", ("fp32",)) for name, (threads, _) in PATTERNS.items()
}


def measure(device: torch.device, compiler: nvrtc.Compiler) -> dict[str, float]:
    """Fractions of a copy's bandwidth."""
    module = nvrtc.Module(compiler.compile(SOURCE, cuda_launch.capability(device), Path(__file__).parent))
    copy = kernel_speed.bandwidth(device)
    figures = {"copy_gb_s": copy / 1e9}
    parameters, gradients = (torch.zeros(COUNT, device=device) for _ in range(2))
    first, second = (torch.zeros(COUNT, dtype=torch.uint8, device=device) for _ in range(2))
    ranges, copies = (
        torch.zeros(COUNT // 32, device=device),
        torch.zeros(COUNT, dtype=torch.bfloat16, device=device),
    )
    tensors = [one.data_ptr() for one in (parameters, gradients, first, second, ranges, copies)]
    moved = adamw_speed.CODED_BYTES * COUNT
    for name, (threads, room) in PATTERNS.items():
        dealt = room * cuda_launch.multiprocessors(device)
        for how, blocks in (("dealt", dealt), ("a_block_a_tile", COUNT // (8 * threads))):
            stream = cuda_launch.current_stream(device)

            def run(name: str = name, blocks: int = blocks, stream: int = stream) -> None:
                module.launch(KERNELS[name], "fp32", blocks, [*tensors, COUNT], stream)

            figures[f"{name}_{how}_fraction_of_copy"] = moved / kernel_speed.seconds(run) / copy
    return figures


def main() -> None:
    """Run the benchmark."""
    arguments = common.parser(__doc__ or "").parse_args()
    compiler = nvrtc.find_compiler()
    if not torch.cuda.is_available() or compiler is None:
        raise EnvironmentProblem(
            "Bandwidth is measured on a GPU, by a kernel that NVRTC compiles, and one of them was not found.",
            where="benchmarks/memory_patterns.py",
            do="run it on a machine with a GPU and a CUDA build of torch, which brings NVRTC along",
        )
    common.write(arguments.json, measure(torch.device("cuda", torch.cuda.current_device()), compiler), {})


if __name__ == "__main__":
    main()
