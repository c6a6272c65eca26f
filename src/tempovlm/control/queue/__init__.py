"""Who waits for a device: at its door, and before that, by a server's schedule."""
