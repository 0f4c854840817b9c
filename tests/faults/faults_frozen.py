"""Faults of frozen layers and FP8 checkpoints: nothing to compile."""

from __future__ import annotations

from fault import Fault

FROZEN_LAYER = "tests/python/frozen/test_frozen_linear.py"
STATE = "tests/python/frozen/test_frozen_state.py"
FREEZE = "tests/python/frozen/test_freeze.py"
RULES = "tests/python/frozen/test_freeze_rules.py"
LOAD = "tests/python/checkpoints/test_load.py"
ERRORS = "tests/python/checkpoints/test_load_errors.py"
MIXTURES = "tests/python/checkpoints/test_load_experts.py"
SAVE = "tests/python/checkpoints/test_save.py"
PRETRAINED = "tests/python/checkpoints/test_from_pretrained.py"
READS = "tests/python/frozen/test_frozen_reads.py"

FROZEN = [
    Fault(
        "code that merges adapters gets codes for numbers",
        "python/fp8/nn/_frozen_reads.py",
        '"forward", "get_base_weight", "merge", "unmerge"',
        '"forward"',
        READS,
    ),
    Fault(
        "whoever has a function called merge is refused the weight",
        "python/fp8/nn/_frozen_reads.py",
        'and module.startswith("peft.")',
        "",
        READS,
    ),
    Fault(
        "a cast of the model casts codes",
        "python/fp8/nn/_frozen_module.py",
        "if id(tensor) in own else fn(tensor)",
        "if False else fn(tensor)",
        FROZEN_LAYER,
    ),
    Fault(
        "type(dtype) casts codes as integers",
        "python/fp8/nn/_frozen_state.py",
        "    if result.dtype is not bits.dtype:",
        "    if False:",
        FROZEN_LAYER,
    ),
    Fault(
        "a pickle of codes is one of float8",
        "python/fp8/nn/_frozen_state.py",
        "return _seen_as(torch.uint8, torch.float8_e4m3fn, parameters, names)",
        "return parameters",
        FROZEN_LAYER,
    ),
    Fault(
        "exponents are off by one",
        "python/fp8/nn/_scales.py",
        "bits = exponent << 23",
        "bits = (exponent + 1) << 23",
        FROZEN_LAYER,
    ),
    Fault(
        "scales of blocks are taken for those of rows",
        "python/fp8/nn/_scales.py",
        '    if shape == blocks_of(rows, cols):\n        return "blockwise"',
        '    if shape == blocks_of(rows, cols):\n        return "rowwise"',
        FROZEN_LAYER,
    ),
    Fault(
        "numbers of a state_dict become codes",
        "python/fp8/nn/_frozen_state.py",
        "weight.dtype is not torch.float8_e4m3fn:\n        got",
        "False:\n        got",
        STATE,
    ),
    Fault(
        "codes are loaded and their scale stays",
        "python/fp8/nn/_frozen_state.py",
        "    if weight is not None and scale is None:",
        "    if False:",
        STATE,
    ),
    Fault(
        "layers that share a scale are quantized alone",
        "python/fp8/nn/_freezing.py",
        'len(weights) > 1 and found.granularity == "tensorwise"',
        "False",
        FREEZE,
    ),
    Fault(
        "padding of the quantize kernels stays in memory",
        "python/fp8/nn/_freezing.py",
        "    return tensor if fits else",
        "    return tensor if True else",
        FROZEN_LAYER,
    ),
    Fault(
        "powers of two are forgotten",
        "python/fp8/nn/_freezing.py",
        "            found.power_of_two,\n",
        "            False,\n",
        FREEZE,
    ),
    Fault(
        "the static scale of an input is forgotten",
        "python/fp8/nn/_freezing.py",
        "    return None if scale is None else scale",
        "    return None if True else scale",
        FREEZE,
    ),
    Fault(
        "tied weights are frozen apart",
        "python/fp8/conversion/_freeze.py",
        "            if other is not None:\n",
        "            if False:\n",
        RULES,
    ),
    Fault(
        "what convert left alone is frozen",
        "python/fp8/conversion/_freeze.py",
        "            if why is None and converted:\n",
        "            if False:\n",
        RULES,
    ),
    Fault(
        "a layer is frozen whose input is cast to its weight's dtype",
        "python/fp8/conversion/_reads.py",
        "            reads.dtypes.add(path)\n",
        "            pass\n",
        RULES,
    ),
    Fault(
        "codes of a layer without a scale are those of another name",
        "python/fp8/checkpoints/_layers.py",
        "    if scale is None:\n        raise",
        "    if False:\n        raise",
        ERRORS,
    ),
    Fault(
        "an index leads out of its folder",
        "python/fp8/checkpoints/_folder.py",
        'any(c in name for c in "/\\\\\\0:")',
        "False",
        ERRORS,
    ),
    Fault(
        "a tensor may end behind its file",
        "python/fp8/checkpoints/_safetensors.py",
        "    if end > size:\n",
        "    if False:\n",
        ERRORS,
    ),
    Fault(
        "tensors may overlap",
        "python/fp8/checkpoints/_safetensors.py",
        "        if entry.begin != at:\n",
        "        if False:\n",
        ERRORS,
    ),
    Fault(
        "AMD's float8 is taken for ours",
        "python/fp8/checkpoints/_layers.py",
        "        if dtype in _FNUZ:\n",
        "        if False:\n",
        ERRORS,
    ),
    Fault(
        "a scale for 32 elements is no MXFP8",
        "python/fp8/checkpoints/_layers.py",
        '    if entry.dtype == "U8" or groups:\n',
        "    if False:\n",
        ERRORS,
    ),
    Fault(
        "the up projection of an expert goes where the gate is",
        "python/fp8/checkpoints/_experts_plan.py",
        "expert, place * shape[0], transposed",
        "expert, 0, transposed",
        MIXTURES,
    ),
    Fault(
        "tied weights on the meta device are loaded once",
        "python/fp8/checkpoints/_plan.py",
        "        for container, name in self.places:\n            container[name] = new\n",
        "        for container, name in self.places[:1]:\n            container[name] = new\n",
        LOAD,
    ),
    Fault(
        "a loaded layer is a view of its file",
        "python/fp8/checkpoints/_load.py",
        "data = self.read(weight.codes).to(device, copy=True)",
        "data = self.read(weight.codes).to(device)",
        LOAD,
    ),
    Fault(
        "how inputs are scaled is not saved",
        "python/fp8/checkpoints/_save.py",
        "    if inputs := _inputs(layers):\n",
        "    if inputs := {}:\n",
        SAVE,
    ),
    Fault(
        "converted layers are exported alone",
        "python/fp8/checkpoints/_export.py",
        "    for group in sharing_a_scale(model, converted, recipes):\n",
        "    for group in [[module] for module in converted]:\n",
        SAVE,
    ),
    Fault(
        "codes that transformers loads ask for gradients",
        "python/fp8/integrations/transformers/_frozen_quantizer.py",
        "        layer._parameters[name] = nn.Parameter(values, requires_grad=False)\n",
        "        layer._parameters[name] = nn.Parameter(values)\n",
        PRETRAINED,
    ),
    Fault(
        "experts keep codes as numbers",
        "python/fp8/integrations/transformers/_frozen_quantizer.py",
        "                    if any(part.weight is not None for part in slices):\n",
        "                    if False:\n",
        PRETRAINED,
    ),
]
