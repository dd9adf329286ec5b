"""What a run tells: one JSON line per log step, always; the console; TensorBoard when asked; preview
pictures.

The JSON lines are the record: every other view (console, TensorBoard, a later report) shows what they hold.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from .config import InputError
from .distributed import is_main


class Logger:
    """Appends to ``run_dir/log.jsonl`` on rank 0; on resume the file is first cut back to the checkpoint's
    step."""

    def __init__(self, run_dir: str | Path, step: int, tensorboard: bool = False):
        self.file = self.board = None
        if not is_main():
            return
        path = Path(run_dir) / "log.jsonl"
        cut_back(path, step)
        self.file = open(path, "a")  # noqa: SIM115 (closed by close)
        self.start = time.perf_counter()
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise InputError('run.tensorboard: needs the extra "viz": pip install "ldm3d[viz]"') from None
            self.board = SummaryWriter(str(Path(run_dir) / "tensorboard"), purge_step=step + 1)

    def log(self, step: int, split: str, scalars: dict[str, Any], echo: bool = True) -> None:
        """One line: ``{"step": ..., "split": "train" | "val", "seconds": since the start, **scalars}``."""
        if self.file is None:
            return
        seconds = round(time.perf_counter() - self.start, 2)
        self.file.write(json.dumps({"step": step, "split": split, "seconds": seconds, **scalars}) + "\n")
        self.file.flush()
        if echo:
            words = "  ".join(
                f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in scalars.items()
            )
            tqdm.write(f"step {step:>7}  {split:<5}  {words}")
        if self.board is not None:
            for name, value in scalars.items():
                if isinstance(value, (int, float)):
                    self.board.add_scalar(f"{split}/{name}", value, step)
            self.board.flush()

    def picture(self, step: int, name: str, path: Path | None) -> None:
        """Show a preview that was saved as a PNG in TensorBoard too."""
        if self.board is not None and path is not None:
            import matplotlib.image

            self.board.add_image(name, matplotlib.image.imread(path)[..., :3], step, dataformats="HWC")

    def close(self) -> None:
        for target in (self.file, self.board):
            if target is not None:
                target.close()


def cut_back(path: Path, step: int) -> None:
    """Drop the lines after `step`, which a killed run wrote before it could save, and a last line that is
    torn."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError):
            continue
    path.write_text("".join(line + "\n" for line in kept))


def progress(items: Iterable, what: str, total: int | None = None, initial: int = 0) -> tqdm:
    """A tqdm bar on rank 0 of a terminal; silent elsewhere."""
    quiet = not is_main() or not sys.stderr.isatty()
    return tqdm(
        items, desc=what, total=total, initial=initial, disable=quiet, leave=False, dynamic_ncols=True
    )


def mid_slices(volume: np.ndarray) -> list[np.ndarray]:
    """A 3-D volume (D, H, W) in RAS -> its sagittal, coronal and axial middle slices, upright; (H, W) ->
    itself."""
    if volume.ndim == 2:
        return [volume]
    i, j, k = (s // 2 for s in volume.shape)
    return [np.rot90(s) for s in (volume[i], volume[:, j], volume[:, :, k])]


def tile(slices: Sequence[np.ndarray]) -> np.ndarray:
    """Slices of any size side by side, centred in the height of the tallest, a dark column between."""
    height = max(s.shape[0] for s in slices)
    columns = []
    for s in slices:
        top = (height - s.shape[0]) // 2
        columns.append(np.pad(s, ((top, height - s.shape[0] - top), (0, 2)), constant_values=np.nan))
    return np.concatenate(columns, axis=1)


def save_sheet(
    path: str | Path, rows: dict[str, Sequence[np.ndarray]], limits: tuple[float, float] | None = None
) -> Path | None:
    """A picture with one titled row per entry, every volume (*S) shown by its middle slices.

    `limits` is the grey range; None takes the 1st to 99.5th percentile of each row. Without matplotlib
    nothing is written and None is returned: pictures are a convenience and never stop a run.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    images = {title: tile([s for v in volumes for s in mid_slices(v)]) for title, volumes in rows.items()}
    width = max(i.shape[1] for i in images.values())
    height = sum(i.shape[0] for i in images.values())
    scale = min(2.5, max(0.5, 1600 / width)) / 100
    figure = Figure(
        figsize=(width * scale + 0.2, height * scale + 0.3 * len(images)), dpi=100, facecolor="black"
    )
    axes = figure.subplots(
        len(images), 1, squeeze=False, gridspec_kw={"height_ratios": [i.shape[0] for i in images.values()]}
    )
    for ax, (title, image) in zip(axes[:, 0], images.items(), strict=True):
        low, high = limits or np.nanpercentile(image, [1, 99.5])
        ax.imshow(image, cmap="gray", vmin=low, vmax=max(high, low + 1e-6), interpolation="nearest")
        ax.set_title(title, color="white", fontsize=9, loc="left", pad=3)
        ax.axis("off")
    figure.subplots_adjust(
        left=0.005, right=0.995, bottom=0.005, top=1 - 0.25 / figure.get_figheight(), hspace=0.15
    )
    FigureCanvasAgg(figure).print_png(str(path))
    return Path(path)
