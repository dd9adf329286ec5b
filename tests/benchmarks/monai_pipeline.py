"""An autoencoder trained by MONAI goes on here, and back: the table in README.md, in this folder.

    python tests/benchmarks/monai_pipeline.py                       # about 4 CPU minutes
    python tests/benchmarks/monai_pipeline.py --steps 2 --cases 1   a try

1. MONAI's AutoencoderKL learns the hippocampus data (looked for in $LDM3D_DATA, else data/): L1 and KL, Adam,
   intensities from 0 to 1, a loop as in MONAI's tutorials.
2. `ldm3d.interop import` makes a run folder of its weights.
3. train_vae.py --run.init goes on from there, for as many steps.
4. `ldm3d.interop export` makes a MONAI bundle, whose network MONAI's own parser makes and loads.

Columns: PSNR and SSIM of whole validation cases, whose subjects no step has seen, reconstructed from the mean
of the latent, on intensities from -1 to 1; and the largest difference to the reconstructions of the row
above, as a share of the largest value. Stopped and started again it goes on where it was.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

from budgets import once  # noqa: E402

import ldm3d  # noqa: E402
import train_vae  # noqa: E402
from ldm3d.config import show  # noqa: E402
from ldm3d.data import Data, DataConfig, batches, open_data  # noqa: E402
from ldm3d.engine.checkpoint import write_atomically  # noqa: E402
from ldm3d.evaluation.results import table  # noqa: E402
from ldm3d.interop.exporting import ExportConfig, export_run  # noqa: E402
from ldm3d.interop.importing import ImportConfig, import_file  # noqa: E402
from ldm3d.metrics import psnr, ssim  # noqa: E402

ARCHITECTURE: dict[str, Any] = {  # of MONAI's AutoencoderKL
    "spatial_dims": 3,
    "in_channels": 1,
    "out_channels": 1,
    "channels": (16, 32, 32),
    "num_res_blocks": (1, 1, 1),
    "attention_levels": (False, False, False),
    "latent_channels": 8,
    "norm_num_groups": 16,
    "with_encoder_nonlocal_attn": False,
    "with_decoder_nonlocal_attn": False,
}
GROUPS = ARCHITECTURE["norm_num_groups"]
SIZE = 44, 60, 48  # the largest case, in multiples of 4, which MONAI wants
DATA = DataConfig(subject="subjects.csv", size=SIZE, patch=(32, 32, 32))
KL_WEIGHT = 1e-3  # of the KL in nats per latent element
LR = 5e-4
Reconstruct = Callable[[Tensor], Tensor]  # (1, 1, *S) from -1 to 1 -> the same


def train_monai(path: Path, data: Data, steps: int) -> None:
    """Train MONAI's network and store its state, as its users do."""
    from monai.networks.nets import AutoencoderKL

    torch.manual_seed(0)
    net = AutoencoderKL(**ARCHITECTURE)
    optimizer = torch.optim.Adam(net.parameters(), lr=LR)
    for step, (batch,) in enumerate(batches(data.dataset("train", augment=True), 2, 2, 0, 0, steps), start=1):
        x = (batch["image"] + 1) / 2
        recon, mu, sigma = net(x)
        kl = 0.5 * (mu.square() + sigma.square() - sigma.square().log() - 1).mean()
        loss = (recon - x).abs().mean() + KL_WEIGHT * kl
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            print(f"MONAI: step {step} of {steps}, loss {loss.item():.4f}", flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: torch.save(net.state_dict(), file))


