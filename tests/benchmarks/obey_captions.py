"""Do generated heads show what their caption says? Judged by the images themselves, by intensity and place.

    python tests/benchmarks/obey_captions.py                           # about an hour of CPU time, once
    python tests/benchmarks/obey_captions.py --guidance 1 3 5 7        # judged again

Writes 1,024 two-dimensional heads, trains an autoencoder and a denoiser under their captions, and samples
heads for each of the five captions. The latents are small, an eighth of the image along each axis, so that
the many training steps are cheap. Guidance acts at the upper noise levels only, where it is decided whether
there is a lesion, and where. With guidance to the end small lesions grow. Stopped and started again, the
script goes on where it was.

In a phantom only fat, outside the skull, is as bright as a lesion. So a lesion is what is brighter than white
matter inside an ellipse that lies within the skull of every head; its area gives a radius, which `describe`
divides at 15 mm, and its centroid the side. The same judge is tried on phantoms that no network has seen, and
on these after they went through the autoencoder.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

import ldm3d
import train_ldm
import train_vae
from ldm3d.data.phantoms import make_phantom, write_phantoms
from ldm3d.data.transforms import scale
from ldm3d.engine.logger import save_sheet
from ldm3d.evaluation.results import write_report
from ldm3d.pipeline import LatentDiffusionPipeline

VAE = """phantom --data.dims 2 --data.patch 80,80 --batch_size 8 --vae.channels 32,64,96 --run.steps 1500
 --run.eval_every 500"""
LDM = """phantom --condition.use text --batch_size 8 --run.steps 16000 --run.eval_every 2000
 --unet.channels 64,128 --unet.attention_levels true --unet.adaptive_norm"""

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


def train(out: Path, more: dict[str, list[str]]) -> Path:
    """The run folder of the denoiser, trained to its end."""
    heads, vae, ldm = out / "heads", out / "vae", out / "ldm"
    if not heads.exists():
        write_phantoms(heads, 1024, dims=2)
    place = ["--data.root", str(heads), "--run.dir", str(vae)]
    train_vae.main([*VAE.split(), *place, *more["vae"]])
    train_ldm.main([*LDM.split(), "--vae", str(vae), "--run.dir", str(ldm), *more["ldm"]])
    return ldm


@torch.inference_mode()
def try_judge(pipeline: LatentDiffusionPipeline, num: int = 100) -> dict[str, float]:
    """The share of captions that the judge finds right on phantoms of its own, as they are and after they
    went through the autoencoder."""
    right = {"phantoms": 0, "phantoms, by the autoencoder": 0}
    for index in range(10_000, 10_000 + num):
        phantom = make_phantom(index, dims=2)
        low, high = np.percentile(phantom.image, pipeline.layout.percentiles)
        x = torch.from_numpy(scale(phantom.image, (low,), (high,), clip=True))
        seen = pipeline.model.decode(pipeline.model.encode(x[None]))[0]
        right["phantoms"] += judge(torch.from_numpy(phantom.image[0]), phantom.spacing) == phantom.caption
        right["phantoms, by the autoencoder"] += judge(seen[0] + 1, phantom.spacing) == phantom.caption
    return {name: count / num for name, count in right.items()}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/captions"), help="folder of the runs")
    parser.add_argument("--num", type=int, default=20, help="samples of each of the five captions")
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 2.0, 3.0])
    parser.add_argument("--interval", type=float, nargs=2, default=(0.4, 1.0), help="noise levels guided")
    parser.add_argument("--steps", type=int, default=20, help="intervals of the sampling grid")
    parser.add_argument("--vae", default="", help="more flags of train_vae.py, in quotes")
    parser.add_argument("--ldm", default="", help="more flags of train_ldm.py, in quotes")
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0 = its own choice")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    pipeline = ldm3d.load(train(args.out, {"vae": args.vae.split(), "ldm": args.ldm.split()}))
    report: dict[str, object] = dict(try_judge(pipeline))
    for name, share in report.items():
        print(f"the judge on {name}: {share:.0%} of captions right")
    captions = [caption for caption in CAPTIONS for _ in range(args.num)]
    for guidance in args.guidance:
        x = pipeline.sample(
            len(captions),
            steps=args.steps,
            batch_size=20,
            conditions={"text": captions},
            guidance_scale=guidance,
            guidance_interval=tuple(args.interval),
        )
        said = [judge(image[0] + 1, pipeline.spec.spacing) for image in x]
        obeyed = sum(a == b for a, b in zip(said, captions, strict=True))
        print(f"guidance {guidance:g}: {obeyed} of {len(captions)} obey ({obeyed / len(captions):.0%})")
        report[f"guidance {guidance:g}"] = obeyed / len(captions)
        for caption in CAPTIONS:
            mine = [s for s, c in zip(said, captions, strict=True) if c == caption]
            wrong = Counter(s for s in mine if s != caption)
            listed = ", ".join(f"{count} {what}" for what, count in wrong.most_common())
            print(
                f"    {caption:42} {mine.count(caption)} of {len(mine)}"
                + (f"; else {listed}" if wrong else "")
            )
        rows = {
            caption: [x[i, 0].numpy() for i in range(j * args.num, j * args.num + min(6, args.num))]
            for j, caption in enumerate(CAPTIONS)
        }
        save_sheet(args.out / f"guidance-{guidance:g}.png", rows, limits=(-1, 1))
    write_report(args.out / "report.json", report)


if __name__ == "__main__":
    main()
