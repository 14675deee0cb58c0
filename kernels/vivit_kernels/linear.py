"""Linear layers on a CPU by the fastest route, PyTorch's or the native library's; everywhere else, and in every
result, F.linear.

PyTorch's float32 products go through MKL, which on an AMD runs 256 bits wide: 45 % of what oneDNN reaches on a Zen 5,
87 % on a Zen 4. A 1x1 convolution over rows laid out as channels-last pixels is the same product through oneDNN; it
brings the weight into blocks first, and so wins in bfloat16 too, where F.linear is oneDNN without the blocks. GFLOP/s
of ViT-B's four layers at 3137 tokens on 2 cores of a Zen 4 (peak 224 in float32), F.linear or its gradient -> here:

                       float32                  bfloat16
    forward            168..195 -> 190..219     303..372 -> 406..435
    input gradient     167..199 -> 187..222     313..387 -> 404..433
    weight gradient    182..205 -> 171..200     the matrix product, 341..401: a convolution's is 324..341

On an Intel, MKL runs 512 bits wide and bfloat16 has AMX: no convolution there. One core of a Xeon with AMX, ViT-B's
four layers at 1569 tokens, F.linear or its gradient -> by a convolution, ms: float32 forward 164 -> 170, weight
gradient 158 -> 412; bfloat16 forward 31 -> 37, input gradient 32 -> 40. What is left there:

- float32: the GELU of an MLP's first layer, as the epilogue of the native library's product. At 3137 tokens the layer
  with a tanh GELU behind it takes 72 ms on 2 cores of a Xeon, the GELU in place 64, as the epilogue 56.
- bfloat16 with AMX, without gradients: the native library's product in tiles. Layers of width 768 at 3137 tokens in
  ms, F.linear -> here, in turns: 768 to 768 7.3 -> 6.6, to 3072 with the GELU 31.0 -> 26.4; while AMX went at a quarter
  of its rate, 17.7 -> 13.0 and 66 -> 48. From 3072 to 768 nothing is gained. (2026-11-27, busy machine.)
- bfloat16 and float16 without products of them in hardware: all of it, four times as fast and more (_linear_native.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils.flop_counter import flop_registry, register_flop_formula

from . import _linear_native as native
from ._dispatch import autocast_dtype as autocast_dtype  # these two for integrations, too
from ._dispatch import traced
from ._transforms import active as transformed
from ._transforms import batched_by_autograd

# Fewer rows do not pay for the weight's blocks: level from 200 to 800 rows, at one row bfloat16 takes 2.5 times as long
_FEWEST_ROWS = 512
_FEWEST_ROWS_IN_VECTORS = 16  # level at 8
_FEWEST_COLUMNS = 16  # the strides of narrower rows leave open which layout a convolution sees

_ONEDNN = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
_BFLOAT16 = _ONEDNN and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def _is_amd() -> bool:
    """A fact of the processor that PyTorch does not tell everywhere; "no" where the system does not, either."""
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


_CONVOLVES = _ONEDNN and _is_amd()  # whether convolutions are the faster products
# Private names without autograd, taken only where they are there: the same results come without them
_MATMUL = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if _ONEDNN else None
_CONVOLUTION = getattr(torch.ops.mkldnn, "_convolution_pointwise", None) if _ONEDNN else None


class Linear(nn.Linear):
    """nn.Linear by `linear`: the same parameters, state dict and results, within the error budget.

    It adds no state, so that a layer becomes one, and nn.Linear again, by `layer.__class__ = Linear`.

        y = Linear(768, 3072)(x)
    """

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear: x `[..., K]`, weight `[N, K]`, bias `[N]` or None -> `[..., N]`; backward any number of times.

    It is F.linear for every call that a CPU does not run faster another way. Some do: float32 and bfloat16 on an AMD
    with AVX-512, bfloat16 without gradients on one with AMX, bfloat16 and float16 on one that has no products of them.
    The dtype of autocast counts. Not of few rows, nor in a model that is exported. Raises what F.linear raises.

        y = linear(x, layer.weight, layer.bias)
    """
    needs_grad = _needs_grad(x, weight, bias)
    if not (_gains(x, needs_grad) and _takes(x, (weight, bias))):
        return F.linear(x, weight, bias)
    rows, weight, bias = _prepared(x, weight, bias)
    y = _Linear.apply(rows, weight, bias) if needs_grad else _product(rows, weight, bias)
    return y.view(*x.shape[:-1], weight.shape[0])


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None = None, approximate: str = "tanh") -> Tensor:
    """F.gelu(F.linear(x, weight, bias), approximate=approximate): x `[..., K]`, weight `[N, K]` -> `[..., N]`.

    Without gradients the GELU is the product's epilogue where that is faster. Raises what the two functions raise.

        hidden = linear_gelu(x, fc1.weight, fc1.bias)
    """
    if _needs_grad(x, weight, bias) or not _takes(x, (weight, bias)):
        return F.gelu(linear(x, weight, bias), approximate=approximate)
    rows, weight, bias = _prepared(x, weight, bias)
    return _with_gelu(rows, weight, bias, approximate).view(*x.shape[:-1], weight.shape[0])


