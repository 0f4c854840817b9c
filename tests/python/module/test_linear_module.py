"""fp8.Linear: everything that nn.Linear promises, with FP8 inside."""

import copy
import inspect
import io
import pickle

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

import fp8

RECIPES = sorted(fp8.RECIPES)


def pair(bias=True, dtype=torch.float32, recipe="tensorwise"):
    """An nn.Linear and an fp8.Linear of the same values, and an input."""
    torch.manual_seed(0)
    reference = nn.Linear(64, 48, bias, dtype=dtype)
    layer = fp8.Linear(64, 48, bias, dtype=dtype, recipe=recipe)
    layer.load_state_dict(reference.state_dict())
    return reference, layer, torch.randn(5, 64, dtype=dtype)


def relative_error(got, expected):
    return ((got.float() - expected.float()).norm() / expected.float().norm()).item()


class Calls(TorchFunctionMode):
    """Records the functions that are called on tensors."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_linear_computes_in_fp8(recipe, bias, dtype):
    reference, layer, x = pair(bias, dtype, recipe)
    y = layer(x)
    assert (y.shape, y.dtype) == ((5, 48), dtype)
    # e4m3 rounds to 3 mantissa bits: the rms error of a product of two such operands is near 4%.
    # No error at all would mean that nothing was quantized.
    assert 0.005 < relative_error(y, reference(x)) < 0.08


@pytest.mark.parametrize("recipe", RECIPES)
def test_linear_forward_is_one_operator_call(recipe):
    _, layer, x = pair(recipe=recipe)
    with Calls() as calls:
        y = layer(x)
    operators = [call for call in calls.seen if isinstance(call, torch._ops.OpOverload)]
    assert operators == [torch.ops.fp8.fused_linear.default]
    if recipe != "delayed":  # which asks where its history and its weight are
        assert calls.seen == operators
    assert torch.equal(y, fp8.ops.fused_linear(x, layer.weight, layer.bias, recipe))


@pytest.mark.parametrize("recipe", RECIPES)
def test_linear_has_gradients(recipe):
    reference, layer, x = pair(recipe=recipe)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    for module, leaf in zip((reference, layer), inputs, strict=True):
        (module(leaf) ** 2).sum().backward()
    assert relative_error(inputs[1].grad, inputs[0].grad) < 0.15
    assert relative_error(layer.weight.grad, reference.weight.grad) < 0.15
    assert relative_error(layer.bias.grad, reference.bias.grad) < 0.15


def test_linear_signature_extends_nn_linear():
    theirs = inspect.signature(nn.Linear).parameters
    ours = dict(inspect.signature(fp8.Linear).parameters)
    recipe = ours.pop("recipe")
    assert (recipe.kind, recipe.default) == (inspect.Parameter.KEYWORD_ONLY, "tensorwise")
    assert list(ours) == list(theirs)
    assert [p.default for p in ours.values()] == [p.default for p in theirs.values()]


def test_linear_initializes_like_nn_linear():
    torch.manual_seed(1)
    reference = nn.Linear(64, 48)
    torch.manual_seed(1)
    layer = fp8.Linear(64, 48)
    assert torch.equal(layer.weight, reference.weight)
    assert torch.equal(layer.bias, reference.bias)


def test_linear_is_an_nn_linear():
    layer = fp8.Linear(8, 4, bias=False, dtype=torch.bfloat16)
    assert isinstance(layer, nn.Linear)
    assert layer.bias is None
    assert layer.weight.dtype == torch.bfloat16
    assert (layer.in_features, layer.out_features) == (8, 4)


def test_linear_repr_shows_the_recipe():
    layer = fp8.Linear(8, 4, recipe="rowwise")
    assert repr(layer) == "Linear(in_features=8, out_features=4, bias=True, recipe=rowwise)"


def test_linear_refuses_an_unknown_recipe():
    with pytest.raises(
        ValueError, match=r"expected a recipe out of 'tensorwise', 'rowwise', .*, got 'colwise'"
    ):
        fp8.Linear(8, 4, recipe="colwise")


def test_linear_recipe_is_keyword_only():
    with pytest.raises(TypeError, match="positional"):
        fp8.Linear(8, 4, True, None, None, "rowwise")


def test_linear_with_a_wrong_recipe_set_later_fails_in_forward():
    layer = fp8.Linear(16, 16)
    layer.recipe = "colwise"
    with pytest.raises(
        ValueError, match=r"fused_linear: expected a recipe out of .* got 'colwise'"
    ):
        layer(torch.randn(2, 16))


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
def test_linear_holds_other_dtypes_but_does_not_compute(dtype):
    layer = fp8.Linear(16, 16, dtype=dtype)
    with pytest.raises(TypeError, match="fused_linear"):
        layer(torch.ones(2, 16, dtype=dtype))


def test_linear_refuses_integer_input():
    with pytest.raises(TypeError, match="fused_linear"):
        fp8.Linear(16, 16)(torch.ones(2, 16, dtype=torch.int64))


def test_linear_state_dict_goes_both_ways():
    reference, layer, x = pair()
    assert list(layer.state_dict()) == list(reference.state_dict())
    back = nn.Linear(64, 48)
    back.load_state_dict(layer.state_dict(), strict=True)
    assert torch.equal(back(x), reference(x))
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]
    assert list(layer.buffers()) == []


def test_linear_deepcopy_is_independent():
    _, layer, x = pair(recipe="rowwise")
    expected = layer(x)
    twin = copy.deepcopy(layer)
    assert (type(twin), twin.recipe) == (fp8.Linear, "rowwise")
    with torch.no_grad():
        layer.weight.zero_()
    assert torch.equal(twin(x), expected)


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_linear_pickles(protocol):
    _, layer, x = pair(recipe="rowwise")
    twin = pickle.loads(pickle.dumps(layer, protocol))
    assert (type(twin), twin.recipe) == (fp8.Linear, "rowwise")
    assert torch.equal(twin(x), layer(x))


def test_linear_saves_and_loads():
    _, layer, x = pair(recipe="rowwise")
    whole, state = io.BytesIO(), io.BytesIO()
    torch.save(layer, whole)
    torch.save(layer.state_dict(), state)
    whole.seek(0)
    state.seek(0)
    twin = torch.load(whole, weights_only=False)
    other = fp8.Linear(64, 48, recipe="rowwise")
    other.load_state_dict(torch.load(state, weights_only=True))
    assert twin.recipe == "rowwise"
    assert torch.equal(twin(x), layer(x))
    assert torch.equal(other(x), layer(x))


def test_linear_loads_a_pickle_without_recipe():
    _, layer, x = pair()
    expected = layer(x)
    del vars(layer)["recipe"]
    twin = pickle.loads(pickle.dumps(layer))
    assert twin.recipe == "tensorwise"
    assert torch.equal(twin(x), expected)


def test_linear_works_with_functional_call():
    _, layer, x = pair()
    params = {"weight": torch.randn(48, 64), "bias": torch.randn(48)}
    y = torch.func.functional_call(layer, params, x)
    assert torch.equal(y, fp8.ops.fused_linear(x, params["weight"], params["bias"]))
    assert not torch.equal(y, layer(x))


def test_linear_works_on_meta():
    layer = fp8.Linear(64, 48, device="meta", dtype=torch.bfloat16)
    y = layer(torch.empty(2, 3, 64, device="meta", dtype=torch.bfloat16))
    assert (y.device.type, y.shape, y.dtype) == ("meta", (2, 3, 48), torch.bfloat16)
    assert layer.to_empty(device="cpu")(torch.zeros(1, 64, dtype=torch.bfloat16)).shape == (1, 48)


def test_linear_works_with_skip_init():
    layer = torch.nn.utils.skip_init(fp8.Linear, 64, 48, recipe="rowwise")
    nn.init.ones_(layer.weight)
    nn.init.zeros_(layer.bias)
    assert (type(layer), layer.recipe, layer.weight.device.type) == (fp8.Linear, "rowwise", "cpu")
    # Ones are exact in FP8 when every row's amax is 1 (the scale is 1/448, 448·1 = 448).
    assert torch.allclose(layer(torch.ones(1, 64)), torch.full((1, 48), 64.0), rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_linear_converts_dtype(dtype):
    layer = fp8.Linear(64, 48, recipe="rowwise").double().to(dtype)
    assert layer.recipe == "rowwise"
    assert layer(torch.randn(3, 64, dtype=dtype)).dtype == dtype


def test_linear_half_and_bfloat16_methods():
    assert fp8.Linear(64, 48).half()(torch.randn(3, 64).half()).dtype == torch.float16
    assert fp8.Linear(64, 48).bfloat16()(torch.randn(3, 64).bfloat16()).dtype == torch.bfloat16


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", RECIPES)
def test_linear_moves_to_the_gpu(recipe):
    reference, layer, x = pair(dtype=torch.bfloat16, recipe=recipe)
    y = layer.cuda()(x.cuda())
    assert y.device.type == "cuda"
    assert relative_error(y.cpu(), reference(x)) < 0.08


def test_parametrized_linear_still_computes_in_fp8():
    _, layer, x = pair()
    parametrize = torch.nn.utils.parametrize
    parametrize.register_parametrization(layer, "weight", nn.Tanh())
    assert torch.equal(layer(x), fp8.ops.fused_linear(x, layer.weight, layer.bias))
    parametrize.remove_parametrizations(layer, "weight")
    assert type(layer) is fp8.Linear
