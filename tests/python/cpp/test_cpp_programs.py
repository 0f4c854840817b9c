"""The C++ examples run: the demo's losses, saved models, and fp8 without torch."""

import re
import sysconfig

import pytest
import torch
from cmake_runs import run

import fp8


def python_losses(recipe: str, device: str, steps: int) -> list[float]:
    """The demo's losses. The weights are made on the CPU, as those of the C++ program are."""
    import comparison
    import train
    from stdlib_text import load_text

    job, text = train.JOBS["tiny"], load_text()
    schedule = comparison.Schedule(steps, job.learning_rate, warmup=max(1, steps // 8))
    recipes = [] if recipe == "none" else [recipe]
    made = train.make_variants(job, recipes, schedule, 0, torch.device("cpu"))[-1]
    variant = comparison.make_variant(recipe, made.model.to(device), schedule)
    comparison.train(
        [variant],
        lambda step: text.batch(step, job.batch, job.length, 0),
        schedule,
        torch.device(device),
        lambda variant: None,
    )
    return variant.losses


@pytest.mark.parametrize("recipe", ["none", *fp8.RECIPES])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_train_has_the_losses_of_the_python_demo(programs, recipe, device):
    stdlib = sysconfig.get_paths()["stdlib"]
    text = run(programs / "train", stdlib, f"recipe={recipe}", f"device={device}", "steps=12")
    losses = [float(value) for value in re.findall(r"^step \d+ loss (\S+)$", text, re.MULTILINE)]
    expected = python_losses(recipe, device, 12)
    assert len(losses) == 12
    # The same operations on the same values in the same order, optimizer included: as printed.
    assert losses == pytest.approx(expected, abs=1e-6)
    assert losses[-1] < losses[0] - 0.2


def test_first_steps_run(programs):
    """The C++ of the README (tests/python/docs compares the text)."""
    run(programs / "first_steps")


class Model(torch.nn.Module):
    """A small MLP; `torch.jit.trace` and `torch.export` both take fp8.Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.up = fp8.Linear(64, 96)
        self.down = fp8.Linear(96, 32, recipe="rowwise")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.nn.functional.silu(self.up(x)))


@pytest.fixture
def model(device):
    return Model().to(device).eval()


@pytest.fixture
def model_input(device):
    return torch.randn(24, 64, device=device)


def run_saved(programs, folder, saved, model_input) -> torch.Tensor:
    torch.save(model_input, folder / "input.pt")
    run(programs / "run_saved", saved, folder / "input.pt", folder / "output.pt")
    return torch.load(folder / "output.pt")


def test_run_saved_torchscript_traced(programs, tmp_path, model, model_input):
    saved = tmp_path / "model.pt"
    torch.jit.trace(model, model_input).save(saved)
    output = run_saved(programs, tmp_path, saved, model_input)
    assert torch.equal(output, model(model_input).cpu())


class Scripted(torch.nn.Module):
    """torch.jit.script takes the operators themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(32, 64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        data, scale = torch.ops.fp8.quantize_rowwise(x)
        weight, weight_scale = torch.ops.fp8.quantize_rowwise(self.weight)
        y = torch.ops.fp8.scaled_mm(data, weight, scale, weight_scale)
        return y.float() + torch.ops.fp8.fused_linear(x, self.weight, None, "rowwise")


def test_run_saved_torchscript_scripted(programs, tmp_path, device, model_input):
    module = Scripted().to(device).eval()
    saved = tmp_path / "model.pt"
    torch.jit.script(module).save(saved)
    output = run_saved(programs, tmp_path, saved, model_input)
    assert torch.equal(output, module(model_input).detach().cpu())


def test_run_saved_aot_inductor(programs, tmp_path, model, model_input):
    with torch.no_grad():
        program = torch.export.export(model, (model_input,))
        saved = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "model.pt2")
        )
    output = run_saved(programs, tmp_path, saved, model_input)
    # Inductor's own silu may round otherwise, and an FP8 code with it: one of 96 products then
    # moves by up to 1/8 of itself.
    exact = model(model_input).detach().cpu()
    assert (output - exact).norm() <= 0.01 * exact.norm()


def test_run_saved_says_what_is_wrong(programs, tmp_path):
    (tmp_path / "broken.pt").write_bytes(b"no archive")
    run(programs / "run_saved", status=2)
    run(programs / "run_saved", tmp_path / "none.pt", "x", "y", status=1)


def test_core_program_without_a_gpu_says_so(core_program):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert run(core_program, status=77).startswith("skipped: no GPU")


@pytest.mark.gpu
def test_core_program_multiplies(core_program):
    assert run(core_program).startswith("relative error 0.0")
