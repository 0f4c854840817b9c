"""Faults in Python and the build: nothing to compile."""

from __future__ import annotations

from fault import CHECKS, EXPERTS, Fault

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
        "convert changes the config that other models share",
        "python/fp8/experts.py",
        "        own = copy.copy(config)\n",
        "        own = config\n",
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
        "torch.linspace(-13, 17, 64), torch.linspace(19, -15, 64)",
        "torch.linspace(-3, 4, 64), torch.linspace(4, -3, 64)",
        f"{EXPERTS}/test_experts_convert.py",
    ),
    Fault(
        "transformers imported later is not noticed",
        "python/fp8/transformers_hook.py",
        "if fullname != MODULE or",
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
    Fault(
        "make fuzz takes any value for right",
        "tests/fuzz/error_bounds.py",
        "    if bool(bad.any()):\n",
        "    if False:\n",
        f"{CHECKS}/test_fuzz.py",
    ),
    Fault(
        "a smaller case of make fuzz fails for another reason",
        "tests/fuzz/case_fields.py",
        "found is not None and kind_of(found) == kind",
        "found is not None",
        f"{CHECKS}/test_fuzz.py",
    ),
    Fault(
        "a case of make fuzz depends on those before it",
        "tests/fuzz/fuzz.py",
        'rng = random.Random(f"{seed}/{index}")',
        "rng = random",
        f"{CHECKS}/test_fuzz.py",
    ),
    Fault(
        "make soak lets anything grow",
        "tests/soak/footprint.py",
        "if now[name] - before[name] > allowed",
        "if False",
        f"{CHECKS}/test_soak.py",
    ),
    Fault(
        "a check that failed is recorded as passed",
        "benchmarks/status.py",
        '"passed": not failures,',
        '"passed": True,',
        f"{CHECKS}/test_status.py",
    ),
    Fault(
        "a failing test is counted as passed",
        "benchmarks/status.py",
        'if e.tag in ("failure", "error")',
        'if e.tag == "failure"',
        f"{CHECKS}/test_status.py",
    ),
]