def mlp(x: Tensor, fc1: nn.Linear, fc2: nn.Linear, approximate: str = "tanh") -> Tensor:
    """fc2(F.gelu(fc1(x), approximate=approximate)), x `[..., E]`; hooks of the two layers are not called.

    Without gradients the GELU is the product's epilogue: 3 to 10 % of an MLP (Zen 4), and no second hidden tensor. With
    them, on an AMD, it is made again in backward: 1 % of a layer's step (Zen 4), and its output, 38 MB per layer of
    ViT-B in float32, is not kept. Raises what F.linear and F.gelu raise.

        y = mlp(x, fc1, fc2)
    """
    needs_grad = _needs_grad(x, fc1.weight, fc1.bias, fc2.weight, fc2.bias)
    convolves = _convolves(_dtype(x))
    if (needs_grad and not convolves) or not _takes(x, (fc1.weight, fc1.bias), (fc2.weight, fc2.bias)):
        hidden = F.gelu(linear(x, fc1.weight, fc1.bias), approximate=approximate)
        return linear(hidden, fc2.weight, fc2.bias)
    rows, weight1, bias1 = _prepared(x, fc1.weight, fc1.bias)
    _, weight2, bias2 = _prepared(rows, fc2.weight, fc2.bias)
    if needs_grad:
        y = _GeluLinear.apply(linear(rows, weight1, bias1), weight2, bias2, approximate)
    else:
        y = _product(_with_gelu(rows, weight1, bias1, approximate), weight2, bias2)
    return y.view(*x.shape[:-1], weight2.shape[0])


def input_gradient(dy: Tensor, weight: Tensor) -> Tensor:
    """dy @ weight, dy `[M, N]`, weight `[N, K]`, both of one dtype -> `[M, K]`: what `linear` gives its input."""
    is_faster_here = _gains(dy, needs_grad=True) and _takes(dy, (weight.t(), None))
    return _input_gradient(dy, None, weight.contiguous()) if is_faster_here else dy @ weight


def weight_gradient(dy: Tensor, rows: Tensor) -> Tensor:
    """dy.T @ rows, dy `[M, N]`, rows `[M, K]`, both of one dtype -> `[N, K]`: what `linear` gives its weight."""
    many = len(rows) >= _fewest_rows(dy.dtype) and min(dy.shape[1], rows.shape[1]) >= _FEWEST_COLUMNS
    is_faster_here = many and rows.device.type == "cpu" and _gains(dy, needs_grad=True) and _seen_by_nobody(dy, rows)
    return _weight_gradient(dy, rows) if is_faster_here else dy.t() @ rows


def gelu_again(rows: int, width: int, hidden: int, dtype: torch.dtype) -> bool:
    """Whether `mlp` of so many rows on a CPU keeps no output of its GELU for backward, but makes it again."""
    return _convolves(dtype) and rows >= _FEWEST_ROWS and min(width, hidden) >= _FEWEST_COLUMNS


def faster_dtypes() -> list[torch.dtype]:
    """Those in which `linear` has a faster product than F.linear on this processor, for some calls."""
    tiles = [torch.bfloat16] if native.has_tiles() and not _CONVOLVES else []
    every = (torch.float32, torch.bfloat16, torch.float16)
    return [dtype for dtype in every if _convolves(dtype) or native.in_vectors(dtype) or dtype in tiles]


def unwatched(*modules: nn.Module) -> bool:
    """Whether no hook of these modules, or of all modules, wants to see, or could change, what goes in and out of them.

    Who computes what several modules would, as `mlp` does, asks before: `if unwatched(fc1, fc2): y = mlp(x, fc1, fc2)`.
    """
    return not _has_any_global_hook() and not any(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
        for module in modules
    )


# ---- which calls, and in what form ----


def _dtype(x: Tensor) -> torch.dtype:
    """In which F.linear would compute: under autocast, not x's own."""
    narrow = autocast_dtype("cpu") if x.device.type == "cpu" and x.dtype != torch.float64 else None
    return narrow or x.dtype


