"""The machine around a run: text on a terminal, files that others read."""
