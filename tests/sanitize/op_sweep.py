"""Every op once on small and ragged CUDA tensors, for compute-sanitizer (`make sanitize`).

Checks nothing itself: values are the tests' business. Run with PYTORCH_NO_CUDA_MEMORY_CACHING=1, so
that each tensor is an allocation of its own and an access past its end is seen. --no-matmul:
quantization only. --grouped: grouped products and mixtures of experts only. --layers:
layer_sweep.py.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import torch
from torch.utils.checkpoint import checkpoint

import fp8
from fp8.ops import make_history

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "python"))
import layer_sweep
from samples import TABLE, samples

SHAPES = [(1, 1, 1), (3, 17, 5), (16, 64, 32), (129, 80, 65), (130, 1040, 24), (40, 2064, 16)]


def grouped() -> int:
    """The samples, with their backward; more experts than threads of a block; long rows."""
    calls = 0
    for name in ("grouped_linear", "moe_experts", "mlp"):
        for sample in samples(name, "cuda"):
            y = getattr(torch.ops.fp8, name)(*sample.args, **sample.kwargs)
            if y.requires_grad:
                y.backward(torch.randn_like(y))
            calls += 1
    for tokens, hidden, features, experts in ((50, 32, 4128, 3), (700, 16, 16, 300)):
        weights, index = torch.randn(tokens, experts, device="cuda").softmax(-1).topk(2)
        x, gate_up, down = (
            torch.randn(s, device="cuda", dtype=torch.bfloat16, requires_grad=True)
            for s in (
                (tokens, hidden),
                (experts, 2 * features, hidden),
                (experts, hidden, features),
            )
        )
        for recipe in (*fp8.GROUPED_RECIPES, "rowwise:power_of_two"):
            y = torch.ops.fp8.moe_experts(x, index, weights, gate_up, down, recipe=recipe)
            y.backward(torch.randn_like(y))
            calls += 1
    return calls + mlps()


def mlps() -> int:
    """Fused kernels of every recipe: rows and features that fill tiles, and that do not."""
    calls = 0
    for tokens, features in ((1, 16), (129, 80), (140, 256), (300, 1040)):
        x, gate, up, down = (
            torch.randn(s, device="cuda", dtype=torch.bfloat16, requires_grad=True)
            for s in ((tokens, 48), (features, 48), (features, 48), (32, features))
        )
        merged = torch.cat([gate, up]).detach().requires_grad_()
        plain = gate.detach().requires_grad_()
        names = ("gate_history", "down_history")
        for recipe in fp8.RECIPES:
            histories = (
                {name: make_history("cuda") for name in names} if recipe == "delayed" else {}
            )
            for weights in ((gate, up), (merged, None), (plain, None)):
                for save in ("bf16", "fp8") * 2:
                    y = fp8.ops.mlp(x, *weights, down, recipe=recipe, save=save, **histories)
                    y.backward(torch.randn_like(y))
                    calls += 1
    torch.cuda.synchronize()
    return calls


def norms() -> int:
    """Rows of a part of a warp, of a warp, of many, and longer than registers; off 16 bytes."""
    calls = 0
    for rows, cols in ((1, 1), (700, 8), (333, 128), (45, 1031), (20, 4096), (3, 16400)):
        for dtype in (torch.bfloat16, torch.float32):
            joint = torch.randn(rows, cols + 1, device="cuda", dtype=dtype)
            weight = torch.randn(cols, device="cuda", dtype=dtype).requires_grad_()
            for x in (joint[:, 1:].requires_grad_(), joint[:, 1:].contiguous().requires_grad_()):
                outputs = (
                    torch.ops.fp8.rms_norm(x, weight, 1e-6, "round_then_scale"),
                    torch.ops.fp8.layer_norm(x, weight, weight),
                    *torch.ops.fp8.add_rms_norm(x, x.detach(), weight),
                )
                torch.autograd.backward(outputs, [torch.randn_like(y) for y in outputs])
                calls += 6
    return calls


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("op_sweep.py: needs a CUDA device")
    if "--grouped" in sys.argv[1:]:
        print(f"op_sweep: {grouped()} calls")
        return
    if "--layers" in sys.argv[1:]:
        print(f"op_sweep: {layer_sweep.all_layers()} calls")
        return
    matmul = "--no-matmul" not in sys.argv[1:]
    calls = 0
    for name in TABLE if matmul else [name for name in TABLE if "quantize" in name]:
        for sample in samples(name, "cuda"):
            getattr(torch.ops.fp8, name)(*sample.args, **sample.kwargs)
            calls += 1
    recipes = [f"{name}{option}" for name in fp8.RECIPES for option in ("", ":power_of_two")]
    for recipe in recipes if matmul else ():
        for tokens, k, n in SHAPES:
            for dtype in (torch.bfloat16, torch.float32):
                x, weight, bias = (
                    torch.randn(s, device="cuda", dtype=dtype, requires_grad=True)
                    for s in ((tokens, k), (n, k), (n,))
                )
                y = torch.ops.fp8.fused_linear(x, weight, bias, recipe)
                y.backward(torch.randn_like(y))
                calls += 2
    for tokens, k, n in SHAPES if matmul else ():
        x = torch.randn(tokens, k, device="cuda", requires_grad=True)
        weight = torch.randn(n, k, device="cuda", requires_grad=True)
        scale = torch.full((), 0.01, device="cuda")
        y = torch.ops.fp8.fused_linear(x, weight, input_scale=scale)
        y.backward(torch.randn_like(y))
        calls += 2
    # Delayed scales begin after 16 records. The last calls are cast again and hold values that are
    # not finite; all are recomputed.
    for tokens, k, n in SHAPES[:2] if matmul else ():
        weight = torch.randn(n, k, device="cuda", requires_grad=True)
        history = make_history("cuda")
        for call in range(20):
            x = torch.randn(tokens, k, device="cuda") * (1e3 if call > 17 else 1)
            if call == 19:
                x[0, 0] = torch.inf
            args = (x.requires_grad_(), weight, None, "delayed")
            run = partial(torch.ops.fp8.fused_linear, history=history)
            y = checkpoint(run, *args, use_reentrant=call % 2 == 0)
            y.backward(torch.randn_like(y))
            calls += 3
    calls += norms()
    # Rows that start off 16 bytes, and rows longer than the registers of a block hold.
    odd = torch.randn(9, 1031, device="cuda", dtype=torch.bfloat16)[:, 1:]
    long = torch.randn(3, 40_000, device="cuda", dtype=torch.bfloat16)
    tall = torch.randn(3000, 2100, device="cuda", dtype=torch.bfloat16)  # several clusters
    for x in (odd, long, tall, odd.t(), odd[:1].expand(5, -1)):
        torch.ops.fp8.quantize_tensorwise_transpose(x)
        torch.ops.fp8.quantize_rowwise_transpose(x)
        torch.ops.fp8.quantize_rowwise(x)
        torch.ops.fp8.quantize_blockwise_1x128_transpose(x)
        torch.ops.fp8.quantize_blockwise_128x128_transpose(x)
        torch.ops.fp8.quantize_tensorwise_transpose(x, power_of_two=True)
        torch.ops.fp8.quantize_rowwise_transpose(x, power_of_two=True)
        torch.ops.fp8.quantize_blockwise_1x128_transpose(x, power_of_two=True)
        torch.ops.fp8.quantize_blockwise_128x128_transpose(x, power_of_two=True)
        calls += 9
    # One launch for both passes: ragged tiles, a ring that comes round.
    for x in (torch.randn(2100, 2040, device="cuda"), torch.randn(9000, 1500, device="cuda")):
        for part in (x, x[:, :-1]):
            torch.ops.fp8.quantize_tensorwise(part)
            torch.ops.fp8.quantize_tensorwise_transpose(part)
            torch.ops.fp8.quantize_rowwise_transpose(part)
            calls += 3
    torch.cuda.synchronize()
    print(f"op_sweep: {calls} calls")


if __name__ == "__main__":
    main()
