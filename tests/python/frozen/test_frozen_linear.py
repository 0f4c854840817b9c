"""fp8.FrozenLinear: what it holds, and what moves, copies and traces it."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from frozen_models import assert_same_state
from reference import assert_same_bits, decode, expand_scale
from torch import nn

import fp8

E4M3 = torch.float8_e4m3fn
RECIPES = ("tensorwise", "rowwise", "blockwise")


def make(recipe="rowwise", k=160, n=144, dtype=torch.bfloat16, static=False) -> fp8.FrozenLinear:
    layer = fp8.FrozenLinear.from_linear(nn.Linear(k, n).to(dtype), recipe)
    if static:
        scale = torch.tensor([0.01])
        layer = fp8.FrozenLinear.from_codes(layer.weight, layer.scales, layer.bias, scale)
    return layer


@pytest.mark.parametrize(
    ("recipe", "name", "shape"),
    [
        ("tensorwise", "weight_scale", (1,)),
        ("rowwise", "weight_scale", (144, 1)),
        ("blockwise", "weight_scale_inv", (2, 2)),
    ],
)
def test_frozen_linear_holds_codes_and_scales(recipe, name, shape):
    layer = make(recipe)
    assert [*layer.state_dict()] == ["weight", name, "bias"]
    assert layer.weight.dtype == E4M3
    assert layer.scales.shape == shape
    assert layer.scales.dtype == torch.float32
    assert not layer.weight.requires_grad
    assert not layer.scales.requires_grad
    assert isinstance(layer, nn.Linear)
    assert layer.compute_dtype == layer.bias.dtype == torch.bfloat16
    assert (layer.in_features, layer.out_features) == (160, 144)


@pytest.mark.parametrize("recipe", RECIPES)
def test_frozen_linear_takes_a_byte_an_element(recipe):
    """No storage is larger than what it shows: quantizing pads, a layer does not."""
    layer = make(recipe, 161, 145)
    for p in layer.parameters():
        assert p.is_contiguous()
        assert p.untyped_storage().nbytes() == p.nbytes
    assert layer.weight.nbytes == 161 * 145


def scale_of(layer):
    """As the reference has it: 0-dim for one of the tensor."""
    return layer.scales.detach().reshape(
        () if layer.granularity == "tensorwise" else layer.scales.shape
    )


@pytest.mark.parametrize("recipe", RECIPES)
def test_frozen_linear_dequantizes(recipe):
    layer = make(recipe)
    exact = decode(layer.weight) * expand_scale(scale_of(layer), layer.weight.shape).double()
    assert_same_bits(layer.dequantize(torch.float32), exact.float())
    assert layer.dequantize().dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("recipe", "static"), [*((recipe, False) for recipe in RECIPES), ("tensorwise", True)]
)
@pytest.mark.parametrize("how", ["deepcopy", "copy", "pickle", "torch.save", "state_dict"])
def test_frozen_linear_copies(recipe, static, how):
    layer = make(recipe, static=static)
    buffer = io.BytesIO()
    if how == "torch.save":
        torch.save(layer, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    elif how == "state_dict":
        torch.save(layer.state_dict(), buffer)
        buffer.seek(0)
        other = fp8.FrozenLinear(
            160, 144, granularity=recipe, static_input=static, dtype=torch.bfloat16,
            scale_name=layer.scale_name, input_granularity="tensorwise" if static else recipe,
        )  # fmt: skip
        other.load_state_dict(torch.load(buffer, weights_only=True))
    else:
        copies = {"deepcopy": copy.deepcopy, "copy": copy.copy}
        other = copies.get(how, lambda m: pickle.loads(pickle.dumps(m)))(layer)
    assert_same_state(other, layer)
    assert repr(other) == repr(layer)
    assert not other.weight.requires_grad
    x = torch.randn(3, 160, dtype=torch.bfloat16)
    assert_same_bits(other(x), layer(x))
    if how == "deepcopy":
        assert other.weight.data_ptr() != layer.weight.data_ptr()


CASTS = {
    "half": (lambda m: m.half(), torch.float16),
    "bfloat16": (lambda m: m.bfloat16(), torch.bfloat16),
    "double": (lambda m: m.double(), torch.float64),
    "to": (lambda m: m.to(torch.float16), torch.float16),
    "to device": (lambda m: m.to("cpu", torch.float16), torch.float16),
    "type": (lambda m: m.type(torch.float16), torch.float16),
    "like": (lambda m: m.to(torch.empty(0, dtype=torch.float16)), torch.float16),
    "apply": (lambda m: m._apply(lambda t: t.half()), torch.float16),
}


@pytest.mark.parametrize("how", CASTS)
@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_frozen_linear_keeps_codes_and_scales_in_casts(how, swap, bias):
    layer = make(dtype=torch.float32)
    if not bias:
        layer.bias = None
    before = copy.deepcopy(layer)
    cast, dtype = CASTS[how]
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        assert cast(layer) is layer
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert_same_bits(layer.weight, before.weight)
    assert_same_bits(layer.scales, before.scales)
    assert layer.compute_dtype == dtype
    assert layer.bias is None or layer.bias.dtype == dtype
    assert isinstance(layer.weight, nn.Parameter)
    assert not layer.weight.requires_grad


def test_frozen_linear_computes_in_the_dtype_it_was_cast_to():
    layer = make(dtype=torch.float32)
    x = torch.randn(4, 160)
    y = layer(x)
    half = layer.half()(x.half())
    assert half.dtype == torch.float16
    # The same codes and scales: x is rounded to 11 bits before and y after its 4 of FP8.
    torch.testing.assert_close(half.float(), y, rtol=2**-4, atol=2**-5)


def test_frozen_linear_goes_to_meta_and_comes_back():
    layer = make("blockwise")
    state = copy.deepcopy(layer.state_dict())
    expected = copy.deepcopy(layer)
    layer.to("meta")
    assert {p.device.type for p in layer.parameters()} == {"meta"}
    assert layer.weight.dtype == E4M3
    layer.to_empty(device="cpu")
    assert layer.weight.dtype == E4M3
    assert layer.scales.dtype == torch.float32
    layer.load_state_dict(state)
    assert_same_state(layer, expected)
    layer.to("meta").load_state_dict(state, assign=True)
    assert_same_state(layer, expected)
    assert layer.weight.data_ptr() == state["weight"].data_ptr()


def test_new_frozen_linear_is_zeros():
    layer = fp8.FrozenLinear(32, 16, dtype=torch.bfloat16)
    assert torch.equal(layer(torch.randn(2, 32).bfloat16()), torch.zeros(2, 16).bfloat16())
    layer = fp8.FrozenLinear(32, 16, device="meta", granularity="tensorwise", static_input=True)
    assert {p.device.type for p in layer.parameters()} == {"meta"}


def test_frozen_linear_in_shared_memory():
    layer = make()
    layer.share_memory()
    assert layer.weight.is_shared()
    assert layer.scales.is_shared()


@pytest.mark.parametrize("recipe", RECIPES)
def test_frozen_linear_compiles_and_exports(recipe):
    layer = make(recipe)
    x = torch.randn(4, 160, dtype=torch.bfloat16)
    y = layer(x)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert_same_bits(compiled(x), y)
    exported = torch.export.export(layer, (x,)).module()
    assert_same_bits(exported(x), y)


def test_frozen_linear_is_a_leaf_of_fx():
    model = nn.Sequential(make(), nn.ReLU())
    traced = torch.fx.symbolic_trace(model)
    assert traced.get_submodule("0") is model[0]
    x = torch.randn(2, 160, dtype=torch.bfloat16)
    assert_same_bits(traced(x), model(x))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_frozen_linear_takes_nested_tensors():
    layer = make()
    parts = [torch.randn(n, 160, dtype=torch.bfloat16) for n in (2, 3)]
    jagged = torch.nested.nested_tensor(parts, layout=torch.jagged)
    strided = torch.nested.nested_tensor(parts)
    for x in (jagged, strided):
        for y, part in zip(layer(x).unbind(), parts, strict=True):
            assert_same_bits(y, layer(part))


def test_frozen_linear_gives_gradients_of_input_and_bias_alone():
    layer = make(dtype=torch.float32)
    x = torch.randn(5, 160, requires_grad=True)
    dy = torch.randn(5, 144)
    layer(x).backward(dy)
    exact = dy.double() @ layer.dequantize(torch.float32).double()
    error = (x.grad.double() - exact).norm() / exact.norm()
    assert error < 2**-4  # dy may be quantized: e4m3 rounds to 4 bits
    torch.testing.assert_close(layer.bias.grad, dy.sum(0))
    assert layer.weight.grad is None


def test_frozen_linear_says_who_casts_its_input():
    """As T5 does: hidden_states.to(self.wo.weight.dtype)."""
    layer = make()
    with pytest.raises(TypeError, match="dtype of this layer's weight"):
        layer(torch.randn(2, 160).to(layer.weight.dtype))


def test_frozen_linear_from_linear_shares_the_bias_and_leaves_the_rest():
    linear = nn.Linear(32, 16)
    layer = fp8.FrozenLinear.from_linear(linear, "tensorwise")
    assert layer.bias is linear.bias
    assert type(linear) is nn.Linear
    assert linear.weight.dtype == torch.float32
    plain = fp8.Linear.from_linear(linear, "blockwise:power_of_two")
    layer = fp8.FrozenLinear.from_linear(plain)
    assert (layer.granularity, layer.input_granularity) == ("blockwise", "blockwise")
    assert layer.power_of_two
    assert "recipe" not in vars(layer)


def test_frozen_linear_from_linear_refuses_what_would_be_lost():
    class Own(nn.Linear):
        pass

    with pytest.raises(TypeError, match="no subclass, got Own"):
        fp8.FrozenLinear.from_linear(Own(4, 4))
    replaced = nn.Linear(4, 4)
    replaced.forward = lambda x: x
    with pytest.raises(TypeError, match="forward was replaced"):
        fp8.FrozenLinear.from_linear(replaced)
    with pytest.raises(TypeError, match="got float64"):
        fp8.FrozenLinear.from_linear(nn.Linear(4, 4).double())
    with pytest.raises(ValueError, match="expected a recipe"):
        fp8.FrozenLinear.from_linear(nn.Linear(4, 4), "rowwize")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e8m0fnu])
def test_frozen_linear_from_codes_takes_scales_exactly(dtype):
    layer = make("blockwise")
    scales = torch.tensor([[0.5, 2.0], [2**-10, 1.0]]).to(dtype)
    other = fp8.FrozenLinear.from_codes(layer.weight, scales, scale_name="weight_scale_inv")
    assert_same_bits(other.scales.detach(), scales.float())
    assert other.scale_name == "weight_scale_inv"
    assert (other.granularity, other.input_granularity) == ("blockwise", "blockwise")


def test_every_exponent_of_e8m0_is_exact():
    from fp8.nn._scales import to_float32

    codes = torch.arange(256, dtype=torch.uint8)
    found = to_float32(codes.view(torch.float8_e8m0fnu), "test")
    exact = torch.ldexp(torch.ones(255, dtype=torch.float64), torch.arange(255) - 127)
    assert torch.equal(found[:255].double(), exact)
    assert found[255].isnan()


@pytest.mark.parametrize(
    ("shape", "granularity"),
    [
        ((), "tensorwise"),
        ((1,), "tensorwise"),
        ((1, 1), "tensorwise"),
        ((300,), "rowwise"),
        ((300, 1), "rowwise"),
        ((1, 300), "rowwise"),
        ((3, 2), "blockwise"),
    ],
)
def test_frozen_linear_reads_the_shape_of_scales(shape, granularity):
    codes = torch.randn(300, 200).to(E4M3)
    layer = fp8.FrozenLinear.from_codes(codes, torch.rand(shape) + 1)
    assert layer.granularity == granularity
    assert layer.scales.shape == shape
    expected = "blockwise" if granularity == "blockwise" else "rowwise"
    assert layer.input_granularity == expected
    assert layer(torch.randn(2, 200)).isfinite().all()


def test_frozen_linear_from_codes_refuses_what_does_not_fit():
    codes, scale = torch.randn(300, 200).to(E4M3), torch.ones(())
    make = fp8.FrozenLinear.from_codes
    with pytest.raises(TypeError, match=r"float8_e4m3fn, got \[300, 200\] in float8_e4m3fnuz"):
        make(torch.randn(300, 200).to(torch.float8_e4m3fnuz), scale)
    with pytest.raises(ValueError, match=r"\[300, 1\] or \[3, 2\] .* got \[2, 3\] in float32"):
        make(codes, torch.ones(2, 3))
    with pytest.raises(TypeError, match=r"weight_scale: expected a scale in .* got float64"):
        make(codes, scale.double())
    with pytest.raises(ValueError, match=r"expected bias \[300\], got \[200\]"):
        make(codes, scale, torch.zeros(200))
    with pytest.raises(ValueError, match="input_scale of one element"):
        make(codes, scale, input_scale=torch.ones(2))
    with pytest.raises(ValueError, match="'tensorwise' beside a static input"):
        make(codes, scale, input_scale=scale, input_granularity="rowwise")
    with pytest.raises(ValueError, match="expected a granularity of"):
        make(codes, scale, input_granularity="channel")
    with pytest.raises(
        ValueError, match=r"'blockwise' beside a weight in blocks, .* got 'rowwise'"
    ):
        make(codes, torch.ones(3, 2), input_granularity="rowwise")
    with pytest.raises(ValueError, match="got 'blockwise' beside 'tensorwise'"):
        make(codes, scale, input_granularity="blockwise")
    with pytest.raises(ValueError, match="got 'tensorwise' beside 'blockwise'"):
        make(codes, torch.ones(3, 2), input_scale=scale)


@pytest.mark.parametrize("recipe", RECIPES)
def test_frozen_linear_in_autocast(recipe):
    """x and bias are cast, as those of nn.Linear; codes are not."""
    layer = make(recipe, dtype=torch.float32)
    x = torch.randn(3, 160)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert_same_bits(y, layer.to(torch.bfloat16)(x.bfloat16()))


def test_frozen_linear_in_inference_mode():
    layer = make()
    x = torch.randn(3, 160).bfloat16()
    y = layer(x)
    with torch.inference_mode():
        assert_same_bits(layer(x), y)


def test_frozen_linear_refuses_to_train_its_codes():
    layer = make()
    layer.requires_grad_(True)
    with pytest.raises(ValueError, match="without requires_grad"):
        layer(torch.randn(3, 160).bfloat16())


def test_frozen_linear_takes_another_way_to_scale_its_input():
    """A static scale may go: then x is scaled as a whole, or as one wishes."""
    layer = make("tensorwise", static=True)
    x = torch.randn(3, 160).bfloat16()
    layer.input_scale = None
    assert_same_bits(layer(x), make_again(layer, "tensorwise")(x))
    layer.input_granularity = "rowwise"
    assert_same_bits(layer(x), make_again(layer, "rowwise")(x))
    assert layer.describe() == "tensorwise, input rowwise"


def make_again(layer, input_granularity):
    return fp8.FrozenLinear.from_codes(
        layer.weight, layer.scales, layer.bias, input_granularity=input_granularity
    )


def test_frozen_linear_prints_how_it_scales():
    assert "frozen rowwise)" in repr(make("rowwise"))
    assert "frozen tensorwise, static input_scale)" in repr(make("tensorwise", static=True))
    layer = make("tensorwise")
    layer = fp8.FrozenLinear.from_codes(layer.weight, layer.scales)
    assert "frozen tensorwise, input rowwise)" in repr(layer)
