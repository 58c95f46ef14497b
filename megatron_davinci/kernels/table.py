"""What the kernels are called and take: the one place that says so in Python."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Kernel:
    """A kernel of `csrc/kernels`. A launcher takes the number of blocks before, and the stream after, what is here.

    Attributes:
        name: Its name, without the suffix that says the dtype.
        source: The file that it is in.
        threads: Of a block.
        arguments: A letter for each: `p` pointer, `l` 64-bit integer, `f` float.
        suffixes: The dtypes that it is there for: `fp32`, `bf16`.
        slots: Of 16 bytes of shared memory that a thread takes at most. A block that takes any has a multiprocessor
            to itself, and no more of them are started than there are multiprocessors, or `resident` times as many.
        resident: Blocks that a multiprocessor has room for, where no more are started than there is room, since a
            block reads for its next tile while it computes one; 0 for as many as there is work.
    """

    name: str
    source: str
    threads: int
    arguments: str
    suffixes: tuple[str, ...]
    slots: int = 0
    resident: int = 0

    @property
    def symbols(self) -> tuple[str, ...]:
        """Its names in a library."""
        return tuple(f"{self.name}_{suffix}" for suffix in self.suffixes)


_FLOATS = ("fp32", "bf16")
_COLUMN_SUMS = Kernel("column_sums", "column_sums.cu", 512, "ppll", _FLOATS)

OPS: dict[str, tuple[Kernel, ...]] = {
    "adamw": (
        Kernel("adamw", "adamw.cu", 128, "pllfffffffff", ("fp32",)),
        Kernel("adamw_fp8_moments", "adamw.cu", 128, "plpfffffffff", ("fp32",), resident=4),
    ),
    "cross_entropy": (
        Kernel("cross_entropy_statistics", "cross_entropy.cu", 512, "ppppplllll", _FLOATS),
        Kernel("cross_entropy_gradient", "cross_entropy.cu", 512, "ppplllll", _FLOATS),
        Kernel("cross_entropy_whole", "cross_entropy.cu", 1024, "ppppllll", _FLOATS, slots=14),
        Kernel("cross_entropy_scaled", "cross_entropy.cu", 512, "pppplllll", _FLOATS),
        Kernel("cross_entropy_backward", "cross_entropy.cu", 512, "ppppplllll", _FLOATS),
    ),
    "rms_norm": (
        *(
            Kernel(f"rms_norm_{name}_{kind}", "rms_norm.cu", 256, arguments, _FLOATS)
            for kind in ("one", "many", "any")
            for name, arguments in (("forward", "ppppppllf"), ("backward", "ppppppplll"))
        ),
        _COLUMN_SUMS,
    ),
    "document_bounds": (
        Kernel("document_positions", "documents.cu", 512, "ppplll", ("int64",)),
        Kernel("document_bounds", "documents.cu", 512, "ppppll", ("int64",)),
    ),
    "quantize": (
        Kernel("quantize_amax", "quantize.cu", 256, "ppl", _FLOATS),
        Kernel("quantize_tensor", "quantize.cu", 256, "ppppppplll", _FLOATS),
        Kernel("quantize_rows", "quantize.cu", 256, "ppppppplll", _FLOATS),
        Kernel("quantize_tiles", "quantize.cu", 256, "ppppppplll", _FLOATS),
        Kernel("quantize_swiglu_tensor", "quantize.cu", 256, "ppppppplll", _FLOATS),
        Kernel("quantize_swiglu_rows", "quantize.cu", 256, "ppppppplll", _FLOATS),
        Kernel("quantize_norm_tensor", "quantize.cu", 256, "ppppppppplll", _FLOATS),
        Kernel("quantize_norm_rows", "quantize.cu", 256, "ppppppppplll", _FLOATS),
        *(
            Kernel(
                f"quantize_swiglu_gradient_{form}",
                "quantize_gradient.cu",
                256,
                "pppppppll",
                _FLOATS,
                resident=2,
            )
            for form in ("e4m3", "e5m2")
        ),
    ),
    "rope": (
        Kernel("rope", "rope.cu", 256, "ppppppflllllll", _FLOATS),
        Kernel("rope_bias", "rope.cu", 128, "ppppppflllllll", _FLOATS),
        Kernel("rope_sums", "rope.cu", 256, "ppppppflllllll", _FLOATS, slots=20),
        _COLUMN_SUMS,
    ),
    "swiglu": (
        Kernel("swiglu_forward", "swiglu.cu", 256, "ppll", _FLOATS),
        Kernel("swiglu_backward", "swiglu.cu", 256, "ppppll", _FLOATS),
    ),
}
"""The kernels of each op."""

KERNELS: dict[str, Kernel] = {kernel.name: kernel for kernels in OPS.values() for kernel in kernels}
