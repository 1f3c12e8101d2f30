"""The typed recipe: everything a user can set. A package, since quantizer specs come one a method."""

from qsam2.recipe.load import build_recipe, load_recipe, save_recipe
from qsam2.recipe.recipe import Recipe

__all__ = ["Recipe", "build_recipe", "load_recipe", "save_recipe"]
