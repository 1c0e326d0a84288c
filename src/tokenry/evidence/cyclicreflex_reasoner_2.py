"""CyclicReflex on a reasoner that doubts its wrong steps far more often than its right ones."""

from dataclasses import replace

from . import cyclicreflex_reasoner

__all__ = ["build"]

build = replace(cyclicreflex_reasoner.build, slug="cyclicreflex-reasoner-2", model="zoo/reasoner-2")
