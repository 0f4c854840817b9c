"""Which modules fp8.convert leaves alone: always (safety rules) and by default."""

import functools

import pytest
import torch
from torch import nn

import fp8
from fp8.conversion import _rules as rules

# The tests here convert on purpose where nothing may be converted.
pytestmark = pytest.mark.filterwarnings("ignore:fp8.convert converted nothing")


def every(module, name):
    return True


def reason(model, name):
    """What fp8.summary says about one module."""
    rows = [line.split("  ") for line in fp8.summary(model).splitlines()]
    return next(row[-1].strip() for row in rows if row[0].strip() == name)


class Custom(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


class Wrapper(torch.Tensor):
    """A tensor subclass of the wrapping kind, as quantization libraries use for weights."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    def __tensor_flatten__(self):
        return ["inner"], None

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        assert func is torch.ops.aten.detach.default, func
        return Wrapper(args[0].inner)


def replaced_forward():
    linear = nn.Linear(16, 16)
    linear.forward = functools.partial(linear.forward)  # as accelerate's hooks do
    return linear


def wrapped_weight():
    linear = nn.Linear(16, 16, bias=False)
    linear.weight = nn.Parameter(Wrapper(torch.ones(16, 16)), requires_grad=False)
    return linear


def weight_norm():
    return torch.nn.utils.parametrizations.weight_norm(nn.Linear(16, 16))


def without_weight():
    linear = nn.Linear(16, 16)
    linear.weight = None
    return linear


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: Custom(16, 16), "a subclass of nn.Linear: Custom"),
        (lambda: nn.LazyLinear(16), "a subclass of nn.Linear: LazyLinear"),
        (weight_norm, "a subclass of nn.Linear: ParametrizedLinear"),
        (lambda: nn.Linear(16, 16, dtype=torch.float64), "float64 weight; FP8 takes bfloat16"),
        (lambda: nn.Linear(16, 16, dtype=torch.complex64), "complex64 weight; FP8 takes bfloat16"),
        (replaced_forward, "its forward was replaced on the instance; convert before that"),
        (wrapped_weight, "its weight is a tensor subclass: Wrapper"),
        (without_weight, "its weight is not a tensor"),
    ],
)
def test_convert_leaves_alone_whatever_the_filter_says(make, why):
    model = nn.ModuleDict({"odd": make(), "plain": nn.Linear(16, 16)})
    kind = type(model["odd"])
    fp8.convert(model, filter=every)
    assert type(model["odd"]) is kind
    assert not hasattr(model["odd"], "recipe")
    assert type(model["plain"]) is fp8.Linear
    assert why in reason(model, "odd")


def test_convert_takes_a_lazy_linear_once_it_is_one():
    model = nn.Sequential(nn.LazyLinear(16))
    model(torch.randn(2, 16))
    assert type(fp8.convert(model, filter=every)[0]) is fp8.Linear


def test_convert_leaves_the_layers_that_multihead_attention_reads():
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(16, 2, batch_first=True)
    model = nn.ModuleDict({"attention": attention, "plain": nn.Linear(16, 16)})
    x = torch.randn(2, 5, 16)
    expected = attention(x, x, x)[0]
    fp8.convert(model, filter=every)
    assert not isinstance(attention.out_proj, fp8.Linear)
    assert "NonDynamicallyQuantizableLinear" in reason(model, "attention.out_proj")
    for training in (True, False):
        assert torch.equal(model.train(training)["attention"](x, x, x)[0], expected)


def test_convert_leaves_a_plain_linear_that_multihead_attention_reads():
    class Attention(nn.MultiheadAttention):
        def __init__(self):
            super().__init__(16, 2)
            self.out_proj = nn.Linear(16, 16)
            self.extra = nn.Linear(16, 16)

    model = fp8.convert(Attention(), filter=every)
    assert type(model.out_proj) is nn.Linear
    assert type(model.extra) is fp8.Linear
    assert "out_proj of a MultiheadAttention: its weight is used by F." in reason(model, "out_proj")


def test_convert_leaves_a_module_that_is_read_under_another_name():
    attention = nn.MultiheadAttention(16, 2)
    attention.out_proj = nn.Linear(16, 16)
    model = nn.ModuleDict({"first": attention.out_proj, "attention": attention})
    fp8.convert(model, filter=every)
    assert type(model["first"]) is nn.Linear


def test_convert_leaves_the_layers_that_the_encoder_fast_path_reads():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    x = torch.randn(2, 5, 16)
    trained = layer(x)
    with torch.no_grad():
        inferred = layer.eval()(x)  # the fast path: reads linear1.weight and linear2.weight
    fp8.convert(layer, filter=every)
    assert type(layer.linear1) is type(layer.linear2) is nn.Linear
    assert "linear1 of a TransformerEncoderLayer" in reason(layer, "linear1")
    assert "linear2 of a TransformerEncoderLayer" in reason(layer, "linear2")
    assert torch.equal(layer.train()(x), trained)
    with torch.no_grad():
        assert torch.equal(layer.eval()(x), inferred)


@pytest.mark.parametrize("training", [True, False])
def test_convert_takes_the_decoder_layers_feed_forward(training):
    layer = nn.TransformerDecoderLayer(16, 2, 32, dropout=0.0, batch_first=True).train(training)
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        expected = layer(x, x)
        fp8.convert(layer, filter=every)
        assert type(layer.linear1) is type(layer.linear2) is fp8.Linear
        error = (layer(x, x) - expected).norm() / expected.norm()
    assert 0 < error < 0.1


def test_default_rules_leave_lm_head_alone():
    with torch.device("meta"):
        model = nn.ModuleDict(
            {
                "up": nn.Linear(4096, 14336),
                "lm_head": nn.Linear(4096, 32000),
                "lm_header": nn.Linear(4096, 32000),
                "inner": nn.ModuleDict({"lm_head": nn.Linear(4096, 32000)}),
            }
        )
    fp8.convert(model)
    assert type(model["up"]) is type(model["lm_header"]) is fp8.Linear
    assert type(model["lm_head"]) is type(model["inner"]["lm_head"]) is nn.Linear
    assert reason(model, "inner.lm_head") == "- (output head, kept in high precision by default)"


def test_default_rules_leave_lm_head_alone_under_either_name():
    with torch.device("meta"):
        model = nn.ModuleDict({"decoder": nn.Linear(4096, 32000), "up": nn.Linear(4096, 4096)})
    model["lm_head"] = model["decoder"]
    fp8.convert(model)
    assert type(model["decoder"]) is nn.Linear


def test_a_filter_replaces_the_default_rules():
    model = nn.ModuleDict({"lm_head": nn.Linear(16, 16), "small": nn.Linear(16, 16)})
    fp8.convert(model, filter=every)
    assert type(model["lm_head"]) is type(model["small"]) is fp8.Linear


# Shapes of Llama-3 (8B, 70B, 1B): the larger ones were measured to gain on Hopper.
@pytest.mark.parametrize("recipe", list(fp8.RECIPES))
@pytest.mark.parametrize(
    "shape", [(4096, 4096), (4096, 14336), (14336, 4096), (8192, 28672), (4096, 6144), (2048, 8192)]
)
def test_worthwhile_accepts_large_shapes(shape, recipe):
    assert rules.worthwhile(*shape, recipe) is None
    assert rules.worthwhile(*reversed(shape), recipe) is None


@pytest.mark.parametrize("recipe", list(fp8.RECIPES))
@pytest.mark.parametrize(
    "shape",
    [(256, 256), (768, 768), (4096, 8), (4096, 512), (128256, 512), (0, 64), (64, 0), (0, 0)],
)
def test_worthwhile_refuses_small_shapes(shape, recipe):
    assert rules.worthwhile(*shape, recipe).startswith("small: K*N/(K+N) = ")


@pytest.mark.parametrize("recipe", list(fp8.RECIPES))
def test_worthwhile_begins_at_its_constant(recipe):
    side = 2 * rules.MIN_WORK[recipe]  # K = N: K·N / (K + N) = K / 2
    assert rules.worthwhile(side, side, recipe) is None
    expected = f"small: K*N/(K+N) = {side // 2 - 1}, FP8 gains from {side // 2}"
    assert rules.worthwhile(side - 1, side, recipe) == expected


@pytest.mark.parametrize("recipe", list(fp8.RECIPES))
def test_default_rules_convert_what_is_worthwhile(recipe):
    shapes = [(4096, 14336), (4096, 1024), (4096, 256), (1024, 1024), (2048, 2048), (1536, 1536)]
    with torch.device("meta"):
        model = nn.ModuleList(nn.Linear(*shape) for shape in shapes)
    fp8.convert(model, recipe)
    got = [type(linear) is fp8.Linear for linear in model]
    assert got == [rules.worthwhile(*shape, recipe) is None for shape in shapes]
    assert True in got
    assert False in got


def linears(*shapes: tuple[int, int]) -> nn.ModuleList:
    with torch.device("meta"):
        return nn.ModuleList(nn.Linear(*shape) for shape in shapes)


# Measured alone, at 8192 tokens: see rules.MIN_MEAN_SIZE.
@pytest.mark.parametrize("shape", [(2048, 2048), (4096, 1024), (1024, 4096)])
def test_default_rules_leave_a_model_of_small_layers_alone(shape):
    model = linears(*[shape] * 5, (4096, 64))
    with pytest.warns(UserWarning, match="converted nothing"):
        fp8.convert(model)
    assert reason(model, "0") == (
        "- (small model: its linears average K*N = 4.2 million, FP8 gains from 6.0)"
    )
    assert reason(model, "5").startswith("- (small: K*N/(K+N)")


@pytest.mark.parametrize("shape", [(1024, 14336), (1536, 6144), (3072, 3072), (4096, 4096)])
def test_default_rules_convert_a_model_of_one_layer_that_gains(shape):
    assert type(fp8.convert(linears(shape))[0]) is fp8.Linear


def test_default_rules_judge_small_layers_by_their_model():
    """Llama-3-8B: k and v alone would not pay; what the rules leave alone does not count."""
    layer = [(4096, 4096)] * 2 + [(4096, 1024)] * 2 + [(4096, 14336)] * 3
    model = linears(*layer, *[(4096, 8)] * 100)
    fp8.convert(model)
    assert [type(m) is fp8.Linear for m in model] == [True] * 7 + [False] * 100
    assert "(not converted)" in reason(fp8.revert(model), "2")


def test_find_linears_survives_a_cycle_of_modules():
    model = nn.ModuleDict({"a": nn.Linear(16, 16)})
    model["self"] = model
    assert [found.name for found in rules.find_linears(model)] == ["a"]
