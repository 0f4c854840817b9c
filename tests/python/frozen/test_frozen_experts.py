"""fp8.FrozenExperts: a module that holds codes, and what moves, copies, saves and casts modules."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from frozen_models import assert_same_state
from reference import assert_same_bits
from torch import Tensor, nn

import fp8

E4M3 = torch.float8_e4m3fn
GRANULARITIES = ("tensorwise", "rowwise", "blockwise")


def codes_of(weight: Tensor, granularity: str) -> tuple[Tensor, Tensor]:
    op = {
        "tensorwise": fp8.ops.quantize_tensorwise,
        "rowwise": fp8.ops.quantize_rowwise,
        "blockwise": fp8.ops.quantize_blockwise_128x128,
    }[granularity]
    made = [op(matrix) for matrix in weight]
    codes = torch.stack([c.contiguous().view(torch.uint8) for c, _ in made]).view(E4M3)
    scales = torch.stack([s for _, s in made])
    return codes, scales.reshape(-1, 1, 1) if granularity == "tensorwise" else scales


def make(granularity: str = "rowwise", bias: bool = True, dtype=torch.bfloat16, **options):
    """3 experts, H 144, I 128; bias alone is drawn in `dtype`."""
    weights = [torch.randn(3, 256, 144) / 12, torch.randn(3, 144, 128) / 12]
    biases = [torch.randn(3, n, dtype=dtype) if bias else None for n in (256, 144)]
    pairs = [t for w in weights for t in codes_of(w, granularity)]
    return fp8.FrozenExperts.from_codes(*pairs, *biases, compute_dtype=dtype, **options)


def call(dtype=torch.bfloat16, device="cpu"):
    weights, index = torch.rand(10, 3).topk(2)
    return torch.randn(10, 144, dtype=dtype).to(device), index.to(device), weights.to(device)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_frozen_experts_forward_is_the_operator(device, granularity):
    module, args = make(granularity).to(device), call(device=device)
    suffix = "_scale_inv" if granularity == "blockwise" else "_scale"
    names = ["gate_up_proj", f"gate_up_proj{suffix}", "down_proj", f"down_proj{suffix}"]
    names += ["gate_up_proj_bias", "down_proj_bias"]
    assert [name for name, _ in module.named_parameters()] == names
    expected = fp8.ops.experts_frozen(*args, *(getattr(module, name) for name in names))
    assert_same_bits(module(*args).detach(), expected.detach())
    assert {str(p.dtype) for p in module.parameters()} == {
        "torch.float8_e4m3fn",
        "torch.float32",
        "torch.bfloat16",
    }
    grads = {name for name, p in module.named_parameters() if p.requires_grad}
    assert not grads  # from_codes makes parameters without one of plain tensors


def test_frozen_experts_gate_and_dtypes(device):
    module = make(activation="clamped_silu", interleaved=True, alpha=1.5, limit=2.0).to(device)
    args = call(device=device)
    own = [p.detach() for p in module.parameters()]
    form = ("clamped_silu", True, 1.5, 2.0)
    expected = fp8.ops.experts_frozen(*args, *own, *form)
    assert_same_bits(module(*args), expected)
    wide = (args[0].float(), args[1].int(), args[2])
    y = module(*wide)  # rounded to the compute_dtype, and given back as it came
    assert y.dtype == torch.float32
    assert_same_bits(y, expected.float())


def test_frozen_experts_gradients_reach_what_is_before(device):
    module = make().to(device)
    for name in ("gate_up_proj_bias", "down_proj_bias"):
        getattr(module, name).requires_grad_()
    x, index, weights = call(device=device)
    x.requires_grad_()
    weights.requires_grad_()
    module(x, index, weights).float().square().sum().backward()
    assert x.grad.abs().sum() > 0
    assert weights.grad.abs().sum() > 0
    assert module.gate_up_proj_bias.grad.abs().sum() > 0
    assert module.down_proj_bias.grad.abs().sum() > 0
    assert module.gate_up_proj.grad is None


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_frozen_experts_casts_leave_codes(granularity):
    module = make(granularity)
    before = copy.deepcopy(module)
    for cast in (
        lambda m: m.to(torch.float16),
        lambda m: m.half(),
        lambda m: m.float(),
        lambda m: m.double(),
        lambda m: m.type(torch.float16),
    ):
        cast(module)
        for name in ("gate_up_proj", "down_proj"):
            assert_same_bits(getattr(module, name).detach(), getattr(before, name).detach())
            assert_same_bits(module.scales(name).detach(), before.scales(name).detach())
        assert module.compute_dtype == module.down_proj_bias.dtype != torch.bfloat16
    module.to(torch.bfloat16)
    assert module.compute_dtype == torch.bfloat16
    args = call()
    module.gate_up_proj_bias.data.copy_(before.gate_up_proj_bias)
    module.down_proj_bias.data.copy_(before.down_proj_bias)
    assert_same_bits(module(*args), before(*args))


def _through_torch_save(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m)), _through_torch_save],
    ids=["deepcopy", "copy", "pickle", "torch.save"],
)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_frozen_experts_copies(copied, granularity):
    module = make(granularity, activation="gelu", power_of_two=True)
    module.register_forward_hook(_twice)
    again = copied(module)
    assert type(again) is fp8.FrozenExperts
    assert_same_state(again, module)
    args = call()
    assert_same_bits(again(*args), module(*args))
    assert repr(again) == repr(module)


def _twice(module, args, output):
    return output * 2


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("assign", [False, True])
def test_frozen_experts_state_goes_into_a_new_one(granularity, assign):
    source = make(granularity)
    with torch.device("meta" if assign else "cpu"):
        model = fp8.FrozenExperts(
            3, 144, 128, bias=True, dtype=torch.bfloat16, granularity=granularity
        )
    model.load_state_dict(source.state_dict(), assign=assign)
    assert_same_state(model, source)
    args = call()
    assert_same_bits(model(*args).detach(), source(*args).detach())
    empty = fp8.FrozenExperts(3, 144, 128, granularity=granularity)
    assert not any(t.any() for t in empty.dequantize())
    assert not empty(args[0].float(), *args[1:]).any()


def fails(model, state, match, **options):
    """Loading raises, and changes nothing."""
    before = copy.deepcopy(model)
    with pytest.raises(RuntimeError, match=match):
        model.load_state_dict(state, **options)
    assert_same_state(model, before)


@pytest.mark.parametrize("options", [{}, {"strict": False}, {"assign": True}])
def test_frozen_experts_state_takes_codes_with_scales_alone(options):
    state = make().state_dict()
    for dtype in (torch.bfloat16, torch.uint8):
        numbers = state | {"down_proj": torch.ones(3, 144, 128).to(dtype)}
        fails(make(), numbers, "'down_proj': expected codes in float8_e4m3fn", **options)
    left = {name: t for name, t in state.items() if name != "gate_up_proj_scale"}
    fails(make(), left, "without their scale, expected 'gate_up_proj_scale'", **options)
    left = {name: t for name, t in state.items() if name != "down_proj"}
    fails(make(), left, "'down_proj': missing, beside 'down_proj_scale'", **options)
    wrong = state | {"down_proj_scale": torch.ones(3, 128, 1)}
    fails(make(), wrong, r"expected \[3, 144, 1\], of weights scaled rowwise", **options)
    wide = state | {"down_proj_scale": state["down_proj_scale"].double()}
    fails(make(), wide, "expected a scale in float32, bfloat16", **options)


def test_frozen_experts_state_takes_scales_in_other_forms():
    source = make()
    source.gate_up_proj_scale.copy_(source.gate_up_proj_scale.bfloat16())
    state = source.state_dict()
    state["gate_up_proj_scale"] = state["gate_up_proj_scale"].bfloat16().squeeze(2)
    model = make()
    model.load_state_dict(state)
    assert_same_state(model, source)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_frozen_experts_dequantize(device, granularity):
    module = make(granularity).to(device)
    for whole, name in zip(module.dequantize(), ("gate_up_proj", "down_proj"), strict=True):
        assert whole.dtype == torch.bfloat16
        for expert in range(3):
            scale = module.scales(name)[expert]
            if granularity == "tensorwise":
                scale = scale.reshape(())
            codes = getattr(module, name)[expert].detach()
            expected = fp8.ops.dequantize(codes, scale.detach(), torch.bfloat16)
            assert_same_bits(whole[expert], expected)
    up, _ = module.dequantize(torch.float32)
    assert up.dtype == torch.float32


def test_frozen_experts_of_mixed_scales_has_rows():
    up, down = torch.randn(3, 256, 144), torch.randn(3, 144, 128)
    module = fp8.FrozenExperts.from_codes(*codes_of(up, "tensorwise"), *codes_of(down, "rowwise"))
    assert module.granularity == "rowwise"
    assert module.gate_up_proj_scale.shape == (3, 256, 1)
    with pytest.raises(ValueError, match="in blocks, or none, got gate_up rowwise and down blockw"):
        fp8.FrozenExperts.from_codes(*codes_of(up, "rowwise"), *codes_of(down, "blockwise"))


def test_frozen_experts_says_what_it_takes():
    up, scale = codes_of(torch.randn(3, 256, 144), "rowwise")
    down, other = codes_of(torch.randn(3, 144, 128), "rowwise")
    make_it = fp8.FrozenExperts.from_codes
    with pytest.raises(TypeError, match=r"gate_up: expected codes \[E, N, K\] in float8_e4m3fn"):
        make_it(up.float(), scale, down, other)
    with pytest.raises(
        ValueError, match=r"down: expected a scale per expert \[3, 1, 1\], .*\[3, 7"
    ):
        make_it(up, scale, down, torch.ones(3, 7))
    with pytest.raises(TypeError, match="gate_up_scale: expected a scale in float32"):
        make_it(up, scale.double(), down, other)
    with pytest.raises(ValueError, match=r"gate_up \[E, 2 I, H\] and down .* got \[3, 256, 144\]"):
        make_it(up, scale, down[:, :, :64], other)
    with pytest.raises(ValueError, match=r"fp8.FrozenExperts: expected a granularity of .*'rows'"):
        fp8.FrozenExperts(3, 64, 32, granularity="rows")
    with pytest.raises(ValueError, match="multiples of 16, got 60 and 32"):
        fp8.FrozenExperts(3, 60, 32)


def test_frozen_experts_repr():
    text = repr(make(power_of_two=True))
    assert "num_experts=3, hidden_size=144, intermediate_size=128, bias=True" in text
    assert "frozen rowwise:power_of_two" in text


def test_frozen_experts_compile_and_export(device):
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = make("blockwise", bias=False)

        def forward(self, x, index, weights):
            return self.experts(x, index, weights) + x

    layer, args = Layer().to(device), call(device=device)
    expected = layer(*args)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert_same_bits(compiled(*args), expected)
    exported = torch.export.export(layer, args)
    assert_same_bits(exported.module()(*args), expected)


def test_frozen_experts_under_autocast(device):
    module, args = make(dtype=torch.float32).to(device), call(torch.float32, device)
    with torch.autocast(device, torch.bfloat16):
        y = module(*args)
    assert y.dtype == torch.float32
    other = copy.deepcopy(module).to(torch.bfloat16)
    assert_same_bits(y.bfloat16(), other(args[0].bfloat16(), *args[1:]).detach())


@pytest.mark.gpu
def test_frozen_experts_move():
    module = make()
    args = call()
    there = copy.deepcopy(module).cuda()
    assert {p.device.type for p in there.parameters()} == {"cuda"}
    assert_same_state(there.cpu(), module)
    assert there(*args).isfinite().all()
