"""Data that are not files: training on a Dataset of dicts is training on the files that hold the same."""

import shlex

import pytest
import tiny
import torch
from torch.utils.data import Dataset

import sample
import train_cdal
import train_ldm
import train_vae
from ldm3d import InputError, read
from ldm3d.config import parse
from ldm3d.data import DataConfig, open_data
from ldm3d.engine.checkpoint import load, step_files
from ldm3d.evaluation.__main__ import main as evaluation_main

SCRIPTS = {"vae": train_vae, "ldm": train_ldm, "cdal": train_cdal}


class Heads(Dataset):
    """The items that the folder of the fixture `heads` holds."""

    def __init__(self, folder, change=None):
        self.items, self.change = [], change
        for row in tiny.read_csv(folder / "cases.csv"):
            item = {"id": row["subject"], "subject": row["subject"], "class": int(row["class"])}
            image, mask, source = (read(folder / row[role]) for role in ("image", "mask", "source"))
            item |= {"text": row["text"], "spacing": torch.tensor(image.spacing)}
            item |= {"image": torch.from_numpy(image.array), "source": source.array}
            self.items.append(item | {"mask": torch.from_numpy(mask.array[0]).long()})

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        item = dict(self.items[index])
        if self.change is not None:
            self.change(index, item)
        return item


def trained(kind, heads, vae, folder, steps, *more, dataset=None):
    """A tiny run of `train` from Python: on the files of `heads`, or on a data set."""
    make = {"vae": tiny.vae_flags, "ldm": tiny.ldm_flags, "cdal": tiny.cdal_flags}[kind]
    words = make(vae if kind == "ldm" else heads, folder, steps, *more)
    script = SCRIPTS[kind]
    base = script.with_autoencoder if kind == "ldm" else script.with_data
    config, flags = parse(script.Config, words, script.PRESETS, base=base)
    return script.train(config, flags, dataset=dataset)


def assert_same_training(one, other):
    a, b = (load(step_files(run)[0]) for run in (one, other))
    for part in ("model", "ema", "optimizers", "others", "best"):
        tiny.assert_equal(a[part], b[part], part)
    assert {k: v for k, v in a["state"].items() if k != "in_memory"}.keys() == b["state"].keys() - {
        "in_memory"
    }
    for part in ("data", "split", "contents"):
        tiny.assert_equal(a["state"][part], b["state"][part], part)


MORE = {
    "vae": ["--data.patch", "12,12", "--data.augment.flip_axes", "0"],
    "ldm": ["--condition.use", "class,text,labels", "--condition.context_dim", "16", *tiny.BOUND],
    "cdal": [],
}


@pytest.mark.parametrize("kind", SCRIPTS)
def test_items_train_as_the_files_that_hold_the_same_and_go_on_after_a_kill(kind, heads, vae_run, tmp_path):
    trained(kind, heads, vae_run, tmp_path / "files", 7, *MORE[kind])
    trained(kind, heads, vae_run, tmp_path / "items", 7, *MORE[kind], dataset=Heads(heads))
    step_files(tmp_path / "items")[0].unlink()  # as if it had been killed after step 5
    more = [*MORE[kind], "--run.workers", "2"]
    trained(kind, heads, vae_run, tmp_path / "items", 7, *more, dataset=Heads(heads))
    assert_same_training(tmp_path / "files", tmp_path / "items")


def test_two_ranks_train_on_items_as_on_files(heads, tmp_path):
    def on_each_rank():
        trained("vae", heads, None, tmp_path / "two", 3, dataset=Heads(heads))

    assert tiny.on_two_ranks(on_each_rank) == [0, 0]
    trained("vae", heads, None, tmp_path / "one", 3)
    one, two = (load(step_files(tmp_path / run)[0]) for run in ("one", "two"))
    assert two["state"]["in_memory"]
    for name, value in one["model"].items():
        assert torch.allclose(value, two["model"][name], rtol=1e-3, atol=1e-4), name


def test_other_items_and_other_kinds_of_data_are_refused_on_resuming(heads, tmp_path):
    def spoil(index, item):
        if index == 3:
            item["image"] = item["image"].clone()
            item["image"][0, 0, 0] += 1

    run = tmp_path / "run"
    trained("vae", heads, None, run, 2, dataset=Heads(heads))
    with pytest.raises(InputError, match=r"have changed .*: the image of case phantom_0003 is another one"):
        trained("vae", heads, None, run, 4, dataset=Heads(heads, spoil))
    with pytest.raises(
        InputError, match=r"was started on a dataset in Python; it goes on by train.* with dataset"
    ):
        trained("vae", heads, None, run, 4)
    trained("vae", heads, None, tmp_path / "files", 2)
    with pytest.raises(InputError, match=r"was started on files; it goes on by train.* without dataset"):
        trained("vae", heads, None, tmp_path / "files", 4, dataset=Heads(heads))


