"""Other libraries' weights, in and out.

python -m ldm3d.interop import FILE --to runs/vae-NAME      importing.py: weights of another library as a run
python -m ldm3d.interop export RUN --as monai --to FOLDER   exporting.py: a run as weights of another library
"""

from __future__ import annotations

import sys

from ..config import run_task
from ..engine.distributed import run_script
from .exporting import ExportConfig, export_run
from .importing import ImportConfig, import_file


def main(argv: list[str] | None = None) -> None:
    file = {"FILE": "weights of another library: .pt, .pth, .ckpt or .safetensors"}
    run = {"RUN": "run folder, such as runs/vae-phantom, or a checkpoint in one"}
    tasks = {"import": (ImportConfig, file, import_file), "export": (ExportConfig, run, export_run)}
    run_task(tasks, argv, "python -m ldm3d.interop", __doc__)


if __name__ == "__main__":
    sys.exit(run_script(main))
