"""From staged programs to source text; one module per language."""
