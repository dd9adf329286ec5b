"""What can be seen of a run: the log, the console, TensorBoard, progress bars, preview pictures.

log.jsonl is the record, one JSON object a line. Console, TensorBoard and the report of a run show the same
numbers.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..config import InputError
from .checkpoint import write_text
from .distributed import is_main


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of log.jsonl; none if there is no such file. A line that is torn or damaged is left out: a
    run at work may have written only half of the last one."""
    try:
        found = path.read_bytes().split(b"\n") if path.exists() else []
    except OSError as e:
        raise InputError(f"{path}: {e.strerror}") from None
    lines = []
    for text in found:
        try:
            line = json.loads(text)
            whole = isinstance(line["step"], int) and math.isfinite(line["seconds"])
            lines += [line] if whole and "split" in line else []
        except (ValueError, KeyError, TypeError, RecursionError):  # bytes that are no text are a ValueError
            continue
    return lines


WIDTH = 110  # columns of a line on the console
COST = ("lr", "grad_norm", "skipped_steps", "samples_per_s", "data_wait", "peak_gib")  # no losses


def duration(seconds: float) -> str:
    """ "3 d 04 h", "1 h 02 min", "3 min 20 s" or "12 s"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, left = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24} d {hours % 24:02} h"
    return f"{hours} h {left:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def plural(num: int, noun: str) -> str:
    """ "1 case", "3 cases"."""
    return f"{num} {noun}{'s' * (num != 1)}"


def say(text: str) -> None:
    """Print above the bars, at once. A standard output that is a file, as batch systems make it, would
    otherwise be written in blocks of some hundred lines."""
    tqdm.write(text)
    sys.stdout.flush()


def console_line(
    step: int,
    steps: int,
    part: str,
    scalars: dict[str, Any],
    shown: Sequence[str] = (),
    left: float | None = None,
) -> str:
    """What a person wants to know of one line of the log: step, losses, speed, and the time left (seconds).

    The figures named in `shown` come first, then as many others as there is room for. The figures of single
    noise levels (loss_u0.2) are in log.jsonl only. Skipped steps and waiting for data are shown where they
    are trouble.
    """
    first = [f"step {step:>{len(str(steps))}} of {steps}  {part:<5}"]
    last = [f"{scalars['samples_per_s']:.3g} samples/s"] if "samples_per_s" in scalars else []
    if scalars.get("skipped_steps"):
        last.insert(0, f"skipped steps {scalars['skipped_steps']}")
    if scalars.get("data_wait", 0) > 0.3:
        last.insert(0, f"waiting for data {scalars['data_wait']:.0%}")
    last += [] if left is None else [f"left {duration(left)}"]
    names = [name for name in scalars if name not in COST and "_u0." not in name]
    names.sort(key=lambda name: shown.index(name) if name in shown else len(shown))
    for name in names + ["lr"] * ("lr" in scalars):
        value = scalars[name]
        word = f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        if len("  ".join([*first, word, *last])) <= WIDTH:
            first.append(word)
    return "  ".join(first + last)


class Logger:
    """Appends to ``run_dir/log.jsonl`` on rank 0, after cutting the file back to `step`, where the run is.

    steps: of the whole run. shown: the figures that come first on the console.
    """

    def __init__(
        self,
        run_dir: str | Path,
        step: int,
        tensorboard: bool = False,
        steps: int = 0,
        shown: Sequence[str] = ("loss",),
    ):
        self.steps, self.shown = steps, shown
        self.path, self.file, self.board = Path(run_dir) / "log.jsonl", None, None
        if not is_main():
            return
        with self._writing():
            self.start = time.perf_counter() - cut_back(self.path, step)
            self.file = open(self.path, "a")  # noqa: SIM115 (closed by close)
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise InputError('run.tensorboard: needs the extra "viz": pip install "ldm3d[viz]"') from None
            self.board = SummaryWriter(str(Path(run_dir) / "tensorboard"), purge_step=step + 1)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """A log that cannot be written ends the run: training without a record is of no use."""
        try:
            yield
        except OSError as e:
            raise InputError(
                f"{self.path.parent}: the log cannot be written ({e.strerror or e}); the checkpoints are "
                "intact: make room, then run the same command again"
            ) from None

    def log(self, step: int, split: str, scalars: dict[str, Any], left: float | None = None) -> None:
        """One line: ``{"step": ..., "split": "train" | "val", "seconds": of training, **scalars}``, and a
        short one on the console. left: seconds until the run ends.

        A number that is not finite is written as null, since JSON has no other word.
        """
        if self.file is None:
            return
        line = {"step": step, "split": split, "seconds": round(time.perf_counter() - self.start, 2)}
        line |= {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in scalars.items()}
        with self._writing():
            self.file.write(json.dumps(line, allow_nan=False) + "\n")
            self.file.flush()
        say(console_line(step, self.steps, split, scalars, self.shown, left))
        if self.board is not None:
            with self._writing():
                for name, value in scalars.items():
                    if isinstance(value, (int, float)):
                        self.board.add_scalar(f"{split}/{name}", value, step)
                self.board.flush()

    def picture(self, step: int, name: str, path: Path | None) -> None:
        """Show a preview, saved as a PNG before, in TensorBoard too."""
        if self.board is not None and path is not None:
            import matplotlib.image

            with self._writing():
                self.board.add_image(name, matplotlib.image.imread(path)[..., :3], step, dataformats="HWC")

    def histogram(self, step: int, name: str, values: Tensor) -> None:
        """Show the distribution of latents (B, C_z, *s) in TensorBoard, channel by channel."""
        if self.board is not None:
            with self._writing():
                for c, channel in enumerate(values.float().cpu().unbind(1)):
                    self.board.add_histogram(f"{name}/channel {c}", channel.numpy(), step)

    def close(self) -> None:
        for target in (self.file, self.board):
            if target is not None:
                with self._writing():
                    target.close()


def cut_back(path: Path, step: int) -> float:
    """Drop the lines after `step`, which a killed run wrote before it could save, and lines that are torn.

    Returns the seconds of training at the last line kept. Atomic: another kill must not cost the log.
    """
    if not path.exists():
        return 0.0
    kept = [line for line in read_log(path) if line["step"] <= step]
    write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
    return kept[-1]["seconds"] if kept else 0.0


class Profile:
    """--run.profile: three steps under torch.profiler, after three steps of warm-up. A trace for
    chrome://tracing or Perfetto is written to `folder`, the ten slowest operators are printed."""

    SKIP, STEPS = 3, 3

    def __init__(self, folder: Path):
        self.path, self.count = folder / "profile.json", 0
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self.profiler = torch.profiler.profile(activities=activities, record_shapes=True, profile_memory=True)

    def step(self) -> None:
        """Call after every step."""
        self.count += 1
        if self.count == self.SKIP:
            self.profiler.start()
        elif self.count == self.SKIP + self.STEPS:
            self._report()

    def close(self) -> None:
        """The run ends: report the steps that were profiled."""
        if self.SKIP < self.count < self.SKIP + self.STEPS:
            self._report()
        elif self.count <= self.SKIP:
            say(f"note: run.profile: a run of {self.count} steps is too short to profile")

    def _report(self) -> None:
        self.profiler.stop()
        order = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = self.profiler.key_averages().table(sort_by=order, row_limit=10, max_name_column_width=40)
        try:
            self.profiler.export_chrome_trace(str(self.path))
            say(f"{table}\nprofile of {self.count - self.SKIP} steps: {self.path}")
        except (OSError, RuntimeError) as e:
            say(f"{table}\nnote: {self.path} could not be written ({e})")


