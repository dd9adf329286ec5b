"""The guides tell the truth about the tree: every command in them and in docstrings is one that its program
accepts, every link leads somewhere, every file they name exists. No command is run."""

import argparse
import ast
import importlib
import itertools
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import sample
import train_cdal
import train_ldm
import train_vae
from ldm3d.config import InputError, Parser, add_options, convert, leaf_types, parse, read_command, run_task
from ldm3d.engine import training

ROOT = Path(__file__).parents[1]
TRAINING = {"train_vae.py": train_vae, "train_ldm.py": train_ldm, "train_cdal.py": train_cdal}
MORE_FLAGS = {
    "--vae": train_vae,
    "--ldm": train_ldm,
    "--cdal": train_cdal,
}  # of benchmarks, which hand them on
PROGRAM = r"(?:\b(?:python|torchrun)|(?<=`)(?:train_\w+|sample)\.py)\s[^`]*"


GUIDES = [ROOT / "README.md", *ROOT.glob("ldm3d/**/README.md"), *ROOT.glob("tests/**/README.md")]


def texts() -> Iterator[tuple[str, str]]:
    """(name, text) of every guide and of every module's docstring."""
    for path in GUIDES:
        yield str(path.relative_to(ROOT)), path.read_text()
    for path in [*ROOT.glob("*.py"), *ROOT.glob("ldm3d/**/*.py"), *ROOT.glob("tests/benchmarks/*.py")]:
        yield str(path.relative_to(ROOT)), ast.get_docstring(ast.parse(path.read_text())) or ""


def commands(text: str) -> Iterator[str]:
    """The command lines in a text. Three spaces or a # end a command, and what follows explains it."""
    text = re.sub(r"\\\n\s*", "", text)
    for line in text.splitlines():
        for part in re.findall(PROGRAM, line):
            for command in part.split(" && "):
                command = re.split(r"\s{3,}|\s+#\s", command)[0].strip(" .,;:)")
                if re.search(r"\.py\b|-m ldm3d\.\w+ \w", command) and "--help" not in command:
                    yield command


LISTED = sorted({(command, name) for name, text in texts() for command in commands(text)})


def check(words: list[str]) -> None:
    """Read the words as the program would; InputError or SystemExit where it would refuse them."""
    ranks = 1
    if words[0] == "torchrun":
        given = dict(itertools.pairwise(words))
        ranks = int(given.get("--nnodes", 1)) * int(given["--nproc_per_node"])
        words = words[next(i for i, word in enumerate(words) if word.endswith(".py")) :]
    elif words[0] == "python":
        words = words[1:]
    program, arguments = words[0], words[1:]
    if program == "-m":
        check_door(importlib.import_module(f"{arguments[0]}.__main__"), arguments[1:])
    elif program in TRAINING:
        check_training(TRAINING[program], arguments, ranks)
    elif program == "sample.py":
        check_sample(arguments)
    else:
        assert (ROOT / program).is_file(), program
        check_benchmark(Path(program), arguments)


