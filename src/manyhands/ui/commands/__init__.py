"""The commands, one module each, imported when they are run. They are thin: what they do is in the rooms below."""
