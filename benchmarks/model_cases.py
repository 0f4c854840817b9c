"""Whole models that are measured: their shapes, and with which variants."""

from __future__ import annotations

from typing import Any, NamedTuple


class Architecture(NamedTuple):
    """name: of the checkpoint whose shapes these are. sizes: of the configuration."""

    name: str
    model_type: str
    sizes: dict[str, Any]


def _attention(kv_heads: int, theta: float) -> dict[str, Any]:
    """32 heads of 128."""
    rope = {"rope_type": "default", "rope_theta": theta}
    return {"num_attention_heads": 32, "num_key_value_heads": kv_heads, "rope_parameters": rope}


LLAMA = Architecture(
    "Llama-3-8B",
    "llama",
    {"hidden_size": 4096, "intermediate_size": 14336, **_attention(8, 5e5)},
)
QWEN3 = Architecture(
    "Qwen3-8B",
    "qwen3",
    {"hidden_size": 4096, "intermediate_size": 12288, "head_dim": 128, **_attention(8, 1e6)},
)
QWEN3_MOE = Architecture(
    "Qwen3-30B-A3B",
    "qwen3_moe",
    {
        "hidden_size": 2048,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "head_dim": 128,
        **_attention(4, 1e6),
    },
)
MIXTRAL = Architecture(
    "Mixtral-8x7B",
    "mixtral",
    {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        **_attention(8, 1e6),
    },
)


class ModelCase(NamedTuple):
    """One measurement. group: what --models calls it. variants: names of model_variants.VARIANTS
    that are measured unless others are asked for. part: "step", or "layer" for one decoder layer
    alone, forward + backward."""

    group: str
    architecture: Architecture
    variants: tuple[str, ...]
    layers: int = 4
    sequences: int = 2
    context: int = 4096
    part: str = "step"

    @property
    def mixture(self) -> bool:
        return any("experts" in size for size in self.architecture.sizes)

    def __str__(self) -> str:
        return case_name(self.row())

    def row(self) -> dict[str, Any]:
        """What names the case in the JSON."""
        return {
            "model": self.architecture.name,
            "part": self.part,
            "layers": self.layers,
            "sequences": self.sequences,
            "context": self.context,
        }


def case_name(row: dict[str, Any]) -> str:
    layers = "one layer" if row["part"] == "layer" else f"{row['layers']} layers"
    return f"{row['model']}, {layers}, {row['sequences']} × {row['context']}"


_EAGER = ("bf16", "fp8 tensorwise", "fp8 delayed", "fp8 rowwise")
_TORCHAO = "torchao tensorwise compiled"
_LIGER = ("bf16 + Liger", "fp8 delayed + Liger")
_MIXTURE = (
    *("bf16", "fp8 tensorwise", "fp8 delayed"),
    *("bf16 compiled", "fp8 tensorwise compiled"),
)

# What compiles comes late in a case, and few cases have it: each takes some ten seconds.
CASES = (
    ModelCase(
        "llama",
        LLAMA,
        (
            *_EAGER,
            *("fp8 tensorwise, nothing fused", "fp8 delayed, nothing fused"),
            *("fp8 tensorwise save=fp8", "fp8 delayed save=fp8"),
            *("fp8 blockwise", "TE delayed"),
            *(_TORCHAO, "fp8 tensorwise compiled", "bf16 compiled"),
            *(*_LIGER, "fp8 tensorwise + Liger"),
        ),
    ),
    ModelCase("llama", LLAMA, (*_EAGER, _TORCHAO, *_LIGER), sequences=4, context=2048),
    ModelCase("layer", LLAMA, (*_EAGER, "fp8 blockwise", _TORCHAO), layers=1, part="layer"),
    ModelCase("layer", QWEN3_MOE, _MIXTURE, layers=1, part="layer"),
    ModelCase("layer", MIXTRAL, _MIXTURE, layers=1, part="layer"),
    ModelCase("qwen3", QWEN3, (*_EAGER, "TE delayed", _TORCHAO, *_LIGER)),
    ModelCase("qwen3", QWEN3, _EAGER, sequences=4, context=2048),
    ModelCase("qwen3-moe", QWEN3_MOE, _MIXTURE),
    ModelCase("mixtral", MIXTRAL, _MIXTURE, layers=2),
)
GROUPS = tuple(dict.fromkeys(case.group for case in CASES))


def model_cases(quick: bool = False) -> list[ModelCase]:
    """quick: two layers of Llama, nothing compiled."""
    if quick:
        return [CASES[0]._replace(layers=2, variants=_EAGER[:3])]
    return list(CASES)
