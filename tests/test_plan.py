"""The plan follows its rules: each test fails if its rule is dropped. Planned runs train, and resume."""

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tifffile
from tiny import RUN, VAE, assert_same_end, lines

import sample
import train_cdal
import train_ldm
import train_vae
from ldm3d import read
from ldm3d.cdal import CDALConfig, FewStepConfig
from ldm3d.config import InputError
from ldm3d.data import AugmentConfig, DataConfig
from ldm3d.data.fingerprint import Fingerprint
from ldm3d.data.phantoms import write_phantoms
from ldm3d.engine.checkpoint import load, step_files
from ldm3d.engine.memory_plan import MemoryTable, free_memory
from ldm3d.plan import (
    Latents,
    Machine,
    Plan,
    check_base,
    common_flips,
    halvings,
    note_attention,
    plan_cdal,
    plan_ldm,
    plan_length,
    plan_other_data,
    plan_vae,
    round_steps,
    shrink,
)
from ldm3d.unet import UNetConfig
from ldm3d.vae import VAEConfig

HEADS = Fingerprint(
    settings={"data.image": "*/t1.nii.gz"},
    reasons={"data.image": "a folder a case: 40 such files"},
    notes=(),
    dims=3,
    channels=1,
    shapes=((90, 110, 88),) * 39 + ((91, 100, 80),),
    spacings=((1.0, 1.0, 1.0),) * 40,
    modality="",
    integers=False,
    lowest=0.0,
    robust=(0.0, 900.0),
    extremes=(0.0, 1200.0),
    num_values=0,
    labels=(),
    labelled=0.0,
    num_masks=0,
    sided=(),
    sides="",
    subjects=tuple(map(str, range(40))),
    parts={},
    pose=0.9,
    mirrored=(0.9, 0.5, 0.5),
)


def fits(_values):
    return True


CPU, GPU = Machine(False, 1.0, fits, fits), Machine(True, 12.0, fits, fits)


def planned(machine=CPU, given=None, **facts) -> dict:
    """The values of the plan for heads with other facts, those that are given included."""
    plan = plan_vae(dataclasses.replace(HEADS, **facts), machine, given or {})
    return {choice.key: choice.value for choice in plan.choices}


def settings_of(values: dict) -> VAEConfig:
    names = {key.removeprefix("vae."): value for key, value in values.items() if key.startswith("vae.")}
    return VAEConfig(**names)


# --- data ---------------------------------------------------------------------------------------------------


def test_labels_with_gaps_are_numbered():
    assert "data.label_values" not in planned(labels=(0, 1, 2))
    assert planned(labels=(0, 1, 2, 4))["data.label_values"] == (0, 1, 2, 4)


@pytest.mark.parametrize(
    ("subjects", "fraction"), [(4, 0.2), (19, 0.2), (20, 0.1), (500, 0.1), (2000, 0.025)]
)
def test_a_tenth_of_the_subjects_validates_a_fifth_of_few_and_fifty_of_many(subjects, fraction):
    names = tuple(map(str, range(subjects)))
    many = {"shapes": HEADS.shapes[:1] * subjects, "spacings": HEADS.spacings[:1] * subjects}
    assert planned(subjects=names, **many)["data.val_fraction"] == fraction


def test_one_subject_validates_on_its_middle_cases():
    values = planned(subjects=("p01",) * 40)
    assert values["data.val_fraction"] == 0.15
    assert values["data.val_gap"] == 2


def test_a_single_case_validates_on_itself():
    values = planned(subjects=("a",), shapes=HEADS.shapes[:1], spacings=HEADS.spacings[:1])
    assert values["data.val_fraction"] == 0


def test_few_cases_of_one_subject_count_as_subjects():
    values = planned(subjects=("a",) * 3, shapes=HEADS.shapes[:3], spacings=HEADS.spacings[:3])
    assert values["data.subject"] is None
    assert values["data.val_fraction"] == 0.2


def test_a_split_that_is_given_is_kept():
    """A setting of the split beside it would have no effect, or be refused."""
    for subjects in (HEADS.subjects, ("p01",) * 40):
        stated = dataclasses.replace(HEADS, subjects=subjects, parts={"train": 30, "val": 10})
        plan = plan_vae(stated, CPU, {})
        assert not plan.values.keys() & {"data.val_fraction", "data.val_gap", "data.subject"}
        assert plan.notes == ["the table states the split: train 30, val 10"]
    assert "data.val_fraction" not in planned(given={"data.fold": (0, 5)})
    assert "data.val_gap" not in planned(given={"data.test_fraction": 0.1}, subjects=("p01",) * 40)
    assert "data.val_gap" not in planned(given={"data.split": "run/split.json"}, subjects=("p01",) * 40)


def test_spacings_that_differ_much_are_made_equal():
    near = ((1.0, 1.0, 1.0),) * 20 + ((1.0, 1.0, 1.4),) * 20
    assert planned(spacings=near)["data.spacing"] is None
    far = ((1.0, 1.0, 1.0),) * 15 + ((1.0, 1.0, 2.0),) * 25
    values = planned(spacings=far, shapes=((90, 110, 88),) * 40)
    assert values["data.spacing"] == (1.0, 1.0, 2.0)
    assert values["data.size"] == (96, 112, 88)  # the slices of 2 mm keep their number, the others lose half


