"""`python -m fp8.info`: the facts of `fp8.info()` on one screen, to paste into a bug report."""

import sys

from . import _info

if __name__ == "__main__":
    print(_info.report(_info.info()))
else:
    # `import fp8.info` would put this module where the function fp8.info is: keep the function
    # there.
    sys.modules[__name__] = _info.info  # type: ignore[assignment]
