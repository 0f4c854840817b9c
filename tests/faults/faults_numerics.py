"""Faults in what fp8.numerics measures and fp8.info judges: nothing to compile."""

from __future__ import annotations

from fault import Fault

TOOLS = "tests/python/tools"
_WATCH = "python/fp8/tools/_numerics.py"
_SEE = "python/fp8/tools/_observations.py"

NUMERICS = [
    Fault(
        "a backward does not know whose it is",
        _WATCH,
        "                node.metadata[self._note] = tuple(names)\n",
        "                pass\n",
        f"{TOOLS}/test_numerics.py",
    ),
    Fault(
        "a weight that autocast casts again has no name",
        _WATCH,
        "if function is _cast:",
        "if False:",
        f"{TOOLS}/test_numerics.py",
    ),
    Fault(
        "what checkpointing runs again is another call",
        _WATCH,
        "again = node is not None and not backward",
        "again = False",
        f"{TOOLS}/test_numerics.py",
    ),
    Fault(
        "a measurement of an inner context is a call",
        _WATCH,
        "            _thread.measuring = True\n",
        "            _thread.measuring = False\n",
        f"{TOOLS}/test_numerics_context.py",
    ),
    Fault(
        "a static scale is not the product's",
        _SEE,
        'static=a["input_scale"]',
        "static=None",
        f"{TOOLS}/test_numerics_values.py",
    ),
    Fault(
        "a tensor that comes again has the newest record's scale",
        _SEE,
        "torch.where(guess != 0, guess, newest)",
        "newest",
        f"{TOOLS}/test_numerics_values.py",
    ),
    Fault(
        "the amax of a history is rounded twice on its way to codes",
        "python/fp8/tools/_quantization.py",
        "ops.quantize_tensorwise(torch.cat([finite, row]), dtype, power_of_two=option)",
        "ops.quantize_tensorwise(torch.cat([finite, row]), dtype, 1 / (448.0 / amax))",
        f"{TOOLS}/test_numerics_values.py",
    ),
    Fault(
        "what rounds to the largest code counts as saturated",
        "python/fp8/tools/_quantization.py",
        "(1 + half / largest)",
        "1",
        f"{TOOLS}/test_numerics_values.py",
    ),
    Fault(
        "the gradient of gate leaves the activation out",
        "python/fp8/tools/_mlp_values.py",
        "d_gate = _aten.silu_backward(d_activated, gate)",
        "d_gate = d_activated",
        f"{TOOLS}/test_numerics_values.py",
    ),
    Fault(
        "an old driver is taken for a hidden GPU",
        "python/fp8/tools/_doctor.py",
        "if _major(m.driver) < needed:",
        "if False:",
        f"{TOOLS}/test_doctor.py",
    ),
    Fault(
        "a progress bar in a log file",
        "python/fp8/_native/progress.py",
        ' != "0" and sys.stderr.isatty()',
        ' != "0"',
        f"{TOOLS}/test_progress.py",
    ),
]
