"""Every mistake of a user is one line that names what is wrong, exit code 2, and nothing is written."""

import shlex

import pytest
from tiny import BOUND, cdal_flags, ldm_flags, vae_flags

import sample
import train_cdal
import train_ldm
import train_vae
from ldm3d.evaluation.__main__ import main as evaluation_main

SAMPLE = [  # kind of the run, flags, what the line says; {heads} is the folder of the data, {run} the run
    ("ldm", "--condition klass=1", "condition klass: the model has no such condition"),
    ("ldm", "--condition class=7", "condition class: got '7', expected one of 0, 1"),
    ("ldm", "--condition class", "condition: expected NAME=VALUE, got 'class'"),
    ("ldm", "--condition class=0 --condition class=1", "condition: class is given twice"),
    ("ldm", "--condition image=nowhere.tif", "nowhere.tif: no such file"),
    ("ldm", "--condition image=" + 300 * "x", "no such file"),
    ("ldm", "--conditions nowhere.csv", "conditions: no file nowhere.csv"),
    ("ldm", "--guidance strong", "guidance: expected a number"),
    ("ldm", "--guidance klass=2", "condition klass: the model has no such condition"),
    ("ldm", "--guidance nan --condition class=1", "guidance: expected a finite number"),
    ("ldm", "--guidance class=2 --guidance class=3", "guidance: class is given twice"),
    ("ldm", "--guidance 2 --guidance class=3", "guidance: expected NAME=VALUE, got '2'"),
    ("ldm", "--guidance_interval 0.7,0.2", "guidance_interval: expected 0 <= low < high <= 1"),
    (
        "ldm",
        "--autoguidance 2 --autoguidance_run nowhere",
        "autoguidance: no nowhere; autoguidance_run names",
    ),
    ("ldm", "--autoguidance 2 --autoguidance_run {heads}/../vae", "is a checkpoint of train_vae.py"),
    (
        "ldm",
        "--autoguidance 2 --autoguidance_run {run}",
        "autoguidance: {run} has the same weights as the run",
    ),
    ("ldm", "--autoguidance 0.5", "autoguidance: expected a number from 1 on, got 0.5"),
    ("ldm", "--autoguidance_run {run}", "autoguidance_run, autoguidance_interval: need autoguidance"),
    ("bound", "--autoguidance 2 --registers false", "registers: cannot be switched off with autoguidance"),
    ("ldm", "--edit {heads}/images/phantom_0001.tif --strength 0", "strength: expected above 0"),
    ("ldm", "--edit .", ".: a folder, expected a file"),
    ("ldm", "--inpaint a.tif", "inpaint, region: one needs the other"),
    ("ldm", "--edit a.tif --grain", "grain: cannot be added to an edited image"),
    ("ldm", "--invert class=1", "invert: needs edit"),
    ("ldm", "--edit a.tif --invert class=1 --sampler heun", "invert: needs sampler euler or ddim"),
    ("ldm", "--edit {heads}/images/phantom_0001.tif --invert klass=1", "condition klass: the model has no"),
    ("ldm", "--same_noise", "same_noise: needs conditions, a table of several sets"),
    ("ldm", "--strength 0.3", "strength: needs inpaint, edit or interpolate"),
    ("ldm", "--interpolate 0,1 --strength 0", "strength: expected above 0"),
    ("ldm", "--interpolate 3", "interpolate: expected two samples or two images, got '3'"),
    ("ldm", "--interpolate 3,a.tif", "interpolate: expected two samples or two images, got '3,a.tif'"),
    ("ldm", "--interpolate 0,1 --sampler ddpm", "interpolate: needs a sampler that draws no fresh noise"),
    ("ldm", "--cases test", "cases: the run has no test cases"),
    ("ldm", "--num 1 --maps", "maps: need at least 2 samples"),
    ("ldm", "--num 0", "num: expected at least 1, got 0"),
    ("ldm", "--sampler ddim", "heun"),
    ("ldm", "--eta 0.5", "eta: got 0.5 with sampler ab2"),
    ("ldm", "--with-labels", "with_labels: the run has learned none"),
    ("ldm", "--registers false", "registers: the run has none"),
    ("ldm", "--size 16", "size: expected 2 numbers of voxels, got (16,)"),
    (
        "ldm",
        "--size 32,mm",
        "size: expected whole voxels, such as 64,80,64, or mm, such as 180mm,220mm,180mm",
    ),
    ("ldm", "--size 180mm,32", "got 180mm,32"),
    ("ldm", "--size 0mm,180mm", "got 0mm,180mm"),
    ("ldm", "--size 180mm", "size: expected 2 numbers of voxels, got ('180mm',)"),
    (
        "ldm",
        "--size 180mm,180mm --condition spacing=12,11",
        "size: expected voxels, since the condition spacing",
    ),
    ("ldm", "--size 32,32 --window 16", "window: expected 2 numbers from 1 on, got 16"),
    ("ldm", "--size 32,32 --overlap 1", "overlap: expected 0 <= overlap < 1, got 1.0"),
    ("ldm", "--size 32,32 --cases val", "size, cases: give one of the two"),
    ("ldm", "--size 32,32 --edit a.tif", "size, edit: give one of the two"),
    ("ldm", "--votes 3", "--votes: no such setting\n"),
    ("ldm", "{heads}/images", "images: not expected here"),
    ("bound", "--with-labels --inpaint a.tif --region b.tif", "with_labels, inpaint: give one of the two"),
    ("vae", "", "which images? give the image file, or folder of images"),
    ("vae", "{heads}/images --num 3", "--num: no such setting"),
    ("vae", "{heads}/images --memory -1", "memory: expected at least 0, got -1.0"),
    ("ldm", "--memory -1", "memory: expected at least 0, got -1.0"),
    ("vae", "/nowhere", "/nowhere: no such folder"),
    ("vae", "{heads}/../empty", "empty: holds no images"),
    ("cdal", "", "which images? give the image file, or folder of images"),
    ("cdal", "{heads}/images --steps 3", "--steps: no such setting"),
    ("cdal", "/nowhere", "/nowhere: no such folder"),
    ("cdal", "{heads}/images --part test", "part: "),
    ("cdal", "{heads}/images --votes 0", "votes: expected at least 1, got 0"),
    ("cdal", "{heads}/images --window 4", "window"),
    ("cdal", "{heads}/images --overlap 1", "overlap: expected 0 <= overlap < 1, got 1.0"),
    ("cdal", "{heads}/images --reference /nowhere", "reference: /nowhere is not a folder"),
]

