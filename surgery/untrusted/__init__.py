"""What files from elsewhere may say: JSON, names of files, links, headers of safetensors files.

Everything that reads a file which somebody else may have written comes through here. What does
not hold is refused with a ``SurgeryError`` before memory is allocated for it.
"""
