"""Faults in Python and the build: nothing to compile."""

from __future__ import annotations

from fault import EXPERTS, MEMORY, Fault

PYTHON = [
    Fault(
        "the output head is converted",
        "python/fp8/rules.py",
        'HEAD_NAMES = frozenset({"lm_head"})',
        "HEAD_NAMES = frozenset()",
        "tests/python/module/test_convert_rules.py",
    ),
    Fault(
        "from_linear forgets the recipe",
        "python/fp8/linear.py",
        "        new.recipe = name\n",
        "",
        "tests/python/module/test_from_linear.py",
    ),
    Fault(
        "half of the model's dtype reaches the static scale",
        "python/fp8/linear.py",
        "moved.dtype != torch.float32",
        "False",
        "tests/python/module/test_static_scale.py",
    ),
    Fault(
        "a later batch replaces what calibrate saw",
        "python/fp8/calibrate.py",
        "torch.maximum(running, amax.to(running.device), out=running)",
        "running.copy_(amax)",
        "tests/python/module/test_calibrate.py",
    ),
    Fault(
        "a router is taken for any other linear",
        "python/fp8/rules.py",
        "        if self.routed is not None:\n",
        "        if False:\n",
        f"{EXPERTS}/test_experts_rules.py",
    ),
    Fault(
        "a step of an optimizer leaves cached weights as they were",
        "python/fp8/cached_weights.py",
        "    torch.ops.fp8._forget_weights()\n",
        "    return\n",
        MEMORY,
    ),
    Fault(
        "a step that fails half way leaves cached weights as they were",
        "python/fp8/cached_weights.py",
        "        register_optimizer_step_pre_hook(_forget_weights),\n",
        "",
        MEMORY,
    ),
    Fault(
        "convert changes the config that other models share",
        "python/fp8/experts.py",
        "copies[id(config)] = copy.copy(config)",
        "copies[id(config)] = config",
        f"{EXPERTS}/test_experts_convert.py",
    ),
    Fault(
        "an expert's rows end where they begin",
        "python/fp8/experts.py",
        "out_int32=True, right=True)",
        "out_int32=True)",
        f"{EXPERTS}/test_experts_passes.py",
    ),
    Fault(
        "the gradient of gathered rows goes to other tokens",
        "python/fp8/experts.py",
        "        rows = grad.index_select(0, back)\n",
        "        rows = grad\n",
        f"{EXPERTS}/test_experts_passes.py",
    ),
    Fault(
        "a clamped gating is taken for SiLU",
        "python/fp8/gating.py",
        "torch.stack([near, far.flatten()])",
        "torch.stack([near / 4, near / 4])",
        f"{EXPERTS}/test_experts_convert.py",
    ),
    Fault(
        "transformers imported later is not noticed",
        "python/fp8/_import_hook.py",
        "if fullname not in _callbacks or",
        "if True or",
        f"{EXPERTS}/test_experts_registration.py",
    ),
    Fault(
        "another torch minor is not noticed",
        "python/fp8/_loader.py",
        'version.split("+")[0].split(".")[:2]',
        'version.split("+")[0].split(".")[:1]',
        "tests/python/module/test_loader.py",
    ),
    Fault(
        "an RPATH names the build machine",
        "CMakeLists.txt",
        'set(CMAKE_INSTALL_RPATH "$ORIGIN;',
        'set(CMAKE_INSTALL_RPATH "/opt/build;$ORIGIN;',
        "tests/python/build/test_build_libraries.py",
    ),
]
