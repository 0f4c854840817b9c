"""DeepSpeed's ZeRO 1, 2 and 3 with converted layers, two processes on the CPU: the parameters of
plain data parallel training."""

from __future__ import annotations

import pytest
import torch
import two_processes
import zero_program
from converted import relative


def expected(recipe: str, dtype: torch.dtype) -> tuple[list[list[float]], list[torch.Tensor]]:
    """Losses of each rank and the parameters, by one process that averages gradients.

    In bf16 the engine keeps a float32 copy of the bf16 parameters, and averages bf16 gradients.
    """
    master = zero_program.make(None, dtype).float()
    optimizer = torch.optim.AdamW(master.parameters(), lr=1e-2)
    losses: list[list[float]] = [[] for _ in range(two_processes.WORLD)]
    for step in range(zero_program.STEPS):
        grads = []
        for rank in range(two_processes.WORLD):
            model = zero_program.make(recipe, dtype)
            model.load_state_dict(master.state_dict())
            x = zero_program.batch(step, rank).to(dtype)
            loss = model(x).float().square().mean()
            loss.backward()
            losses[rank].append(float(loss.detach()))
            grads.append([p.grad for p in model.parameters()])
        for p, parts in zip(master.parameters(), zip(*grads, strict=True), strict=True):
            p.grad = (sum(parts) / two_processes.WORLD).float()
        optimizer.step()
    return losses, [p.detach().to(dtype).float() for p in master.parameters()]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return two_processes.run("zero_program.py", tmp_path_factory.mktemp("zero"))


@pytest.mark.parametrize("recipe", zero_program.RECIPES)
@pytest.mark.parametrize("dtype", zero_program.DTYPES)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_trains_as_data_parallel_training(results, recipe, dtype, stage):
    """Up to the order in which fp32 sums are made, and what a code that falls the other way makes
    of it: Adam's first steps are of one size whatever the gradient's, 1e-2 of parameters of 0.1."""
    losses, parameters = expected(recipe, dtype)
    for rank, by_key in enumerate(results):
        result = by_key[f"{recipe} {dtype} {stage}"]
        assert result["losses"] == pytest.approx(losses[rank], rel=1e-2)
        for ours, theirs in zip(result["parameters"], parameters, strict=True):
            assert relative(ours, theirs) < 1e-2, relative(ours, theirs)
    first, second = (r[f"{recipe} {dtype} {stage}"]["parameters"] for r in results)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
