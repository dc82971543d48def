"""Numbers for compiled loops, and how close to a library's their results must be."""

import torch


def drawn(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=dtype)


def close(a, b):
    exact = a.dtype == torch.float64
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12 if exact else 2e-5 * b.abs().max().item())
