"""What is to be kept is kept bit by bit, what is made joins it without a seam, with every sampler."""

import itertools
import math

import pytest
import torch

from ldm3d import (
    AutoencoderKL,
    Denoiser,
    DiffusionKernel,
    InputError,
    KernelConfig,
    LatentDiffusion,
    UNetConfig,
    VAEConfig,
)
from ldm3d.data import DataSpec
from ldm3d.diffusion_kernel import SAMPLERS
from ldm3d.inference.editing import ImageEdit, Interpolation, slerp

KINDS = [(("flow", "velocity"), s) for s in ("euler", "heun", "ab2")]
KINDS += [(("vp", "v"), s) for s in ("ddpm", "ddim", "dpmpp")] + [(("flow", "x_start"), "heun")]


def make_model(dims=2, process="flow", prediction="velocity", size=(16, 20, 12), channels=(4, 8)):
    size = size[:dims]
    torch.manual_seed(0)
    config = VAEConfig(dims=dims, channels=channels, num_groups=2, num_res_blocks=(1,), latent_channels=3)
    vae = AutoencoderKL(config).eval().requires_grad_(False)
    unet = UNetConfig(
        dims=dims, in_channels=3, out_channels=3, channels=(4, 8), num_groups=2, num_res_blocks=(1,),
        attention_levels=(False, True), head_channels=4,
    )  # fmt: skip
    denoiser = Denoiser(unet).eval().requires_grad_(False)
    for p in denoiser.parameters():
        torch.nn.init.normal_(p, std=0.1)
    one = {"low": (0.0,), "high": (1.0,), "source_low": (), "source_high": ()}
    state = DataSpec(
        dims=dims, channels=1, source_channels=0, size=size, spacing=(1.0,) * dims, orientation=None,
        scaling="minmax", num_labels=None, num_classes=None, **one,
    )  # fmt: skip
    z = vae.encode(torch.randn(4, 1, *size)).mean.transpose(0, 1).flatten(1)
    kernel = DiffusionKernel(KernelConfig(process=process, prediction=prediction))
    return LatentDiffusion(vae, denoiser, kernel, z.mean(1), z.std(1), state)


def image_of(model, seed=5):
    return torch.randn(1, *model.spec.size, generator=torch.Generator().manual_seed(seed))


def box_of(model):
    region = torch.zeros(model.spec.size, dtype=torch.bool)
    region[tuple(slice(5, 11) for _ in model.spec.size)] = True
    return region


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize(("kind", "sampler"), KINDS)
def test_inpainting_keeps_the_known_voxels_bit_by_bit_with_every_sampler(dims, kind, sampler):
    model = make_model(dims, *kind)
    x, region = image_of(model), box_of(model)
    made = model.sample(2, steps=4, sampler=sampler, edit=ImageEdit(model, x, region))
    assert torch.equal(made[:, :, ~region], x[None, :, ~region].expand(2, -1, -1))
    assert not torch.allclose(made[0, :, region], x[:, region], atol=1e-2)
    assert not torch.allclose(made[0, :, region], made[1, :, region], atol=1e-3)


@pytest.mark.parametrize(("kind", "sampler"), KINDS)
def test_the_known_part_of_the_latent_ends_where_it_was(kind, sampler):
    model = make_model(2, *kind)
    edit = ImageEdit(model, image_of(model), box_of(model))
    _, z = next(model.stream(range(2), 5, sampler, edit=edit))
    known = ~edit.inside.expand_as(z)
    assert torch.allclose(z[known], edit.z.expand_as(z)[known], atol=1e-3)


def test_the_region_is_a_latent_voxel_wider_in_latent_space():
    model = make_model()
    region = torch.zeros(model.spec.size, dtype=torch.bool)
    region[8, 9] = True  # lies in latent voxel (4, 4)
    inside = ImageEdit(model, image_of(model), region).inside[0, 0]
    assert inside.nonzero().tolist() == [[i, j] for i in (3, 4, 5) for j in (3, 4, 5)]


def test_the_region_lies_in_the_latent_where_the_encoder_puts_it():
    """41 voxels are 6 latent voxels of 8."""
    model = make_model(size=(41, 41), channels=(4, 4, 4, 4))
    region = torch.zeros(model.spec.size, dtype=torch.bool)
    region[7, 24] = True  # lies in latent voxel (0, 3)
    inside = ImageEdit(model, image_of(model), region).inside[0, 0]
    assert inside.nonzero().tolist() == [[i, j] for i in (0, 1) for j in (2, 3, 4)]


@pytest.mark.parametrize("dims", [2, 3])
def test_the_seam_is_smoothed_where_the_autoencoder_is_off(dims):
    model = make_model(dims)
    grids = torch.meshgrid(*(torch.linspace(-1, 1, n) for n in model.spec.size), indexing="ij")
    x, region = sum(grids)[None], box_of(model)
    decoded = (x + 0.5)[None]  # off by a constant

    def jump(feather):
        made = ImageEdit(model, x, region, feather=feather).finish(decoded)[0]
        middle = tuple(8 for _ in range(dims - 1))
        return abs(float((made - x)[(0, 5, *middle)]))  # first voxel inside, beside one that is exact

    assert jump(0) == pytest.approx(0.5)
    assert jump(6) < 0.25
    centre = ImageEdit(model, x, region, feather=2).finish(decoded)[0]
    assert float((centre - x)[(0, *(8,) * dims)]) == pytest.approx(0.5)  # what is far from the border stays


