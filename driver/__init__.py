"""From a model and a recipe to an engine: compile, pass manager, certificates, search, CLI."""
