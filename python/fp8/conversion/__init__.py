"""FP8 in a model that exists: `convert`, `freeze`, `revert`, `summary`, and the rules that they
follow.

`worthwhile` and `experts_worthwhile` say of a shape whether FP8 gains; the constants are what they
and the rule for whole models compare with.
"""

from ._convert import convert, revert
from ._expert_rules import MIN_EXPERTS_WORK
from ._expert_rules import worthwhile as experts_worthwhile
from ._freeze import freeze
from ._rules import MIN_MEAN_SIZE, MIN_WORK, worthwhile
from ._summary import summary

__all__ = [
    "MIN_EXPERTS_WORK",
    "MIN_MEAN_SIZE",
    "MIN_WORK",
    "convert",
    "experts_worthwhile",
    "freeze",
    "revert",
    "summary",
    "worthwhile",
]
