"""The subcommands of `kd`, one module per command or group; each is imported when it is called."""
