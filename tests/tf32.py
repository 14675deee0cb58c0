"""TF32 on a CPU: numbers of ten bits behind the point, and PyTorch's products as a GPU takes them where it may."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_PRODUCTS = (torch.ops.aten.bmm.default, torch.ops.aten.mm.default)


def rounded(x: torch.Tensor) -> torch.Tensor:
    """To the nearest, of two the one further from 0; by way of float64."""
    mantissa, exponent = torch.frexp(x.double())  # between 0.5 and 1: eleven bits in all
    return torch.ldexp(torch.sign(mantissa) * torch.floor(mantissa.abs() * 2**11 + 0.5), exponent - 11).float()


class Products(TorchDispatchMode):
    """Within it products of float32 round what they multiply; sums stay float32. Forward and backward."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in _PRODUCTS and args[0].dtype == torch.float32:
            self.count += 1
            args = [rounded(x) for x in args]
        return func(*args, **(kwargs or {}))
