"""Faults in what fuses residual sums with the norms that read them."""

from __future__ import annotations

from fault import Fault

FUSION = "tests/python/residual/test_residual_fusion.py"
PLACES = "tests/python/residual/test_residual_places.py"
OBSTACLES = "tests/python/residual/test_residual_obstacles.py"
WRITER = "python/fp8/nn/_residual_places.py"
CODE = "python/fp8/nn/_residual_code.py"
FUSED = "python/fp8/nn/_fused_residuals.py"
NORMS = "python/fp8/nn/_fused_norms.py"
KIND = "python/fp8/conversion/_residual_fusion.py"

RESIDUALS = [
    Fault(
        "a stream's gradient is lost in its norm's backward",
        "csrc/torch/norm/autograd.cpp",
        "const at::Tensor dsum = grads.size() > 1 ? grads[1] : at::Tensor();",
        "const at::Tensor dsum = needs == 0 ? grads[1] : at::Tensor();",
        FUSION,
    ),
    Fault(
        "a stream that is handed on counts writes of its own",
        "csrc/torch/norm/autograd.cpp",
        "torch::autograd::impl::set_version_counter(same, torch::autograd::impl::version_counter("
        "x));",
        "",
        OBSTACLES,
    ),
    Fault(
        "statements between a sum and its norm are passed by",
        WRITER,
        "if (copied := _copied(following)) is None:\n                call",
        "if (copied := _copied(following)) is None and self._first_call(following):\n"
        "                call",
        PLACES,
    ),
    Fault(
        "what stands before the norm in its statement is passed by",
        WRITER,
        "        parts = [node.left, node.right]",
        "        parts = [node.right, node.left]",
        PLACES,
    ),
    Fault(
        "a variable that is no longer the sum is taken for it",
        WRITER,
        "names | {target} if source in names else names - {target}",
        "names | {target}",
        PLACES,
    ),
    Fault(
        "a sum that is changed in place is fused",
        WRITER,
        "if self._in_place(names, block, place):",
        "if False:",
        PLACES,
    ),
    Fault(
        "a stream that is changed in place is fused",
        WRITER,
        "if self._in_place(names, block, position):",
        "if False:",
        PLACES,
    ),
    Fault(
        "a stream is handed to more than sums",
        WRITER,
        "if len(read) != 1 or not all(uses[read[0]])",
        "if len(read) != 1",
        PLACES,
    ),
    Fault(
        "a stream is handed to what runs more than once",
        WRITER,
        "once = once and not isinstance(node, _AGAIN)",
        "pass",
        PLACES,
    ),
    Fault(
        "a stream that is read under two names is fused under one",
        WRITER,
        "if len(read) != 1 or",
        "if not read or",
        PLACES,
    ),
    Fault(
        "a forward that looks at its variables is rewritten",
        WRITER,
        "if node.id in _LOOKS or node.id == _Y:",
        "if node.id == _Y:",
        PLACES,
    ),
    Fault(
        "code is rewritten from a source that has changed",
        CODE,
        "if _compiled([*imports, top], filename, code) != code:",
        "if _compiled([*imports, top], filename, code) is None:",
        PLACES,
    ),
    Fault(
        "imports are not told to the compiler",
        CODE,
        "if isinstance(statement, ast.Import | ast.ImportFrom):",
        "if isinstance(statement, ast.ImportFrom):",
        PLACES,
    ),
    Fault(
        "equal code is taken for that of another file",
        CODE,
        "return _rewritten(code, code.co_filename, code.co_qualname)",
        'return _rewritten(code, "", "")',
        PLACES,
    ),
    Fault(
        "a layer's class whose forward was replaced runs the old one",
        FUSED,
        "if is_compiling() or not intact():",
        "if is_compiling():",
        FUSION,
    ),
    Fault(
        "terms of two dtypes are added by the norm",
        FUSED,
        "and a.dtype is b.dtype and a.shape == b.shape",
        "and a.shape == b.shape",
        OBSTACLES,
    ),
    Fault(
        "terms of two shapes are added by the norm",
        FUSED,
        "and a.dtype is b.dtype and a.shape == b.shape",
        "and a.dtype is b.dtype",
        OBSTACLES,
    ),
    Fault(
        "a term's order in memory is lost",
        FUSED,
        "if b.layout is torch.strided and b.is_contiguous() else None",
        "if b.layout is torch.strided else None",
        OBSTACLES,
    ),
    Fault(
        "a stream is handed on where no gradient comes back",
        FUSED,
        "if not x.requires_grad or not torch.is_grad_enabled():",
        "if False:",
        FUSION,
    ),
    Fault(
        "LayerNorm of a stream passes autocast by",
        FUSED,
        "if spec is None or (spec.form == LAYER and torch.is_autocast_enabled(x.device.type)):",
        "if spec is None:",
        OBSTACLES,
    ),
    Fault(
        "a hook of a norm is passed by",
        NORMS,
        "or called_through(norm) is not None or",
        "or",
        OBSTACLES,
    ),
    Fault(
        "a hook of all modules is passed by",
        NORMS,
        "is not None or _has_any_global_hook():",
        "is not None:",
        OBSTACLES,
    ),
    Fault(
        "a call that a norm's class has of its own is passed by",
        NORMS,
        "if type(norm).__call__ is not nn.Module.__call__ or transformed():",
        "if transformed():",
        OBSTACLES,
    ),
    Fault(
        "a sum's norm is called under torch.func",
        NORMS,
        "if type(norm).__call__ is not nn.Module.__call__ or transformed():",
        "if type(norm).__call__ is not nn.Module.__call__:",
        OBSTACLES,
    ),
    Fault(
        "a norm that is not as it was recognized is added to",
        NORMS,
        "return spec if spec and base.forward is own and fuses(self, spec, x) else None",
        "return spec",
        OBSTACLES,
    ),
    Fault(
        "a layer whose forward is changed for its rotation loses that",
        KIND,
        "elif _rotates(kind) or unable(found) is not None:",
        "elif unable(found) is not None:",
        FUSION,
    ),
    Fault(
        "a layer's forward on the instance is passed by",
        "python/fp8/conversion/_classes.py",
        'if has_own_forward(module):\n        return "its forward was replaced on the instance; c',
        'if False:\n        return "its forward was replaced on the instance; c',
        FUSION,
    ),
]
