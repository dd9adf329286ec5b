"""Patches of latents know their place: each is a part of its latent, and so are its coordinates."""

import dataclasses
import functools
import mmap

import numpy as np
import pytest
import tiny
import torch
from networks import UNET
from torch import nn

import ldm3d
import train_ldm
from ldm3d import latents
from ldm3d.config import InputError
from ldm3d.data import collate
from ldm3d.denoiser import Denoiser
from ldm3d.engine.checkpoint import load, step_files
from ldm3d.large.patches import (
    PatchConfig,
    cut,
    cut_batch,
    draw_box,
    draw_boxes,
    draw_size,
    longest_side,
    position_step,
)
from ldm3d.large.windows import Windows
from ldm3d.latents import LatentDataset, page_ranges

SIZE, SPACING = (128, 160, 100), (1.0, 1.0, 2.0)  # the longest side is 200 mm


def placed() -> Denoiser:
    torch.manual_seed(0)
    unet = dataclasses.replace(UNET, dims=2, out_channels=3)
    net = Denoiser(unet, position_step=(0.1, 0.2)).eval().requires_grad_(False)
    for p in net.parameters():
        nn.init.normal_(p, std=0.1)
    return net


def test_positions_are_mm_from_the_middle_over_half_of_the_longest_side():
    longest = longest_side(SIZE, SPACING)
    step = position_step(PatchConfig((8, 8, 8)), longest, SPACING, (4, 4, 2))
    net = Denoiser(UNET, position_step=step)
    where = net.coordinates(torch.zeros(2, 4, 32, 40, 50))
    for axis, n in enumerate((32, 40, 50)):
        mm = (torch.arange(n) + 0.5) * 4 - n * 4 / 2  # the middles of latent voxels, of 4 mm on each axis
        expected = (mm / 100).view([n if a == axis else 1 for a in range(3)]).expand(32, 40, 50)
        torch.testing.assert_close(where[1, axis], expected, atol=1e-6, rtol=0)
    assert position_step(PatchConfig(), longest, SPACING, (4, 4, 2)) == ()


def test_sizes_are_drawn_with_the_shares_asked_for():
    config = PatchConfig((8, 12), halvings=2, share=0.4)
    drawn = [draw_size(config, 3, step) for step in range(2000)]
    for size, share in {None: 0.4, (8, 12): 0.2, (4, 6): 0.2, (2, 3): 0.2}.items():
        assert drawn.count(size) / 2000 == pytest.approx(share, abs=0.035)
        assert (pytest.approx(share), size or (16, 20)) in config.mix((16, 20))
    assert drawn[:50] != [draw_size(config, 4, step) for step in range(50)]
    assert draw_size(PatchConfig(), 3, 0) is None
    assert PatchConfig().mix((16, 20)) == [(1, (16, 20))]
    assert PatchConfig((8, 12), share=0).mix((16, 20)) == [(0.5, (8, 12)), (0.5, (4, 6))]


def test_patches_are_everywhere_and_belong_to_the_sample():
    positions = torch.arange(600)
    boxes = draw_boxes((2, 3), (4, 5), 1, positions)
    places = [(slice(i, i + 2), slice(j, j + 3)) for i in range(3) for j in range(3)]
    counts = [boxes.count(place) for place in places]
    assert sum(counts) == 600
    assert min(counts) > 40
    assert draw_boxes((2, 3), (4, 5), 1, positions[7:9]) == boxes[7:9]


def test_all_that_has_a_place_is_cut_alike():
    latent, mask = torch.arange(2 * 3 * 4 * 5.0).view(2, 3, 4, 5), torch.arange(2 * 11 * 14).view(2, 11, 14)
    batch = {"mean": latent, "source": -latent, "mask": mask, "class": torch.tensor([0, 1])}
    own = cut_batch(batch, [(slice(0, 2), slice(1, 4)), (slice(2, 4), slice(2, 5))], (3, 3))
    assert own.keys() == {"mean", "source", "mask"}
    assert torch.equal(own["mean"][1], latent[1, :, 2:4, 2:5])
    assert torch.equal(own["source"], -own["mean"])
    assert torch.equal(own["mask"][0], mask[0, 0:6, 3:12])
    assert torch.equal(own["mask"][1, :5, :8], mask[1, 6:11, 6:14])
    assert torch.equal(own["mask"][1, 5, :8], mask[1, 10, 6:14])  # the edge is repeated up to a latent voxel


def test_a_window_has_the_coordinates_of_its_place():
    net, x, t = placed(), torch.randn(2, 3, 6, 7), torch.tensor([3.0, 500.0])
    where = net.coordinates(x)
    total, weight = torch.zeros(2, 3, 6, 7), torch.zeros(6, 7)
    for box in [(slice(i, i + 4), slice(j, j + 5)) for i in (0, 2) for j in (0, 2)]:
        w = torch.sin((torch.arange(4) + 0.5) / 4 * torch.pi)[:, None] ** 2
        w = w * torch.sin((torch.arange(5) + 0.5) / 5 * torch.pi) ** 2
        total[(..., *box)] += w * net(x[(..., *box)], t, positions=where[(..., *box)])
        weight[box] += w
    found = Windows(net, (6, 7), (4, 5), 0.5, 3)(x, t)
    torch.testing.assert_close(found, total / weight, rtol=1e-4, atol=1e-5)
    assert torch.equal(net(x, t), net(x, t, positions=where))
    assert not torch.allclose(net(x, t), net(x, t, positions=where + 1), atol=1e-3)


