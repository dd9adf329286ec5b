"""Twenty volumes and 300 steps: what is a denoiser worth that is trained already? The table in README.md.

    python tests/benchmarks/finetuning.py phantom hippocampus       # about 20 CPU minutes
    python tests/benchmarks/finetuning.py phantom --try             # a try, whose figures mean nothing

The training cases of a set are divided by subject: 20 of them are the new data, all others have trained the
autoencoder and the denoiser to start from, "pretrained". Validation cases are none of both. Rows:

    pretrained      the denoiser to start from, which has never seen the 20 volumes
    from nothing    a denoiser of the same architecture, trained on the 20 volumes alone
    all weights     --run.init
    adapters        --run.init, --lora.rank 4
    control         --run.init, --control labels: the masks of the 20 volumes steer the frozen denoiser
    guidance 2      samples of the same run, guided to the mask: sample.py --guidance labels=2

Columns: parameters that are trained; the lowest validation loss of the diffusion (that of control is under
the masks of the validation cases); the Frechet distance between samples and the training cases of both parts,
in the fixed network of ldm3d/evaluation; and the Dice between the mask of a validation case and the labels
that a segmentation network finds in a sample. Samples are by the weights of best.pt: those with the lowest
validation loss, and for control with the lowest one at high noise. Only "control" was asked for the mask: the
Dice of the other rows is chance. The segmentation network has learned from the cases of the pretraining; the
row "real" holds its Dice on real validation cases, and their Frechet distance.

Stopped and started again it goes on where it was.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

from budgets import once  # noqa: E402

import ldm3d  # noqa: E402
import train_cdal  # noqa: E402
import train_ldm  # noqa: E402
import train_vae  # noqa: E402
from ldm3d.data import Data, DataConfig, DataSpec, VolumeDataset, open_data  # noqa: E402
from ldm3d.data.phantoms import write_phantoms  # noqa: E402
from ldm3d.engine.checkpoint import load, step_files, write_atomically  # noqa: E402
from ldm3d.engine.logger import read_log  # noqa: E402
from ldm3d.evaluation.networks import whole_fidelity  # noqa: E402
from ldm3d.evaluation.results import table  # noqa: E402
from ldm3d.evaluation.validity import write_cases  # noqa: E402
from ldm3d.metrics import dice, frechet_distance  # noqa: E402

CPU = torch.device("cpu")
NETWORK = "--unet.channels 32,64 --unet.num_res_blocks 1 --unet.num_groups 16 --batch_size 4".split()
WAYS = {  # flags beside the network; {base} is the run of the pretrained denoiser
    "from nothing": "--optim.lr 1e-3",
    "all weights": "--optim.lr 3e-4 --run.init {base}",
    "adapters": "--optim.lr 1e-3 --run.init {base} --lora.rank 4",
    "control": "--optim.lr 2e-3 --optim.schedule constant --run.init {base} --control labels",
}
Figures = dict[str, float]


# --- data ---------------------------------------------------------------------------------------------------


def open_whole(name: str, heads: int, out: Path) -> Data:
    """The data set, with its own split by subject."""
    if name == "hippocampus":
        return open_data(DataConfig(subject="subjects.csv"), name, seed=0)
    if not (out / "heads").exists():
        write_phantoms(out / "heads", heads, size=(40, 48, 40))
    return open_data(DataConfig(root=str(out / "heads")), name, seed=0)


def divide(data: Data, volumes: int, out: Path) -> dict[str, Path]:
    """Tables of the cases to pretrain on and of the new ones, by subject, each with the validation cases."""
    names = data.split["train"]
    subjects = sorted({data.cases[name].subject for name in names})
    order = torch.randperm(len(subjects), generator=torch.Generator().manual_seed(0)).tolist()
    sorted_names = [n for i in order for n in names if data.cases[n].subject == subjects[i]]
    few, seen = sorted_names[:volumes], {data.cases[n].subject for n in sorted_names[:volumes]}
    many = [name for name in names if data.cases[name].subject not in seen]
    folders = {}
    for part, chosen in (("many", many), ("few", few)):
        rows = [(name, "train") for name in chosen] + [(name, "val") for name in data.split["val"]]
        cases = [(data.cases[n].image.resolve(), data.cases[n].mask.resolve(), p) for n, p in rows]
        folders[part] = write_cases(out / part, cases).parent
    return folders


def flags_of(folder: Path, run: Path, steps: int, validations: int = 1) -> list[str]:
    """The cases of a table, and the length of a run."""
    every = max(1, steps // validations)
    numbers = {"steps": steps, "eval_every": every, "save_every": every, "log_every": max(1, steps // 10)}
    words = ["--data.root", folder, "--data.table", "cases.csv", "--run.dir", run]
    words += [word for key, number in numbers.items() for word in (f"--run.{key}", number)]
    return list(map(str, [*words, "--optim.warmup_steps", min(30, max(1, steps // 10))]))


# --- training -----------------------------------------------------------------------------------------------


def train(args: argparse.Namespace, folders: dict[str, Path], spec: DataSpec, out: Path) -> dict[str, Path]:
    """The run folder of each row, and of the segmentation network. All have the grid of the whole data set:
    validation cases look the same to all."""
    many, few, size = folders["many"], folders["few"], ["--data.size", ",".join(map(str, spec.size))]
    labels = ["--data.num_labels", str(spec.num_labels), *size]
    train_vae.main(["phantom", *size, *flags_of(many, out / "vae", args.vae_steps)])
    runs = {"pretrained": out / "base"}
    network = [*NETWORK, "--vae", str(out / "vae"), *labels]
    train_ldm.main(["phantom", *network, *flags_of(many, runs["pretrained"], args.base_steps, 4)])
    for name, flags in WAYS.items():
        runs[name] = out / name.replace(" ", "-")
        own = flags.format(base=runs["pretrained"]).split()
        train_ldm.main(["phantom", *network, *own, *flags_of(few, runs[name], args.steps, 6)])
    runs["segment"] = out / "segment"
    plain = ["phantom", "--cdal.diffusion", "false", *labels]
    train_cdal.main([*plain, *flags_of(many, runs["segment"], args.segment_steps)])
    return runs


def num_trained(run: Path) -> float:
    """How many parameters the optimizer holds moments of."""
    state = load(step_files(run)[0])["optimizers"]["denoiser"]["optimizer"]["state"]
    return float(sum(moments["exp_avg"].numel() for moments in state.values()))


def lowest_loss(run: Path) -> float:
    return min(line["loss"] for line in read_log(run / "log.jsonl") if line["split"] == "val")


# --- scores -------------------------------------------------------------------------------------------------


def samples_of(run: Path, masks: Sequence[Tensor], path: Path, guidance: float = 1.0) -> Tensor:
    """One sample (C, *S) for each mask, which a ControlNet is asked for."""
    if not path.exists():
        pipeline = ldm3d.load(run)
        controlled = pipeline.model.denoiser.control is not None
        conditions = {"labels": list(masks)} if controlled else {}
        scale = {"labels": guidance} if guidance != 1 else 1.0
        how = {"conditions": conditions, "guidance_scale": scale, "steps": 20}
        x = pipeline.sample(len(masks), tuple(masks[0].shape), **how)
        write_atomically(path, lambda file: torch.save(x, file))
    return torch.load(path, weights_only=True)


class Judge:
    """What the fixed network and the segmentation network say of volumes."""

    def __init__(self, segment: Path, data: Data, cache: Path):
        self.segment, self.num_labels = ldm3d.load(segment), data.spec.num_labels
        real = data.dataset("train")
        self.features = whole_fidelity(real, str(cache), CPU)
        self.real = self._features([real[i, i]["image"] for i in range(len(real))])

    def _features(self, volumes: Sequence[Tensor]) -> Tensor:
        return torch.cat([self.features(x[None]) for x in volumes]).double()

    def __call__(self, volumes: Sequence[Tensor], masks: Sequence[Tensor]) -> Figures:
        rows = []
        for x, mask in zip(volumes, masks, strict=True):
            found = self.segment.segment(x, votes=1).argmax(0)
            rows.append(dice(found[None], mask[None], self.num_labels)[0])
        distance = frechet_distance(self._features(volumes), self.real)
        return {"frechet": float(distance), "dice": float(torch.stack(rows).nanmean())}


def first_cases(dataset: VolumeDataset, num: int) -> tuple[list[Tensor], list[Tensor]]:
    items = [dataset[i, i] for i in range(min(num, len(dataset)))]
    return [item["image"] for item in items], [item["mask"].clamp(min=0).long() for item in items]


def figures_of(args: argparse.Namespace, name: str) -> dict[str, Figures]:
    """All rows of one data set."""
    out = (args.out / name).resolve()
    data = open_whole(name, args.heads, out)
    runs = train(args, divide(data, args.volumes, out), data.spec, out)
    images, masks = first_cases(data.dataset("val"), args.samples)
    judge = Judge(runs.pop("segment"), data, out / "cache")
    rows = {"real": once(out / "real.json", lambda: judge(images, masks))}
    asked = {row: (run, 1.0, "") for row, run in runs.items()}
    for row, (run, guidance, name) in (asked | {"guidance 2": (runs["control"], 2.0, "-guided")}).items():

        def measure(run: Path = run, guidance: float = guidance, name: str = name) -> Figures:
            volumes = samples_of(run, masks, run / f"samples{name}.pt", guidance)
            counted = {} if run.name == "base" else {"trained": num_trained(run)}
            return {**counted, "loss": lowest_loss(run), **judge(list(volumes), masks)}

        rows[row] = once(run / f"found{name}.json", measure)
    return rows


# --- the table ----------------------------------------------------------------------------------------------

COLUMNS = {
    "trained": ("trained parameters", ",.0f"),
    "loss": ("validation loss", ".4f"),
    "frechet": ("Frechet distance", ".3f"),
    "dice": ("Dice", ".3f"),
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", nargs="+", choices=["phantom", "hippocampus"])
    parser.add_argument("--heads", type=int, default=120, help="phantoms to write")
    parser.add_argument("--volumes", type=int, default=20, help="of the new data")
    parser.add_argument("--steps", type=int, default=300, help="of training on these")
    parser.add_argument("--base_steps", type=int, default=2000, help="of the denoiser to start from")
    parser.add_argument("--vae_steps", type=int, default=1200, help="of the autoencoder")
    parser.add_argument("--segment_steps", type=int, default=300, help="of the segmentation network")
    parser.add_argument("--samples", type=int, default=24, help="of every row, at most one a validation case")
    parser.add_argument("--out", type=Path, default=Path("runs/finetuning"), help="folder of everything")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--try", dest="tiny", action="store_true", help="two steps of everything")
    args = parser.parse_args(argv)
    if args.tiny:
        args.heads, args.volumes, args.out = 16, 4, args.out / "try"
        args.steps = args.base_steps = args.vae_steps = args.segment_steps = args.samples = 2
    torch.set_num_threads(args.threads)
    lines = [("data", "denoiser", *(title for title, _ in COLUMNS.values()))]
    for name in args.data:
        for row, found in figures_of(args, name).items():
            cells = [f"{found[key]:{style}}" if key in found else "-" for key, (_, style) in COLUMNS.items()]
            lines.append((name, row, *cells))
        print(f"\n{table(lines, markdown=True)}\n", flush=True)


if __name__ == "__main__":
    main()
