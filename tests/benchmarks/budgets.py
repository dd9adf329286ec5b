"""Work in given minutes: pieces that are done once, and the steps of a training that fit into a time."""

from __future__ import annotations

import contextlib
import io
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from ldm3d.config import parse
from ldm3d.engine.checkpoint import write_text
from ldm3d.plan import seconds_per_step


def once(path: Path, make: Callable[[], Any]) -> Any:
    """The content of a JSON file; where there is none, make(), which is then kept there."""
    if not path.exists():
        made = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(made))
    return json.loads(path.read_text())


@contextlib.contextmanager
def measured_in_cpu_seconds() -> Any:
    """Within the block the library's own measurements count this process's CPU seconds. Other jobs on the
    machine do not lengthen these; on one thread of an idle machine they are seconds."""
    with mock.patch.object(time, "perf_counter", time.process_time):
        yield


def read_config(script: Any, words: list[str]) -> Any:
    """The settings that these words of a training script mean."""
    base = getattr(script, "with_data", None) or script.with_autoencoder
    return parse(script.Config, words, script.PRESETS, base=base)[0]


def seconds_of_step(script: Any, words: list[str]) -> float:
    """How long a step of a training takes, measured as a plan measures it. words: those of its command."""
    with contextlib.redirect_stdout(io.StringIO()):
        config = read_config(script, words)
        data, whole_step = None, {}
        if script.__name__ == "train_vae":
            data = script.open_volumes(config)
        elif script.__name__ == "train_cdal":
            data, whole_step = script.open_labelled(config), {"own_estimate": True}
        return seconds_per_step(script.memory_table(config, **whole_step), config, torch.device("cpu"), data)


def words_of_length(script: Any, preset: str, steps: int, validations: int = 1) -> list[str]:
    """The words that give a preset another number of steps: a warm-up of at most a tenth of them, and so many
    validations, the last one at the end."""
    every = max(1, -(-steps // validations))
    counted = {"run.steps": steps, "run.eval_every": every, "run.save_every": steps}
    counted["optim.warmup_steps"] = min(script.PRESETS[preset]["optim.warmup_steps"], max(1, steps // 10))
    return [word for key, value in counted.items() for word in (f"--{key}", str(value))]
