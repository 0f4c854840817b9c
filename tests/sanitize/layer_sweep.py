"""What op_sweep.py's samples do not reach: kernels that are chosen by size, or by what came before.

Each function returns how many calls it made. `device`: "cpu" is for a look at this file alone.
"""

from __future__ import annotations

import torch
from torch import nn

import fp8

DTYPES = (torch.bfloat16, torch.float32)


def decode(device: str = "cuda") -> int:
    """Few rows of a frozen layer: x quantized in the kernel or before it, tiles that are not full,
    scales of all kinds, x off 16 bytes."""
    calls = 0
    for k, n in ((1024, 1024), (1024, 8192), (2064, 1001), (1040, 6152), (1003, 1100)):
        linear = nn.Linear(k, n, device=device, dtype=torch.bfloat16)
        for recipe in ("tensorwise", "rowwise", "rowwise:power_of_two", "blockwise"):
            layer = fp8.FrozenLinear.from_linear(linear, recipe)
            for rows in (1, 5, 7, 8, 13, 16, 32, 33, 64):
                x = torch.randn(rows, k + 1, device=device, dtype=torch.bfloat16)
                layer(x[:, 1:])
                layer(x[:, 1:].contiguous())
                calls += 2
        layer = fp8.FrozenLinear.from_linear(linear, "tensorwise")
        scale = torch.full((), 0.01, device=device)
        for rows in (1, 7, 8, 13, 32):
            x = torch.randn(rows, k, device=device, dtype=torch.bfloat16)
            torch.ops.fp8.linear_frozen(x, layer.weight, layer.scales, layer.bias, scale)
            calls += 1
    return calls


def batch_invariant(device: str = "cuda") -> int:
    """The grouped kernel with one group, of any extents."""
    calls = 0
    with fp8.batch_invariant(), torch.no_grad():
        for k, n in ((16, 8), (33, 65), (272, 144), (2064, 1001)):
            for recipe in ("rowwise", "blockwise"):
                for dtype in DTYPES:
                    linear = nn.Linear(k, n, device=device, dtype=dtype)
                    layers = (
                        fp8.Linear.from_linear(linear, recipe),
                        fp8.FrozenLinear.from_linear(linear, recipe),
                    )
                    for rows in (1, 17, 129):
                        for layer in layers:
                            layer(torch.randn(rows, k, device=device, dtype=dtype))
                            calls += 1
    return calls


def norms_before_linears(device: str = "cuda") -> int:
    """Norms that leave their amax, which they do from a linear's second call on; blocks that stay,
    and LayerNorm's backward of rows that need two passes of a block."""
    calls = 0
    norms = {
        "rms": lambda x, w: torch.ops.fp8.rms_norm(x, w, 1e-6, "round_then_scale"),
        "layer": lambda x, w: torch.ops.fp8.layer_norm(x, w, w),
        "add": lambda x, w: torch.ops.fp8.add_rms_norm(x, x.detach(), w)[0],
    }
    for rows, cols in ((1, 16), (700, 128), (45, 1040), (2200, 2048), (1100, 8208), (40, 16384)):
        for norm in norms.values():
            for dtype in (torch.bfloat16, torch.float16):
                x = torch.randn(rows, cols, device=device, dtype=dtype).requires_grad_()
                weight = torch.randn(cols, device=device, dtype=dtype).requires_grad_()
                linear = torch.randn(16, cols, device=device, dtype=dtype).requires_grad_()
                for _ in range(3):
                    y = torch.ops.fp8.fused_linear(norm(x, weight), linear, None, "tensorwise")
                    y.backward(torch.randn_like(y))
                    calls += 4
    return calls


def columns_of_many_groups(device: str = "cuda") -> int:
    """So many tiles that a block casts several, and groups without rows."""
    counts = [*(index * 37 % 150 for index in range(130)), 1000]
    offsets = torch.tensor(counts, device=device).cumsum(0).int()
    rows, k, n = sum(counts) + 9, 1936, 32
    calls = 0
    for dtype in DTYPES:
        x = torch.randn(rows, k, device=device, dtype=dtype).requires_grad_()
        weight = torch.randn(len(counts), n, k, device=device, dtype=dtype).requires_grad_()
        y = torch.ops.fp8.grouped_linear(x, weight, offsets, None, "rowwise")
        y.backward(torch.randn_like(y))
        calls += 2
    return calls


def frozen_experts(device: str = "cuda") -> int:
    """The samples, with their backward."""
    from samples import samples  # which asks for fp8's operators

    calls = 0
    for sample in samples("experts_frozen", device):
        args = [
            a.detach().requires_grad_()
            if isinstance(a, torch.Tensor) and a.dtype in (*DTYPES, torch.float16) and i in (0, 2)
            else a
            for i, a in enumerate(sample.args)
        ]
        y = torch.ops.fp8.experts_frozen(*args, **sample.kwargs)
        y.backward(torch.randn_like(y))
        calls += 2
    return calls


def graphs() -> int:
    """Codes that a graph reads: made before it, and again after the weights have changed."""
    calls = 0
    for recipe in ("tensorwise", "rowwise", "blockwise"):
        model = fp8.Linear.from_linear(nn.Linear(272, 144, device="cuda"), recipe)
        x = torch.randn(24, 272, device="cuda")
        with fp8.cached_weights(model, captures=True), torch.no_grad():
            model(x)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                model(x)
            graph.replay()
            model.weight.add_(0.1)
            model(x)
            graph.replay()
            calls += 3
        graph.replay()
        torch.cuda.synchronize()
    return calls


def all_layers(device: str = "cuda") -> int:
    of_device = (decode, batch_invariant, norms_before_linears, columns_of_many_groups)
    calls = sum(function(device) for function in (*of_device, frozen_experts))
    return calls + (graphs() if device == "cuda" else 0)


if __name__ == "__main__":
    print(f"layer_sweep: {all_layers()} calls")
