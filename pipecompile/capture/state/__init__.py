"""What a forward reads of Python's state and leaves behind in it: attributes, globals, closures, containers, code."""
