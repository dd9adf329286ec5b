"""What SimpleITK reads lies in the world where its headers put it, as the NIfTI of the same voxels does."""

import locale
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import tifffile
from folders import oblique_affine, opened, save, world_image
from PIL import Image

import sample
import train_cdal
import train_ldm
import train_vae
from ldm3d.config import InputError
from ldm3d.data import DataConfig, read
from ldm3d.data.cases import find_cases
from ldm3d.data.fingerprint import take
from ldm3d.data.images import find_images, own_images
from ldm3d.data.itk import is_dicom_folder, is_series_folder
from ldm3d.data.layouts import recognise
from ldm3d.data.volumes import read_header, stamp

SHAPE, SPACING = (7, 6, 5), (0.8, 1.1, 2.5)  # of x, y, z as stored
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
TAGS = {"slope": "0028|1053", "intercept": "0028|1052", "description": "0008|103e", "number": "0020|0011"}


def hounsfield(shape=SHAPE, seed=0):
    return np.random.default_rng(seed).integers(-1024, 3000, shape).astype(np.int16)


def write_series(folder, array, affine, uid="1.2.3", slopes=None, compress=False, **tags):
    """The slices of array (x, y, z) as DICOM files, whose names tell nothing of their order. affine: RAS."""
    folder.mkdir(parents=True, exist_ok=True)
    affine = LPS @ affine
    spacing = np.linalg.norm(affine[:3, :2], axis=0)
    rows = affine[:3, :2] / spacing
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    writer.SetUseCompression(compress)
    language = locale.setlocale(locale.LC_CTYPE)  # which ITK's writer of positions sets to "C"
    for k in range(array.shape[2]):
        image = sitk.GetImageFromArray(array[:, :, k].T[None])
        image.SetSpacing((*spacing, 1.0))
        text = {
            "0020|000e": uid,
            "0020|0032": "\\".join(f"{v:.9g}" for v in affine[:3, 3] + k * affine[:3, 2]),
            "0020|0037": "\\".join(f"{v:.9g}" for v in rows.T.ravel()),
            "0008|0060": "CT",
        }
        text |= {TAGS.get(key, key): str(value) for key, value in tags.items()}
        text |= {TAGS["slope"]: str(slopes[k])} if slopes else {}
        for key, value in text.items():
            image.SetMetaData(key, value)
        writer.SetFileName(str(folder / f"{uid}_{(k * 3) % 5}{k:03d}.dcm"))
        writer.Execute(image)
    locale.setlocale(locale.LC_CTYPE, language)
    return folder


def edit(path, old, new):
    """Exchange bytes of a file, which keeps its length."""
    content = path.read_bytes()
    assert len(old) == len(new)
    assert content.count(old) == 1
    path.write_bytes(content.replace(old, new))


# --- DICOM: voxels and their places -------------------------------------------------------------------------


@pytest.mark.parametrize("codes", ["LPS", "RAS", "PSR", "AIL"])
def test_an_oblique_series_is_the_same_volume_as_its_nifti(tmp_path, codes) -> None:
    affine, array = oblique_affine(codes, SPACING), hounsfield()
    series = write_series(tmp_path / "1.2.840.7", array, affine)
    volume = read(series)
    nifti = read(save(tmp_path / "same.nii.gz", array, affine))
    assert np.array_equal(volume.array, nifti.array)  # HU
    places = world_image(nifti.shape, nifti.affine)
    assert np.abs(world_image(volume.shape, volume.affine) - places).max() < 1e-3
    header = read_header(series)
    assert (header.shape, header.channels, header.dtype.kind) == (volume.shape, 1, "i")
    assert np.allclose(header.affine, volume.affine)
    assert read(series, dtype=np.int16).array.dtype == np.int16


def test_compressed_slices_are_the_same_slices(tmp_path) -> None:
    array = hounsfield((32, 48, 3))
    folder = write_series(tmp_path / "s", array, np.eye(4), compress=True)
    assert b"1.2.840.10008.1.2.4.90" in next(folder.iterdir()).read_bytes()  # lossless JPEG 2000
    assert np.array_equal(read(folder).array[0], array)


