"""What is quantized once: the input of several layers, and weights inside fp8.cached_weights."""

from __future__ import annotations

import copy
import importlib
import pickle

import pytest
import torch

import fp8

RECIPES = ("tensorwise", "rowwise", "blockwise")


def saved_pointers(run):
    """Addresses of the FP8 tensors that autograd keeps while `run` makes a graph."""
    found = []

    def pack(tensor):
        if tensor.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
            found.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = run()
    return found, kept


def activation(device):
    """The result of an operator in the graph, as a norm's output is; its history, too, is kept."""
    torch.manual_seed(1)
    return torch.randn(32, 64, device=device, dtype=torch.bfloat16, requires_grad=True) * 1


def layers(device, count=3, recipe="tensorwise"):
    torch.manual_seed(0)
    return [
        fp8.Linear(64, 48, device=device, dtype=torch.bfloat16, recipe=recipe) for _ in range(count)
    ]


@pytest.mark.parametrize("recipe", RECIPES)
def test_an_input_is_quantized_once_for_all_its_layers(device, recipe):
    q, k, v = layers(device, recipe=recipe)
    x = activation(device)
    pointers, outputs = saved_pointers(lambda: [layer(x) for layer in (q, k, v)])
    assert len(pointers) == 3
    assert len(set(pointers)) == 1
    alone = [layer(x.clone()) for layer in (q, k, v)]
    for shared, single in zip(outputs, alone, strict=True):
        assert torch.equal(shared, single)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.mul_(2),
        lambda x: x.__setattr__("data", x.data * 2),
        lambda x: x.t_().mul_(2).t_(),
    ],
    ids=["in place", "data", "transposed and back"],
)
def test_a_changed_input_is_quantized_again(device, recipe, change):
    (layer,) = layers(device, 1, recipe)
    x = activation(device)
    before = layer(x)
    change(x)
    after = layer(x)
    assert torch.equal(after, layer(x.clone()))
    assert not torch.equal(after, before)


def test_a_remembered_input_is_not_mistaken_for_another_view(device):
    first, second = layers(device, 2)
    x = torch.randn(64, 64, device=device, dtype=torch.bfloat16, requires_grad=True) * 1
    first(x)
    x.data = x.data.t()  # the same memory, sizes and version
    assert torch.equal(second(x), second(x.clone()))
    x.data = x.data.t()
    assert torch.equal(second(x.t()), second(x.t().clone()))
    assert torch.equal(second(x[:32]), second(x[:32].clone()))


def test_a_frozen_layer_does_not_deprive_the_next_one(device):
    """The first call needs no transposed copy, the second does."""
    frozen, trained = layers(device, 2)
    frozen.weight.requires_grad_(False)
    x = activation(device)
    (frozen(x) + trained(x)).sum().backward()
    expected = x.detach().clone().requires_grad_()
    other = torch.autograd.grad(trained(expected).sum(), trained.weight)[0]
    assert torch.equal(trained.weight.grad, other)


def test_a_buffer_is_quantized_in_every_call(device):
    """Nothing counts a write through .data, nor one of a kernel that PyTorch does not know."""
    (layer,) = layers(device, 1)
    buffer = torch.randn(32, 64, device=device, dtype=torch.bfloat16)
    before = layer(buffer)
    buffer.data.mul_(-1)
    assert not torch.equal(layer(buffer), before)


def test_a_part_of_a_parameter_is_quantized_in_every_call(device):
    """It is no leaf, but lives as long as one; a fused optimizer counts no version."""
    (layer,) = layers(device, 1)
    table = torch.nn.Parameter(torch.randn(40, 64, device=device, dtype=torch.bfloat16))
    table.grad = torch.randn_like(table)
    x = table[:32]
    before = layer(x).detach()
    torch.optim.AdamW([table], lr=1.0, fused=True).step()
    assert torch.equal(layer(x), layer(x.detach().clone()))
    assert not torch.equal(layer(x), before)


def test_a_backward_ends_the_sharing(device):
    (layer,) = layers(device, 1)
    x = activation(device)
    before = layer(x)
    before.sum().backward()
    x.data.mul_(-1)
    assert not torch.equal(layer(x), before)


def test_inputs_are_let_go_with_their_tensors(device):
    (layer,) = layers(device, 1)
    gone = []
    x = activation(device)
    torch.utils.weak.weakref.finalize(x, gone.append, True)
    layer(x)
    del x
    assert gone


