"""A run under conditions does the whole job: it trains on many ranks as on one, resumes bit by bit, samples
under its conditions, and refuses those that it does not have before any work."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import EVERY_CONDITION, ROOT, ldm_flags, lines, torchrun, vae_flags

import ldm3d
import sample
import train_ldm
import train_vae
from ldm3d import InputError, Volume, read, write
from ldm3d.conditions import absent
from ldm3d.data import DataConfig
from ldm3d.data.cases import find_cases, split_cases
from ldm3d.data.phantoms import write_phantoms
from ldm3d.inference import sampling
from ldm3d.inference.sampling_request import RequestConfig, read_region, read_request, request_of_cases


@pytest.fixture
def run(conditional_run):
    return conditional_run


@pytest.fixture
def runs_folder(conditional_run):
    """The folder of the run, its autoencoder and their heads."""
    return conditional_run.parent


def test_the_checkpoint_knows_the_conditions(run):
    model = ldm3d.load(run).model
    assert [c.name for c in model.denoiser.conditions] == [
        "class",
        "text",
        "age",
        "spacing",
        "image",
        "labels",
        "tokens",
        "report",
    ]
    assert model.denoiser.conditions[2].mean[0] == pytest.approx(46, abs=3)
    assert (run / "previews" / "step_0000010.png").exists()


def test_an_autoencoder_that_has_learnt_sources_serves_data_without_any(runs_folder, tmp_path):
    images = "--data.table", "none", "--data.image", "images/*.tif", "--data.source", "none"
    moved = tmp_path / "heads"  # images alone: the table of the data names sources
    shutil.copytree(runs_folder / "heads" / "images", moved / "images")
    flags = ldm_flags(runs_folder / "vae", tmp_path / "ldm", 1, *images, "--data.root", str(moved))
    train_ldm.main(flags)
    assert np.isfinite(lines(tmp_path / "ldm")[-1]["loss"])


def test_the_cache_holds_the_latent_of_the_source_and_the_shares_of_the_labels(run):
    pipeline = ldm3d.load(run)
    folder = next((run / "latents").glob("val-*"))
    names = {p.stem.split("-")[0] for p in folder.glob("*.npy")}
    assert names == {"mean", "logvar", "source", "labels", "spacing"}
    val = json.loads((run / "split.json").read_text())["val"][0]
    root = pipeline.layout.root
    x = pipeline.read(f"{root}/sources/{val}.tif", "source")
    expected = pipeline.model.autoencoder.encode(x[None]).mean[0]
    assert np.allclose(np.load(folder / "source-000000.npy")[0, 0], expected, atol=1e-5)
    labels = np.load(folder / "labels-000000.npy")[0, 0]
    num = len(labels) // 3  # shares of the labels, and their moments along two axes
    assert np.allclose(labels[:num].sum(0), 1)
    mask = read(f"{root}/labels/{val}.tif").array[0]
    assert labels[0].mean() == pytest.approx((mask == 0).mean())


def test_sampling_sees_what_training_saw(run):
    """The conditions of a case, read from its files and cells as `sample` reads the user's."""
    pipeline = ldm3d.load(run)
    request = request_of_cases(RequestConfig(cases="val"), pipeline, "fp32")
    case, conditions = request.images.cases[0], pipeline.model.denoiser.conditions
    values = {c.name: case.columns.get(c.name) for c in conditions}
    values |= {"image": case.source, "tokens": case.source, "labels": case.mask, "spacing": (12.0, 11.0)}
    values["report"] = f"{pipeline.layout.root}/{case.columns['report']}"
    cond = pipeline.prepare(values)
    assert list(cond) == [c.name for c in conditions]
    for name, value in cond.items():
        assert torch.allclose(value, request.conditions[name][:1].to(value), atol=1e-5, equal_nan=True)
        assert absent(value).tolist() == [values[name] == ""]


