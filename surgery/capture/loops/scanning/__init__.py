"""Where a function runs blocks, and where it does something with one that cannot be followed.

An abstract interpretation of the function's syntax tree, blind to the order of statements: a name
stands for whatever is assigned to it anywhere in its scope. Names of nested functions, lambdas and
comprehensions have scopes of their own; a nested function is followed through its calls.

    analyst      remembers what was found in which function
    scan         one function, round after round until nothing new is learnt
    statements, expressions, calls, outside
                 what each part of its syntax tree does with blocks
    names        what names may stand for
    contents     what blocks there are in what a name may stand for
    notes        what is found
"""

from surgery.capture.loops.scanning.analyst import Analyst

__all__ = ["Analyst"]
