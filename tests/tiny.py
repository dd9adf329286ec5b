"""Tiny runs for tests: every kind of training, flags, commands, and what a run left behind."""

import contextlib
import csv
import importlib
import itertools
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from ldm3d.engine.checkpoint import load, step_files
from ldm3d.engine.distributed import setup
from ldm3d.losses import VGG16

ROOT = Path(__file__).parents[1]
RUN = """--run.eval_every 10 --run.save_every 5 --run.log_every 1 --run.ema_decay 0.9 --optim.warmup_steps 0
 --optim.schedule constant""".split()
VAE = """--batch_size 4 --data.dims 2 --data.val_fraction 0.2 --data.patch none --vae.dims 2
 --vae.channels 8,16 --vae.num_groups 4 --vae.num_res_blocks 1 --vae.stem 2 --vae.latent_channels 3
 --optim.lr 2e-3""".split()
LDM = """--batch_size 4 --unet.channels 8,16 --unet.num_groups 4 --unet.num_res_blocks 1
 --unet.head_channels 8 --unet.attention_levels false,true --sample_steps 2 --optim.lr 2e-3""".split()

CDAL = """--batch_size 4 --data.dims 2 --data.val_fraction 0.2 --data.patch 12,12 --data.foreground 0.5
 --unet.channels 8,16 --unet.num_groups 4 --unet.head_channels 8 --generator.encoder_channels 8
 --generator.encoder_blocks 1 --generator.latent_dim 4 --generator.mapping_layers 1 --disc.channels 8,16
 --disc.emb_dim 8 --cdal.adversarial_weight 0.1 --cdal.attention loss --cdal.r1_every 2 --optim.lr 4e-3
 --data.augment.affine 0.5""".split()

BOUND = """--anatomy.registers bound --anatomy.dim 16 --anatomy.head_width 8
 --unet.attention_levels true""".split()


DISCRIMINATOR = """--disc_weight 0.1 --feature_weight 0.1 --disc_start 2 --disc_ramp 1 --disc.channels 4
 --disc.num_layers 1 --r1_weight 1 --r1_every 2 --disc_optim.lr 1e-3 --structure_weight 0.1""".split()
KL = "--kl_warmup 5 --free_bits 0.01".split()
CODEBOOK = "--autoencoder vq --quantizer.codebook_size 16".split()
CONDITIONS = "--condition.use class,text,labels --condition.context_dim 16 --condition.dropout 0.2".split()
EVERY_CONDITION = """--condition.use class,text,number:age,spacing,image,labels,tokens,embedding:report
 --condition.context_dim 16 --condition.dropout 0.2 --condition.text_layers 1""".split()

KINDS: dict[str, tuple[str, list[str]]] = {  # every kind of training: the script, and flags beside the usual
    "KL autoencoder": ("train_vae", []),
    "KL autoencoder, discriminator": ("train_vae", [*KL, *DISCRIMINATOR]),
    "codebook, discriminator": ("train_vae", [*CODEBOOK, *DISCRIMINATOR]),
    "denoiser": ("train_ldm", []),
    "denoiser, conditions, registers": ("train_ldm", [*CONDITIONS, *BOUND]),
    "segmentation, discriminator": ("train_cdal", []),
}
MEASURED = {"seconds", "samples_per_s", "data_wait", "peak_gib"}  # in a log: what no two runs have alike
HAS_DISCRIMINATOR = [kind for kind in KINDS if "discriminator" in kind]


def vae_flags(heads: Path, run: Path, steps: int, *more: str) -> list[str]:
    """train_vae.py on the 2-D heads of the fixture `heads`."""
    place = ["--data.root", heads, "--data.cache_dir", heads.parent / "cache", "--run.dir", run]
    return ["phantom", *map(str, [*place, "--run.steps", steps, *RUN, *VAE, *more])]


def ldm_flags(vae: Path, run: Path, steps: int, *more: str) -> list[str]:
    """train_ldm.py on an autoencoder of `vae_flags`."""
    return ["phantom", *map(str, ["--vae", vae, "--run.dir", run, "--run.steps", steps, *RUN, *LDM, *more])]


