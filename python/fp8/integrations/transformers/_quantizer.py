"""`from_pretrained(..., quantization_config=ConvertConfig("rowwise"))`: fp8.convert, while loading.

Importing this module makes the two classes known to transformers' registries of quantizers.

Nothing is quantized: weights stay as they are loaded, layers compute in FP8, and the model keeps no
quantization config, so a checkpoint that it writes is one of plain nn.Linear. Checkpoints whose
weights are FP8 codes are another job (`pre_quantized`), which would be another config and quantizer
beside these.
"""

from typing import Any

from torch import nn

from ...conversion import convert
from .._missing import missing
from .._options import check_options

try:
    from transformers.quantizers import HfQuantizer, auto
    from transformers.utils.quantization_config import QuantizationConfigMixin
except ImportError as error:
    raise missing("fp8.integrations.transformers", "transformers", "5.17.0", error) from error

METHOD = "fp8_convert"
"""The name in transformers' registries; "fp8" is that of its own quantizer of 128 x 128 blocks."""


class ConvertConfig(QuantizationConfigMixin):
    """For `from_pretrained(quantization_config=...)`: train the model with `fp8.convert`.

    Converted before the weights come, so that a device_map and tensor parallel plans find FP8
    layers. The saved model is that of nn.Linear, and its config names nothing of fp8.

    Args:
        recipe: as of `fp8.convert`.
        quant_method: what a dict names, in place of this object.
        options: filter, experts_recipe, fuse, save, as of `fp8.convert`.

    Raises TypeError for an unknown option and ValueError for an unknown recipe.

    Example:
        >>> config = fp8.integrations.transformers.ConvertConfig("rowwise")
        >>> AutoModelForCausalLM.from_pretrained(name, quantization_config=config)
    """

    def __init__(
        self, recipe: Any = "tensorwise", *, quant_method: str = METHOD, **options: Any
    ) -> None:
        self.quant_method = quant_method
        self.options = check_options(type(self).__name__, {"recipe": recipe, **options})

    def to_dict(self) -> dict[str, Any]:
        """For logs: what JSON cannot say (a filter) as text."""
        plain = (str, bool, int, float, type(None))
        shown = {k: v if isinstance(v, plain) else str(v) for k, v in self.options.items()}
        return {"quant_method": self.quant_method, **shown}


class ConvertQuantizer(HfQuantizer):
    """What transformers calls while it loads a model."""

    requires_calibration = False

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Raises ValueError for a checkpoint that says it was quantized by this method: none is."""
        if self.pre_quantized:
            raise ValueError(
                f"fp8: the checkpoint's quantization_config has quant_method {METHOD!r}, which no "
                "checkpoint has: expected weights in high precision"
            )

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        return convert(model, **self.quantization_config.options)

    def postprocess_model(self, model: Any, **kwargs: Any) -> None:
        """The model is one like any other: `.half()`, saving and Trainer ask nothing."""
        self.remove_quantization_config(model)

    def is_serializable(self) -> bool:
        """Weights are saved as they are."""
        return True

    @property
    def is_trainable(self) -> bool:
        """They are trained as they are."""
        return True


auto.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(METHOD, ConvertConfig)
auto.AUTO_QUANTIZER_MAPPING.setdefault(METHOD, ConvertQuantizer)