@pytest.mark.parametrize(
    ("facts", "scaling"),
    [
        ({}, "percentile"),
        ({"integers": True, "lowest": -1000.0, "extremes": (-1024.0, 3000.0)}, "window"),
        ({"modality": "CT", "lowest": 0.0}, "window"),
        ({"modality": "CT", "num_values": 2}, "minmax"),
        ({"modality": "CT", "lowest": 0.0, "robust": (0.0, 1.0)}, "percentile"),  # scaled before
        ({"lowest": -1000.0, "extremes": (-1024.0, 3000.0)}, "window"),  # resampled: not integers
        ({"lowest": -500.0, "extremes": (-600.0, 3000.0)}, "percentile"),
        ({"integers": True, "lowest": -5.0, "extremes": (-5.0, 300.0)}, "percentile"),
        ({"integers": True, "extremes": (0.0, 255.0)}, "minmax"),
        ({"integers": True, "extremes": (0.0, 256.0)}, "percentile"),
        ({"extremes": (0.0, 200.0)}, "percentile"),
        ({"num_values": 3}, "minmax"),
    ],
)
def test_scaling_follows_from_the_unit(facts, scaling):
    assert planned(**facts)["data.scaling"] == scaling


def test_the_window_of_ct_holds_the_voxels_of_every_case_within_12_bits():
    ct = {"integers": True, "lowest": -1000.0, "extremes": (-1024.0, 3000.0)}
    assert planned(robust=(-1003.0, 1511.0), **ct)["data.window"] == (-1010.0, 1520.0)
    assert planned(robust=(-3000.0, 9000.0), **ct)["data.window"] == (-1024.0, 3071.0)


@pytest.mark.parametrize(
    ("facts", "axes"),
    [
        ({}, (0,)),
        ({"mirrored": (0.8, 0.9, 0.9)}, ()),  # of volumes left and right alone are exchanged
        ({"sides": "label 'left kidney'"}, ()),
        ({"sided": (0,)}, ()),
        ({"sided": (1,)}, (0,)),
        ({"dims": 2, "mirrored": (0.9, 0.89), "sided": (1,)}, (0,)),
        ({"dims": 2, "mirrored": (0.5, 0.9)}, (1,)),
        ({"dims": 2, "mirrored": (0.9, 0.89)}, (0, 1)),
    ],
)
def test_cases_are_flipped_where_flipped_ones_look_like_the_data(facts, axes):
    dims = facts.get("dims", 3)
    shapes = tuple(shape[:dims] for shape in HEADS.shapes)
    spacings = tuple(spacing[:dims] for spacing in HEADS.spacings)
    assert planned(**facts, shapes=shapes, spacings=spacings)["data.augment.flip_axes"] == axes


def test_slices_without_a_usual_way_up_are_turned():
    slices = {"dims": 2, "pose": 0.01, "mirrored": (0.0, 0.01), "spacings": ((1.0, 1.0),) * 40}
    square = planned(**slices, shapes=((64, 64),) * 40)
    assert square["data.augment.flip_axes"] == square["data.augment.rot90_axes"] == (0, 1)
    assert "data.augment.rot90_axes" not in planned(**slices, shapes=((64, 80),) * 40)


def test_much_data_is_prepared_on_the_disk_and_read_by_processes_beside_the_network():
    assert "data.cache" not in planned()
    much = {"shapes": ((512, 512, 300),) * 40}
    assert planned(**much)["data.cache"] == "disk"
    assert "run.workers" not in planned()
    assert "run.workers" not in planned(**much)  # one core, which the network needs
    plan = plan_vae(dataclasses.replace(HEADS, **much), CPU, {}, num_cores=2)
    assert {choice.key: choice.value for choice in plan.choices}["run.workers"] == 1
    assert planned(GPU)["run.workers"] == 1


# --- networks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "spacing", "expected"),
    [
        ((64, 64, 64), (1, 1, 1), [(2, 2, 2)] * 3),
        ((256, 256, 40), (0.7, 0.7, 2.5), [(2, 2, 1), (2, 2, 2), (2, 2, 2)]),
        ((256, 256, 40), (1, 1, 5), [(2, 2, 1), (2, 2, 1), (2, 2, 2)]),
        ((256, 256, 7), (1, 1, 1), [(2, 2, 1)] * 3),
        ((16, 16), (1, 1), [(2, 2), (2, 2)]),
        ((7, 7), (1, 1), []),
    ],
)
def test_thick_slices_and_short_axes_are_halved_less(size, spacing, expected):
    assert list(halvings(size, spacing, 3)) == expected


def test_the_autoencoder_of_thick_slices_halves_them_less():
    values = planned(shapes=((128, 128, 20),) * 40, spacings=((1.0, 1.0, 6.0),) * 40)
    assert settings_of(values).downsampling == (8, 8, 2)
    assert values["data.size"] == (128, 128, 20)


def test_large_latents_are_halved_once_more():
    small = planned(shapes=((60, 60, 60),) * 40)
    assert settings_of(small).downsampling == (4, 4, 4)
    assert settings_of(planned()).downsampling == (8, 8, 8)
    assert settings_of(planned(GPU)).downsampling == (4, 4, 4)
    assert settings_of(planned(GPU, shapes=((256, 256, 256),) * 40)).downsampling == (8, 8, 8)


def test_patches_show_the_padding_of_cases_of_many_sizes():
    sizes = ((90, 110, 88),) + ((70, 90, 88),) * 39
    assert planned(shapes=sizes)["data.crop"] == "padded"
    assert "data.crop" not in planned()
    assert "data.crop" not in planned(shapes=((30, 30, 30),) + ((20, 20, 20),) * 39)  # seen whole
    assert planned(given={"data.patch": (32, 32, 32)}, shapes=sizes)["data.crop"] == "padded"


