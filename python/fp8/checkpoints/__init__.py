"""FP8 checkpoints: `load` fills a model from one, `save` writes one, `export_weights` gives its
tensors one by one. docs/checkpoints.md says which formats those are."""

from ._export import export_weights
from ._load import Loaded, load
from ._save import save

__all__ = ["Loaded", "export_weights", "load", "save"]
