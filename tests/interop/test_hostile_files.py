"""A file of weights that is damaged, unsafe or of something else is one line that names it, and no run.

Each case spoils the weights of a sound autoencoder or U-Net, which the first test imports.
"""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from ldm3d import VQVAE, AutoencoderKL, Denoiser, QuantizerConfig, UNetConfig, VAEConfig
from ldm3d.control import ControlNet
from ldm3d.discriminators import PatchDiscriminator, PatchDiscriminatorConfig
from ldm3d.interop.__main__ import main
from ldm3d.interop.files import read_safetensors, write_safetensors
from ldm3d.interop.layouts import extract

VAE = VAEConfig(2, channels=(4, 8), num_res_blocks=(1,), attention_levels=(False, True), num_groups=2)
UNET = UNetConfig(
    2, channels=(8, 16), num_res_blocks=(1,), attention_levels=(False, True), head_channels=8, num_groups=4
)


def sound() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return extract(AutoencoderKL(VAE), "monai")


def unet() -> dict[str, torch.Tensor]:
    return extract(Denoiser(UNET), "monai")


def vqvae() -> dict[str, torch.Tensor]:
    config = VAEConfig(2, 1, 3, (4, 8), (1,), trunk="plain", quant_conv=False)
    return extract(VQVAE(config, QuantizerConfig(8)), "monai_vq")


def controlnet() -> dict[str, torch.Tensor]:
    return extract(ControlNet(UNET, 2, (4, 6), num_classes=3), "monai")


def discriminator() -> dict[str, torch.Tensor]:
    config = PatchDiscriminatorConfig(2, 1, 4, 2, num_scales=2, scale_by="depth", last_kernel=1)
    return extract(PatchDiscriminator(config), "monai")


class Code:
    """A pickle that would run code."""

    def __reduce__(self):
        return os.system, ("touch /tmp/ldm3d-was-here",)


def spoiled(change, make=sound):
    """A file whose state `change` has changed in place, or replaced."""

    def write(path: Path) -> None:
        state = make()
        torch.save(change(state) or state, path)

    return write


def with_bytes(change):
    """A sound file whose bytes `change` has changed."""

    def write(path: Path) -> None:
        torch.save(sound(), path)
        path.write_bytes(change(path.read_bytes()))

    return write


def safe(change, header=None):
    """A safetensors file with changed bytes or a changed header."""

    def write(path: Path) -> None:
        write_safetensors(path, sound())
        content = path.read_bytes()
        size = int.from_bytes(content[:8], "little")
        table, data = json.loads(content[8 : 8 + size]), content[8 + size :]
        if header is not None:
            header(table)
            text = json.dumps(table).encode()
            content = len(text).to_bytes(8, "little") + text + data
        path.write_bytes(change(content) if change else content)
        shutil.move(path, path.with_suffix(".safetensors"))

    return write


def first(table: dict) -> dict:
    return table["encoder.blocks.0.conv.weight"]


def cut(state, name, *index):
    state[name] = state[name][index].clone()


