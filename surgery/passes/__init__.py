"""Rewriting passes, one file each; the file name is the name used in a rule file."""