def test_every_voxel_lies_where_simpleitk_says(tmp_path) -> None:
    array = np.arange(np.prod(SHAPE), dtype=np.int16).reshape(SHAPE)
    folder = write_series(tmp_path / "s", array, oblique_affine("PSR", SPACING))
    names = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder))
    reference = sitk.ReadImage(names)
    theirs = sitk.GetArrayFromImage(reference)
    volume = read(folder)
    places = world_image(volume.shape, volume.affine)
    for value in (0, 17, 104, 209):
        z, y, x = np.argwhere(theirs == value)[0]
        point = reference.TransformIndexToPhysicalPoint((int(x), int(y), int(z)))
        index = tuple(np.argwhere(volume.array[0] == value)[0])
        assert np.allclose(places[index], (-point[0], -point[1], point[2]), atol=1e-3)


def test_a_tilted_gantry_keeps_its_positions(tmp_path) -> None:
    affine = np.diag([-0.8, -1.1, 2.5, 1.0])
    affine[1, 2] = 0.9  # the slices are shifted against each other
    folder = write_series(tmp_path / "s", hounsfield(), affine)
    volume = read(folder)
    nifti = read(save(tmp_path / "same.nii.gz", hounsfield(), affine))
    assert np.array_equal(volume.array, nifti.array)
    assert np.allclose(volume.affine, nifti.affine, atol=1e-3)


def test_slope_and_intercept_are_those_of_each_slice(tmp_path) -> None:
    """ITK's own reader of series takes the type of the first slice, and would cut the others to integers."""
    stored, slopes = hounsfield(), [1, 0.5, 2, 4, 0.5]
    folder = write_series(tmp_path / "s", stored, np.eye(4))
    for path in folder.iterdir():
        tag, slope = b"\x28\x00\x53\x10\x02\x00\x00\x00", slopes[int(path.stem[-3:])]
        edit(path, tag + b"1 ", tag + (b".5" if slope == 0.5 else f"{slope} ".encode()))
    volume = read(folder)
    assert np.allclose(volume.array[0], stored * np.array(slopes), atol=1e-6)


def test_one_slice_is_an_image_and_a_radiograph_a_picture(tmp_path) -> None:
    affine, array = oblique_affine("LPS", SPACING), hounsfield()
    folder = write_series(tmp_path / "s", array[:, :, :1], affine)
    file = next(folder.iterdir())
    nifti = read(save(tmp_path / "same.nii.gz", array[:, :, :1], affine), dims=2)
    for path in (folder, file):
        volume = read(path, dims=2)
        assert np.array_equal(volume.array, nifti.array)
        assert np.allclose(volume.affine, nifti.affine, atol=1e-3)
    for tag in ("20|0032", "20|0037"):  # a radiograph says nothing of the patient's axes
        group, element = (int(part, 16) for part in tag.split("|"))
        code = group.to_bytes(2, "little") + element.to_bytes(2, "little")
        edit(file, code, b"\x20\x00\x99\x00")
    radiograph = read(file)
    assert radiograph.shape == SHAPE[1::-1]
    assert radiograph.orientation is None
    assert np.array_equal(radiograph.array[0], array[:, :, 0].T)
    assert np.allclose(radiograph.spacing, SPACING[1::-1])
    with pytest.raises(InputError, match="expected a volume"):
        read(file, dims=3)


def test_white_is_not_black(tmp_path) -> None:
    array = np.random.default_rng(0).integers(0, 4000, (7, 6, 1)).astype(np.uint16)
    file = next(write_series(tmp_path / "s", array, np.eye(4)).iterdir())
    edit(file, b"MONOCHROME2", b"MONOCHROME1")
    inverted = read(file).array
    assert np.corrcoef(inverted.ravel(), array[:, :, 0].ravel())[0, 1] == pytest.approx(-1)
    scaled = next(write_series(tmp_path / "t", array, np.eye(4), intercept=-5, slope=1).iterdir())
    edit(scaled, b"MONOCHROME2", b"MONOCHROME1")
    with pytest.raises(InputError, match="MONOCHROME1"):
        read(scaled)


