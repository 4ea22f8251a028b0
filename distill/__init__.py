"""A knowledge-distillation framework for search and recommendation."""
