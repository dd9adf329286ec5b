"""Data sets: download public ones.

python -m ldm3d.data list                           names and licences
python -m ldm3d.data download NAME --to FOLDER      download.py: verified and unpacked
"""

from __future__ import annotations

import sys

from ..config import run_task
from ..engine.distributed import run_script
from .download import ARCHIVES, DownloadConfig, ListConfig, download, list_archives


def main(argv: list[str] | None = None) -> None:
    tasks = {
        "download": (DownloadConfig, {"NAME": f"data set, one of {', '.join(ARCHIVES)}"}, download),
        "list": (ListConfig, {}, list_archives),
    }
    run_task(tasks, argv, "python -m ldm3d.data", __doc__)


if __name__ == "__main__":
    sys.exit(run_script(main))