# --- DICOM: what is refused ---------------------------------------------------------------------------------


def spoil_gap(folder):
    next(folder.glob("*002.dcm")).unlink()


def spoil_time(folder):
    write_series(folder, hounsfield(seed=1), np.eye(4), "1.2.3", number=7)
    for path in list(folder.glob("1.2.3_*")):
        shutil.copy(path, folder / f"again_{path.name}")


def spoil_turn(folder):
    turned = write_series(folder.parent / "turned", hounsfield(), oblique_affine("PSR", (1.0, 1.0, 1.0)))
    shutil.copy(sorted(turned.iterdir())[0], folder / "localizer.dcm")


def spoil_size(folder):
    larger = write_series(folder.parent / "larger", hounsfield((9, 9, 1)), np.eye(4))
    shutil.copy(next(larger.iterdir()), folder / "larger.dcm")


def spoil_frames(folder):
    shutil.rmtree(folder)
    folder.mkdir()
    image = sitk.GetImageFromArray(hounsfield().astype(np.uint16).transpose(2, 1, 0))
    sitk.WriteImage(image, str(folder / "frames.dcm"))


def spoil_more(folder):
    write_series(folder, hounsfield(), np.eye(4), "1.2.4", description="flair", number=5)


def spoil_bytes(folder):
    path = sorted(folder.iterdir())[0]
    path.write_bytes(path.read_bytes()[:700])


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (spoil_gap, "not evenly spaced"),
        (spoil_time, "the same place"),
        (spoil_turn, "another direction"),
        (spoil_size, "is it another series?"),
        (spoil_frames, "5 frames in one file"),
        (spoil_more, "holds 2 series; choose one with --data.series: "),
        (spoil_bytes, "0000.dcm"),
    ],
)
def test_what_is_no_even_grid_is_refused_in_one_line(tmp_path, spoil, words) -> None:
    folder = write_series(tmp_path / "s", hounsfield(), np.eye(4), description="t1")
    spoil(folder)
    with pytest.raises(InputError) as caught:
        read(folder, dims=3)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "sitk::" not in str(caught.value)


def test_a_series_is_chosen_by_number_description_or_uid(tmp_path) -> None:
    t1, flair = hounsfield(), hounsfield(seed=1)
    folder = write_series(tmp_path / "s", t1, np.eye(4), "1.2.3", number=4, description="T1 mpr")
    write_series(folder, flair, np.eye(4), "1.2.4", description="flair", number=5)
    for name in ("t1 mpr", "4", "1.2.3"):
        assert np.array_equal(read(folder, series=name).array[0], t1)
    assert np.array_equal(read(folder, series="5").array[0], flair)
    with pytest.raises(
        InputError, match=r"no series 't2'.*holds 4 'T1 mpr' \(5 files\), 5 'flair' \(5 files\)"
    ):
        read(folder, series="t2")


@pytest.mark.parametrize("name", ["s", "a.nrrd", "a.mha", "b.dcm"])
def test_without_simpleitk_the_extra_is_named(tmp_path, monkeypatch, name) -> None:
    write_series(tmp_path / "s", hounsfield(), np.eye(4))
    for file in ("a.nrrd", "a.mha", "b.dcm"):
        (tmp_path / file).write_bytes(b"NRRD0004")
    monkeypatch.setitem(sys.modules, "SimpleITK", None)
    with pytest.raises(InputError, match=r"pip install 'ldm3d\[formats\]'") as caught:
        read(tmp_path / name)
    assert ("dcm2niix" in str(caught.value)) == (name in ("s", "b.dcm"))


# --- DICOM folders as files of cases ------------------------------------------------------------------------


@pytest.fixture
def patients(tmp_path):
    """Four patients: NAME/1.2.840.N holds the slices of a CT, NAME/notes.txt is no image."""
    for i, name in enumerate("abcd"):
        write_series(
            tmp_path / f"data/{name}/1.2.840.{i}", hounsfield((16, 16, 8), i), oblique_affine("LPS", SPACING)
        )
        (tmp_path / f"data/{name}/notes.txt").write_text("no image")
    return tmp_path / "data"


