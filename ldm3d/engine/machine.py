"""What this machine has, and what follows for a run: device, precision, torch.compile, ranks, extras.

The words stand in the first lines of a run and in the page of ``python -m ldm3d.engine``.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import multiprocessing
import os
import platform
import shutil
from contextlib import suppress
from pathlib import Path

import torch
import torch.distributed as dist

from .distributed import ranks_here, why_no_cuda, world_size
from .training import amp_dtype

EXTRAS = {  # of setup.py: what else can be installed, and what for
    "viz": ("pictures and TensorBoard", ("matplotlib", "tensorboard")),
    "formats": ("DICOM, NRRD, MHA, compressed TIFF", ("SimpleITK", "imagecodecs")),
    "analysis": ("maps of latents", ("scikit-learn", "umap-learn", "plotly")),
    "onnx": ("decoders as ONNX graphs", ("onnx", "onnxscript")),
}
NEEDED = ("torch", "numpy", "nibabel", "tifffile", "tqdm")
CGROUP = Path("/sys/fs/cgroup")  # the limits of a container
GIB = 2**30
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
MALLOC_SETTINGS = "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "GLIBC_TUNABLES"


def precision_of(amp: str, device: torch.device) -> str:
    """What --run.amp means on this device: "fp32", "bf16" or "fp16"."""
    dtype = amp_dtype(amp, device)
    return {None: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


def describe_device(device: torch.device, amp: str, chosen: bool = False) -> str:
    """The device and the precision of a run, such as "cpu, 2 threads, fp32". chosen: the user named it.

    A CPU that nobody named, on a machine with an NVIDIA device, says why torch does not use that device.
    """
    if device.type == "cuda":
        gib = torch.cuda.get_device_properties(device).total_memory / GIB
        words = f"{device}, {torch.cuda.get_device_name(device)}, {gib:.0f} GiB"
    else:
        num = torch.get_num_threads()
        words = f"cpu, {num} thread{'s' if num > 1 else ''}"
    words += f" on each of {world_size()} ranks" if world_size() > 1 else ""
    words += f", {precision_of(amp, device)}"
    if device.type == "cpu" and not chosen and (why := why_no_cuda()):
        words += f"; NOTE: this machine has an NVIDIA device or driver, but torch cannot use it: {why}"
    return words


def usable_cores() -> float:
    """CPU cores that this process may use: those of its affinity, at most the share of its container."""
    num = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, ValueError):
        quota, period = (CGROUP / "cpu.max").read_text().split()
        return min(num, int(quota) / int(period))
    return num


def cores_of_rank() -> int:
    """Whole CPU cores for this process, which shares the machine with its other ranks."""
    return max(1, int(usable_cores() / ranks_here()))


def memory() -> tuple[int, int] | None:
    """(free, all) bytes of memory that this process may use; None where the system does not tell."""
    found = {}
    with suppress(OSError, ValueError):
        lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
        found = {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines}
    if not {"MemAvailable", "MemTotal"} <= found.keys():
        return None
    free, total = found["MemAvailable"], found["MemTotal"]
    with suppress(OSError, ValueError):
        limit, used = (int((CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        with suppress(OSError):  # what the system keeps of files that were read, it gives back
            lines = (line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
            used -= {words[0]: int(words[1]) for words in lines}.get("inactive_file", 0)
        free, total = min(free, max(0, limit - used)), min(total, limit)
    return free, total


def allocator() -> ctypes.CDLL | None:
    """The C library, where its allocator is glibc's and has no settings of the user (MALLOC_SETTINGS)."""
    if any(name in os.environ for name in MALLOC_SETTINGS):
        return None
    with suppress(OSError, AttributeError):  # macOS, Windows, musl
        libc = ctypes.CDLL("libc.so.6")
        return libc if libc.mallopt and libc.malloc_trim else None
    return None


def keep_freed_memory() -> bool:
    """Let this process keep the memory of tensors that were freed, for the next ones; returns whether it can.

    By default glibc returns memory to the system and asks for it again at the next step, and the system fills
    it with zeros: about a tenth of the time of training small 3-D networks on a CPU. Tensors above 32 MiB are
    still returned, as holes of that size would add to the peak. `free_bytes` returns the others too, before
    it counts.
    """
    libc = allocator()
    if libc is None:
        return False
    return all([libc.mallopt(M_TRIM_THRESHOLD, -1), libc.mallopt(M_MMAP_THRESHOLD, 2**25)])  # -1: never


