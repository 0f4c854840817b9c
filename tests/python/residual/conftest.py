"""Registers the operators torch.ops.fp8.* before the tests of this folder run."""

import fp8  # noqa: F401
