"""A checkpoint that has its name is whole and safe to read; whatever is wrong with one is a line that names
it."""

import os
import pickle
import resource
import signal

import pytest
import torch
from torch import nn

from ldm3d.config import InputError
from ldm3d.engine.checkpoint import (
    FORMAT,
    load,
    load_latest,
    load_run,
    load_weights,
    prune,
    save,
    step_files,
    sweep,
    weights,
)


def content(step=1, **more):
    net = {"w": torch.arange(3.0)}
    state = {"data": {"size": [8, 8]}}
    return {"kind": "vae", "config": {"a": 1}, "state": state, "step": step, "model": net, "ema": net, **more}


def test_a_file_takes_its_name_only_when_all_of_it_is_on_the_disk(tmp_path, monkeypatch):
    done, replace = [], os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: done.append(os.fstat(descriptor).st_size))
    monkeypatch.setattr(os, "replace", lambda *paths: (done.append(str(paths[1])), replace(*paths)))
    save(tmp_path / "a.pt", content())
    assert done == [(tmp_path / "a.pt").stat().st_size, str(tmp_path / "a.pt")]


def test_what_is_saved_is_what_is_loaded(tmp_path):
    save(tmp_path / "a.pt", content())
    back = load(tmp_path / "a.pt", "vae")
    assert back["format"] == FORMAT
    assert torch.equal(back["model"]["w"], torch.arange(3.0))
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(tmp_path, capsys):
    for step in (1, 2):
        save(tmp_path / f"checkpoint_{step:07d}.pt", content(step))
    newest = tmp_path / "checkpoint_0000002.pt"
    newest.write_bytes(newest.read_bytes()[:200])
    assert load_latest(tmp_path, "vae")["step"] == 1
    assert "checkpoint_0000002.pt" in capsys.readouterr().out
    (tmp_path / "checkpoint_0000001.pt").write_bytes(b"")
    with pytest.raises(InputError, match="checkpoint_0000001"):
        load_latest(tmp_path, "vae")


def test_a_flipped_bit_in_any_weight_is_found(tmp_path):
    net = {"w": torch.zeros(64)}
    save(tmp_path / "a.pt", content(model=net, ema=net))
    whole = (tmp_path / "a.pt").read_bytes()
    weights_at = whole.index(bytes(256))  # the 64 zeros
    for place in range(weights_at, weights_at + 256, 32):
        (tmp_path / "a.pt").write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(InputError, match=r"a\.pt: damaged.*checksum"):
            load(tmp_path / "a.pt")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"config": [1]}, "config is list"),
        ({"state": None}, "state is NoneType"),
        ({"state": {}}, "the state has no data"),
        ({"step": -1}, "step is below 0"),
        ({"ema": None}, "ema is NoneType"),
        ({"optimizers": "none"}, "optimizers is str"),
        ({"best": "psnr"}, "best is 'psnr'"),
        ({"best": {"name": "psnr", "value": "x", "step": 2}}, "best is {'name': 'psnr', 'value': 'x'"),
        ({"best": {"name": "psnr", "value": 1.0, "step": "x"}}, "best is {'name': 'psnr', 'value': 1.0"),
        ({"others": {"mean": {}}}, "KeyError: 'ranks'"),
        ({"ema": {"w": [1.0]}}, "ema: w is no tensor"),
        ({"model": {"w": torch.tensor([1.0, float("nan")])}}, "model: w holds numbers that are not finite"),
    ],
)
def test_a_part_that_is_missing_or_of_another_type_is_named(tmp_path, changed, words):
    save(tmp_path / "a.pt", content(**changed))
    with pytest.raises(InputError, match=rf"a\.pt: .*{words}"):
        load(tmp_path / "a.pt")


def test_a_pickle_with_code_in_it_is_refused_and_its_code_does_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"format": 1, "kind": "vae", "x": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(InputError, match=r"evil\.pt.*refused"):
        load(tmp_path / "evil.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps({"x": Evil()}, protocol=4))
    with pytest.raises(InputError, match=r"plain\.pt"):
        load(tmp_path / "plain.pt")
    assert not (tmp_path / "ran").exists()


def test_a_newer_format_another_kind_and_a_foreign_file_are_told_apart(tmp_path):
    save(tmp_path / "a.pt", content())
    torch.save({**content(), "format": FORMAT + 1}, tmp_path / "newer.pt")
    torch.save({"w": torch.zeros(2)}, tmp_path / "foreign.pt")
    for name, words, kind in [
        ("newer.pt", "newer", None),
        ("a.pt", r"train_vae\.py.*train_ldm\.py", "ldm"),
        ("foreign.pt", "not a checkpoint of ldm3d", None),
        ("none.pt", "no such file", None),
    ]:
        with pytest.raises(InputError, match=words) as e:
            load(tmp_path / name, kind)
        assert name in str(e.value)


def test_no_room_on_the_device_leaves_the_checkpoint_before_intact(tmp_path):
    path = tmp_path / "a.pt"
    save(path, content(step=1))
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(InputError, match=r"a\.pt.*could not be saved.*intact"):
            save(path, content(step=2, big=torch.zeros(100_000)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


def test_old_checkpoints_and_stale_temporaries_go_and_best_stays(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path / f"checkpoint_{step:07d}.pt", content(step))
    save(tmp_path / "best.pt", content(2))
    (tmp_path / "checkpoint_0000004.pt.tmp123").write_bytes(b"torn")
    prune(tmp_path, keep=2, step=3)
    sweep(tmp_path)
    assert [p.name for p in step_files(tmp_path)] == ["checkpoint_0000003.pt", "checkpoint_0000002.pt"]
    assert sorted(p.name for p in tmp_path.iterdir())[0] == "best.pt"
    assert load_run(tmp_path, "vae")["step"] == 2
    with pytest.raises(InputError, match="no such run"):
        load_run(tmp_path / "gone", "vae")


def test_a_damaged_newer_checkpoint_does_not_take_the_place_of_a_good_one(tmp_path):
    for step in (5, 7):
        save(tmp_path / f"checkpoint_{step:07d}.pt", content(step))
    (tmp_path / "checkpoint_0000010.pt").write_bytes(b"torn")  # 5 was gone on from, 7 was just saved
    prune(tmp_path, keep=1, step=7)
    assert [p.name for p in step_files(tmp_path)] == ["checkpoint_0000007.pt"]


def test_wrapped_and_compiled_networks_save_plain_names():
    net = nn.Sequential(nn.Linear(2, 2))
    plain = set(net.state_dict())
    assert set(weights(nn.ModuleDict({"module": net}))) == plain
    assert set(weights(torch.compile(net))) == plain


def test_weights_that_do_not_fit_are_named_and_the_allow_list_holds_patterns():
    net, state = nn.Linear(2, 3), nn.Linear(2, 3).state_dict()
    assert load_weights(net, state, "here") == []
    assert torch.equal(net.weight, state["weight"])
    with pytest.raises(InputError, match=r"here.*bias is missing"):
        load_weights(net, {"weight": state["weight"]}, "here")
    with pytest.raises(InputError, match=r"old\.x is left over"):
        load_weights(net, {**state, "old.x": torch.zeros(1)}, "here")
    with pytest.raises(InputError, match=r"weight is \(3, 4\)"):
        load_weights(net, nn.Linear(4, 3).state_dict(), "here")
    assert load_weights(net, {"weight": state["weight"]}, "here", ["bi*"]) == ["bias"]
