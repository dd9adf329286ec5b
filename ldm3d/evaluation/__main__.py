"""Figures of quality: reconstructions, generated sets, pairs, copies; segmentations beside several raters;
two results on the same cases; anomalies, likelihood, edits; what synthetic pairs teach.

python -m ldm3d.evaluation reconstruct RUN               reconstruction.py: how good is an autoencoder?
python -m ldm3d.evaluation samples GENERATED REAL        sets.py: are samples distributed like real cases?
python -m ldm3d.evaluation compare GENERATED TARGET      pairs.py: how near is each image to its target?
python -m ldm3d.evaluation copies GENERATED TRAIN        copies.py: are samples copies of training cases?
python -m ldm3d.evaluation raters VOTES MASKS            raters.py: do segmentations differ as raters do?
python -m ldm3d.evaluation anomalies RUN FOLDER          anomalies.py: where is an image not healthy?
python -m ldm3d.evaluation likelihood RUN                likelihood.py: how likely are images?
python -m ldm3d.evaluation difference FIRST SECOND       differences.py: is the second result really better?
python -m ldm3d.evaluation edits EDITED                  edits.py: are edits seamless and in their place?
python -m ldm3d.evaluation teach RUN                     teaching.py: do synthetic pairs teach a segmenter?
"""

from __future__ import annotations

import sys
from pathlib import Path

from ..config import run_task
from ..engine.distributed import refuse_ranks, run_script
from .anomalies import AnomaliesConfig, find_anomalies
from .copies import CopiesConfig, find_copies
from .differences import DifferenceConfig, compare_results
from .edits import EditsConfig, measure_edits
from .likelihood import LikelihoodConfig, likelihood
from .pairs import PairsConfig, compare_pairs
from .raters import RatersConfig, compare_raters
from .reconstruction import ReconstructionConfig, reconstruct
from .sets import SetsConfig, compare_sets
from .teaching import TeachConfig, teach

SHARED = ("reconstruct", "likelihood")  # tasks whose cases are shared by the ranks of torchrun


def main(argv: list[str] | None = None) -> None:
    run = {"RUN": "run folder, such as runs/vae-phantom, or a checkpoint in one"}
    generated = {"GENERATED": "folder of generated volumes, or a pattern in quotes"}
    real = {"REAL": "real volumes: their folder, a pattern in quotes, or a run folder"}
    target = {"TARGET": "folder of the volumes that they should be, or a pattern in quotes"}
    train = {"TRAIN": "training cases: their folder, a pattern in quotes, or the run folder"}
    several = {
        "VOTES": "folder of segmentations ID__NAME, or a pattern with {id} and {rater} in quotes",
        "MASKS": "folder of the raters' masks ID__NAME, or a pattern with {id} and {rater} in quotes",
    }
    images = {"FOLDER": "folder of images to search for anomalies, or a pattern in quotes"}
    both = {"FIRST": "folder of results with a cases.csv", "SECOND": "another, of the same cases"}
    edited = {"EDITED": "folder that sample.py --inpaint or --edit has written"}
    tasks = {
        "reconstruct": (ReconstructionConfig, run, lambda config, run: reconstruct(config, Path(run))),
        "samples": (SetsConfig, generated | real, compare_sets),
        "compare": (PairsConfig, generated | target, compare_pairs),
        "copies": (CopiesConfig, generated | train, find_copies),
        "raters": (RatersConfig, several, compare_raters),
        "anomalies": (AnomaliesConfig, run | images, find_anomalies),
        "likelihood": (LikelihoodConfig, run, lambda config, run: likelihood(config, Path(run))),
        "difference": (DifferenceConfig, both, compare_results),
        "edits": (EditsConfig, edited, measure_edits),
        "teach": (TeachConfig, {"RUN": "run folder of train_ldm.py, with masks"}, teach),
    }
    words = sys.argv[1:] if argv is None else argv
    if words and words[0] in tasks.keys() - SHARED:
        refuse_ranks(words[0])
    run_task(tasks, argv, "python -m ldm3d.evaluation", __doc__)


if __name__ == "__main__":
    sys.exit(run_script(main))
