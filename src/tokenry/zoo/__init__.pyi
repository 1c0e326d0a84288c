from .building import build as build
from .recipes import RECIPES as RECIPES
from .recipes import Recipe as Recipe
from .recipes import find_recipe as find_recipe
