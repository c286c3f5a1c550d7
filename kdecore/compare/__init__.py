"""The command `kdecore`."""
