"""GPU memory and a stream through the NVIDIA driver itself, by ctypes.

The driver is there wherever an engine can run; CUDA's runtime library or a Python package for it need not be, and these
dozen functions have kept their form since CUDA 3.2. TensorRT works in the device's primary context, which is used here.
"""

from __future__ import annotations

import ctypes
import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgevit.errors import RuntimeFailure

DRIVER = "nvcuda.dll" if os.name == "nt" else "libcuda.so.1"
NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: TensorRT warns of the default stream, which waits for all others
MAJOR, MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
NAME_BYTES = 256  # of a GPU's name; the longest known has 60


def open_driver() -> Any:
    """The driver's library, initialised.

    Raises:
        RuntimeFailure: there is none, or it has no GPU.
    """
    try:
        driver = ctypes.CDLL(DRIVER)
    except OSError:
        raise RuntimeFailure(
            f"no NVIDIA driver ({DRIVER} is not there), expected one; install NVIDIA's driver"
        ) from None
    if (code := driver.cuInit(0)) != 0:
        raise RuntimeFailure(f"the NVIDIA driver does not start (CUDA error {code}); does nvidia-smi list a GPU?")
    count = ctypes.c_int(0)
    if driver.cuDeviceGetCount(ctypes.byref(count)) != 0 or count.value == 0:
        raise RuntimeFailure("the NVIDIA driver finds no GPU, expected one; does nvidia-smi list it?")
    return driver


class Device:
    """GPU number `index`: memory by address, copies, one stream. `close` releases it all and may be called twice."""

    def __init__(self, index: int = 0) -> None:
        self._driver = open_driver()
        self._sizes: dict[int, int] = {}
        self._device, self._stream = ctypes.c_int(0), ctypes.c_void_p(None)
        self._open = False
        self._call("cuDeviceGet", ctypes.byref(self._device), index)
        context = ctypes.c_void_p(None)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), self._device)
        self._open = True
        try:
            self._call("cuCtxSetCurrent", context)
            self._call("cuStreamCreate", ctypes.byref(self._stream), NON_BLOCKING)
        except RuntimeFailure:
            self.close()
            raise

    @property
    def stream(self) -> int:
        """The stream as the number that TensorRT takes."""
        return self._stream.value or 0

    @property
    def name(self) -> str:
        """What the driver calls the GPU, and its compute capability: "NVIDIA L4 (sm89)"."""
        text = ctypes.create_string_buffer(NAME_BYTES)
        self._call("cuDeviceGetName", text, NAME_BYTES, self._device)
        values = []
        for attribute in (MAJOR, MINOR):
            value = ctypes.c_int(0)
            self._call("cuDeviceGetAttribute", ctypes.byref(value), attribute, self._device)
            values.append(str(value.value))
        return f"{text.value.decode('utf-8', 'replace')} (sm{''.join(values)})"

    def allocate(self, size: int) -> int:
        """The address of `size` bytes of GPU memory, at least one."""
        address = ctypes.c_uint64(0)
        self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(max(size, 1)))
        self._sizes[address.value] = size
        return address.value

    def free(self, address: int) -> None:
        """Give memory back."""
        del self._sizes[address]
        self._call("cuMemFree_v2", ctypes.c_uint64(address))

    def upload(self, address: int, array: NDArray[Any]) -> None:
        """Enqueue a copy of a contiguous array to the GPU; keep it until `synchronize`."""
        self._fits(address, array)
        source = array.ctypes.data_as(ctypes.c_void_p)
        size = ctypes.c_size_t(array.nbytes)
        self._call("cuMemcpyHtoDAsync_v2", ctypes.c_uint64(address), source, size, self._stream)

    def download(self, address: int, array: NDArray[Any]) -> None:
        """Enqueue a copy from the GPU into a contiguous array; it is there after `synchronize`."""
        self._fits(address, array)
        target = array.ctypes.data_as(ctypes.c_void_p)
        size = ctypes.c_size_t(array.nbytes)
        self._call("cuMemcpyDtoHAsync_v2", target, ctypes.c_uint64(address), size, self._stream)

    def synchronize(self) -> None:
        """Wait for everything that was enqueued."""
        self._call("cuStreamSynchronize", self._stream)

    def close(self) -> None:
        """Free all memory, the stream and the context."""
        if not self._open:
            return
        self._open = False
        for address in list(self._sizes):
            self._driver.cuMemFree_v2(ctypes.c_uint64(address))
        self._sizes.clear()
        if self._stream.value:
            self._driver.cuStreamDestroy_v2(self._stream)
        self._driver.cuDevicePrimaryCtxRelease_v2(self._device)

    def _fits(self, address: int, array: NDArray[Any]) -> None:
        if array.nbytes > self._sizes.get(address, 0) or not array.flags["C_CONTIGUOUS"]:
            raise RuntimeFailure(
                f"GPU memory: {array.nbytes} bytes for a buffer of {self._sizes.get(address, 0)}; "
                "please report the model"
            )

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._driver, name)(*arguments)
        if code != 0:
            text = ctypes.c_char_p(None)
            self._driver.cuGetErrorString(code, ctypes.byref(text))
            reason = (text.value or b"unknown").decode("utf-8", "replace")
            raise RuntimeFailure(f"the NVIDIA driver: {name} failed: {reason} (CUDA error {code}); see nvidia-smi")


def empty(shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
    """A contiguous array on the host for `Device.download`."""
    return np.empty(shape, np.dtype(dtype))