def test_training_without_a_cache_goes_the_same_way(runs_folder, tmp_path):
    ends = []
    for name, cache in (("cached", "true"), ("fresh", "false")):
        flags = ldm_flags(runs_folder / "vae", tmp_path / name, 3, *EVERY_CONDITION, "--latent_cache", cache)
        train_ldm.main(flags)
        ends.append([line["loss"] for line in lines(tmp_path / name)])
    assert np.allclose(*ends, rtol=1e-4)


def test_samples_follow_their_conditions(run):
    model = ldm3d.load(run)
    root = model.layout.root
    plain = model.sample(1, steps=2)
    cond = {"class": 1, "text": "a large lesion", "age": 50, "image": f"{root}/sources/phantom_0003.tif"}
    alone = {name: model.sample(1, steps=2, conditions={name: value}) for name, value in cond.items()}
    assert all(not torch.allclose(x, plain, atol=1e-6) for x in alone.values())
    both = model.sample(2, steps=2, conditions={"class": [1, None]})
    assert torch.allclose(both[:1], alone["class"], atol=1e-4)
    assert torch.allclose(both[1:], model.sample(1, steps=2, first=1), atol=1e-4)
    assert torch.allclose(model.sample(1, steps=2, conditions=cond, guidance_scale=0.0), plain, atol=1e-4)


@pytest.mark.parametrize("amp", ["bf16", pytest.param("fp16", marks=pytest.mark.slow)])
def test_training_in_reduced_precision_stays_finite(runs_folder, tmp_path, amp):
    train_ldm.main(ldm_flags(runs_folder / "vae", tmp_path / "ldm", 2, *EVERY_CONDITION, "--run.amp", amp))
    assert all(line["skipped_steps"] == 0 and np.isfinite(line["loss"]) for line in lines(tmp_path / "ldm"))


@pytest.mark.slow
def test_the_plan_counts_the_conditions(runs_folder, tmp_path, capsys):
    train_ldm.main(
        ldm_flags(runs_folder / "vae", tmp_path / "ldm", 2, *EVERY_CONDITION, "--plan", "--memory", "4")
    )
    assert "training, latents 4 x 4x5" in capsys.readouterr().out
    assert not (tmp_path / "ldm").exists()


# --- sample.py ----------------------------------------------------------------------------------------------


def sample_main(run, out, *flags):
    sample.main([*map(str, [run, *flags, "--steps", 2, "--out", out])])


def files_of(folder):
    return sorted(p.name for p in folder.glob("*.tif"))


def test_sample_takes_conditions_and_puts_the_result_where_its_source_lies(run, tmp_path, capsys):
    source = f"{ldm3d.load(run).layout.root}/sources/phantom_0003.tif"
    flags = [
        "--condition",
        "class=1",
        "--condition",
        "text=a strange, large lesion",
        "--steps",
        "2",
        "--num",
        "2",
    ]
    flags += ["--guidance", "class=3,text=2", "--maps", "--out", str(tmp_path / "out")]
    sample.main([str(run), *flags, "--condition", f"image={source}"])
    assert "does not know: strange" in capsys.readouterr().out
    assert files_of(tmp_path / "out") == ["sample_0000.tif", "sample_0001.tif"]
    assert files_of(tmp_path / "out" / "maps") == ["set_0000_mean.tif", "set_0000_std.tif"]
    volumes = [read(f) for part in ("out", "out/maps") for f in sorted((tmp_path / part).glob("*.tif"))]
    assert np.allclose(volumes[0].affine, read(source).affine, atol=1e-3)
    both = np.stack([v.array for v in volumes[:2]])
    assert np.allclose(volumes[2].array, both.mean(0), rtol=1e-3, atol=1e-2 * np.ptp(both))
    assert np.allclose(volumes[3].array, both.std(0), atol=2e-2 * np.ptp(both))
    how = json.loads((tmp_path / "out" / "samples.json").read_text())
    assert how["sets"]["set_0000"]["class"] == "1"


