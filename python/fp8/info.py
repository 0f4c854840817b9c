"""`python -m fp8.info`: the same as `python -m fp8`, for one release more.

It is a command alone: imported, it leaves its name to the function `fp8.info`.
"""

import sys

from .tools import _info

if __name__ == "__main__":
    print(_info.report(_info.info()))
else:
    sys.modules[__name__] = _info.info  # type: ignore[assignment]
