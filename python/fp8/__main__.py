"""`python -m fp8`: the facts of `fp8.info()` on one screen, to paste into a bug report."""

from .tools import _info

if __name__ == "__main__":
    print(_info.report(_info.info()))