def test_a_pattern_and_a_table_name_folders_of_slices(patients) -> None:
    cases = find_cases(DataConfig(image="*/1*/"), patients)
    assert [case.id for case in cases] == list("abcd")
    assert cases[2].image == patients / "c/1.2.840.2"
    assert [c.id for c in find_cases(DataConfig(image="{id}/1.2.840.*"), patients)] == list("abcd")
    ids = [f"{name}_1.2.840.{i}" for i, name in enumerate("abcd")]
    assert [c.id for c in find_cases(DataConfig(image="{id}/{id}/"), patients)] == ids
    (patients / "cases.csv").write_text(
        "image\n" + "".join(f"{n}/1.2.840.{i}\n" for i, n in enumerate("abcd"))
    )
    assert [case.id for case in find_cases(DataConfig(), patients)] == [f"1.2.840.{i}" for i in range(4)]
    with pytest.raises(InputError, match=r"no file .* fits"):
        find_cases(DataConfig(image="*/"), patients)  # the patients' own folders hold no slices
    with pytest.raises(InputError, match=r"data\.source_series: has no effect"):
        find_cases(DataConfig(image="*/1*/", source_series="4"), patients)


def test_images_and_sources_are_series_of_the_same_folders(patients, tmp_path) -> None:
    for i, name in enumerate("abcd"):
        folder, array = patients / f"{name}/1.2.840.{i}", hounsfield((16, 16, 8), 10 + i)
        write_series(folder, array, oblique_affine("LPS", SPACING), "1.2.9", number=9)
    globs = {"image": "*/1*/", "series": "1.2.3", "source": "*/1*/", "source_series": "9"}
    data = opened(DataConfig(root=str(patients), cache_dir=str(tmp_path / "cache"), scaling="none", **globs))
    for index, case in enumerate(data.dataset("train").cases):
        item, number = data.dataset("train")[0, index], "abcd".index(case.id)
        for role, seed in (("image", number), ("source", 10 + number)):
            stored = np.sort(hounsfield((16, 16, 8), seed), axis=None)
            assert np.array_equal(np.sort(item[role], axis=None), stored)


def test_many_threads_read_what_one_reads(tmp_path) -> None:
    folder = write_series(tmp_path / "s", hounsfield(), oblique_affine("PSR", SPACING))
    alone = read(folder).array
    with ThreadPoolExecutor(8) as pool:
        assert all(np.array_equal(alone, v.array) for v in pool.map(read, 40 * [folder]))


def test_a_data_set_of_series_opens_and_notices_a_changed_slice(patients, tmp_path) -> None:
    config = DataConfig(root=str(patients), image="*/1*/", cache_dir=str(tmp_path / "cache"), cache="disk")
    data = opened(config)
    first = data.dataset("train")[0, 0]["image"]
    again = opened(config).dataset("train")[0, 0]["image"]
    assert (first == again).all()
    image = data.dataset("train").cases[0].image
    index = "abcd".index(data.dataset("train").cases[0].id)
    write_series(image, 2 * hounsfield((16, 16, 8), index), oblique_affine("LPS", SPACING))
    changed = opened(config)
    case = changed.dataset("train").cases[0].id
    assert changed.infos[case].content != data.infos[case].content
    assert changed.infos[case].high != data.infos[case].high


def test_series_are_recognised_among_the_files_of_a_folder(patients, tmp_path) -> None:
    for i, name in enumerate("abcd"):
        (patients / name).rename(patients / f"p{i}")
    layout = recognise(patients)
    assert layout.settings == {"image": "*/*/"}
    assert len(find_cases(DataConfig(**layout.settings), patients)) == 4
    assert take(patients, {"data.cache_dir": str(tmp_path / "cache")}).modality == "CT"
    for i, name in enumerate(("p0", "p1", "p2", "p3")):
        (patients / f"{name}/1.2.840.{i}").rename(patients / f"{name}/t1")
        write_series(patients / f"{name}/flair", hounsfield((16, 16, 8), 10 + i), np.eye(4))
        save(patients / f"{name}/seg.nii.gz", np.arange(2048).reshape(16, 16, 8).astype(np.uint8) % 3)
    layout = recognise(patients)
    assert layout.settings == {"image": "*/flair/", "mask": "*/seg.nii.gz"}
    assert layout.why["others"] == "*/t1/ (4)"
    assert recognise(patients / "p0").settings["image"] == "*/"


