"""Many short runs from one base: what each mixture of data gives and costs."""
