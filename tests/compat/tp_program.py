"""from_pretrained with tp_plan="auto" and ConvertConfig: see test_from_pretrained.py."""

from __future__ import annotations

import sys
import warnings
from typing import Any

import transformers
from converted import converted_layers, every, step
from tiny_transformers import loss
from torch import Tensor
from two_processes import answer, join

from fp8.integrations.transformers import ConvertConfig


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def main() -> None:
    warnings.simplefilter("ignore")
    join()
    results: dict[str, Any] = {}
    for name, in_fp8, plan in (
        ("linear", False, None),
        ("one process", True, None),
        ("parallel", True, "auto"),
    ):
        config = ConvertConfig("rowwise", filter=every) if in_fp8 else None
        model = transformers.AutoModelForCausalLM.from_pretrained(
            f"{sys.argv[2]}/model", quantization_config=config, tp_plan=plan
        ).train()
        done = step(model, loss("llama"))
        if in_fp8:
            layers = converted_layers(model).values()
            shapes = [tuple(getattr(m.weight, "_local_tensor", m.weight).shape) for m in layers]
            results[f"{name}, shapes"] = shapes
        results[name] = done.loss, {n: whole(grad) for n, grad in done.grads.items()}
    answer(results)


if __name__ == "__main__":
    main()
