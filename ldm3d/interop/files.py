"""Files of weights that other programs wrote, read so that nothing in them can run.

`read_weights` opens .pt, .pth and .ckpt files (pickles of PyTorch, weights only) and .safetensors files. A
safetensors file is an 8-byte length, a JSON header that says where each tensor lies, and the raw bytes. The
tensors of a network may lie deeper in a file, beside an epoch or an optimizer, and under prefixes that DDP,
torch.compile or a larger model put in front of their names. All this is taken off.
"""

from __future__ import annotations

import json
import pickle
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import InputError

CONTAINERS = (  # the keys under which files keep the weights, the ones to prefer first
    *("ema", "state_dict", "model_state_dict", "unet_state_dict", "autoencoder_state_dict"),
    *("controlnet_state_dict", "model", "network", "net"),
)
PREFIXES = ("module.", "_orig_mod.", "model.", "network.", "net.", "autoencoder.", "first_stage_model.")
DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8},
    "BOOL": torch.bool,
}
HEADER_LIMIT = 100 * 2**20  # bytes, as in the library safetensors


@dataclass(frozen=True)
class Weights:
    """The tensors of a network as a file holds them, float32, and what stood beside them."""

    tensors: dict[str, Tensor]
    beside: dict[str, Any]  # plain values and single numbers, such as scale_factor or epoch
    dropped: dict[str, int]  # why tensors were left out -> how many


def read_weights(path: str | Path) -> Weights:
    """InputError in one line for a file that is missing, damaged, unsafe or not a file of weights."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: {'not a file' if path.exists() else 'no such file'}")
    with open(path, "rb") as file:
        start = file.read(16)
    if path.suffix == ".safetensors" or start[8:9] == b"{":
        content: Any = read_safetensors(path)
    else:
        content = read_pickle(path)
    tensors, beside = unpack(content, path)
    tensors, dropped = first_stage(tensors)
    tensors = without_prefix(tensors)
    for name, value in tensors.items():
        if value.is_sparse or value.is_quantized or value.is_complex():
            raise InputError(f"{path}: {name} is not a plain tensor of real numbers")
        if value.is_floating_point():
            tensors[name] = value = value.float()
            if not torch.isfinite(value).all():
                raise InputError(f"{path}: {name} holds numbers that are not finite")
    return Weights(tensors, beside, dropped)


def read_pickle(path: Path) -> Any:
    """A file of torch.save, without running anything in it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # torch.load raises many kinds for a damaged file
        if "TorchScript" in str(e):
            script = "a TorchScript archive; save the state_dict of the module instead"
            raise InputError(f"{path}: {script}") from None
        if isinstance(e, pickle.UnpicklingError):
            raise InputError(
                f"{path}: refused: not tensors and plain values alone (it may run code)"
            ) from None
        reason = (str(e).splitlines() or [type(e).__name__])[0].split(". ")[0]
        raise InputError(f"{path}: damaged or not a file of weights ({reason:.100})") from None


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """A .safetensors file; every offset is checked against shape, type and the size of the file."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if not 2 <= size <= min(HEADER_LIMIT, path.stat().st_size - 8):
            raise InputError(f"{path}: damaged (a header of {size} bytes)")
        try:
            header = json.loads(file.read(size))
        except (ValueError, RecursionError):
            raise InputError(f"{path}: damaged (the header is not JSON)") from None
        data = bytearray(file.read())
    if not isinstance(header, dict):
        raise InputError(f"{path}: damaged (the header is not an object)")
    header.pop("__metadata__", None)
    return {name: tensor_at(data, entry, f"{path}: {name}") for name, entry in header.items()}


def tensor_at(data: bytearray, entry: Any, where: str) -> Tensor:
    """The tensor that an entry of a safetensors header, {dtype, shape, data_offsets}, describes."""
    try:
        dtype, shape, (first, last) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
        valid = all(type(n) is int and n >= 0 for n in (*shape, first, last))
    except (KeyError, TypeError, ValueError):
        valid = False
    if not valid or last > len(data) or last - first != int(np.prod(shape, dtype=object)) * dtype.itemsize:
        raise InputError(f"{where}: damaged (the header does not fit the file)")
    if first == last:
        return torch.empty(shape, dtype=dtype)
    return (
        torch.frombuffer(data, dtype=torch.uint8, count=last - first, offset=first)
        .clone()
        .view(dtype)
        .view(shape)
    )


def unpack(content: Any, path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(the tensors by name, other values) of what a file holds: a state_dict, or a dict with one inside."""
    beside: dict[str, Any] = {}
    if isinstance(content, dict) and {"format", "kind"} <= content.keys():
        raise InputError(f"{path}: is a checkpoint of ldm3d; ldm3d.load opens its run folder")
    while isinstance(content, dict):
        tensors = {k: v for k, v in content.items() if isinstance(v, Tensor) and v.ndim > 0}
        inside = [k for k in CONTAINERS if isinstance(content.get(k), dict) and content[k]]
        if tensors and not inside:
            beside |= {k: v for k, v in content.items() if k not in tensors}
            if not all(isinstance(k, str) for k in tensors):
                break
            numbers = {k: v for k, v in beside.items() if "." in str(k) and isinstance(v, Tensor)}
            return tensors | numbers, {k: v for k, v in beside.items() if k not in numbers}
        if not inside:
            break
        beside |= {k: v for k, v in content.items() if not isinstance(v, dict)}
        content = content[inside[0]]
    raise InputError(f"{path}: holds no weights of a network")


def first_stage(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, int]]:
    """The autoencoder alone, where a file holds a whole CompVis model around it: (its tensors, what is left
    out). Discriminators and running averages of an autoencoder are left out too."""
    dropped: dict[str, int] = {}
    whole = any(name.startswith("first_stage_model.") for name in tensors)
    kept = {}
    for name, value in tensors.items():
        out = next((p for p in ("loss.", "model_ema.", "discriminator.") if name.startswith(p)), None)
        if whole and not name.startswith("first_stage_model."):
            out = name.split(".")[0]
        elif whole and name.startswith("first_stage_model.loss."):
            out = "first_stage_model.loss."
        if out is None:
            kept[name] = value
        else:
            dropped[out] = dropped.get(out, 0) + 1
    return kept, dropped


def without_prefix(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without the prefixes that all their names share."""
    while tensors:
        shared = next((p for p in PREFIXES if all(name.startswith(p) for name in tensors)), None)
        if shared is None:
            break
        tensors = {name[len(shared) :]: value for name, value in tensors.items()}
    return tensors


def write_safetensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """The inverse of `read_safetensors`."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header, first = {}, 0
    for name, value in tensors.items():
        size = value.numel() * value.element_size()
        header[name] = {
            "dtype": names[value.dtype],
            "shape": list(value.shape),
            "data_offsets": [first, first + size],
        }
        first += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for value in tensors.values():
            file.write(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
