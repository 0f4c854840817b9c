"""Examples in docstrings, which the API reference shows: they run, and print what they say, if they
say something.

What an example takes for granted (a model, batches) is made here. Without a GPU "cuda" is read as
"cpu".
"""

from __future__ import annotations

import doctest
import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_docs_names import public_names
from torch import nn

import fp8

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PRINTS_OTHERWISE = {"fp8.autotune": "what it prints was measured on a GPU"}
pytestmark = pytest.mark.filterwarnings("ignore:fp8.convert converted nothing")  # a small model


def examples() -> Iterator[tuple[str, str, object]]:
    """(name, docstring, object) of everything public that has an example, methods too."""
    for name, value in public_names().items():
        found = {name: value}
        if inspect.isclass(value):
            public = {key: part for key, part in vars(value).items() if not key.startswith("_")}
            found |= {f"{name}.{key}": part for key, part in public.items()}
        for path, part in found.items():
            text = inspect.getdoc(part) if hasattr(part, "__doc__") else None
            if text and "\n    >>> " in text and not isinstance(part, str | tuple | frozenset):
                yield path, text, part


EXAMPLES: list[tuple[str, str, object]] = []
for _example in examples():
    if all(_example[2] is not other for *_, other in EXAMPLES):  # one of several names
        EXAMPLES.append(_example)


class IfSomethingIsExpected(doctest.OutputChecker):
    """Whether what an example prints is right."""

    def check_output(self, want: str, got: str, flags: int) -> bool:
        return not want or super().check_output(want, got, flags)


class Model(nn.Module):
    """head: a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(64, 64), nn.Linear(64, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


def model_of_summary() -> nn.Module:
    with torch.device("meta"):
        parts = {"up": nn.Linear(4096, 14336), "kv": nn.Linear(4096, 256)}
        model = nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleDict(parts)])})
    return fp8.convert(model.to(torch.bfloat16))


def taken_for_granted(name: str, text: str, value: object) -> dict[str, Any]:
    model = fp8.convert(Model().to(DEVICE), filter=lambda *_: True)
    if name == "fp8.summary":
        model = model_of_summary()
    batches: list[Any] = [torch.randn(8, 64, device=DEVICE) for _ in range(2)]
    if "for x, target in batches" in text:
        batches = [(x, x) for x in batches]
    codes = [torch.randn(n, 16).to(torch.float8_e4m3fn) for n in (32, 64)]
    return {
        "torch": torch,
        "fp8": fp8,
        "model": model,
        "batches": batches,
        "micro_batches": batches,
        "loss": lambda y, *_: y.square().mean(),
        "optimizer": torch.optim.SGD(model.parameters(), 0.1),
        **{"main_grad": torch.zeros(32, 64), "dy_t": codes[0], "x_t": codes[1]},
        **dict.fromkeys(("scale_dy", "scale_x"), torch.tensor(1.0)),
        "worthwhile": value,
    }


@pytest.mark.parametrize(("name", "text", "value"), EXAMPLES, ids=[name for name, *_ in EXAMPLES])
def test_example_of_a_docstring_runs(name, text, value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = text.replace('"cuda"', f'"{DEVICE}"').replace(".cuda()", f'.to("{DEVICE}")')
    test = doctest.DocTestParser().get_doctest(
        text, taken_for_granted(name, text, value), name, None, None
    )
    if name in PRINTS_OTHERWISE:
        for example in test.examples:
            example.want = ""
    printed: list[str] = []
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    runner = doctest.DocTestRunner(IfSomethingIsExpected(), optionflags=flags)
    result = runner.run(test, out=printed.append)
    assert result.attempted > 0
    assert result.failed == 0, "".join(printed)


def test_examples_are_many():
    names = {name for name, *_ in EXAMPLES}
    assert {"fp8.convert", "fp8.summary", "fp8.Linear", "fp8.Linear.from_linear"} <= names
    assert {f"fp8.ops.{name}" for name in fp8.ops.__all__} <= names