TRAIN = [  # kind of the run, more flags, what the line says
    ("vae", "--run.stepz 3", "--run.stepz: no such setting; did you mean --run.steps?"),
    ("vae", "--lr 3", "--lr: no such setting; did you mean --optim.lr?"),
    ("vae", "--kernel.process flow", "--kernel.process: no such setting\n"),
    ("vae", "--data.root /nowhere", "/nowhere"),
    ("vae", "--vae.channels none", "vae.channels: expected"),
    ("vae", "--run.device abacus", "abacus"),
    ("vae", "--vae.latent_channels 0", "vae.latent_channels: expected at least 1, got 0"),
    ("vae", "--vae.num_groups 0", "vae.num_groups: expected at least 1, got 0"),
    ("vae", "--disc.num_layers 9", "disc.num_layers: expected 1 to 7, got 9"),
    ("vae", "--disc_weight 1 --disc.dims 2 --disc.num_layers 7", "voxels along every axis, got (16, 20)"),
    ("vae", "--preset hippocampus", "--preset: no such setting; the preset is the first word: hippocampus"),
    ("vae", "--vae.channels " + 9000 * "[", "vae.channels: expected (int, ...)"),
    ("vae", "--autoencoder vq --free_bits 0.1", "free_bits: has no effect with autoencoder vq"),
    ("vae", "--autoencoder vq --kl_weight 0.1", "kl_weight: has no effect with autoencoder vq"),
    ("vae", "--autoencoder vq --kl_warmup 9", "kl_warmup: has no effect with autoencoder vq"),
    ("vae", "--optim.milestones 3", "optim.milestones: has no effect with optim.schedule constant"),
    ("vae", "--disc_optim.milestones 3", "disc_optim.milestones: has no effect with"),
    ("ldm", "--optim.gamma 0.5", "optim.gamma: has no effect with optim.schedule constant"),
    ("cdal", "--optim.min_lr_ratio 0.5", "optim.min_lr_ratio: has no effect with optim.schedule constant"),
    ("vae", "--data.slices axial --data.dims 3", "data.slices: expected none with data.dims 3, got axial"),
    ("vae", "--data.slices axial", "a single image (1, 16, 20), expected a volume (data.slices)"),
    (
        "vae",
        "--data.slices axial --data.file_spacing 1,1",
        "data.file_spacing: expected none with data.slices",
    ),
    ("vae", "--data.series 4", "data.series: has no effect, no image is a folder of DICOM slices"),
    ("vae", "--data.source_series 4", "data.source_series: has no effect, no source is a folder"),
    ("vae", "--data.crop padded", "data.crop: padded is for patches (data.patch)"),
    ("cdal", "--data.crop padded --data.patch none", "data.crop: padded is for patches (data.patch)"),
    ("ldm", "--data.crop padded --data.num_variants 2", "data.crop: padded is for patches (data.patch)"),
    ("vae", "--vae.in_channels 3", "vae.in_channels: 3, but the images have 1"),
    ("vae", "--vae.dims 3", "vae.dims: 3, but data.dims is 2"),
    ("vae", "--free_bits 1e300", "free_bits: expected float, got '1e300'"),
    ("vae", "--plan --memory 1e30", "memory: expected the GiB of one device"),
    ("cdal", "--plan --memory 16 --batch_size 0", "batch_size: expected at least 1, got 0"),
    ("ldm", "--plan --memory 16 --micro_batch_size -1", "micro_batch_size: expected at least 1, got -1"),
    ("vae", "--run.dir ''", "run.dir: expected a folder, got ''"),
    ("ldm", "--control labels", "control: needs run.init, the run whose denoiser stays frozen"),
    ("ldm", "--lora.rank 4", "lora.rank: needs run.init, the run whose denoiser stays frozen"),
    ("ldm", "--lora.rank -1", "lora.rank: expected at least 0, got -1"),
    ("ldm", "--lora.rank 4 --control image --run.init x", "control, lora.rank: give one of the two"),
    ("ldm", "--lora.rank 4 --run.init /nowhere", "run.init: /nowhere: no such run folder or checkpoint"),
    ("vae", "--lora.rank 4", "lora.rank: needs run.init, the run whose weights stay frozen"),
    ("vae", "--lora.rank 4 --run.init x --disc_weight 1", "disc_weight needs disc_adaptive false"),
    ("ldm", "--unet.num_groups 0", "unet.num_groups: expected at least 1, got 0"),
    ("ldm", "--unet.context_dim -5", "unet.context_dim: expected at least 1, got -5"),
    ("ldm", "--vae /nowhere", "/nowhere: no such run folder or checkpoint"),
    ("ldm", "--data.scaling minmax", "data.scaling: the autoencoder was trained with percentile"),
    ("ldm", "--data.percentiles 1,99", "data.percentiles: the autoencoder was trained with"),
    ("ldm", "--data.augment.flip_axes 1", "data.num_variants > 1"),
    ("ldm", "--data.num_variants 3", "data.num_variants: all would be equal"),
    ("ldm", "--plain_end 0.5", "plain_end: has no effect without data.augment"),
    ("ldm", "--plain_end 1.5", "plain_end: expected 0 to 1, got 1.5"),
    ("ldm", "--unet.out_channels 7", "unet.out_channels: follows from the autoencoder's 3 latent channels"),
    ("ldm", "--condition.use klass", "is no condition"),
    ("ldm", "--condition.use class:stage", "no column 'stage'"),
    ("ldm", "--condition.use class --unet.context_dim 8", "unet.context_dim: follows from the conditions"),
    ("ldm", "--condition.use class --condition.concat text", "concat: text is no class, number or spacing"),
    ("ldm", "--unet.emb_parts 2", "unet.emb_parts: follows from the conditions"),
    ("ldm", "--condition.use class --condition.dropout 1.5", "condition.dropout: expected probabilities"),
    ("bound", "--data.num_labels 2", "label 2, expected 0 to 1 (data.num_labels)"),
    ("bound", "--data.image images/*.tif", "anatomy.registers: needs masks (data.mask, or a column"),
    ("ldm", "--patch.size 4,4,4", "patch.size: expected 2 numbers, one an axis, got 4,4,4"),
    ("ldm", "--patch.size 8,8", "patch.size: expected at most 4,5, the latent, got 8,8"),
    ("ldm", "--patch.size 2,2", "patch.size: expected at least 4,4 with patch.halvings 1, got 2,2"),
    ("ldm", "--patch.size 0,4", "patch.size: expected latent voxels from 1 on, got 0,4"),
    ("ldm", "--patch.size 4,4 --patch.share 1", "patch.share: expected a fraction from 0 to below 1"),
    ("ldm", "--patch.halvings 2", "patch.halvings: has no effect without patch.size"),
    ("cdal", "--cdal.attention_layer 5", "cdal.attention_layer"),
    ("cdal", "--unet.dims 3", "unet.dims"),
    ("cdal", "--cdal.kernel.num_timesteps 65", "num_timesteps: expected 1 to 64"),
    ("cdal", "--cdal.kernel.input_scale 0", "input_scale: expected 0 < input_scale <= 1, got 0.0"),
    ("cdal", "--data.image {id}{rater}.tif", "data.image: '{id}{rater}.tif': only masks have a {rater}"),
    ("cdal", "--data.image images/*.tif --data.foreground 0", "no label map"),
    ("cdal", "--votes 0", "votes"),
    (
        "cdal",
        "--generator.deep_supervision true --unet.channels 8",
        "generator.deep_supervision: needs unet.channels of two levels",
    ),
]