def test_a_gpu_gets_the_wide_networks():
    assert settings_of(planned(GPU)).channels == (64, 128, 256)
    assert settings_of(planned()).channels == (32, 64, 128)
    assert planned(GPU)["optim.lr"] < planned()["optim.lr"]
    assert planned()["vae.shortcut"]
    assert "vae.shortcut" not in planned(GPU)  # MONAI has none


def test_a_short_time_gets_narrow_networks():
    short, small = Machine(False, 0.1, fits, fits), {"shapes": ((60, 60, 60),) * 40}
    assert settings_of(planned(**small)).channels == (32, 128)
    assert settings_of(planned(short, **small)).channels == (32, 64)
    assert planned_ldm()["unet.channels"] == (64, 128)
    assert planned_ldm(short)["unet.channels"] == (48, 96)
    assert planned_ldm()["unet.num_res_blocks"] == (2,)
    assert planned_ldm(short)["unet.num_res_blocks"] == (1,)
    assert planned_cdal()["unet.channels"] == (48, 96)
    assert planned_cdal(short)["unet.channels"] == (32, 64)


def test_networks_have_the_channels_and_axes_of_the_images():
    rgb = planned(
        dims=2, channels=3, mirrored=(0.1, 0.1), shapes=((64, 80),) * 40, spacings=((1.0, 1.0),) * 40
    )
    assert rgb["vae.dims"] == 2
    assert rgb["vae.in_channels"] == 3


def test_no_case_is_cut_and_padding_can_be_halved():
    values = planned()
    assert values["data.size"] == (96, 112, 96)  # 91, 110, 88 in multiples of 16
    assert planned(shapes=((43, 59, 47),) * 40)["data.size"] == (48, 64, 48)


def test_patches_are_short_steps_no_larger_than_most_cases():
    values = planned(shapes=((36, 52, 36),) * 30 + ((48, 64, 48),) * 10)
    assert np.prod(values["data.patch"]) <= 36**3
    assert max(values["data.patch"]) <= 52
    assert planned(shapes=((30, 30, 30),) * 40)["data.patch"] is None
    small = {"shapes": ((40, 48, 40),) * 40}
    assert np.prod(planned(**small)["data.patch"]) > 32**3
    assert np.prod(planned(dataclasses.replace(CPU, hours=0.4), **small)["data.patch"]) <= 32**3


def test_no_patch_is_longer_than_every_case_along_an_axis():
    tight = dataclasses.replace(CPU, training_fits=lambda values: values["data.patch"] is not None)
    for shape in ((90, 110, 43), (37, 37, 37), (30, 30, 25)):
        for machine in (CPU, GPU, tight):
            patch = planned(machine, shapes=(shape,) * 40)["data.patch"]
            assert patch is None or all(n <= most for n, most in zip(patch, shape, strict=True))


def test_reasons_say_what_they_mean():
    whys = {choice.key: choice.why for choice in plan_vae(HEADS, CPU, {}).choices}
    assert whys["data.spacing"] == "spacings are alike: voxels stay as they are"
    assert "by left-right 100%; flips need 97%" in whys["data.augment.flip_axes"]
    assert whys["vae.in_channels"] == "the images have 1 channel"
    assert whys["vae.strides"].startswith("latents of 12x14x12")  # of 96 x 112 x 96, padded
    assert min(len(why.split()) for why in whys.values()) > 1


@pytest.mark.parametrize(
    ("size", "spacing", "multiple", "most", "expected"),
    [
        ((64, 64, 64), (1, 1, 1), (8, 8, 8), 40**3, (40, 40, 40)),
        ((64, 64, 16), (1, 1, 4), (8, 8, 2), 32 * 32 * 8, (32, 32, 8)),
        ((64, 64), (1, 1), (64, 64), 10, (64, 64)),
    ],
)
def test_the_longest_axis_in_mm_is_shortened_first(size, spacing, multiple, most, expected):
    assert shrink(size, spacing, multiple, most) == expected


def test_what_does_not_fit_gets_smaller_batches_then_smaller_patches():
    seen = []

    def small_memory(values):
        seen.append((values["batch_size"], values["data.patch"]))
        return values["batch_size"] == 1 and np.prod(values["data.patch"]) < 20_000

    values = planned(Machine(False, 1.0, small_memory, fits))
    assert values["batch_size"] == 1
    assert np.prod(values["data.patch"]) < 20_000
    assert seen[0][0] == 2


def test_a_batch_can_be_divided_among_the_ranks():
    eight = dataclasses.replace(CPU, ranks=8)
    assert planned(eight)["batch_size"] == planned_cdal(eight)["batch_size"] == 8
    assert planned_ldm(dataclasses.replace(CPU, ranks=3))["batch_size"] == 3
    tight = Machine(False, 1.0, lambda values: np.prod(values["data.patch"]) < 20_000, fits, 4)
    assert planned(tight)["batch_size"] == 4


def test_whole_cases_that_do_not_fit_are_validated_in_their_middle_and_the_plan_says_so():
    machine = Machine(False, 1.0, fits, lambda values: np.prod(values["data.size"]) < 300_000)
    plan = plan_vae(HEADS, machine, {})
    choice = next(choice for choice in plan.choices if choice.key == "data.size")
    assert np.prod(choice.value) < 300_000
    assert "whole cases of 96x112x96 do not fit" in choice.why


# --- stage two ----------------------------------------------------------------------------------------------

