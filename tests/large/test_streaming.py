"""Encoders and decoders in slabs give the numbers of the whole computation, in the memory promised."""

import math
import re

import pytest
import torch
from closeness import close
from torch import nn

import train_vae
from ldm3d import VQVAE, AutoencoderKL, InputError, QuantizerConfig, VAEConfig, normconv
from ldm3d.config import replace
from ldm3d.engine.memory_plan import LiveBytes
from ldm3d.large import streaming
from ldm3d.large.streaming import GIB, Stream, peaks, run_trunk
from ldm3d.vae import PixelStem

MODES = ("slabs", "recompute", "offload")
CPU = torch.device("cpu")


def autoencoder(kind="kl", dims=3, **changes):
    """A small autoencoder whose norms are not the identity at first."""
    torch.manual_seed(0)
    settings = {"channels": (4, 8, 8), "num_res_blocks": (1,), "num_groups": 2, "latent_channels": 3}
    config = VAEConfig(dims=dims, **{**settings, **changes})
    net = AutoencoderKL(config) if kind == "kl" else VQVAE(config, QuantizerConfig(16))
    for name, parameter in net.named_parameters():
        if "norm" in name:
            nn.init.normal_(parameter, 1.0, 0.3)
        if "shortcut" in name:  # of the decoder: zero at first
            nn.init.normal_(parameter, 0.0, 0.3)
    return net.eval().requires_grad_(False)


def image(*size, batch=1, channels=1):
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(1))


def trunks(net, *size):
    """Both trunks with an input each."""
    return (net.encoder, image(*size)), (net.decoder, image(*net.latent_shape(size)[1:], channels=3))


# --- the same numbers -----------------------------------------------------------------------------------

NETS = {
    "plain": {},
    "stem": {"stem": (2,)},
    "stem along one axis": {"stem": (1, 2, 1)},
    "no blocks": {"num_res_blocks": (0,)},
    "two blocks": {"num_res_blocks": (2,), "extra_up_block": True, "final_silu": True},
    "one width": {"channels": (4, 4), "num_res_blocks": (2,), "down_pad": "sym"},
    "wider at the finest level": {"channels": (8, 4)},
    "anisotropic": {"strides": ((1, 2, 2), (2, 1, 2)), "down_pad": "sym"},
    "anisotropic, padded at the end": {"strides": ((2, 2, 1), (1, 2, 2))},
    "attention": {"mid_attention": True, "double_z": True},
    "attention at two levels": {"attention_levels": (False, True, True), "attn_out_proj": False},
    "another range": {"image_range": (0.0, 1.0), "stem": (2,)},
    "trilinear": {"upsample": "trilinear"},
    "deconv2": {"upsample": "deconv2"},
    "shortcut": {"shortcut": True, "stem": (2,)},
    "shortcut, anisotropic": {"shortcut": True, "strides": ((1, 2, 2), (2, 1, 2)), "image_range": (0.0, 2.0)},
    "without norms": {"trunk": "plain", "num_groups": 32, "num_res_blocks": (1, 2, 0), "image_range": (0, 2)},
    "deconv3": {"upsample": "deconv3", "strides": ((1, 2, 2), (2, 1, 2))},
}


WAYS = [
    *((3, mode) for mode in MODES),
    (2, "slabs"),
    *(pytest.param(2, mode, marks=pytest.mark.slow) for mode in MODES[1:]),
]


@pytest.mark.parametrize(("dims", "mode"), WAYS)
@pytest.mark.parametrize("name", NETS)
@torch.inference_mode()
def test_slabs_of_any_thickness_give_the_whole_result(name, dims, mode, monkeypatch):
    changes = dict(NETS[name])
    for key in ("stem", "strides"):
        if dims == 2 and key in changes:
            rows = changes[key]
            changes[key] = tuple(s[:2] for s in rows) if key == "strides" else rows[:2]
    net = autoencoder(dims=dims, **changes)
    for trunk, x in trunks(net, *(16, 8, 8)[:dims]):
        whole, results = trunk(x), []
        for slab in (1, 800, 10**9) if name == "plain" else (1, 10**9):
            monkeypatch.setattr(streaming, "SLAB", slab)
            results.append(Stream(mode, CPU).run(trunk, x))
            assert results[-1].is_contiguous()
            close(results[-1], whole, 2e-5)
        for other in results[:-1]:
            close(other, results[-1], 1e-6)  # the statistics are equal, kernels may differ with the shape


