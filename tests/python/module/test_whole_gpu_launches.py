"""FP8_WHOLE_GPU_LAUNCHES: a single process may launch what waits for the whole GPU, one of several
does not, since it would wait for collectives."""

from __future__ import annotations

import new_process
import pytest

SHOW = "import fp8; print(fp8.info()['whole-GPU launches'])"
JOIN = """
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
dist.init_process_group("fake", rank=0, world_size={size}, store=FakeStore())
import torch, fp8
{make}
"""
MADE = {
    "Linear": "fp8.Linear(8, 8)",
    "convert": "fp8.convert(torch.nn.Sequential(torch.nn.Linear(8, 8)), filter=lambda *_: True)",
}


def run(code: str, **variables: str) -> str:
    unset = ("WORLD_SIZE", "FP8_WHOLE_GPU_LAUNCHES")
    done = new_process.python("-c", code, without=unset, **variables)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, "on"),
        ({"WORLD_SIZE": "1"}, "on"),
        ({"WORLD_SIZE": "8"}, "off"),
        ({"WORLD_SIZE": "8", "FP8_WHOLE_GPU_LAUNCHES": "1"}, "on"),
        ({"WORLD_SIZE": "8", "FP8_WHOLE_GPU_LAUNCHES": ""}, "off"),
        ({"FP8_WHOLE_GPU_LAUNCHES": "0"}, "off"),
    ],
    ids=str,
)
def test_the_environment_decides(variables, expected):
    assert run(SHOW, **variables) == expected


@pytest.mark.parametrize("make", MADE.values(), ids=MADE)
def test_a_process_group_turns_them_off(make):
    joined = JOIN.format(size=2, make=make) + SHOW
    assert run(joined) == "off"
    assert run(joined, FP8_WHOLE_GPU_LAUNCHES="1") == "on"
    assert run(JOIN.format(size=1, make=make) + SHOW) == "on"


@pytest.mark.gpu
@pytest.mark.parametrize(("value", "expected"), [("0", "2"), ("1", "1")])
def test_launches_follow(value, expected):
    code = """
import torch, fp8
from torch.profiler import ProfilerActivity, profile
x = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
torch.ops.fp8.quantize_tensorwise(x)
torch.cuda.synchronize()
with profile(activities=[ProfilerActivity.CUDA]) as recorded:
    torch.ops.fp8.quantize_tensorwise(x)
    torch.cuda.synchronize()
cuda = torch.autograd.DeviceType.CUDA
print(sum(event.device_type == cuda for event in recorded.events()))
"""
    assert run(code, FP8_WHOLE_GPU_LAUNCHES=value) == expected
