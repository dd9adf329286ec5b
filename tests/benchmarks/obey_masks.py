"""Does a denoiser with the condition `labels` draw what its masks say, and what does it need for that?

    python tests/benchmarks/obey_masks.py

Synthetic heads in 2-D. A denoiser learns how 104 heads look, without masks. From its weights, others learn to
follow masks: of a twentieth or a tenth of the heads or of all, with and without the moments of labels
(`--condition.label_moments`), alone, beside the heads without masks, or as a ControlNet. Each is asked for
the warped masks of 64 new heads, with and without guidance. A judge, a segmentation network that has learned
from 800 further heads, and from these through the autoencoder, labels the samples: `agreement` is the Dice of
its labels and the masks. The ceiling is the same for the real images of the masks, through the autoencoder.

What is done is not done again: stopped and started, this script goes on.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import ldm3d  # noqa: E402
import train_ldm  # noqa: E402
import train_vae  # noqa: E402
from ldm3d.data.phantoms import LABEL_NAMES, make_phantom, write_phantoms  # noqa: E402
from ldm3d.engine.distributed import keyed_generator  # noqa: E402
from ldm3d.engine.logger import progress, save_sheet  # noqa: E402
from ldm3d.engine.training import OptimConfig, RunConfig, Stepper, reseed  # noqa: E402
from ldm3d.evaluation.results import table  # noqa: E402
from ldm3d.evaluation.teaching import Pair, Segmenter, through, warped  # noqa: E402
from ldm3d.pipeline import load_autoencoder  # noqa: E402
from ldm3d.vae import Autoencoder  # noqa: E402

VAE = """phantom --data.dims 2 --data.patch none --data.test_fraction 0.25 --vae.dims 2 --vae.channels 16,32
 --vae.latent_channels 4 --batch_size 8 --run.steps 1000 --run.eval_every 150"""
BASE = "phantom --unet.num_groups 8 --unet.head_channels 24 --unet.channels 24,48"
VARIED = "--data.num_variants 8 --data.augment.affine 0.7"
TENTH, TWENTIETH = (f"{VARIED} --data.mask_fraction {fraction}" for fraction in (0.1, 0.05))
LABELS, SHARES = "--condition.use labels", "--condition.use labels --condition.label_moments false"
WAYS = {  # name -> flags
    "tenth-shares": f"{SHARES} {TENTH} --optim.lr 5e-4 --run.steps 400 --run.eval_every 200",
    "tenth-moments": f"{LABELS} {TENTH} --optim.lr 5e-4 --run.steps 400 --run.eval_every 200",
    "twentieth-moments": f"{LABELS} {TWENTIETH} --optim.lr 5e-4 --run.steps 400 --run.eval_every 200",
    "tenth-beside": f"{LABELS} {TENTH} --data.allow_missing_mask true --run.steps 800 --run.eval_every 400",
    "tenth-control": f"--control labels {TENTH} --run.steps 400 --run.eval_every 200",
    "all-shares": f"{SHARES} {VARIED} --run.steps 800 --run.eval_every 400",
    "all-moments": f"{LABELS} {VARIED} --run.steps 800 --run.eval_every 400",
}


NUM_LABELS, SPACING = 5, torch.tensor([4.0, 4.0])


def heads(num: int, seed: int) -> list[Pair]:
    """Further heads, scaled as in training."""
    found = []
    for i in range(num):
        head = make_phantom(i, 2, (56, 48), seed=seed)
        low, high = np.percentile(head.image, (0.5, 99.5))
        image = torch.from_numpy(head.image).sub(low).div(high - low).mul(2).sub(1).clamp(-1, 1).float()
        found.append(Pair(image, torch.from_numpy(head.mask[0]).long()))
    return found


def judge(autoencoder: Autoencoder, path: Path, steps: int) -> Segmenter:
    """A segmentation network that knows heads and what the autoencoder makes of them; trained once."""
    net = Segmenter(2, 1, NUM_LABELS, torch.device("cpu"))
    if not path.exists():
        pairs = heads(800, 78)
        pairs += [Pair(through(autoencoder, image), mask) for image, mask in pairs]
        reseed(0, 0)
        stepper = Stepper(
            net.net, OptimConfig(2e-3, schedule="cosine"), RunConfig(steps=steps), 8, net.device
        )
        for step in progress(range(steps), "judge"):
            picks = torch.randint(len(pairs), (8,), generator=keyed_generator(0, step, "judge"))
            stepper.backward(net.losses([pairs[i] for i in picks]).mean())
            stepper.step(step)
        torch.save(net.net.state_dict(), path)
    net.net.load_state_dict(torch.load(path, weights_only=True))
    net.net.eval()
    return net


def agreement(net: Segmenter, pairs: list[Pair]) -> list[float]:
    """Dice of the judge's labels and the masks, by label."""
    return torch.stack([net.dice(pair) for pair in pairs]).nanmean(0).tolist()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/obey-masks"), help="folder of the runs")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 2.0])
    parser.add_argument("--judge_steps", type=int, default=700)
    parser.add_argument("--num", type=int, default=64, help="masks that are asked for")
    parser.add_argument("--vae", default="", help="more flags of train_vae.py, in quotes")
    parser.add_argument("--ldm", default="", help="more flags of train_ldm.py, in quotes, such as of steps")
    args = parser.parse_args(argv)
    out, root = args.out, ["--data.root", str(args.out / "heads")]
    if not (out / "heads").exists():
        write_phantoms(out / "heads", 160, dims=2, size=(56, 48))
    vae, base = out / "vae-heads", out / "base"
    train_vae.main([*VAE.split(), *root, "--run.dir", str(vae), *args.vae.split()])
    common = [*BASE.split(), *root, "--vae", str(vae)]
    length = ["--run.steps", "1000", "--run.eval_every", "500"]
    train_ldm.main([*common, *length, "--run.dir", str(base), *args.ldm.split()])
    autoencoder, _ = load_autoencoder(vae)
    net, real = judge(autoencoder, out / "judge.pt", args.judge_steps), heads(args.num, 77)
    asked = [warped(p.mask, SPACING, 1.0, keyed_generator(0, i, "pair")) for i, p in enumerate(real)]
    seen = [Pair(through(autoencoder, image), mask) for image, mask in real]
    rows: list[tuple] = [
        ("real images", agreement(net, real)),
        ("through the autoencoder", agreement(net, seen)),
    ]
    for way in args.ways:
        flags = [*WAYS[way].split(), "--run.init", str(base), "--run.dir", str(out / way)]
        train_ldm.main([*common, *flags, *args.ldm.split()])
        model = ldm3d.load(out / way).model
        for scale in args.guidance:
            how = {"steps": 20, "batch_size": 32, "guidance_scale": scale}
            images = model.sample(len(asked), conditions={"labels": asked}, **how)
            rows.append((f"{way}, guidance {scale:g}", agreement(net, list(map(Pair, images, asked)))))
            levels = [mask.numpy() / 2 - 1 for mask in asked[:6]]
            shown = {"asked": levels, "made": [image[0].numpy() for image in images[:6]]}
            save_sheet(out / f"{way}-{scale:g}.png", shown, limits=(-1, 1))
    lines = [("agreement", *LABEL_NAMES[1:]), *((name, *(f"{v:.3f}" for v in row)) for name, row in rows)]
    text = table(lines, markdown=True)
    (out / "report.md").write_text(text + "\n")
    print(f"\n{text}\n\n{out}")


if __name__ == "__main__":
    main()