@pytest.fixture(scope="module")
def runs(vae_run, conditional_run, bound_run, cdal_run):
    return {"vae": vae_run, "ldm": conditional_run, "bound": bound_run, "cdal": cdal_run}


@pytest.mark.parametrize(("kind", "flags", "words"), SAMPLE)
def test_sampling_reconstructing_and_segmenting(runs, heads, kind, flags, words, mistake):
    (heads.parent / "empty").mkdir(exist_ok=True)
    before = sorted(runs[kind].iterdir())
    places = {"heads": heads, "run": runs[kind]}
    arguments = [str(runs[kind]), *shlex.split(flags.format(**places))]
    assert words.format(**places) in mistake(sample.main, arguments)
    assert sorted(runs[kind].iterdir()) == before


EVALUATE = [  # words behind `python -m ldm3d.evaluation`, what the line says; {run} is of train_ldm.py
    ("anomalies {run}", "which FOLDER?"),
    ("anomalies {run} /nowhere", "/nowhere: no such folder"),
    ("anomalies {run} {heads}/images --levels 0,2", "levels: expected numbers above 0 and up to 1"),
    ("anomalies {run} {heads}/images --label 4", "label: needs masks"),
    ("anomalies {run} {heads}/images --masks /nowhere", "masks: /nowhere is not a folder"),
    (
        "anomalies {run} {heads}/images --condition klass=0",
        "condition klass: the model has no such condition",
    ),
    ("likelihood {run} --changes turn", "changes: expected"),
    ("likelihood {run} --part test", "part: the run has no test cases"),
    ("likelihood {vae}", "vae"),
    ("edits {run}", "has no samples.json"),
]


