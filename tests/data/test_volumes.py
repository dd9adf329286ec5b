"""Every voxel keeps its value and its place in the world: read, cropped, resampled and written."""

import gzip
import importlib.util
import os
import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import tifffile
from folders import oblique_affine, world_image

from ldm3d.config import InputError
from ldm3d.data import Volume, read, write
from ldm3d.data.geometry import crop_or_pad, resample
from ldm3d.data.volumes import (
    is_volume_file,
    read_header,
    spacing_affine,
    strip_suffix,
)

DATA = Path(os.environ.get("LDM3D_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")
TRAPS = sorted(p for p in (DATA / "traps").rglob("*") if is_volume_file(p))
REFUSED = {"row_major.dconn.nii": "Cifti2Image"}  # brain models along a surface, not a grid
if importlib.util.find_spec("imagecodecs") is None:
    REFUSED["lzw.tif"] = "imagecodecs"


# --- the real files that break careless loaders -------------------------------------------------------------


@pytest.mark.real_data
@pytest.mark.skipif(not TRAPS, reason=f"no real data at {DATA}")
@pytest.mark.parametrize("path", TRAPS, ids=[p.name for p in TRAPS])
def test_a_trap_loads_as_its_reference_library_reads_it_or_is_refused_by_name(path: Path) -> None:
    if path.name in REFUSED:
        with pytest.raises(InputError, match=REFUSED[path.name]) as info:
            read(path)
        assert path.name in str(info.value)
        assert "\n" not in str(info.value)
        return
    volume, header = read(path), read_header(path)
    assert (header.shape, header.channels, header.spacing) == (volume.shape, volume.channels, volume.spacing)
    if path.suffix == ".tif":
        pages = tifffile.TiffFile(path).pages
        expected = np.stack([page.asarray() for page in pages])
        affine = np.eye(4) if len(pages) > 1 else None
        expected = expected[None] if len(pages) > 1 else np.moveaxis(expected[0], -1, 0)
    else:
        image = nib.as_closest_canonical(nib.load(path))
        expected, affine = np.atleast_3d(image.get_fdata()), image.affine
        expected = np.moveaxis(expected.reshape(*image.shape[:3], -1), -1, 0)
    assert np.array_equal(volume.array, expected.astype(np.float32), equal_nan=True)
    assert affine is None or np.allclose(volume.affine, affine, atol=1e-12)


@pytest.mark.real_data
@pytest.mark.skipif(not TRAPS, reason=f"no real data at {DATA}")
@pytest.mark.parametrize(
    "path", [p for p in TRAPS if p.name.endswith(("t2.nii.gz", "anatomical.nii", "tsnr.nii.gz"))]
)
def test_a_trap_written_back_has_the_voxels_and_affine_of_the_original(path: Path, tmp_path: Path) -> None:
    original, copy = nib.load(path), nib.load(write(tmp_path / "copy.nii.gz", read(path)))
    assert np.array_equal(copy.get_fdata(), original.get_fdata(), equal_nan=True)
    assert np.allclose(copy.affine, original.affine, atol=1e-4)


@pytest.mark.real_data
def test_a_scaled_integer_mask_becomes_exact_when_an_integer_type_is_asked_for() -> None:
    path = DATA / "brats2013" / "brats_2013_pat0003_1" / "brainmask.nii.gz"
    if not path.exists():
        pytest.skip(f"no real data at {DATA}")
    assert np.unique(read(path, dtype=np.uint8).array).tolist() == [0, 1]


# --- world coordinates -------------------------------------------------------------------------------------


@pytest.mark.parametrize("codes", ["RAS", "LPS", "PSR", "AIL", "SLA", "IRP"])
def test_world_coordinates_survive_load_crop_resample_and_save(codes: str, tmp_path: Path) -> None:
    affine = oblique_affine(codes, (0.8, 1.5, 2.4))
    image = nib.Nifti1Image(world_image((22, 18, 14), affine).astype(np.float32), affine)
    image.to_filename(tmp_path / "in.nii.gz")
    volume = read(tmp_path / "in.nii.gz")
    assert volume.orientation == codes
    assert nib.aff2axcodes(volume.affine) == ("R", "A", "S")
    assert np.allclose(np.moveaxis(volume.array, 0, -1), world_image(volume.shape, volume.affine), atol=1e-4)
    size = [n - 5 for n in volume.shape]
    size[1] += 4  # beyond the end: padded there
    volume = resample(crop_or_pad(volume, (2, 3, -1), tuple(size)), (1.0, 1.1, 1.3))
    saved = nib.load(write(tmp_path / "out.nii.gz", volume))
    assert "".join(nib.aff2axcodes(saved.affine)) == codes
    # What is not interpolated with padding says where it is
    world = world_image(saved.shape[:3], saved.affine)
    index = (world - affine[:3, 3]) @ np.linalg.inv(affine[:3, :3]).T
    inside = ((index > 1) & (index < np.array(image.shape[:3]) - 2)).all(axis=-1)
    edge = np.ones(saved.shape[:3], dtype=bool)
    edge[2:-2, 2:-2, 2:-2] = False
    inside &= ~edge
    assert inside.mean() > 0.2
    assert np.allclose(saved.get_fdata()[inside], world[inside], atol=1e-3)
    assert np.allclose(saved.get_qform(), saved.get_sform(), atol=1e-4)


# --- formats -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".tif"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("shape", [(5, 6, 7), (1, 6, 7), (5, 6)])
def test_a_written_volume_is_read_back_equal(
    suffix: str, channels: int, shape: tuple, tmp_path: Path
) -> None:
    array = np.random.default_rng(4).standard_normal((channels, *shape), dtype=np.float32)
    affine = spacing_affine((0.5, 1.25, 3.0)[: len(shape)])
    affine[:-1, -1] = (-8.0, 2.5, 4.0)[: len(shape)]
    dims = 2 if suffix != ".tif" and len(shape) == 2 else None
    volume = read(write(tmp_path / f"a{suffix}", Volume(array, affine)), dims=dims)
    assert np.array_equal(volume.array, array)
    assert np.allclose(volume.affine, affine)
    one = read(tmp_path / f"a{suffix}", channel=channels - 1, dims=dims)
    assert np.array_equal(one.array, array[-1:])


@pytest.mark.parametrize(("codes", "thin"), [("LPS", 2), ("RSA", 2), ("PSR", 2), ("LAS", 1)])
def test_a_nifti_slice_is_a_2d_image_and_goes_back_to_its_plane(
    codes: str, thin: int, tmp_path: Path
) -> None:
    shape = [5, 6, 7]
    shape[thin] = 1
    affine = oblique_affine(codes, (1.0, 2.0, 3.0), angle=0.0)
    affine[:3, 3] = 0
    image = nib.Nifti1Image(np.random.default_rng(5).random(shape, dtype=np.float32), affine)
    image.to_filename(tmp_path / "slice.nii.gz")
    assert read(tmp_path / "slice.nii.gz").dims == 3
    volume = read(tmp_path / "slice.nii.gz", dims=2)
    assert volume.dims == 2
    assert len(volume.orientation) == 2
    copy = nib.load(write(tmp_path / "copy.nii.gz", volume))
    plane = [axis for axis in range(3) if axis != thin]
    assert np.array_equal(copy.get_fdata()[..., 0], image.get_fdata().squeeze(thin))
    assert nib.aff2axcodes(copy.affine)[:2] == tuple(codes[axis] for axis in plane)
    assert np.allclose(copy.header.get_zooms()[:2], [image.header.get_zooms()[axis] for axis in plane])


def test_a_2d_nifti_and_an_rgb_nifti_have_the_axes_and_channels_they_should(tmp_path: Path) -> None:
    nib.Nifti1Image(np.zeros((5, 6), dtype=np.int16), np.eye(4)).to_filename(tmp_path / "flat.nii")
    assert read(tmp_path / "flat.nii").shape == (5, 6)
    assert read(tmp_path / "flat.nii", dims=3).shape == (5, 6, 1)
    rgb = np.zeros((3, 4, 5), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    rgb["G"] = 7
    nib.Nifti1Image(rgb, np.eye(4)).to_filename(tmp_path / "rgb.nii")
    assert read(tmp_path / "rgb.nii").array[:, 0, 0, 0].tolist() == [0, 7, 0]


def test_units_of_a_nifti_become_millimetres(tmp_path: Path) -> None:
    image = nib.Nifti1Image(np.zeros((3, 4, 5), dtype=np.uint8), np.diag([500.0, 250, 1000, 1]))
    image.header.set_xyzt_units("micron")
    image.to_filename(tmp_path / "micron.nii")
    assert np.allclose(read_header(tmp_path / "micron.nii").spacing, (0.5, 0.25, 1.0))


def test_a_nifti_keeps_its_own_spacing_whatever_the_setting_says(tmp_path: Path) -> None:
    nib.Nifti1Image(np.zeros((3, 4, 5), np.uint8), np.diag([2.0, 3, 4, 1])).to_filename(tmp_path / "a.nii")
    assert read(tmp_path / "a.nii", spacing=(1.0, 1.0, 1.0)).spacing == (2, 3, 4)


def test_a_tiff_gives_pages_as_depth_colours_as_channels_and_its_resolution_as_spacing(
    tmp_path: Path,
) -> None:
    rng = np.random.default_rng(6)
    stack = rng.integers(0, 9, (4, 5, 6), dtype=np.uint16)
    color = rng.integers(0, 9, (5, 6, 3), dtype=np.uint8)
    tags = {"resolution": (20, 40), "resolutionunit": "CENTIMETER", "photometric": "minisblack"}
    tifffile.imwrite(tmp_path / "stack.tif", stack, **tags)
    tifffile.imwrite(tmp_path / "color.tif", color, photometric="rgb")
    fiji = {"axes": "ZYX", "spacing": 3.0, "unit": "mm"}
    tifffile.imwrite(tmp_path / "fiji.tif", stack, imagej=True, resolution=(2, 4), metadata=fiji)
    volume = read(tmp_path / "stack.tif")
    assert np.array_equal(volume.array[0], stack)
    assert volume.spacing == (0.25, 0.25, 0.5)
    assert read(tmp_path / "stack.tif", dims=2).array.shape == (4, 5, 6)  # pages as channels
    assert read(tmp_path / "stack.tif", spacing=(3, 2, 1)).spacing == (3, 2, 1)
    assert read(tmp_path / "fiji.tif").spacing == (3.0, 0.25, 0.5)
    assert np.array_equal(read(tmp_path / "color.tif").array, np.moveaxis(color, -1, 0))
    assert read(tmp_path / "color.tif").spacing == (1, 1)
    assert np.array_equal(
        read(tmp_path / "color.tif", channel=(2, 0)).array, color[..., [2, 0]].transpose(2, 0, 1)
    )


def test_a_tiff_whose_0_is_white_is_read_with_0_black(tmp_path: Path) -> None:
    for dtype, top in ((np.uint8, 255), (np.uint16, 65535), (bool, 1)):
        black = np.random.default_rng(0).integers(0, 2, (6, 9, 8)).astype(dtype)
        tifffile.imwrite(tmp_path / "white.tif", top - black.astype(int) > 0 if top == 1 else top - black,
                         photometric="miniswhite")  # fmt: skip
        assert np.array_equal(read(tmp_path / "white.tif").array[0], black)
    tifffile.imwrite(tmp_path / "float.tif", np.zeros((4, 5), np.float32), photometric="miniswhite")
    with pytest.raises(InputError, match=r"float\.tif: MINISWHITE values of float32"):
        read(tmp_path / "float.tif")


@pytest.mark.parametrize("dpi", [72, 96])
def test_the_resolution_of_a_screen_is_not_the_spacing_of_a_tiff(tmp_path: Path, dpi: int) -> None:
    image = np.zeros((4, 5), np.uint8)
    for per_inch, spacing in ((dpi, 1.0), (254, 0.1)):
        tifffile.imwrite(tmp_path / "a.tif", image, resolution=(per_inch, per_inch), resolutionunit="INCH")
        assert np.allclose(read_header(tmp_path / "a.tif").spacing, spacing)
        tifffile.imwrite(tmp_path / "a.tif", image, resolution=(per_inch / 2.54, per_inch / 2.54),
                         resolutionunit="CENTIMETER")  # fmt: skip
        assert np.allclose(read_header(tmp_path / "a.tif").spacing, spacing)
    own = {"unit": "inch", "axes": "YX"}  # ImageJ's field is a statement
    tifffile.imwrite(tmp_path / "a.tif", image, imagej=True, resolution=(dpi, dpi), metadata=own)
    assert np.allclose(read_header(tmp_path / "a.tif").spacing, 25.4 / dpi)


def test_voxels_without_a_size_are_refused_until_a_size_is_given(tmp_path: Path) -> None:
    stack = np.zeros((4, 5, 6), np.float32)
    for depth in (-2.0, 0, "nan"):
        thin = {"axes": "ZYX", "spacing": depth, "unit": "mm"}
        tifffile.imwrite(tmp_path / "thin.tif", stack, imagej=True, resolution=(2, 2), metadata=thin)
        with pytest.raises(InputError, match=r"thin\.tif: states voxels of \(0\.0, 0\.5, 0\.5\) mm"):
            read_header(tmp_path / "thin.tif")
    flat = {"axes": "YX", "affine": np.zeros((3, 3)).tolist()}
    tifffile.imwrite(tmp_path / "flat.tif", stack[0], metadata=flat)
    for name in ("thin.tif", "flat.tif"):
        with pytest.raises(InputError, match=rf"{name}: states voxels of .* --data\.file_spacing"):
            read_header(tmp_path / name)
    assert read_header(tmp_path / "thin.tif", spacing=(3.0, 0.5, 0.5)).spacing == (3.0, 0.5, 0.5)
    header = bytearray(nib.Nifti1Image(stack, np.eye(4)).to_bytes())
    header[252:256], header[76:108] = bytes(4), bytes(32)  # neither qform nor sform, and pixdim of zeros
    (tmp_path / "none.nii").write_bytes(header)
    with pytest.raises(InputError, match=r"none\.nii: its header is damaged \(pixdim"):
        read_header(tmp_path / "none.nii")


def test_numpy_arrays_and_pictures_are_read_with_the_spacing_of_the_call(tmp_path: Path) -> None:
    array = np.random.default_rng(7).random((2, 4, 5, 6))
    np.save(tmp_path / "a.npy", array)
    np.savez(tmp_path / "a.npz", image=array)
    for name in ("a.npy", "a.npz"):
        volume = read(tmp_path / name, spacing=(1, 2, 3), dtype=np.float64)
        assert np.array_equal(volume.array, array)
        assert volume.spacing == (1, 2, 3)
    assert read_header(tmp_path / "a.npy", channel=1).channels == 1
    np.save(tmp_path / "b.npy", array[0])
    assert read(tmp_path / "b.npy").array.shape == (1, 4, 5, 6)
    assert read(tmp_path / "b.npy", dims=2).array.shape == (4, 5, 6)
    image = pytest.importorskip("PIL.Image", reason="Pillow (extra viz) is not installed")
    gray = np.arange(30, dtype=np.uint16).reshape(5, 6) * 1000
    image.fromarray(gray).save(tmp_path / "gray.png")
    image.fromarray(np.stack([gray // 256] * 3, -1).astype(np.uint8)).save(tmp_path / "color.png")
    assert np.array_equal(read(tmp_path / "gray.png").array[0], gray)
    assert read(tmp_path / "color.png").array.shape == (3, 5, 6)


@pytest.mark.parametrize("mode", ["1", "L", "I;16", "RGB", "RGBA", "P"])
def test_the_header_of_a_picture_is_read_without_its_voxels(mode: str, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image", reason="Pillow (extra viz) is not installed")
    values = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    grey = values[..., 0].astype(np.uint16) * 256
    picture = image.fromarray(grey) if mode == "I;16" else image.fromarray(values).convert(mode)
    picture.save(tmp_path / "a.png")
    whole, header, volume = (
        (tmp_path / "a.png").read_bytes(),
        *(f(tmp_path / "a.png") for f in (read_header, read)),
    )
    assert (header.shape, header.channels, header.palette) == (volume.shape, volume.channels, mode == "P")
    assert header.dtype == np.asarray(image.open(tmp_path / "a.png")).dtype
    (tmp_path / "a.png").write_bytes(whole[: len(whole) // 2])
    assert read_header(tmp_path / "a.png").shape == (40, 60)
    with pytest.raises(InputError, match=r"cannot read .*a\.png"):
        read(tmp_path / "a.png")


def test_arrays_of_one_npz_file_are_channels_in_the_order_of_their_names(tmp_path):
    low, high = np.random.default_rng(0).normal(size=(2, 4, 5, 6)).astype(np.float32)
    np.savez(tmp_path / "pair.npz", low=low, high=high)
    assert np.array_equal(read(tmp_path / "pair.npz", channel=1, dims=3).array[0], low)
    assert np.array_equal(read(tmp_path / "pair.npz", dims=3).array, np.stack([high, low]))


def test_volumes_are_recognised_by_their_names() -> None:
    assert all(map(is_volume_file, ("a.nii", "b/a.NII.GZ", "a.tiff", "a.npz", "a.jpg")))
    assert not any(map(is_volume_file, ("a.txt", "a.gz", ".a.nii.gz", "nii", "a.nii.gz.7.tmp")))
    assert [strip_suffix(name) for name in ("x/a.b.nii.gz", "a.tif", "a.txt")] == ["a.b", "a", "a.txt"]


# --- mistakes ----------------------------------------------------------------------------------------------


def broken_files(folder: Path) -> dict[str, str]:
    """Writes one file a mistake; name -> words that the message must hold."""
    image = nib.Nifti1Image(np.random.default_rng(8).random((9, 9, 9)), np.eye(4))
    whole = gzip.compress(image.to_bytes())
    (folder / "empty.nii.gz").write_bytes(b"")
    (folder / "text.nii").write_text("not an image at all")
    (folder / "text.tif").write_text("not an image at all")
    (folder / "text.npy").write_text("not an image at all")
    (folder / "plain.nii.gz").write_bytes(image.to_bytes())
    (folder / "cut.nii.gz").write_bytes(whole[: len(whole) // 2])
    (folder / "cut.nii").write_bytes(image.to_bytes()[:2000])
    (folder / "notes.txt").write_text("")
    bare = bytearray(image.to_bytes())
    bare[0:4] = (349).to_bytes(4, "little")
    (folder / "size.nii").write_bytes(bare)
    bare[0:4], bare[280:284] = (348).to_bytes(4, "little"), np.float32("nan").tobytes()
    (folder / "nan.nii").write_bytes(bare)
    flat = bytearray(nib.Nifti1Image(np.zeros((3, 3, 3), np.uint8), np.eye(4)).to_bytes())
    flat[280:296] = bytes(16)  # the first row of the sform
    (folder / "flat.nii").write_bytes(flat)
    nib.Nifti1Image(np.zeros((3, 3, 3), np.complex64), np.eye(4)).to_filename(folder / "complex.nii")
    nib.Nifti1Image(np.zeros((3, 3, 3, 2, 2), np.uint8), np.eye(4)).to_filename(folder / "five.nii")
    with tifffile.TiffWriter(folder / "mixed.tif") as file:
        file.write(np.zeros((4, 4), np.uint8))
        file.write(np.zeros((5, 5), np.uint8))
    np.savez(folder / "two.npz", a=np.zeros((3, 3)), b=np.zeros((3, 4)))
    np.save(folder / "line.npy", np.zeros(5))
    np.save(folder / "code.npy", np.array([{}], dtype=object), allow_pickle=True)
    (folder / "folder.nii.gz").mkdir()
    return {
        "empty.nii.gz": "empty",
        "text.nii": "read",
        "text.tif": "read",
        "text.npy": "read",
        "plain.nii.gz": "read",
        "cut.nii.gz": "read",
        "cut.nii": "read",
        "notes.txt": "unknown kind",
        "flat.nii": "singular",
        "nan.nii": "singular or not finite",
        "size.nii": "sizeof_hdr",
        "complex.nii": "complex64",
        "five.nii": "shape",
        "mixed.tif": "different shape",
        "two.npz": "expected one shape",
        "line.npy": "shape",
        "code.npy": "read",
        "folder.nii.gz": "a folder",
        "missing.nii.gz": "no such file",
    }


def test_a_file_that_cannot_be_an_image_is_named_in_one_line(tmp_path: Path, caplog) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, words in broken_files(tmp_path).items():
            with pytest.raises(InputError) as info:
                read(tmp_path / name)
            message = str(info.value)
            assert name in message, message
            assert words in message, message
            assert "\n" not in message


@pytest.mark.parametrize("suffix", [".nii.gz", ".npz", ".png", ".tif"])
def test_a_flipped_bit_in_compressed_voxels_is_never_read_as_other_voxels(
    suffix: str, tmp_path: Path
) -> None:
    array = np.random.default_rng(0).integers(90, 110, (160, 160), dtype=np.uint8)
    path = tmp_path / f"a{suffix}"
    if suffix == ".nii.gz":
        nib.Nifti1Image(array[..., None], np.eye(4)).to_filename(path)
    elif suffix == ".npz":
        np.savez_compressed(path, array)
    elif suffix == ".png":
        pytest.importorskip("PIL.Image", reason="Pillow (extra viz) is not installed").fromarray(array).save(
            path
        )
    else:
        tifffile.imwrite(path, array, compression="zlib")
    whole, original = path.read_bytes(), read(path).array
    # a TIFF has no checksum of its tags, only one of the voxels
    bits = range(8 * (len(whole) // 2), 8 * len(whole), len(whole) // 40 + 1)
    refused = 0
    for bit in bits:
        spoiled = bytearray(whole)
        spoiled[bit // 8] ^= 1 << bit % 8
        path.write_bytes(spoiled)
        try:
            assert np.array_equal(read(path).array, original), bit
        except InputError:
            refused += 1
    assert refused > 0.8 * len(bits)


def test_one_channel_of_a_file_is_refused_if_a_bit_of_another_is_flipped(tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(0, 9, (6, 7, 8, 3), dtype=np.int16)
    nib.Nifti1Image(array, np.eye(4)).to_filename(tmp_path / "a.nii.gz")
    assert np.array_equal(read(tmp_path / "a.nii.gz", channel=0).array[0], array[..., 0])
    spoiled = bytearray((tmp_path / "a.nii.gz").read_bytes())
    spoiled[-40] ^= 1
    (tmp_path / "a.nii.gz").write_bytes(spoiled)
    with pytest.raises(InputError, match=r"cannot read .*a\.nii\.gz"):
        read(tmp_path / "a.nii.gz", channel=0)


def test_a_stack_of_pages_that_was_cut_short_is_no_shorter_stack(tmp_path: Path, caplog) -> None:
    tifffile.imwrite(tmp_path / "a.tif", np.random.default_rng(0).random((6, 32, 24)), compression="zlib")
    whole = (tmp_path / "a.tif").read_bytes()
    for length in range(10, len(whole), len(whole) // 40):
        (tmp_path / "a.tif").write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"a\.tif"):
            read(tmp_path / "a.tif")
    assert not caplog.records  # one line each, and no other


def test_a_wrong_channel_spacing_or_number_of_axes_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.nii", Volume(np.zeros((2, 4, 5, 6)), np.eye(4)))
    for channel in (2, -1, (0, 5)):
        with pytest.raises(InputError, match="the file has 2"):
            read(path, channel=channel)
    with pytest.raises(InputError, match="single slice"):
        read_header(path, dims=2)
    np.save(tmp_path / "a.npy", np.zeros((4, 5)))
    for spacing in ((1.0,), (1.0, 0.0)):
        with pytest.raises(InputError, match="2 positive numbers"):
            read(tmp_path / "a.npy", spacing=spacing)


def test_writing_replaces_nothing_and_leaves_nothing_half_done(tmp_path: Path) -> None:
    volume = Volume(np.full((1, 3, 4, 5), 300.0), np.eye(4))
    path = write(tmp_path / "new" / "a.nii.gz", volume)
    before = path.read_bytes()
    with pytest.raises(InputError, match="not overwritten"):
        write(path, volume)
    with pytest.raises(InputError, match="do not fit uint8"):
        write(path, volume, dtype=np.uint8, overwrite=True)
    with pytest.raises(InputError, match="cannot write"):
        write(path / "b.nii", volume)  # a file where a folder is needed
    with pytest.raises(InputError, match=r"can write \.nii\.gz"):
        write(tmp_path / "a.png", volume)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == ["a.nii.gz"]
    assert write(path, volume, dtype=np.int16, overwrite=True).read_bytes() != before


def test_labels_are_written_as_integers(tmp_path: Path) -> None:
    labels = np.arange(24).reshape(1, 2, 3, 4)  # int64, which many programs cannot open
    assert nib.load(write(tmp_path / "a.nii", Volume(labels, np.eye(4)))).get_data_dtype() == np.int32
    path = write(tmp_path / "b.tif", Volume(labels + 0.2, np.eye(4)), dtype=np.uint8)
    assert tifffile.imread(path).dtype == np.uint8
    assert np.array_equal(read(path).array, labels)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_three_channels_of_8_bits_in_2d_are_written_as_an_rgb_tiff(tmp_path: Path, dtype) -> None:
    array = np.random.default_rng(0).integers(0, 256, (3, 5, 7)).astype(dtype)
    affine = np.array([[0.5, 0, 3], [0, 0.7, -2], [0, 0, 1]])
    path = write(tmp_path / "a.tif", Volume(array, affine))
    with tifffile.TiffFile(path) as file:
        is_color = file.pages[0].photometric == tifffile.PHOTOMETRIC.RGB
        assert (file.pages[0].shape, is_color) == (
            ((5, 7, 3), True) if dtype == np.uint8 else ((3, 5, 7), False)
        )
    back, header = read(path), read_header(path)
    assert (header.channels, header.dtype) == (3, dtype)
    np.testing.assert_array_equal(back.array, array)
    np.testing.assert_array_equal(back.affine, affine)
    np.testing.assert_array_equal(read(path, channel=2).array, array[2:])


@pytest.mark.parametrize("shape", [(1, 5, 7), (2, 5, 7), (4, 5, 7), (3, 4, 5, 7)])
def test_other_8_bit_volumes_are_written_in_planes(tmp_path: Path, shape) -> None:
    array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    path = write(tmp_path / "a.tif", Volume(array, np.eye(len(shape))))
    with tifffile.TiffFile(path) as file:
        assert file.pages[0].photometric == tifffile.PHOTOMETRIC.MINISBLACK
    np.testing.assert_array_equal(read(path).array, array)


def test_8_bit_nifti_files_with_a_slope_hold_floats(tmp_path: Path) -> None:
    for name, slope in (("plain", 1.0), ("scaled", 0.1)):
        image = nib.Nifti1Image(np.arange(60, dtype=np.uint8).reshape(3, 4, 5), np.eye(4))
        image.header.set_slope_inter(slope, 0.0)
        nib.save(image, tmp_path / f"{name}.nii")
    assert read_header(tmp_path / "plain.nii").dtype == np.uint8
    assert read_header(tmp_path / "scaled.nii").dtype.kind == "f"
