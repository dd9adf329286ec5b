"""How near results are to an independent computation, and gradients to compare."""

import torch


def close(actual, expected, tolerance=2e-5):
    """Relative to the largest expected value, as the tolerances of the project are stated."""
    error = (actual.double() - expected.double()).abs().max() / expected.double().abs().max().clamp_min(1e-12)
    assert error <= tolerance, f"relative error {error:.1e}"


def all_close(actual, expected, tolerance=1e-4):
    """`close` for every pair of two sequences, such as gradients."""
    for a, b in zip(actual, expected, strict=True):
        close(a, b, tolerance)


def gradients(module, out, *inputs):
    """Gradients of a fixed random projection of `out` with respect to the inputs and all parameters."""
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(out.dtype)
    return torch.autograd.grad((out * weights).sum(), [*inputs, *module.parameters()])
