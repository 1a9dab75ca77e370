"""Training: a recipe, an optimizer, a step, a loop, a run folder and its report; knows no architecture."""
