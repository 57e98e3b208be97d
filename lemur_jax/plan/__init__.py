"""Planning: what a config costs on a TPU slice, found by compiling its step without a TPU."""
