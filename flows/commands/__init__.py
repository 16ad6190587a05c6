"""The `sera` commands, one file per command or group of commands."""