def check_training(script, arguments: list[str], ranks: int = 1) -> None:
    arguments = [*arguments]
    if re.fullmatch(r"FOLDER|runs/\w+-\w+", arguments[0]):  # any folder: the settings are planned
        arguments[0] = str(ROOT)
    config, _ = parse(script.Config, arguments, script.PRESETS, planner=lambda *_: {"preset": "folder"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "world_size", lambda: ranks)
        training.samples_per_forward(config.batch_size, config.micro_batch_size)


def check_flags(config: type, arguments: list[str]) -> None:
    """Flags without a preset, whose values may fit each other only with the benchmark's own."""
    parser, types = Parser(), leaf_types(config)
    add_options(parser, config, config())
    for key, value in vars(parser.parse(arguments)).items():
        convert(value, types[key], key)


def check_door(door, arguments: list[str]) -> None:
    """A door hands its tasks to run_task: here each does nothing once its command line is read."""

    def read_only(tasks, argv, *more) -> None:
        run_task({n: (c, places, lambda *_: None) for n, (c, places, _) in tasks.items()}, argv, *more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(door, "run_task", read_only)
        door.main(arguments)


def check_sample(arguments: list[str]) -> None:
    """The run's name, such as runs/vae-mine, says its kind; any other, such as RUN, is of train_ldm.py."""
    path = Path(arguments[0])
    kind = "vae" if path.name == "autoencoder.pt" else path.name.split("-")[0]
    config, places, _ = sample.PROGRAMS[kind if kind in sample.PROGRAMS else "ldm"]
    read_command(config, places, arguments, "sample.py", "")


class Accepted(Exception):
    """The command line was read without a fault."""


def check_benchmark(script: Path, arguments: list[str]) -> None:
    original = argparse.ArgumentParser.parse_args

    def read_only(self, args=None, namespace=None):
        original(self, args, namespace)
        raise Accepted

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / script.parent))
        patch.setattr(argparse.ArgumentParser, "parse_args", read_only)
        patch.setattr(sys, "argv", [str(script), *arguments])
        with pytest.raises(Accepted):
            importlib.import_module(script.stem).main()
    for flag, value in itertools.pairwise(arguments):
        if flag in MORE_FLAGS:
            check_flags(MORE_FLAGS[flag].Config, shlex.split(value))


@pytest.mark.parametrize(("command", "name"), LISTED)
def test_a_command_of_the_guides_is_one_that_its_program_accepts(command, name):
    check(shlex.split(command))


def test_every_program_and_task_is_shown_somewhere():
    shown = {command.split(" ", 1)[1] for command, _ in LISTED}
    programs = [*TRAINING, "sample.py"]
    tasks = ("reconstruct", "samples", "compare", "copies", "raters")
    programs += [f"-m ldm3d.evaluation {task}" for task in tasks]
    programs += [f"-m ldm3d.reports {task}" for task in ("run", "latents", "registers")]
    programs += [f"-m ldm3d.interop {task}" for task in ("import", "export")]
    programs += [
        f"tests/benchmarks/{p.name}"
        for p in (ROOT / "tests/benchmarks").glob("*.py")
        if "main(" in p.read_text()
    ]
    for program in programs:
        assert any(words.startswith(program) for words in shown), program


@pytest.mark.parametrize(
    "command",
    [
        "python train_vae.py phantoms",
        "python train_vae.py phantom --disk_weight 1",
        "torchrun --nproc_per_node 2 train_ldm.py phantom --run.steps many",
        "torchrun --nnodes 2 --nproc_per_node 4 train_vae.py brats-32g --batch_size 4",
        "python -m ldm3d.evaluation fidelity GENERATED REAL",
        "python -m ldm3d.reports run",
        "python tests/benchmarks/segmentation.py hippocampus --hours 2",
        'python tests/benchmarks/classes.py --ldm "--run.step 3"',
    ],
)
def test_a_wrong_command_is_found(command, capsys):
    with pytest.raises((InputError, SystemExit)):
        check(shlex.split(command))


# --- links and names ----------------------------------------------------------------------------------------


def anchors(guide: Path) -> set[str]:
    """What a link can point to within a guide: its headings, written as GitHub does."""
    headings = re.findall(r"^#+ (.+)$", guide.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_and_picture_of_a_guide_leads_somewhere(guide):
    for link in re.findall(r"\]\(([^)\s]+)\)", guide.read_text()):
        if not link.startswith("http"):
            name, _, anchor = link.partition("#")
            target = guide.parent / name if name else guide
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_module_that_a_guide_names_exists(guide):
    for name in re.findall(r"`([\w/]+\.py)`", guide.read_text()):
        assert any((folder / name).exists() for folder in (guide.parent, ROOT / "ldm3d", ROOT)), name


def test_every_folder_of_the_package_has_a_guide_that_names_its_modules():
    for folder in {path.parent for path in ROOT.glob("ldm3d/**/*.py")}:
        text = (folder / "README.md").read_text()
        for module in folder.glob("[!_]*.py"):
            assert f"`{module.name}`" in text, module.relative_to(ROOT)


def test_the_front_page_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 250