def cdal_flags(heads: Path, run: Path, steps: int, *more: str) -> list[str]:
    """train_cdal.py on the 2-D heads of the fixture `heads`, with a discriminator."""
    place = ["--data.root", heads, "--data.cache_dir", heads.parent / "cache", "--run.dir", run]
    return ["phantom", *map(str, [*place, "--run.steps", steps, *RUN, *CDAL, *more])]


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a table, by the names of its columns."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def lines(run: Path, split: str = "train") -> list[dict]:
    """The log lines of one kind."""
    found = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line for line in found if line["split"] == split]


def vgg_weights(path: Path) -> Path:
    """Write the weights of a VGG-16 with two to four channels, for --perceptual.weights."""
    torch.manual_seed(0)
    widths, content = [3, *([2] * 2), *([3] * 2), *([4] * 3), *([4] * 3), *([4] * 3)], {}
    for index, (a, b) in zip(sum(VGG16, ()), itertools.pairwise(widths), strict=True):
        content[f"features.{index}.weight"] = torch.randn(b, a, 3, 3)
        content[f"features.{index}.bias"] = torch.zeros(b)
    torch.save(content, path)
    return path


def command_of(kind: str, heads: Path, vae: Path, run: Path, steps: int, *more: object) -> list[str]:
    """A script and its flags for one of the KINDS, on the fixtures `heads` and `vae_run`."""
    script, flags = KINDS[kind]
    make = {"train_vae": vae_flags, "train_ldm": ldm_flags, "train_cdal": cdal_flags}[script]
    return [str(ROOT / f"{script}.py"), *make(vae if make is ldm_flags else heads, run, steps, *flags, *more)]


def train(script: str, *flags: str) -> None:
    """Run a command of `command_of` in this process."""
    importlib.import_module(Path(script).stem).main(list(flags))


def assert_equal(a: object, b: object, where: str = "") -> None:
    """Nested dicts, lists and tensors, bit for bit."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (v, w) in enumerate(zip(a, b, strict=True)):
            assert_equal(v, w, f"{where}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b or a != a, where


def assert_same_end(one: Path, other: Path) -> None:
    """The newest checkpoints of two runs, and all numbers in their logs but for time and memory."""
    a, b = (load(step_files(run)[0]) for run in (one, other))
    for part in a.keys() - {"config"}:
        assert_equal(a[part], b[part], part)
    for split in ("train", "val"):
        logs = [
            [{k: v for k, v in line.items() if k not in MEASURED} for line in lines(run, split)]
            for run in (one, other)
        ]
        assert_equal(*logs, split)


def start(*arguments: object, **more: object) -> subprocess.Popen:
    """A Python process on one thread, its output in pipes."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *map(str, arguments)], env=env, **pipes, **more)


def torchrun(*arguments: object, ranks: int = 2, port: int = 0, **more: object) -> subprocess.Popen:
    """A script on several ranks of this machine."""
    rendezvous = ["--master_port", 33000 + (os.getpid() + port) % 2000]
    # torchrun takes flags that begin like its own, such as --num, for them: hence the two dashes
    return start(
        "-m", "torch.distributed.run", "--nproc_per_node", ranks, *rendezvous, "--", *arguments, **more
    )


def be_rank(number: int, port: int, work: Callable[..., None], arguments: tuple) -> None:
    """Be rank `number` of two, on one thread, for one piece of work, with which the process ends."""
    os.environ |= {"RANK": str(number), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    setup("cpu")
    work(*arguments)
    torch.distributed.destroy_process_group()
    os._exit(0)  # as run_script does: threads of gloo may abort a process whose work is done


def on_two_ranks(work: Callable[..., None], *arguments: object) -> list[int | None]:
    """Call work(*arguments) as rank 0 and as rank 1 of a process group; returns the exit codes of both.

    Both are forks of this process, so they have its imports and its patches: seconds sooner than torchrun.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=be_rank, args=(number, port, work, arguments)) for number in (0, 1)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=100)
        process.kill()
    return [process.exitcode for process in ranks]


def descendants(pid: int) -> list[int]:
    """The processes that a process has started, and those that they have (Linux)."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found = [pid]
    for parent in found:
        found += [child for child, its_parent in parents.items() if its_parent == parent]
    return found[1:]


def kill_all(process: subprocess.Popen) -> None:
    """SIGKILL for the process and its descendants: torchrun's ranks would outlive it."""
    for pid in [process.pid, *descendants(process.pid)]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.communicate()
