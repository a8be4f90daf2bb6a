"""The complete workflow on the embedded data set: tune a teacher, distil, export, compare, classify."""
