"""Files to batches: volumes, cases, their check, transforms, and data sets with keyed randomness."""

from .cases import AugmentConfig, Case, DataConfig
from .dataset import Data, DataSpec, VolumeDataset, open_data, open_folder
from .volumes import Volume, read, write

__all__ = [
    "AugmentConfig",
    "Case",
    "Data",
    "DataConfig",
    "DataSpec",
    "Volume",
    "VolumeDataset",
    "open_data",
    "open_folder",
    "read",
    "write",
]
