"""What this machine has, in the words of a run's first lines."""

from __future__ import annotations

import torch

from .distributed import why_no_cuda, world_size
from .training import amp_dtype


def describe_device(device: torch.device, amp: str, chosen: bool = False) -> str:
    """The device and the precision of a run, such as "cpu, 2 threads, fp32". chosen: the user named it.

    A CPU that nobody named, on a machine with an NVIDIA device, says why torch does not use that device.
    """
    dtype = amp_dtype(amp, device)
    precision = "fp32" if dtype is None else {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    if device.type == "cuda":
        gib = torch.cuda.get_device_properties(device).total_memory / 2**30
        words = f"{device}, {torch.cuda.get_device_name(device)}, {gib:.0f} GiB"
    else:
        num = torch.get_num_threads()
        words = f"cpu, {num} thread{'s' if num > 1 else ''}"
    words += f" on each of {world_size()} ranks" if world_size() > 1 else ""
    if device.type == "cpu" and not chosen and (why := why_no_cuda()):
        precision += f"; NOTE: this machine has an NVIDIA device or driver, but torch cannot use it: {why}"
    return f"{words}, {precision}"