@pytest.mark.parametrize("kind", ["kl", "vq"])
@pytest.mark.parametrize("size", [(13, 9, 11), (5, 16, 8), (17, 23), (1, 6, 7)])
@torch.inference_mode()
def test_encode_and_decode_take_any_size_in_any_memory(kind, size, monkeypatch):
    monkeypatch.setattr(streaming, "SLAB", 300)
    net = autoencoder(kind, len(size), stem=(2,), channels=(4, 8))
    x = image(*size, batch=2)
    posterior = net.encode(x)
    recon = net.decode(posterior.mode(), size)
    slabs = net.encode(x, memory=0)
    close(slabs.mean, posterior.mean, 2e-5)
    if kind == "kl":
        close(slabs.logvar, posterior.logvar, 2e-5)
    close(net.decode(posterior.mode(), size, memory=0), recon, 2e-5)
    net.memory = 0.0
    assert torch.equal(net.encode(x).mean, slabs.mean)


@pytest.mark.parametrize("mode", MODES)
@torch.inference_mode()
def test_slabs_under_bfloat16_autocast_are_as_near_to_fp32_as_the_whole(mode, monkeypatch):
    monkeypatch.setattr(streaming, "SLAB", 500)
    net = autoencoder(mid_attention=True)
    for trunk, x in trunks(net, 16, 16, 16):
        plain = trunk(x)
        with torch.autocast("cpu", torch.bfloat16):
            whole, slabs = trunk(x), Stream(mode, CPU).run(trunk, x)
        assert slabs.dtype == whole.dtype == torch.bfloat16
        close(slabs.float(), plain, 2e-2)


@torch.inference_mode()
def test_a_large_mean_costs_no_precision_in_slabs():
    net = autoencoder().double()
    x = 1000 + image(16, 16, 16).double()
    exact = net.encoder(x)
    slabs = Stream("slabs", CPU).run(net.float().encoder, x.float())
    close(slabs, net.encoder(x.float()), 2e-4)  # rounding of the input itself
    close(slabs.double(), exact, 2e-3)


# --- memory -------------------------------------------------------------------------------------------------


def live_peak(net, x, run):
    with LiveBytes([*net.parameters(), x]) as live:
        run()
    return live.peak


@pytest.mark.parametrize(("mode", "maps"), [("slabs", 2), ("recompute", 1), ("offload", 0)])
@torch.inference_mode()
def test_no_more_maps_of_the_finest_level_exist_than_promised(mode, maps, monkeypatch):
    """A map of the finest level, 4 channels at 96 x 8 x 8, has 96 KiB, all slabs together 40 KiB."""
    monkeypatch.setattr(streaming, "SLAB", 2**9)
    monkeypatch.setattr(normconv, "SLICE", 2**9)
    net, size = autoencoder(channels=(4, 8), num_res_blocks=(2,)), (96, 8, 8)
    a_map, slabs = 4 * math.prod(size) * 4, 2 * streaming.SLABS * 2 * 8 * 8 * 8 * 4
    for trunk, x in trunks(net, *size):
        folded, result = 4 * 8 * 8 * 27 * 4, trunk(x).nbytes
        peak = live_peak(trunk, x, lambda trunk=trunk, x=x: Stream(mode, CPU).run(trunk, x))
        coarse = a_map / 4 if mode != "offload" else 0  # the level below, which up-sampling reads
        assert peak - result <= maps * a_map + coarse + slabs + folded


@pytest.mark.parametrize(
    ("changes", "amp"), [({"channels": (8, 16)}, False), ({"channels": (4, 16), "stem": (2,)}, True)]
)
@torch.inference_mode()
def test_the_estimate_is_an_upper_bound_and_not_far_off(changes, amp, monkeypatch):
    for module, name in ((streaming, "SLAB"), (normconv, "SLAB")):
        monkeypatch.setattr(module, name, 2**12)
    monkeypatch.setattr(normconv, "SLICE", 2**11)
    net = autoencoder(num_res_blocks=(2,), **changes)
    for trunk, x in trunks(net, 48, 16, 16):
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            runs = {mode: lambda t=trunk, x=x, m=mode: Stream(m, CPU).run(t, x) for mode in MODES}
            runs["whole"] = lambda t=trunk, x=x: t(x)
            need = peaks(trunk, x)
            assert list(need) == ["whole", *MODES]
            for mode, run in runs.items():
                true, slabs = live_peak(trunk, x, run), 8 * 2 * 16 * 16 * 16 * 4
                assert true - run().nbytes <= need[mode] <= 1.2 * true + slabs


@torch.inference_mode()
def test_the_example_of_the_docstring_is_what_is_counted():
    net = AutoencoderKL(replace(train_vae.Config(), train_vae.PRESETS["hippocampus"]).vae)
    z = torch.zeros(()).expand(1, *net.latent_shape((512,) * 3))  # counting reads its shape alone
    words = " ".join(streaming.__doc__.split()).split("Example:")[1]
    counted = [f"{size / GIB:.1f}" for size in peaks(net.decoder, z).values()]
    assert re.findall(r"([\d.]+) GiB", words)[1:] == counted