LATENTS = Latents(size=(12, 16, 12), spacing=(4.0, 4.0, 4.0), num_train=180, flip_axes=(0,), seconds=0.1)


def planned_ldm(machine=CPU, given=None, **facts) -> dict:
    plan = Plan(given or {})
    plan_ldm(plan, dataclasses.replace(LATENTS, **facts), machine)
    return {choice.key: choice.value for choice in plan.choices}


@pytest.mark.parametrize(
    ("facts", "num"),
    [
        ({}, 8),
        ({"num_train": 300}, 1),  # many cases
        ({"seconds": 0.5}, 4),  # a tenth of an hour is 360 s
        ({"seconds": 2.0}, 1),
    ],
)
def test_few_cases_are_encoded_in_variants_as_long_as_there_is_time(facts, num):
    values = planned_ldm(**facts)
    assert values["data.num_variants"] == num
    assert ("plain_end" in values) == (num > 1)
    assert ("data.augment.affine" in values) == (num > 1)
    assert values.get("data.augment.flip_axes") == ((0,) if num > 1 else None)


def test_other_data_have_their_own_files_split_and_size_and_the_scaling_and_spacing_of_the_autoencoder():
    theirs = DataConfig(mask="labels/*.nii", fold=(0, 5), scaling="window", window=(-900.0, 400.0))
    plan = Plan({})
    grid = plan_other_data(plan, HEADS, theirs, (1.0, 1.0, 2.0), (4, 4, 4))
    assert grid == ((96, 112, 88), (1.0, 1.0, 1.0))
    assert plan.values["data.image"] == "*/t1.nii.gz"
    assert plan.values["data.mask"] is plan.values["data.fold"] is plan.values["data.spacing"] is None
    assert plan.values["data.val_fraction"] == 0.1
    assert (plan.values["data.scaling"], plan.values["data.window"]) == ("window", (-900.0, 400.0))
    assert "--data.spacing 1.0,1.0,2.0 makes them alike" in plan.notes[0]
    plan = Plan({})
    resampled = dataclasses.replace(theirs, spacing=(2.0, 2.0, 2.0))
    assert plan_other_data(plan, HEADS, resampled, None, (4, 4, 4), {"mask"})[0] == (48, 56, 48)
    assert "data.mask" not in plan.values  # read as the autoencoder's were
    assert not plan.notes


def test_variants_are_flipped_where_the_autoencoder_has_seen_flips_and_the_data_allow_them():
    seen = DataConfig(augment=AugmentConfig(flip_axes=(0, 1)))
    assert common_flips(HEADS, seen) == (0,)
    assert common_flips(dataclasses.replace(HEADS, sides="label 'left'"), seen) == ()
    assert common_flips(HEADS, DataConfig()) == ()


@pytest.mark.parametrize(
    ("size", "levels", "width", "batch"),
    [
        ((4, 6, 4), 1, 64, 8),
        ((12, 16, 12), 2, 64, 2),
        ((16, 16, 16), 2, 32, 2),
        ((32, 32, 32), 3, 32, 2),
        ((28, 24), 2, 64, 8),
        ((48, 48), 3, 64, 8),
        ((64, 64), 3, 32, 4),
        ((128, 128), 3, 32, 2),
    ],
)
def test_a_denoiser_has_the_levels_and_widths_that_its_latents_need(size, levels, width, batch):
    values = planned_ldm(size=size, spacing=(4.0,) * len(size), flip_axes=())
    assert len(values["unet.channels"]) == levels == len(values["unet.strides"]) + 1
    assert values["unet.channels"][0] == width
    assert values["batch_size"] == batch
    names = ("dims", "strides", "channels", "attention_levels", "num_res_blocks")
    UNetConfig(**{name: values[f"unet.{name}"] for name in names})


def test_denoisers_of_volumes_learn_with_muon_on_cpus_and_by_its_rate():
    values = planned_ldm(size=(12, 16, 12))
    assert (values["optim.optimizer"], values["optim.lr"]) == ("muon", 3e-3)
    for other in (planned_ldm(size=(4, 6, 4)), planned_ldm(GPU, size=(12, 16, 12))):
        assert "optim.optimizer" not in other
        assert other["optim.lr"] < 3e-3
    chosen = planned_ldm(size=(12, 16, 12), given={"optim.optimizer": "adamw"})
    assert chosen["optim.lr"] == 1e-3
    assert planned_ldm(size=(4, 6, 4), given={"optim.optimizer": "muon"})["optim.lr"] == 3e-3
    adapters = planned_ldm(size=(12, 16, 12), given={"lora.rank": 4})
    assert ("optim.optimizer" in adapters, adapters["optim.lr"]) == (False, 1e-3)


def test_attention_is_where_the_positions_are_few_and_thick_latents_are_halved_less():
    assert planned_ldm()["unet.attention_levels"] == (False, True)
    assert planned_ldm(size=(64, 64, 64))["unet.attention_levels"] == (False, False, False)
    thick = planned_ldm(size=(32, 32, 10), spacing=(4.0, 4.0, 10.0))
    assert thick["unet.strides"] == ((2, 2, 1), (2, 2, 2))


def test_a_denoiser_on_a_gpu_is_wide_and_its_batch_fits():
    values = planned_ldm(Machine(True, 12.0, lambda v: v["batch_size"] <= 4, fits))
    assert values["unet.channels"] == (256, 256)
    assert values["batch_size"] == 4
    assert values["optim.lr"] < planned_ldm()["optim.lr"]


