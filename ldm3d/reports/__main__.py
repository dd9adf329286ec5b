"""Pages and maps that show a run.

python -m ldm3d.reports run RUN              run_report.py: a whole run as one page
python -m ldm3d.reports latents RUN          latent_map.py: a map of the latents of its cases
python -m ldm3d.reports registers RUN        register_analysis.py: what registers have learned
"""

from __future__ import annotations

import sys
from pathlib import Path

from ..config import run_task
from ..engine.distributed import run_script
from .latent_map import LatentsConfig, map_latents
from .register_analysis import RegisterReportConfig, analyse_registers
from .run_report import RunReportConfig, write_run_report


def main(argv: list[str] | None = None) -> None:
    run = {"run": "run folder, such as runs/vae-phantom, or a checkpoint in one"}
    bound = {"run": "run folder of train_ldm.py --anatomy.registers bound, or a checkpoint in one"}
    tasks = {
        "run": (RunReportConfig, run, lambda config, run: write_run_report(config, Path(run))),
        "latents": (LatentsConfig, run, lambda config, run: map_latents(config, Path(run))),
        "registers": (RegisterReportConfig, bound, lambda config, run: analyse_registers(config, Path(run))),
    }
    run_task(tasks, argv, "python -m ldm3d.reports", __doc__)


if __name__ == "__main__":
    sys.exit(run_script(main))
