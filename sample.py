#!/usr/bin/env python3
"""Use a trained run. What the run was trained for decides what is done:

new volumes       python sample.py runs/ldm-hippocampus --num 16 --steps 30
reconstruction    python sample.py runs/vae-hippocampus FILE_OR_FOLDER
segmentation      python sample.py runs/cdal-hippocampus FILE_OR_FOLDER --votes 5 --reference LABELS

The run comes first: its folder, or a checkpoint in it. `python sample.py RUN --help` explains the settings
that this run has, with more examples: conditions, translation, editing, label maps. The autoencoder of a
latent diffusion run is a run of its own: python sample.py runs/ldm-hippocampus/autoencoder.pt FOLDER

Results go to a new folder in the run's folder, or to --out. Nothing is overwritten.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ldm3d.config import InputError, field_types, read_command
from ldm3d.engine.distributed import run_script
from ldm3d.inference.reconstruction import ReconstructConfig, reconstruct_files
from ldm3d.inference.sampling import SampleConfig, sample_files
from ldm3d.inference.segmentation import SegmentConfig, segment_files
from ldm3d.pipeline import kind_of

RUN = {"run": "run folder, such as runs/ldm-phantom, or a checkpoint in one"}
IMAGES = {"images": "image file, or folder of images"}
PROGRAMS: dict[str, tuple[type, dict[str, str], Callable[..., Any]]] = {  # kind -> (settings, words, work)
    "ldm": (SampleConfig, RUN, sample_files),
    "vae": (ReconstructConfig, RUN | IMAGES, reconstruct_files),
    "cdal": (SegmentConfig, RUN | IMAGES, segment_files),
}


def print_help() -> None:
    """What the three programs do, and the names of their settings."""
    print(__doc__)
    for kind, (config, positional, _) in PROGRAMS.items():
        print(f"sample.py {' '.join(positional).upper()}, where RUN is of train_{kind}.py:")
        names = " ".join(f"--{name}" for name in field_types(config))
        print(
            textwrap.fill(names, 110, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False)
        )


def main(argv: list[str] | None = None) -> None:
    words = sys.argv[1:] if argv is None else argv
    if words[:1] in (["-h"], ["--help"]):
        return print_help()
    if not words or words[0].startswith("-"):
        raise InputError(f"which run? give the {RUN['run']}, before all settings")
    config_class, positional, work = PROGRAMS[kind_of(words[0])]
    doc = sys.modules[config_class.__module__].__doc__
    config, paths = read_command(config_class, positional, words, None, doc)
    work(config, *map(Path, paths))


if __name__ == "__main__":
    sys.exit(run_script(main))
