"""What quality.py measures of a pipeline: its reconstructions of test cases, and its samples.

Every set of volumes is a folder of files, written and read like the files of a run. So all sets, of any
pipeline, are scaled by one rule, and anyone can look at them or compare them by `python -m ldm3d.evaluation`.

psnr, ssim       of reconstructions, on the whole grid of a sample, intensities in [-1, 1]
dice             of the segmenter's labels of reconstructions, mean over labels and cases with a mask
frechet, kernel  in the library's fixed features (FidelityNet, its units measured on the training cases)
spectrum         root mean square difference of the logarithms (base 10) of the power spectra
gap              mean of this difference over the upper half of the frequencies: -1 is a tenth of the power
volumes          Wasserstein distance of the volumes of structures, divided by the real mean volume; mean over
                 labels. Structures are found by a segmenter that was trained on real cases
components       share of structures that are one connected component
ms_ssim          of pairs within the set: low is varied
recall           share of real cases within reach of a sample
copies, z        share of samples that are copies of training cases (evaluation/copies.py, by images, without
                 flips and turns); z < -3: samples lie nearer to training cases than test cases do

frechet, kernel and spectrum compare equal numbers of cases in three rows: half of the test cases with the
other half ("real"), after the autoencoder with the other half ("recon"), samples with as many ("samples").
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from budgets import once
from torch import Tensor

from ldm3d.config import to_dict
from ldm3d.data import Data, VolumeDataset, open_images, write
from ldm3d.evaluation.copies import CopiesConfig, ImageSearch, limit_of, nearness, rank_z
from ldm3d.evaluation.networks import whole_fidelity
from ldm3d.evaluation.openers import volumes_of
from ldm3d.evaluation.sets import BINS, Measured, SetsConfig, real_halves
from ldm3d.evaluation.statistics import wasserstein_distance
from ldm3d.evaluation.validity import label_shapes
from ldm3d.metrics import dice, ms_ssim, power_spectrum, psnr, ssim
from ldm3d.pipeline import SegmentationPipeline

CPU = torch.device("cpu")
SETS = SetsConfig()
WIDTH = 2 / BINS  # of a bin: scaled intensities lie within [-1, 1]
EQUAL = {"frechet": "whole/frechet", "kernel": "whole/kernel", "spectrum": "spectrum_db"}
DECIBEL = 0.1  # in powers of ten
Scores = dict[str, float]


def write_set(folder: Path, volumes: Iterable[Tensor], data: Data) -> None:
    """Write volumes (C, *S), scaled intensities, as files of a run."""
    for i, x in enumerate(volumes):
        write(folder / f"volume_{i:04d}.nii.gz", data.spec.as_file(data.spec.to_volume(x)))


def read_set(folder: Path, data: Data) -> VolumeDataset:
    """The images of a folder, read and scaled as training cases are, on the grid of samples."""
    content = {"config": {"data": to_dict(data.config)}, "state": {"data": data.spec.to_dict()}}
    return open_images(content, folder, own_size=False)


def similarity_of_pairs(volumes: list[Tensor]) -> float:
    """Mean MS-SSIM of each volume of the first half with one of the second half."""
    half = len(volumes) // 2
    pairs = zip(volumes[:half], volumes[half:], strict=False)
    return float(np.mean([ms_ssim(x[None], y[None], 2.0).item() for x, y in pairs]))


def high_frequency_gap(spectra: Tensor, real: Tensor) -> float:
    """See `gap` of the module's text. spectra, real: (N, C, bins) in dB."""
    difference = (spectra.mean(0) - real.mean(0))[:, spectra.shape[-1] // 2 :]
    return DECIBEL * difference.mean().item()


class Judge:
    """Scores sets of volumes of one data set. segmenter: a run of train_cdal.py on its training cases.

    folder: where the features' units and what is measured of real cases is kept.
    """

    def __init__(self, data: Data, segmenter: Path, folder: Path):
        self.data, self.folder = data, folder
        self.segmenter = SegmentationPipeline(segmenter)
        self.train, self.test = data.dataset("train"), data.dataset("test")
        self.features = whole_fidelity(self.train, str(folder), CPU)
        self.shells = max(2, min(32, min(data.spec.size) // 2))

    # --- what is measured of one set -----------------------------------------------------------------------

    def measure(self, volumes: Iterable[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """(features (N, F), histograms (N, C, BINS), spectra (N, C, shells)) of volumes (C, *S)."""
        features, histograms, spectra = [], [], []
        for x in volumes:
            counts = torch.stack([torch.histc(c.clamp(-1, 1), BINS, -1, 1) for c in x.flatten(1)])
            features.append(self.features(x[None])[0])
            histograms.append(counts.double() / counts.sum(1, keepdim=True))
            spectra.append(power_spectrum(x, self.shells))
        return torch.stack(features), torch.stack(histograms), torch.stack(spectra)

    def segment(self, x: Tensor) -> Tensor:
        """The label map (*S) of an image (C, *S)."""
        return self.segmenter.segment(x, votes=1).argmax(0)

    def shapes(self, label_maps: Iterable[Tensor]) -> np.ndarray:
        masks = (labels.numpy() for labels in label_maps)
        return label_shapes(masks, self.data.spec.spacing, self.data.spec.num_labels)

    def structures(self, label_maps: Iterable[Tensor]) -> Scores:
        """Volumes and components, compared with what the segmenter finds in training cases."""
        found, real = self.shapes(label_maps)[..., :2], self.real_shapes
        distances = [
            wasserstein_distance(found[:, label, 0], real[:, label, 0]) / max(real[:, label, 0].mean(), 1e-9)
            for label in range(real.shape[1])
        ]
        return {
            "volumes": float(np.mean(distances)),
            "components": float((found[..., 1] == 1).mean()),
        }

    def dice(self, label_maps: list[Tensor]) -> float:
        """Of label maps of the test cases, by their masks."""
        masks, num = (self.test[i, i]["mask"] for i in range(len(self.test))), self.data.spec.num_labels
        rows = [dice(a[None], b[None], num)[0] for a, b in zip(label_maps, masks, strict=True)]
        return torch.stack(rows).nanmean().item()

    # --- what is measured of real cases, once --------------------------------------------------------------

    @cached_property
    def real_shapes(self) -> np.ndarray:
        def make() -> list:
            return self.shapes(self.segment(x) for x in volumes_of(self.train)).tolist()

        return np.array(once(self.folder / "shapes.json", make))

    @cached_property
    def search(self) -> ImageSearch:
        shift = CopiesConfig().max_shift
        return ImageSearch(volumes_of(self.train), self.data.spec.size, shift, CPU)

    def ratios(self, volumes: Iterable[Tensor]) -> list[float]:
        """How much nearer to the nearest training case than to others each volume lies (copies.py)."""
        return [nearness(1 - self.search.correlations(x, [()])[0])[0] for x in volumes]

    @cached_property
    def test_ratios(self) -> np.ndarray:
        return np.array(once(self.folder / "ratios.json", lambda: self.ratios(volumes_of(self.test))))

    @cached_property
    def measured_test(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.measure(volumes_of(self.test))

    # --- scores --------------------------------------------------------------------------------------------

    def real(self) -> Scores:
        """How the test cases score that need no pipeline: the floor of every column."""
        volumes = list(volumes_of(self.test))
        label_maps, spectra = [self.segment(x) for x in volumes], self.measured_test[2]
        return {
            "dice": self.dice(label_maps),
            **self.structures(label_maps),
            "gap": high_frequency_gap(spectra[::2], spectra[1::2]),
            "ms_ssim": similarity_of_pairs(volumes),
        }

    def reconstructions(self, recon: Iterable[Tensor]) -> tuple[Scores, list[Tensor]]:
        """(psnr and ssim of reconstructions (C, *S) of the test cases, all reconstructions)."""
        found = list(recon)
        pairs = [(r[None], x[None]) for r, x in zip(found, volumes_of(self.test), strict=True)]
        scores = {"psnr": psnr, "ssim": ssim}
        return {
            name: float(np.mean([score(r, x, data_range=2.0).item() for r, x in pairs]))
            for name, score in scores.items()
        }, found

    def score(self, samples: Path, recon: Path) -> dict[str, Scores]:
        """{"real", "recon", "samples": scores} of a folder of samples and one of reconstructions."""
        sets = {"samples": list(volumes_of(read_set(samples, self.data)))}
        sets["recon"] = list(volumes_of(read_set(recon, self.data)))
        parts = [self.measure(sets["samples"]), self.measured_test, self.measure(sets["recon"])]
        features, histograms, spectra = (torch.cat(part) for part in zip(*parts, strict=True))
        num, num_test = len(sets["samples"]), len(self.test)
        measured = Measured(features, [], histograms, spectra, num_test)
        subjects = [case.subject for case in self.test.cases]
        columns, _ = real_halves(measured, subjects, WIDTH, SETS)
        rows = {"real": "real_halves", "recon": "through_autoencoder", "samples": "equal_size"}
        found: dict[str, Any] = {
            row: {name: columns[column].get(key, float("nan")) for name, key in EQUAL.items()}
            for row, column in rows.items()
        }
        for row, ours in zip(("samples", "recon"), (parts[0], parts[2]), strict=True):
            label_maps = [self.segment(x) for x in sets[row]]
            found[row] |= self.structures(label_maps)
            found[row]["gap"] = high_frequency_gap(ours[2], parts[1][2])
            found[row] |= {"dice": self.dice(label_maps)} if row == "recon" else {}
        for row in rows:
            found[row]["spectrum"] *= DECIBEL
        everything = measured.figures(
            torch.arange(num), torch.arange(num, num + num_test), WIDTH, SETS.neighbours
        )
        ratios = np.array(self.ratios(sets["samples"]))
        found["samples"] |= {
            "ms_ssim": similarity_of_pairs(sets["samples"]),
            "recall": everything["whole/recall"],
            "copies": float((ratios < limit_of(self.test_ratios)).mean()),
            "z": rank_z(ratios, self.test_ratios),
        }
        return found
