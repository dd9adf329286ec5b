"""The latents of cases, kept in the run folder, so that a second map of the same cases takes seconds.

One file per case: its posterior mean and a picture of its middle slices. The name of the folder is a hash of
the encoder's weights and of all settings that change what the encoder sees; the name of the file is a hash of
the path, size and modification time of the image. So whatever changes, nothing outdated is ever read. Several
processes may read and write at once, since a file takes its name only when it is complete.
"""

from __future__ import annotations

import dataclasses
import hashlib
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from ..data import DataConfig, VolumeDataset
from ..engine.checkpoint import write_atomically
from ..engine.distributed import gather, print0, rank, world_size
from ..engine.logger import progress
from ..engine.training import autocast
from ..evaluation.openers import file_stamp
from ..latents import cache_key
from ..vae import Autoencoder
from .pictures import slices_picture

Arrays = dict[str, np.ndarray]

READING = ("dims", "channel", "file_spacing", "spacing", "size", "resize")
SEEN_BY_ENCODER = (*READING, "scaling", "percentiles", "window")  # settings that change what it sees


def from_cache(path: Path, make: Callable[[], Arrays]) -> Arrays:
    """The arrays in an .npz file. If there is no such file, or a damaged one, they are made and written.

    A folder that cannot be written costs time only: the arrays are made again at the next call.
    """
    try:
        with np.load(path) as file:
            return dict(file)
    except (OSError, EOFError, ValueError, zipfile.BadZipFile):
        arrays = make()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda file: np.savez(file, **arrays))
    except OSError as e:
        print0(f"note: encoded cases cannot be kept in {path.parent} ({e.strerror})")
    return arrays


def cache_folder(run: Path, autoencoder: Autoencoder, data: VolumeDataset, amp: str) -> Path:
    """The folder of a run for latents of these weights, of images that are read and scaled as in `data`."""
    settings = DataConfig(**{name: getattr(data.config, name) for name in SEEN_BY_ENCODER})
    spec = dataclasses.replace(data.spec, reference=None)
    base = run if run.is_dir() else run.parent
    return base / "latents" / f"cases-{cache_key(autoencoder, settings, spec, {})}-{amp}"


def file_key(path: Path) -> str:
    """A hash of the path, size and modification time of a file."""
    return hashlib.sha256(repr(file_stamp(path)).encode()).hexdigest()[:24]


@torch.inference_mode()
def encode_cases(
    autoencoder: Autoencoder, data: VolumeDataset, folder: Path, device: torch.device, amp: str
) -> list[Arrays]:
    """Encode every case, on all ranks: {"mean": (C_z, *s) float32, "picture": (h, w) uint8} of each."""

    def encode(index: int) -> Arrays:
        item = data[index, index]
        with autocast(amp, device):
            mean = autoencoder.encode(item["image"][None].to(device)).mean[0]
        picture = slices_picture(item["image"][0].numpy(), tuple(item["spacing"].tolist()), data.spec.display)
        return {"mean": mean.float().cpu().numpy(), "picture": picture}

    own = {}
    for i in progress(range(rank(), len(data), world_size()), "encoding"):
        own[i] = from_cache(folder / f"{file_key(data.cases[i].image)}.npz", lambda i=i: encode(i))
    everything = {i: arrays for part in gather(own) for i, arrays in part.items()}
    return [everything[i] for i in range(len(data))]
