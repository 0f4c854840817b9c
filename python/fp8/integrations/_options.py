"""Options that an integration keeps for `fp8.convert`, which it calls later."""

import inspect
from typing import Any

from ..conversion import convert
from ..nn._mlp import check_save
from ..recipe import check_grouped_recipe, check_recipe


def check_options(who: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options, if `fp8.convert` takes them: mistakes show where they are made.

    Raises TypeError for an unknown name and ValueError for an unknown recipe.
    """
    known = list(inspect.signature(convert).parameters)[1:]
    for name in options:
        if name not in known:
            raise TypeError(f"{who}: unknown option {name!r}; fp8.convert takes {', '.join(known)}")
    if "recipe" in options:
        check_recipe(options["recipe"])
    if options.get("experts_recipe") is not None:
        check_grouped_recipe(options["experts_recipe"])
    if "save" in options:
        check_save(who, options["save"])
    return options
