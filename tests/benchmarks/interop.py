"""How exactly do weights of other libraries give their outputs and gradients in our networks?

    python tests/benchmarks/interop.py

Every configuration of tests/interop/test_import.py, with random weights of the other library's own class. The
table has the largest relative errors of each family.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS.parent), str(TESTS), str(TESTS / "interop")]

import test_import  # noqa: E402


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    rows: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for names, errors in (
            (test_import.AUTOENCODERS, test_import.autoencoder_errors),
            (test_import.CODES, test_import.vqvae_errors),
            (test_import.U_NETS, test_import.unet_errors),
            (test_import.CONTROL_NETS, test_import.controlnet_errors),
            (test_import.DISCRIMINATORS, test_import.discriminator_errors),
        ):
            for name in names:
                found, outputs, gradients = errors(name, Path(folder))
                rows.setdefault(found.family.name, []).append((outputs, gradients))
    print("| family | configurations | outputs | gradients |", "|---|---|---|---|", sep="\n")
    for family, found in rows.items():
        outputs, gradients = (max(values) for values in zip(*found, strict=True))
        print(f"| {family} | {len(found)} | {outputs:.1e} | {gradients:.1e} |")


if __name__ == "__main__":
    main()
