"""The whole way on the embedded data: draw, tune a teacher, distil, export, compare, classify."""