def test_sample_takes_a_table_of_conditions(run, tmp_path, monkeypatch):
    sheets = []
    monkeypatch.setattr(sampling, "save_sheet", lambda path, rows, limits: sheets.append(rows))
    (tmp_path / "sets.csv").write_text("name;class;text\nfirst;1;a lesion\nsecond;;\n")
    sample.main(
        [str(run), "--conditions", str(tmp_path / "sets.csv"), "--steps", "2", "--out", str(tmp_path / "out")]
    )
    assert files_of(tmp_path / "out") == ["first.tif", "second.tif"]
    assert list(sheets[0]) == ["samples 0 to 1: first, second"]
    model = ldm3d.load(run)
    x = model.sample(2, steps=2, conditions={"class": [1, None], "text": ["a lesion", None]})
    written = read(tmp_path / "out" / "second.tif").array
    assert np.allclose(written, model.spec.to_volume(x[1]).array, rtol=1e-3, atol=0.5)


def test_sample_compares_the_cases_of_a_part_with_their_targets(run, tmp_path):
    sample.main([str(run), "--cases", "val", "--num", "2", "--steps", "2", "--out", str(tmp_path / "out")])
    val = json.loads((run / "split.json").read_text())["val"]
    scores = json.loads((tmp_path / "out" / "samples.json").read_text())["cases_scores"]
    assert set(scores) == {f"{name}{end}" for name in val for end in ("_00", "_01", " mean")}
    assert all(np.isfinite(row["psnr"]) for row in scores.values())
    assert (tmp_path / "out" / "preview.png").exists()
    pipeline, name = ldm3d.load(run), f"{val[0]}_01"
    sheet = read(tmp_path / "out" / "sheets" / f"{name}.tif").array
    source = pipeline.read(f"{pipeline.layout.root}/sources/{val[0]}.tif", "source")
    target = pipeline.read(f"{pipeline.layout.root}/images/{val[0]}.tif")
    assert sheet.dtype == np.float32
    assert np.allclose(sheet[..., :40], torch.cat([source, target], 2), atol=1e-5)
    assert sheet.shape[-1] == 60


def test_a_target_of_one_value_has_no_score(run, tmp_path, capsys):
    """Whatever is black there would score without end."""
    root = ldm3d.load(run).layout.root
    name = json.loads((run / "split.json").read_text())["val"][0]
    path = Path(f"{root}/images/{name}.tif")
    kept, volume = path.read_bytes(), read(path)
    write(path, replace(volume, array=np.zeros_like(volume.array)), overwrite=True)
    try:
        sample.main([str(run), "--cases", "val", "--num", "2", "--steps", "2", "--out", str(tmp_path)])
    finally:
        path.write_bytes(kept)
    scores = json.loads((tmp_path / "samples.json").read_text())["cases_scores"]
    blank = {f"{name}{end}" for end in ("_00", "_01", " mean")}
    assert {k for k, row in scores.items() if set(row.values()) == {None}} == blank
    said, num = capsys.readouterr().out, len(scores) // 3
    assert f"note: 2 of {2 * num} samples are not scored" in said
    assert f"note: 1 of {num} means are not scored" in said
    assert f"samples beside targets, {2 * num - 2}" in said


@pytest.mark.slow
def test_two_ranks_sample_as_one(run, tmp_path):
    flags = [run, "--cases", "val", "--num", "3", "--steps", "2", "--maps"]
    process = torchrun(ROOT / "sample.py", *flags, "--out", tmp_path / "two", port=7)
    sample.main([*map(str, flags), "--out", str(tmp_path / "one")])
    out, err = process.communicate(timeout=180)
    assert process.returncode == 0, out + err
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    for name in files_of(tmp_path / "one"):
        a, b = (read(tmp_path / part / name).array for part in ("one", "two"))
        assert np.allclose(a, b, rtol=1e-3, atol=1e-2 * np.ptp(a) + 1e-3)
    scores = [json.loads((tmp_path / p / "samples.json").read_text())["cases_scores"] for p in ("one", "two")]
    assert scores[0].keys() == scores[1].keys()