def test_what_needs_no_files_works_and_what_needs_them_says_so(heads, tmp_path, mistake):
    vae, ldm = tmp_path / "vae", tmp_path / "ldm"
    trained("vae", heads, None, vae, 2, dataset=Heads(heads))
    line = mistake(train_ldm.main, tiny.ldm_flags(vae, ldm, 2))
    assert "was trained on a dataset in Python: its own cases are no files" in line
    trained("ldm", heads, vae, ldm, 2, dataset=Heads(heads))
    sample.main([str(ldm), "--num", "1", "--steps", "2"])
    volume = read(ldm / "samples-001/sample_0000.tif")
    assert volume.spacing == pytest.approx((12, 11))
    sample.main([str(vae), str(heads / "images")])
    for main, words in (
        (sample.main, f"{ldm} --cases val"),
        (evaluation_main, f"reconstruct {vae}"),
    ):
        assert "its own cases are no files to open" in mistake(main, shlex.split(words))


def test_the_lines_of_the_guide_run_as_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (tiny.ROOT / "ldm3d/data/README.md").read_text()
    lines = text.split("Data need not be files.")[1].split("| key |")[0].splitlines()
    exec("\n".join(line[4:] for line in lines if line.startswith("    ") or not line), {"__name__": "guide"})
    assert load(step_files(tmp_path / "runs/vae-arrays")[0])["state"]["data"]["spacing"] == [1, 1, 2]


# --- items --------------------------------------------------------------------------------------------------


def opened(items, **settings):
    return open_data(DataConfig(dims=2, **settings), "x", 0, items=items)


def image(i, *shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(i)) * 100


def test_items_may_hold_an_image_alone_and_are_scaled_as_the_settings_say():
    data = opened([{"image": image(i, 9, 8)} for i in range(5)], scaling="none", file_spacing=(2.0, 3.0))
    item = data.dataset("train")[0, 1]
    index = int(item["id"])
    assert torch.equal(item["image"], image(index, 9, 8)[None])
    assert item["spacing"].tolist() == [2, 3]
    assert "mask" not in item
    scaled = opened([{"image": image(i, 2, 9, 8)} for i in range(5)], scaling="minmax").dataset("train")[0, 0]
    assert [float(v) for v in (scaled["image"].amin(), scaled["image"].amax())] == pytest.approx([-1, 1])


def test_columns_subjects_and_splits_are_those_of_the_items():
    items = [
        {"image": image(i, 8, 8), "id": f"p{i // 2}_{i % 2}", "age": torch.tensor(40.0 + i), "split": part}
        for i, part in enumerate(["train"] * 4 + ["val"] * 2 + ["test"] * 2)
    ]
    data = opened(items, subject=r"(p\d)_")
    assert data.split == {
        "train": ["p0_0", "p0_1", "p1_0", "p1_1"],
        "val": ["p2_0", "p2_1"],
        "test": ["p3_0", "p3_1"],
    }
    case = data.cases["p2_1"]
    assert (case.subject, case.columns["age"]) == ("p2", "45.0")


def many(**more):
    return [{"image": image(i, 8, 8), **{k: make(i) for k, make in more.items()}} for i in range(3)]


@pytest.mark.parametrize(
    ("items", "words"),
    [
        ([], "the dataset has no items"),
        ([(image(0, 8, 8), 1)], "item 0: expected a dict with an image, got a tuple"),
        (many(id=lambda i: "a"), "item 1: its id 'a' is that of an item before"),
        (many(image=lambda i: image(i, 8)), "image of item 0: shape (8,), expected (C, *S) or (*S)"),
        (many(image=lambda i: image(i, 8, 8) / 0), "image of item 0: 64 of 64 voxels are NaN or infinite"),
        (many(mask=lambda i: torch.ones(8, 8 + i)), "mask of item 1: mask has shape (8, 9), its image"),
        (many(mask=lambda i: None if i else torch.ones(8, 8)), "no mask for image of item 1 (the items;"),
    ],
)
def test_items_that_cannot_be_used_are_named(items, words):
    with pytest.raises(InputError) as caught:
        opened(items)
    assert words in str(caught.value)


def test_settings_of_files_without_effect_on_items_are_refused():
    items = [{"image": image(i, 8, 8)} for i in range(3)]
    for name, value in (("cache", "disk"), ("split", r"(train)/"), ("slices", "axial")):
        with pytest.raises(InputError, match=f"data.{name}: "):
            opened(items, **{name: value})
