"""Does a network that has seen real cases only recognise the class that generated ones were asked for?

    python tests/benchmarks/classes.py          # $LDM3D_DATA/adrenal, 3-D shapes of two classes
    python tests/benchmarks/classes.py heads    # 512 synthetic heads in 2-D, without and with a lesion

Trains autoencoder and denoiser by train_vae.py and train_ldm.py, and three small classifiers, whose logits
are added up, on the real training cases (each class with the same weight, no choice by held-out cases).
Every row of the table is an AUC: the chance that a shape of class 1 gets a higher logit than one of class 0,
with a 95 % interval (bootstrap; the classifiers are fixed): real cases are drawn again within each class,
generated ones by their noise, from which there is a shape of either class. Two shapes from one noise are
never compared: only the class differs between them, so they are in order more often than new shapes are.

held-out cases           their classes; of validation and test, which no network was trained on
... by the autoencoder   the same, encoded and decoded: what the autoencoder takes away
guidance 0, 1, 2 ...     generated; the class that was asked for. 0 ignores it: 0.5 by construction. 1 is not
                         guided.
counterfactuals          heads only: held-out heads with a lesion, whose noise is found by inversion, made
                         again under both classes. Change, as a share of the range: within a voxel of the
                         lesion, and elsewhere

Beside the AUC stands the Frechet distance to held-out cases, of as many of each class (`evaluation samples`
has its features). What is done is not done again: stopped and started, this script goes on.
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
from ldm3d.data.phantoms import write_phantoms  # noqa: E402
from ldm3d.engine.checkpoint import load_run  # noqa: E402
from ldm3d.engine.logger import progress, save_sheet  # noqa: E402
from ldm3d.engine.training import OptimConfig, RunConfig, Stepper, reseed  # noqa: E402
from ldm3d.evaluation.networks import FidelityConfig, FidelityNet, scales_for  # noqa: E402
from ldm3d.evaluation.results import table, with_interval, write_report  # noqa: E402
from ldm3d.evaluation.statistics import auc, auc_interval, bootstrap_interval  # noqa: E402
from ldm3d.guidance import Guidance  # noqa: E402
from ldm3d.inference.editing import ImageEdit  # noqa: E402
from ldm3d.latent_diffusion import LatentDiffusion  # noqa: E402
from ldm3d.metrics import frechet_distance  # noqa: E402

# flags of train_vae.py and of train_ldm.py
ADRENAL = "adrenal", "adrenal"
HEADS = (
    "phantom --data.dims 2 --data.patch none --data.test_fraction 0.25 --vae.dims 2 --vae.channels 16,32 "
    "--vae.latent_channels 4 --batch_size 8 --run.steps 1000 --run.eval_every 500",
    "phantom --condition.use class --unet.channels 24,48 --unet.num_groups 8 --unet.head_channels 24 "
    "--run.steps 3000 --run.eval_every 1000",
)
LESION = 4  # its label

# --- the judge ----------------------------------------------------------------------------------------------


class Classifier(nn.Module):
    """x (B, 1, *S) -> logit (B,) of class 1. Halved first: it shall see shapes, not how their edges were
    drawn."""

    def __init__(self, dims: int, width: int = 16):
        super().__init__()
        conv, pool = (nn.Conv2d, nn.AvgPool2d) if dims == 2 else (nn.Conv3d, nn.AvgPool3d)
        layers, channels = [pool(2)], 1
        for wider in (width, 2 * width, 4 * width):
            layers += [conv(channels, wider, 3, padding=1), nn.GroupNorm(4, wider), nn.SiLU(), pool(2)]
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
    net = Classifier(data.spec.dims)
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
    nets = [Classifier(data.spec.dims) for _ in range(3)]
    for net, weights in zip(nets, torch.load(path, weights_only=True), strict=True):
        net.load_state_dict(weights)
        net.eval()
    return nets


@torch.inference_mode()
def logits(nets: list[Classifier], x: Tensor) -> np.ndarray:
    """(N,) of images (N, 1, *S)."""
    return torch.cat([sum(net(part.float()) for net in nets) for part in x.split(8)]).double().numpy()


def auc_row(scores: list[np.ndarray], paired: bool, resamples: int = 2000) -> dict[str, float]:
    """The AUC of the scores of class 0 and of class 1, with its interval. paired: scores at one index are of
    shapes from one noise, which are drawn again together and never compared."""
    low, high = auc_interval(*scores, resamples, paired)
    counts = {f"class {label}": len(s) for label, s in enumerate(scores)}
    return {"auc": auc(*scores, paired), "low": low, "high": high, **counts}


class Features:
    """Frechet distance of generated cases to held-out ones `real`, by class, of as many of each class."""

    def __init__(self, real: list[Tensor]):
        self.num = min(map(len, real))
        size = real[0].shape[2:]
        self.net = FidelityNet(FidelityConfig(len(size), 1, scales_for(size)))
        self.net.fit(x[None] for of in real for x in of)
        self.real = self.of(real)

    @torch.inference_mode()
    def of(self, cases: list[Tensor]) -> Tensor:
        return torch.cat([self.net(x.float()) for of in cases for x in of[: self.num].split(8)])

    def distance(self, made: list[Tensor]) -> float:
        return frechet_distance(self.of(made), self.real)


# --- cases --------------------------------------------------------------------------------------------------


def held_out(data: Data) -> tuple[list[Tensor], list[Tensor]]:
    """(Images (N, 1, *S) of validation and test cases, for each class; masks (N, *S) of class 1, if any)."""
    items = [d[i, i] for d in (data.dataset("val"), data.dataset("test")) for i in range(len(d))]
    images = [torch.stack([item["image"] for item in items if item["class"] == k]) for k in (0, 1)]
    return images, [item["mask"] for item in items if item["class"] == 1 and "mask" in item]


@torch.inference_mode()
def through(model: LatentDiffusion, x: Tensor) -> Tensor:
    """Encoded and decoded."""
    return torch.cat([model.decode(model.encode(one)) for one in x.split(1)])


def generate(run: Path, num: int, scale: float, steps: int, out: Path) -> list[Tensor]:
    """(num, 1, *S) float16 of each class, from the same noise; made once and kept in `out`."""
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


def counterfactuals(
    model: LatentDiffusion, nets: list[Classifier], x: Tensor, masks: list[Tensor], steps: int, scale: float
) -> dict[str, list[float]]:
    """Heads x (N, 1, *S) with a lesion, from their own noise, as class 1 and as class 0: the means, with
    intervals over heads, of what the classifiers say and of what has changed."""
    own, guidance, rows = model.prepare({"class": 1}), Guidance(scale), {}
    for image, mask in zip(x, masks, strict=True):
        lesion = (mask == LESION)[None, None].float()
        near = nn.functional.max_pool2d(lesion, 3, 1, 1)[0, 0] > 0
        edit = ImageEdit(model, image, strength=0.8, own=own)
        made = []
        for label in (1, 0):
            cond = model.prepare({"class": label})
            stream = model.stream([0], steps, "euler", conditions=cond, guidance=guidance, edit=edit)
            made += [y for y, _ in stream]
        with_lesion, without = (float(v) for v in logits(nets, torch.cat(made)))
        apart = (made[1] - made[0]).abs()[0, 0] / 2
        row = {"seen as class 1, made as class 1": float(with_lesion > 0)}
        row |= {"seen as class 1, made as class 0": float(without > 0)}
        row |= {"logit, 0 - 1": without - with_lesion}
        row |= {"change at the lesion": float(apart[near].mean()), "elsewhere": float(apart[~near].mean())}
        for name, value in row.items():
            rows.setdefault(name, []).append(value)
    found = {name: np.array(values) for name, values in rows.items()}
    return {name: [float(v.mean()), *bootstrap_interval(v, 2000)] for name, v in found.items()}


def train(args: argparse.Namespace) -> tuple[Path, Path]:
    """The run folders of autoencoder and denoiser."""
    vae, ldm = args.out / "vae", args.out / "ldm"
    of_vae, of_ldm = (words.split() for words in (HEADS if args.data == "heads" else ADRENAL))
    root = []
    if args.data == "heads":
        folder = args.out / "heads"
        if not folder.exists():
            write_phantoms(folder, 512, dims=2, size=(56, 48))
        root = ["--data.root", str(folder)]
    train_vae.main([*of_vae, *root, "--run.dir", str(vae), *args.vae.split()])
    train_ldm.main([*of_ldm, *root, "--vae", str(vae), "--run.dir", str(ldm), *args.ldm.split()])
    return vae, ldm


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", nargs="?", choices=("adrenal", "heads"), default="adrenal")
    parser.add_argument("--out", type=Path, help="folder of the runs; none = runs/classes-DATA")
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
    args.out = args.out or Path(f"runs/classes-{args.data}")
    args.out.mkdir(parents=True, exist_ok=True)
    out = args.out / "report"
    vae, ldm = train(args)
    out.mkdir(exist_ok=True)

    content = load_run(vae, "vae")
    flips = (1,) if args.data == "heads" else (0,)
    augment = AugmentConfig(flip_axes=flips, affine=0.7, max_scale=0.05)
    data = open_stored(content, patch=None, augment=augment)
    nets = judges(data, args.classifier_steps, out / f"classifiers-{args.classifier_steps}.pt")
    model = ldm3d.load(ldm).model
    real, masks = held_out(data)
    features = Features(real)
    seen = [through(model, x) for x in real]
    rows = {
        "held-out cases": auc_row([logits(nets, x) for x in real], paired=False),
        "held-out cases, by the autoencoder": auc_row([logits(nets, x) for x in seen], paired=False)
        | {"frechet": features.distance(seen)},
    }
    sheet = {f"real, class {k}": [v[0].numpy() for v in x[:4]] for k, x in enumerate(real)}
    for scale in args.guidance:
        made = generate(ldm, args.num, scale, args.steps, out)
        rows[f"guidance {scale:g}"] = auc_row([logits(nets, x) for x in made], paired=True)
        rows[f"guidance {scale:g}"]["frechet"] = features.distance(made)
        for k, x in enumerate(made):
            sheet[f"guidance {scale:g}, class {k}"] = [v[0].float().numpy() for v in x[:4]]
    save_sheet(out / "sheet.png", sheet, limits=(-1, 1))
    lines: list[tuple] = [("cases", "AUC (95 %)", "of class 0", "of class 1", "Frechet distance")]
    for name, row in rows.items():
        auc_words, distance = with_interval(row["auc"], row["low"], row["high"]), row.get("frechet", 0)
        lines.append((name, auc_words, row["class 0"], row["class 1"], f"{distance:.2f}" if distance else ""))
    text = table(lines, markdown=True)
    if args.data == "heads":
        some = slice(0, args.num)
        for scale in (1.0, 3.0):
            found = counterfactuals(model, nets, real[1][some], masks[some], args.steps, scale)
            rows[f"counterfactuals, guidance {scale:g}"] = found
            lines = [(f"counterfactuals, guidance {scale:g}", "mean (95 %)")]
            text += "\n\n" + table(
                [*lines, *((k, with_interval(*v)) for k, v in found.items())], markdown=True
            )
    write_report(out / "report.json", rows)
    (out / "report.md").write_text(text + "\n")
    print(f"\n{text}\n\n{out}")


if __name__ == "__main__":
    main()
