"""Muon: its direction beside a singular value decomposition, its recursion by hand, its place in a run."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from ldm3d.engine.muon import Muon, orthogonalised, split_parameters
from ldm3d.engine.training import OptimConfig, RunConfig, Stepper
from ldm3d.lora import add_adapters

CPU = torch.device("cpu")


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(24, 90), (90, 24), (32, 32)])
def test_the_singular_vectors_stay_and_the_values_come_near_one(shape):
    left, values, right = torch.linalg.svd(gaussian(*shape), full_matrices=False)
    values = torch.logspace(0, -2, len(values))
    found = left.T @ orthogonalised(1e3 * left @ values.diag() @ right) @ right.T
    assert (found - found.diag().diag()).abs().max() < 1e-4
    assert found.diag()[values > 0.03].min() > 0.6
    assert found.diag().max() < 1.25


def test_a_step_is_that_of_the_recursion_and_as_large_for_any_gradient():
    weight = nn.Parameter(gaussian(24, 16, 3))
    expected, average = weight.detach().clone(), torch.zeros(24, 48)
    optimizer = Muon([weight], lr=0.1, weight_decay=0.5, momentum=0.9)
    for step in range(3):
        weight.grad = 10.0 ** (3 * step) * gaussian(24, 16, 3, seed=step)
        gradient = weight.grad.flatten(1)
        average = 0.9 * average + 0.1 * gradient
        update = orthogonalised(0.1 * gradient + 0.9 * average).view_as(weight)
        expected = (1 - 0.1 * 0.5) * expected - 0.1 * 0.2 * 48**0.5 * update
        before = weight.detach().clone()
        optimizer.step()
        torch.testing.assert_close(weight.detach(), expected)
        moved = (weight.detach() - 0.95 * before).square().mean().sqrt()
        assert 0.7 < moved / (0.1 * 0.2) < 1.2  # per weight, 0.2 lr


def test_biases_norms_and_thin_matrices_are_left_to_adamw():
    net = nn.Sequential(nn.Conv3d(1, 16, 3), nn.GroupNorm(4, 16), nn.Conv3d(16, 8, 3), nn.Conv2d(2, 32, 2))
    matrices, others = split_parameters(net)
    assert [tuple(p.shape) for p in matrices] == [(16, 1, 3, 3, 3)]
    assert len(matrices) + len(others) == len(list(net.parameters()))


def test_tables_codebooks_and_adapters_are_no_matrices_and_frozen_weights_are_not_trained():
    net = nn.ModuleList([nn.Embedding(40, 24), nn.Linear(24, 32), spectral_norm(nn.Linear(32, 24))])
    net.codebook = nn.Parameter(gaussian(64, 32))
    matrices, others = split_parameters(net)
    assert {id(p) for p in matrices} == {id(net[1].weight), id(net[2].parametrizations.weight.original)}
    assert [tuple(p.shape) for p in others if p.ndim > 1] == [(64, 32), (40, 24)]
    add_adapters(net, 16)
    matrices, others = split_parameters(net)
    assert not matrices
    assert len(others) == 2


def test_a_network_without_matrices_is_trained_by_adamw_which_is_said(capsys):
    stepper = Stepper(nn.Linear(8, 64), OptimConfig("muon"), RunConfig(steps=1), 4, CPU)
    assert list(stepper.optimizers) == ["optimizer"]
    assert "AdamW trains all weights" in capsys.readouterr().out


def test_a_stepper_with_muon_goes_on_as_if_it_had_not_been_stored():
    def make(net):
        config = OptimConfig("muon", lr=0.01, warmup_steps=2, schedule="cosine")
        return Stepper(net, config, RunConfig(steps=6), 4, CPU)

    def train(net, stepper, steps):
        for step in steps:
            stepper.backward(net(gaussian(8, 20, seed=step)).square().mean())
            assert stepper.step(step)

    net = nn.Sequential(nn.Linear(20, 32), nn.SiLU(), nn.Linear(32, 20))
    stepper = make(net)
    train(net, stepper, range(3))
    again = copy.deepcopy(net)
    resumed = make(again)
    resumed.load_state_dict(copy.deepcopy(stepper.state_dict()))
    train(net, stepper, range(3, 6))
    train(again, resumed, range(3, 6))
    assert {group["lr"] for o in stepper.optimizers.values() for group in o.param_groups} == {
        resumed.report()["lr"]
    }
    for a, b in zip(net.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
