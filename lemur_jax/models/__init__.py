"""The decoder: its shape, its presets, its forward pass and its cache."""
