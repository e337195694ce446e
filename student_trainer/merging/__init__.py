"""One model out of several of the same architecture: averages, task vectors, and weights by what each model knows."""
