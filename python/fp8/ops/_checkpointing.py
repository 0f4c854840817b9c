"""The operators that policies of selective activation checkpointing look for."""

from typing import Any

import torch

_ops = torch.ops.fp8

MATMUL_OPS: frozenset[Any] = frozenset(
    (
        _ops._linear_forward.default,
        _ops._grouped_forward.default,
        _ops._moe_forward.default,
        _ops._experts_frozen_forward.default,
        _ops._merged_forward.default,
        _ops._mlp_forward.default,
        _ops.fused_linear.default,
        _ops.grouped_linear.default,
        _ops.moe_experts.default,
        _ops.linear_frozen.default,
        _ops.experts_frozen.default,
        _ops.merged_linear.default,
        _ops.mlp.default,
        _ops.scaled_mm.default,
        _ops.grouped_mm.default,
    )
)
"""What the forward of a model in FP8 calls in place of `aten.mm`, as OpOverloads: linear layers,
grouped ones and experts, with gradients (the private ones) and without. Save their results and a
checkpointed block recomputes everything else; what is saved of a linear layer is y and, where a
gradient of the weight is to be made in FP8, the quantized x.

Example:
    >>> from torch.utils.checkpoint import (
    ...     CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts)
    >>> SAVED = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, *fp8.ops.MATMUL_OPS}
    >>> def policy(context, op, *args, **kwargs):
    ...     saved = op in SAVED
    ...     return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE
    >>> contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    >>> y = checkpoint(block, x, use_reentrant=False, context_fn=contexts)
"""