def test_inpainting_leaves_the_voxels_outside_the_region_untouched(run, tmp_path):
    root = ldm3d.load(run).layout.root
    image, mask = (f"{root}/{kind}/phantom_0002.tif" for kind in ("images", "labels"))
    flags = [
        "--inpaint",
        image,
        "--region",
        mask,
        "--num",
        "2",
        "--steps",
        "2",
        "--out",
        str(tmp_path / "out"),
    ]
    sample.main([str(run), *flags, "--condition", "class=1"])
    before, region = read(image), read(mask).array > 0
    for name in files_of(tmp_path / "out"):
        after = read(tmp_path / "out" / name)
        assert np.array_equal(after.array[~region], before.array[~region])
        assert not np.allclose(after.array[region], before.array[region], rtol=1e-3)
        assert np.allclose(after.affine, before.affine, atol=1e-4)
    flags[-1] = str(tmp_path / "once")
    sample.main([str(run), *flags, "--condition", "class=1", "--resample", "1"])
    calls = [
        json.loads((tmp_path / out / "samples.json").read_text())["network_calls"] for out in ("out", "once")
    ]
    assert calls == [1 + 4, 2]  # the step from pure noise, the other four times or once
    with pytest.raises(InputError, match="resample: needs inpaint"):
        sample.main([str(run), "--resample", "2"])


def test_what_was_in_the_region_does_not_show_in_the_file(run, tmp_path):
    root = ldm3d.load(run).layout.root
    image, mask = read(f"{root}/images/phantom_0002.tif"), f"{root}/labels/phantom_0002.tif"
    region = read(mask).array > 0
    made = []
    for name, factor in (("as it is", 1), ("brighter", 30)):  # which moves the percentiles of the file
        array = np.where(region, factor * image.array, image.array)
        write(tmp_path / f"{name}.tif", replace(image, array=array))
        flags = ["--inpaint", str(tmp_path / f"{name}.tif"), "--region", mask, "--num", "1", "--steps", "2"]
        sample.main([str(run), *flags, "--out", str(tmp_path / name)])
        made.append(read(tmp_path / name / "sample_0000.tif").array)
    assert np.array_equal(*made)
    assert np.array_equal(made[0][~region], image.array[~region])


def test_images_are_edited_and_interpolated(run, tmp_path):
    root = ldm3d.load(run).layout.root
    a, b = (f"{root}/images/phantom_000{i}.tif" for i in (1, 2))
    sample.main([str(run), "--edit", a, "--num", "1", "--steps", "4", "--out", str(tmp_path / "edit")])
    sample.main(
        [str(run), "--interpolate", f"{a},{b}", "--num", "3", "--steps", "4", "--out", str(tmp_path / "way")]
    )
    sample.main(
        [str(run), "--interpolate", "0,1", "--num", "2", "--steps", "4", "--out", str(tmp_path / "two")]
    )
    assert [len(files_of(tmp_path / name)) for name in ("edit", "way", "two")] == [1, 3, 2]
    between = read(tmp_path / "way" / "sample_0001.tif")
    assert np.allclose(between.affine, read(a).affine, atol=1e-3)
    told = [json.loads((tmp_path / name / "samples.json").read_text()) for name in ("edit", "two")]
    # of the half of ab2's 4 steps that strength 0.5 visits, and of all 4
    assert [how["network_calls"] for how in told] == [2, 4]


def test_a_counterfactual_starts_from_the_noise_of_the_image(run, tmp_path):
    pipeline = ldm3d.load(run)
    image = f"{pipeline.layout.root}/images/phantom_0001.tif"
    edit = ["--edit", image, "--strength", "0.6", "--steps", "10", "--condition"]
    flags = {"own": ["class=1", "--invert", "class=1"], "other": ["class=0", "--invert", "class=1"]}
    flags["drawn"] = ["class=1", "--num", "1"]
    for name, words in flags.items():
        sample.main([str(run), *edit, *words, "--out", str(tmp_path / name)])
    told = json.loads((tmp_path / "own" / "samples.json").read_text())
    assert (told["num"], told["sampler"]) == (1, "euler")
    model, images = pipeline.model, pipeline.open([image])
    with torch.inference_mode():
        back = images.restore(0, model.decode(model.encode(images[0, 0]["image"][None]))[0]).array
    made = {name: read(tmp_path / name / "sample_0000.tif").array for name in flags}
    error = {name: float(np.abs(x - back).mean()) for name, x in made.items()}
    assert error["own"] < 0.2 * error["drawn"]
    assert error["own"] < error["other"]


