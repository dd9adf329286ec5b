"""Files to batches.

A voxel's way: `volumes` reads a file, `loading` brings it to the training grid, `dataset` cuts, scales and
augments it with `transforms`, `batching` stacks it. Which files there are says `cases`, what they hold
`inspection`, what a run keeps of them `spec`, and `opening` does all of this for a run.
"""

from .batching import batches, collate, evaluation_batches
from .cases import Case
from .dataset import VolumeDataset
from .images import open_files, open_folder
from .inspection import CaseInfo
from .opening import Data, open_data
from .settings import DataConfig
from .spec import DataSpec, restore
from .transforms import AugmentConfig
from .volumes import Volume, read, write

__all__ = [
    "AugmentConfig",
    "Case",
    "CaseInfo",
    "Data",
    "DataConfig",
    "DataSpec",
    "Volume",
    "VolumeDataset",
    "batches",
    "collate",
    "evaluation_batches",
    "open_data",
    "open_files",
    "open_folder",
    "read",
    "restore",
    "write",
]
