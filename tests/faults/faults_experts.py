"""Faults of frozen experts: the operator, the module, checkpoints."""

from __future__ import annotations

from fault import EXPERTS, GROUPED, Fault

OPERATOR = f"{GROUPED}/test_experts_frozen.py"
ERRORS = f"{GROUPED}/test_experts_frozen_errors.py"
MODULE = "tests/python/frozen/test_frozen_experts.py"
FREEZE = f"{EXPERTS}/test_experts_freeze.py"
LOAD = "tests/python/checkpoints/test_load_experts.py"
SAVE = "tests/python/checkpoints/test_save_experts.py"
PRETRAINED = "tests/python/checkpoints/test_from_pretrained.py"
FORWARD = "csrc/torch/experts/experts_frozen.cpp"
BACKWARD = "csrc/torch/experts/backward.cpp"

FROZEN_EXPERTS = [
    Fault(
        "rows are multiplied with the scales of another expert",
        FORWARD,
        "experts.view({-1}).index_select(0, routing.source).clamp_(0, groups - 1);",
        "experts.view({-1}).clamp(0, groups - 1);",
        OPERATOR,
    ),
    Fault(
        "scales of blocks are not transposed with the codes of experts",
        FORWARD,
        "{turned, without_gaps(scale.transpose(1, 2)), Granularity::kBlock128x128, features};",
        "{turned, scale.reshape({groups, scale.size(2), scale.size(1)}), "
        "Granularity::kBlock128x128, features};",
        OPERATOR,
    ),
    Fault(
        "scales of experts are read with the strides of an extent of 1",
        FORWARD,
        "scale.is_contiguous() && scale.stride(1) == scale.size(2)",
        "scale.is_contiguous()",
        OPERATOR,
        gpu=True,
    ),
    Fault(
        "rows times small scales of experts vanish in fp16",
        FORWARD,
        "rows.scalar_type() == at::kHalf ? at::kFloat : rows.scalar_type();",
        "rows.scalar_type();",
        OPERATOR,
    ),
    Fault(
        "gradients of frozen experts lack the scales of rows",
        BACKWARD,
        "return !blocks && scale.numel() != routing.offsets.size(0);",
        "return false;",
        OPERATOR,
    ),
    Fault(
        "frozen experts quantize x without powers of two",
        FORWARD,
        "  recipe.power_of_two = power_of_two;\n",
        "",
        OPERATOR,
    ),
    Fault(
        "one block of an expert is always a block",
        "csrc/torch/experts/check.cpp",
        '? *input_granularity == "blockwise"',
        "? is_grid(gate_up, gate_up_scale) && is_grid(down, down_scale)",
        ERRORS,
    ),
    Fault(
        "the routing weights' gradient lacks down's bias",
        BACKWARD,
        "args.needs(needs::kWeights) && args.down_bias.defined()",
        "false",
        OPERATOR,
    ),
    Fault(
        "a cast of the model casts the codes of experts",
        "python/fp8/nn/_frozen_module.py",
        "if id(tensor) in own else fn(tensor)",
        "if False else fn(tensor)",
        MODULE,
    ),
    Fault(
        "experts take codes without their scale",
        "python/fp8/nn/_frozen_state.py",
        'if codes is not None and scale is None:\n            return f"{where}',
        'if False:\n            return f"{where}',
        MODULE,
    ),
    Fault(
        "frozen experts compute with another gate than they had",
        "python/fp8/nn/_frozen_experts.py",
        "            *self.gate_form,\n",
        "",
        FREEZE,
    ),
    Fault(
        "transposed experts are frozen as they lie",
        "python/fp8/nn/_frozen_stack.py",
        "quantized_part(matrix.t() if transposed else matrix, recipe)",
        "quantized_part(matrix.reshape(made.codes.shape[1:]), recipe)",
        FREEZE,
    ),
    Fault(
        "linears beside converted experts are frozen",
        "python/fp8/conversion/_freeze_experts.py",
        "return any(isinstance(m, Linear) or _experts.in_fp8(m) for m in model.modules())",
        "return any(isinstance(m, Linear) for m in model.modules())",
        FREEZE,
    ),
    Fault(
        "freezing one experts module takes the implementation of all",
        "python/fp8/conversion/_freeze_experts.py",
        "        _experts.drop_settings(module)\n",
        "        _experts.unset_fp8(module)\n",
        FREEZE,
    ),
    Fault(
        "up is loaded in gate's place",
        "python/fp8/checkpoints/_load.py",
        "put(stack, part.expert, part.first, own.weight, own.scale)",
        "put(stack, part.expert, 0, own.weight, own.scale)",
        LOAD,
    ),
    Fault(
        "scales of experts that transformers merged are of the first one",
        "python/fp8/checkpoints/_load.py",
        "put_scale(stack, part.expert, part.first, part.shape[0], scale)",
        "put_scale(stack, 0, part.first, part.shape[0], scale)",
        PRETRAINED,
    ),
    Fault(
        "blocks that lie across gate and up are taken apart",
        "python/fp8/checkpoints/_experts_plan.py",
        "gate_up[0].expert == ALL or gate_up[0].shape[0] % 128 == 0",
        "True",
        LOAD,
    ),
    Fault(
        "rows of gate and up that alternate are saved as halves",
        "python/fp8/checkpoints/_experts_export.py",
        "    if is_interleaved(module):\n",
        "    if False:\n",
        SAVE,
    ),
    Fault(
        "a router is missing among what is not in FP8",
        "python/fp8/checkpoints/_save.py",
        "    plain += _routers(model)\n",
        "",
        SAVE,
    ),
]