def test_sets_of_conditions_get_the_same_noises_if_asked(run, tmp_path, monkeypatch):
    keys, whole = [], ldm3d.LatentDiffusion.stream

    def watched(self, indices, *more, **named):
        keys.append(list(indices))
        return whole(self, indices, *more, **named)

    monkeypatch.setattr(ldm3d.LatentDiffusion, "stream", watched)
    (tmp_path / "sets.csv").write_text("name,class\na,0\nb,1\n")
    for flags in ([], ["--same_noise"]):
        out = ["--num", "2", "--steps", "1", "--out", str(tmp_path / f"sets{len(flags)}")]
        sample.main([str(run), "--conditions", str(tmp_path / "sets.csv"), *out, *flags])
    assert keys == [[0, 1, 2, 3], [0, 1, 0, 1]]


def read_table(pipeline, path, text):
    path.write_text(text)
    return read_request(RequestConfig(conditions=str(path)), pipeline)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name;class\n../zz;1\n", r"sets\.csv: name is '\.\./zz', expected one that a file can have"),
        ("name;class\na;1\n;1\n", r"sets\.csv: name is ''"),
        ("name;class\na;1\nb;9\n", r"sets\.csv: b: condition class: got '9'"),
        ("name;klass\na;1\n", "condition klass: the model has no such condition"),
    ],
)
def test_a_wrong_table_of_conditions_is_refused_by_name(run, tmp_path, text, words):
    with pytest.raises(InputError, match=words):
        read_table(ldm3d.load(run), tmp_path / "sets.csv", text)


def test_each_row_of_a_table_is_written_where_its_own_source_lies(run, tmp_path, capsys):
    pipeline = ldm3d.load(run)
    source = read(f"{pipeline.layout.root}/sources/phantom_0003.tif")
    write(tmp_path / "beside.tif", source)
    large = np.pad(source.array, [(0, 0), (4, 4), (4, 4)], mode="edge")
    write(tmp_path / "large.tif", Volume(large, np.diag([24.0, 22.0, 1.0])))
    caption = "a lesion " * 40
    rows = f"a;beside.tif;{caption};\nb;;;30,20\nc;;;\nd;large.tif;;30,20\n"
    request = read_table(pipeline, tmp_path / "sets.csv", "name;image;text;spacing\n" + rows)
    volumes = [request.volume(i, torch.zeros(1, 16, 20), pipeline.spec) for i in range(4)]
    assert np.allclose(volumes[0].affine, source.affine)
    assert [v.spacing for v in volumes[1:]] == [(30.0, 20.0), pytest.approx((12.0, 11.0)), (24.0, 22.0)]
    out = capsys.readouterr().out
    assert f"words; of '{caption.strip()}' that is '" in out
    assert f"{tmp_path}/large.tif has shape (24, 28), only its middle is taken" in out
    assert f"{tmp_path}/large.tif has another spacing than the training data, 12x11 mm" in out
    assert out.count("beside.tif") == 0


def test_a_source_that_rows_of_a_table_share_is_read_and_encoded_once(run, tmp_path, monkeypatch):
    pipeline = ldm3d.load(run)
    source, encoded = f"{pipeline.layout.root}/sources/phantom_0003.tif", []
    encode, model = pipeline.model.autoencoder.encode, pipeline.model
    monkeypatch.setattr(model.autoencoder, "encode", lambda x: (encoded.append(len(x)), encode(x))[1])
    rows = f"a;{source};1\nb;{source};\nc;;1\n"
    request = read_table(pipeline, tmp_path / "sets.csv", "name;image;class\n" + rows)
    assert sum(encoded) == 1
    expected = model.prepare({"image": pipeline.read(source, "source"), "class": 1})
    for name, value in expected.items():
        assert torch.equal(request.conditions[name][0], value[0])
    assert torch.equal(request.conditions["image"][1], expected["image"][0])
    assert request.conditions["image"][2].isnan().all()
    assert [info is None for info in request.infos] == [False, False, True]


