"""Other libraries' weights, in and out.

python -m ldm3d.interop import FILE --to runs/vae-NAME      importing.py: weights of another library as a run
"""

from __future__ import annotations

import sys

from ..config import run_task
from ..engine.distributed import run_script
from .importing import ImportConfig, import_file


def main(argv: list[str] | None = None) -> None:
    file = {"FILE": "weights of another library: .pt, .pth, .ckpt or .safetensors"}
    tasks = {"import": (ImportConfig, file, import_file)}
    run_task(tasks, argv, "python -m ldm3d.interop", __doc__)


if __name__ == "__main__":
    sys.exit(run_script(main))
