"""The Llama model: its shape, its presets, its forward pass and its cache."""
