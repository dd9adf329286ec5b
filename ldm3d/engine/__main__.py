"""What this machine has, and what follows for a run. The page trains nothing and writes nothing.

python -m ldm3d.engine

What to do when a run goes wrong, symptom by symptom: ldm3d/engine/README.md, "When something goes wrong".
"""

from __future__ import annotations

import sys

from ..config import Parser
from .distributed import run_script
from .machine import machine_facts


def main(argv: list[str] | None = None) -> None:
    Parser(prog="python -m ldm3d.engine", description=__doc__).parse(argv)
    for heading, lines in machine_facts().items():
        print(heading, *(f"  {title:<12} {words}" for title, words in lines.items()), "", sep="\n")


if __name__ == "__main__":
    sys.exit(run_script(main))
