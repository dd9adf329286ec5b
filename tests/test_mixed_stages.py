"""Stage two on other data than stage one: the scaling travels, what the autoencoder has seen stays apart."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny

import sample
import train_ldm
import train_vae
from ldm3d import read, write
from ldm3d.data import Volume
from ldm3d.data.phantoms import write_phantoms
from ldm3d.engine.checkpoint import load, save, step_files
from ldm3d.pipeline import load as open_run


def trained(vae: Path, folder: Path, *more: object) -> dict[str, list[str]]:
    """Two steps of a denoiser: its split."""
    train_ldm.main(tiny.ldm_flags(vae, folder, 2, *map(str, more)))
    return json.loads((folder / "split.json").read_text())


def split_of(run: Path) -> dict[str, list[str]]:
    return json.loads((run / "split.json").read_text())


@pytest.fixture(scope="module")
def more_heads(heads, tmp_path_factory) -> Path:
    """The first four heads under other names, and six new ones of two classes."""
    place = tmp_path_factory.mktemp("more")
    write_phantoms(place / "new", 6, dims=2, size=(16, 22), spacing=(12.0, 11.0), seed=9)
    rows = ["image,mask,class,subject"]
    for source, prefix, numbers in ((heads, "old", range(4)), (place / "new", "new", range(6))):
        for i in numbers:
            for folder in ("images", "labels"):
                (place / "mix" / folder).mkdir(parents=True, exist_ok=True)
                file = f"{folder}/{prefix}_{i}.tif"
                shutil.copy(source / folder / f"phantom_{i:04d}.tif", place / "mix" / file)
            rows.append(f"images/{prefix}_{i}.tif,labels/{prefix}_{i}.tif,{i % 2},{prefix}{i}")
    (place / "mix" / "cases.csv").write_text("\n".join(rows) + "\n")
    return place / "mix"


def test_without_other_data_the_split_and_the_scaling_are_the_autoencoders(vae_run, tmp_path, capsys):
    split = trained(vae_run, tmp_path / "ldm")
    ours, theirs = (load(step_files(run)[0])["state"] for run in (tmp_path / "ldm", vae_run))
    assert split == split_of(vae_run)
    for name in ("low", "high", "size", "spacing"):
        assert ours["data"][name] == theirs["data"][name]
    assert "the autoencoder's run knows" not in capsys.readouterr().out


def test_an_autoencoder_that_has_not_been_validated_is_named_with_its_step(vae_run, tmp_path, capsys):
    vae = shutil.copytree(vae_run, tmp_path / "vae")
    (vae / "best.pt").unlink()
    trained(vae, tmp_path / "ldm")
    assert f"note: {vae} has no best.pt yet; its weights are those of step 10" in capsys.readouterr().out


def test_a_run_goes_on_with_its_copy_of_an_autoencoder_that_has_other_weights_now(vae_run, tmp_path, capsys):
    vae, run = shutil.copytree(vae_run, tmp_path / "vae"), tmp_path / "ldm"
    flags = tiny.ldm_flags(vae, run, 2)
    train_ldm.main(flags)
    assert "note: " not in capsys.readouterr().out
    copy, content = (run / "autoencoder.pt").read_bytes(), load(vae / "best.pt")
    for weight in content["ema"].values():
        weight.mul_(0.5)
    save(vae / "best.pt", content)
    train_ldm.main([*flags, "--vae", f"{vae}/../vae/", "--run.steps", "4"])  # another path to the same
    note = f"note: {vae} is not as at the start of this run (its weights are others), which goes on with its"
    assert note in capsys.readouterr().out
    assert (run / "autoencoder.pt").read_bytes() == copy
    for path in step_files(run):
        path.unlink()
    train_ldm.main(flags)  # nothing is left to go on from: the run starts anew, and takes what --vae has now
    assert "note: " not in capsys.readouterr().out
    tiny.assert_equal(load(run / "autoencoder.pt")["ema"], content["ema"])


def test_the_same_data_in_another_folder_make_the_same_run(heads, vae_run, tmp_path, capsys):
    copy = shutil.copytree(heads, tmp_path / "copy")
    assert trained(vae_run, tmp_path / "there", "--data.root", copy) == trained(vae_run, tmp_path / "here")
    tiny.assert_same_end(tmp_path / "there", tmp_path / "here")
    out = capsys.readouterr().out
    assert "knows 12 cases by their voxels and 0 by their ids alone, 0 are new" in out
    assert "note: " not in out


def test_a_denoiser_of_a_few_of_the_autoencoders_cases(heads, vae_run, tmp_path, capsys):
    theirs = split_of(vae_run)
    first = sorted(name for ids in theirs.values() for name in ids)
    num = 1 + max(first.index(theirs["val"][0]), first.index(theirs["train"][0]))
    split = trained(vae_run, tmp_path / "few", "--data.subset", num)
    assert split == {part: [name for name in ids if name in first[:num]] for part, ids in theirs.items()}
    assert f"knows {num} cases by their voxels" in capsys.readouterr().out
    names = sorted(theirs["train"])[:4]  # none of these validates
    files = [f"{heads}/images/{name}.tif" for name in names]
    (tmp_path / "cases.csv").write_text("\n".join(["image", *files]) + "\n")
    split = trained(vae_run, tmp_path / "train", "--data.root", tmp_path)
    assert split == {"train": names[1:], "val": names[:1], "test": []}
    line = f"1 val cases are train cases of the autoencoder, such as {names[0]}; scores on them are too good"
    assert line in capsys.readouterr().out


def test_cases_that_the_autoencoder_knows_keep_their_part_and_new_ones_are_drawn(
    vae_run, more_heads, tmp_path, capsys
):
    flags = ["--data.root", more_heads, "--data.val_fraction", 0.34, "--data.test_fraction", 0.17]
    flags += ["--condition.use", "class,labels", "--condition.context_dim", 16, *tiny.BOUND]
    split = trained(vae_run, tmp_path / "ldm", *flags)
    theirs = split_of(vae_run)
    for i in range(4):
        part = next(part for part, ids in theirs.items() if f"phantom_{i:04d}" in ids)
        assert f"old_{i}" in split[part]
    new = {part: [name for name in ids if name.startswith("new")] for part, ids in split.items()}
    assert {part: len(ids) for part, ids in new.items()} == {"train": 3, "val": 2, "test": 1}
    out = capsys.readouterr().out
    assert "knows 4 cases by their voxels and 0 by their ids alone, 6 are new" in out
    state = load(step_files(tmp_path / "ldm")[0])["state"]
    assert state["data"]["size"] == [16, 24]  # of these cases, rounded up for the autoencoder's two halvings
    sample.main([str(tmp_path / "ldm"), "--num", "1", "--steps", "2", "--condition", "class=1"])
    sample.main([str(tmp_path / "ldm"), "--cases", "test", "--steps", "2"])
    trained(vae_run, tmp_path / "ldm", *flags, "--run.steps", 4)  # the stored split and spec are taken again
    assert load(step_files(tmp_path / "ldm")[0])["state"]["data"] == state["data"]
    assert split_of(tmp_path / "ldm") == split


def test_a_run_does_not_go_on_with_other_classes(vae_run, more_heads, tmp_path, mistake):
    heads = shutil.copytree(more_heads, tmp_path / "heads")
    flags = ["--data.root", heads, "--condition.use", "class", "--condition.context_dim", 16]
    trained(vae_run, tmp_path / "ldm", *flags)
    table = (heads / "cases.csv").read_text().splitlines()
    for row, say in ((1, "(case old_0)"), (None, None)):
        cells = [line.split(",") for line in table]
        if row:
            cells[row][2] = str(1 - int(cells[row][2]))  # the classes stay 0 and 1
        cells[2][3] += "x"  # what is no condition may change
        (heads / "cases.csv").write_text("\n".join(map(",".join, cells)) + "\n")
        command = tiny.ldm_flags(vae_run, tmp_path / "ldm", 3, *map(str, flags))
        if say:
            assert f"the table of cases has changed since this run was started {say}" in mistake(
                train_ldm.main, command
            )
        else:
            train_ldm.main(command)
    assert load(step_files(tmp_path / "ldm")[0])["step"] == 3


def test_what_a_table_says_of_subjects_can_be_a_condition(vae_run, tmp_path, mistake):
    table = tmp_path / "people.tsv"
    rows = [f"phantom_{i:04d}\t{('ill', 'well', 'n/a')[i % 3]}" for i in range(12)]
    table.write_text("\n".join(["participant_id\tgroup", *rows]) + "\n")
    flags = ["--condition.use", "class:group", "--condition.context_dim", 16]
    trained(vae_run, tmp_path / "ldm", *flags, "--data.participants", table)
    state = load(step_files(tmp_path / "ldm")[0])["state"]
    assert state["conditions"][0]["values"] == ["ill", "well"]
    assert [state["cells"][f"phantom_{i:04d}"]["group"] for i in range(3)] == ["ill", "well", ""]
    table.write_text("participant_id\tgroup\nsub-1\till\n")
    command = tiny.ldm_flags(vae_run, tmp_path / "new", 2, *map(str, [*flags, "--data.participants", table]))
    assert "people.tsv lists none of the subjects, such as sub-phantom_0000" in mistake(
        train_ldm.main, command
    )


def test_another_contrast_of_the_same_cases_keeps_their_parts_by_their_ids(heads, vae_run, tmp_path, capsys):
    for path in (heads / "images").iterdir():
        volume = read(path)
        write(tmp_path / path.name, dataclasses.replace(volume, array=3 * volume.array + 7))
    place = ["--data.root", tmp_path, "--data.image", "*.tif"]
    assert trained(vae_run, tmp_path / "ldm", *place) == split_of(vae_run)
    assert "knows 0 cases by their voxels and 12 by their ids alone, 0 are new" in capsys.readouterr().out
    ours, theirs = open_run(tmp_path / "ldm").spec, open_run(vae_run).spec
    assert np.allclose(ours.low + ours.high, 3 * np.array(theirs.low + theirs.high) + 7)  # units of samples
    trained(vae_run, tmp_path / "sources", "--data.image", "sources/*.tif")  # which the autoencoder's run had
    assert "knows 12 cases by their voxels and 0 by their ids alone, 0 are new" in capsys.readouterr().out


def test_a_table_decides_and_what_it_spoils_is_said(heads, vae_run, tmp_path, capsys):
    theirs, rows = split_of(vae_run), ["name,split"]
    val = theirs["train"][:2]
    for name in sorted(name for ids in theirs.values() for name in ids):
        rows.append(f"{name},{'val' if name in val else 'train'}")
    (tmp_path / "split.csv").write_text("\n".join(rows) + "\n")
    flags = ["--data.split", tmp_path / "split.csv", "--data.val_fraction", 0.2]
    assert trained(vae_run, tmp_path / "ldm", *flags)["val"] == val
    assert f"2 val cases are train cases of the autoencoder, such as {val[0]}" in capsys.readouterr().out


def test_a_seen_case_under_another_id_counts_as_seen_and_so_does_its_subject(
    heads, vae_run, tmp_path, capsys
):
    """A test on another scan of a subject is no test where the autoencoder was trained on a scan of it."""
    seen, rows = split_of(vae_run)["train"][:2], ["id,image,subject,split"]
    write_phantoms(tmp_path / "new", 4, dims=2, size=(16, 20), spacing=(12.0, 11.0), seed=9)
    for i, name in enumerate(seen):
        shutil.copy(heads / "images" / f"{name}.tif", tmp_path / f"again_{i}.tif")
    rows += ["again_0,again_0.tif,a,test", "again_1,again_1.tif,new0,train"]
    rows += [f"n{i},new/images/phantom_000{i}.tif,new{i},{'train' if i else 'val'}" for i in range(4)]
    (tmp_path / "cases.csv").write_text("\n".join(rows) + "\n")
    trained(vae_run, tmp_path / "ldm", "--data.root", tmp_path, "--data.image", "none")
    out = capsys.readouterr().out
    assert "note: 1 test cases are train cases of the autoencoder, such as again_0; scores on them" in out
    assert "note: 1 val cases are of subjects of train cases of the autoencoder, such as n0; " in out


def test_files_that_have_changed_their_names_between_the_stages_are_known_by_their_voxels(
    heads, tmp_path, capsys
):
    folder = shutil.copytree(heads, tmp_path / "heads")
    train_vae.main(tiny.vae_flags(folder, tmp_path / "vae", 2, "--data.cache_dir", str(tmp_path / "cache")))
    split = split_of(tmp_path / "vae")
    a, b = (folder / "images" / f"{split[part][0]}.tif" for part in ("train", "val"))
    a.rename(folder / "c.tif"), b.rename(a), (folder / "c.tif").rename(b)
    trained(tmp_path / "vae", tmp_path / "ldm")
    assert f"1 val cases are train cases of the autoencoder, such as {b.stem}" in capsys.readouterr().out


def test_with_scaling_dataset_the_autoencoders_numbers_scale_all_data(heads, more_heads, tmp_path):
    flags = ["--data.scaling", "dataset"]
    train_vae.main(tiny.vae_flags(heads, tmp_path / "vae", 2, *flags))
    trained(tmp_path / "vae", tmp_path / "ldm", "--data.root", more_heads)
    ours, theirs = (load(step_files(tmp_path / run)[0])["state"]["data"] for run in ("ldm", "vae"))
    assert (ours["low"], ours["high"]) == (theirs["low"], theirs["high"])
    measured = load(step_files(tmp_path / "ldm")[0])["state"]["measured"]
    assert not np.allclose(measured["low"], theirs["low"], rtol=1e-6)


def test_images_of_other_channels_are_refused(vae_run, tmp_path, mistake):
    for i in range(3):
        np.save(tmp_path / f"{i}.npy", np.random.default_rng(i).random((2, 16, 20), dtype=np.float32))
    place = ["--data.root", tmp_path, "--data.image", "*.npy"]
    flags = tiny.ldm_flags(vae_run, tmp_path / "ldm", 2, *map(str, place))
    line = mistake(train_ldm.main, flags)
    assert f"{tmp_path}: the images have 2 channels, the autoencoder's had 1; choose some with" in line
    assert not (tmp_path / "ldm").exists()
    trained(vae_run, tmp_path / "ldm", *place, "--data.channel", 1)


# --- planned ------------------------------------------------------------------------------------------------


def planned(run: Path, *command: object) -> tuple[dict[str, object], dict]:
    """Two steps of a planned denoiser: (the planned settings by dotted key, its checkpoint)."""
    flags = ["--run.steps", 2, "--run.eval_every", 2, "--run.save_every", 2, "--data.num_variants", 1]
    train_ldm.main([str(word) for word in (*command, *flags)])
    rows = json.loads((run / "plan.json").read_text())
    return {row["key"]: row["value"] for row in rows}, load(step_files(run)[0])


@pytest.fixture
def scans(tmp_path, monkeypatch) -> Path:
    """Six slices of 18 x 30 pixels in a folder each; the current folder is the one around them."""
    monkeypatch.chdir(tmp_path)
    for i in range(6):
        array = np.random.default_rng(i).random((1, 18, 30), dtype=np.float32)
        write(tmp_path / "scans" / f"case{i}" / "scan.tif", Volume(array, np.eye(3)))
    return Path("scans")


def test_a_folder_beside_another_autoencoder_is_planned_from_its_own_files(scans, vae_run, capsys):
    values, content = planned(Path("runs/ldm-scans"), scans, "--vae", vae_run)
    assert values["data.image"] == "*/*.tif"
    assert values["data.size"] == [20, 32]
    assert values["data.val_fraction"] == 0.2
    assert "0 cases by their voxels and 0 by their ids alone, 6 are new" in capsys.readouterr().out
    before = load(step_files(vae_run)[0])["config"]["data"]
    for name in ("scaling", "percentiles", "spacing"):
        assert content["config"]["data"][name] == before[name] == values[f"data.{name}"]
    assert len(content["state"]["split"]["train"]) == 5
    sample.main(["runs/ldm-scans", "--num", "1", "--steps", "2"])
    train_ldm.main([str(scans), "--vae", str(vae_run), "--run.steps", "2"])
    assert "finished at step 2" in capsys.readouterr().out


def test_another_root_is_planned_from_its_number_of_cases_and_their_size(
    vae_run, more_heads, scans, monkeypatch
):
    run, nums, plan_length = Path(f"runs/ldm-{vae_run.name}"), [], train_ldm.plan_length

    def spy(plan, hours, seconds, passes, num_train, **more):
        nums.append(num_train)
        plan_length(plan, hours, seconds, passes, num_train, **more)

    monkeypatch.setattr(train_ldm, "plan_length", spy)
    values, content = planned(run, vae_run, "--data.root", more_heads)  # files are found as before
    assert values["data.size"] == [16, 24]
    assert content["state"]["data"]["num_labels"]
    split = content["state"]["split"]
    assert sum(map(len, split.values())) == 10
    values, content = planned(run, vae_run, "--data.root", scans, "--run.fresh")  # files are recognised
    assert values["data.size"] == [20, 32]
    assert nums == [len(split["train"]), 5]


def test_images_that_the_autoencoder_cannot_encode_are_refused_before_anything_is_measured(
    vae_run, scans, mistake
):
    for i in range(6):
        np.save(scans / f"case{i}" / "scan.npy", np.random.default_rng(i).random((3, 9, 9)))
        (scans / f"case{i}" / "scan.tif").unlink()
    line = mistake(train_ldm.main, [scans, "--vae", vae_run])
    assert "scans: the images are 3-D, the autoencoder's were 2-D" in line
