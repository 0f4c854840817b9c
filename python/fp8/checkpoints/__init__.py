"""FP8 checkpoints: `load` fills a model from one, `save` writes one, `export_weights` gives its
tensors one by one. docs/checkpoints.md says which formats those are."""

from ._load import Loaded, load

__all__ = ["Loaded", "load"]