@pytest.mark.parametrize(("line", "words"), EVALUATE)
def test_evaluating(runs, heads, line, words, mistake):
    before = sorted(runs["ldm"].iterdir())
    line = line.format(run=runs["ldm"], vae=runs["vae"], heads=heads)
    assert words in mistake(evaluation_main, shlex.split(line))
    assert sorted(runs["ldm"].iterdir()) == before


def test_torchrun_is_refused_where_every_rank_would_do_all_the_work(mistake, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for line in ("teach RUN", "anomalies RUN FOLDER", "edits FOLDER"):
        words = line.split()
        assert f"{words[0]}: works in one process, and 2 were started" in mistake(evaluation_main, words)


@pytest.mark.parametrize(("kind", "flags", "words"), TRAIN)
def test_training(vae_run, heads, tmp_path, kind, flags, words, mistake):
    folder, more = tmp_path / "run", shlex.split(flags)
    main, arguments = {
        "vae": lambda: (train_vae.main, vae_flags(heads, folder, 2, *more)),
        "ldm": lambda: (train_ldm.main, ldm_flags(vae_run, folder, 2, *more)),
        "bound": lambda: (train_ldm.main, ldm_flags(vae_run, folder, 2, *BOUND, *more)),
        "cdal": lambda: (train_cdal.main, cdal_flags(heads, folder, 2, *more)),
    }[kind]()
    assert words in mistake(main, arguments)
    assert not folder.exists()


@pytest.mark.parametrize(
    ("main", "arguments", "words"),
    [
        (train_vae.main, ["phantm"], "phantm: no such preset; did you mean phantom?"),
        (train_ldm.main, [], "which preset?"),
        (sample.main, ["/nowhere"], "/nowhere: no such run folder or checkpoint"),
        (sample.main, [], "which run?"),
        (sample.main, ["--num", "3"], "which run?"),
    ],
)
def test_what_comes_first(main, arguments, words, mistake):
    assert words in mistake(main, arguments)


def test_a_run_folder_of_another_kind(runs, mistake):
    assert "'vae'" in mistake(train_ldm.main, ldm_flags(runs["vae"], runs["vae"], 2))


def test_another_architecture_on_resuming(runs, heads, mistake):
    flags = vae_flags(heads, runs["vae"], 10, "--vae.channels", "8,24")
    assert "vae.channels was (8, 16), now (8, 24)" in mistake(train_vae.main, flags)
