"""Figures of quality: an autoencoder's reconstructions, generated sets, pairs, copies of training cases.

python -m ldm3d.evaluation reconstruct RUN               reconstruction.py: an autoencoder
python -m ldm3d.evaluation samples GENERATED REAL        sets.py: are they distributed like real ones?
python -m ldm3d.evaluation compare GENERATED TARGET      pairs.py: each volume against its own target
python -m ldm3d.evaluation copies GENERATED TRAIN        copies.py: are they copies of training cases?
"""

from __future__ import annotations

import sys
from pathlib import Path

from ..config import run_task
from ..engine.distributed import run_script
from .copies import MemorisationConfig, audit
from .pairs import ComparisonConfig, compare
from .reconstruction import Config as ReconstructionConfig
from .reconstruction import reconstruct
from .sets import FidelityConfig, samples


def main(argv: list[str] | None = None) -> None:
    run = {"RUN": "run folder, such as runs/vae-phantom, or a checkpoint in one"}
    generated = {"GENERATED": "folder of generated volumes, or a pattern in quotes"}
    real = {"REAL": "real volumes: their folder, a pattern in quotes, or a run folder"}
    target = {"TARGET": "folder of the volumes that they should be, or a pattern in quotes"}
    train = {"TRAIN": "training cases: their folder, a pattern in quotes, or the run folder"}
    tasks = {
        "reconstruct": (ReconstructionConfig, run, lambda config, run: reconstruct(config, Path(run))),
        "samples": (FidelityConfig, generated | real, samples),
        "compare": (ComparisonConfig, generated | target, compare),
        "copies": (MemorisationConfig, generated | train, audit),
    }
    run_task(tasks, argv, "python -m ldm3d.evaluation", __doc__)


if __name__ == "__main__":
    sys.exit(run_script(main))
