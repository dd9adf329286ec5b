"""Files to batches.

The way of a voxel:

    volumes      a file -> an array and its affine, and back: one row for each format (`itk`: DICOM, NRRD)
    loading      onto the training grid, with `geometry` (windows, resampling)
    prepared     decoded once, and kept on the disk so that a patch reads little beside itself
    dataset      a window, scaled and augmented by `transforms`
    batching     samples -> batches, in an order that is the same after a restart

What has to be decided before:

    settings     all settings of a data set
    cases        which files belong together, and the split by subject
    slices       slices of volumes as 2-D cases
    inspection   what is in the files, and what is wrong with them
    spec         what a run keeps of all this
    layouts      which files of a folder are images and which are masks
    fingerprint  the facts from which a plan is made
    opening      these steps in one call, for the data of a run
    images       the same for other images
    items        a Dataset in Python in place of files
    phantoms     synthetic heads to try everything with
    download     public data sets by name
"""

from .batching import batches, collate, evaluation_batches
from .cases import Case
from .dataset import VolumeDataset
from .images import open_files, open_images
from .inspection import CaseInfo
from .opening import Data, open_data, open_stored
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
    "open_images",
    "open_stored",
    "read",
    "restore",
    "write",
]