SAY_EVERY = 30.0  # seconds between two lines about long work, where no terminal shows a bar


def said(items: Iterable, what: str, total: int | None) -> Iterator:
    """The items; from time to time a line says how many are done, and how long the others will take."""
    began = last = time.monotonic()
    for done, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now - last >= SAY_EVERY and total is not None and done < total:
            left = duration((now - began) / done * (total - done))
            say(f"{what}: {done} of {total}, {left} left")
            last = now


def progress(
    items: Iterable, what: str, total: int | None = None, initial: int = 0, lines: bool = True
) -> tqdm:
    """The items, under a progress bar on rank 0 where stderr is a terminal. Elsewhere rank 0 prints a line
    every 30 s, if `lines`; quick work and other ranks are silent."""
    total = len(items) if total is None and hasattr(items, "__len__") else total
    quiet = not is_main() or not sys.stderr.isatty()
    if quiet and is_main() and lines:
        items = said(items, what, total)
    return tqdm(
        items, desc=what, total=total, initial=initial, disable=quiet, leave=False, dynamic_ncols=True
    )


def mid_slices(volume: np.ndarray) -> list[np.ndarray]:
    """A 3-D volume (D, H, W) in RAS -> its sagittal, coronal and axial middle slices, upright; a slice (H, W)
    or a coloured one, uint8 (H, W, 3) -> itself."""
    if volume.ndim == 2 or volume.dtype == np.uint8:
        return [volume]
    i, j, k = (s // 2 for s in volume.shape)
    return [np.rot90(s) for s in (volume[i], volume[:, j], volume[:, :, k])]


def visible(x: Tensor, display: tuple[float, float]) -> np.ndarray:
    """What a sheet shows of an image (C, *S): three channels in 2-D as colours, uint8 (H, W, 3); else the
    first channel (*S). display: the intensities that are black and white in colours."""
    x = x.detach().float().cpu()
    if x.ndim != 3 or len(x) != 3:
        return x[0].numpy()
    black, white = display
    levels = ((x - black) / (white - black)).clamp(0, 1) * 255
    return levels.round().to(torch.uint8).movedim(0, -1).numpy()


def visible_slices(x: Tensor, display: tuple[float, float]) -> list[np.ndarray]:
    """The middle slices of an image (C, *S) as a sheet shows them: copies, so that the image need not live
    until the sheet is drawn."""
    return [np.array(part) for part in mid_slices(visible(x, display))]


def tile(slices: Sequence[np.ndarray]) -> np.ndarray:
    """Slices of any size side by side, centred in the height of the tallest, a dark column between."""
    height = max(s.shape[0] for s in slices)
    columns = []
    for s in slices:
        top, dark = (height - s.shape[0]) // 2, 0 if s.dtype == np.uint8 else np.nan
        edges = [(top, height - s.shape[0] - top), (0, 2), (0, 0)][: s.ndim]
        columns.append(np.pad(s, edges, constant_values=dark))
    return np.concatenate(columns, axis=1)


def new_figure(**options: Any) -> Any:
    """An empty matplotlib figure that needs no screen; None where matplotlib (extra viz) is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(**options)
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Any, path: str | Path) -> Path | None:
    """Write a figure of `new_figure` as PNG. On a full disk None is returned: pictures never stop a run."""
    try:
        figure.canvas.print_png(str(path))
    except OSError as e:
        say(f"note: {path} could not be written ({e.strerror or e})")
        return None
    return Path(path)


def save_sheet(
    path: str | Path, rows: dict[str, Sequence[np.ndarray]], limits: tuple[float, float] | None = None
) -> Path | None:
    """A picture with one titled row per entry, every volume (*S) shown by its middle slices, every slice as
    it is.

    `limits` is the grey range; None takes the 1st to 99.5th percentile of each row. Without matplotlib, or
    room on the disk, nothing is written and None is returned: pictures never stop a run.
    """
    figure = new_figure(dpi=100, facecolor="black")
    if figure is None:
        return None
    images = {title: tile([s for v in volumes for s in mid_slices(v)]) for title, volumes in rows.items()}
    width = max(i.shape[1] for i in images.values())
    height = sum(i.shape[0] for i in images.values())
    scale = min(2.5, max(0.5, 1600 / width)) / 100
    figure.set_size_inches(width * scale + 0.2, height * scale + 0.3 * len(images))
    axes = figure.subplots(
        len(images), 1, squeeze=False, gridspec_kw={"height_ratios": [i.shape[0] for i in images.values()]}
    )
    for ax, (title, image) in zip(axes[:, 0], images.items(), strict=True):
        low, high = limits or np.nanpercentile(image, [1, 99.5])
        ax.imshow(image, cmap="gray", vmin=low, vmax=max(high, low + 1e-6), interpolation="nearest")
        ax.set_title(title, color="white", fontsize=9, loc="left", pad=3, y=1)
        ax.axis("off")
    figure.subplots_adjust(
        left=0.005, right=0.995, bottom=0.005, top=1 - 0.25 / figure.get_figheight(), hspace=0.15
    )
    return save_figure(figure, path)