def test_patches_of_all_of_a_latent_are_the_latent():
    x = torch.randn(2, 3, 4, 5)
    assert torch.equal(cut(x, draw_boxes((4, 5), (4, 5), 0, torch.arange(2))), x)


def test_a_cached_latent_is_cut_where_it_is_read(tmp_path):
    """The same patches as of whole latents, of memory maps and of masks that are no multiple of a latent
    voxel; some steps are whole."""
    draw, tables = np.random.default_rng(0), {}
    for name, shape in {"mean": (3, 2, 3, 4, 5), "labels": (3, 2, 2, 4, 5), "mask": (3, 2, 11, 14)}.items():
        np.save(tmp_path / f"{name}.npy", draw.normal(size=shape).astype(np.float32))
        tables[name] = np.load(tmp_path / f"{name}.npy", mmap_mode="r")
    config = PatchConfig((2, 3), halvings=0, share=0.4)
    whole = LatentDataset(tables, 7)
    own = LatentDataset(tables, 7, functools.partial(draw_box, config, (4, 5), 7, 2), (3, 3))
    sizes = set()
    for step in range(12):
        positions = torch.arange(2) + 2 * step
        batch = collate([whole[int(p), int(p) % 3] for p in positions])
        if size := draw_size(config, 7, step):
            batch |= cut_batch(batch, draw_boxes(size, (4, 5), 7, positions), (3, 3))
        found = collate([own[int(p), int(p) % 3] for p in positions])
        assert found.keys() == batch.keys()
        assert all(torch.equal(found[name], batch[name]) for name in batch)
        sizes.add(size)
    assert sizes == {None, (2, 3)}


def test_pages_that_are_asked_for_hold_the_patch_and_little_else():
    x = np.arange(2 * 4 * 16 * 64 * 64, dtype=np.int32).reshape(2, 4, 16, 64, 64)  # planes of four pages
    part = x[1, :, 3:9, 20:40, 30:50]
    ranges, asked = page_ranges(part, x.ctypes.data), np.zeros(x.nbytes, bool)
    for start, num in ranges:
        assert start % mmap.PAGESIZE == 0
        asked[start : start + num] = True
    assert asked[4 * part].all()
    assert asked[4 * part + 3].all()
    assert asked.sum() < 4 * part.nbytes + len(ranges) * mmap.PAGESIZE < x.nbytes / 4


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (PatchConfig((8, 8, 8)), "patch.size: expected 2 numbers, one an axis, got 8,8,8"),
        (PatchConfig((8, 24)), "patch.size: expected at most 16,20, the latent, got 8,24"),
        (PatchConfig((8, 4), halvings=2), "patch.size: expected at least 8,8 with patch.halvings 2, got 8,4"),
    ],
)
def test_patches_that_a_latent_or_a_network_cannot_have(config, words):
    with pytest.raises(InputError, match=words):
        config.check((16, 20), (2, 2))


PATCHES = ["--patch.size", "4,4", "--patch.share", "0.3"]


@pytest.fixture(scope="module")
def on_patches(vae_run, tmp_path_factory):
    """The folder of a run on patches, after four steps."""
    folder = tmp_path_factory.mktemp("patches") / "whole"
    train_ldm.main(tiny.ldm_flags(vae_run, folder, 4, *PATCHES))
    return folder


def test_a_run_on_patches_that_was_stopped_goes_on_bit_for_bit_and_is_loaded(vae_run, on_patches, tmp_path):
    for steps in (2, 4):
        train_ldm.main(tiny.ldm_flags(vae_run, tmp_path / "stopped", steps, *PATCHES))
    runs = [load(step_files(folder)[0]) for folder in (on_patches, tmp_path / "stopped")]
    tiny.assert_equal(runs[0]["model"], runs[1]["model"])
    model = ldm3d.load(on_patches).model
    # heads of 16 x 20 voxels of 12 x 11 mm, four voxels a latent voxel, half of 220 mm
    assert model.denoiser.arguments.position_step == pytest.approx((48 / 110, 44 / 110))
    assert model.window == (4, 5)
    assert model.sample(1, steps=1).shape == (1, 1, 16, 20)


WAYS = {"adapters": ["--lora.rank", 2], "control": ["--control", "labels"], "all weights": PATCHES}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_run_that_starts_from_another_keeps_its_positions_in_mm(way, vae_run, on_patches, tmp_path):
    """Volumes of 16 x 28 voxels are 308 mm long; a place in mm has the position that the base has learned."""
    base = ["--run.init", on_patches, "--data.dims", 2, "--data.size", "16,28"]
    for steps in (1, 2):
        train_ldm.main(tiny.ldm_flags(vae_run, tmp_path / "run", steps, *base, *way))
        model = ldm3d.load(tmp_path / "run").model
        assert model.latent_shape == (3, 4, 7)
        assert model.denoiser.arguments.position_step == pytest.approx((48 / 110, 44 / 110))


def test_masks_of_patches_teach_registers(vae_run, tmp_path, monkeypatch):
    reads, read_box = [], latents.read_box
    monkeypatch.setattr(latents, "read_box", lambda value, box: reads.append(box) or read_box(value, box))
    flags = ["--patch.size", "4,4", "--patch.share", "0", *tiny.BOUND]
    train_ldm.main(tiny.ldm_flags(vae_run, tmp_path / "run", 1, *flags))
    (line,) = tiny.lines(tmp_path / "run")
    assert line["head"] > 0
    assert line["binding"] > 0
    assert "dice_1_u0.05" in tiny.lines(tmp_path / "run", "val")[0]
    assert any(reads)  # the training read patches, the validation whole latents
    assert None in reads