def test_a_table_of_one_row_names_the_sample_and_gives_its_spacing(run, tmp_path, capsys):
    (tmp_path / "sets.csv").write_text("name;spacing\nfirst;30,20\n")
    sample_main(run, tmp_path / "out", "--conditions", tmp_path / "sets.csv")
    size = json.loads((tmp_path / "out" / "samples.json").read_text())["size"]
    assert f"({30 * size[0]}x{20 * size[1]} mm)" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "samples.json").read_text())["spacing"] == [30, 20]
    assert files_of(tmp_path / "out") == ["first.tif"]
    assert read(tmp_path / "out" / "first.tif").spacing == pytest.approx((30, 20))


def test_arrays_serve_as_tensors_do_and_are_encoded_once(run):
    model, calls = ldm3d.load(run).model, []
    encode, model.encode = model.encode, lambda x: calls.append(len(x)) or encode(x)
    x = np.arange(320, dtype=np.int64).reshape(1, 16, 20) % 2
    from_arrays = model.prepare({"image": x, "labels": x[0], "class": torch.tensor(1)}, 8)
    assert calls == [1]
    tensors = {"image": torch.tensor(x).float(), "labels": torch.tensor(x[0]), "class": 1}
    for name, value in model.prepare(tensors, 8).items():
        assert torch.equal(from_arrays[name], value)


def test_an_edited_image_and_the_maps_of_inpainting_are_in_the_units_of_the_image(run, tmp_path):
    root = ldm3d.load(run).layout.root
    bright = read(f"{root}/images/phantom_0001.tif")
    bright = replace(bright, array=1000 * bright.array)
    write(tmp_path / "bright.tif", bright)
    edit = ["--edit", tmp_path / "bright.tif", "--strength", "0.1", "--num", "1"]
    sample_main(run, tmp_path / "edit", *edit)
    made = read(tmp_path / "edit" / "sample_0000.tif").array
    assert made.mean() == pytest.approx(bright.array.mean(), rel=0.5)
    inpaint = ["--inpaint", tmp_path / "bright.tif", "--region", f"{root}/labels/phantom_0001.tif"]
    sample_main(run, tmp_path / "in", *inpaint, "--num", "2", "--maps")
    both = [read(tmp_path / "in" / f"sample_000{i}.tif").array for i in range(2)]
    std = read(tmp_path / "in" / "maps" / "set_0000_std.tif").array
    assert np.allclose(std, np.std(both, 0), rtol=1e-3, atol=1e-3 * np.ptp(both))


def test_labels_that_the_run_does_not_know_are_refused(run, tmp_path):
    model = ldm3d.load(run)
    mask = read(f"{model.layout.root}/labels/phantom_0001.tif")
    for value in (40, 256):
        array = mask.array.astype(np.uint16)
        array[0, 3, 3] = value
        write(tmp_path / f"{value}.tif", replace(mask, array=array))
        with pytest.raises(InputError, match=rf"{value}\.tif: label {value}, expected 0 to "):
            model.prepare({"labels": tmp_path / f"{value}.tif"})
    good = torch.from_numpy(mask.array[0].astype(np.int64))
    assert model.prepare({"labels": torch.full_like(good, -1)})["labels"].isnan().all()
    for value, words in ((40, "got 0 to 40"), (-1, "got -1 to")):
        bad = good.clone()
        bad[3, 3] = value
        with pytest.raises(InputError, match=f"condition labels: expected labels from 0 to .*{words}"):
            model.prepare({"labels": bad})


