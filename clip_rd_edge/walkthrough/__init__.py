"""The complete workflow on the built-in data set: tune a teacher, distil, export, compare, classify."""
