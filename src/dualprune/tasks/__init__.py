"""One folder per task, each with its data, its models and its metrics; the library itself never needs them."""
