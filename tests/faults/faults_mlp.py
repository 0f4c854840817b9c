"""Faults in the fusion of MLPs: what is recognized, and when a call is no node."""

from __future__ import annotations

from fault import MLP, Fault

FUSION = f"{MLP}/test_mlp_fusion.py"
CHANGES = f"{MLP}/test_mlp_fusion_changes.py"
SAFETY = f"{MLP}/test_mlp_fusion_safety.py"
UNLIKE = f"{MLP}/test_mlp_fusion_unlike.py"
USES = f"{MLP}/test_mlp_fusion_uses.py"
PROBE = "python/fp8/nn/_mlp_probe.py"
FUSED = "python/fp8/nn/_fused_mlps.py"
LAYERS = "python/fp8/nn/_mlp.py"
SAVE = f"{MLP}/test_mlp_save_fp8.py"
FUSION_SAVE = f"{MLP}/test_mlp_fusion_save.py"
TILES = "csrc/core/mlp/backward_tile.cuh"
UNIT = "csrc/core/mlp/unit.cuh"
BLOCKS = "csrc/core/mlp/mlp_backward_blockwise.cu"

MLPS = [
    Fault(
        "what happens after the last layer is not looked at",
        PROBE,
        "if y is not self.answers[last] or any(",
        "if any(",
        UNLIKE,
    ),
    Fault(
        "the first layers may have another input",
        PROBE,
        "y is not self.answers[last] or any(given is not x for _, given in first)",
        "y is not self.answers[last]",
        UNLIKE,
    ),
    Fault(
        "what is written in place is not looked at",
        PROBE,
        "if x._version != before or y._version != 0:",
        "if False:",
        UNLIKE,
    ),
    Fault(
        "an MLP that drops in training is fused",
        PROBE,
        "for training in (True, False) for graded in (True, False)]",
        "for training in (False,) for graded in (True, False)]",
        UNLIKE,
    ),
    Fault(
        "an activation of another gradient is fused",
        PROBE,
        "            if not graded:\n",
        "            if True:\n",
        UNLIKE,
    ),
    Fault(
        "an MLP that counts its calls is fused",
        PROBE,
        "if not state.same(self.clone):",
        "if False:",
        UNLIKE,
    ),
    Fault(
        "an MLP that rounds otherwise in bfloat16 is fused",
        FUSED,
        "if x.dtype not in dtypes or",
        "if",
        UNLIKE,
    ),
    Fault(
        "hooks of checkpoints see what the probe saves",
        PROBE,
        "with undisturbed(), saved_tensors_hooks(lambda t: t, lambda t: t):",
        "with undisturbed():",
        USES,
    ),
    Fault(
        "an MLP that was recognized once is never looked at again",
        FUSED,
        "if owner() is module and state.same(module):",
        "if owner() is module:",
        CHANGES,
    ),
    Fault(
        "compiled code does not depend on the activation",
        FUSED,
        "        getattr(module, name)(x.new_empty((0, 2)))\n",
        "        pass\n",
        USES,
    ),
    Fault(
        "compiled code does not depend on attributes",
        FUSED,
        "    for name, value in attributes:\n",
        "    for name, value in ():\n",
        USES,
    ),
    Fault(
        "a second argument of an MLP is dropped",
        FUSED,
        "if len(args) == 1 and not kwargs and",
        "if args and",
        SAFETY,
    ),
    Fault(
        "compiled code bypasses a forward replaced in the class",
        FUSED,
        " and base.forward is own:",
        ":",
        USES,
    ),
    Fault(
        "autocast that a module turns off stays on",
        FUSED,
        "if not autocast or powers or",
        "if powers or",
        FUSION,
    ),
    Fault(
        "an MLP whose layers differ in recipe is one node",
        LAYERS,
        'return "recipe"',
        "pass",
        CHANGES,
    ),
    Fault(
        "an MLP whose layers differ in dtype is one node",
        LAYERS,
        'return "dtype"',
        "pass",
        SAFETY,
    ),
    Fault(
        "a layer's main_grad is passed over",
        LAYERS,
        'return "has a main_grad"',
        "pass",
        SAFETY,
    ),
    Fault(
        "layers of a node are never called",
        LAYERS,
        "            layer.__dict__[CALLED] = True\n",
        "            pass\n",
        USES,
    ),
    Fault(
        "hooks of all modules do not see the layers of an MLP",
        LAYERS,
        " or _has_any_global_hook():",
        ":",
        f"{MLP}/test_mlp_modules.py",
    ),
    Fault(
        "an MLP takes weights of other shapes",
        FUSED,
        "    if not _fit(children, gate, up, down, merged):\n",
        "    if False:\n",
        CHANGES,
    ),
    Fault(
        "what fully_shard notes of an MLP counts",
        PROBE,
        """(name for name in vars(module) if name.startswith("__"))""",
        "()",
        USES,
    ),
    Fault(
        "an MLP is fused whose layers are not in FP8",
        "python/fp8/conversion/_mlp_fusion.py",
        " or not all(isinstance(linear, Linear) for linear in linears.values()):",
        ":",
        FUSION,
    ),
    Fault(
        "an MLP keeps its products in 16 bits, whatever is asked for",
        "csrc/torch/mlp/saves.h",
        "fp8((needs & mlp_needs::kFp8) != 0 && products),",
        "fp8(false),",
        SAVE,
    ),
    Fault(
        "what an MLP saves as FP8 has one scale for all rows",
        "csrc/torch/mlp/unit.cpp",
        "{.granularity = Granularity::kRowwise}).along_cols;",
        "{}).along_cols;",
        SAVE,
    ),
    Fault(
        "MLPs that were fused keep gate and up as they did before",
        "python/fp8/conversion/_convert.py",
        "        _mlp_fusion.keep(model, save)\n",
        "",
        FUSION_SAVE,
    ),
    Fault(
        "an unpickled MLP keeps gate and up in 16 bits",
        FUSED,
        "return Notes, (self.spec, self.save)",
        "return Notes, (self.spec,)",
        FUSION_SAVE,
    ),
    Fault(
        "a shallow copy of an MLP keeps gate and up in 16 bits",
        FUSED,
        "= Notes(notes.spec, notes.save)",
        "= Notes(notes.spec)",
        FUSION_SAVE,
    ),
    Fault(
        "numerics: down's weight gradient reads the h of the forward",
        "python/fp8/tools/_mlp_values.py",
        'if not a.get("needs", 0) & _FP8:',
        "if True:",
        "tests/python/tools/test_numerics_values.py",
    ),
    Fault(
        "CUDA: codes of up have the scales of gate",
        TILES,
        "args_.unit.up_scale + row",
        "args_.unit.gate_scale + row",
        SAVE,
        gpu=True,
    ),
    Fault(
        "CUDA: the first pass takes the scale of another row",
        UNIT,
        "__ldg(scale + row)",
        "__ldg(scale)",
        SAVE,
        gpu=True,
    ),
    Fault(
        "CUDA: codes lose every other pair",
        UNIT,
        "word >> (16 * (pair % 2))",
        "word >> (16 * (pair % 1))",
        SAVE,
        gpu=True,
    ),
    Fault(
        "CUDA: halves of one gradient have their columns' blocks in matrices of their own",
        BLOCKS,
        ".scale_t_ld = args.joint ? 2 * features : features",
        ".scale_t_ld = features",
        f"{MLP}/test_mlp_values.py",
        gpu=True,
    ),
    Fault(
        "CUDA: a thread's first row stands for all that it quantizes",
        BLOCKS,
        "for (int r = 0; r < kRows; ++r) v[r] = places.take(place, r);",
        "for (int r = 0; r < kRows; ++r) v[r] = places.take(place, 0);",
        f"{MLP}/test_mlp_values.py",
        gpu=True,
    ),
]