@pytest.mark.parametrize("other", ["rowwise", "tensorwise:power_of_two"])
def test_recipes_do_not_share(device, other):
    tensorwise, second = layers(device, 1)[0], layers(device, 1, other)[0]
    x = activation(device)
    tensorwise(x)
    assert torch.equal(second(x), second(x.clone()))
    with fp8.cached_weights(tensorwise):  # the weight under two recipes
        tensorwise(x)
        second.weight = tensorwise.weight
        assert torch.equal(second(x), second(x.clone()))
        expected = fp8.ops.fused_linear(x.clone(), second.weight.clone(), second.bias, other)
        assert torch.equal(second(x), expected)


@pytest.mark.parametrize("recipe", RECIPES)
def test_cached_weights_change_nothing_but_the_work(device, recipe):
    (layer,) = layers(device, 1, recipe)
    batches = [torch.randn(32, 64, device=device, dtype=torch.bfloat16) for _ in range(3)]

    def gradients():
        layer.zero_grad()
        inputs = [batch.clone().requires_grad_() for batch in batches]
        outputs = [layer(x) for x in inputs]
        for y in outputs:
            y.square().sum().backward()
        return [layer.weight.grad, layer.bias.grad, *(x.grad for x in inputs), *outputs]

    plain = gradients()
    with fp8.cached_weights(layer):
        cached = gradients()
    for one, other in zip(plain, cached, strict=True):
        assert torch.equal(one, other)


def test_cached_weights_notice_a_counted_update(device):
    (layer,) = layers(device, 1)
    x = torch.randn(32, 64, device=device, dtype=torch.bfloat16)
    with fp8.cached_weights(layer), torch.no_grad():
        before = layer(x)
        layer.weight.mul_(-1)
        assert not torch.equal(layer(x), before)


FUSED = ("Adam", "AdamW", "SGD", "Adagrad")


@pytest.mark.parametrize("how", ["fused", "foreach", "plain", "scheduler", "closure", "compiled"])
@pytest.mark.parametrize("name", FUSED)
def test_cached_weights_notice_a_step_of_an_optimizer(device, name, how):
    """Fused ones change a weight without its version counter."""
    if name == "Adagrad" and device == "cuda" and how != "plain":
        pytest.skip("PyTorch has no fused Adagrad for CUDA")
    layer = fp8.Linear(64, 48, device=device)  # fp32: fused SGD leaves bf16 on a CPU as it is
    grouped = fp8.GroupedLinear(2, 64, 48, device=device)
    model = torch.nn.ModuleList([layer, grouped])
    option = {"plain": {}, "foreach": {"foreach": True}}.get(how, {"fused": True})
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.1, **option)
    if how == "scheduler":
        torch.optim.lr_scheduler.StepLR(optimizer, 1)  # it wraps step
    x = torch.randn(32, 64, device=device)
    offsets = torch.tensor([10, 32], dtype=torch.int32, device=device)

    def outputs():
        return layer(x), grouped(x, offsets)

    def loss():
        return sum(y.square().mean() for y in outputs())

    step = optimizer.step
    if how == "closure":
        step = lambda: optimizer.step(loss)  # noqa: E731
    if how == "compiled":
        torch._dynamo.reset()
        step = torch.compile(optimizer.step, backend="aot_eager")
    with fp8.cached_weights(model):
        for _ in range(2):
            before = [y.detach() for y in outputs()]
            loss().backward()
            with fp8.cached_weights(model):
                step()
            after = outputs()
            assert not any(map(torch.equal, before, after))
    for cached, plain in zip(after, outputs(), strict=True):
        assert torch.equal(cached, plain)


def test_cached_weights_notice_a_step_that_fails_half_way(device):
    (layer,) = layers(device, 1)
    x = torch.randn(32, 64, device=device, dtype=torch.bfloat16)

    class Fails(torch.optim.Optimizer):
        def __init__(self, parameters):
            super().__init__(parameters, {})

        @torch.no_grad()
        def step(self):
            weight = layer.weight
            torch._fused_adamw_(
                [weight],
                [torch.ones_like(weight)],
                *([torch.zeros_like(weight)] for _ in range(2)),
                [],
                [torch.ones((), device=device)],
                **{"lr": 1.0, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.0, "eps": 1e-8},
                **{"amsgrad": False, "maximize": False},
            )
            raise RuntimeError("half way")

    optimizer = Fails(layer.parameters())
    with fp8.cached_weights(layer):
        before = layer(x)
        version = layer.weight._version
        with pytest.raises(RuntimeError, match="half way"):
            optimizer.step()
        assert layer.weight._version == version  # else it was noticed without the hook
        assert not torch.equal(layer(x), before)


def _add_to_data(weight):
    weight.data += 1