def test_masks_have_one_channel_whichever_the_images_are_taken_from(run):
    model = ldm3d.load(run)
    path = f"{model.layout.root}/labels/phantom_0001.tif"
    before = {role: model.read(path, role) for role in ("mask", "region")}
    model.layout = replace(model.layout, channel=(1,))
    for role, mask in before.items():
        assert torch.equal(model.read(path, role), mask)


def test_a_region_must_lie_where_the_image_lies_and_within_what_is_made(run, tmp_path):
    model, affine, far = ldm3d.load(run), *np.tile(np.diag([12.0, 11.0, 1.0]), (2, 1, 1))
    far[0, 2] = 5000
    image, region = np.zeros((1, 24, 20), np.float32), np.zeros((1, 24, 20), np.uint8)
    image[0, 8:16, 4:9], region[0, 12, 9] = 1, 1
    wide = region.copy()
    wide[0, 1, 9] = 1  # 16 of the 24 rows are made
    for name, array, at in (
        ("image", image, affine), ("good", region, affine), ("far", region, far), ("wide", wide, affine),
        ("small", region[:, :20], affine),
    ):  # fmt: skip
        write(tmp_path / f"{name}.nii", Volume(array, at, "RA"))
    places = model.open([tmp_path / "image.nii"], "image")
    assert read_region(tmp_path / "good.nii", places, model).nonzero().tolist() == [[8, 9]]
    for name, words in (
        ("far", r"far\.nii lies up to 417 voxels off the image"),
        ("wide", r"wide\.nii reaches beyond the middle 16x20"),
        ("small", r"small\.nii has shape \(20, 20\), the image"),
    ):
        with pytest.raises(InputError, match=words):
            read_region(tmp_path / f"{name}.nii", places, model)
    model.layout = replace(model.layout, spacing=(12.0, 10.0))
    places = model.open([tmp_path / "image.nii"], "image")
    with pytest.raises(InputError, match=r"image\.nii would be resampled"):
        read_region(tmp_path / "good.nii", places, model)


def test_the_python_lines_of_the_guide_run_as_written(tmp_path, monkeypatch):
    write_phantoms(tmp_path / "heads", 6, size=(16, 20, 16), spacing=(12.0, 11.0, 12.0))
    axes = ["--data.dims", "3", "--vae.dims", "3"]
    train_vae.main(vae_flags(tmp_path / "heads", tmp_path / "vae", 1, *axes))
    use = [
        "--condition.use",
        "class,text",
        "--condition.context_dim",
        "16",
        "--condition.text_min_count",
        "1",
    ]
    train_ldm.main(ldm_flags(tmp_path / "vae", tmp_path / "runs" / "ldm-captions", 2, *use))
    text = (ROOT / "ldm3d/inference/README.md").read_text().split("## In Python")[1].split("\n## ")[0]
    lines = [line[4:] for line in text.splitlines() if line.startswith("    ")]
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec("\n".join(lines).replace("steps=30", "steps=2"), names)
    assert names["y"].shape == (2, 1, 16, 20, 16)
    kept = ~names["region"]
    assert torch.equal(names["y"][0, 0][kept], names["x"][0, 0][kept])
    assert not torch.equal(names["g"], names["pipeline"].sample(4, steps=2))
    assert names["z"].shape == (1, 1, 48, 56, 48)


# --- data ---------------------------------------------------------------------------------------------------


@pytest.mark.real_data
def test_the_translation_preset_splits_by_patient(real_data, tmp_path):
    flags = {
        k.removeprefix("data."): v for k, v in train_vae.PRESETS["tiff-translation"].items() if "data." in k
    }
    flags = {k: v for k, v in flags.items() if "augment" not in k}
    config = DataConfig(root=str(real_data / "tiff_pairs"), cache_dir=str(tmp_path), **flags)
    split = split_cases(find_cases(config, real_data / "tiff_pairs"), config, 0)
    assert {name[:3] for name in split["test"]} == {"p19"}
    assert {name[:3] for name in split["train"] + split["val"]} == {"p07"}
    assert len(split["val"]) == 6
    assert len(split["train"]) == 27
