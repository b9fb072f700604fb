"""What is measured: log weights, log p(x), whole data sets."""