WRITES = {
    "copy": lambda weight: weight.data.copy_(-weight),
    "add": _add_to_data,
    "set": lambda weight: setattr(weight, "data", -weight.detach()),
    "foreach": lambda weight: torch._foreach_neg_([weight.data]),
    "vector": lambda weight: torch.nn.utils.vector_to_parameters(
        torch.randn(48 * 64, device=weight.device), [weight]
    ),
}


@pytest.mark.parametrize("grouped", [False, True], ids=["linear", "grouped"])
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_cached_weights_notice_what_is_written_through_data(device, write, grouped):
    """As adapters are merged, averages copied in, and older optimizers write."""
    if grouped:
        layer = fp8.GroupedLinear(1, 64, 48, device=device)
        offsets = (torch.tensor([32], dtype=torch.int32, device=device),)
    else:
        layer, offsets = fp8.Linear(64, 48, device=device), ()
    x = torch.randn(32, 64, device=device)
    with torch.no_grad():
        with fp8.cached_weights(layer), fp8.cached_weights(layer):
            for _ in range(2):
                before = layer(x, *offsets)
                write(layer.weight)
                inside = layer(x, *offsets)
                assert not torch.equal(inside, before)
        assert torch.equal(layer(x, *offsets), inside)


def test_cached_weights_leave_parameters_as_they_were(device):
    """In the context they are a subclass; copies and pickles are not, nor are they afterwards."""
    layer = fp8.Linear(64, 48, device=device)
    layer.weight.main_grad = torch.ones(1)
    weight = layer.weight
    with fp8.cached_weights(layer):
        assert layer.weight is weight
        assert isinstance(weight, torch.nn.Parameter)
        assert weight.data_ptr() == weight.data.data_ptr()
        copied = copy.deepcopy(layer)
        pickled = pickle.loads(pickle.dumps(layer))
        for other in (copied, pickled):
            assert type(other.weight) is torch.nn.Parameter
            assert torch.equal(other.weight, weight)
        assert torch.equal(pickled.weight.main_grad, weight.main_grad)
        assert "Parameter containing" in repr(weight)
        assert type(weight + 1) is torch.Tensor
        assert type(weight.detach()) is torch.Tensor
        layer.weight = torch.nn.Parameter(torch.zeros(48, 64, device=device))
    assert type(weight) is type(layer.weight) is torch.nn.Parameter


def test_cached_weights_watch_until_the_last_context_ends(device):
    layer = fp8.Linear(64, 48, device=device)
    x = torch.randn(32, 64, device=device)
    first, second = fp8.cached_weights(layer), fp8.cached_weights(layer)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    with torch.no_grad():
        before = layer(x)
        layer.weight.data.mul_(-3)
        assert not torch.equal(layer(x), before)
    assert type(type(layer.weight)(layer.weight.detach())) is torch.nn.Parameter
    second.__exit__(None, None, None)
    assert type(layer.weight) is torch.nn.Parameter


@pytest.mark.parametrize("inside", [False, True])
def test_cached_weights_of_a_compiled_layer(device, inside):
    torch._dynamo.reset()
    layer = fp8.Linear(64, 48, device=device)
    x = torch.randn(32, 64, device=device)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    if not inside:
        compiled(x)
    for _ in range(2):
        with fp8.cached_weights(layer):
            assert torch.equal(compiled(x), layer(x))
            layer.weight.data.neg_()
            assert torch.equal(compiled(x), layer(x))
        assert torch.equal(compiled(x), layer(x))


def test_cached_weights_leave_no_hook_behind():
    hooks = importlib.import_module("torch.optim.optimizer")
    before = [dict(hooks._global_optimizer_pre_hooks), dict(hooks._global_optimizer_post_hooks)]
    with fp8.cached_weights(torch.nn.Linear(1, 1)):
        pass
    with pytest.raises(KeyError), fp8.cached_weights(torch.nn.Linear(1, 1)):
        raise KeyError
    after = [dict(hooks._global_optimizer_pre_hooks), dict(hooks._global_optimizer_post_hooks)]
    assert after == before


def test_cached_weights_are_kept_only_inside(device):
    """A change that leaves no trace is missed inside, as documented, and seen after."""
    (layer,) = layers(device, 1)
    alias = layer.weight.data
    x = torch.randn(32, 64, device=device, dtype=torch.bfloat16)
    with torch.no_grad():
        with fp8.cached_weights(layer):
            with fp8.cached_weights(layer):
                before = layer(x)
            alias.mul_(-1)
            assert torch.equal(layer(x), before)
        assert not torch.equal(layer(x), before)


def test_cached_weights_error_not_a_module():
    expected = pytest.raises(
        TypeError, match=r"fp8.cached_weights: expected an nn.Module, got list"
    )
    with expected, fp8.cached_weights([]):
        pass