def fine_tune(start: Path, run: Path, steps: int) -> None:
    """Go on with train_vae.py from the run folder `start`, on the same data."""
    settings = {
        "run.init": start,
        "run.dir": run,
        "run.steps": steps,
        "run.eval_every": steps,
        "run.save_every": max(1, steps // 4),
        "run.ema_decay": 0.98,
        "optim.lr": LR,
        "optim.warmup_steps": min(20, max(1, steps // 10)),
        "data.patch": show(DATA.patch),
    }
    words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    train_vae.main(["hippocampus", *words])


def of_monai(net: nn.Module) -> Reconstruct:
    """MONAI's network between its own range of intensities and ours."""
    net = net.eval()
    return lambda x: net.decode(net.encode((x + 1) / 2)[0]) * 2 - 1


def trained_by_monai(path: Path) -> Reconstruct:
    from monai.networks.nets import AutoencoderKL

    net = AutoencoderKL(**ARCHITECTURE)
    net.load_state_dict(torch.load(path, weights_only=True))
    return of_monai(net)


def exported(bundle: Path) -> Reconstruct:
    """The network of a bundle, made and loaded by MONAI's parser."""
    from monai.bundle import ConfigParser

    parser = ConfigParser()
    parser.read_config(bundle / "configs" / "inference.json")
    parser["bundle_root"], parser["device"] = str(bundle), torch.device("cpu")
    parser.get_parsed_content("load_autoencoder")
    return of_monai(parser.get_parsed_content("autoencoder"))


def opened(run: Path) -> Reconstruct:
    """The network of a run folder."""
    pipeline = ldm3d.load(run)
    return lambda x: pipeline.reconstruct(x[0])[None]


@torch.inference_mode()
def compare(ways: dict[str, Reconstruct], data: Data, cases: int) -> dict[str, dict[str, float]]:
    """PSNR, SSIM and the difference to the way before, of each way to reconstruct the validation cases."""
    rows: dict[str, dict[str, list[float]]] = {name: {"psnr": [], "ssim": [], "error": []} for name in ways}
    dataset = data.dataset("val")
    for i in range(min(cases, len(dataset))):
        x, before = dataset[i, i]["image"][None], None
        for name, reconstruct in ways.items():
            recon = reconstruct(x)
            rows[name]["psnr"].append(psnr(recon, x, data_range=2.0).item())
            rows[name]["ssim"].append(ssim(recon, x, data_range=2.0).item())
            error = (recon - before).abs().max() / before.abs().max() if before is not None else torch.nan
            rows[name]["error"].append(float(error))
            before = recon
    means = {n: {k: sum(v) / len(v) for k, v in row.items()} for n, row in rows.items()}
    return {name: means[name] | {"error": max(row["error"])} for name, row in rows.items()}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=400, help="of MONAI's training, and again of ours")
    parser.add_argument("--cases", type=int, default=21, help="of validation, at most")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--out", type=Path, default=Path("runs/monai-pipeline"), help="folder of everything")
    args = parser.parse_args(argv)
    if importlib.util.find_spec("monai") is None:
        print("MONAI is not installed: no peer (pip install -e '.[test]')")
        return
    torch.set_num_threads(args.threads)
    out, data = args.out / str(args.steps), open_data(DATA, "hippocampus", seed=0)
    weights, theirs, ours, bundle = (out / name for name in ("monai.pt", "imported", "tuned", "bundle"))
    if not weights.exists():
        train_monai(weights, data, args.steps)
    if not (theirs / "best.pt").exists():
        settings = {"num_groups": GROUPS, "size": data.spec.size, "check": True}
        import_file(ImportConfig(to=str(theirs), **settings), str(weights))
    fine_tune(theirs, ours, args.steps)
    if not bundle.exists():
        export_run(ExportConfig(as_="monai", to=str(bundle)), str(ours))
    makers = {
        "trained by MONAI": (trained_by_monai, weights),
        "imported": (opened, theirs),
        "fine-tuned here": (opened, ours),
        "exported, in MONAI": (exported, bundle),
    }
    ways = {name: make(path) for name, (make, path) in makers.items()}
    found = once(out / f"found-{args.cases}.json", lambda: compare(ways, data, args.cases))
    lines = [("autoencoder", "PSNR, dB", "SSIM", "difference to the row above")]
    for name, row in found.items():
        error = "-" if row["error"] != row["error"] else f"{row['error']:.1e}"
        lines.append((name, f"{row['psnr']:.2f}", f"{row['ssim']:.4f}", error))
    print(f"\n{table(lines, markdown=True)}\n", flush=True)


if __name__ == "__main__":
    main()
