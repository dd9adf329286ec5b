"""The study of synthetic pairs: what is asked for, what is learned from, and that a study goes on."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch

import train_ldm
from ldm3d import load
from ldm3d.data import AugmentConfig
from ldm3d.evaluation import teaching
from ldm3d.evaluation.__main__ import main
from ldm3d.evaluation.statistics import bootstrap_interval
from ldm3d.evaluation.teaching import (
    ARMS,
    Pair,
    Segmenter,
    batch_of,
    compared,
    describe_pairs,
    difficulty,
    label_losses,
    resized,
    warped,
    without_extremes,
)


def ball(radius, size=(40, 40), centre=(19.5, 19.5)):
    points = torch.stack(torch.meshgrid(*(torch.arange(float(n)) for n in size), indexing="ij"), -1)
    return ((points - torch.tensor(centre)).square().sum(-1) < radius**2).long()


@pytest.fixture
def judge():
    torch.manual_seed(0)
    judge = Segmenter(2, 1, 3, torch.device("cpu"))
    for p in judge.net.parameters():
        p.data += 0.05 * torch.randn(p.shape)
    return judge


@pytest.fixture
def pairs():
    draw = torch.Generator().manual_seed(0)
    masks = torch.randint(3, (3, 12, 10), generator=draw)
    return [Pair(torch.randn(1, 12, 10, generator=draw), mask) for mask in masks]


# --- masks that are asked for -------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [0.8, 1.0, 1.25])
def test_a_structure_becomes_as_wide_as_asked_and_what_is_far_away_stays(factor):
    mask = ball(5) + 2 * ball(2, centre=(37.5, 2.5))
    found = resized(mask, 1, factor)
    width = (found[20] == 1).sum().item()
    assert width == pytest.approx(10 * factor, abs=1.01)
    assert ((found == 2) == (mask == 2)).float().mean() > 0.995
    if factor == 1:
        assert torch.equal(found, mask)
    assert torch.equal(resized(mask, 4, factor), mask)  # there is no label 4


def test_a_warped_mask_has_the_same_labels_elsewhere_and_strength_0_changes_nothing():
    mask, spacing = ball(8) + ball(4), torch.ones(2)
    draw = torch.Generator().manual_seed(0)
    assert torch.equal(warped(mask, spacing, 0.0, draw), mask)
    found = [warped(mask, spacing, s, torch.Generator().manual_seed(1)) for s in (0.3, 1.0)]
    changed = [(f != mask).float().mean().item() for f in found]
    assert 0 < changed[0] < changed[1] < 0.2
    assert all(set(f.unique().tolist()) == {0, 1, 2} for f in found)


# --- what is learned from -----------------------------------------------------------------------------------


def test_each_arm_has_its_share_of_synthetic_pairs():
    shares = {}
    for name, arm in ARMS.items():
        batches = [batch_of(arm, ["real"], ["made"], step, 10, 4, 0) for step in range(10)]
        shares[name] = [batch.count("made") for batch in batches]
    assert shares["real"] == shares["longer"] == shares["augmented"] == [0] * 10
    for name in ("mixed", "mixed_augmented", "reconstructed", "limit"):
        assert shares[name] == [2] * 10
    assert shares["first"] == [4] * 5 + [0] * 5


def test_a_network_does_not_learn_from_voxels_that_are_left_out(judge, pairs):
    image, mask = pairs[0]
    some = mask.clone()
    some[:6] = -1
    with torch.no_grad():
        found = judge.losses([Pair(image, some)])[0].double()
        blank = torch.zeros(1, 3, 12, 10)
        output = judge.net(blank, torch.zeros(1), image[None])[0].double()
    p, y = output.softmax(0)[:, 6:], torch.nn.functional.one_hot(mask[6:], 3).movedim(-1, 0)
    ce = -(p.log() * y).sum(0).mean()
    both, either = (2 * p * y).sum((1, 2)), (p + y).sum((1, 2))  # weights of mean 1 are 2 there
    overlap = 1 - ((2 * both + 1) / (2 * either + 1))[1:].mean()
    assert found == pytest.approx((ce + overlap).item(), rel=1e-4)


def test_voxels_of_extreme_loss_are_left_out(judge, pairs):
    losses = []
    for image, mask in pairs:
        p = judge.probability(image)
        losses.append([-math.log(p[mask[i, j], i, j]) for i in range(12) for j in range(10)])
    losses, masks = np.array(losses), np.stack([pair.mask.numpy() for pair in pairs]).reshape(3, -1)
    means = np.array([losses[masks == k].mean() for k in range(3)])
    assert label_losses(judge, pairs).numpy() == pytest.approx(means, rel=1e-4)
    found = without_extremes(judge, pairs[1], torch.tensor(means), 1.1).mask.numpy().ravel()
    assert np.array_equal(found, np.where(losses[1] > 1.1 * means[masks[1]], -1, masks[1]))
    assert 0 < (found < 0).mean() < 1


def test_a_mask_is_as_hard_as_its_labels_are_missed(judge, pairs):
    seen = judge.probability(pairs[0].image).argmax(0)
    values = difficulty(judge, [Pair(pairs[0].image, seen), pairs[0]])
    assert values[0] == pytest.approx(0.01)
    assert values[1] == pytest.approx(1 - judge.dice(pairs[0]).nanmean().item(), abs=1e-6)


def test_pairs_are_described_by_agreement_ceiling_and_volumes(judge, pairs):
    class Blank:
        def parameters(self):
            return iter([])

        def encode(self, x):
            return SimpleNamespace(mode=lambda: 0 * x)

        def decode(self, z, size):
            return z

    half = [pair._replace(mask=pair.mask * (torch.arange(12) < 6)[:, None]) for pair in pairs]
    found = describe_pairs(judge, half, pairs, Blank(), (1.0, 1.0))
    means = torch.stack([judge.dice(pair) for pair in half]).mean(0)
    assert found["agreement"] == pytest.approx(means.tolist())
    blank = torch.stack([judge.dice(Pair(0 * pair.image, pair.mask)) for pair in pairs]).mean(0)
    assert found["ceiling"] == pytest.approx(blank.tolist())
    own, real = (np.stack([pair.mask for pair in some]) for some in (half, pairs))
    seen = np.stack([judge.probability(pair.image).argmax(0) for pair in half])
    for k in (1, 2):
        assert found["volume_of_real"][k - 1] == pytest.approx((own == k).sum() / (real == k).sum())
        assert found["volume_judged"][k - 1] == pytest.approx((seen == k).sum() / (own == k).sum())
    without = [pair._replace(mask=pair.mask * (pair.mask != 2)) for pair in pairs]
    assert math.isnan(describe_pairs(judge, without, pairs, Blank(), (1.0, 1.0))["volume_judged"][1])


def test_arms_are_compared_case_by_case_and_subject_by_subject():
    real, subjects = np.array([0.5, 0.9, 0.7, 0.8]), ["a", "a", "b", "c"]
    scores = {"real": real[None, :, None], "mixed": real[None, :, None] + 0.01}
    rows = compared(scores, subjects, 50)
    assert rows["real"]["dice"] == pytest.approx([0.725, *bootstrap_interval(real, 50, subjects, "dice")])
    assert rows["mixed"]["to_real"] == pytest.approx([0.01] * 3)
    assert "to_real" not in rows["real"]
    assert "to_augmented" not in rows["mixed"]
    gap = np.array([np.nan, 0.9, 0.7, 0.8])  # no label in the case, and none found
    rows = compared({**scores, "real": gap[None, :, None], "mixed": real[None, :, None]}, subjects, 50)
    assert rows["real"]["dice"] == pytest.approx(
        [0.8, *bootstrap_interval(gap[1:], 50, subjects[1:], "dice")]
    )
    assert rows["mixed"]["to_real"] == pytest.approx([0] * 3)
    assert np.isnan(compared({"real": gap[None, :1, None]}, subjects[:1], 50)["real"]["dice"]).all()


def test_an_arm_has_the_mean_of_its_labels_and_of_its_seeds():
    values = np.array([[[0.2, 0.4], [0.6, np.nan]], [[0.4, 0.8], [0.8, 0.4]]])  # seeds, cases, labels
    row = compared({"real": values}, ["a", "b"], 50)["real"]
    assert row["by_label"] == pytest.approx([0.5, (0.4 + 0.8 + 0.4) / 3])
    assert row["dice"][0] == pytest.approx((0.3 + 0.6 + 0.6 + 0.6) / 4)


# --- the command --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def asked_run(vae_run):
    """A denoiser under label maps, which knows half of the masks."""
    folder = vae_run.parent / "asked"
    flags = "--condition.use labels --data.mask_fraction 0.5 --run.eval_every 9 --run.save_every 2".split()
    train_ldm.main(tiny.ldm_flags(vae_run, folder, 2, *flags))
    known, left = (json.loads((run / "split.json").read_text()) for run in (vae_run, folder))
    assert len(left["train"]) == len(known["train"]) / 2
    return folder


SHORT = "--steps 3 --pairs 5 --batch_size 2 --sample_steps 2 --resamples 20 --device cpu --seeds 0".split()


def calls_of(monkeypatch, owner, name):
    real, calls = getattr(owner, name), []
    monkeypatch.setattr(owner, name, lambda *a, **k: (calls.append((a, k)), real(*a, **k))[1])
    return calls


def test_a_study_keeps_what_is_done_and_goes_on(asked_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(teaching, "save_sheet", lambda *_: None)
    out = tmp_path / "study"
    flags = ["teach", str(asked_run), "--labelled", "0.5", "--out", str(out), *SHORT]
    trained = calls_of(monkeypatch, teaching, "train_segmenter")
    sampled = calls_of(monkeypatch, train_ldm.LatentDiffusion, "sample")
    main(
        [*flags, "--arms", "real,mixed", "--ignore", "0.9", "--hard", "1", "--guidance", "2", "--warp", "0.5"]
    )
    assert [(a[0], a[5]) for a, _ in trained[2:]] == [(ARMS["real"], 3), (ARMS["mixed"], 3)]
    sampled = [k for _, k in sampled if "conditions" in k]
    assert [len(k["conditions"]["labels"]) for k in sampled] == [4, 1]
    assert all((k["steps"], k["guidance_scale"]) == (2, 2.0) for k in sampled)
    report = json.loads((out / "report.json").read_text())
    assert report["cases"] == 2
    assert report["part"] == "val"
    assert set(report["arms"]["0.5"]) == {"real", "mixed"}
    assert 0 < report["pairs"]["0.5"]["ignored"] < 1
    assert "CPU minutes" in capsys.readouterr().out
    mixed, count = (out / "0.5" / "mixed-0.json").read_text(), len(trained)
    again = "--ignore 0.9 --hard 1 --guidance 2 --warp 0.5".split()
    main([*flags, *again, "--arms", "real,mixed,longer"])
    assert [a[0] for a, _ in trained[count + 2 :]] == [ARMS["longer"]]
    assert trained[-1][0][5] == 6
    assert (out / "0.5" / "mixed-0.json").read_text() == mixed
    main([*flags[:-1], "1", *again, "--arms", "real"])  # another seed is another network, not the judge
    assert (trained[-1][0][0], trained[-1][0][3], trained[-1][0][5]) == (ARMS["real"], 1, 3)


def test_a_generator_of_a_few_cases_is_studied_on_all_that_its_autoencoder_knows(
    vae_run, tmp_path, monkeypatch
):
    monkeypatch.setattr(teaching, "save_sheet", lambda *_: None)
    flags = ["--condition.use", "labels", "--data.subset", "6", "--run.eval_every", "9"]
    train_ldm.main(tiny.ldm_flags(vae_run, tmp_path / "few", 1, *flags))
    out = tmp_path / "study"
    main(["teach", str(tmp_path / "few"), "--labelled", "1", "--arms", "real", "--out", str(out), *SHORT])
    assert json.loads((out / "report.json").read_text())["cases"] == 2


def test_settings_of_a_study_reach_what_they_are_for(asked_run, tmp_path, monkeypatch):
    monkeypatch.setattr(teaching, "save_sheet", lambda *_: None)
    drawn = calls_of(monkeypatch, teaching, "warped")
    chances = calls_of(monkeypatch, teaching, "by_condition")
    changed = calls_of(monkeypatch, teaching, "strongly_augmented")
    flags = ["--arms", "real,mixed_augmented", "--warp", "0.25", "--labelled", "0.5"]
    main(["teach", str(asked_run), "--out", str(tmp_path / "a"), *flags, *SHORT])
    assert {a[2] for a, _ in drawn} == {0.25}
    assert len(changed) == 3 * 2
    assert isinstance(changed[0][0][2], AugmentConfig)
    assert changed[0][0][2].is_on
    assert (chances[0][0][2] == 1).all()
    main(["teach", str(asked_run), "--out", str(tmp_path / "b"), *flags, "--hard", "2", *SHORT])
    assert not (chances[1][0][2] == 1).all()


def test_reconstructions_are_of_the_real_pairs_and_of_all_subjects_and_need_no_samples(
    asked_run, tmp_path, monkeypatch
):
    trained = calls_of(monkeypatch, teaching, "train_segmenter")
    sampled = calls_of(monkeypatch, teaching, "by_condition")
    flags = ["--labelled", "0.5", "--arms", "real,reconstructed,limit", "--out", str(tmp_path)]
    main(["teach", str(asked_run), *flags, *SHORT])
    assert not sampled
    (_, real, own, *_), (_, _, every, *_) = (args for args, _ in trained[-2:])
    assert [args[0] for args, _ in trained[-2:]] == [ARMS["reconstructed"], ARMS["limit"]]
    assert len(every) == 2 * len(own)  # the fraction is a half
    autoencoder = load(asked_run).model.autoencoder
    for pair, other in zip(real, own, strict=True):
        x = autoencoder.decode(autoencoder.encode(pair.image[None]).mode(), pair.image.shape[1:])[0]
        torch.testing.assert_close(other.image, x)
        assert torch.equal(other.mask, pair.mask)
        assert any(torch.equal(other.image, found.image) for found in every)


def test_registers_make_masks_of_their_own(bound_run, tmp_path, monkeypatch):
    monkeypatch.setattr(teaching, "save_sheet", lambda *_: None)
    out = tmp_path / "study"
    main(["teach", str(bound_run), "--labelled", "1", "--arms", "real,mixed", "--out", str(out), *SHORT])
    report = json.loads((out / "report.json").read_text())["pairs"]["1"]
    assert len(report["volume_of_real"]) == 4
    assert report["ignored"] == 0


MISTAKES = [
    ("--labelled 0.2", "labelled: 0.2 is less than what"),
    ("--labelled 2", "labelled: expected fractions above 0, up to 1, got (2.0,)"),
    ("--arms real,more", "arms: expected some of real,longer"),
    ("--arms mixed", "real and one seed are needed"),
    ("--batch_size 1", "batch_size: mixed needs 2 or more"),
    ("--ignore -1", "ignore: expected at least 0"),
]


@pytest.mark.parametrize(("flags", "expected"), MISTAKES)
def test_a_mistake_is_named_before_anything_is_made(asked_run, mistake, flags, expected):
    assert expected in mistake(main, ["teach", asked_run, *flags.split()])
    assert not (asked_run / "teach").exists()


def test_a_run_that_makes_no_pairs_and_a_folder_of_other_settings_are_refused(
    vae_run, asked_run, tmp_path, mistake
):
    plain = vae_run.parent / "no-pairs"
    train_ldm.main(tiny.ldm_flags(vae_run, plain, 1))
    assert "makes no pairs" in mistake(main, ["teach", plain])
    (tmp_path / "settings.json").write_text(json.dumps({"steps": 7}))
    line = mistake(main, ["teach", asked_run, "--labelled", "0.5", "--out", tmp_path])
    assert f"steps: {tmp_path} was made with 7, got 1000" in line