@pytest.mark.parametrize("machine", [CPU, dataclasses.replace(CPU, hours=0.2), GPU])
@pytest.mark.parametrize("given", [(), (96,), (80, 160), (100, 200, 300), (48, 40)])
@pytest.mark.parametrize("size", [(4, 6, 4), (12, 16, 12)])
def test_heads_divide_the_widths_that_attend(machine, given, size):
    values = planned_ldm(machine, {"unet.channels": given} if given else {}, size=size)
    names = ("dims", "strides", "channels", "attention_levels", "num_res_blocks", "head_channels")
    UNetConfig(num_groups=4, **{n: values[f"unet.{n}"] for n in names if f"unet.{n}" in values})
    if not given and not machine.short:
        assert values.get("unet.head_channels") == (64 if machine.gpu else None)


def test_a_short_run_of_a_denoiser_encodes_each_case_once_and_keeps_the_long_average_of_gradients():
    short = planned_ldm(Machine(False, 0.25, fits, fits), seconds=0.001)
    assert short["data.num_variants"] == 1
    assert "data.augment.affine" not in short
    assert planned_ldm(seconds=0.001)["data.num_variants"] == 8
    assert "optim.adam_betas" not in planned_ldm()
    assert planned()["optim.adam_betas"] == (0.9, 0.99)


# --- segmentation -------------------------------------------------------------------------------------------

LABELLED = {"labels": (0, 1), "labelled": 0.02, "num_masks": 40}


def planned_cdal(machine=CPU, given=None, **facts) -> dict:
    plan = plan_cdal(dataclasses.replace(HEADS, **(LABELLED | facts)), machine, given or {})
    return {choice.key: choice.value for choice in plan.choices}


def test_votes_are_planned_to_be_samples_of_several_raters():
    one, several = planned_cdal(), planned_cdal(num_raters=3)
    own = {k: v for k, v in several.items() if k not in one}
    assert own == {
        "votes": 8,
        "cdal.own_estimate": False,
        "cdal.kernel.num_timesteps": 16,
        "cdal.kernel.input_scale": 0.2,
        "cdal.dice_weight": 0.0,
    }
    assert own.items() <= train_cdal.PRESETS["cells"].items()
    assert {k: v for k, v in several.items() if k in one} == one


def test_cases_with_more_positions_than_a_cpu_can_attend_to_are_validated_in_windows():
    large = {"shapes": ((256, 256, 128),) * 40}
    assert "window" not in planned_cdal()
    assert "window" not in planned_cdal(GPU, **large)
    assert planned_cdal(**large)["window"] == planned_cdal(**large)["data.patch"]


def test_a_training_whose_attention_takes_minutes_is_noted_where_there_is_no_gpu(capsys):
    for positions, gpu in ((30_000, False), (30_001, True), (30_001, False)):
        note_attention(positions, gpu, "do less")
    assert capsys.readouterr().out.startswith("note: 30001 positions attend to each other: a step takes")


@pytest.mark.parametrize("widths", [(8,), (8, 16), (8, 16, 24), (8, 16, 24, 32)])
def test_given_widths_have_as_many_down_samplings_as_they_need(widths):
    for machine in (CPU, GPU):
        values = planned(machine, {"vae.channels": widths})
        assert len(values["vae.strides"]) == len(widths) - 1
        denoiser = Plan({"unet.channels": widths})
        plan_ldm(denoiser, LATENTS, machine)
        assert len(denoiser.values["unet.strides"]) == len(widths) - 1
        assert len(denoiser.values["unet.attention_levels"]) == len(widths)
        segmenter = plan_cdal(dataclasses.replace(HEADS, **LABELLED), machine, {"unet.channels": widths})
        assert len(segmenter.values["unet.strides"]) == len(widths) - 1


def test_patches_are_drawn_around_labels_that_are_rare():
    assert planned_cdal()["data.foreground"] == 0.5
    assert "data.foreground" not in planned_cdal(labelled=0.2)
    assert "data.foreground" not in planned_cdal(shapes=((40, 40, 40),) * 40)  # whole cases


def test_a_segmenter_sees_its_few_cases_changed():
    values = planned_cdal()
    assert values["data.augment.affine"] == values["data.augment.intensity"] == 0.5
    assert values["data.augment.max_rotation"] == 15
    assert "data.augment.colour" not in values
    slices = {"dims": 2, "pose": 0.0, "mirrored": (0.0, 0.0), "channels": 3}
    loose = planned_cdal(**slices, shapes=((512, 512),) * 40, spacings=((1.0, 1.0),) * 40)
    assert loose["data.augment.colour"] == 0.5
    assert loose["data.augment.max_rotation"] == 22
    assert loose["data.augment.max_scale"] == 0.25


def test_the_generator_fits_the_grid():
    values = planned_cdal(spacings=((1.0, 1.0, 4.0),) * 40, shapes=((96, 96, 20),) * 40)
    assert values["generator.stem"] == (2, 2, 1)
    assert values["unet.strides"] == ((2, 2, 1),)
    assert values["data.size"] == (96, 96, 20)
    slices = planned_cdal(dims=2, mirrored=(0.5, 0.9), shapes=((500, 512),) * 40, spacings=((1.0, 1.0),) * 40)
    assert slices["unet.dims"] == 2
    assert slices["unet.channels"] == (32, 64, 96, 128)
    assert slices["data.size"] == (504, 512)
    assert slices["optim.lr"] < values["optim.lr"]
    assert planned_cdal(GPU)["unet.channels"][0] == 64