MIDDLE = "encoder.blocks.1.conv2.conv.weight"
HOSTILE = {  # what is wrong -> (how the file is written, what the line says)
    "empty": (lambda path: path.write_bytes(b""), "damaged"),
    "text": (lambda path: path.write_text("not weights at all"), "refused"),
    "truncated": (with_bytes(lambda content: content[: len(content) // 2]), "damaged"),
    "without its end": (with_bytes(lambda content: content[:-100]), "damaged"),
    "code": (lambda path: torch.save({"state_dict": sound(), "hook": Code()}, path), "refused"),
    "code alone": (lambda path: path.write_bytes(pickle.dumps(Code())), "refused"),
    "a whole module": (lambda path: torch.save(AutoencoderKL(VAE), path), "refused"),
    "a TorchScript": (
        lambda path: torch.jit.save(torch.jit.script(torch.nn.ReLU()), str(path)),
        "TorchScript",
    ),
    "a list": (lambda path: torch.save([1, 2, 3], path), "no weights"),
    "one tensor": (lambda path: torch.save(torch.zeros(3), path), "no weights"),
    "an empty dict": (lambda path: torch.save({}, path), "no weights"),
    "an empty state": (lambda path: torch.save({"state_dict": {}}, path), "no weights"),
    "an optimizer": (lambda path: torch.save({"optimizer": {"state": {}}, "epoch": 3}, path), "no weights"),
    "numbers as names": (lambda path: torch.save({1: torch.zeros(2)}, path), "no weights"),
    "a missing tensor": (spoiled(lambda state: {k: v for k, v in state.items() if k != MIDDLE}), MIDDLE),
    "a missing block": (
        spoiled(lambda state: {k: v for k, v in state.items() if ".blocks.2." not in k}),
        "blocks.2",
    ),
    "no decoder": (
        spoiled(lambda state: {k: v for k, v in state.items() if not k.startswith("decoder")}),
        "decoder.blocks.0.conv.weight is missing",
    ),
    "a tensor too many": (
        spoiled(lambda state: state.update({"encoder.blocks.1.norm3.weight": torch.zeros(4)})),
        "encoder.blocks.1.norm3.weight is left over",
    ),
    "another network beside": (
        spoiled(lambda state: state.update({f"critic.{k}": v for k, v in state.items()})),
        "left over",
    ),
    "two families": (spoiled(lambda state: state.update(unet())), "left over"),
    "two spellings": (
        spoiled(lambda state: state.update({"encoder.blocks.4.to_q.weight": torch.zeros(8, 8)})),
        "in two spellings",
    ),
    "a wrong shape": (spoiled(lambda state: cut(state, MIDDLE, slice(3))), "which does not fit"),
    "a wrong kernel": (spoiled(lambda state: cut(state, MIDDLE, ..., slice(2))), "which does not fit"),
    "a scalar weight": (
        spoiled(lambda state: state.update({"post_quant_conv.conv.bias": torch.tensor(1.0)})),
        "post_quant_conv.conv.bias",
    ),
    "a kernel without axes": (
        spoiled(lambda state: state.update({"post_quant_conv.conv.weight": torch.ones(3)})),
        "post_quant_conv.conv.weight is (3,), which is no matrix and no kernel",
    ),
    "q unlike k": (
        spoiled(lambda state: cut(state, "encoder.blocks.4.attn.to_q.weight", slice(None), slice(5))),
        "differ in shape",
    ),
    "not finite": (spoiled(lambda state: state.update({MIDDLE: state[MIDDLE] / 0})), "not finite"),
    "complex": (spoiled(lambda state: {k: v.to(torch.complex64) for k, v in state.items()}), "real numbers"),
    "unknown names": (spoiled(lambda state: {f"x{i}": v for i, v in enumerate(state.values())}), "unknown"),
    "blocks in disorder": (
        spoiled(
            lambda state: {k.replace("encoder.blocks.0.", "encoder.blocks.9."): v for k, v in state.items()}
        ),
        "blocks.0",
    ),
    "a number of blocks beyond all": (
        spoiled(lambda state: state.update({"encoder.blocks.99999999.conv.weight": torch.zeros(3)})),
        "encoder.blocks.",
    ),
    "a U-Net without its autoencoder": (lambda path: torch.save(unet(), path), "head_channels"),
    "a VQVAE without its running means": (
        spoiled(lambda state: {k: v for k, v in state.items() if "ema_w" not in k}, vqvae),
        "quantizer.quantizer.ema_w is missing",
    ),
    "a VQVAE with blocks in disorder": (
        spoiled(lambda state: {k: v for k, v in state.items() if "encoder.blocks.4" not in k}, vqvae),
        "in an order that no VQVAE has",
    ),
    "a VQVAE without decoder": (
        spoiled(lambda state: {k: v for k, v in state.items() if not k.startswith("decoder")}, vqvae),
        "decoder.blocks.0.conv.weight is missing",
    ),
    "a VQVAE with kernels of 3": (
        spoiled(lambda state: cut(state, "encoder.blocks.0.conv.weight", ..., slice(3)), vqvae),
        "encoder.blocks.0.conv.weight is (4, 1, 4, 3), which does not fit",
    ),
    "a VQVAE with codes of two widths": (
        spoiled(lambda state: cut(state, "quantizer.quantizer.ema_w", slice(None), slice(2)), vqvae),
        "quantizer.quantizer.ema_w is (8, 2), which does not fit",
    ),
    "a VQVAE with a learned slope": (
        spoiled(lambda state: state.update({"encoder.blocks.0.adn.A.weight": torch.ones(1)}), vqvae),
        "encoder.blocks.0.adn.A.weight is left over",
    ),
    "a VQVAE whose codes are one number": (
        spoiled(lambda state: state.update({"quantizer.quantizer.embedding.weight": torch.ones(())}), vqvae),
        "quantizer.quantizer.embedding.weight",
    ),
    "a ControlNet is no run": (
        lambda path: torch.save({"controlnet_state_dict": controlnet()}, path),
        "holds a MONAI ControlNet, of which no run folder can be made",
    ),
    "a ControlNet without a zero convolution": (
        spoiled(lambda state: {k: v for k, v in state.items() if "down_blocks.2.conv" not in k}, controlnet),
        "controlnet_down_blocks.2.conv.weight is missing",
    ),
    "a ControlNet without its embedding's blocks": (
        spoiled(
            lambda state: {k: v for k, v in state.items() if "blocks.1.conv.weight" not in k}, controlnet
        ),
        "controlnet_cond_embedding.blocks.1.conv.weight is missing",
    ),
    "a ControlNet with a way up": (
        spoiled(lambda state: state.update({"out.0.weight": torch.ones(8)}), controlnet),
        "out.0.weight is left over",
    ),
    "a ControlNet with blocks beyond all": (
        spoiled(
            lambda state: state.update(
                {"controlnet_cond_embedding.blocks.99999999.conv.weight": torch.ones(2, 2)}
            ),
            controlnet,
        ),
        "controlnet_cond_embedding.blocks.3.conv.weight is missing",
    ),
    "a PatchDiscriminator is no run": (
        spoiled(lambda state: None, discriminator),
        "ldm3d.interop.load(FILE) gives the network, train_vae.py --disc_init FILE goes on with it",
    ),
    "a PatchDiscriminator without its last layer": (
        spoiled(lambda state: {k: v for k, v in state.items() if "0.final_conv" not in k}, discriminator),
        "discriminator_0.final_conv.conv.weight is missing",
    ),
    "a PatchDiscriminator with scales of other depths": (
        spoiled(lambda state: {k: v for k, v in state.items() if "_1.3.conv" not in k}, discriminator),
        "[2, 3] layers at the scales",
    ),
    "a PatchDiscriminator with half a batch norm": (
        spoiled(
            lambda state: state.update({"discriminator_0.0.adn.N.running_mean": torch.ones(8)}), discriminator
        ),
        "is not a whole batch norm of discriminator_0.0.conv.weight",
    ),
    "a PatchDiscriminator with affine norms": (
        spoiled(lambda state: state.update({"discriminator_0.0.adn.N.weight": torch.ones(8)}), discriminator),
        "discriminator_0.0.adn.N.weight is left over",
    ),
    "safetensors: huge header": (safe(lambda content: b"\xff" * 8 + content[8:]), "header"),
    "safetensors: no JSON": (safe(lambda content: content[:8] + b"{!" + content[10:]), "not JSON"),
    "safetensors: cut": (safe(lambda content: content[:-50]), "does not fit the file"),
    "safetensors: bad offsets": (
        safe(None, lambda table: first(table).update(data_offsets=[0, 10**9])),
        "does not fit the file",
    ),
    "safetensors: negative shape": (
        safe(None, lambda table: first(table).update(shape=[-1, 2])),
        "does not fit",
    ),
    "safetensors: odd type": (safe(None, lambda table: first(table).update(dtype="F8")), "does not fit"),
    "safetensors: a word for an entry": (safe(None, lambda table: table.update(x="tensor")), "does not fit"),
    "our own run": (
        lambda path: torch.save({"format": 1, "kind": "vae", "ema": sound()}, path),
        "ldm3d.load",
    ),
}


def run(path: Path, tmp_path: Path, *flags: str) -> list[str]:
    found = path if path.exists() else path.with_suffix(".safetensors")
    return ["import", str(found), "--to", str(tmp_path / "run"), *flags]


def test_the_sound_file_is_imported(tmp_path):
    torch.save(sound(), tmp_path / "model.pt")
    main(run(tmp_path / "model.pt", tmp_path, "--num_groups", "2"))
    assert (tmp_path / "run" / "best.pt").exists()


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_one_line(name, tmp_path, mistake):
    write, says = HOSTILE[name]
    write(tmp_path / "model.pt")
    flags = () if "VQVAE" in name or "PatchDisc" in name else ("--num_groups", "2")
    flags = ("--num_groups", "4", "--head_channels", "8") if "ControlNet" in name else flags
    line = mistake(main, run(tmp_path / "model.pt", tmp_path, *flags))
    assert says in line, line
    assert not (tmp_path / "run").exists()
    assert not Path("/tmp/ldm3d-was-here").exists()


FLAGS_IN_VAIN = {
    "--to": "to: which run folder?",
    "--num_groups 3": "num_groups",
    "--num_groups 0": "num_groups: expected at least 1",
    "--head_channels 8": "head_channels: has no effect",
    "--upsample deconv2": "which does not fit",
    "--image_range 1,0": "image_range: expected low < high",
    "--scale_factor 0": "scale_factor: expected a number above 0",
    "--config nowhere.json": "nowhere.json: No such file",
    "--size 8": "size: expected 2 positive numbers",
}


@pytest.mark.parametrize("flags", FLAGS_IN_VAIN)
def test_a_flag_that_does_not_fit_is_one_line(flags, tmp_path, mistake):
    torch.save(sound(), tmp_path / "model.pt")
    words = [] if flags == "--to" else ["--to", tmp_path / "run", "--num_groups", 2]
    if flags != "--to":
        words += flags.split()
    assert FLAGS_IN_VAIN[flags] in mistake(main, ["import", tmp_path / "model.pt", *words])
    assert not (tmp_path / "run").exists()


def test_a_folder_that_holds_something_is_left_alone(tmp_path, mistake):
    torch.save(sound(), tmp_path / "model.pt")
    assert "is there already" in mistake(main, ["import", tmp_path / "model.pt", "--to", tmp_path])


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]
)
def test_safetensors_are_read_and_written_bit_for_bit_as_by_its_own_package(dtype, tmp_path):
    package = pytest.importorskip("safetensors.torch")
    tensors = {
        "a": (torch.randn(3, 4) * 9).to(dtype),
        "b.c": torch.randn(5).to(dtype),
        "d": torch.ones((), dtype=dtype),
    }
    package.save_file(tensors, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    write_safetensors(tmp_path / "ours.safetensors", tensors)
    for found in (
        read_safetensors(tmp_path / "theirs.safetensors"),
        package.load_file(tmp_path / "ours.safetensors"),
    ):
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[k], v) and found[k].dtype == dtype for k, v in tensors.items())
