"""The door to a device, where requests wait, and the schedule by which a server admits them."""
