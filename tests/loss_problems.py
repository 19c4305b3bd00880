"Logits and targets that losses are tried on, and how their answers are compared."
import torch

COUNTS = [100, 60, 20, 5, 1]


def close(a, b, atol=1e-5, rtol=1e-5): torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), atol=atol, rtol=rtol, check_dtype=False)


def problem(seed=0, experts=3, batch=7, classes=5, scale=3.):
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(experts, batch, classes, generator=g, dtype=torch.float64) * scale
    return z, torch.randint(classes, (batch,), generator=g), torch.rand(batch, classes, generator=g, dtype=torch.float64).softmax(1)
