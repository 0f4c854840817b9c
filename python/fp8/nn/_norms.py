"""`fp8.RMSNorm`: nn.RMSNorm whose forward and backward are one pass each."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

_rms_norm = torch.ops.fp8.rms_norm.default
_FORMS = ("scale_then_round", "round_then_scale", "scale_by_one_plus")


class RMSNorm(nn.RMSNorm):
    """y = weight · x / sqrt(mean(x²) + eps) over the last dimension, by `fp8.ops.rms_norm`.

    Takes the arguments of nn.RMSNorm, has its parameters and its state_dict, and computes in
    bfloat16, float16 and float32 only. Other numbers of dimensions than one in normalized_shape:
    ValueError.

    Args, beyond those of nn.RMSNorm:
        form: where the product with the weight is rounded, see `fp8.ops.rms_norm`. With
            "scale_by_one_plus" the weight begins as zeros. Unknown: ValueError.

    Example:
        >>> norm = fp8.RMSNorm(4096, eps=1e-6, device="cuda", dtype=torch.bfloat16)
    """

    __module__ = "fp8.nn"  # what pickles name

    form: str = "scale_then_round"

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        form: str = "scale_then_round",
    ) -> None:
        if form not in _FORMS:
            raise ValueError(f"fp8.RMSNorm: expected form out of {_FORMS}, got {form!r}")
        if not isinstance(normalized_shape, int) and len(normalized_shape) != 1:
            raise ValueError(
                "fp8.RMSNorm: expected normalized_shape of one dimension, "
                f"got {tuple(normalized_shape)}"
            )
        self.form = form
        shape = normalized_shape if isinstance(normalized_shape, int) else list(normalized_shape)
        super().__init__(shape, eps, elementwise_affine, device, dtype)

    def reset_parameters(self) -> None:
        """Weights that change nothing."""
        if self.elementwise_affine:
            (nn.init.zeros_ if self.form == "scale_by_one_plus" else nn.init.ones_)(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """y of x's shape [..., normalized_shape]; see `fp8.ops.rms_norm`."""
        result: Tensor = _rms_norm(x, self.weight, self.eps, self.form)
        return result

    def extra_repr(self) -> str:
        """That of nn.RMSNorm, and the form."""
        return f"{super().extra_repr()}, form={self.form!r}"
