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
from ldm3d.conditions import label_shares
from ldm3d.data import DataSpec
from ldm3d.diffusion_kernel import SAMPLERS
from ldm3d.inference.editing import ImageEdit, Interpolation, filled, slerp

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
def test_inpainting_keeps_the_voxels_outside_the_region_bit_by_bit_with_every_sampler(dims, kind, sampler):
    model = make_model(dims, *kind)
    x, region = image_of(model), box_of(model)
    made = model.sample(2, steps=4, sampler=sampler, edit=ImageEdit(model, x, region))
    assert torch.equal(made[:, :, ~region], x[None, :, ~region].expand(2, -1, -1))
    assert not torch.allclose(made[0, :, region], x[:, region], atol=1e-2)
    assert not torch.allclose(made[0, :, region], made[1, :, region], atol=1e-3)


@pytest.mark.parametrize(("kind", "sampler"), KINDS)
def test_the_latent_outside_the_region_ends_where_it_was(kind, sampler):
    model = make_model(2, *kind)
    edit = ImageEdit(model, image_of(model), box_of(model))
    _, z = next(model.stream(range(2), 5, sampler, edit=edit))
    outside = ~edit.inside.expand_as(z)
    assert torch.allclose(z[outside], edit.z.expand_as(z)[outside], atol=1e-3)


@pytest.mark.parametrize(
    ("size", "channels", "voxel", "touched"),
    [
        ((16, 20), (4, 8), (8, 9), (4, 4)),
        ((41, 41), (4, 4, 4, 4), (7, 24), (0, 3)),
    ],  # 41 voxels: 6 latent ones
)
def test_the_region_lies_in_the_latent_where_the_encoder_puts_it(size, channels, voxel, touched):
    model = make_model(size=size, channels=channels)
    region = torch.zeros(model.spec.size, dtype=torch.bool)
    region[voxel] = True
    inside = ImageEdit(model, image_of(model), region).inside[0, 0]
    away = [
        max(abs(a - b) for a, b in zip(place, touched, strict=True)) for place in inside.nonzero().tolist()
    ]
    neighbours = len(range(max(0, touched[0] - 1), touched[0] + 2)) * 3
    assert sum(d <= 1 for d in away) == neighbours  # at least one more on each side
    assert max(away) <= 2


def with_lesion(x, region, there):
    """The image, or the image with a bright lesion of any strength all over the region."""
    return torch.where(region & there, x + 0.5 + x.abs(), x)


def test_a_linear_probe_on_the_kept_latents_does_not_see_what_was_replaced():
    model, region, generator = make_model(), box_of(make_model()), torch.Generator().manual_seed(0)
    images = torch.randn(300, 1, *model.spec.size, generator=generator)
    there = torch.rand(300, generator=generator) < 0.5
    images = torch.stack([with_lesion(x, region, lesion) for x, lesion in zip(images, there, strict=True)])
    touched = label_shares(region[None].long(), 2, model.autoencoder.downsampling)[:, 1:] > 0
    near = torch.nn.functional.max_pool2d(touched.float(), 3, 1, 1) > 0
    plain = model.encode(images).masked_fill(near, 0).flatten(1)
    assert auc_of_a_linear_probe(plain, there) > 0.8
    edits = [ImageEdit(model, x, region) for x in images]
    kept = torch.cat([edit.z.masked_fill(edit.inside, 0) for edit in edits]).flatten(1)
    assert auc_of_a_linear_probe(kept, there) <= 0.55


def auc_of_a_linear_probe(features, truth):
    """Ridge regression on the first half of the samples, the area under its ROC curve on the second."""
    half = len(features) // 2
    mean, std = features[:half].mean(0), features[:half].std(0)
    features, target = ((features - mean) / (std + 1e-6)).double(), truth.double() * 2 - 1
    gram = features[:half].T @ features[:half] + 30 * torch.eye(features.shape[1], dtype=torch.float64)
    scores = features[half:] @ torch.linalg.solve(gram, features[:half].T @ target[:half])
    pos, neg = scores[truth[half:]], scores[~truth[half:]]
    return float((pos[:, None] > neg).double().mean() + (pos[:, None] == neg).double().mean() / 2)


@pytest.mark.parametrize("dims", [2, 3])
def test_nothing_of_the_result_depends_on_what_was_in_the_region(dims):
    model = make_model(dims)
    x, region = image_of(model), box_of(model)
    other = torch.where(region, 3 - 2 * x, x)
    a, b = (model.sample(1, steps=3, edit=ImageEdit(model, image, region)) for image in (x, other))
    assert torch.equal(a, b)


