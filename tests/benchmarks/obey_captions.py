"""Do generated heads show what their caption says? Judged by the images themselves, by intensity and place.

    python -c "from ldm3d.phantoms import write_phantoms; write_phantoms('data/phantom-2d', 512, dims=2)"
    python train_vae.py phantom --data.root data/phantom-2d --data.dims 2 --data.patch 80,80 --batch_size 8 \\
        --vae.latent_channels 4 --run.dir runs/vae-phantom-2d
    python train_ldm.py phantom --vae runs/vae-phantom-2d --condition.use text --run.steps 1500 \\
        --run.dir runs/ldm-phantom-2d
    python tests/benchmarks/obey_captions.py runs/ldm-phantom-2d --guidance 1 3

In a phantom only fat, outside the skull, is as bright as a lesion. So a lesion is what is brighter than white
matter inside an ellipse that lies within the skull of every head; its area gives a radius, which `describe`
divides at 15 mm, and its centroid the side. The same judge is tried on phantoms that no network has seen.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

from ldm3d import LatentDiffusion
from ldm3d.phantoms import make_phantom

CAPTIONS = [
    f"a {size} lesion in the {side} hemisphere" for size in ("small", "large") for side in ("left", "right")
]
CAPTIONS.append("no lesion")
INSIDE = (72.0, 57.0)  # half axes in mm (back to front, side to side) of the ellipse within all skulls
SMALLEST, BORDER = 5.0, 15.0  # mm, radii: less is no lesion; from here on it is large


def judge(image: Tensor, spacing: tuple[float, ...]) -> str:
    """The caption of a head (H, W) in any unit whose 0 is air."""
    height, width = image.shape
    row = (torch.arange(height) - (height - 1) / 2)[:, None] * spacing[0]
    column = (torch.arange(width) - (width - 1) / 2)[None] * spacing[1]
    inside = (row / INSIDE[0]) ** 2 + (column / INSIDE[1]) ** 2 < 1
    white = image[inside].quantile(0.7)
    bright = inside & (image > 1.22 * white)
    area = float(bright.sum()) * spacing[0] * spacing[1]
    radius = (area / torch.pi) ** 0.5
    if radius < SMALLEST:
        return "no lesion"
    right = float((column * bright).sum()) > 0  # columns grow to the patient's right
    return (
        f"a {'large' if radius > BORDER else 'small'} lesion in the {'right' if right else 'left'} hemisphere"
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="run folder of train_ldm.py with --condition.use text, on 2-D phantoms")
    parser.add_argument("--num", type=int, default=20, help="samples of each of the five captions")
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 3.0])
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args(argv)
    model = LatentDiffusion.load(args.run)
    real = [make_phantom(10_000 + i, dims=2) for i in range(100)]
    right = sum(judge(torch.from_numpy(p.image[0]), p.spacing) == p.caption for p in real)
    print(f"the judge on {len(real)} phantoms: {right} captions right")
    captions = [caption for caption in CAPTIONS for _ in range(args.num)]
    for scale in args.guidance:
        x = model.sample(
            len(captions), args.steps, conditions={"text": captions}, guidance_scale=scale, batch_size=20
        )
        said = [judge(image[0] + 1, model.state.spacing) for image in x]
        obeyed = sum(a == b for a, b in zip(said, captions, strict=True))
        print(f"guidance {scale:g}: {obeyed} of {len(captions)} obey ({obeyed / len(captions):.0%})")
        for caption in CAPTIONS:
            mine = [s for s, c in zip(said, captions, strict=True) if c == caption]
            wrong = sorted({s for s in mine if s != caption})
            print(
                f"    {caption:42} {mine.count(caption)} of {len(mine)}"
                + (f"; else {wrong}" if wrong else "")
            )


if __name__ == "__main__":
    main()
