"""Accuracy against visual tokens: what is measured (`points`), and how it is shown (`page`)."""