@pytest.mark.parametrize(("kind", "sampler"), [(("flow", "velocity"), "euler"), (("vp", "v"), "ddim")])
def test_an_image_comes_back_from_the_noise_that_inversion_finds(kind, sampler):
    model = make_model(2, *kind)
    for p in model.denoiser.parameters():
        p.data *= 0.3  # a calmer network than that of the other tests
    x, there = image_of(model), {}
    back = model.decode(model.encode(x[None]))
    for own in (None, {}):
        edit = ImageEdit(model, x, strength=0.6, own=own)
        there[own is None] = model.sample(2, steps=20, sampler=sampler, edit=edit)
    assert torch.equal(*there[False].split(1))  # nothing is drawn
    errors = {drawn: float((made - back).abs().mean()) for drawn, made in there.items()}
    assert errors[False] < 0.05 * errors[True]


@pytest.mark.parametrize("dims", [2, 3])
def test_the_region_in_the_latent_has_all_that_its_content_changes(dims):
    model = make_model(dims)
    x, region = image_of(model).clamp(-1, 1), box_of(model)
    edit = ImageEdit(model, x, region)
    touched = label_shares(region[None].long(), 2, model.autoencoder.downsampling)[:, 1:] > 0
    assert (edit.inside | ~touched).all()
    assert edit.inside.sum() > touched.sum()
    for value in (-1.0, -0.3, 0.4, 1.0):
        change = (model.encode(x.masked_fill(region, value)[None]) - edit.z).abs().amax(1, keepdim=True)
        assert change[~edit.inside].max() <= max(0.4, 0.15 * change.max())
    assert not edit.inside.all()


@pytest.mark.parametrize("dims", [2, 3])
def test_a_hole_is_filled_from_its_surroundings_alone(dims):
    generator, size = torch.Generator().manual_seed(0), (17, 12, 9)[:dims]
    x, hole = torch.rand(1, 2, *size, generator=generator), torch.zeros(1, 1, *size, dtype=torch.bool)
    hole[(0, 0, *(slice(2, 8) for _ in size))] = True
    made = filled(x, hole)
    assert torch.equal(made.masked_fill(hole, 0), x.masked_fill(hole, 0))
    assert torch.equal(filled(x.masked_fill(hole, 99.0), hole), made)
    assert 0 <= made.min() <= made.max() <= 1
    assert torch.allclose(filled(torch.full_like(x, 0.7).masked_fill(hole, 5), hole), torch.full_like(x, 0.7))
    assert torch.equal(filled(x, hole | True), torch.zeros_like(x))


@pytest.mark.parametrize("sampler", ["euler", "heun", "ab2", "ddpm", "ddim", "dpmpp"])
def test_resampling_makes_what_is_filled_in_fit_what_is_kept(sampler):
    """Eight correlated Gaussian voxels, four kept; the network is exact. The truth is the conditional
    Gaussian of the other four."""
    process = SAMPLERS[sampler].process
    config = {"flow_shift": 1.0} if process == "flow" else {"process": "vp", "prediction": "v"}
    kernel = DiffusionKernel(KernelConfig(**config))
    place = torch.arange(8.0)
    cov = torch.exp(-((place[:, None] - place) ** 2) / 8) + 0.02 * torch.eye(8)
    kept, generator = place < 4, torch.Generator().manual_seed(0)

    def draw(shape):
        return torch.randn(shape, generator=generator)

    z = draw((3000, 1, 8)) @ torch.linalg.cholesky(cov).T
    slope = cov[4:, :4] @ torch.linalg.inv(cov[:4, :4])
    variance = (cov[4:, 4:] - slope @ cov[:4, 4:])[0, 0]

    def model(x_t, time):
        t = float(time[0]) / 1000 if process == "flow" else int(time[0])
        alpha, sigma = kernel.signal_and_noise(t)
        gain = alpha * cov @ torch.linalg.inv(alpha**2 * cov + sigma**2 * torch.eye(8))
        x_start = torch.where(kept, z, x_t @ gain.T)
        noise = (x_t - alpha * x_start) / sigma
        return noise - x_start if process == "flow" else alpha * noise - sigma * x_start

    ratio = {}
    for resample in (1, 4):
        made = kernel.sample(model, draw(z.shape), 20, sampler, draw=draw, resample=resample)
        error = made[:, 0, 4] - (z[:, 0, :4] @ slope.T)[:, 0]  # of the voxel beside the kept ones
        ratio[resample] = float(error.square().mean() / variance)
    assert ratio[4] < 0.6 * ratio[1]
    assert ratio[4] < 2.6


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
        (lambda m: ImageEdit(m, image_of(m), box_of(m), resample=0), "resample: expected 1 or more"),
        (lambda m: ImageEdit(m, image_of(m), box_of(m), own={}), "own: .*expected no region"),
        (lambda m: Interpolation(m, (0, 1), 1), "num"),
    ],
)
def test_wrong_edits_are_refused(make, words):
    with pytest.raises(InputError, match=words):
        make(make_model())
