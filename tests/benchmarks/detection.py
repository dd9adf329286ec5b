"""Edits and detection on synthetic heads: the tables in README.md, in this folder.

    python tests/benchmarks/detection.py --amp bf16     # about 17 CPU minutes
    python tests/benchmarks/detection.py --try          # a try, whose figures mean nothing

Two pairs of an autoencoder and a denoiser are trained: "healthy" has seen heads without a lesion alone, and
"class" heads of both classes, under the condition `class`. The heads of the tests were seen by neither.

anomalies        maps of lesions by the healthy model (evaluation/anomalies.py): of the bright lesions of
                 all synthetic heads, and of the same lesions as dark as grey matter
likelihood       bits per dimension of heads, and AUC of spoilt ones, by the healthy model (likelihood.py)
inversion        encode, invert to noise, sample again: the error, as a share of the latents' deviation, and
                 PSNR beside the plain autoencoder, for numbers of steps and of fixed-point rounds
inpainting       lesions put into healthy heads, and taken out of others (--inpaint, class 1 and 0); a lesion
                 is what is brighter than white matter; seams as edits.py measures them
counterfactuals  heads with a lesion, inverted under class 1 and sampled under class 0; beside an edit of the
                 same strength whose noise is drawn. And samples of both classes from the same noise

Intervals are of bootstraps over heads. Each part is kept in report/ when it is done: stopped and started
again, this script goes on.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT)]

from budgets import once  # noqa: E402

import ldm3d  # noqa: E402
import train_ldm  # noqa: E402
import train_vae  # noqa: E402
from ldm3d.config import read_json  # noqa: E402
from ldm3d.data import VolumeDataset, open_images  # noqa: E402
from ldm3d.data.phantoms import TISSUES, make_phantom, write_phantoms  # noqa: E402
from ldm3d.engine.logger import save_sheet  # noqa: E402
from ldm3d.evaluation.__main__ import main as evaluation_main  # noqa: E402
from ldm3d.evaluation.anomalies import MAPS  # noqa: E402
from ldm3d.evaluation.edits import edit_figures  # noqa: E402
from ldm3d.evaluation.results import table, with_interval  # noqa: E402
from ldm3d.evaluation.statistics import summarise  # noqa: E402
from ldm3d.inference.editing import ImageEdit  # noqa: E402
from ldm3d.pipeline import LatentDiffusionPipeline  # noqa: E402

SIZE = (40, 48, 40)
PARTS = {"train": 256, "val": 32, "test": 32}  # heads of each class
SMALL = {"train": 6, "val": 4, "test": 4}  # of a try


# --- data and runs ------------------------------------------------------------------------------------------


def write_heads(out: Path, parts: dict[str, int]) -> dict[str, Path]:
    """Heads of each class, and tables of them: {"healthy", "class", "test-0", "test-1": folder}.

    The runs are trained on the first two; the heads of the tests stand in tables of their own.
    """
    names = [part for part, num in parts.items() for _ in range(num)]
    rows = []
    for label in (0, 1):
        root = out / f"heads-{label}"
        if not root.exists():
            write_phantoms(root, len(names), size=SIZE, class_idx=label)
        with open(root / "cases.csv", newline="") as file:
            found = list(csv.DictReader(file))
        for row, part in zip(found, names, strict=True):
            files = {role: str((root / row[role]).resolve()) for role in ("image", "mask")}
            rows.append({**files, "class": row["class"], "subject": row["subject"], "split": part})
    chosen = {
        "healthy": [r for r in rows if r["class"] == "0" and r["split"] != "test"],
        "class": [r for r in rows if r["split"] != "test"],
        "test-0": [r for r in rows if r["class"] == "0" and r["split"] == "test"],
        "test-1": [r for r in rows if r["class"] == "1" and r["split"] == "test"],
    }
    for name, listed in chosen.items():
        (out / name).mkdir(parents=True, exist_ok=True)
        with open(out / name / "cases.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, list(listed[0]))
            writer.writeheader()
            writer.writerows(listed)
    return {name: out / name for name in chosen}


def write_grey(out: Path, num: int) -> Path:
    """The first heads of the tests with lesions as dark as grey matter, in a folder of their own."""
    with open(out / "test-1" / "cases.csv", newline="") as file:
        names = [row["subject"] for row in csv.DictReader(file)][:num]
    for name in names:
        with mock.patch.dict(TISSUES, lesion=TISSUES["grey"]):
            head = make_phantom(int(name[-4:]), size=SIZE)
        path = out / "grey" / f"{name}.nii.gz"
        if not path.exists():
            ldm3d.write(path, ldm3d.Volume(head.image, head.affine))
    return out / "grey"


def length(steps: int) -> list[str]:
    """Flags of a run's length; saved often, since it may be stopped at any time."""
    numbers = {"steps": steps, "eval_every": max(1, steps // 2), "save_every": min(100, steps)}
    numbers["log_every"] = min(50, steps)
    return [word for key, number in numbers.items() for word in (f"--run.{key}", str(number))]


def train(args: argparse.Namespace, out: Path) -> dict[str, Path]:
    """The run folders of both denoisers. The second autoencoder starts from the first."""
    runs, first = {}, []
    folders = write_heads(out, SMALL if args.tiny else PARTS)
    for name in ("healthy", "class"):
        folder = folders[name]
        steps = args.vae_steps // (2 if first else 1)
        vae, runs[name] = out / f"vae-{name}", out / f"ldm-{name}"
        own = ["--data.root", str(folder), "--run.amp", args.amp, *first]
        train_vae.main(["phantom", *own, *length(steps), "--run.dir", str(vae)])
        first = ["--run.init", str(vae)]
        more = ["--condition.use", "class"] if name == "class" else []
        more += ["--vae", str(vae), "--run.amp", args.amp]
        steps = {"healthy": args.healthy_steps, "class": args.class_steps}[name]
        train_ldm.main(["phantom", *more, *length(steps), "--run.dir", str(runs[name])])
    return runs


# --- detection ----------------------------------------------------------------------------------------------


def evaluated(out: Path, name: str, task: str, *words: object) -> dict[str, Any]:
    """The report of a task of `python -m ldm3d.evaluation`, made once."""
    folder = out / "report" / name
    if not (folder / "report.json").exists():
        evaluation_main([task, *map(str, words), "--out", str(folder)])
    return read_json(folder / "report.json")


def anomaly_table(report: dict[str, Any]) -> str:
    kinds = ("auroc", "auroc_inside", "dice", "dice_own")
    lines: list[tuple] = [
        ("map", "AUROC", "AUROC in the brain", "Dice, one threshold", "Dice, own threshold")
    ]
    for name in MAPS:
        row = (report["metrics"][f"{kind}_{name}"] for kind in kinds)
        lines.append((name, *(with_interval(m["mean"], m["low"], m["high"]) for m in row)))
    return table(lines, markdown=True)


def draw(path: Path, pipeline: LatentDiffusionPipeline, items: list[dict[str, Tensor]], out: Path) -> None:
    """Some heads, a row each: image, lesion, image restored by the model, map of z (white: 6), in the plane
    across the axis of the body through the middle of the lesion."""
    rows = {}
    for i, item in list(enumerate(items))[: min(4, len(items))]:
        name, truth = f"{Path(item['name']).name}.nii.gz", (item["mask"] == 4).float()
        z = torch.from_numpy(ldm3d.read(out / "report/anomalies/maps" / name).array[0])
        made = pipeline.read(out / "report/anomalies/restored" / name)[0]
        k = round(centre_of(truth)[2])
        shown = (item["image"][0], 2 * truth - 1, made, z.clamp(0, 6) / 3 - 1)
        rows[f"head {i + 1}: image, lesion, restored, z"] = [np.rot90(v[:, :, k].numpy()) for v in shown]
    save_sheet(path, rows, limits=(-1, 1))


def likelihood_table(report: dict[str, Any]) -> str:
    lines: list[tuple] = [("heads", "bits per dimension", "AUC, unlikely", "AUC, atypical")]
    for name, row in report["sets"].items():
        figures = [row["bits_per_dimension"], row.get("auc_unlikely"), row.get("auc_atypical")]
        cells = (f and with_interval(f.get("mean", f.get("value")), f["low"], f["high"]) for f in figures)
        lines.append((name, *(cell or "" for cell in cells)))
    return table(lines, markdown=True)


@torch.inference_mode()
def inversion(pipeline: LatentDiffusionPipeline, heads: VolumeDataset, num: int) -> list[list[Any]]:
    """Rows (steps, rounds, error of the latents, PSNR to the autoencoder's image) of `num` heads."""
    model = pipeline.model
    z = torch.cat([model.encode(heads[i, i]["image"][None]) for i in range(num)])
    seen, rows = torch.cat([model.decode(one[None]) for one in z]), []
    for steps in (10, 30):
        times = model.kernel.sampling_times("euler", steps, z.shape[2:])
        for rounds in (1, 3):
            noise = model.kernel.invert(model.denoiser, z, times, rounds)
            back = model.kernel.sample(model.denoiser, noise, times, "euler")
            made = torch.cat([model.decode(one[None]) for one in back])
            error = (back - z).flatten(1).square().mean(1).sqrt() / z.std()
            apart = (made - seen).flatten(1).square().mean(1)
            rows.append([steps, rounds, float(error.mean()), float((10 * torch.log10(4 / apart)).mean())])
            rows[-1].append(float(noise.std()))
    return rows


# --- edits --------------------------------------------------------------------------------------------------


def lesion(x: Tensor, healthy: Tensor) -> Tensor:
    """Voxels (*S) bool of a head x (1, *S), scaled, that are brighter than white matter, inside the brain's
    bounds: an ellipsoid that lies within all skulls. healthy (1, *S): a head whose white matter counts."""
    axes = [torch.linspace(-1, 1, n) for n in SIZE]
    i, j, k = torch.meshgrid(*axes, indexing="ij")
    inside = (i / 0.62) ** 2 + (j / 0.66) ** 2 + ((k - 0.12) / 0.52) ** 2 < 1
    white = (healthy[0][inside] + 1).quantile(0.7)
    return inside & (x[0] + 1 > 1.25 * white)


def ball(centre: tuple[float, ...], radius: float) -> Tensor:
    """Voxels (*SIZE) bool within a radius (voxels) of a place."""
    axes = torch.meshgrid(*(torch.arange(n) for n in SIZE), indexing="ij")
    return sum((a - c) ** 2 for a, c in zip(axes, centre, strict=True)) <= radius**2


def centre_of(mask: Tensor) -> tuple[float, ...]:
    return tuple(float(v) for v in mask.nonzero().float().mean(0))


def around(mask: Tensor) -> Tensor:
    """A ball that holds a lesion (*S) and two voxels around it."""
    centre = centre_of(mask)
    reach = (mask.nonzero().float() - torch.tensor(centre)).norm(dim=1).max()
    return ball(centre, float(reach) + 2)


def inpainting(
    pipeline: LatentDiffusionPipeline, heads: list[list[dict[str, Tensor]]], num: int, steps: int
) -> dict[str, Any]:
    """Lesions put into healthy heads, at the places of those of other heads, and taken out of heads."""
    rows: dict[str, dict[str, dict[str, float]]] = {"lesion into a healthy head": {}, "lesion taken out": {}}
    for i in range(num):
        region = around(heads[1][i]["mask"] == 4)
        for found, wish, item in zip(rows.values(), (1, 0), (heads[0][i], heads[1][i]), strict=True):
            x, edit = item["image"], ImageEdit(pipeline.model, item["image"], region)
            made = pipeline.sample(1, conditions={"class": wish}, edit=edit, steps=steps, seed=i)[0]
            row = edit_figures(made.numpy(), x.numpy(), region.numpy())
            row["seam - real"] = row["seam"] - row["seam_real"]
            row["contrast - real"] = row["seam_contrast"] - row["contrast_real"]
            white = heads[0][i]["image"]
            row["lesion before"] = float((lesion(x, white) & region).sum())
            row["lesion after"] = float((lesion(made, white) & region).sum())
            found[str(i)] = row
    return rows


def counterfactuals(
    pipeline: LatentDiffusionPipeline, heads: list[dict[str, Tensor]], num: int, steps: int, strength: float
) -> dict[str, Any]:
    """Heads with a lesion, without it: from the noise of the image, and from noise that is drawn."""
    model, rows = pipeline.model, {}
    for name, own in (("inverted", True), ("noise drawn", False)):
        rows[name] = {}
        for i in range(num):
            x, mask = heads[i]["image"], heads[i]["mask"] == 4
            cond = pipeline.prepare({"class": 1}) if own else None
            edit = ImageEdit(model, x, strength=strength, own=cond)
            how = {"edit": edit, "steps": steps, "sampler": "euler", "seed": i}
            same, other = (pipeline.sample(1, conditions={"class": c}, **how)[0] for c in (1, 0))
            apart, back = (other - same).abs()[0], model.decode(model.encode(x[None]))[0]
            near = around(mask)
            rows[name][str(i)] = {
                "lesion, class 1": float((lesion(same, x) & near).sum()),
                "lesion, class 0": float((lesion(other, x) & near).sum()),
                "lesion of the image": float((lesion(back, x) & near).sum()),
                "change inside": float(apart[mask].mean() / 2),
                "change outside": float(apart[~near].mean() / 2),
                "distance outside": float((other - back).abs()[0][~near].mean() / 2),
            }
    return rows


def same_noise(pipeline: LatentDiffusionPipeline, num: int, steps: int) -> dict[str, dict[str, float]]:
    """Samples of both classes from one noise, and of class 0 from two noises."""
    made = [pipeline.sample(num, conditions={"class": c}, steps=steps, seed=9) for c in (0, 1)]
    rows = {}
    for i in range(num):
        a, b, c = made[0][i], made[1][i], made[0][(i + 1) % num]
        found = lesion(b, a)
        away = ~around(found) if found.any() else torch.ones_like(found)
        rows[str(i)] = {
            "lesion, class 0": float(lesion(a, a).sum()),
            "lesion, class 1": float(found.sum()),
            "classes apart, outside": float((a - b).abs()[0][away].mean() / 2),
            "noises apart": float((a - c).abs()[0][away].mean() / 2),
        }
    return rows


def means_table(rows: dict[str, Any], words: str, digits: int = 3) -> str:
    """Means with intervals, a line for each group of rows."""
    groups = {name: summarise(found, 2000) for name, found in rows.items()}
    columns = list(next(iter(groups.values())))
    lines: list[tuple] = [(words, *columns)]
    for name, found in groups.items():
        lines.append(
            (name, *(with_interval(*(found[c][k] for k in ("mean", "low", "high"))) for c in columns))
        )
    return table(lines, markdown=True)


# --- all of it ----------------------------------------------------------------------------------------------


def items_of(pipeline: LatentDiffusionPipeline, out: Path) -> list[list[dict[str, Tensor]]]:
    """Images and masks of the heads of the tests, of each class."""
    found = []
    for label in (0, 1):
        root = out / f"heads-{label}"
        dataset = open_images(pipeline.content, out / f"test-{label}", "all", root / "labels", own_size=False)
        found.append([{**dataset[i, i], "name": dataset.cases[i].id} for i in range(len(dataset))])
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/detection"), help="folder of the runs")
    parser.add_argument("--vae_steps", type=int, default=1600)
    parser.add_argument("--healthy_steps", type=int, default=1000, help="of the denoiser of healthy heads")
    parser.add_argument("--class_steps", type=int, default=1000, help="of the denoiser of both classes")
    parser.add_argument("--amp", default="auto")
    parser.add_argument("--picture", type=Path, help="a file for the picture of README.md")
    parser.add_argument("--try", dest="tiny", action="store_true", help="few heads and steps")
    parser.add_argument("--num", type=int, default=16, help="heads of anomalies and likelihood, at most 32")
    parser.add_argument("--edits", type=int, default=8, help="heads that are edited, at most 32")
    parser.add_argument("--sample_steps", type=int, default=20, help="intervals of the sampling grid")
    args = parser.parse_args(argv)
    if args.tiny:
        args.vae_steps, args.healthy_steps, args.class_steps = 4, 4, 4
        args.num, args.edits, args.sample_steps = 2, 2, 2
    out = args.out / "try" if args.tiny else args.out
    runs = train(args, out)
    texts, words = {}, ["--masks", out / "heads-1/labels", "--label", 4, "--subset", args.num]
    for name, images in {"anomalies": out / "test-1", "grey": write_grey(out, args.num)}.items():
        how = [*words, "--steps", args.sample_steps]
        texts[name] = anomaly_table(evaluated(out, name, "anomalies", runs["healthy"], images, *how))
    words = ["--changes", "cut,roll,flip", "--steps", args.sample_steps, "--subset", args.num]
    texts["likelihood"] = likelihood_table(
        evaluated(out, "likelihood", "likelihood", runs["healthy"], *words)
    )
    pipelines = {name: ldm3d.load(run) for name, run in runs.items()}

    def part(name: str, make: Callable[[], Any]) -> Any:
        return once(out / "report" / f"{name}.json", make)

    healthy = open_images(pipelines["healthy"].content, out / "test-0", own_size=False)
    rows = part("inversion", lambda: inversion(pipelines["healthy"], healthy, min(4, args.num)))
    header = ["steps", "rounds", "error of the latents", "PSNR, dB", "deviation of the noise"]
    texts["inversion"] = table([header, *rows], markdown=True)
    model, heads = pipelines["class"], items_of(pipelines["class"], out)
    if args.picture:
        draw(args.picture, pipelines["healthy"], heads[1], out)
    rows = part("inpainting", lambda: inpainting(model, heads, args.edits, args.sample_steps))
    texts["inpainting"] = means_table(rows, "inpainted")
    how = (args.edits, args.sample_steps)
    rows = part("counterfactuals", lambda: counterfactuals(model, heads[1], *how, strength=0.8))
    texts["counterfactuals"] = means_table(rows, "counterfactual")
    rows = part("same_noise", lambda: same_noise(model, *how))
    texts["same noise"] = means_table({"samples": rows}, "one noise")
    text = "\n\n".join(f"{name}\n\n{body}" for name, body in texts.items())
    (out / "report" / "report.md").write_text(text + "\n")
    print(f"\n{text}\n\n{out / 'report'}")


if __name__ == "__main__":
    main()
