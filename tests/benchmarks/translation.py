"""Paired translation by latent diffusion beside copies of the source and a plain U-Net regression.

    python tests/benchmarks/translation.py slices      # 2-D: T1 -> FLAIR, $LDM3D_DATA/tiff_pairs
    python tests/benchmarks/translation.py phantoms    # 3-D: T2-like -> T1-like synthetic heads, whole
    python tests/benchmarks/translation.py brats       # 3-D: FLAIR -> T1c patches, $LDM3D_DATA/brats2013

Trained are an autoencoder of both contrasts, a denoiser for each way in which the source can enter, and, on
slices, a U-Net of the same configuration that maps the source's voxels to the target's (L1). All are chosen
on validation cases (slices: the middle of the training patient, with a gap on both sides; brats: training
cases) and tried once, at the end, on test cases: the other patient. Scores are in the scaled range [-1, 1],
means over test cases:

PSNR, SSIM, Dice and IoU of the object, by Otsu's threshold of the target (pairs.py)
bright     Dice of what is brighter than mean + std of the target's object
fine       power in the upper half of frequencies beside the target's, dB: below 0 is blur, above 0 is grain

Copies take the source's values through a map that is fitted on training cases: the best straight line, the
one that gives them the histogram of targets, and the best function of one value at all (the mean target value
of each of 128 source values), which knows more than intensity matching does. Cases whose target
has one value everywhere, as slices above the head have, are left out: whatever is black there scores without
end. Intervals in report.json are over cases, which here are slices or patches of one patient. What is done is
not done again: stopped and started, this script goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tifffile
import torch
from torch import Tensor, nn

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import ldm3d  # noqa: E402
import train_ldm  # noqa: E402
import train_vae  # noqa: E402
from ldm3d.blocks import DepthToSpace, SpaceToDepth  # noqa: E402
from ldm3d.config import from_dict, replace  # noqa: E402
from ldm3d.data import AugmentConfig, Data, batches, open_stored  # noqa: E402
from ldm3d.engine.checkpoint import load_run  # noqa: E402
from ldm3d.engine.logger import progress, save_sheet  # noqa: E402
from ldm3d.engine.training import EMA, OptimConfig, RunConfig, Stepper, reseed  # noqa: E402
from ldm3d.evaluation.morphology import otsu_threshold  # noqa: E402
from ldm3d.evaluation.pairs import object_of, overlap  # noqa: E402
from ldm3d.evaluation.results import table, write_report  # noqa: E402
from ldm3d.evaluation.statistics import finite_means, summarise  # noqa: E402
from ldm3d.metrics import power_spectrum, psnr, ssim  # noqa: E402
from ldm3d.unet import UNet, UNetConfig  # noqa: E402


@dataclass(frozen=True)
class Task:
    preset: str
    vae: str = ""  # flags beside the preset's
    ldm: str = ""
    ways: tuple[str, ...] = ("image",)  # in which the source enters the denoiser
    windows: int = 0  # random windows of the test cases that are translated; 0 = the middle of each
    regression: tuple[int, int] = (0, 0)  # steps, and the factor by which its images are folded; 0 = none


TASKS = {
    "slices": Task("tiff-translation", ways=("image", "tokens"), regression=(1000, 2)),
    "phantoms": Task(
        "phantom",
        "--data.test_fraction 0.1 --data.learn_sources --run.steps 2400",
        "--unet.channels 32,64,128 --unet.attention_levels false,false,true --run.steps 1500",
    ),
    "brats": Task(
        "hippocampus",
        """--data.name brats2013 --data.image */T1c_subtrMeanDivStd.nii.gz
 --data.source */Flair_subtrMeanDivStd.nii.gz --data.mask */brainmask.nii.gz --data.subject none
 --data.test_subjects brats_2013_pat0006_1 --data.val_fraction 0 --data.learn_sources --data.foreground 1
 --data.size 48,48,48 --data.patch 32,32,32 --batch_size 4 --vae.channels 32,64 --run.steps 1200
 --run.eval_every 400 --run.save_every 400""",
        """--data.crop random --data.num_variants 64 --data.augment.flip_axes 0 --batch_size 4
 --run.steps 1500 --unet.channels 32,64,128 --unet.num_res_blocks 1
 --unet.attention_levels false,false,true""",
        windows=16,
    ),
}

Items = list[dict[str, Tensor]]  # image, source (C, *S), scaled
Rows = dict[str, dict[str, float]]

# --- training -----------------------------------------------------------------------------------------------


def train(name: str, task: Task, out: Path, more: dict[str, list[str]]) -> dict[str, Path]:
    """The run folders, trained to their end: "vae" and each way."""
    runs = {what: out / f"{name}-{what}" for what in ("vae", *task.ways)}
    train_vae.main([task.preset, "--run.dir", str(runs["vae"]), *task.vae.split(), *more["vae"]])
    for way in task.ways:
        flags = [task.preset, "--vae", str(runs["vae"]), "--run.dir", str(runs[way])]
        train_ldm.main([*flags, "--condition.use", way, *task.ldm.split(), *more["ldm"]])
    return runs


class Regression(nn.Module):
    """A plain U-Net from source (B, C, *S) to target (B, C, *S), on images folded into channels."""

    def __init__(self, unet: UNetConfig, channels: int, fold: int):
        super().__init__()
        folded, factor = channels * fold**unet.dims, (fold,) * unet.dims
        self.fold, self.unfold = SpaceToDepth(factor), DepthToSpace(factor)
        self.unet = UNet(replace(unet, {"in_channels": folded, "out_channels": folded}))

    def forward(self, source: Tensor) -> Tensor:
        return self.unfold(self.unet(self.fold(source), torch.zeros(len(source))))


def regress(data: Data, unet: UNetConfig, steps: int, fold: int, path: Path) -> Regression:
    """The regression with the highest PSNR on validation cases; trained on the autoencoder's patches."""
    train_set, val_set = data.dataset("train", augment=True), data.dataset("val")
    reseed(0, 0)
    net, every = Regression(unet, data.spec.channels, fold), max(1, steps // 8)
    if path.exists():
        net.load_state_dict(torch.load(path, weights_only=True))
        return net.eval()
    optim = OptimConfig(1e-3, adam_betas=(0.9, 0.99), warmup_steps=50, schedule="cosine")
    stepper = Stepper(net, optim, RunConfig(steps=steps), 4, torch.device("cpu"))
    ema, best = EMA(net, 0.995), -np.inf
    for step, group in progress(enumerate(batches(train_set, 4, 4, 0, 0, steps)), "regression", steps):
        stepper.backward((net(group[0]["source"]) - group[0]["image"]).abs().mean())
        stepper.step(step)
        ema.update(net, step)
        if (step + 1) % every == 0 or step == steps - 1:
            found = np.mean([score(regressed(ema.net, c), c["image"])["psnr"] for c in varied(val_set)])
            print(f"regression, step {step + 1}: validation PSNR {found:.2f} dB", flush=True)
            if found > best:
                best, weights = found, {k: v.clone() for k, v in ema.net.state_dict().items()}
    torch.save(weights, path)
    net.load_state_dict(weights)
    return net.eval()


@torch.inference_mode()
def regressed(net: Regression, case: dict[str, Tensor]) -> Tensor:
    return net(case["source"][None])[0]


# --- cases and copies ---------------------------------------------------------------------------------------


def varied(dataset: object, windows: int = 0) -> Items:
    """The items of a data set, or so many random windows of its cases, without those of a constant target."""
    places = range(windows or len(dataset))
    items = [dataset[place, place % len(dataset)] for place in places]
    kept = [item for item in items if item["image"].min() < item["image"].max()]
    if len(kept) < len(items):
        print(f"{len(items) - len(kept)} of {len(items)} targets have one value everywhere: left out")
    return kept


def copies(items: Items) -> dict[str, object]:
    """Name -> function source -> guess of the target, fitted by least squares on all voxels of the items."""
    x, y = (torch.cat([item[role].flatten() for item in items]).double() for role in ("source", "image"))
    slope = ((x - x.mean()) * (y - y.mean())).mean() / x.var(correction=0)
    offset = y.mean() - slope * x.mean()

    def bins(values: Tensor) -> Tensor:
        return ((values + 1) * 64).long().clamp(0, 127)

    counts = torch.bincount(bins(x), minlength=128)
    means = torch.bincount(bins(x), y, minlength=128) / counts.clamp(min=1)
    known = counts.nonzero()[:, 0].numpy()  # of values that never occur: between their neighbours'
    means = torch.from_numpy(np.interp(np.arange(128), known, means.numpy()[known])).float()
    levels, places = (np.quantile(v.numpy(), np.linspace(0, 1, 513)) for v in (y, x))
    places, first = np.unique(places, return_index=True)  # of many equal values, the background: the lowest
    return {
        "copy, straight line": lambda source: (slope * source + offset).float(),
        "copy, histogram": lambda source: torch.from_numpy(np.interp(source, places, levels[first])).float(),
        "copy, any function": lambda source: means[bins(source)],
    }


# --- scores -------------------------------------------------------------------------------------------------


def score(x: Tensor, target: Tensor) -> dict[str, float]:
    """Of one image (C, *S) beside its target, both scaled."""
    x = x.clamp(-1, 1)
    made, real = x[0].numpy(), target[0].numpy()
    threshold = otsu_threshold(real)
    inside = object_of(real, threshold)
    both = overlap(object_of(made, threshold), inside)
    bright = float(real[inside].mean() + real[inside].std())
    fine = [power_spectrum(v, 16)[:, 8:].mean() for v in (x, target)]
    return {
        "psnr": float(psnr(x[None], target[None], 2.0)),
        "ssim": float(ssim(x[None], target[None], 2.0)),
        "dice": both["dice"],
        "iou": both["iou"],
        "bright": overlap(made > bright, real > bright)["dice"],
        "fine": float(fine[0] - fine[1]),
    }


@torch.inference_mode()
def sample(run: Path, way: str, items: Items, num: int, steps: int, out: Path) -> np.ndarray:
    """(items, num, C, *size): translations of every item's source, made once and kept in `out`."""
    path = out / f"samples-{way}-{num}-{steps}.npy"
    if not path.exists() or path.stat().st_mtime < (run / "best.pt").stat().st_mtime:
        model = ldm3d.load(run).model
        z = torch.cat([model.encode(item["source"][None]) for item in items])
        cond = {way: z.repeat_interleave(num, 0)}
        stream = model.stream(range(len(items) * num), steps, batch_size=num, conditions=cond)
        made = [x for x, _ in progress(stream, f"sampling, {way}", len(items))]
        partial = path.with_suffix(".partial.npy")
        np.save(partial, torch.stack(made).numpy())
        partial.rename(path)
    return np.load(path, mmap_mode="r")


DIGITS = {"PSNR dB": ".2f", "SSIM": ".4f", "Dice": ".3f", "IoU": ".3f", "bright": ".3f", "fine, dB": "+.1f"}


def table_of(results: dict[str, Rows]) -> str:
    """Means over the cases that have a score, in Markdown."""
    lines = [("row", *DIGITS)]
    for name, rows in results.items():
        means = finite_means(list(rows.values())).values()
        lines.append((name, *(format(m, digits) for m, digits in zip(means, DIGITS.values(), strict=True))))
    return table(lines, markdown=True)


def pictures(made: dict[str, list[Tensor]], items: Items, out: Path) -> None:
    """sheet.png of four cases, and of every case a float32 TIFF with its images side by side."""
    some = sorted({round(i) for i in np.linspace(0, len(items) - 1, 6)[1:-1]})
    sheet = {name: [images[i][0].clamp(-1, 1).numpy() for i in some] for name, images in made.items()}
    save_sheet(out / "sheet.png", sheet, limits=(-1, 1))
    (out / "sheets").mkdir(exist_ok=True)
    for i in range(len(items)):
        row = [images[i][0] for images in made.values()]
        flat = [x if x.ndim == 2 else x[..., x.shape[-1] // 2] for x in row]
        page = torch.cat(flat, 1).float().numpy()
        tifffile.imwrite(out / "sheets" / f"{items[i]['id']}_{i:02d}.tif", page, photometric="minisblack")
    (out / "sheets" / "columns.txt").write_text("\n".join(made) + "\n")


# --- all of it ----------------------------------------------------------------------------------------------


def test(name: str, task: Task, runs: dict[str, Path], args: argparse.Namespace) -> None:
    model, out = ldm3d.load(runs[task.ways[0]]).model, args.out / f"{name}-report"
    out.mkdir(exist_ok=True)
    content = load_run(runs["vae"], "vae")
    data = open_stored(content)
    plain = dataclasses.replace(data.config, augment=AugmentConfig(), patch=None)
    whole = dataclasses.replace(data, config=plain)
    items = varied(whole.dataset("test", augment=task.windows > 0), task.windows)
    fitted_on = varied(whole.dataset("train", augment=task.windows > 0), 3 * task.windows)
    made = {"source": [c["source"] for c in items], "target": [c["image"] for c in items]}
    results: dict[str, Rows] = {}

    def add(title: str, images: list[Tensor]) -> None:
        made[title] = images
        results[title] = {
            str(i): score(x, c["image"]) for i, (x, c) in enumerate(zip(images, items, strict=True))
        }

    for way in task.ways:
        x = torch.from_numpy(np.array(sample(runs[way], way, items, args.num, args.sample_steps, out)))
        made[f"{way}, a sample"] = list(x[:, 0])
        scored = [[score(one, c["image"]) for one in some] for some, c in zip(x, items, strict=True)]
        results[f"{way}, single samples"] = {str(i): finite_means(rows) for i, rows in enumerate(scored)}
        add(f"{way}, mean of {args.num}", list(x.mean(1)))
    if task.regression[0]:
        steps, fold = args.regression_steps or task.regression[0], task.regression[1]
        unet = load_run(runs[task.ways[0]], "ldm")["config"]["unet"]
        unet = from_dict(UNetConfig, unet, "unet")
        net = regress(data, unet, steps, fold, out / f"regression-{steps}.pt")
        add("regression", [regressed(net, c) for c in items])
    for title, function in copies(fitted_on).items():
        add(title, [function(c["source"]) for c in items])
    with torch.inference_mode():
        add(
            "target through the autoencoder", [model.decode(model.encode(c["image"][None]))[0] for c in items]
        )
    pictures(made, items, out)
    write_report(out / "report.json", {title: summarise(rows, 2000) for title, rows in results.items()})
    report = f"{name}: {len(items)} test cases, {args.num} samples each\n\n{table_of(results)}\n"
    (out / "report.md").write_text(report)
    print(f"\n{report}\n{out}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", choices=list(TASKS))
    parser.add_argument("--out", type=Path, default=Path("runs/translation"), help="folder of the runs")
    ways = ("image", "tokens")
    parser.add_argument("--ways", nargs="+", choices=ways, help="how the source enters; else the task's own")
    parser.add_argument("--num", type=int, default=8, help="samples of every test case")
    parser.add_argument("--sample_steps", type=int, default=20, help="intervals of the sampling grid")
    parser.add_argument("--regression_steps", type=int, default=0, help="0 = the task's own")
    parser.add_argument("--vae", default="", help="more flags of train_vae.py, in quotes")
    parser.add_argument("--ldm", default="", help="more flags of train_ldm.py, in quotes")
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0 = its own choice")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    task = TASKS[args.task]
    if args.ways:
        task = dataclasses.replace(task, ways=tuple(args.ways))
    args.out.mkdir(parents=True, exist_ok=True)
    runs = train(args.task, task, args.out, {"vae": args.vae.split(), "ldm": args.ldm.split()})
    test(args.task, task, runs, args)


if __name__ == "__main__":
    main()
