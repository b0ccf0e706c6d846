"""Plain nn.Modules that rewrites insert. Imports torch and einops only."""
