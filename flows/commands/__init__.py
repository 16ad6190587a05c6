"""The commands of `sera`, one file a command or a family."""
