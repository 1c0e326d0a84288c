"""SpecReason with a base model that has learned to judge single steps, as the paper's base models can."""

from dataclasses import replace

from . import specreason

__all__ = ["build"]

build = replace(specreason.build, slug="specreason-reasoner-2", model="zoo/reasoner-2")
