"""Where processes train together, no launch of this library waits for a collective to end."""

import torch.distributed as dist

from . import loader


def spare_collectives() -> None:
    """Called where layers are made: by then a program has joined its process group, as a rule.

    See FP8_WHOLE_GPU_LAUNCHES in docs/environment.md. Where WORLD_SIZE is set, the library knows
    already.
    """
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        loader.native().spare_collectives()
