"""Pictures into features: crops, their tiling and the vision encoder."""
