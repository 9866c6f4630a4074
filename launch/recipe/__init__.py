"""Reads recipes: from a YAML file and overrides to a checked recipe, with a sentence for every mistake."""
