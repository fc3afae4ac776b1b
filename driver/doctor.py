"""What is installed, what this machine can do, and what a backend lacks here."""

from __future__ import annotations

import os
import platform
import re
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

import torch

from ..backends.registry import backend_names, get_backend

REQUIRED = ("torch", "numpy", "onnx", "onnxscript", "onnxruntime", "safetensors")
OPTIONAL = {
    "transformers": "hf", "diffusers": "hf", "triton": "triton", "tensorrt": "tensorrt",
    "optuna": "search", "ray": "search", "accelerate": "train",
}  # fmt: skip
CPU_FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16")


def version() -> str:
    """Return the version of blockwright."""
    return _installed("blockwright") or "0+unknown"


def examine() -> dict[str, Any]:
    """Return what `blockwright doctor` shows; never fails."""
    return {
        "versions": {
            "blockwright": version(),
            "python": platform.python_version(),
            **{name: _installed(name) for name in REQUIRED},
        },
        "machine": {
            "system": platform.platform(),
            "cpu": cpu_name(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "cpu_features": cpu_features(),
            "cores": _cores(),
            "torch_threads": torch.get_num_threads(),
            "gpus": _gpus(),
        },
        "backends": {name: _missing(name) for name in backend_names()},
        "optional": {
            name: {"version": _installed(name), "install": f'pip install "blockwright[{extra}]"'}
            for name, extra in OPTIONAL.items()
        },
    }


def cpu_features(cpuinfo: Path = Path("/proc/cpuinfo")) -> list[str]:
    """Return the vector extensions of this CPU that kernels care about."""
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", _read(cpuinfo), re.MULTILINE)
    return [name for name in CPU_FEATURES if flags and name in flags[1].split()]


def _missing(backend: str) -> str | None:
    """Return what a backend lacks; None when it works."""
    try:
        return get_backend(backend).missing()
    except Exception as error:  # a broken installation is what doctor is asked about
        return f"{type(error).__name__}: {error}"


def _gpus() -> list[str]:
    try:
        return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    except Exception as error:  # as above
        return [f"not usable: {error}"]


def _installed(package: str) -> str | None:
    try:
        return installed_version(package)
    except PackageNotFoundError:
        return None


def _cores() -> int:
    """Count the cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_name() -> str:
    """Return what the processor calls itself."""
    name = re.search(r"^model name\s*:\s*(.+)$", _read(Path("/proc/cpuinfo")), re.MULTILINE)
    return name[1] if name else platform.processor() or platform.machine()


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
