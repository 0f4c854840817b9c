"""fp8.ops: one typed, documented wrapper per public operator, with the same arguments."""

import inspect
import re

import pytest
import torch
from torch.overrides import TorchFunctionMode

import fp8

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def schemas():
    """The public operators: name -> schema."""
    every = torch._C._jit_get_all_schemas()
    public = [s for s in every if s.name.startswith("fp8::") and not s.name.startswith("fp8::_")]
    return {schema.name.removeprefix("fp8::"): schema for schema in public}


@pytest.mark.parametrize("name", sorted(set(fp8.ops.__all__) | set(schemas())))
def test_wrapper_matches_its_operator(name):
    assert name in fp8.ops.__all__
    assert name in schemas()
    wrapper = inspect.signature(getattr(fp8.ops, name)).parameters
    arguments = schemas()[name].arguments
    assert list(wrapper) == [argument.name for argument in arguments]
    for parameter, argument in zip(wrapper.values(), arguments, strict=True):
        optional = parameter.default is not inspect.Parameter.empty
        assert optional == argument.has_default_value(), parameter.name
        if optional and not isinstance(parameter.default, torch.dtype):  # None stands for a dtype
            assert parameter.default == argument.default_value, parameter.name


@pytest.mark.parametrize("name", fp8.ops.__all__)
def test_wrapper_is_documented_and_typed(name):
    wrapper = getattr(fp8.ops, name)
    doc = inspect.getdoc(wrapper)
    for part in ("Args:", "Returns:", "Example:", ">>> "):
        if part == "Args:" and "Args: as" in doc:
            continue
        assert part in doc, part
    for argument in inspect.signature(wrapper).parameters:
        assert re.search(rf"\b{argument}\b", doc) or "Args: as" in doc, argument
    assert "return" in wrapper.__annotations__


class Recorder(TorchFunctionMode):
    """Records the calls on tensors instead of carrying them out."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.calls.append((func, args, kwargs))


@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("name", fp8.ops.__all__)
def test_wrapper_passes_every_argument_on(name, flag):
    special = {"dtype": E5M2, "out_dtype": torch.float32, "fast_accum": flag, "recipe": "rowwise"}
    special["power_of_two"] = flag
    parameters = inspect.signature(getattr(fp8.ops, name)).parameters
    values = {key: special.get(key, torch.ones(())) for key in parameters}
    with Recorder() as recorder:
        getattr(fp8.ops, name)(**values)
    ((func, args, kwargs),) = recorder.calls
    assert func is getattr(torch.ops.fp8, name).default
    passed = [*args, *kwargs.values()]  # keyword-only arguments come last
    assert all(kwargs[key] is values[key] for key in kwargs)
    assert len(passed) == len(values)
    assert all(got is given for got, given in zip(passed, values.values(), strict=True))


def test_quantize_wrappers_return_tuples():
    x = torch.randn(4, 32)
    results = {
        "quantize_tensorwise": [(4, 32), ()],
        "quantize_rowwise": [(4, 32), (4, 1)],
        "quantize_tensorwise_transpose": [(4, 32), (32, 4), ()],
        "quantize_rowwise_transpose": [(4, 32), (32, 4), (4, 1), (32, 1)],
        "quantize_blockwise_1x128": [(4, 32), (4, 1)],
        "quantize_blockwise_1x128_transpose": [(4, 32), (32, 4), (4, 1), (32, 1)],
        "quantize_blockwise_128x128": [(4, 32), (1, 1)],
        "quantize_blockwise_128x128_transpose": [(4, 32), (32, 4), (1, 1), (1, 1)],
    }
    for name, shapes in results.items():
        got = getattr(fp8.ops, name)(x)
        assert isinstance(got, tuple)
        assert [tuple(tensor.shape) for tensor in got] == shapes


def test_defaults_are_e4m3_and_bfloat16():
    x = torch.randn(4, 32)
    assert fp8.ops.quantize_tensorwise(x)[0].dtype == E4M3
    assert fp8.ops.quantize_rowwise(x)[0].dtype == E4M3
    assert fp8.ops.quantize_tensorwise_transpose(x)[1].dtype == E4M3
    assert fp8.ops.quantize_rowwise_transpose(x)[1].dtype == E4M3
    data, scale = fp8.ops.quantize_rowwise(x)
    assert fp8.ops.dequantize(data, scale).dtype == torch.bfloat16
    assert fp8.ops.scaled_mm(data, data, scale, scale).dtype == torch.bfloat16
    assert torch.ops.fp8.quantize_rowwise(x)[0].dtype == E4M3
    assert torch.ops.fp8.scaled_mm(data, data, scale, scale).dtype == torch.bfloat16


def test_dequantize_wrapper_inverts_quantize():
    x = torch.randn(4, 32)
    for quantize in (fp8.ops.quantize_tensorwise, fp8.ops.quantize_rowwise):
        back = fp8.ops.dequantize(*quantize(x), torch.float32)
        # Half a unit in the third mantissa bit, relative; for values below the smallest normal, the
        # step is 2^-9 of scale units, at most amax / 448 here.
        bound = x.abs() / 16 + x.abs().max() / 448 / 2**9
        assert torch.all((back - x).abs() <= bound)


def test_scaled_mm_wrapper_passes_its_arguments_on():
    a, scale_a = fp8.ops.quantize_rowwise(torch.randn(8, 32))
    b, scale_b = fp8.ops.quantize_rowwise(torch.randn(16, 32))
    bias = torch.randn(16)
    got = fp8.ops.scaled_mm(a, b, scale_a, scale_b, bias, torch.float32, False)
    product = (a.float() * scale_a) @ (b.float() * scale_b).t()
    assert got.dtype == torch.float32
    assert torch.allclose(got, product + bias, rtol=1e-5, atol=1e-5)
    out = torch.ones(8, 16)
    assert fp8.ops.scaled_mm_accumulate_(out, a, b, scale_a, scale_b) is out
    assert torch.allclose(out, product + 1, rtol=1e-5, atol=1e-5)


def test_scaled_mm_wrapper_shows_the_operators_errors():
    a, scale_a = fp8.ops.quantize_rowwise(torch.randn(16, 32))
    b, scale_b = fp8.ops.quantize_rowwise(torch.randn(64, 48))
    message = (
        r"fp8::scaled_mm: a and b must share K, got a=\[16, 32\], b=\[64, 48\] \(b is \[N, K\]\)"
    )
    with pytest.raises(ValueError, match=message):
        fp8.ops.scaled_mm(a, b, scale_a, scale_b)


def test_fused_linear_wrapper_passes_its_arguments_on():
    x, weight, bias = torch.randn(2, 3, 32), torch.randn(16, 32), torch.randn(16)
    for recipe in fp8.RECIPES:
        expected = torch.ops.fp8.fused_linear(x, weight, bias, recipe)
        assert torch.equal(fp8.ops.fused_linear(x, weight, bias, recipe), expected)
    assert torch.equal(fp8.ops.fused_linear(x, weight), torch.ops.fp8.fused_linear(x, weight))
