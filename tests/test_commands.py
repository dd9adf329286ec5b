"""Every command line of the guides and docstrings that trains, samples, evaluates or reports does its work:
each is run, with tiny networks and data, in a folder that holds all that the line names. (The others are only
read, by tests/test_guides.py.)

What a line names lies under this very name: FOLDER and GENERATED are folders, RUN is a run. Names of single
files get an ending: IMAGE becomes IMAGE.nii.gz.
"""

import importlib
import itertools
import json
import locale
import re
import shlex
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import test_guides
import tiny
import torch
from torch import nn

from ldm3d import read
from ldm3d.data import Volume, write
from ldm3d.data.phantoms import write_phantoms
from ldm3d.engine.distributed import run_script

pytestmark = pytest.mark.slow

RAN = r"(train_vae|train_ldm|train_cdal|sample)\.py\b|-m ldm3d\.(evaluation|reports) "
LINES = sorted({command for command, _ in test_guides.LISTED if re.search(RAN, command)})

# --- what makes a line tiny: flags behind its own -----------------------------------------------------------

TRAINING = """--run.steps 2 --run.eval_every 2 --run.save_every 2 --run.log_every 1 --run.workers 0
 --run.device cpu --optim.warmup_steps 0"""
TINY = {  # of every program and task
    "train_vae.py": f"""{TRAINING} --data.size none --data.patch none --data.spacing none
 --vae.channels 8,16 --vae.num_groups 4 --vae.num_res_blocks 1 --vae.stem 2 --vae.latent_channels 3""",
    "train_ldm.py": f"""{TRAINING} --unet.channels 8,16 --unet.num_groups 4 --unet.num_res_blocks 1
 --unet.head_channels 8 --unet.attention_levels true --sample_steps 2""",
    "train_cdal.py": f"""{TRAINING} --data.size none --data.patch none --unet.channels 8,16
 --unet.num_groups 4 --unet.head_channels 8 --generator.encoder_channels 8 --generator.encoder_blocks 1
 --generator.latent_dim 4 --generator.mapping_layers 1 --votes 1 --window none""",
    "sample.py": "--device cpu",
    "reconstruct": "--resamples 10 --device cpu",
    "samples": "--resamples 10 --pairs 12 --slices 4 --device cpu",
    "compare": "--resamples 10 --worst 1",
    "copies": "--feature_steps 2 --device cpu",
    "registers": "--steps 2 --device cpu",
    "latents": "--device cpu",
    "anomalies": """--levels 0.3,0.5 --draws 1 --steps 2 --subset 2 --resamples 10 --device cpu
 --healthy HEALTHY""",
    "raters": "--resamples 10 --worst 1",
    "difference": "--resamples 10",
    "likelihood": "--steps 2 --subset 2 --resamples 10 --device cpu",
    "edits": "--resamples 10",
    "teach": """--arms real,mixed --labelled 1 --seeds 0 --steps 2 --pairs 2 --sample_steps 2 --resamples 10
 --device cpu""",
}
MORE = {  # expression found in a line -> more flags of its program
    r"train_vae.* --(disc|feature)_weight": "--disc.channels 4 --disc.num_layers 1 --disc_start 0",
    r"train_vae.* --autoencoder vq": "--quantizer.codebook_size 16",
    r"train_ldm.*-anatomy|train_ldm.*--anatomy": "--anatomy.dim 16 --anatomy.head_width 8",
    r"train_ldm.*--condition.use": "--condition.context_dim 16",
    r"train_ldm.* --patch.size": "--patch.size 4,4,4",
    r"train_.*--plan": "--memory 1",
    r"--method umap": "--method pca",  # compiles for a minute; tests/reports/test_projections.py runs it
    r"train_ldm.*--run.compile": "--run.compile false",  # tests/test_compile.py compiles
    r"train_cdal(?!.*--cdal.diffusion false)": "--disc.channels 8,16 --disc.emb_dim 8",
    r"sample\.py (?!runs/(vae|cdal)|.*autoencoder.pt)": "--steps 2",
    r"sample\.py .*--size": "--size 24,28,24",
    r"sample\.py .*--window": "--window 16,20,16",
}
RANKS = 2  # in place of those of a torchrun line
PLACES = {  # expression found in a line -> what is there
    r"\b(IMAGE|MASK|PATH)\b": r"\1.nii.gz",
    r"\bIMAGES\b": "data/cells/images",
    r"\$TMPDIR\b": "data",
    r"runs/obey-(masks|16)/\w+-moments": "runs/ldm-heads-tenth",  # of a benchmark
    r"runs/obey-masks/((vae-)?heads)": r"runs/\1",
    r"\bFOLDER\b(?=.*/ct\b)": "DICOM",
}


