"""ONNX Runtime sessions, on the execution provider that was requested, or refused."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from serving.errors import BundleError, BundleLoadError, InputError, first_line

ORT_TYPES = {
    "int64": "tensor(int64)",
    "string": "tensor(string)",
    "float32": "tensor(float)",
    "float64": "tensor(double)",
    "bool": "tensor(bool)",
}


def check_options(provider: str, threads: int | None) -> None:
    """Raise InputError for a provider that there is not, and for a number of threads below 1."""
    if provider not in ("auto", "cpu", "cuda"):
        raise InputError(f"provider is {provider!r}; use 'auto', 'cpu' or 'cuda'")
    if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
        raise InputError(f"threads is {threads!r}; use a number from 1, or None for all cores")


def knows_cuda() -> bool:
    """Whether the installed ONNX Runtime was built for CUDA."""
    return "CUDAExecutionProvider" in onnxruntime.get_available_providers()


def open_session(
    model: Path, provider: str, threads: int | None, profile: Path | None = None
) -> onnxruntime.InferenceSession:
    """A session of an ONNX file; arguments as of `serving.Retriever`.

    Raises:
        BundleLoadError: ONNX Runtime cannot load the file.
        BundleError: CUDA was requested and is not in use.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    if threads is not None:
        options.intra_op_num_threads = threads
    # Asking for CUDA without a device would only print the loader's complaints.
    wanted = ["CPUExecutionProvider"]
    if provider != "cpu" and n_cuda_devices() > 0 and knows_cuda():
        if hasattr(onnxruntime, "preload_dlls"):
            onnxruntime.preload_dlls()  # Finds CUDA and cuDNN where pip has put them.
        wanted.insert(0, "CUDAExecutionProvider")
    try:
        # By path and not by bytes: external data is then mapped, not copied.
        session = onnxruntime.InferenceSession(str(model), options, providers=wanted)
    except Exception as error:
        # Memory may be short for now, so this is no verdict on the bundle.
        raise BundleLoadError(
            f"{model}: ONNX Runtime {onnxruntime.__version__} cannot load it ({first_line(error)}); "
            "update it or export again"
        ) from error
    if provider == "cuda" and "CUDAExecutionProvider" not in session.get_providers():
        raise BundleError(
            f"provider 'cuda' is not in use, the session has {session.get_providers()} ({n_cuda_devices()} "
            "CUDA devices visible); "
            "install CUDA and cuDNN for onnxruntime-gpu, or pass provider='cpu'"
        )
    return session


def bound_run(
    session: onnxruntime.InferenceSession, outputs: list[str], feed: Mapping[str, NDArray], device: str
) -> list[NDArray]:
    """A run with inputs copied to the device once; scalars, which sizes are computed from, stay on the CPU."""
    binding = session.io_binding()
    for name, array in feed.items():
        if array.ndim == 0:
            binding.bind_cpu_input(name, array)
        else:
            value = onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), device, 0)
            binding.bind_ortvalue_input(name, value)
    for name in outputs:
        binding.bind_output(name, "cpu")
    session.run_with_iobinding(binding)
    return binding.copy_outputs_to_cpu()


def n_cuda_devices() -> int:
    """Devices the CUDA driver shows; 0 without a driver."""
    for name in ("libcuda.so.1", "nvcuda.dll"):
        try:
            driver = ctypes.CDLL(name)
        except OSError:
            continue
        count = ctypes.c_int(0)
        if driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0:
            return count.value
    return 0
