"""Many runs: comparisons of methods and hyperparameter search."""