def tiny_line(line: str) -> list[str]:
    """The words of a line, without `python` or torchrun's flags; files have endings, tiny flags come last."""
    for found, place in PLACES.items():
        line = re.sub(found, place, line)
    words = shlex.split(line[re.search(RAN, line).start() :])
    more = [flags for found, flags in MORE.items() if re.search(found, line)]
    program = words[2] if words[0] == "-m" else words[0]
    return [*words, *" ".join([TINY.get(program, ""), *more]).split()]


# --- the folder ---------------------------------------------------------------------------------------------

RUNS = """
train_vae.py phantom
train_vae.py hippocampus
train_vae.py tiff-translation
train_vae.py brats-16g
train_vae.py phantom --data.learn_sources --data.test_fraction 0.3 --run.dir runs/vae-both
train_vae.py hippocampus --data.root FOLDER --data.image "scans/*.nii.gz" --data.subject none
 --run.dir runs/vae-mine
train_ldm.py phantom
train_ldm.py phantom-anatomy
train_ldm.py hippocampus
train_ldm.py hippocampus-anatomy
train_ldm.py tiff-translation
train_ldm.py phantom --condition.use class,text --run.dir runs/ldm-captions
train_ldm.py hippocampus --vae runs/vae-mine --run.dir runs/ldm-mine
train_ldm.py phantom --vae runs/vae-both --condition.use class,text,image --anatomy.registers bound
 --run.dir RUN
train_ldm.py phantom --condition.use spacing --run.dir runs/ldm-maisi
train_cdal.py hippocampus
train_cdal.py cells
sample.py runs/cdal-cells data/cells/images --votes 2 --every_vote
sample.py runs/ldm-phantom --num 4
sample.py runs/ldm-hippocampus --num 4
sample.py runs/ldm-mine --num 4
sample.py runs/ldm-phantom-anatomy --num 12 --with-labels
sample.py runs/ldm-captions --inpaint IMAGE --region MASK --num 2
""".replace("\n ", " ")  # those that lines begin from


COPIES = {
    "runs/ldm-hippocampus/samples-001": "SAMPLES",
    "runs/ldm-captions/samples-001": "EDITED",
    "runs/ldm-phantom-anatomy": "runs/anatomy/hippocampus/ldm-bound-0",
    "runs/vae-mine": "runs/vae-theirs",
}


