"""Python files that build a rewritten model without this library."""