def test_a_chosen_series_is_planned_from_where_every_folder_holds_two(tmp_path) -> None:
    for i in range(3):
        folder = write_series(tmp_path / f"data/p{i}", hounsfield(seed=i), np.eye(4), description="t1")
        write_series(folder, hounsfield((9, 8, 7), i), np.eye(4), "1.2.4", description="flair")
    flags = {"data.cache_dir": str(tmp_path / "cache")}
    with pytest.raises(InputError, match=r"holds 2 series; choose one with --data\.series"):
        take(tmp_path / "data", flags)
    for more in ({}, {"data.image": "*/"}):
        found = take(tmp_path / "data", flags | more | {"data.series": "flair"})
        assert found.shapes == ((9, 8, 7),) * 3


def test_radiographs_in_a_folder_are_images_of_their_own(tmp_path) -> None:
    for i in range(3):
        write_series(tmp_path / "data", hounsfield((16, 16, 1), i), np.eye(4), f"1.2.{i}")
    layout = recognise(tmp_path / "data")
    assert layout.settings == {"image": "*.dcm"}
    assert take(tmp_path / "data", {"data.cache_dir": str(tmp_path / "cache")}).dims == 2


def test_a_scout_before_the_slices_does_not_make_radiographs_of_them(tmp_path) -> None:
    folder = write_series(tmp_path / "p0", hounsfield((16, 16, 3)), np.eye(4))
    assert is_series_folder(folder)
    scout = write_series(tmp_path / "scout", hounsfield((16, 16, 1)), np.eye(4), "1.2.77")
    (next(scout.iterdir())).rename(folder / "000.dcm")
    assert is_series_folder(folder)
    assert not is_series_folder(scout)


def test_sampling_takes_one_series_or_a_folder_of_them(patients) -> None:
    layout = DataConfig(image="images/*.nii.gz", series="t1")
    how, cases = find_images(patients / "a/1.2.840.0", layout)
    assert [case.id for case in cases] == ["1.2.840.0"]
    assert how.series is None
    _, cases = find_images(patients / "a", layout)
    assert [case.image for case in cases] == [patients / "a/1.2.840.0"]
    write_series(patients / "a/1.2.840.0", hounsfield(seed=9), np.eye(4), "1.2.9", description="t1")
    how, _ = find_images(patients / "a", layout)
    assert how.series == "t1"


def test_a_stamp_is_of_all_files_of_a_volume(tmp_path) -> None:
    folder = write_series(tmp_path / "s", hounsfield(), np.eye(4))
    before = stamp(folder)
    path = sorted(folder.iterdir())[1]
    content, stat = path.read_bytes(), path.stat()
    path.write_bytes(content[::-1])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert stamp(folder)[0] == before[0]
    assert stamp(folder) != before
    sitk.WriteImage(sitk.GetImageFromArray(hounsfield()), str(tmp_path / "a.mhd"))
    before = stamp(tmp_path / "a.mhd")
    with open(tmp_path / "a.raw", "r+b") as file:
        file.write(b"xx")
    os.utime(tmp_path / "a.raw", ns=(0, 0))
    assert stamp(tmp_path / "a.mhd") != before


# --- NRRD and MetaImage -------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".nrrd", ".nhdr", ".mha", ".mhd"])
@pytest.mark.parametrize("codes", ["LPS", "PSR"])
def test_nrrd_and_metaimage_are_the_same_volume_as_their_nifti(tmp_path, suffix, codes) -> None:
    affine, array = oblique_affine(codes, SPACING), hounsfield()
    nifti = save(tmp_path / "same.nii.gz", array, affine)
    sitk.WriteImage(
        sitk.ReadImage(str(nifti)), str(tmp_path / f"a{suffix}"), useCompression=suffix == ".nrrd"
    )
    volume, expected = read(tmp_path / f"a{suffix}"), read(nifti)
    assert np.array_equal(volume.array, expected.array)
    assert volume.orientation == codes
    assert np.allclose(volume.affine, expected.affine, atol=1e-4)


