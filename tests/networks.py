"""Every network of the package, small: what tests of all networks are parametrised over.

`NETWORKS[name](dims, checkpointing)` is (net, inputs), and net(*inputs) is a forward as in training. All
weights are random, those that start at zero too. `tensors(output)` lists the tensors of any network's output.
"""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ldm3d import (
    VQVAE,
    AnatomyConfig,
    AutoencoderKL,
    Condition,
    ConditionConfig,
    Denoiser,
    Generator,
    GeneratorConfig,
    PatchDiscriminator,
    PatchDiscriminatorConfig,
    QuantizerConfig,
    TimeDiscriminator,
    TimeDiscriminatorConfig,
    UNet,
    UNetConfig,
    VAEConfig,
)

NetAndInputs = tuple[nn.Module, tuple]
VAE = {"channels": (4, 8), "num_res_blocks": (1,), "num_groups": 2, "latent_channels": 3}
UNET = UNetConfig(3, 3, 2, (8, 16), (1,), (False, True), head_channels=8, num_groups=4)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def randomised(net: nn.Module) -> nn.Module:
    """The network with all weights random, those that start at zero too."""
    for parameter in net.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return net


def kl(dims: int, checkpointing: bool, **changes) -> NetAndInputs:
    net = AutoencoderKL(VAEConfig(dims=dims, checkpointing=checkpointing, **{**VAE, **changes}))
    size = (8,) * dims
    return net, (draw(2, 1, *size), draw(2, *net.latent_shape(size), seed=1))


def vq(dims: int, checkpointing: bool, update: str) -> NetAndInputs:
    config = VAEConfig(dims=dims, checkpointing=checkpointing, **VAE)
    return VQVAE(config, QuantizerConfig(16, update)), (draw(2, 1, *(8,) * dims),)


def unet(dims: int, checkpointing: bool, **changes) -> NetAndInputs:
    net = UNet(dataclasses.replace(UNET, dims=dims, checkpointing=checkpointing, **changes))
    context = [draw(2, 5, 6, seed=2)] if "context_dim" in changes else []
    return net, (draw(2, 3, *(6, 7, 8)[:dims]), torch.tensor([3.0, 700.5]), *context)


def conditioned(dims: int, checkpointing: bool) -> NetAndInputs:
    conditions = [
        Condition("class", "class", ("0", "1", "2")),
        Condition("number", "age", mean=(50.0,), std=(10.0,)),
        Condition("spacing", "spacing", mean=(1.0,) * dims, std=(0.1,) * dims),
        Condition("text", "text", ("a", "in", "left", "lesion", "the"), length=4),
        Condition("embedding", "report", length=4, width=5),
        Condition("image", "image", width=3),
        Condition("tokens", "tokens", width=3),
        Condition("labels", "labels", width=4),
    ]
    size = (4, 6, 5)[:dims]
    values = {  # the second sample has none
        "class": torch.tensor([1, -1]),
        "age": torch.tensor([[40.0], [torch.nan]]),
        "spacing": torch.tensor([[1.1] * dims, [torch.nan] * dims]),
        "text": torch.tensor([[1, 4, 2, -1], [-1, -1, -1, -1]]),
        "report": torch.cat([draw(1, 4, 5), torch.full((1, 4, 5), torch.nan)]),
        "image": torch.cat([draw(1, 3, *size, seed=3), torch.full((1, 3, *size), torch.nan)]),
        "tokens": torch.cat([draw(1, 3, *size, seed=4), torch.full((1, 3, *size), torch.nan)]),
        "labels": torch.cat([draw(1, 4, *size, seed=5).softmax(1), torch.full((1, 4, *size), torch.nan)]),
    }
    config = dataclasses.replace(UNET, dims=dims, out_channels=3, checkpointing=checkpointing)
    net = Denoiser(config, ConditionConfig(context_dim=16, text_layers=1), conditions)
    return net, (draw(2, 3, *size), torch.tensor([5.0, 900.0]), values)


def controlled(dims: int, checkpointing: bool) -> NetAndInputs:
    size = (5, 6, 7)[:dims]
    conditions = [
        Condition("text", "text", ("a", "lesion"), length=2),
        Condition("labels", "labels", width=4),
    ]
    shares = draw(1, 4, *size, seed=5).softmax(1)
    values = {  # the second sample has none
        "text": torch.tensor([[1, 2], [-1, -1]]),
        "labels": torch.cat([shares, torch.full_like(shares, torch.nan)]),
    }
    config = dataclasses.replace(UNET, dims=dims, out_channels=3, checkpointing=checkpointing)
    net = Denoiser(config, ConditionConfig(context_dim=16, text_layers=1), conditions, control="labels")
    return net, (draw(2, 3, *size), torch.tensor([5.0, 900.0]), values)