def free_bytes(device: torch.device) -> float:
    """Memory that this process may still take: of the GPU, or its share of the machine's where torchrun has
    started several processes. Half of what is built in where the system does not tell."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if libc := allocator():
        libc.malloc_trim(0)  # what this process kept of freed tensors is free too
    found = memory()
    free = found[0] if found else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return free / int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def version_of(package: str) -> str | None:
    """The installed version of a package, which is not imported; None if it is missing."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def gpu_lines() -> dict[str, str]:
    """A line for every GPU that torch can use; else one that says why there is none."""
    if not torch.cuda.is_available():
        why = why_no_cuda()
        return {"GPU": f"there is one, but torch cannot use it: {why}" if why else "none that torch can use"}
    lines = {}
    for i in range(torch.cuda.device_count()):
        free, total = (n / GIB for n in torch.cuda.mem_get_info(i))
        lines[f"cuda:{i}"] = f"{torch.cuda.get_device_name(i)}, {free:.1f} of {total:.1f} GiB free"
    return lines


def compile_line(cuda: bool) -> str:
    """Can --run.compile work? torch.compile needs a C++ compiler for the CPU, Triton and a C compiler for a
    GPU."""
    names = [os.environ.get("CC"), "gcc", "clang"] if cuda else [os.environ.get("CXX"), "g++", "clang++"]
    compiler = next((name for name in names if name and shutil.which(name)), None)
    triton = not cuda or importlib.util.find_spec("triton") is not None
    if compiler and triton:
        return f"possible ({compiler}{', triton' if cuda else ''})"
    missing = ["a compiler, such as gcc and g++"] * (not compiler) + ["the package triton"] * (not triton)
    return f"not possible: --run.compile needs {' and '.join(missing)}"


def ranks_line(num_gpus: int) -> str:
    """How several processes can train together here."""
    if not dist.is_available():
        return "one process only: this torch is built without torch.distributed"
    how = ["gloo"] * dist.is_gloo_available() + ["NCCL"] * (dist.is_nccl_available() and num_gpus > 0)
    command = f"; torchrun --nproc_per_node {num_gpus} uses all GPUs" if num_gpus > 1 else ""
    return f"torchrun or srun, over {' and '.join(how) or 'nothing: neither gloo nor NCCL'}{command}"


def extra_line(name: str) -> str:
    """What an extra is for, what of it is found, and how to install the rest."""
    purpose, packages = EXTRAS[name]
    versions = {package: version_of(package) for package in packages}
    found = [f"{package} {version}" for package, version in versions.items() if version]
    missing = [package for package, version in versions.items() if not version]
    parts = [", ".join(found)] * bool(found)
    parts += [f'missing {", ".join(missing)}: pip install "ldm3d[{name}]"'] * bool(missing)
    return f"for {purpose}: {'; '.join(parts)}"


def machine_facts() -> dict[str, dict[str, str]]:
    """The page of ``python -m ldm3d.engine``: heading -> title -> words."""
    cuda, room = torch.cuda.is_available(), memory()
    device = torch.device("cuda" if cuda else "cpu")
    shared = shutil.disk_usage("/dev/shm").free / GIB if os.path.isdir("/dev/shm") else None
    fork = "fork" in multiprocessing.get_all_start_methods()
    workers = (
        "started by fork, volumes in memory are shared" if fork else "no fork here: each has its own copy"
    )
    workers += "" if shared is None else f"; {shared:.1f} GiB of shared memory for their batches"
    return {
        "This machine": {
            "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
            "cores": f"{usable_cores():g} for this process, {torch.get_num_threads()} threads by torch",
            "memory": f"{room[0] / GIB:.1f} of {room[1] / GIB:.1f} GiB free" if room else "unknown",
            "disk": f"{shutil.disk_usage('.').free / GIB:.1f} GiB free here, {Path.cwd()}",
            **gpu_lines(),
        },
        "What follows": {
            "device": f"--run.device auto means {device}",
            "precision": f"--run.amp auto means {precision_of('auto', device)}",
            "compile": compile_line(cuda),
            "ranks": ranks_line(torch.cuda.device_count() if cuda else 0),
            "workers": workers,
        },
        "Packages": {
            "python": platform.python_version(),
            **{name: version_of(name) or "missing" for name in NEEDED},
            "torch's CUDA": torch.version.cuda or "none: built for CPUs",
            **{f"[{name}]": extra_line(name) for name in EXTRAS},
        },
    }