def test_a_lower_strength_stays_closer_to_the_image():
    model = make_model()
    x = image_of(model)
    there_and_back = model.decode(model.encode(x[None]))
    far = [
        float(
            (model.sample(2, steps=10, edit=ImageEdit(model, x, strength=s)) - there_and_back).square().mean()
        )
        for s in (0.1, 0.4, 0.8)
    ]
    assert far[0] < far[1] < far[2]


def test_strength_one_of_everything_is_a_new_sample():
    model = make_model()
    edited = model.sample(2, steps=4, edit=ImageEdit(model, image_of(model), strength=1.0))
    assert torch.equal(edited, model.sample(2, steps=4))


@pytest.mark.parametrize("process", ["vp", "flow"])
@pytest.mark.parametrize("strength", [0.3, 0.5, 0.85])
def test_the_same_strength_starts_at_the_same_noise_with_every_sampler_and_number_of_steps(process, strength):
    starts = set()
    names = [name for name, row in SAMPLERS.items() if row.process == process]
    config = {"prediction": "v"} if process == "vp" else {"flow_shift": 2.0}
    kernel = DiffusionKernel(KernelConfig(process=process, **config))
    for name, steps in itertools.product(names, (1, 7, 20, 30, 1000)):
        times = kernel.sampling_times(name, steps, (16, 16, 16), strength)
        assert len(times) <= math.ceil(strength * steps)  # dpmpp drops duplicates
        assert steps == 1000 or len(times) == math.ceil(strength * steps)
        starts.add(times[0])
    # a share of time: of the T timesteps, or of the time of flow before its shift
    shifted = 2 * strength / (1 + strength)
    assert list(starts) == pytest.approx([strength * 1000 - 1 if process == "vp" else shifted])


def test_the_grid_below_a_strength_is_the_samplers_own():
    flow, vp = (DiffusionKernel(KernelConfig(**how)) for how in ({}, {"process": "vp", "prediction": "v"}))
    assert flow.sampling_times("euler", 5, (8, 8), 0.4) == pytest.approx([0.4, 0.2])
    assert vp.sampling_times("ddim", 4, (8, 8), 0.5) == [499, 249]
    assert vp.sampling_times("ddpm", 1000, (8, 8), 0.0123) == list(range(12, -1, -1))
    # even in log(alpha / sigma), but for the three steps' share of an even grid
    times = vp.sampling_times("dpmpp", 100, (8, 8), 0.3)
    gaps = vp.half_log_snr[times].diff()[:20]
    assert (gaps / gaps.mean() - 1).abs().max() < 0.5


def test_slerp_goes_along_the_circle_at_constant_speed():
    a, b = torch.tensor([1.0, 0.0], dtype=torch.float64), torch.tensor([0.0, 1.0], dtype=torch.float64)
    for w in (0.0, 0.25, 0.5, 1.0):
        expected = torch.tensor([math.cos(w * math.pi / 2), math.sin(w * math.pi / 2)], dtype=torch.float64)
        assert torch.allclose(slerp(a, b, w), expected, atol=1e-10)
    assert torch.allclose(slerp(a, 2 * a, 0.5), 1.5 * a)  # parallel: on the line
    torch.manual_seed(0)
    noise = torch.randn(2, 10_000)
    assert float(slerp(*noise, 0.5).std()) == pytest.approx(1.0, abs=0.03)  # where a mean would have 0.71


def test_interpolation_begins_and_ends_with_the_two_samples():
    model = make_model()
    path = model.sample(4, steps=4, edit=Interpolation(model, (3, 7), 4), batch_size=3)
    ends = torch.cat([model.sample(1, steps=4, first=n) for n in (3, 7)])
    assert torch.allclose(path[[0, -1]], ends, atol=1e-4)
    far = (path - path[0]).flatten(1).norm(dim=1)
    assert far[1] < far[2] < far[3]


def test_an_interpolation_has_no_samples_beyond_its_ends():
    model = make_model()
    for indices in (range(4, 6), [-1]):
        with pytest.raises(InputError, match="interpolation: has samples 0 to 3"):
            next(model.stream(indices, 1, edit=Interpolation(model, (3, 7), 4)))


def test_interpolation_of_images_goes_from_one_to_the_other():
    model = make_model()
    a, b = image_of(model), image_of(model, 6)
    path = model.sample(5, steps=20, edit=Interpolation(model, (a, b), 5, strength=0.05))
    ends = model.decode(model.encode(torch.stack([a, b])))
    to_a, to_b = ((path - end).flatten(1).norm(dim=1) for end in ends)
    assert to_a.argmin() == 0
    assert to_b.argmin() == 4


def test_there_is_at_least_one_sample():
    with pytest.raises(InputError, match="num: expected 1 or more, got 0"):
        make_model().sample(0)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda m: ImageEdit(m, image_of(m)[:, 1:]), "image: expected shape"),
        (lambda m: ImageEdit(m, image_of(m), box_of(m)[1:]), "region: expected shape"),
        (lambda m: ImageEdit(m, image_of(m), box_of(m) & False), "region: is empty"),
        (lambda m: ImageEdit(m, image_of(m), strength=0.0), "strength"),
        (lambda m: Interpolation(m, (0, 1), 1), "num"),
    ],
)
def test_wrong_edits_are_refused(make, words):
    with pytest.raises(InputError, match=words):
        make(make_model())
