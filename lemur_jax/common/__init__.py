"""Small shared pieces that every room may use: errors, configs, trees, paths. No JAX at import."""
