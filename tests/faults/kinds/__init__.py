"""The kinds of fault that are injected.

A kind is a function of a `Case` whose run trains. It injects the fault at a moment or place that it draws, checks what
must come of it, mends what a person would have to mend, and leaves a run that trains, or one that has ended well.
"""