class Means(nn.Module):
    """A feature network for net.ts: the means of the eight parts of a volume."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.adaptive_avg_pool3d(x, 2).flatten(1)


def gather(place: Path, *files: Path, names: str = "{}") -> None:
    """Copy files into a folder, as names.format(number) or under their own names."""
    place.mkdir(parents=True, exist_ok=True)
    for number, file in enumerate(files):
        shutil.copy(file, place / (names.format(number) + ".nii.gz" if names != "{}" else file.name))


def write_decathlon(
    place: Path, name: str, images: list[Path], labels: list[Path], channels: int = 1
) -> None:
    """A folder like those of the Medical Segmentation Decathlon."""
    names = [f"{name}_{number:03d}" for number in range(len(images))]
    (place / "imagesTr").mkdir(parents=True)
    for name, image, label in zip(names, images, labels, strict=True):
        volume = nib.load(image)
        array = volume.get_fdata(dtype=np.float32)
        array = array if channels == 1 else np.stack([array] * channels, -1)
        nib.save(nib.Nifti1Image(array, volume.affine), place / f"imagesTr/{name}.nii.gz")
        gather(place / "labelsTr", label, names=name)
    (place / "subjects.csv").write_text("\n".join(["name,subject", *(f"{n},{n}" for n in names)]))
    cases = [{"image": f"./imagesTr/{n}.nii.gz", "label": f"./labelsTr/{n}.nii.gz"} for n in names]
    (place / "dataset.json").write_text(json.dumps({"training": cases}))


def write_data(place: Path) -> None:
    """data/NAME of every preset that the lines use, as the data sets themselves are laid out."""
    source = write_phantoms(place / "data/phantom", 12, size=(16, 20, 16), spacing=(12.0, 11.0, 12.0))
    volumes = [sorted((source / part).iterdir()) for part in ("images", "labels")]
    write_decathlon(place / "data/hippocampus", "hippocampus", *volumes)
    write_decathlon(place / "data/brats", "BRATS", *volumes, channels=4)
    flat = write_phantoms(place / "flat", 12, dims=2, size=(32, 32), spacing=(6.0, 6.0))
    shutil.copytree(flat, place / "runs/heads")
    for number in range(12):
        for part, folder in (("images", "flair"), ("sources", "t1"), ("labels", "lesion")):
            to = place / f"data/tiff_pairs/{folder}/p{7 if number < 9 else 19:02d}_z{number:03d}.tif"
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(flat / part / f"phantom_{number:04d}.tif", to)
        grey, mask = (read(flat / part / f"phantom_{number:04d}.tif") for part in ("images", "labels"))
        write(place / f"data/monuseg/images/{number}.tif", Volume(np.repeat(grey.array, 3, 0), grey.affine))
        write(place / f"data/monuseg/masks/{number}.tif", Volume(mask.array.clip(0, 1), mask.affine))
        for root in ("data/cells", "FOLDER"):
            write(place / root / f"images/{number}.tif", grey)
            for rater in "ab":
                outline = Volume(mask.array.clip(0, 1), mask.affine)
                write(place / root / f"raters/{number}__{rater}.tif", outline)


def write_series(place: Path, volume: nib.Nifti1Image) -> None:
    """A folder of DICOM slices, with voxels of 1 mm."""
    sitk = pytest.importorskip("SimpleITK")
    place.mkdir(parents=True)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    language = locale.setlocale(locale.LC_CTYPE)  # which ITK's writer of positions sets to "C"
    for k, array in enumerate(np.moveaxis(volume.get_fdata().astype(np.int16), 2, 0)):
        image = sitk.GetImageFromArray(array.T[None])
        for tag, value in {"0020|000e": "1.2.3", "0020|0032": f"0\\0\\{k}", "0008|0060": "CT"}.items():
            image.SetMetaData(tag, value)
        writer.SetFileName(str(place / f"{k:03d}.dcm"))
        writer.Execute(image)
    locale.setlocale(locale.LC_CTYPE, language)


def write_places(place: Path) -> None:
    """The folders and files with the names that stand for a reader's own."""
    source = place / "data/phantom"
    images, labels = (sorted((source / part).iterdir()) for part in ("images", "labels"))
    own, masks = (sorted((place / "data/hippocampus" / part).iterdir()) for part in ("imagesTr", "labelsTr"))
    for folder in ("FOLDER", "FOLDER/scans", "FOLDER/images", "FILE_OR_FOLDER"):
        gather(place / folder, *own)
    for folder in ("FOLDER/labels", "LABELS", "PREDICTED"):
        gather(place / folder, *masks)
    for folder in ("REAL", "TRAIN", "HEALTHY", "OTHER/images"):
        gather(place / folder, *images[:6])
    for tif in (place / "data/tiff_pairs/flair").iterdir():
        shutil.copy(tif, place / "FOLDER")
    gather(place / "HEALTHY", *images[:4])
    for rater, files in enumerate((masks[:3], masks[1:4])):
        gather(place / "VOTES", *files, names=f"{{}}__{rater}")
        gather(place / "MASKS", *files, names=f"{{}}__{rater}")
        gather(place / f"RATERS/{rater}", *files, names="{:d}")
        for case, file in enumerate(files):
            gather(place / f"MODELS/{case}", file, names=str(rater))
    gather(place / "OTHER_REAL_CASES", *images[6:])
    for folder, files in (("GENERATED", images[:4]), ("TARGET", images[1:5]), ("data/flair", images[2:6])):
        gather(place / folder, *files, names="sample_{:04d}")
    gather(place / "data/lesion", *labels[:4], names="sample_{:04d}")
    for folder in ("FIRST", "SECOND"):
        (place / folder).mkdir()
        (place / folder / "cases.csv").write_text("case,dice\na,0.8\nb,0.9\n")
    for number, image in enumerate(images[:4]):
        gather(place / f"OTHER/{number}", image, names="t1")
    files = {
        "IMAGE": images[0],
        "MASK": labels[0],
        "mask": labels[0],
        "PATH": sorted((source / "sources").iterdir())[0],
    }
    for name, file in files.items():
        shutil.copy(file, place / f"{name}.nii.gz")
    rows = [f"{image.name},labels/{image.name},{n % 2},{'FM'[n % 2]},{30 + n}" for n, image in enumerate(own)]
    (place / "FOLDER/cases.csv").write_text("\n".join(["image,mask,class,sex,age", *rows]))
    for name in ("FILE.csv", "sets.csv"):
        (place / name).write_text("name,class,text\na,0,a small lesion\nb,1,a large lesion\n")
    tiny.vgg_weights(place / "vgg16.pth")
    torch.jit.script(Means()).save(str(place / "net.ts"))
    nets = pytest.importorskip("monai.networks.nets")
    theirs = nets.PatchDiscriminator(spatial_dims=3, num_layers_d=1, channels=4, in_channels=1)
    torch.save(theirs.state_dict(), place / "discriminator.pt")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A folder with everything that the lines name."""
    place = tmp_path_factory.mktemp("commands")
    write_data(place)
    write_places(place)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.delenv("LDM3D_DATA", raising=False)
        for line in RUNS.strip().splitlines():
            assert run(tiny_line(line)) == 0, line
    for name, copy in COPIES.items():
        shutil.copytree(place / name, place / copy)
    return place


def run(words: list[str]) -> int:
    """Run a program in this process; its exit code."""
    if words[0] == "-m":
        return run_script(importlib.import_module(f"{words[1]}.__main__").main, words[2:])
    return run_script(importlib.import_module(Path(words[0]).stem).main, words[1:])


def own_run(words: list[str]) -> Path:
    """The folder of the run that a training line makes."""
    flags = dict(itertools.pairwise(words))
    kind = words[0].removesuffix(".py").removeprefix("train_")
    name = Path(words[1]).name.removeprefix("vae-")
    return Path(flags.get("--run.dir", f"runs/{kind}-{name}"))


def make_runs(words: list[str]) -> None:
    """Make the runs that a line begins from and that are not there yet, each by the shortest line that makes
    it."""
    training = [line for line in LINES if line.startswith("python tr") and "--plan" not in line]
    training.sort(key=len, reverse=True)
    makers = {str(own_run(tiny_line(line))): tiny_line(line) for line in training}
    begins_from = set(re.findall(r"runs/[\w-]+", " ".join(words)))
    begins_from -= {str(own_run(words))} if words[0].startswith("train_") else set()
    for name in begins_from:
        if not Path(name).exists() and name in makers:
            make_runs(makers[name])
            assert run(makers[name]) == 0, name


# Lines that differ in the numbers of nodes and processes alone are run once
DIFFERENT = list({(line.startswith("torchrun"), *tiny_line(line)): line for line in LINES}.values())


@pytest.mark.parametrize("line", DIFFERENT, ids=DIFFERENT)
def test_a_command_of_the_guides_does_its_work(prepared, line, tmp_path, monkeypatch):
    place, words = tmp_path / "place", tiny_line(line)
    shutil.copytree(prepared, place)
    if "/ct" in line:
        for case in range(6):
            write_series(place / f"DICOM/p{case:02d}/ct", nib.load(place / "IMAGE.nii.gz"))
    monkeypatch.chdir(place)
    monkeypatch.delenv("LDM3D_DATA", raising=False)
    if words[0].startswith("train_"):
        shutil.rmtree(own_run(words), ignore_errors=True)
    make_runs(words)
    if line.startswith("torchrun"):
        process = tiny.torchrun(tiny.ROOT / words[0], *words[1:], ranks=RANKS, cwd=place)
        _, error = process.communicate()
        assert process.returncode == 0, error
    else:
        assert run(words) == 0
    if words[0].startswith("train_") and "--plan" not in words:
        assert len(tiny.lines(own_run(words))) == 2
