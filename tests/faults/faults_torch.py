"""Faults in what Python adds for the rest of PyTorch: checkpoints, fx, vmap, nested tensors."""

from __future__ import annotations

from fault import Fault

MODULE = "tests/python/module"
COMPAT = "tests/python/compat"
CHECKPOINT = "python/fp8/nn/_distributed_checkpoint.py"

TORCH = [
    Fault(
        "torch.distributed.checkpoint leaves scales behind",
        CHECKPOINT,
        "        _ask_for_scales(self)\n",
        "",
        f"{MODULE}/test_scale_checkpoint.py",
    ),
    Fault(
        "a scale that was read waits for load_state_dict, which need not come",
        CHECKPOINT,
        "        layer._take_scale(scale)\n",
        "        pass\n",
        f"{MODULE}/test_scale_checkpoint.py",
    ),
    Fault(
        "a scale of the checkpoint before stays with a state_dict",
        CHECKPOINT,
        "            _scales.pop(tensor, None)  # of another checkpoint\n",
        "            pass\n",
        f"{MODULE}/test_scale_checkpoint.py",
    ),
    Fault(
        "DTensors made of a full state_dict lose the scale",
        CHECKPOINT,
        "if read is None and len(_scales) and _is_dtensor(weight):",
        "if False:",
        f"{MODULE}/test_scale_checkpoint.py",
    ),
    Fault(
        "a scale goes where offloaded weights are, on meta",
        "python/fp8/nn/_offload.py",
        "if isinstance(weight, Tensor) and not weight.is_meta:",
        "if isinstance(weight, Tensor):",
        f"{MODULE}/test_scale_buffer.py",
    ),
    Fault(
        "offloaded buffers are loaded without the new scale",
        "python/fp8/nn/_offload.py",
        '            values[key] = scale.detach().to("cpu")\n',
        "            pass\n",
        f"{MODULE}/test_scale_buffer.py",
    ),
    Fault(
        "a scale in the dtype of FSDP's buffers reaches the operator",
        "python/fp8/nn/_linear.py",
        "            scale = scale.float()  # something",
        "            pass  # something",
        f"{MODULE}/test_scale_buffer.py",
    ),
    Fault(
        "a loaded scale takes the place of no other dtype",
        "python/fp8/nn/_linear.py",
        "if own is None or own.dtype != torch.float32:",
        "if own is None:",
        f"{MODULE}/test_scale_buffer.py",
    ),
    Fault(
        "register_buffer meets the property",
        "python/fp8/nn/_linear.py",
        "            self._buffers.setdefault(name, None)  # else",
        "            pass  # else",
        f"{MODULE}/test_scale_buffer.py",
    ),
    Fault(
        "a weight of another library gives the dispatcher's error",
        "python/fp8/nn/_operands.py",
        "if _is_torchs(type(weight)) or _is_usual(weight):",
        "if True:",
        f"{MODULE}/test_weight_subclasses.py",
    ),
    Fault(
        "traced hooks run twice",
        "python/fp8/nn/_operands.py",
        "if not any(hooks) and not layer._backward_pre_hooks:",
        "if True:",
        f"{COMPAT}/test_fx.py",
    ),
    Fault(
        "rows between the members of a nested tensor enter its scale",
        "python/fp8/_native/nested.py",
        "if lengths is not None:",
        "if False:",
        f"{COMPAT}/test_nested.py",
    ),
    Fault(
        "every example of a batch is the first",
        "python/fp8/_native/functorch.py",
        "value.select(dim, i)",
        "value.select(dim, 0)",
        f"{COMPAT}/test_vmap.py",
    ),
    Fault(
        "a backward counts one product too few",
        "python/fp8/_native/flops.py",
        "products = needs_dx + needs_dweight",
        "products = needs_dx",
        f"{COMPAT}/test_flop_counter.py",
    ),
    Fault(
        "importing fp8 fills the flop counter's registry",
        "python/fp8/_native/flops.py",
        "        original = op.default.decompose\n",
        "        original = op.default.decompose\n        _register()\n",
        f"{COMPAT}/test_flop_counter.py",
    ),
    Fault(
        "policies do not hear of experts",
        "python/fp8/ops/_checkpointing.py",
        "        _ops._moe_forward.default,\n",
        "",
        f"{COMPAT}/test_selective_checkpointing.py",
    ),
]