def registers(dims: int, checkpointing: bool) -> NetAndInputs:
    size, factor = (5, 6, 3)[:dims], (4,) * dims
    config = dataclasses.replace(UNET, dims=dims, out_channels=3, checkpointing=checkpointing)
    anatomy = AnatomyConfig("bound", per_label=3, dim=16, head_width=8)
    net = Denoiser(config, anatomy=anatomy, num_labels=4, factor=factor)
    voxels = (2, *(4 * n - 1 for n in size))  # the mask ends before the last latent voxel does
    mask = torch.randint(4, voxels, generator=torch.Generator().manual_seed(1))
    return net, (draw(2, 3, *size), torch.tensor([20.0, 900.0]), None, mask)


def generator(dims: int, checkpointing: bool) -> NetAndInputs:
    config = dataclasses.replace(
        UNET, dims=dims, attention_levels=(False,), adaptive_norm=True, checkpointing=checkpointing
    )
    small = GeneratorConfig(encoder_channels=4, encoder_blocks=1, stem=(2,), latent_dim=5, mapping_layers=1)
    net = Generator(small, config, image_channels=1, num_labels=3)
    size = (8,) * dims
    x_t, image, z = draw(2, 3, *size), draw(2, 1, *size, seed=1), draw(2, 5, seed=2)
    return net, (x_t, torch.tensor([0.0, 1.0]), image, z)


def patch(dims: int, checkpointing: bool) -> NetAndInputs:
    config = PatchDiscriminatorConfig(dims, channels=4, num_scales=2, num_layers=1, norm="group")
    return PatchDiscriminator(config), (draw(2, 1, *(14,) * dims),)


def timed(dims: int, checkpointing: bool) -> NetAndInputs:
    net = TimeDiscriminator(TimeDiscriminatorConfig(dims, 4, channels=(4, 6, 8), emb_dim=8))
    x_t, x_prev = draw(2, 3, 2, *(9, 6, 5)[:dims])
    return net, (x_t, torch.arange(3), x_prev)


def with_options(make: Callable[..., NetAndInputs], **options) -> Callable[..., NetAndInputs]:
    """`make` with options, seeded, and with random weights where the network starts at zero."""

    def seeded(dims: int, checkpointing: bool = False) -> NetAndInputs:
        torch.manual_seed(0)
        net, inputs = make(dims, checkpointing, **options)
        return randomised(net), inputs

    return seeded


COMPVIS = {"final_silu": True, "attn_out_proj": False, "mid_attention": True, "extra_up_block": True}
NETWORKS: dict[str, Callable[..., NetAndInputs]] = {
    "kl": with_options(kl),
    "kl attention": with_options(kl, mid_attention=True, attention_levels=(False, True)),
    "kl compvis": with_options(kl, double_z=True, **COMPVIS),
    "kl trilinear": with_options(kl, upsample="trilinear", down_pad="sym"),
    "kl deconv2": with_options(kl, upsample="deconv2", stem=(2,)),
    "kl deconv3": with_options(kl, upsample="deconv3", num_res_blocks=(1, 2)),
    "kl plain": with_options(kl, trunk="plain", num_groups=32, res_channels=(3,)),
    "vq ema": with_options(vq, update="ema"),
    "vq gradient": with_options(vq, update="gradient"),
    "unet": with_options(unet),
    "unet context": with_options(unet, context_dim=6),
    "unet no projection": with_options(unet, attn_out_proj=False),
    "denoiser conditions": with_options(conditioned),
    "denoiser registers": with_options(registers),
    "denoiser control": with_options(controlled),
    "generator": with_options(generator),
    "patch discriminator": with_options(patch),
    "time discriminator": with_options(timed),
}
CHECKPOINTED = [name for name in NETWORKS if "discriminator" not in name]


def tensors(output) -> list[Tensor]:
    """The floating-point tensors of an output: a tensor, or tuples and dataclasses of outputs."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if dataclasses.is_dataclass(output):
        output = [getattr(output, field.name) for field in dataclasses.fields(output)]
    return [tensor for part in output for tensor in tensors(part)]


def outputs_and_gradients(
    net: nn.Module, call: Callable, inputs: tuple
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The outputs of call(*inputs), and the gradients of their mean squares, by the names of parameters."""
    net.zero_grad()
    outputs = tensors(call(*inputs))
    sum(output.float().square().mean() for output in outputs).backward()
    gradients = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    return [output.detach() for output in outputs], gradients
