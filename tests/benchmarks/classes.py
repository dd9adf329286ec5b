"""Does a network that has seen real shapes only recognise the class that generated ones were asked for?

    python tests/benchmarks/classes.py          # $LDM3D_DATA/adrenal, 3-D shapes of two classes

Trains the presets "adrenal" of train_vae.py and train_ldm.py, and three small 3-D classifiers, whose logits
are added up, on the real training shapes (each class with the same weight, no choice by held-out cases).
Every row of the table is an AUC: the chance that a shape of class 1 gets a higher logit than one of class 0,
with a 95 % interval (bootstrap; the classifiers are fixed): real cases are drawn again within each class,
generated ones by their noise, from which there is a shape of either class. Two shapes from one noise are
never compared: only the class differs between them, so they are in order more often than new shapes are.

held-out cases           their classes; of validation and test, which no network was trained on
... by the autoencoder   the same, encoded and decoded: what the autoencoder takes away
guidance 0, 1, 2 ...     generated; the class that was asked for. 0 ignores it: 0.5 by construction. 1 is not
                         guided.

What is done is not done again: stopped and started,
this script goes on.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import ldm3d  # noqa: E402
import train_ldm  # noqa: E402
import train_vae  # noqa: E402
from ldm3d.data import AugmentConfig, Data, batches, open_stored  # noqa: E402
from ldm3d.engine.checkpoint import load_run  # noqa: E402
from ldm3d.engine.logger import progress, save_sheet  # noqa: E402
from ldm3d.engine.training import OptimConfig, RunConfig, Stepper, reseed  # noqa: E402
from ldm3d.evaluation.results import table, with_interval, write_report  # noqa: E402
from ldm3d.evaluation.statistics import auc, auc_interval  # noqa: E402
from ldm3d.guidance import Guidance  # noqa: E402
from ldm3d.latent_diffusion import LatentDiffusion  # noqa: E402

# --- the judge ----------------------------------------------------------------------------------------------


class Classifier(nn.Module):
    """x (B, 1, D, H, W) -> logit (B,) of class 1. Halved first: it shall see shapes, not how their edges were
    drawn."""

    def __init__(self, width: int = 16):
        super().__init__()
        layers, channels = [nn.AvgPool3d(2)], 1
        for wider in (width, 2 * width, 4 * width):
            layers += [nn.Conv3d(channels, wider, 3, padding=1), nn.GroupNorm(4, wider), nn.SiLU()]
            layers += [nn.AvgPool3d(2)]
            channels = wider
        self.layers, self.head = nn.Sequential(*layers), nn.Linear(channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x).flatten(2).amax(2))[:, 0]


def learn(data: Data, steps: int, seed: int) -> Classifier:
    """A classifier of the training cases, flipped and moved at random."""
    dataset = data.dataset("train", augment=True)
    classes = [case.class_idx for case in dataset.cases]
    weight = torch.tensor([len(classes) / (2 * classes.count(k)) for k in (0, 1)])
    reseed(seed, 0)
    net = Classifier()
    optim = OptimConfig(2e-3, weight_decay=1e-2, warmup_steps=20, schedule="cosine")
    stepper = Stepper(net, optim, RunConfig(steps=steps), 8, torch.device("cpu"))
    for step, group in progress(enumerate(batches(dataset, 8, 8, seed, 0, steps)), "classifier", steps):
        (batch,) = group
        loss = F.binary_cross_entropy_with_logits(
            net(batch["image"]), batch["class"].float(), weight[batch["class"]]
        )
        stepper.backward(loss)
        stepper.step(step)
    return net.eval()


def judges(data: Data, steps: int, path: Path) -> list[Classifier]:
    """Three of them, trained once."""
    if not path.exists():
        nets = [learn(data, steps, seed) for seed in range(3)]
        torch.save([net.state_dict() for net in nets], path)
    nets = [Classifier() for _ in range(3)]
    for net, weights in zip(nets, torch.load(path, weights_only=True), strict=True):
        net.load_state_dict(weights)
        net.eval()
    return nets


@torch.inference_mode()
def logits(nets: list[Classifier], x: Tensor) -> np.ndarray:
    """(N,) of volumes (N, 1, D, H, W)."""
    return torch.cat([sum(net(part.float()) for net in nets) for part in x.split(8)]).double().numpy()


def auc_row(scores: list[np.ndarray], paired: bool, resamples: int = 2000) -> dict[str, float]:
    """The AUC of the scores of class 0 and 1, and its interval; paired: from one
    noise, drawn again together and never compared."""
    low, high = auc_interval(*scores, resamples, paired)
    counts = {f"class {label}": len(s) for label, s in enumerate(scores)}
    return {"auc": auc(*scores, paired), "low": low, "high": high, **counts}


# --- shapes -------------------------------------------------------------------------------------------------


def held_out(data: Data) -> list[Tensor]:
    """(N, 1, D, H, W) of validation and test cases, for each class."""
    items = [d[i, i] for d in (data.dataset("val"), data.dataset("test")) for i in range(len(d))]
    return [torch.stack([item["image"] for item in items if item["class"] == k]) for k in (0, 1)]


@torch.inference_mode()
def through(model: LatentDiffusion, x: Tensor) -> Tensor:
    """Encoded and decoded."""
    return torch.cat([model.decode(model.encode(one)) for one in x.split(1)])


def generate(run: Path, num: int, scale: float, steps: int, out: Path) -> list[Tensor]:
    """(num, 1, D, H, W) float16 of each class, from the same noise; made once and kept in `out`."""
    path = out / f"guidance-{scale:g}-{num}-{steps}.npy"
    if not path.exists() or path.stat().st_mtime < (run / "best.pt").stat().st_mtime:
        model, made = ldm3d.load(run).model, []
        for label in (0, 1):
            cond = model.prepare({"class": label}, num)
            stream = model.stream(range(num), steps, batch_size=8, conditions=cond, guidance=Guidance(scale))
            made += [x for x, _ in progress(stream, f"guidance {scale:g}, class {label}", -(-num // 8))]
        partial = path.with_suffix(".partial.npy")
        np.save(partial, torch.cat(made).half().numpy())
        partial.rename(path)
    return list(torch.from_numpy(np.load(path)).split(num))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/classes"), help="folder of the runs")
    parser.add_argument("--num", type=int, default=32, help="samples of each class, in every row")
    parser.add_argument("--guidance", type=float, nargs="+", default=[0.0, 1.0, 2.0, 4.0])
    parser.add_argument("--steps", type=int, default=15, help="intervals of the sampling grid")
    parser.add_argument("--classifier_steps", type=int, default=400)
    parser.add_argument("--vae", default="", help="more flags of train_vae.py, in quotes")
    parser.add_argument("--ldm", default="", help="more flags of train_ldm.py, in quotes")
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0 = its own choice")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    vae, ldm, out = args.out / "vae", args.out / "ldm", args.out / "report"
    train_vae.main(["adrenal", "--run.dir", str(vae), *args.vae.split()])
    train_ldm.main(["adrenal", "--vae", str(vae), "--run.dir", str(ldm), *args.ldm.split()])
    out.mkdir(exist_ok=True)

    content = load_run(vae, "vae")
    augment = AugmentConfig(flip_axes=(0,), affine=0.7, max_scale=0.05)
    data = open_stored(content, patch=None, augment=augment)
    nets = judges(data, args.classifier_steps, out / f"classifiers-{args.classifier_steps}.pt")
    model = ldm3d.load(ldm).model
    real = held_out(data)
    seen = [through(model, x) for x in real]
    rows = {
        "held-out cases": auc_row([logits(nets, x) for x in real], paired=False),
        "held-out cases, by the autoencoder": auc_row([logits(nets, x) for x in seen], paired=False),
    }
    sheet = {f"real, class {k}": [v[0].numpy() for v in x[:4]] for k, x in enumerate(real)}
    for scale in args.guidance:
        made = generate(ldm, args.num, scale, args.steps, out)
        rows[f"guidance {scale:g}"] = auc_row([logits(nets, x) for x in made], paired=True)
        for k, x in enumerate(made):
            sheet[f"guidance {scale:g}, class {k}"] = [v[0].float().numpy() for v in x[:4]]
    save_sheet(out / "sheet.png", sheet, limits=(-1, 1))
    write_report(out / "report.json", rows)
    lines = [("shapes", "AUC (95 %)", "of class 0", "of class 1")]
    for name, row in rows.items():
        lines.append(
            (name, with_interval(row["auc"], row["low"], row["high"]), row["class 0"], row["class 1"])
        )
    text = table(lines, markdown=True)
    (out / "report.md").write_text(text + "\n")
    print(f"\n{text}\n\n{out}")


if __name__ == "__main__":
    main()
