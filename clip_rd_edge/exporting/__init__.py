"""Export a model: plan it, write its towers in a format and a precision, and lay the files out for a program."""