def _convolves(dtype: torch.dtype) -> bool:
    """Whether a convolution is the faster product of this dtype, forward and backward."""
    return _CONVOLVES and (dtype == torch.float32 or (_BFLOAT16 and dtype == torch.bfloat16))


def _in_tiles(dtype: torch.dtype, width: int) -> bool:
    return native.in_tiles(dtype, width) and not _CONVOLVES and not torch.compiler.is_compiling()


def _gains(x: Tensor, needs_grad: bool) -> bool:
    """Whether some other product than F.linear's is faster for x."""
    dtype = _dtype(x)
    if _convolves(dtype) or native.in_vectors(dtype):
        return True
    return not needs_grad and x.dim() > 0 and _in_tiles(dtype, x.shape[-1])


def _fewest_rows(dtype: torch.dtype) -> int:
    return _FEWEST_ROWS_IN_VECTORS if native.in_vectors(dtype) else _FEWEST_ROWS


def _seen_by_nobody(*tensors: Tensor) -> bool:
    """Whether only the result counts. Not of a model that is exported or traced: it is to run anywhere, and with any
    number of clips. Not of a weight of another class, which has a product of its own, nor within a transformation,
    which looks into it."""
    if torch.compiler.is_exporting() or traced() or transformed():
        return False
    return all(type(t) in (Tensor, nn.Parameter) for t in tensors)


def _takes(x: Tensor, *layers: tuple[Tensor, Tensor | None]) -> bool:
    """Whether other products than PyTorch's can compute these layers, one (weight, bias) after the other, and pay."""
    if not _seen_by_nobody(x, *(t for layer in layers for t in _given(*layer))):
        return False
    dtype, width = _dtype(x), x.shape[-1] if x.dim() else 0
    has_products = _ONEDNN if dtype == torch.float32 else _BFLOAT16 and dtype == torch.bfloat16
    if not (has_products or native.in_vectors(dtype)):
        return False
    if width < _FEWEST_COLUMNS or x.numel() < _fewest_rows(dtype) * width:
        return False
    for weight, bias in layers:
        if weight.dim() != 2 or weight.shape[1] != width or weight.shape[0] < _FEWEST_COLUMNS:
            return False
        width = weight.shape[0]
        if any(t.device.type != "cpu" or not t.is_floating_point() or _dtype(t) != dtype for t in _given(weight, bias)):
            return False
    return x.device.type == "cpu" and x.is_floating_point()


def _prepared(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """x as rows `[M, K]`, and all in the dtype of the product: under autocast that is not theirs."""
    dtype = _dtype(x)
    rows = x.to(dtype).reshape(-1, x.shape[-1]).contiguous()
    return rows, weight.to(dtype).contiguous(), None if bias is None else bias.to(dtype)


def _given(*tensors: Tensor | None) -> list[Tensor]:
    return [t for t in tensors if t is not None]


def _needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in _given(*tensors))


def _differentiated(dy: Tensor, other: Tensor) -> bool:
    """Whether a gradient is itself differentiated, with create_graph=True, or of many at once (is_grads_batched)."""
    return _needs_grad(dy, other) or batched_by_autograd(dy)


# ---- products ----


def _image(rows: Tensor) -> Tensor:
    """`[M, K]` as a channels-last picture `[1, K, 1, M]`, in place.

    Not by unsqueeze and permute: torch.compile gives the two ones strides of 0, the convolution then takes the picture
    for channels-first, and the model compiled was 12 to 18 % slower than not.
    """
    M, K = rows.shape
    return rows.as_strided((1, K, 1, M), (M * K, 1, M * K, K))


def _rows(image: Tensor) -> Tensor:
    return image.permute(0, 2, 3, 1).reshape(image.shape[3], image.shape[1])