def test_windows_validate_what_does_not_fit_whole():
    assert "window" not in planned_cdal()
    values = planned_cdal(Machine(False, 1.0, fits, lambda _: False))
    assert values["window"] == values["data.patch"]


# --- length -------------------------------------------------------------------------------------------------


def length(hours=1.0, seconds=0.5, num_train=100, passes=(1000, 100), given=None, patience=0, validation=0.0):
    plan = Plan({"batch_size": 2} | (given or {}))
    plan_length(plan, hours, seconds, passes, num_train, 0.05, patience, validation)
    return {choice.key: choice.value for choice in plan.choices}


def test_steps_fill_the_hours():
    assert length()["run.steps"] == 6100  # 85 % of 3600 / 0.5, in two digits
    assert length(hours=2)["run.steps"] == 12000
    assert length(seconds=5)["run.steps"] == 610


def test_few_cases_end_earlier():
    assert length(num_train=4, passes=(100, 100))["run.steps"] == 200
    assert length(num_train=1, passes=(100, 100))["run.steps"] == 100  # but not before that


def test_all_that_counts_in_steps_follows_from_them():
    values = length(given={"run.steps": 800}, patience=4)
    assert values["run.eval_every"] == values["run.save_every"] == 100
    assert length(hours=0.25, given={"run.steps": 800})["run.eval_every"] == 267  # 5 minutes apart, or more
    assert length(validation=40.0, given={"run.steps": 800})["run.eval_every"] == 100  # 320 of 3600 s
    assert length(validation=364.0, given={"run.steps": 800})["run.eval_every"] == 800  # a tenth has no room
    assert values["optim.warmup_steps"] == 40
    assert length(given={"run.steps": 50_000})["optim.warmup_steps"] == 1000
    assert values["run.log_every"] == 13
    assert values["run.ema_decay"] == pytest.approx(1 - 1 / 40)
    assert values["run.patience"] == 4
    assert "run.patience" not in length()


def test_how_far_apart_validations_are_is_said_of_the_steps_that_are_planned():
    plan = Plan({"batch_size": 2})
    plan_length(plan, 1.0, 0.5, (100, 100), 4, 0.05)  # 200 steps of an hour's 6100
    whys = {choice.key: choice.why for choice in plan.choices}
    assert whys["run.eval_every"] == "validations: 8, 15 s apart"  # 25 steps, and 15 % more


@pytest.mark.parametrize(("steps", "rounded"), [(4731, 4700), (99, 99), (3, 10), (123_456, 120_000)])
def test_steps_are_rounded_down_to_two_digits(steps, rounded):
    assert round_steps(steps) == rounded


# --- what a person says -------------------------------------------------------------------------------------


def test_a_given_setting_is_not_planned_and_later_rules_use_it():
    plan = plan_vae(HEADS, CPU, {"data.spacing": (2.0, 2.0, 2.0)})
    values = {choice.key: choice.value for choice in plan.choices}
    assert values["data.size"] == (48, 56, 48)  # the halves of 91, 110 and 88
    assert "data.spacing" not in plan.values
    row = next(line for line in plan.table().splitlines() if line.startswith("data.spacing"))
    assert row.split() == ["data.spacing", "2.0,2.0,2.0", "given"]


def test_the_table_names_every_setting_its_value_and_its_reason_in_110_columns():
    plan = plan_vae(dataclasses.replace(HEADS, notes=("look here",)), CPU, {})
    text = plan.table()
    assert max(map(len, text.splitlines())) <= 110
    for choice in plan.choices:
        assert f"\n{choice.key} " in f"\n{text}"
        assert choice.why.split()[0] in text
    assert text.startswith("note: look here\n")


def test_free_memory_is_what_the_system_says():
    import torch

    assert 0.1 < free_memory(torch.device("cpu")) < 1e5
    assert MemoryTable(None, device="cpu").budget > 0.1


# --- runs ---------------------------------------------------------------------------------------------------

SHORT = ["--run.steps", "6", "--run.eval_every", "3", "--run.save_every", "2", "--run.log_every", "1"]


@pytest.fixture
def folder(heads, tmp_path, monkeypatch):
    """A folder of 2-D heads; the current folder is an empty one."""
    monkeypatch.chdir(tmp_path)
    return heads


def check_plan_file(run, printed: str) -> dict[str, str]:
    """plan.json holds what the run was trained with, and what was printed; returns the reasons by key."""
    content, rows = load(step_files(run)[0]), json.loads((run / "plan.json").read_text())
    for row in rows:
        node = content["config"]
        for part in row["key"].split("."):
            node = node[part]
        assert node == row["value"], row
        assert row["key"] in printed
    assert content["step"] == 6
    assert content["config"]["preset"] == "heads"
    return {row["key"]: row["why"] for row in rows}


def test_three_commands_without_settings_go_from_a_folder_to_samples(folder, tmp_path, capsys, monkeypatch):
    built, build = [], train_ldm.build_autoencoder
    monkeypatch.setattr(train_ldm, "build_autoencoder", lambda *how: built.append(how) or build(*how))
    train_vae.main([str(folder), *SHORT])
    out = capsys.readouterr().out
    assert out.splitlines()[1] == "measuring a step ..."
    assert "are padded" not in out  # to the size that the plan has chosen
    assert check_plan_file(tmp_path / "runs/vae-heads", out)["run.steps"] == "given"
    assert out.splitlines()[-1] == "next: python train_ldm.py runs/vae-heads"
    train_ldm.main(["runs/vae-heads", *SHORT])
    out = capsys.readouterr().out
    assert out.splitlines()[0] == "measuring a step ..."
    assert len(built) == 2  # for the plan, however many batches it tries, and for the training
    why = check_plan_file(tmp_path / "runs/ldm-heads", out)
    assert why["data.num_variants"].startswith("10 training cases are few")
    sample.main(["runs/ldm-heads", "--num", "2", "--steps", "2"])
    samples = sorted((tmp_path / "runs/ldm-heads/samples-001").glob("*.tif"))
    assert [read(path).shape for path in samples] == [(16, 20), (16, 20)]
    again = capsys.readouterr().out
    train_ldm.main(["runs/vae-heads", *SHORT])  # the same command finds the run finished
    assert "finished at step 6" in capsys.readouterr().out, again


