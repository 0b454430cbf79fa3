"""The built-in world: its facts and text, its people (annotators) and its judge. See docs/world.md."""