def _convolved(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """rows `[M, K]`, weight `[N, K]` -> `[M, N]`."""
    return _rows(F.conv2d(_image(rows), weight[..., None, None], bias))


def _product(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Without gradients."""
    dtype = rows.dtype
    if _convolves(dtype):
        return _convolved(rows, weight, bias)
    is_native = native.in_vectors(dtype) or _in_tiles(dtype, rows.shape[1])
    return native.multiplied(rows, weight, bias) if is_native else F.linear(rows, weight, bias)


def _with_gelu(rows: Tensor, weight: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    """The GELU as epilogue of a product where that was measured to gain, else in place. Without gradients."""
    dtype = rows.dtype
    if native.in_vectors(dtype):
        return native.multiplied(rows, weight, bias, gelu=approximate)
    if torch.compiler.is_compiling():  # a compiler has passes for what it can see
        return F.gelu(_product(rows, weight, bias), approximate=approximate)
    if _CONVOLVES and _CONVOLUTION is not None and approximate == "tanh":
        kernel = weight[..., None, None]
        return _rows(_CONVOLUTION(_image(rows), kernel, bias, [0, 0], [1, 1], [1, 1], 1, "gelu", [], approximate))
    if not _CONVOLVES and (native.gains_by_a_gelu(dtype) or _in_tiles(dtype, rows.shape[1])):
        return native.multiplied(rows, weight, bias, gelu=approximate)
    if not _CONVOLVES and _MATMUL is not None and dtype == torch.bfloat16:
        return _MATMUL(rows, weight, bias, "gelu", [], approximate)
    return torch.ops.aten.gelu_(_product(rows, weight, bias), approximate=approximate)


def _input_gradient(dy: Tensor, rows: Tensor | None, weight: Tensor) -> Tensor:
    """dy `[M, N]`, weight `[N, K]` -> `[M, K]`; `rows` only lend their shape."""
    if not _convolves(dy.dtype):
        return dy @ weight if _differentiated(dy, weight) else native.multiplied(dy, weight.t(), None)
    rows = dy.new_empty(dy.shape[0], weight.shape[1]) if rows is None else rows
    found = torch.ops.aten.convolution_backward(
        _image(dy), _image(rows), weight[..., None, None], None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1,
        [True, False, False],
    )  # fmt: skip
    return _rows(found[0])


def _weight_gradient(dy: Tensor, rows: Tensor) -> Tensor:
    """dy `[M, N]`, rows `[M, K]` -> `[N, K]`.

    float32 by oneDNN, the longer side as columns: 171..200 GFLOP/s against MKL's 182..205 on a Zen 4, where an AMD runs
    256 bits at once in any case; from Zen 5 on it runs 512, and oneDNN's product is 1.7 times MKL's.
    """
    if _differentiated(dy, rows):
        return dy.t() @ rows
    if not _convolves(dy.dtype):
        return native.multiplied(dy.t(), rows.t(), None)
    if _MATMUL is None or dy.dtype != torch.float32 or torch.compiler.is_compiling():
        return dy.t() @ rows
    if dy.shape[1] > rows.shape[1]:
        return _MATMUL(rows.t(), dy.t(), None, "none", [], "").t().contiguous()
    return _MATMUL(dy.t(), rows.t(), None, "none", [], "")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _product(rows, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        rows, weight, _ = inputs
        ctx.save_for_backward(rows if ctx.needs_input_grad[1] else None, weight if ctx.needs_input_grad[0] else None)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        dy = dy.contiguous()
        return (
            _input_gradient(dy, rows, weight) if ctx.needs_input_grad[0] else None,
            _weight_gradient(dy, rows) if ctx.needs_input_grad[1] else None,
            dy.sum(0) if ctx.needs_input_grad[2] else None,
        )


class _GeluLinear(torch.autograd.Function):
    @staticmethod
    def forward(hidden: Tensor, weight: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
        return _convolved(F.gelu(hidden, approximate=approximate), weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        hidden, weight, _, ctx.approximate = inputs
        ctx.save_for_backward(hidden, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight = ctx.saved_tensors
        dy = dy.contiguous()
        dweight = dhidden = None
        if ctx.needs_input_grad[1]:
            dweight = _weight_gradient(dy, F.gelu(hidden, approximate=ctx.approximate))
        if ctx.needs_input_grad[0]:
            dhidden = _input_gradient(dy, hidden, weight)
            dhidden = torch.ops.aten.gelu_backward(dhidden, hidden, approximate=ctx.approximate)
        return dhidden, dweight, dy.sum(0) if ctx.needs_input_grad[2] else None, None


# ---- for PyTorch's FlopCounterMode, which knows neither ----


def _matmul_flops(x: tuple, weight: tuple, *_, **__) -> int:
    return 2 * x[0] * x[1] * weight[0]


def _convolution_flops(image: tuple, kernel: tuple, *_, **__) -> int:
    return 2 * image[3] * kernel[0] * kernel[1]


_FORMULAS: list[tuple[Any, Any]] = [
    (_MATMUL, _matmul_flops),
    (_CONVOLUTION, _convolution_flops),
    (native.OP, _matmul_flops),
]
for _op, _formula in _FORMULAS:
    if _op is not None and _op not in flop_registry:
        register_flop_formula(_op)(_formula)