@pytest.mark.slow
def test_a_folder_alone_trains_a_segmenter(folder, tmp_path, capsys):
    train_cdal.main([str(folder), *SHORT])
    out = capsys.readouterr().out
    assert out.splitlines()[1] == "measuring a step ..."
    check_plan_file(tmp_path / "runs/cdal-heads", out)
    assert lines(tmp_path / "runs/cdal-heads", "val")[-1]["dice"] >= 0


def test_a_run_that_goes_on_does_not_plan_again(folder, tmp_path, monkeypatch):
    train_vae.main([str(folder), *SHORT, "--run.dir", "whole"])
    train_vae.main([str(folder), *SHORT, "--run.dir", "half", "--run.steps", "4"])
    before = (tmp_path / "half" / "plan.json").read_text()
    monkeypatch.setattr(train_vae, "plan_vae", None)  # planning would fail
    train_vae.main([str(folder), *SHORT, "--run.dir", "half"])
    assert (tmp_path / "half" / "plan.json").read_text() == before
    with pytest.raises(TypeError):
        train_vae.main([str(folder), *SHORT, "--run.dir", "half", "--run.fresh"])


def test_a_network_to_start_from_keeps_its_settings_and_is_refused_for_other_images():
    check_base({"vae.dims": HEADS.dims, "vae.in_channels": HEADS.channels}, HEADS, "runs/a")
    for key, words in (("vae.dims", "7 dimensions"), ("unet.dims", "7 dim"), ("vae.in_channels", "7 chan")):
        with pytest.raises(InputError, match=f"run.init: runs/a is for images of {words}"):
            check_base({key: 7}, HEADS, "runs/a")
    plan = plan_vae(
        HEADS, CPU, {"vae.latent_channels": 2}, base={"vae.channels": (8, 16), "vae.num_groups": 4}
    )
    whys = {choice.key: (choice.value, choice.why) for choice in plan.choices}
    assert whys["vae.channels"] == ((8, 16), "of the run that is taken over")
    assert whys["vae.latent_channels"] == (2, "given")
    assert plan.values["vae.num_groups"] == 4


@pytest.mark.parametrize("script", [train_vae, train_cdal])
def test_flags_of_two_dimensions_need_not_say_that_the_images_have_two(folder, monkeypatch, script):
    monkeypatch.setattr(script, "seconds_per_step", lambda *_: 1.0)
    monkeypatch.setattr(script, "train", lambda config, *_: trained.append(config.data))
    trained: list[DataConfig] = []
    script.main([str(folder), "--data.patch", "8,8"])
    assert [(data.dims, data.patch) for data in trained] == [(2, (8, 8))]


def test_the_same_command_goes_on_with_the_flags_of_planning_too(folder, tmp_path, capsys, mistake):
    command = [str(folder), *SHORT, "--hours", "0.01", "--memory", "4"]
    train_vae.main([*command, "--run.steps", "4"])
    train_vae.main([*command, "--run.steps", "6"])
    assert "going on from step 4" in capsys.readouterr().out
    train_vae.main([*command, "--memory", "8"])
    assert "finished at step 6" in capsys.readouterr().out
    line = mistake(train_vae.main, [str(folder), *SHORT, "--hours", "0"])
    assert "hours: expected more than 0, got 0" in line
    line = mistake(train_vae.main, [str(folder), *SHORT, "--hours", "2"])
    assert "hours was 0.01, now 2.0" in line


def test_two_folders_of_one_name_do_not_share_a_run(folder, tmp_path, capsys, mistake):
    other = tmp_path / "other" / "heads"
    write_phantoms(other, 12, seed=7, dims=2, size=(16, 20), spacing=(12.0, 11.0))
    train_vae.main([str(folder), *SHORT])
    line = mistake(train_vae.main, [str(other), *SHORT])
    assert line.startswith(f"error: runs/vae-heads: was trained on {folder}, this is {other} (")
    assert line.endswith("; choose another --run.dir, or start anew with --run.fresh\n")
    train_vae.main([str(other), *SHORT, "--run.dir", "second/vae-heads"])
    train_ldm.main(["runs/vae-heads", *SHORT])
    line = mistake(train_ldm.main, ["second/vae-heads", *SHORT])
    assert f"runs/ldm-heads: was trained on {tmp_path}/runs/vae-heads, this is" in line
    for path in (tmp_path / "runs/vae-heads").glob("checkpoint_*"):
        path.unlink()
    capsys.readouterr()
    train_vae.main([str(other), *SHORT])  # a run that has saved nothing is planned again
    out = capsys.readouterr().out
    assert "data.scaling" in out
    assert "runs/vae-heads: nothing was saved yet: starts from the beginning, 6 steps" in out


