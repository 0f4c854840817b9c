"""Tiny cases for bench_model, and rows as it writes them."""

from __future__ import annotations

import model_cases
import runs
import timing

HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
TINY = {
    "llama": {"hidden_size": 64, "intermediate_size": 96, **HEADS},
    "qwen3": {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, **HEADS},
    "qwen3_moe": {
        "hidden_size": 64,
        "moe_intermediate_size": 48,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 16,
        **HEADS,
    },
    "mixtral": {"hidden_size": 64, "intermediate_size": 96, "num_local_experts": 4, **HEADS},
}


def tiny(kind: str, *variants: str, part: str = "step", layers: int = 2) -> model_cases.ModelCase:
    architecture = model_cases.Architecture(f"Tiny {kind}", kind, TINY[kind])
    return model_cases.ModelCase("llama", architecture, ("bf16", *variants), layers, 2, 16, part)


def model_row(variant: str, ms: float, peak: float = 13.0, case: dict | None = None) -> runs.Row:
    return {
        **(case or model_cases.CASES[0].row()),
        "variant": variant,
        "step_us": timing.summarize([ms * 1e3]).as_dict(),
        "without_optimizer_us": timing.summarize([ms * 900]).as_dict(),
        "host_ms": 20.0,
        "peak_gib": peak,
        "loss": 9.7,
        "setup_s": 2.0,
        "profile": None,
        "speedup": 100 / ms,
        "peak_ratio": peak / 13,
    }


FACTS = {
    "gpu": "NVIDIA H100 80GB HBM3",
    "driver": "580",
    "cuda": "13.0",
    "torch": "2.11.0",
    "cublaslt": 130100,
    "commit": "abc1234",
}
ROWS = [
    model_row("bf16", 100),
    model_row("fp8 tensorwise", 80, 10.4),
    model_row("torchao 0.18.0 tensorwise compiled", 125),
    model_row("bf16, last", 100.5),
    model_row("bf16, beside Liger", 99),
    model_row("bf16", 40, case=model_cases.CASES[2].row()),
    model_row("fp8 tensorwise", 50, 13, model_cases.CASES[2].row()),
]