@pytest.mark.parametrize("suffix", [".nrrd", ".mha"])
def test_components_and_a_fourth_axis_are_channels(tmp_path, suffix) -> None:
    array = np.random.default_rng(0).normal(size=(3, 5, 6, 7)).astype(np.float32)  # (C, z, y, x)
    vector = sitk.GetImageFromArray(np.moveaxis(array, 0, -1), isVector=True)
    sitk.WriteImage(vector, str(tmp_path / f"vector{suffix}"))
    sitk.WriteImage(sitk.GetImageFromArray(array, isVector=False), str(tmp_path / f"time{suffix}"))
    for name in ("vector", "time"):
        volume = read(tmp_path / f"{name}{suffix}")
        assert volume.shape == (7, 6, 5)
        assert np.array_equal(volume.array, array.transpose(0, 3, 2, 1)[:, ::-1, ::-1])  # LPS to RAS
        one = read(tmp_path / f"{name}{suffix}", channel=2)
        assert np.array_equal(one.array[0], volume.array[2])


def test_a_flat_metaimage_is_a_picture(tmp_path) -> None:
    array = hounsfield((6, 7))
    image = sitk.GetImageFromArray(array)
    image.SetSpacing((0.5, 0.7))
    sitk.WriteImage(image, str(tmp_path / "a.mha"))
    volume = read(tmp_path / "a.mha")
    assert np.array_equal(volume.array[0], array)
    assert np.allclose(volume.spacing, (0.7, 0.5))


def test_a_damaged_file_is_one_line_without_itks_own_words(tmp_path) -> None:
    sitk.WriteImage(sitk.GetImageFromArray(hounsfield()), str(tmp_path / "a.nrrd"))
    (tmp_path / "a.nrrd").write_bytes((tmp_path / "a.nrrd").read_bytes()[:300])
    (tmp_path / "b.mha").write_bytes(b"nothing")
    for name in ("a.nrrd", "b.mha"):
        with pytest.raises(InputError, match=name) as caught:
            read(tmp_path / name)
        assert "\n" not in str(caught.value)
        assert "sitk::" not in str(caught.value)


def test_pictures_beside_volumes_are_previews(patients) -> None:
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(patients / "a/preview.png")
    assert own_images(patients / "a") == "*/"
    sitk.WriteImage(sitk.GetImageFromArray(hounsfield()), str(patients / "a/volume.mha"))
    assert own_images(patients / "a") == "*.mha"


def test_colours_are_channels_and_reports_are_no_slices(tmp_path) -> None:
    colours = np.random.default_rng(0).integers(0, 255, (5, 6, 3), dtype=np.uint8)
    sitk.WriteImage(sitk.GetImageFromArray(colours[None], isVector=True), str(tmp_path / "colours.dcm"))
    volume = read(tmp_path / "colours.dcm", dims=2)
    assert volume.channels == 3
    assert {tuple(v.ravel()) for v in np.moveaxis(volume.array, 0, -1).reshape(-1, 1, 3)} == {
        tuple(v.astype(np.float32)) for v in colours.reshape(-1, 3)
    }
    folder = write_series(tmp_path / "s", hounsfield(), np.eye(4))
    report = next(folder.iterdir()).read_bytes()
    kind = b"1.2.840.10008.5.1.4.1.1.2\x00"
    assert kind in report
    (folder / "report.dcm").write_bytes(report.replace(kind, b"1.2.840.10008.5.1.4.1.1.88", 1)[:900])
    assert read(folder).shape == SHAPE


# --- TIFF with codecs ---------------------------------------------------------------------------------------