def test_a_planned_run_goes_on_where_its_folder_has_moved(folder, tmp_path, capsys, mistake):
    old, new = tmp_path / "old" / "heads", tmp_path / "new" / "heads"
    shutil.copytree(folder, old)
    train_vae.main([str(old), *SHORT, "--run.steps", "4"])
    train_ldm.main(["runs/vae-heads", *SHORT, "--run.steps", "4"])
    shutil.copytree(old, new)
    capsys.readouterr()
    train_vae.main([str(new), *SHORT, "--run.steps", "4"])  # a copy
    assert "finished at step 4" in capsys.readouterr().out
    shutil.rmtree(old)
    line = mistake(train_vae.main, [str(old), "--data.root", str(new)])
    assert f"{old}: no such folder; where the data have moved, their folder is the first word: {new}" in line
    Path("runs/vae-heads").rename("vae-heads")
    train_ldm.main([str(tmp_path / "vae-heads"), *SHORT, "--data.root", str(new)])
    assert "going on from step 4" in capsys.readouterr().out
    Path("vae-heads").rename("runs/vae-heads")
    train_vae.main([str(new), *SHORT])
    assert "going on from step 4" in capsys.readouterr().out


def test_plan_alone_prints_both_tables_and_touches_nothing(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(MemoryTable, "_largest", lambda *_, **__: 7)
    train_vae.main([str(folder), "--plan", "--memory", "8", "--hours", "0.5"])
    out = capsys.readouterr().out
    assert "0.5 h" in out  # how many steps fit depends on what else the machine does
    assert "of 8 GiB" in out
    assert [path.name for path in tmp_path.glob("runs/*")] == ["cache"]


def test_hours_decide_the_number_of_steps(folder, capsys, monkeypatch):
    monkeypatch.setattr(train_vae, "seconds_per_step", lambda *_: 2.0)
    monkeypatch.setattr(MemoryTable, "print", lambda _: None)
    train_vae.main([str(folder), "--plan", "--hours", "0.1"])
    out = capsys.readouterr().out
    assert "0.1 h at 2 s a step; 15 % is kept" in " ".join(out.split())


def test_the_votes_of_a_validation_cost_what_their_network_calls_do():
    cdal = CDALConfig(kernel=FewStepConfig(num_timesteps=16))
    config = train_cdal.Config(cdal=cdal, votes=8, batch_size=4)
    data = SimpleNamespace(spec=SimpleNamespace(size=(64, 64, 64)), split={"val": ["a"] * 31})
    assert train_cdal.seconds_of_validation(config, data, 1.2) == pytest.approx(31 * 8 * 16 * 0.1)
    patches = dataclasses.replace(config, data=dataclasses.replace(config.data, patch=(32, 32, 64)))
    assert train_cdal.seconds_of_validation(patches, data, 1.2) == pytest.approx(4 * 31 * 8 * 16 * 0.1)


def test_measuring_speed_does_not_disturb_training(folder, tmp_path):
    """The same settings from flags alone give the same run, to the bit."""
    flags = [*RUN, *VAE, *SHORT]
    train_vae.main([str(folder), *flags, "--run.dir", "planned"])
    content = load(step_files(tmp_path / "planned")[0])["config"] | {"plan": False}
    (tmp_path / "same.json").write_text(json.dumps(content | {"run": content["run"] | {"dir": "other"}}))
    train_vae.main([str(tmp_path / "same.json")])
    assert_same_end(tmp_path / "planned", tmp_path / "other")


@pytest.mark.parametrize(
    ("script", "flags", "words"),
    [
        (train_vae, "phantom --hours 1", "hours: has no effect with a preset"),
        (train_cdal, "phantom --memory 8", "memory: has no effect with a preset, but with --plan"),
        (train_vae, "nothing", "nothing: holds no images"),
        (train_vae, "images --hours -1", "hours: expected more than 0, got -1"),
        (train_vae, "nothing --run.init gone", "run.init: gone: no such run folder or checkpoint"),
        (train_cdal, "nothing --run.init gone", "run.init: gone: no such run folder or checkpoint"),
        (train_vae, "run", "run: a run folder, expected a folder of images"),
        (train_vae, "nothing --data.root /tmp", "data.root: /tmp, but the first word is the folder nothing"),
        (train_vae, "nowhere", "nowhere: no such preset or folder"),
        (train_cdal, "nothing", "nothing: holds no images"),
        (train_cdal, "images", "images: 0 masks for 2 images, and each needs one"),
        (train_ldm, "nothing", "nothing: no run folder; first python train_vae.py nothing, and then its run"),
        (train_ldm, "nothing", "or beside nothing the autoencoder of others, --vae runs/vae-NAME"),
        (train_ldm, "nothing --vae run", "run: no checkpoint in this folder"),
        (train_ldm, "run", "run"),
        (train_ldm, "runs/nope", "runs/nope: no such run; train it first: python train_vae.py ..."),
        (train_ldm, "images/b --vae run", "images/b: no such preset or folder"),
        (train_vae, "images/a.tif", "images/a.tif: is a file; give its folder, images"),
    ],
)
def test_mistakes_are_one_line(script, flags, words, mistake, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nothing").mkdir()
    (tmp_path / "images").mkdir()
    for name in "ab":
        tifffile.imwrite(tmp_path / f"images/{name}.tif", np.random.default_rng(0).random((16, 16)))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    assert words in mistake(script.main, flags.split())
    assert not list(tmp_path.glob("runs/*-*"))


def test_a_configuration_of_an_older_version_may_say_the_gib_of_a_device():
    for old in (None, 16.0):
        assert train_vae.Config.upgrade({"plan": old})["plan"] is False
