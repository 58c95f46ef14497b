"""NVRTC and CUDA's driver: kernels compiled when they are first used, where CUDA's compiler is not installed.

CUDA builds of torch bring NVRTC along, and the driver is there where a GPU is. Both are called through ctypes.
Compiling needs no GPU; launching does.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from megatron_davinci.kernels import sources
from megatron_davinci.kernels.library import C_TYPES, KernelError
from megatron_davinci.kernels.table import Kernel

_NAMES = ("libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so")
_POINTER = ctypes.c_void_p
# Of CUDA's driver: what is asked of a device, and set of a function.
_MOST_SHARED_OF_A_BLOCK, _SHARED_AT_LAUNCH = 97, 8
_OWN_SHARED = 1024  # bytes of what a kernel has beside its slots, and of what CUDA keeps for itself


class Compiler:
    """NVRTC, loaded.

    Args:
        path: Of its library, or a name that the loader finds.

    Raises:
        OSError: It cannot be loaded.
    """

    def __init__(self, path: str) -> None:
        self._library = ctypes.CDLL(path)
        self._library.nvrtcGetErrorString.restype = ctypes.c_char_p
        self.path = path

    def version(self) -> str:
        """Of CUDA."""
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        return f"{major.value}.{minor.value}"

    def targets(self) -> list[int]:
        """Compute capabilities, times 10, that it makes code for."""
        count = ctypes.c_int()
        self._call("nvrtcGetNumSupportedArchs", ctypes.byref(count))
        found = (ctypes.c_int * count.value)()
        self._call("nvrtcGetSupportedArchs", found)
        return sorted(found)

    def compile(self, source: str, capability: int, where: Path | None = None) -> bytes:
        """Machine code of a source file for a device; PTX for one that is newer than NVRTC.

        Args:
            source: The file's name.
            capability: Compute capability, times 10.
            where: The sources' folder; default: the package's.

        Raises:
            KernelError: It does not compile, or the device is older than all that NVRTC knows.
        """
        known = [target for target in self.targets() if target <= capability]
        if not known:
            raise KernelError(
                f"NVRTC {self.version()} makes no code for compute capability {capability / 10}"
            )
        machine = known[-1] == capability
        architecture = f"--gpu-architecture={'sm' if machine else 'compute'}_{known[-1]}"
        texts = sources.files(where)
        headers = [name for name in texts if name.endswith(".h")]
        array = ctypes.c_char_p * len(headers)
        program = _POINTER()
        self._call(
            "nvrtcCreateProgram",
            ctypes.byref(program),
            texts[source].encode(),
            source.encode(),
            len(headers),
            array(*(texts[name].encode() for name in headers)),
            array(*(name.encode() for name in headers)),
        )
        try:
            options = [architecture, "--std=c++17"]
            code = self._library.nvrtcCompileProgram(
                program, len(options), (ctypes.c_char_p * len(options))(*(o.encode() for o in options))
            )
            if code:
                said = self._read(program, "nvrtcGetProgramLog").rstrip(b"\0").decode(errors="replace")
                raise KernelError(f"NVRTC does not compile {source} for {architecture}:\n{said}")
            return self._read(program, "nvrtcGetCUBIN" if machine else "nvrtcGetPTX")
        finally:
            self._library.nvrtcDestroyProgram(ctypes.byref(program))

    def _read(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        self._call(f"{what}Size", program, ctypes.byref(size))
        text = ctypes.create_string_buffer(size.value)
        self._call(what, program, text)
        return text.raw

    def _call(self, name: str, *arguments: object) -> None:
        code = getattr(self._library, name)(*arguments)
        if code:
            raise KernelError(f"{name}: {self._library.nvrtcGetErrorString(code).decode()}")


@lru_cache(maxsize=1)
def find_compiler() -> Compiler | None:
    """NVRTC from the packages that CUDA builds of torch depend on, or from the system; None where there is none."""
    packaged = (
        path
        for entry in sys.path
        if entry
        for path in sorted(Path(entry).glob("nvidia/*/lib/libnvrtc.so.*"), reverse=True)
    )
    for path in (*map(str, packaged), *_NAMES):
        try:
            return Compiler(path)
        except OSError:
            continue
    return None


class Module:
    """Kernels of one source file on one device. Its context must be current whenever this is called.

    Args:
        code: What `Compiler.compile` returned.

    Raises:
        KernelError: The driver does not take it.
        OSError: There is no driver.
    """

    def __init__(self, code: bytes) -> None:
        self._driver = ctypes.CDLL("libcuda.so.1")
        self._module = _POINTER()
        self._functions: dict[str, tuple[ctypes.c_void_p, int]] = {}
        self._call("cuModuleLoadData", ctypes.byref(self._module), code)

    def launch(
        self, kernel: Kernel, suffix: str, blocks: int, arguments: Sequence[int | float], stream: int
    ) -> None:
        """Start a kernel.

        Raises:
            KernelError: The driver refuses it.
        """
        symbol = f"{kernel.name}_{suffix}"
        if symbol not in self._functions:
            self._functions[symbol] = self._function(kernel, symbol)
        function, shared = self._functions[symbol]
        values = [C_TYPES[letter](value) for letter, value in zip(kernel.arguments, arguments, strict=True)]
        addresses = (_POINTER * len(values))(*(ctypes.addressof(value) for value in values))
        grid, block = (blocks, 1, 1), (kernel.threads, 1, 1)
        self._call("cuLaunchKernel", function, *grid, *block, shared, _POINTER(stream), addresses, None)

    def _function(self, kernel: Kernel, symbol: str) -> tuple[ctypes.c_void_p, int]:
        """A kernel, and bytes of shared memory for its slots, as `room_for` of `portable.h` has them."""
        function = _POINTER()
        self._call("cuModuleGetFunction", ctypes.byref(function), self._module, symbol.encode())
        if not kernel.slots:
            return function, 0
        device, most = ctypes.c_int(), ctypes.c_int()
        self._call("cuCtxGetDevice", ctypes.byref(device))
        self._call("cuDeviceGetAttribute", ctypes.byref(most), _MOST_SHARED_OF_A_BLOCK, device)
        a_slot = 16 * kernel.threads
        shared = min(kernel.slots, (most.value - _OWN_SHARED) // a_slot) * a_slot
        self._call("cuFuncSetAttribute", function, _SHARED_AT_LAUNCH, shared)
        return function, shared

    def _call(self, name: str, *arguments: object) -> None:
        code = getattr(self._driver, name)(*arguments)
        if code:
            text = ctypes.c_char_p()
            self._driver.cuGetErrorString(code, ctypes.byref(text))
            raise KernelError(f"{name}: {(text.value or b'unknown error').decode()} ({code})")
