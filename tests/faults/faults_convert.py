"""Faults in conversion: gatings, weights read past forward, marks of calls, defaults, rollback."""

from __future__ import annotations

from fault import EXPERTS, Fault

GATING = f"{EXPERTS}/test_gating.py"
FOUND = f"{EXPERTS}/test_gating_found.py"
GRADIENTS = f"{EXPERTS}/test_gating_gradients.py"
DEFAULTS = f"{EXPERTS}/test_experts_defaults.py"
READS = "tests/python/module/test_convert_reads.py"
CALLS = "tests/python/module/test_never_called.py"
LOADING = "tests/python/module/test_convert_defaults.py"

CONVERT = [
    Fault(
        "a gating that was found once is never looked at again",
        "python/fp8/integrations/transformers/_gating.py",
        "found[0]() is module and found[1].same(module)",
        "found[0]() is module",
        GATING,
    ),
    Fault(
        "compiled code takes a gating that no longer holds",
        "python/fp8/integrations/transformers/_gating.py",
        "module is None or not state.same(module)",
        "module is None",
        GATING,
    ),
    Fault(
        "compiled code does not depend on what the gating reads",
        "python/fp8/integrations/transformers/_experts.py",
        "            watch(self, x.new_empty((0, up.size(1))))\n",
        "            pass\n",
        GATING,
    ),
    Fault(
        "a gating with a parameter is taken for one without",
        "python/fp8/integrations/transformers/_probe.py",
        "if drew or origins.foreign or not",
        "if drew or not",
        FOUND,
    ),
    Fault(
        "the probe draws from the caller's generator",
        "python/fp8/integrations/transformers/_probe.py",
        "            torch.set_rng_state(generator)\n",
        "            pass\n",
        FOUND,
    ),
    Fault(
        "a hook on the activation is passed over",
        "python/fp8/integrations/transformers/_gating.py",
        "None if state.hooked else _find(module)",
        "_find(module)",
        FOUND,
    ),
    Fault(
        "what a closure holds may change unnoticed",
        "python/fp8/integrations/transformers/_probe.py",
        "            self._cells.append((cell, _stored(_content(cell))))\n",
        "",
        GATING,
    ),
    Fault(
        "a limit beyond those in use is not seen",
        "python/fp8/integrations/transformers/_gating.py",
        "torch.stack([near, far.flatten(), halves, pairs])",
        "torch.stack([near, near, halves, pairs])",
        GATING,
    ),
    Fault(
        "a gating that differs near zero is taken for another",
        "python/fp8/integrations/transformers/_gating.py",
        "torch.stack([near, far.flatten(), halves, pairs])",
        "torch.stack([near, far.flatten()])",
        GRADIENTS,
    ),
    Fault(
        "a gating with a gradient of its own is taken for another",
        "python/fp8/integrations/transformers/_gating.py",
        "gate is not None and _has_gradient_of(gate, apply, probe)",
        "gate is not None",
        GRADIENTS,
    ),
    Fault(
        "an attribute of a module that a gating reads does not count",
        "python/fp8/integrations/transformers/_probe.py",
        "self._note_names(vars(value), names)\n",
        "pass\n",
        GRADIENTS,
    ),
    Fault(
        "the default device reaches the probe",
        "python/fp8/integrations/transformers/_probe.py",
        '        stack.enter_context(torch.device("cpu"))\n',
        "",
        FOUND,
    ),
    Fault(
        "fake tensors reach the probe",
        "python/fp8/integrations/transformers/_probe.py",
        "        stack.enter_context(_disable_current_modes())\n",
        "",
        FOUND,
    ),
    Fault(
        "a copy takes along what the original's gating was found from",
        "python/fp8/integrations/transformers/_gating.py",
        "found[0]() is module and found[1]",
        "found[1]",
        GATING,
    ),
    Fault(
        "a failed conversion leaves some layers converted",
        "python/fp8/conversion/_convert.py",
        "    except BaseException:\n",
        "    except Warning:\n",
        DEFAULTS,
    ),
    Fault(
        "Conv1D is passed over in silence",
        "python/fp8/conversion/_rules.py",
        "    if kind is None:\n        return []\n    return [(name, module)",
        "    if True:\n        return []\n    return [(name, module)",
        DEFAULTS,
    ),
    Fault(
        "a weight that is read and not called is converted",
        "python/fp8/conversion/_rules.py",
        '            found[module].reader = f"its weight',
        '            found[module].also_read = f"its weight',
        READS,
    ),
    Fault(
        "a weight's dtype counts as its values",
        "python/fp8/conversion/_reads.py",
        "if rest[0] in _METADATA or",
        "if",
        READS,
    ),
    Fault(
        "branches that the settings rule out count",
        "python/fp8/conversion/_bytecode.py",
        "return _reached(instructions, {}) - _reached(instructions, known)",
        "return set()",
        READS,
    ),
    Fault(
        "a local name hides the layer",
        "python/fp8/conversion/_reads.py",
        "        modules[after[0].value].add(path)\n",
        "        pass\n",
        READS,
    ),
    Fault(
        "a layer that was never called goes unsaid",
        "python/fp8/nn/_calls.py",
        "    missing = [module for module, mark in calls.items() if not mark]\n",
        "    missing: list[nn.Module] = []\n",
        CALLS,
    ),
    Fault(
        "a compiler traces the mark",
        "python/fp8/nn/_linear.py",
        "        tracing = is_compiling()\n",
        "        tracing = False\n",
        CALLS,
    ),
    Fault(
        "blocks that share compiled code seem never called",
        "python/fp8/nn/_calls.py",
        'if "traced" in calls.values():',
        "if False:",
        CALLS,
    ),
    Fault(
        "the caller's inference mode reaches a scale that is loaded",
        "python/fp8/nn/_linear.py",
        "with torch.inference_mode(False):  # a normal tensor, whatever",
        "if True:  # whatever",
        LOADING,
    ),
    Fault(
        "revert changes some layers before it complains",
        "python/fp8/conversion/_convert.py",
        '    check_model("revert", model)\n    converted = []\n',
        '    check_model("revert", model)\n    model[0].input_scale = None\n    converted = []\n',
        LOADING,
    ),
]
