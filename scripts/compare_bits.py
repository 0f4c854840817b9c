#!/usr/bin/env python3
"""Are the operators of two builds bit-equal? For a change that should change nothing.

    scripts/compare_bits.py OLD NEW [--device cuda]

OLD and NEW are built trees (git worktree, make build). Each runs in a process of its own, every
public operator over OLD's tests/python/samples.py, whose random values NEW's may not repeat:
forward and, where there is one, backward. Outputs and gradients are compared byte by byte. A sample
that only one of the two takes is listed, and is no difference. Exit status 1 where bytes differ.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path


def digest(tensor) -> str:
    """dtype, shape and bytes."""
    import torch

    flat = tensor.detach().cpu().flatten().clone(memory_format=torch.contiguous_format)
    found = hashlib.sha256(flat.view(torch.uint8).numpy().tobytes()).hexdigest()[:16]
    return f"{tensor.dtype} {list(tensor.shape)} {found}"


def results(op, sample) -> list[str]:
    """Digests of the outputs, then of the gradients of every input that has one."""
    import torch

    def wants(value: object) -> bool:
        return isinstance(value, torch.Tensor) and value.dtype in (
            torch.float32,
            torch.bfloat16,
            torch.float16,
        )

    outputs = op(*sample.args, **sample.kwargs)
    outputs = outputs if isinstance(outputs, tuple | list) else (outputs,)
    found = [digest(output) for output in outputs]
    inputs = [
        value.detach().clone().requires_grad_() if wants(value) else value for value in sample.args
    ]
    try:
        y = op(*inputs, **sample.kwargs)
        if not isinstance(y, torch.Tensor) or not y.requires_grad:
            return found
        torch.manual_seed(1)
        y.backward(torch.randn(y.shape, device=y.device).to(y.dtype))
    except (NotImplementedError, RuntimeError) as error:
        if "differentiable" in str(error) or "derivative" in str(error) or "leaf" in str(error):
            return found
        raise
    return found + [
        digest(value.grad)
        for value in inputs
        if isinstance(value, torch.Tensor) and value.grad is not None
    ]


def run(tree: Path, tests: Path, device: str) -> dict[str, list[str]]:
    """In this process: {operator and sample: digests, or one text that says why not}."""
    sys.path[:0] = [str(tree / "python"), str(tests)]
    import samples
    import torch

    import fp8  # noqa: F401

    found: dict[str, list[str]] = {}
    for name in samples.public_namespace():
        if name not in samples.TABLE:  # an operator that OLD had not
            continue
        torch.manual_seed(0)
        for sample in samples.samples(name, device):
            try:
                found[f"{name}, {sample.name}"] = results(getattr(torch.ops.fp8, name), sample)
            except Exception as error:  # another schema, as a rule: said below
                found[f"{name}, {sample.name}"] = [str(error).split("\n")[0] + " (Error)"]
    return found


def main() -> int:
    """The command line. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        tests = options.old.resolve() / "tests" / "python"
        print(json.dumps(run(options.new.resolve(), tests, options.device)))
        return 0
    found = []
    for tree in (options.old, options.new):
        command = [sys.executable, __file__, str(options.old), str(tree), "--one"]
        done = subprocess.run(
            [*command, "--device", options.device],
            capture_output=True,
            text=True,
            check=False,
            env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        )
        if done.returncode != 0:
            print(done.stderr, file=sys.stderr)
            return 2
        found.append(json.loads(done.stdout.splitlines()[-1]))
    old, new = found
    refused = {key for run in found for key in run if any("(Error)" in line for line in run[key])}
    both = (old.keys() & new.keys()) - refused
    different = sorted(key for key in both if old[key] != new[key])
    for key in different:
        print(f"differs: {key}\n  old {old[key]}\n  new {new[key]}")
    for key in sorted((old.keys() | new.keys()) - both):
        said = [line for line in old.get(key, []) + new.get(key, []) if "(Error)" in line]
        print(f"not in both: {key}: {said}")
    tensors = sum(len(old[key]) for key in both)
    print(
        f"compare_bits on {options.device}: {len(both)} calls, {tensors} tensors, "
        f"{len(different)} differ, {len(old.keys() | new.keys()) - len(both)} not in both"
    )
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