@torch.inference_mode()
def test_the_first_mode_that_fits_is_taken_and_named_once(monkeypatch, capsys):
    monkeypatch.setattr(streaming, "SLAB", 2**12)
    monkeypatch.setattr(streaming, "NOTED", set())
    _, (trunk, z) = trunks(autoencoder(channels=(16, 32), num_res_blocks=(2,)), 48, 48, 48)
    taken: list[str] = []
    monkeypatch.setattr(streaming.Stream, "run", lambda self, trunk, x: taken.append(self.mode) or x)
    monkeypatch.setattr(type(trunk), "forward", lambda self, x: taken.append("whole") or x)
    need = peaks(trunk, z)
    assert need["whole"] > need["slabs"] > need["recompute"] > need["offload"]
    for size in need.values():
        run_trunk(trunk, z, size / GIB)
        run_trunk(trunk, z, (size - 1) / GIB)
    assert taken == ["whole", *("slabs",) * 2, *("recompute",) * 2, *("offload",) * 3]
    printed = capsys.readouterr().out
    assert printed.count("note: decoder on 24x24x24") == 3, printed
    run_trunk(trunk, torch.cat([z, z]), need["whole"] / GIB)
    assert taken[8:] == ["whole", "whole"]  # both samples, one after the other
    assert not capsys.readouterr().out


@torch.inference_mode()
def test_the_memory_is_counted_once_for_a_size(monkeypatch):
    counted = []
    monkeypatch.setattr(streaming, "count_peaks", lambda *args: counted.append(args) or {"whole": 0})
    (trunk, x), _ = trunks(autoencoder(), 8, 8, 8)
    for batch in (x, x, torch.cat([x, x])):
        run_trunk(trunk, batch)
    assert len(counted) == 1
    run_trunk(trunk, image(8, 8, 16))
    with torch.autocast("cpu", torch.bfloat16):
        run_trunk(trunk, x)
    assert len(counted) == 3


@torch.inference_mode()
def test_with_enough_memory_every_bit_is_the_whole_result():
    net = autoencoder()
    for trunk, x in trunks(net, 8, 8, 8):
        assert torch.equal(run_trunk(trunk, x), trunk(x))
    x = image(8, 8, 8)
    assert torch.equal(net.encode(x).mean, net.posterior(net.quant_conv(net.encoder(x))).mean)


def test_what_needs_gradients_is_whole(monkeypatch):
    net = autoencoder().requires_grad_(True)
    net.memory = 0.0
    monkeypatch.setattr(streaming.Stream, "run", None)  # calling it would raise
    net.decode(net.encode(image(8, 8, 8)).mean).mean().backward()
    assert all(p.grad is not None for p in net.decoder.parameters())


def test_a_full_disk_is_one_line(monkeypatch):
    class Full:
        def seek(self, at):
            pass

        def write(self, content):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(streaming.tempfile, "TemporaryFile", Full)
    target = streaming.Filed(2, (4, 4))
    with pytest.raises(InputError, match=r"no room for a map of .* GiB .*TMPDIR"):
        target.write(0, image(2, 4, channels=2))


def test_files_are_gone_with_their_maps(tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "SLAB", 64)
    monkeypatch.setattr(streaming.tempfile, "tempdir", str(tmp_path))
    (trunk, x), _ = trunks(autoencoder(), 8, 8, 8)
    Stream("offload", CPU).run(trunk, x)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("step", [1, 2, 4])
def test_a_computed_map_computes_no_plane_twice(step):
    asked = []

    def compute(start, stop):
        asked.append((start, stop))
        return torch.arange(start, stop).view(1, 1, -1, 1)

    m = streaming.Computed(streaming.Input(image(10, 1)), 1, (10, 1), compute, step)
    for start in range(0, 10, 3):
        first, last, stop = max(start - 1, 0), min(start + 4, 10), min(start + 3, 10)
        assert m.read(first, last).flatten().tolist() == list(range(first, last))
        assert m.read(start, stop).flatten().tolist() == list(range(start, stop))
    assert [i for start, stop in asked for i in range(start, stop)] == list(range(10))
    assert all(start % step == 0 for start, _ in asked)


@pytest.mark.parametrize("memory", [0, 100])
@pytest.mark.parametrize("name", ["kl", "vq", "pixels"])
def test_decoded_planes_one_after_the_other_are_the_volume(name, memory, monkeypatch):
    monkeypatch.setattr(streaming, "SLAB", 64)
    net = PixelStem(PixelStem.config_of(2, 1, 2)) if name == "pixels" else autoencoder(name, 2)
    shape = net.latent_shape((13, 11))
    z = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        x, end = net.decode(z, (13, 11)), 0
    for start, part in net.decode_planes(z, (13, 11), memory):
        assert start == end
        end = start + part.shape[2]
        torch.testing.assert_close(part, x[:, :, start:end], rtol=2e-5, atol=2e-5)
    assert end == 13