def test_tiffs_with_lzw_and_jpeg_are_read_as_pillow_reads_them(tmp_path) -> None:
    smooth = np.add.outer(np.arange(32), np.arange(48)).astype(np.uint8)
    colours = np.stack([smooth, smooth[::-1], smooth // 2], axis=-1)
    for name, array, compression in (
        ("lzw", smooth, "tiff_lzw"),
        ("jpeg", smooth, "jpeg"),
        ("colour", colours, "jpeg"),
    ):
        Image.fromarray(array).save(tmp_path / f"{name}.tif", compression=compression)
        expected = np.asarray(Image.open(tmp_path / f"{name}.tif"))
        expected = expected[None] if expected.ndim == 2 else np.moveaxis(expected, -1, 0)
        assert np.abs(read(tmp_path / f"{name}.tif", dims=2).array - expected).max() <= (
            0 if name == "lzw" else 2
        )


def test_without_imagecodecs_the_extra_is_named(tmp_path, monkeypatch) -> None:
    def lacking(*args, **kwargs):
        raise ValueError("<COMPRESSION.LZW: 5> requires the 'imagecodecs' package")

    tifffile.imwrite(tmp_path / "a.tif", hounsfield((8, 8)))
    monkeypatch.setattr(tifffile, "imread", lacking)
    with pytest.raises(InputError, match=r"imagecodecs.*; pip install 'ldm3d\[formats\]'"):
        read(tmp_path / "a.tif")


def test_nifti_needs_no_extra(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "SimpleITK", None)
    nib.save(nib.Nifti1Image(hounsfield(), np.eye(4)), tmp_path / "a.nii")
    assert read(tmp_path / "a.nii").shape == SHAPE


@pytest.mark.parametrize("name", ["a\0b", "\ud800", "x" * 5000])
def test_a_name_that_no_path_can_have_is_no_folder(name) -> None:
    assert not is_dicom_folder(name)


# --- runs ---------------------------------------------------------------------------------------------------


def scans(root):
    """Four subjects: thick, oblique slices of CT as a DICOM series each, with a label map as NIfTI."""
    affine, grid = oblique_affine("LPS", (1.5, 1.5, 4.0), 0.1), np.indices((24, 26, 8))
    for i in range(4):
        distance = [((g - c) / r) ** 2 for g, c, r in zip(grid, (11 + i, 13, 4), (8, 9, 3), strict=True)]
        organ = sum(distance) < 1
        noise = np.random.default_rng(i).integers(-20, 20, organ.shape)
        array = (np.where(organ, 60 + 10 * i, -1000) + noise).astype(np.int16)
        write_series(root / f"p{i}" / "ct", array, affine, f"1.2.{i}")
        save(root / f"p{i}" / "organ.nii.gz", organ.astype(np.uint8), affine)
    return root


def check_results(place) -> None:
    """What the runs of the test below have written lies where the scans lie, in their units."""
    scan = read(place / "scans/p0/ct")
    for name in ("vae-scans/reconstructions-001/p0", "cdal-scans/segmentations-001/labels/ct"):
        volume = read(place / f"runs/{name}.nii.gz")
        assert (volume.shape, volume.orientation) == (scan.shape, scan.orientation)
        assert np.allclose(volume.affine, scan.affine, atol=1e-3)
    assert set(np.unique(volume.array)) <= {0, 1}
    made = read(place / "runs/ldm-scans/samples-001/sample_0000.nii.gz")
    assert (made.shape, made.orientation) == ((24, 28, 8), "LPS")  # padded to what the networks can halve
    assert made.spacing == pytest.approx((1.5, 1.5, 4.0))
    assert -1025 <= made.array.min() < -500 < made.array.max() < 200  # HU


@pytest.mark.slow
def test_a_folder_of_series_and_masks_goes_through_all_stages_without_a_setting(
    tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    root, tiny = str(scans(tmp_path / "scans")), ["--run.steps", "3", "--run.eval_every", "3"]
    train_vae.main([root, *tiny])
    train_ldm.main(["runs/vae-scans", *tiny, "--data.num_variants", "1"])
    train_cdal.main([root, *tiny])
    sample.main(["runs/ldm-scans", "--num", "1", "--steps", "2"])
    sample.main(["runs/vae-scans", root])
    sample.main(["runs/cdal-scans", f"{root}/p0/ct", "--votes", "1"])  # named by its folder, ct
    check_results(tmp_path)
