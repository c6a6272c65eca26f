"""Other people's programs, by their own interfaces for plug-ins."""
